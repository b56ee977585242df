"""A row depends on the seed, its index and its own prompt alone, and its log-probabilities are the model's."""

from typing import Any

import pytest
import torch
from tiny_models import Schedule, built_once, ragged_prompts, spoil, tiny_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec.control.controller import Controller
from trl_selfspec.engine.batch_state import BatchState
from trl_selfspec.engine.engine import RolloutOutput, SelfSpecEngine
from trl_selfspec.engine.model_runner import ModelRunner
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.sampling.logits_processing import BatchedLogitsProcessor, effective_generation_config


PROMPTS = ragged_prompts([1, 20, 2, 5, 9, 14, 1, 9, 3, 3, 11, 6])
EOS = [20, 21, 22, 23]
PROCESSED = {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.2}
TOLERANCE = 1e-4  # fp32 rounding of other shapes; a wrong history or token is off by 0.1 or more


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


def sampling_config(**parameters: Any) -> GenerationConfig:
    values = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "eos_token_id": EOS}
    return GenerationConfig(**values | parameters)


@built_once
def make_engine(
    model: PreTrainedModel, gamma: int = 3, controller: Controller | None = None, **values: Any
) -> SelfSpecEngine:
    defaults = {"draft_qtype": "qint4", "num_speculative_tokens": gamma, "max_active_sequences": 64}
    engine = SelfSpecEngine(model, SelfSpecOptions(**defaults | values), controller=controller)
    spoil(engine, noise=0.1)
    return engine


def sample(model: PreTrainedModel, prompts: list[list[int]] = PROMPTS, seed: int = 1, **values: Any) -> RolloutOutput:
    return make_engine(model, **values).generate(prompts, sampling_config(**PROCESSED), seed=seed)


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_rows_do_not_see_their_neighbours(model: PreTrainedModel, verification: str) -> None:
    """Prevents padding, a neighbour's length or a neighbour's draft from reaching a row."""
    base = sample(model, verification=verification).completion_ids
    for kept in ([0], [1, 4, 9], [2, 11]):
        others = ragged_prompts([17, 2, 30, 1, 8, 8, 25, 3, 3, 1, 5, 12], seed=len(kept))
        mixed = [PROMPTS[row] if row in kept else others[row] for row in range(len(PROMPTS))]
        output = sample(model, mixed, verification=verification).completion_ids
        assert [output[row] for row in kept] == [base[row] for row in kept]
        changed = [output[row] != base[row] for row in range(len(PROMPTS)) if row not in kept]
        assert sum(changed) > len(changed) // 2, "neighbours must have changed"


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
@pytest.mark.parametrize("max_batch_size", [1, 2, 5, 7])
def test_samples_do_not_depend_on_who_decodes_together(
    model: PreTrainedModel, verification: str, max_batch_size: int
) -> None:
    """Prevents draws that depend on admission, on compaction or on a row's place in the batch."""
    base = sample(model, verification=verification)
    output = sample(model, verification=verification, max_batch_size=max_batch_size)
    assert output.completion_ids == base.completion_ids


@pytest.mark.parametrize("qtype", ["qint4", "qint8"])
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_samples_do_not_depend_on_the_callers_default_device(
    model: PreTrainedModel, verification: str, qtype: str
) -> None:
    """Kernels wrote to whatever `torch.set_default_device` made of their results: the process died."""
    options = SelfSpecOptions(qtype, 3, max_active_sequences=64, verification=verification)  # type: ignore[arg-type]
    outputs = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)  # which the seed is drawn from
        with torch.device(device):
            output = SelfSpecEngine(model, options).generate(PROMPTS, sampling_config(**PROCESSED))
        outputs.append(output.completion_ids)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("batch_size", [1, 4, 11])
def test_samples_do_not_depend_on_the_batch_size(model: PreTrainedModel, batch_size: int) -> None:
    """Prevents a draw that reads the number of rows."""
    assert sample(model, PROMPTS[:batch_size]).completion_ids == sample(model).completion_ids[:batch_size]


def test_a_group_of_equal_prompts_gives_different_samples(model: PreTrainedModel) -> None:
    """Prevents a group without diversity, on which GRPO learns nothing."""
    completions = sample(model, [PROMPTS[4]] * 12).completion_ids
    assert len({tuple(completion) for completion in completions}) == 12


def test_a_seed_repeats_and_another_one_does_not(model: PreTrainedModel) -> None:
    """Prevents hidden state between calls: the second call runs on used pages and a used drafter."""
    engine = make_engine(model)
    first, second, other = (engine.generate(PROMPTS, sampling_config(), seed=seed) for seed in (1, 1, 2))
    assert first.completion_ids == second.completion_ids
    assert first.logprobs == second.logprobs
    assert sum(a != b for a, b in zip(first.completion_ids, other.completion_ids, strict=True)) >= 10


def test_a_given_seed_leaves_the_global_generator_alone(model: PreTrainedModel) -> None:
    """Prevents a rollout from changing which data or dropout the training sees next."""
    engine = make_engine(model)
    before = torch.get_rng_state()
    engine.generate(PROMPTS, sampling_config(), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_global_generator_gives_one(model: PreTrainedModel) -> None:
    """Prevents runs that ignore `set_seed`, and steps that all draw the same numbers."""
    engine = make_engine(model)
    torch.manual_seed(3)
    first, second = (engine.generate(PROMPTS, sampling_config()).completion_ids for _ in range(2))
    torch.manual_seed(3)
    assert engine.generate(PROMPTS, sampling_config()).completion_ids == first
    assert first != second


@pytest.mark.parametrize(("gamma", "verification"), [(0, "rejection"), (3, "rejection"), (3, "coupled")])
@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.7}, PROCESSED, {"do_sample": False}], ids=",".join)
def test_log_probabilities_are_those_of_a_plain_forward(
    model: PreTrainedModel, parameters: dict[str, Any], gamma: int, verification: str
) -> None:
    """Prevents importance ratios computed from a rejected draft's, a shifted or an untempered probability."""
    config = sampling_config(**parameters)
    engine = make_engine(model, gamma, verification=verification, max_batch_size=5)
    output = engine.generate(PROMPTS, config, seed=1)
    assert_log_probabilities(model, config, output)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "qwen3_moe"])
def test_log_probabilities_hold_in_other_architectures(family: str) -> None:
    """Prevents a final soft-cap or an output scale that is lost."""
    model, config = tiny_model(family), sampling_config(temperature=0.8)
    assert_log_probabilities(model, config, make_engine(model).generate(PROMPTS, config, seed=1))


def assert_log_probabilities(model: PreTrainedModel, config: GenerationConfig, output: RolloutOutput) -> None:
    law = BatchedLogitsProcessor.from_generation_config(model, effective_generation_config(model, config), "cpu")
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, output.completion_ids, strict=True)):
        assert len(output.logprobs[row]) == len(output.policy_logprobs[row]) == len(tokens)
        policy, processed = reference_logprobs(model, law, prompt, tokens)
        torch.testing.assert_close(torch.tensor(output.policy_logprobs[row]), policy, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(torch.tensor(output.logprobs[row]), processed, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def reference_logprobs(
    model: PreTrainedModel, law: BatchedLogitsProcessor, prompt: list[int], tokens: list[int]
) -> tuple[Tensor, Tensor]:
    ids, start = torch.tensor([prompt + tokens]), torch.tensor([len(prompt)])
    logits = model(ids).logits[:, len(prompt) - 1 : -1]
    chosen = torch.tensor(tokens)[:, None]
    policy = (logits[0] / law.temperature).log_softmax(-1).gather(1, chosen)[:, 0]
    processed = law.process(logits, ids, start, start)[0].log_softmax(-1).gather(1, chosen)[:, 0]
    return policy, processed


@pytest.mark.parametrize("gamma", [0, 7])
def test_nothing_follows_the_end_token(model: PreTrainedModel, gamma: int) -> None:
    """Prevents drafts behind the end token, and padding, from being trained on."""
    output = make_engine(model, gamma).generate(PROMPTS * 3, sampling_config(), seed=1)
    ended = 0
    for tokens in output.completion_ids:
        assert not set(tokens[:-1]) & set(EOS)
        assert len(tokens) == 20 or tokens[-1] in EOS
        ended += tokens[-1] in EOS
    assert 0 < ended < len(output.completion_ids)


def test_counters_add_up(model: PreTrainedModel) -> None:
    """Prevents acceptance rates of drafts that were never made, or counted twice."""
    engine = make_engine(model, max_batch_size=5, controller=Schedule(3, 0))
    progress: list[Any] = []
    output = engine.generate(PROMPTS, sampling_config(), seed=1, on_round=progress.append)
    stats = output.stats
    assert stats.num_rows == len(PROMPTS)
    assert stats.prompt_tokens == sum(map(len, PROMPTS))
    assert stats.completion_tokens == sum(map(len, output.completion_ids)) == progress[-1].completed_tokens
    assert stats.plain_rounds + stats.num_rounds_speculative == len(progress)
    assert [p.num_speculative_tokens for p in progress[:4]] == [3, 0, 3, 0]
    assert progress[-1].unfinished == 0
    assert stats.num_draft_tokens == 3 * stats.num_drafts
    assert stats.num_accepted_tokens + stats.num_drafts + stats.plain_row_rounds >= stats.completion_tokens
    assert stats.drafter_bytes == engine.drafter_bytes > 0


# What must not pass.


def see_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ModelRunner._run

    def shifted(self: ModelRunner, model: Any, tokens: Tensor, positions: Tensor, **kwargs: int) -> Tensor:
        logits = run(self, model, tokens, positions, **kwargs)
        return logits + 0.05 * logits.roll(1, dims=0)

    monkeypatch.setattr(ModelRunner, "_run", shifted)


def forget_row_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    assign = BatchState.assign
    monkeypatch.setattr(
        BatchState,
        "assign",
        lambda self, row, prompt, limit, row_id, done: assign(self, row, prompt, limit, row, done),
    )


def draw_from_the_global_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    def rand(seed: Tensor, rows: Tensor, positions: Tensor, purpose: int | Tensor) -> Tensor:
        shapes = (tensor.shape for tensor in (rows, positions, torch.as_tensor(purpose)))
        return torch.randint(-(2**63), 2**63 - 1, torch.broadcast_shapes(*shapes))

    monkeypatch.setattr("trl_selfspec.sampling.samplers.random_key", rand)


@pytest.mark.parametrize("sabotage", [see_the_neighbours, forget_row_ids, draw_from_the_global_generator])
def test_a_broken_engine_is_noticed(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, sabotage: Any) -> None:
    """Negative controls: decoding five rows at a time then gives other samples."""
    base = sample(model).completion_ids
    sabotage(monkeypatch)
    output = sample(model, max_batch_size=5).completion_ids
    assert sum(a != b for a, b in zip(base, output, strict=True)) >= 3


@pytest.mark.parametrize("fault", ["untempered", "shifted", "processed"])
def test_wrong_log_probabilities_are_noticed(model: PreTrainedModel, fault: str) -> None:
    """Negative control for the tolerance."""
    config = sampling_config(**PROCESSED)
    output = make_engine(model).generate(PROMPTS, config, seed=1)
    wrong = {
        "untempered": [[0.7 * value for value in row] for row in output.policy_logprobs],
        "shifted": [row[1:] + row[:1] for row in output.policy_logprobs],
        "processed": output.logprobs,
    }[fault]
    with pytest.raises(AssertionError):
        assert_log_probabilities(
            model, config, RolloutOutput(output.completion_ids, output.logprobs, wrong, output.stats)
        )
