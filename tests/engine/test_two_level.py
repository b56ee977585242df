"""Two-level drafts: coupled and greedy tokens are those of plain rounds, rejection keeps the distribution."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import chi_square
from pairwise import pairwise
from recorded_graph import record
from test_coupled import assert_same
from test_rejection_engine import (
    COMBINED,
    ROWS,
    THRESHOLD,
    TOGETHER,
    VOCAB,
    exact_law,
    sampled,
    sampling_config,
)
from test_suffix_drafts import GREEDY, GROUPS, PROCESSED, SAMPLED, plain_engine, sample
from tiny_models import Schedule, force_page_size, quantized_drafter, spoil, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from trl_selfspec.drafter.protocol import Batch, DraftError, DraftRunner
from trl_selfspec.drafter.suffix_drafter import SuffixDrafter
from trl_selfspec.drafter.two_level_drafter import TwoLevelDrafter
from trl_selfspec.engine import engine as engine_module
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.kernels.cpu import build
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.sampling import samplers
from trl_selfspec.sampling.rng import Purpose
from trl_selfspec.sampling.samplers import Draw, RejectionSampler


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def small_model() -> PreTrainedModel:
    """The one whose distribution is enumerated."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 16}
    return tiny_model("llama", std=0.3, **sizes, **heads)


def make_engine(
    model: PreTrainedModel,
    *draft_lengths: int,
    noise: float = 0.1,
    drafters: tuple[str, ...] = ("two_level",),
    make: type[TwoLevelDrafter] = TwoLevelDrafter,
    capture: Callable | None = None,
    **options: Any,
) -> SelfSpecEngine:
    chosen = SelfSpecOptions(draft_qtype="qint4", max_speculative_tokens=16, **options)
    engine = SelfSpecEngine(model, chosen, controller=Schedule(*draft_lengths, drafters=drafters), capture=capture)
    suffix = engine.drafters["suffix"]
    assert isinstance(suffix, SuffixDrafter)
    engine.drafters["two_level"] = make(quantized_drafter(engine), suffix)
    spoil(engine, noise)
    return engine


@pairwise(
    law=[GREEDY, SAMPLED, PROCESSED],
    draft_lengths=[(1,), (4,), (16,), (3, 0, 2), (7, 0, 1, 0, 0)],
    max_batch_size=[None, 5],
    page_size=[None, 4],
    ahead=[0, 1],
)
def test_coupled_and_greedy_tokens_are_those_of_plain_rounds(
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
    law: dict[str, Any],
    draft_lengths: tuple[int, ...],
    max_batch_size: int | None,
    page_size: int | None,
    ahead: int,
) -> None:
    """Rows end at tokens and at limits within drafts. Prevents a key, a token or a prefix of a guess that stays."""
    force_page_size(monkeypatch, page_size)
    monkeypatch.setitem(engine_module.ROUNDS_AHEAD, "cpu", ahead)
    plain = sample(plain_engine(model, 0, verification="coupled"), law)
    assert {len(completion) for completion in plain.completion_ids} - {24}, "some rows must end at a token"
    engine = make_engine(model, *draft_lengths, verification="coupled", max_batch_size=max_batch_size)
    for _ in range(2):  # in the second, the history holds the row's own future
        output = sample(engine, law)
        assert_same(output, plain)
    assert 0 < output.stats.num_accepted_tokens < output.stats.num_draft_tokens
    assert set(output.stats.by_drafter) == {"two_level"}


@pairwise(verification=["rejection", "coupled"], law=[GREEDY, SAMPLED, PROCESSED])
def test_captured_rounds_give_the_same(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, verification: Any, law: dict[str, Any]
) -> None:
    """Prevents a number of drafts or a place in the buffer that Python decided when the round was captured."""
    force_page_size(monkeypatch, 4)
    monkeypatch.setattr(build, "_library", lambda: None)  # C kernels are no operations of torch
    eager, captured = (
        make_engine(model, 5, 0, 1, 5, verification=verification, capture=capture) for capture in (None, record)
    )
    for prompts in (GROUPS, GROUPS[3:], GROUPS):
        assert_same(sample(captured, law, prompts=prompts), sample(eager, law, prompts=prompts))
    assert len(captured.graphs) >= 4, "few rounds were replayed"


def test_drafters_take_turns(model: PreTrainedModel) -> None:
    """It shares weights with the one and texts with the other, in one rollout."""
    turns = ("two_level", "suffix", "qint4")
    engine = make_engine(model, 4, 0, 2, drafters=turns, verification="coupled")
    output = sample(engine, SAMPLED)
    assert_same(output, sample(plain_engine(model, 0, verification="coupled"), SAMPLED))
    assert all(output.stats.by_drafter[name].rounds for name in turns)


@pytest.mark.parametrize("gamma", range(1, 17))
def test_every_row_gets_all_drafts_in_fewer_steps(gamma: int) -> None:
    """Where each step makes one draft alone, the last one's window must still end at γ."""
    drafter = TwoLevelDrafter.__new__(TwoLevelDrafter)
    steps, width = drafter.num_steps(gamma), gamma // 2 + 1
    assert min(steps - 1, gamma - width) + width == gamma
    assert steps < gamma or gamma == 1


def test_good_guesses_save_steps(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """With the row's future in the history, nearly all drafts are the model's own, though steps are half as many."""
    engine = make_engine(model, 8, noise=0.0, verification="coupled")
    first, second = sample(engine, SAMPLED), sample(engine, SAMPLED)
    assert second.stats.alpha > first.stats.alpha
    assert second.stats.alpha > 0.8


def test_without_texts_it_is_given_up(model: PreTrainedModel) -> None:
    """A suffix drafter that was given up and freed takes this one along. Prevents a read of texts that are gone."""
    engine = make_engine(model, 4, verification="coupled")
    engine.drafters.pop("suffix").release()
    output = sample(engine, SAMPLED)
    assert_same(output, sample(plain_engine(model, 0, verification="coupled"), SAMPLED))
    assert not output.stats.num_rounds_speculative
    drafter = engine.drafters["two_level"]
    with pytest.raises(DraftError, match="no texts"):
        drafter.prepare()


def test_small_policies_are_not_offered_it(model: PreTrainedModel) -> None:
    assert "two_level" not in SelfSpecEngine(model, SelfSpecOptions(num_speculative_tokens=3)).drafters


# The distribution


def joint_p_value(engine: SelfSpecEngine, model: PreTrainedModel, rows: int = ROWS) -> float:
    counts, output = sampled(engine, COMBINED, rows)
    assert output.stats.num_rounds_speculative
    assert 0 < output.stats.num_accepted_tokens < output.stats.num_draft_tokens
    return chi_square(counts, exact_law(model, sampling_config(COMBINED)))


def law_engine(model: PreTrainedModel, *draft_lengths: int, **options: Any) -> SelfSpecEngine:
    return make_engine(model, *draft_lengths, noise=0.3, max_batch_size=TOGETHER, **options)


@pytest.mark.parametrize("draft_lengths", [(2,), (3,), (4, 0, 1)], ids=str)
def test_samples_follow_the_policys_law(small_model: PreTrainedModel, draft_lengths: tuple[int, ...]) -> None:
    """Three tokens of one prompt, whose rows guess from each other. Odds of a false alarm: 1 in 10^5."""
    assert joint_p_value(law_engine(small_model, *draft_lengths), small_model) > THRESHOLD


class KeepsTheGuesses(TwoLevelDrafter):
    """Lets the guesses stand for drafts, with the distributions of the draws."""

    def step(self, runner: DraftRunner, batch: Batch, num_slots: int, gamma: int) -> Tensor:
        starts = batch.num_drafted.clamp(max=gamma - (gamma // 2 + 1))
        guesses = self._guesses(batch, num_slots, gamma // 2 + 1)
        drafts = super().step(runner, batch, num_slots, gamma)
        at = (batch.lengths + starts)[:, None] + torch.arange(gamma // 2 + 1)
        batch.tokens.scatter_(1, at, guesses)
        return drafts


def distributions_of_the_next_position(monkeypatch: pytest.MonkeyPatch) -> None:
    several = RejectionSampler.propose_several

    def shifted(self: RejectionSampler, scores: Tensor, row_ids: Tensor, positions: Tensor, starts: Tensor) -> Draw:
        draws = several(self, scores, row_ids, positions, starts)
        kept = self.drafts.of(scores[:, 0])
        kept[:, :-1] = kept[:, 1:].clone()
        return draws

    monkeypatch.setattr(RejectionSampler, "propose_several", shifted)


def noise_shared_by_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = samplers._sample_positions

    def shared(scores: Tensor, seed: Any, row_ids: Tensor, positions: Tensor, purpose: Purpose) -> Draw:
        return draw(scores, seed, row_ids, positions * 0, purpose)

    monkeypatch.setattr(samplers, "_sample_positions", shared)


def test_drafts_that_were_not_drawn_are_noticed(small_model: PreTrainedModel) -> None:
    """Negative control: a guess is no draw from the distribution that is kept for it."""
    assert joint_p_value(law_engine(small_model, 2, make=KeepsTheGuesses), small_model) < THRESHOLD


@pytest.mark.parametrize("sabotage", [distributions_of_the_next_position, noise_shared_by_positions])
def test_a_broken_sampler_is_noticed(
    monkeypatch: pytest.MonkeyPatch, small_model: PreTrainedModel, sabotage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Negative controls: distributions of other positions, and positions that share one noise."""
    engine = law_engine(small_model, 3)
    sabotage(monkeypatch)
    assert joint_p_value(engine, small_model) < THRESHOLD


def guesses_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verification takes what stands behind a row for what the target drew."""
    monkeypatch.setattr(samplers, "verify_coupled", lambda drafts, tokens: (
        torch.full((len(drafts),), drafts.shape[1]), torch.cat([drafts, tokens[:, -1:]], 1)
    ))  # fmt: skip


def test_drafts_that_stand_are_noticed(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """The negative control of the comparison with plain rounds."""
    plain = sample(plain_engine(model, 0, verification="coupled"), SAMPLED)
    engine = make_engine(model, 4, verification="coupled")
    guesses_that_stay(monkeypatch)
    assert sample(engine, SAMPLED).completion_ids != plain.completion_ids
