"""Whatever dtypes a policy trains in, the replica's law is its training forward's, and dropout has no part in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from replicas import IDS, autocast, logits_of, policy_logits, replica_logits
from tiny_models import FAMILIES, ragged_prompts, tiny_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from trl_runs import ALWAYS_SPECULATE, make_model, make_trainer, module_state, train, weights

from trl_selfspec import kernels
from trl_selfspec.engine.engine import RolloutOutput, SelfSpecEngine
from trl_selfspec.kernels.cpu import build
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.policy.replica import PolicyReplica


# Largest error of a logit, in units of their spread: sums in another order, each layer rounded to 8 bits.
KERNEL_TOLERANCE = 0.05
# Mean error of a token's log-probability, as a share of what rounding to bf16 does to it. Sums in another order flip
# the rounding of some activations: 0 to 0.2 of it, more where torch's bf16 products depend on the number of rows.
SHARE_OF_ROUNDING = 0.75
PROMPTS = ragged_prompts([3, 9, 6])
SAMPLED = GenerationConfig(max_new_tokens=10, do_sample=True, top_k=0)
LOGP = "sampling/sampling_logp_difference/max"


def speculating(model: nn.Module, autocast_dtype: torch.dtype | None = None) -> SelfSpecEngine:
    options = SelfSpecOptions("qint8", num_speculative_tokens=3, max_active_sequences=8)
    return SelfSpecEngine(model, options, autocast_dtype)  # type: ignore[arg-type]


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_library", lambda: None)


@pytest.fixture
def own_kernels(instruction_set: str) -> None:
    if not kernels.available():
        pytest.skip("needs a C compiler and AVX2")


@pytest.mark.usefixtures("torch_kernels")
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "qwen3_moe"])
def test_under_autocast_the_replica_is_the_training_forward(
    family: str, dtype: torch.dtype, autocast_dtype: torch.dtype
) -> None:
    """Prevents importance ratios other than 1 in the first step, in each pair of weights' and autocast's dtype."""
    if family == "gpt_neox" and {dtype, autocast_dtype} == {torch.bfloat16, torch.float16}:
        pytest.skip("torch's LayerNorm refuses the policy itself")
    model = tiny_model(family, dtype=dtype)
    assert torch.equal(logits_of(model, autocast_dtype), policy_logits(model, autocast_dtype))


@pytest.mark.usefixtures("torch_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_autocast_the_replica_is_the_training_forward(family: str, dtype: torch.dtype) -> None:
    """Prevents a cast that the policy does not make."""
    model = tiny_model(family, dtype=dtype)
    assert torch.equal(logits_of(model), policy_logits(model))


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_our_kernels_stay_within_rounding(family: str) -> None:
    """Prevents a kernel that is fast because it computes something else."""
    model = tiny_model(family)
    ours, theirs = logits_of(model, torch.bfloat16), policy_logits(model, torch.bfloat16)
    if family == "qwen3_moe":  # rounding flips its router at single positions
        assert (ours - theirs).abs().median() < KERNEL_TOLERANCE * theirs.std()
    else:
        assert (ours - theirs).abs().max() < KERNEL_TOLERANCE * theirs.std()


@pytest.mark.usefixtures("torch_kernels")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_log_probabilities_of_a_rollout_are_the_trainers(family: str) -> None:
    """Prevents a law that is right without a cache and wrong with it, in 16 bits."""
    check_log_probabilities(tiny_model(family))


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_log_probabilities_by_our_kernels_are_the_trainers(family: str) -> None:
    """The same for the fast path of each CPU."""
    check_log_probabilities(tiny_model(family))


def check_log_probabilities(model: PreTrainedModel) -> None:
    """Nearer to the policy's own forward under autocast than that is to the policy's forward in fp32."""
    output = speculating(model, torch.bfloat16).generate(PROMPTS, SAMPLED, seed=0)
    autocast_law, fp32_law = (logprobs(model, output, dtype) for dtype in (torch.bfloat16, None))
    drawn = torch.tensor([logprob for row in output.policy_logprobs for logprob in row])
    tolerance = SHARE_OF_ROUNDING * (autocast_law - fp32_law).abs().mean()
    assert (drawn - autocast_law).abs().mean() < tolerance
    assert (drawn - fp32_law).abs().mean() > tolerance, "negative control: the law of fp32 is another one"


@torch.no_grad()
def logprobs(model: PreTrainedModel, output: RolloutOutput, dtype: torch.dtype | None) -> Tensor:
    """Log-probabilities of a rollout's tokens by the model's forward over whole rows."""
    rows = []
    for prompt, tokens in zip(PROMPTS, output.completion_ids, strict=True):
        with autocast(dtype):
            law = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        rows.append(law.gather(1, torch.tensor(tokens)[:, None])[:, 0])
    return torch.cat(rows)


@pytest.mark.usefixtures("torch_kernels")
def test_another_precision_is_noticed() -> None:
    """Negative control: weights rounded for autocast are not those of the fp32 law, nor of another autocast."""
    model = tiny_model("llama")
    laws = [policy_logits(model, dtype) for dtype in (None, torch.bfloat16, torch.float16)]
    for index, dtype in enumerate((None, torch.bfloat16, torch.float16)):
        equal = [torch.equal(logits_of(model, dtype), law) for law in laws]
        assert equal == [index == other for other in range(3)]


def cast_head(model: PreTrainedModel, tied: bool) -> PreTrainedModel:
    """The relevant lines of TRL's `cast_lm_head_to_fp32`; a run of TRL's own is below."""
    dtype, head = model.lm_head.weight.dtype, model.lm_head.float()

    def forward(hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), head.weight.float())

    head.forward = forward
    if tied:
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.to(dtype))
    return model


@pytest.mark.usefixtures("torch_kernels")
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_head_cast_to_fp32_gives_the_same_logits(tied: bool, autocast_dtype: torch.dtype | None) -> None:
    """Prevents rounded logits where the trainer's are not, and fp32 embeddings in a 16-bit body."""
    model = cast_head(tiny_model("qwen2", dtype=torch.bfloat16, tie_word_embeddings=tied), tied)
    before = module_state(model)
    theirs = policy_logits(model, autocast_dtype)
    assert torch.equal(logits_of(model, autocast_dtype), theirs)
    assert module_state(model) == before
    engine = speculating(model, autocast_dtype)
    assert len(engine.generate(PROMPTS, SAMPLED, seed=0).completion_ids) == len(PROMPTS)
    uncast = tiny_model("qwen2", dtype=torch.bfloat16, tie_word_embeddings=tied)
    unchanged = torch.equal(policy_logits(uncast, autocast_dtype), theirs)
    assert unchanged == (autocast_dtype is not None), "negative control"


def with_dropout() -> nn.Module:
    model = tiny_model("qwen2", attention_dropout=0.5)
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return policy


def test_dropout_has_no_part_in_a_rollout() -> None:
    """Prevents samples of a thinned-out network, whose law is not that of any forward of the trainer's."""
    policy = with_dropout().train()
    replica = PolicyReplica(policy)
    assert torch.equal(replica_logits(replica), replica_logits(replica))
    torch.testing.assert_close(replica_logits(replica), policy_logits(policy), rtol=0, atol=1e-4)
    engine = speculating(policy)
    trained = engine.generate(PROMPTS, SAMPLED, seed=0)
    assert trained.completion_ids == engine.generate(PROMPTS, SAMPLED, seed=0).completion_ids
    with torch.no_grad():
        assert not torch.equal(policy(IDS).logits, policy(IDS).logits), "negative control: live dropout"


class _Stop(Exception):
    pass


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("fails", [False, True], ids=["", "after an exception"])
def test_training_mode_is_as_before(checkpointing: bool, fails: bool) -> None:
    """Prevents a policy that goes on without dropout or checkpointing, or with half of its modules in another mode."""
    policy = with_dropout().train()
    policy.get_submodule("base_model.model.model.layers.0").eval()
    if checkpointing:
        policy.gradient_checkpointing_enable()
    engine = speculating(policy)
    before = module_state(policy)

    def on_round(progress: Any) -> None:
        if fails:
            raise _Stop

    if fails:
        with pytest.raises(_Stop):
            engine.generate(PROMPTS, SAMPLED, seed=0, on_round=on_round)
    else:
        engine.generate(PROMPTS, SAMPLED, seed=0, on_round=on_round)
    assert module_state(policy) == before
    policy.train()
    assert module_state(policy) != before, "negative control"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_no_sample(checkpointing: bool) -> None:
    """Prevents a cache that checkpointing silently turns off in a module in training mode."""
    model = tiny_model("llama").train()
    options = SelfSpecOptions(num_speculative_tokens=3, max_active_sequences=64)  # by counts alone, so samples repeat
    expected = SelfSpecEngine(tiny_model("llama"), options).generate(PROMPTS, SAMPLED, seed=0).completion_ids
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert SelfSpecEngine(model, options).generate(PROMPTS, SAMPLED, seed=0).completion_ids == expected


MODES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "fp32": ({}, {}, 1e-4),
    "autocast_bf16": ({}, {"bf16": True}, 0.05),
    "bf16": ({"dtype": torch.bfloat16}, {}, 0.05),
    "bf16_under_autocast": ({"dtype": torch.bfloat16}, {"bf16": True}, 0.05),
    "fp32_head": ({"dtype": torch.bfloat16}, {"cast_lm_head_to_fp32": True}, 0.05),
    "fp32_head_tied": ({"dtype": torch.bfloat16, "tie": True}, {"cast_lm_head_to_fp32": True}, 0.05),
    "no_checkpointing": ({}, {"bf16": True, "gradient_checkpointing": False}, 0.05),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_precision_trains(tmp_path: Path, mode: str) -> None:
    """Each of them changes dtypes or patches modules in a way of its own before the engine is built."""
    values, arguments, tolerance = MODES[mode]
    model = make_model().to(values.get("dtype", torch.float32))
    if values.get("tie"):
        model.config.tie_word_embeddings = True
        model.tie_weights()
    trainer = make_trainer(tmp_path, model=model, **ALWAYS_SPECULATE, **arguments)
    before = weights(trainer)
    for entry in train(trainer):
        assert entry["selfspec/fallback"] == 0
        assert entry["selfspec/alpha"] > 0
        assert entry[LOGP] < tolerance
    assert all(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
