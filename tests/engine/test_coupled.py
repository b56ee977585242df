"""`verification="coupled"` gives, token for token, what plain sampling gives for the seed."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from tiny_models import Schedule, built_once, ragged_prompts, spoil, tiny_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec.engine.engine import RolloutOutput, SelfSpecEngine
from trl_selfspec.engine.model_runner import ModelRunner
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.sampling import samplers
from trl_selfspec.sampling.rng import Purpose, random_key
from trl_selfspec.sampling.samplers import Draw, RejectionSampler


PROMPTS = ragged_prompts([1, 20, 2, 5, 9, 14, 1, 9, 3, 3, 11, 6])
SEED = 5
PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 12},
    {"top_p": 0.8},
    {"repetition_penalty": 1.3},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "min_new_tokens": 4},
]


def name_of(parameters: dict[str, Any]) -> str:
    return ",".join(parameters) or "none"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3")


@built_once
def make_engine(
    model: PreTrainedModel,
    *draft_lengths: int,
    max_batch_size: int | None,
    verification: Literal["coupled", "rejection"] = "coupled",
) -> SelfSpecEngine:
    options = SelfSpecOptions(draft_qtype="qint4", verification=verification, max_batch_size=max_batch_size)
    engine = SelfSpecEngine(model, options, controller=Schedule(*draft_lengths))
    spoil(engine, noise=0.1)
    return engine


def sample(
    model: PreTrainedModel,
    *draft_lengths: int,
    prompts: list[list[int]] = PROMPTS,
    max_batch_size: int | None = None,
    verification: Literal["coupled", "rejection"] = "coupled",
    **parameters: Any,
) -> RolloutOutput:
    engine = make_engine(model, *draft_lengths, max_batch_size=max_batch_size, verification=verification)
    values = {"max_new_tokens": 24, "do_sample": True, "top_k": 0, "eos_token_id": [20, 21, 22, 23]}
    return engine.generate(prompts, GenerationConfig(**values | parameters), seed=SEED)


def assert_same(speculative: RolloutOutput, plain: RolloutOutput) -> None:
    assert speculative.completion_ids == plain.completion_ids
    for kind in ("logprobs", "policy_logprobs"):
        for row, expected in zip(getattr(speculative, kind), getattr(plain, kind), strict=True):
            torch.testing.assert_close(torch.tensor(row), torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("max_batch_size", [None, 3])
@pytest.mark.parametrize("gamma", [1, 3, 7])
def test_samples_are_those_of_plain_sampling(model: PreTrainedModel, gamma: int, max_batch_size: int | None) -> None:
    """Prevents noise keyed by the round, the place in the batch or the draft length."""
    plain = sample(model, 0)
    assert len({tuple(completion) for completion in plain.completion_ids}) == len(PROMPTS)
    assert len(set(map(len, plain.completion_ids))) > 3, "rows must end at different times"
    speculative = sample(model, gamma, max_batch_size=max_batch_size)
    assert 0.2 < speculative.stats.alpha < 0.95, "drafts must be accepted and rejected"
    assert_same(speculative, plain)


@pytest.mark.parametrize("draft_lengths", [(0, 3), (7, 0, 1, 0, 0), (1, 2, 3, 4, 5, 6, 7, 0)], ids=str)
def test_speculation_may_be_switched_at_any_round(model: PreTrainedModel, draft_lengths: tuple[int, ...]) -> None:
    """Prevents a switch that loses a token, a key or a position."""
    assert_same(sample(model, *draft_lengths, max_batch_size=5), sample(model, 0))


@pytest.mark.parametrize("parameters", PARAMETERS, ids=name_of)
def test_every_sampling_parameter_keeps_the_samples(model: PreTrainedModel, parameters: dict[str, Any]) -> None:
    """Prevents a parameter that acts differently on one position and on several at once."""
    plain = sample(model, 0, **parameters)
    assert_same(sample(model, 3, 2, **parameters), plain)
    if parameters:
        assert plain.completion_ids != sample(model, 0).completion_ids, "the parameter must be felt"


@pytest.mark.parametrize("batch_size", [1, 5])
def test_samples_do_not_depend_on_the_batch(model: PreTrainedModel, batch_size: int) -> None:
    """Prevents noise drawn in the order of the batch."""
    few = sample(model, 3, prompts=PROMPTS[:batch_size])
    assert few.completion_ids == sample(model, 0).completion_ids[:batch_size]


def test_plain_rounds_of_both_modes_draw_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel
) -> None:
    """There is one way to draw: switching the mode must not change what a seed means while nothing is drafted."""
    coupled = sample(model, 0)
    assert_same(sample(model, 0, verification="rejection"), coupled)

    def draw(self: RejectionSampler, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Draw:
        return samplers.sample(scores, self.seed, row_ids, positions, Purpose.DRAFT)

    monkeypatch.setattr(RejectionSampler, "draw", draw)
    other = sample(model, 0, verification="rejection")
    assert other.completion_ids != coupled.completion_ids, "negative control: noise of another purpose"


def test_a_sliding_window_keeps_the_samples() -> None:
    """Prevents a window measured from the draft's end."""
    model = tiny_model("gemma3_text")
    assert_same(sample(model, 7, 3), sample(model, 0))


# What must not pass.


def noise_of_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(seed: Tensor, rows: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        return random_key(seed, rows, positions - positions[0], purpose)

    monkeypatch.setattr(samplers, "random_key", shifted)


def noise_of_the_place_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_place(seed: Tensor, rows: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
        return random_key(seed, torch.arange(len(rows)).view(rows.shape), positions, purpose)

    monkeypatch.setattr(samplers, "random_key", by_place)


def drafts_that_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(drafts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(drafts),), drafts.shape[1]), torch.cat([drafts, tokens[:, -1:]], 1)

    monkeypatch.setattr(samplers, "verify_coupled", verify)


def one_history_for_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    process = ModelRunner.process

    def flat(self: ModelRunner, logits: Tensor, lengths: Tensor) -> Tensor:
        return torch.cat([process(self, logits[:, k : k + 1], lengths) for k in range(logits.shape[1])], 1)

    monkeypatch.setattr(ModelRunner, "process", flat)


@pytest.mark.parametrize(
    "sabotage",
    [noise_of_the_round, noise_of_the_place_in_the_batch, drafts_that_stand, one_history_for_all_positions],
)
def test_a_broken_engine_is_noticed(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, sabotage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Negative controls: the comparison with plain sampling sees each of these."""
    plain = sample(model, 0, temperature=0.5, repetition_penalty=3.0)
    sabotage(monkeypatch)
    wrong = sample(model, 3, max_batch_size=5, temperature=0.5, repetition_penalty=3.0)
    assert sum(a != b for a, b in zip(wrong.completion_ids, plain.completion_ids, strict=True)) >= 2
