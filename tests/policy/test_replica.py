"""The engine decodes with the policy's own weights: aliased or copied, refreshed in place, adapters merged."""

import contextlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import FAMILIES, quantized_drafter, ragged_prompts, scale_weights, tiny_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec import kernels
from trl_selfspec.drafter.quantized_linear import QuantizedLinear
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.kernels.cpu import build
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.policy import replica
from trl_selfspec.policy.refusals import UnsupportedModelError


PROMPTS = ragged_prompts([1, 20, 2, 5, 9, 14, 1, 9])
GREEDY = GenerationConfig(max_new_tokens=16, do_sample=False)
SAMPLED = GenerationConfig(max_new_tokens=16, do_sample=True, top_k=0)
KERNEL_TOLERANCE = 0.05  # of the logits' spread: sums in another order, rounded to bf16, through two layers


def make_engine(model: nn.Module, autocast_dtype: torch.dtype | None = None, **values: Any) -> SelfSpecEngine:
    defaults = {"draft_qtype": "qint4", "num_speculative_tokens": 3, "max_active_sequences": 64}
    return SelfSpecEngine(model, SelfSpecOptions(**defaults | values), autocast_dtype)  # type: ignore[arg-type]


def outputs(engine: SelfSpecEngine) -> list[list[int]]:
    return engine.generate(PROMPTS, SAMPLED, seed=0).completion_ids


def addresses(tree: nn.Module) -> dict[str, int]:
    tensors = [*tree.named_parameters(remove_duplicate=False), *tree.named_buffers(remove_duplicate=False)]
    return {name: tensor.data_ptr() for name, tensor in tensors}


def codes(engine: SelfSpecEngine) -> list[Tensor]:
    layers = [module for module in quantized_drafter(engine).module.modules() if isinstance(module, QuantizedLinear)]
    return [buffer.clone() for layer in layers for buffer in layer.buffers()]


def add_lora(model: PreTrainedModel, **values: Any) -> PeftModel:
    """An adapter that matters: PEFT's own initialisation is that of no adapter at all."""
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.1}
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **defaults | values))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return policy.eval()


@pytest.mark.parametrize("qtype", ["qint4", "qint8", "qfloat8"])
def test_after_a_refresh_the_engine_is_as_new(qtype: str) -> None:
    """Prevents a rollout from yesterday's policy, in the target or in the drafter."""
    model = tiny_model("llama")
    engine = make_engine(model, draft_qtype=qtype)
    before = outputs(engine)
    scale_weights(model, seed=7)
    with pytest.raises(RuntimeError, match=r"engine\.refresh\(\)"):
        outputs(engine)
    engine.refresh()
    output, fresh = engine.generate(PROMPTS, SAMPLED, seed=0), make_engine(model, draft_qtype=qtype)
    expected = fresh.generate(PROMPTS, SAMPLED, seed=0)
    assert output.completion_ids == expected.completion_ids != before
    assert output.logprobs == expected.logprobs
    assert output.stats.num_accepted_tokens == expected.stats.num_accepted_tokens
    assert all(map(torch.equal, codes(engine), codes(fresh)))


def test_an_optimizer_step_is_noticed() -> None:
    """Prevents rollouts from weights of the step before."""
    model = tiny_model("llama")
    engine = make_engine(model)
    outputs(engine)
    model(torch.tensor([PROMPTS[1]])).logits.square().mean().backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    with pytest.raises(RuntimeError, match="weights changed"):
        outputs(engine)
    engine.refresh()
    assert outputs(engine) == outputs(make_engine(model))


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_a_refresh_moves_no_storage(autocast_dtype: torch.dtype | None) -> None:
    """Prevents captured graphs and the optimizer's own pointers from reading freed memory."""
    model = tiny_model("llama")
    engine = make_engine(model, autocast_dtype)
    outputs(engine)
    trees = (model, engine._replica.model, quantized_drafter(engine).module)
    before = [addresses(tree) for tree in trees]
    scale_weights(model, seed=7)
    engine.refresh()
    outputs(engine)
    assert [addresses(tree) for tree in trees] == before


def test_weights_are_shared_where_they_may_be() -> None:
    """Prevents a second copy of the policy in memory."""
    model = tiny_model("llama")
    engine = make_engine(model)
    outputs(engine)
    policy = addresses(model)
    parameters = {name: p.data_ptr() for name, p in engine._replica.model.named_parameters(remove_duplicate=False)}
    assert parameters == {name: policy[name] for name in parameters}
    shared = {
        name: p.data_ptr() for name, p in quantized_drafter(engine).module.named_parameters(remove_duplicate=False)
    }
    assert shared == {name: policy[name] for name in shared}
    assert any("embed_tokens" in name for name in shared)


def test_weights_that_moved_are_followed() -> None:
    """Prevents reading storage that a load or an offload has replaced."""
    model = tiny_model("llama")
    engine = make_engine(model)
    outputs(engine)
    other = tiny_model("llama", seed=7)
    for parameter, source in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = source.detach().clone()
    engine.refresh()
    assert outputs(engine) == outputs(make_engine(other))


def test_a_refresh_that_was_interrupted_is_not_over() -> None:
    """Ctrl+C in a notebook: the next rollout would come from weights of two steps."""

    def interrupt() -> Tensor:
        raise KeyboardInterrupt

    model = tiny_model()
    engine = make_engine(model, torch.bfloat16)
    scale_weights(model, seed=1)
    engine._replica._copies[-1] = engine._replica._copies[-1][0], interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.refresh()
    assert engine.stale


def test_a_drafter_may_be_kept_over_a_step() -> None:
    """Prevents `refresh(draft=False)` from requantizing, or from keeping the target too."""
    model = tiny_model("llama")
    engine = make_engine(model)
    before, plain = engine.generate(PROMPTS, GREEDY), make_engine(model, num_speculative_tokens=0)
    kept = codes(engine)
    scale_weights(model, seed=7)
    engine.refresh(draft=False)
    plain.refresh()
    stale = engine.generate(PROMPTS, GREEDY)
    assert stale.completion_ids == plain.generate(PROMPTS, GREEDY).completion_ids != before.completion_ids
    assert stale.stats.alpha < before.stats.alpha / 2
    assert all(map(torch.equal, codes(engine), kept))
    engine.refresh()
    renewed = engine.generate(PROMPTS, GREEDY)
    assert renewed.completion_ids == stale.completion_ids
    assert renewed.stats.alpha > 2 * stale.stats.alpha


def test_a_rollout_without_drafts_pays_for_none() -> None:
    """Prevents quantizing, and the drafter's memory, where speculation is off."""
    engine = make_engine(tiny_model("llama"), num_speculative_tokens=0)
    outputs(engine)
    assert not engine.drafters
    assert engine.drafter_bytes == 0


def test_release_gives_the_pages_back() -> None:
    """Prevents key/value memory from being held while the policy trains."""
    engine = make_engine(tiny_model("llama"))
    expected = outputs(engine)
    engine.release()
    assert engine.prefix_cache is None
    trees = (engine._replica.model, quantized_drafter(engine).module)
    assert all(getattr(module, "paged_cache", None) is None for tree in trees for module in tree.modules())
    assert outputs(engine) == expected


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=lambda values: ",".join(values) or "lora",
)
def test_an_adapter_counts_as_merged(values: dict[str, Any]) -> None:
    """Prevents rollouts from the base model, and an adapter that is merged into the policy for good."""
    model = tiny_model("qwen2")
    plain = make_engine(model).generate(PROMPTS, GREEDY).completion_ids
    policy = add_lora(model, **values)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    output = make_engine(policy).generate(PROMPTS, GREEDY)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert not any(getattr(module, "merged", False) for module in policy.modules())
    assert output.completion_ids != plain
    for prompt, tokens, logprobs in zip(PROMPTS, output.completion_ids, output.policy_logprobs, strict=True):
        with torch.no_grad():
            law = policy(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(law.gather(1, torch.tensor(tokens)[:, None])[:, 0], torch.tensor(logprobs))
    expected = [
        policy.generate(torch.tensor([prompt]), generation_config=GREEDY, attention_mask=torch.ones(1, len(prompt)))
        for prompt in PROMPTS
    ]
    assert output.completion_ids == [row[0, len(p) :].tolist() for row, p in zip(expected, PROMPTS, strict=True)]


def test_a_trained_adapter_is_followed() -> None:
    """Prevents rollouts from the adapter of the step before."""
    policy = add_lora(tiny_model("qwen2"))
    engine = make_engine(policy)
    outputs(engine)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_A" in name:
                parameter.mul_(-1)
    with pytest.raises(RuntimeError, match="weights changed"):
        outputs(engine)
    engine.refresh()
    assert outputs(engine) == outputs(make_engine(policy))


@pytest.mark.parametrize(("family", "lora"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_under_autocast_the_target_is_the_training_forward(
    monkeypatch: pytest.MonkeyPatch, family: str, lora: bool
) -> None:
    """Prevents importance ratios that differ from 1 at the first step: with torch's kernels, bit for bit."""
    monkeypatch.setattr(build, "_library", lambda: None)
    model = tiny_model(family)
    policy = add_lora(model, lora_dropout=0.0) if lora else model
    ours, theirs = forward_both(policy)
    if not lora:
        assert torch.equal(ours, theirs)
        return
    with torch.no_grad():  # merged, a weight is rounded once; apart, base and adapter are: neither is nearer to fp32
        exact = policy(torch.tensor([PROMPTS[1]])).logits
    assert (ours - exact).abs().max() < 1.5 * (theirs - exact).abs().max()


@pytest.mark.usefixtures("instruction_set")
def test_our_kernels_round_like_bf16() -> None:
    """Prevents a kernel that is fast because it computes something else; torch's own order of sums differs too."""
    if not kernels.available():
        pytest.skip("needs a C compiler and AVX2")
    ours, theirs = forward_both(tiny_model("llama"))
    assert (ours - theirs).abs().max() < KERNEL_TOLERANCE * theirs.std()


@torch.no_grad()
def forward_both(policy: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits of the replica's own modules without a cache, and of the policy, both under bf16 autocast."""
    engine = make_engine(policy, torch.bfloat16)
    tree = replica._meta_tree(engine._replica.base, engine._replica.base.config._attn_implementation)
    for name, module in engine._replica.model.named_modules():
        if isinstance(module, replica.ReplicaLinear):
            replica._replace(tree, name, module)
    replica._adopt(tree, engine._replica.model)
    ids = torch.tensor([PROMPTS[1]])
    with engine._forward_context():
        ours = tree(input_ids=ids, use_cache=False).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = policy(input_ids=ids, use_cache=False).logits
    return ours.float(), theirs.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_policies_give_their_own_law(dtype: torch.dtype) -> None:
    """Prevents a rollout whose tokens the policy itself would never have chosen.

    Teacher-forced: each greedy token is the policy's argmax or within rounding of it.
    """
    model = tiny_model("llama", dtype=dtype)
    output = make_engine(model).generate(PROMPTS, GREEDY)
    for prompt, tokens in zip(PROMPTS, output.completion_ids, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < 0.05 * logits.std()


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("falcon", {"head_dim": None, "num_key_value_heads": None, "alibi": False}),
        ("bloom", {"head_dim": None, "num_key_value_heads": None}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("phimoe", {"sliding_window": 40, "num_local_experts": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_architecture_that_would_go_wrong_is_refused(family: str, values: dict[str, Any]) -> None:
    """Prevents wrong samples from models that bring their own attention, mask or positions; says which and why.

    Falcon ignores the attention registry, BLOOM biases by distance, dynamic rotary scaling reads the longest row, and
    Phi-MoE applies its window in the mask alone, beyond the length of a short check.
    """
    model = tiny_model(family, **values)
    name = "rotary scaling" if family == "llama" else type(model).__name__
    with pytest.raises(UnsupportedModelError, match=name):
        make_engine(model)


@torch.no_grad()
def test_an_attention_without_its_soft_cap_is_refused() -> None:
    """Prevents samples that follow another law than the training forward, transformers' default before 5.21."""
    ids, model = torch.arange(24)[None], tiny_model("gemma2", attn_logit_softcapping=0.5)
    capped = model(ids).logits
    make_engine(model)
    model.config._attn_implementation = "sdpa"
    with contextlib.suppress(ValueError):  # of transformers from 5.21 on
        assert (model(ids).logits - capped).abs().max() > 0.01, "negative control: it leaves the cap out"
    with pytest.raises(UnsupportedModelError, match=r"soft-cap.*attn_implementation='eager'"):
        make_engine(model)


def test_an_adapter_that_cannot_be_merged_is_refused() -> None:
    """Prevents rollouts that leave the adapter out."""
    policy = add_lora(tiny_model("qwen2"), trainable_token_indices=[3, 4])
    with pytest.raises(UnsupportedModelError, match="TrainableTokens"):
        make_engine(policy)


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16], ids=["aliases", "copies"])
def test_a_broken_refresh_is_noticed(autocast_dtype: torch.dtype | None) -> None:
    """Negative control: the comparisons above see a target that did not follow."""
    model = tiny_model("llama")
    engine = make_engine(model, autocast_dtype, num_speculative_tokens=0)
    if autocast_dtype is None:
        engine._replica.model.lm_head.weight.data = model.lm_head.weight.detach().clone()
    engine._replica._aliases, engine._replica._copies = [], []
    scale_weights(model, seed=7)
    engine.refresh()
    assert outputs(engine) != outputs(make_engine(model, autocast_dtype, num_speculative_tokens=0))
