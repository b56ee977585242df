"""Suffix drafts change no token: samples are those of plain sampling, in every mode, wherever a draft comes from."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from pairwise import pairwise
from recorded_graph import record
from test_coupled import PARAMETERS, assert_same
from test_kv_budget import give_pages
from tiny_models import Schedule, built_once, force_page_size, ragged_prompts, tiny_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec.control.drafters import DrafterTraits
from trl_selfspec.drafter import suffix_drafter
from trl_selfspec.drafter.protocol import Batch, Drafter, DraftRunner
from trl_selfspec.drafter.suffix_drafter import SuffixDrafter
from trl_selfspec.engine import engine as engine_module
from trl_selfspec.engine.engine import RolloutOutput, SelfSpecEngine
from trl_selfspec.kernels.cpu import build
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.sampling import samplers
from trl_selfspec.sampling.rng import Purpose
from trl_selfspec.sampling.samplers import CoupledSampler, Draw, VerifyResult


SEED = 5
GROUPS = [prompt for prompt in ragged_prompts([9, 1, 5, 14]) for _ in range(3)]
EOS = [20, 21, 22, 23]
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.7}
PROCESSED = SAMPLED | {"top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2, "min_new_tokens": 4}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen3")


def make_engine(
    model: PreTrainedModel,
    *draft_lengths: int,
    drafter: Literal["suffix", "auto"] = "suffix",
    drafters: tuple[str, ...] = (),
    capture: Callable | None = None,
    **options: Any,
) -> SelfSpecEngine:
    chosen = SelfSpecOptions(drafter=drafter, draft_qtype="qint4", max_speculative_tokens=16, **options)
    controller = Schedule(*draft_lengths, drafters=drafters)
    return SelfSpecEngine(model, chosen, controller=controller, capture=capture)


plain_engine = built_once(make_engine)
torch_engine = built_once(make_engine)  # built without C kernels


def config(parameters: dict[str, Any]) -> GenerationConfig:
    values = {"max_new_tokens": 24, "do_sample": True, "top_k": 0, "eos_token_id": EOS, "pad_token_id": 0}
    return GenerationConfig(**values | parameters)


def sample(engine: SelfSpecEngine, parameters: dict[str, Any] | None = None, **values: Any) -> RolloutOutput:
    prompts = values.pop("prompts", GROUPS)
    return engine.generate(prompts, config(parameters or {}), seed=SEED, **values)


@pairwise(
    parameters=[*PARAMETERS, GREEDY],
    verification=["rejection", "coupled"],
    draft_lengths=[(1,), (4,), (16,), (4, 0, 2), (7, 0, 1, 0, 0)],
    max_batch_size=[None, 5],
    page_size=[None, 4],
    ahead=[0, 1],
)
def test_tokens_are_those_of_plain_sampling(
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
    parameters: dict[str, Any],
    verification: Literal["rejection", "coupled"],
    draft_lengths: tuple[int, ...],
    max_batch_size: int | None,
    page_size: int | None,
    ahead: int,
) -> None:
    """In a second rollout the history holds the row's own future. Prevents a draft that is seen in what is drawn."""
    force_page_size(monkeypatch, page_size)
    monkeypatch.setitem(engine_module.ROUNDS_AHEAD, "cpu", ahead)
    plain = sample(plain_engine(model, 0, verification=verification), parameters)
    engine = make_engine(model, *draft_lengths, verification=verification, max_batch_size=max_batch_size)
    first, second = sample(engine, parameters), sample(engine, parameters)
    for output in (first, second):
        assert_same(output, plain)
    assert first.stats.num_accepted_tokens < first.stats.num_draft_tokens, "some must be rejected"
    assert second.stats.alpha > max(first.stats.alpha, 0.3), "and others accepted"


@pytest.mark.parametrize("law", [SAMPLED, PROCESSED, GREEDY])
def test_rows_that_pause_keep_their_tokens_and_their_texts(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, law: dict[str, Any]
) -> None:
    """Prevents a text that is lost, or continued in another row's slot, when a row is preempted and moves."""
    force_page_size(monkeypatch, 4)
    plain = sample(plain_engine(model, 0), law)
    engine = make_engine(model, 4, 0, 2)
    give_pages(monkeypatch, engine, 20)
    for _ in range(2):
        output = sample(engine, law)
        assert_same(output, plain)
        assert output.stats.paused_rows > 0
    assert texts_are(engine, output)


def texts_are(engine: SelfSpecEngine, output: RolloutOutput) -> bool:
    """Whether each row's slot holds its prompt and its completion."""
    drafter = engine.drafters["suffix"]
    assert isinstance(drafter, SuffixDrafter)
    texts = [[*prompt, *completion] for prompt, completion in zip(GROUPS, output.completion_ids, strict=True)]
    slots = drafter._slots[0, : len(texts)].tolist()
    return all(drafter._texts[slot, : len(text)].tolist() == text for slot, text in zip(slots, texts, strict=True))


def test_two_rows_with_one_slot_would_be_seen(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """The negative control of `texts_are`. Even then no token changes."""
    layout = SuffixDrafter._layout

    def shared(self: SuffixDrafter, width: int) -> tuple:
        texts, slots = layout(self, width)
        slots[0][1] = slots[0][0]
        return texts, slots

    plain, engine = sample(plain_engine(model, 0)), make_engine(model, 4)
    assert texts_are(engine, sample(engine))
    monkeypatch.setattr(SuffixDrafter, "_layout", shared)
    output = sample(engine)
    assert not texts_are(engine, output)
    assert_same(output, plain)


@pairwise(verification=["rejection", "coupled"], law=[GREEDY, SAMPLED, PROCESSED], max_batch_size=[None, 5])
def test_captured_rounds_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
    verification: Literal["rejection", "coupled"],
    law: dict[str, Any],
    max_batch_size: int | None,
) -> None:
    """Prevents a group, a slot or a length that Python decided in the round that was captured."""
    force_page_size(monkeypatch, 4)
    monkeypatch.setattr(build, "_library", lambda: None)  # C kernels are no operations of torch
    plain = torch_engine(model, 0, verification=verification)
    options = {"verification": verification, "max_batch_size": max_batch_size}
    engine = make_engine(model, 3, 0, 1, 3, capture=record, **options)
    for prompts in (GROUPS, GROUPS[3:], GROUPS, GROUPS[:7]):
        assert_same(sample(engine, law, prompts=prompts), sample(plain, law, prompts=prompts))
    assert len(engine.graphs) >= 6, "few rounds were replayed"


def test_drafters_take_turns(model: PreTrainedModel) -> None:
    """Coupled, all drafters give the samples of plain sampling, in one rollout too."""
    plain = sample(plain_engine(model, 0, verification="coupled"))
    turns = ("suffix", "qint4", "suffix")
    engine = make_engine(model, 3, 0, 1, drafter="auto", drafters=turns, verification="coupled")
    for _ in range(2):
        output = sample(engine)
        assert_same(output, plain)
    by_drafter = output.stats.by_drafter
    assert by_drafter["suffix"].rounds > by_drafter["qint4"].rounds > 0
    assert sum(drafter.rounds for drafter in by_drafter.values()) == output.stats.num_rounds_speculative


def test_a_policy_that_only_copies_never_quantizes(model: PreTrainedModel) -> None:
    """Prevents seconds and bytes for weights that nobody uses."""
    engine = make_engine(model, 3, drafter="auto", drafters=("suffix",))
    stats = sample(engine).stats
    assert stats.num_rounds_speculative > 0
    assert stats.requantize_s < 1e-3
    assert engine.drafter_bytes == engine.drafters["suffix"].nbytes


def test_conversations_copy_from_their_siblings(model: PreTrainedModel) -> None:
    """Later turns have prompts of their own, and are still one group. Prevents a conversation that loses its group."""
    plain, engine = plain_engine(model, 0), make_engine(model, 4)
    prompts, tool = GROUPS, [11, 12, 13]
    for _ in range(3):
        expected, actual = (sample(e, SAMPLED, prompts=prompts, keep=True) for e in (plain, engine))
        assert_same(actual, expected)
        prompts = [[*p, *c, *tool] for p, c in zip(prompts, expected.completion_ids, strict=True)]
    roots = engine.drafters["suffix"]._roots  # type: ignore[attr-defined]
    assert roots == [tuple(prompt) for prompt in GROUPS]
    assert engine.history is not None
    assert len(engine.history.get(GROUPS[0])) == 3
    engine.release()


# Drafts from anywhere


class Adversary(Drafter):
    """A drafter that is no part of the package: it writes what it is told to, behind every row's length."""

    traits = DrafterTraits("adversary")
    has_distribution = False
    program = "adversary"

    def __init__(self, draft: Callable[[Batch, int], Tensor]) -> None:
        self.draft = draft

    def num_steps(self, gamma: int) -> int:
        return 1

    def step(self, runner: DraftRunner, batch: Batch, num_slots: int, gamma: int) -> Tensor:
        drafts = self.draft(batch, gamma)
        positions = batch.lengths[:, None] + torch.arange(gamma)
        batch.tokens.scatter_(1, positions.clamp(max=batch.tokens.shape[1] - 1), drafts)
        return drafts


def random_tokens(batch: Batch, gamma: int) -> Tensor:
    return torch.randint(0, 90, (len(batch.lengths), gamma))


def future(batch: Batch, gamma: int, texts: list[list[int]], shift: int = 0, wrong: int = 0) -> Tensor:
    """What plain sampling gives next, of the row itself or of the row `shift` places on."""
    rows = [texts[(row_id + shift) % len(texts)] + [3] * gamma for row_id in batch.row_ids.tolist()]
    starts = batch.lengths.tolist()
    return (
        torch.tensor([row[n : n + gamma] or [3] * gamma for row, n in zip(rows, starts, strict=True)]).add(wrong) % 96
    )


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
@pytest.mark.parametrize("kind", ["random", "future", "another row's", "always wrong"])
def test_no_draft_changes_a_token(
    model: PreTrainedModel, verification: Literal["rejection", "coupled"], kind: str
) -> None:
    """The worst drafts there can be, from a drafter of a test: a third one needs no change outside its file."""
    plain = sample(plain_engine(model, 0, verification=verification))
    longest = max(map(len, plain.completion_ids))
    texts = [[*p, *c, *[3] * longest] for p, c in zip(GROUPS, plain.completion_ids, strict=True)]
    drafts: dict[str, Callable[[Batch, int], Tensor]] = {
        "random": random_tokens,
        "future": functools.partial(future, texts=texts),
        "another row's": functools.partial(future, texts=texts, shift=1),
        "always wrong": functools.partial(future, texts=texts, wrong=1),
    }
    engine = make_engine(model, 4, drafters=("adversary",), verification=verification)
    engine.drafters["adversary"] = Adversary(drafts[kind])
    output = sample(engine)
    assert_same(output, plain)
    accepted = output.stats.accepted_per_position[0] / output.stats.examined_per_position[0]
    if kind == "future":
        assert accepted == 1.0
    elif kind == "always wrong":
        assert accepted == 0.0
    else:
        assert 0.0 <= accepted < 0.5


# Negative controls: other ways to judge a known draft are seen


class FreshNoise(CoupledSampler):
    """Judges by noise that plain rounds don't draw with."""

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Draw:
        return samplers.sample(scores, self.seed, row_ids, positions, Purpose.ACCEPT)

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> VerifyResult:
        rows = row_ids[:, None].expand_as(positions)
        tokens, logprobs = (
            x.view(positions.shape) for x in self.draw(scores.flatten(0, 1), rows.flatten(), positions.flatten())
        )
        matches = (drafts == tokens[:, :-1]).long().cumprod(1).sum(1)
        return VerifyResult(matches, tokens, logprobs)


class ByArgmax(CoupledSampler):
    """Accepts a draft that is the target's most probable token."""

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> VerifyResult:
        own = super().verify(drafts, scores, row_ids, positions)
        num_accepted = (drafts == scores[:, :-1].argmax(-1)).long().cumprod(1).sum(1)
        tokens = own.tokens.clone()
        accepted = torch.arange(drafts.shape[1]) < num_accepted[:, None]
        tokens[:, :-1] = torch.where(accepted, drafts, tokens[:, :-1])
        return own._replace(num_accepted=num_accepted, tokens=tokens)


@pytest.mark.parametrize("rule", [FreshNoise, ByArgmax])
def test_other_ways_to_judge_a_draft_are_seen(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, rule: type[CoupledSampler]
) -> None:
    plain, engine = sample(plain_engine(model, 0), SAMPLED), make_engine(model, 4)
    assert_same(sample(engine, SAMPLED), plain)
    monkeypatch.setattr(engine_module, "CoupledSampler", rule)
    assert sample(engine, SAMPLED).completion_ids != plain.completion_ids


def test_a_residual_that_keeps_the_draft_is_seen() -> None:
    """The distribution of one token, for a draft that is known: p, and not p + (1 - p) p at the draft's place."""
    num_rows, draft = 20_000, 2
    logits = torch.tensor([0.2, 1.0, 0.5, -0.3])
    scores, row_ids = logits.log_softmax(-1).expand(num_rows, 2, 4).contiguous(), torch.arange(num_rows)
    positions = torch.tensor([7, 8]).expand(num_rows, 2).contiguous()
    drafts, seed = torch.full((num_rows, 1), draft), torch.tensor(3)
    p = logits.softmax(-1)

    def chi_square(tokens: Tensor) -> float:
        counts = torch.bincount(tokens, minlength=4)
        return float(((counts - num_rows * p) ** 2 / (num_rows * p)).sum())

    critical = 16.27  # of chi-square with 3 degrees of freedom, at 0.001
    first = CoupledSampler(seed).verify(drafts, scores, row_ids, positions).tokens[:, 0]
    assert chi_square(first) < critical
    accepted = torch.rand(num_rows, generator=torch.Generator().manual_seed(0)) < p[draft]
    assert chi_square(torch.where(accepted, drafts[:, 0], first)) > critical


def test_texts_are_bounded_by_what_a_row_can_hold(model: PreTrainedModel) -> None:
    """A completion of an earlier, longer rollout is cut. Prevents a write beyond the texts."""
    engine = make_engine(model, 4)
    engine.remember([GROUPS[0]], [[5] * 500])
    plain = sample(plain_engine(model, 0), SAMPLED)
    assert_same(sample(engine, SAMPLED), plain)


def test_history_is_counted(model: PreTrainedModel) -> None:
    engine = make_engine(model, 4)
    first, second = sample(engine).stats, sample(engine).stats
    assert (first.history_rows, second.history_rows) == (0, len(GROUPS))
    assert second.history_tokens == first.history_tokens > 0
    metrics = second.metrics()
    assert metrics["selfspec/history_hit_fraction"] == 1.0
    assert metrics["selfspec/suffix_round_fraction"] == 1.0
    assert metrics["selfspec/suffix_mean_acceptance_length"] > 1.5
    without = make_engine(model, 4, history=False)
    assert sample(without).stats.history_rows == sample(without).stats.history_tokens == 0
    assert without.history is None


def test_texts_of_the_future_are_not_read(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """A matcher that reads one token past a row's length would copy the draft that stands there."""
    calls: list[Tensor] = []
    match = suffix_drafter.longest_suffix_match

    def recorded(texts: Tensor, lengths: Tensor, *rest: Any) -> Tensor:
        drafts = match(texts, lengths, *rest)
        noisy = texts.clone()
        noisy[torch.arange(texts.shape[1]) >= lengths[:, None]] = 91  # behind every length
        calls.append(drafts)
        assert torch.equal(match(noisy, lengths, *rest), drafts)
        return drafts

    monkeypatch.setattr(suffix_drafter, "longest_suffix_match", recorded)
    sample(make_engine(model, 4), SAMPLED)
    assert calls


def test_rows_of_an_earlier_rollout_find_room(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """Captured rounds are for more rows than are active; the others have ids of an earlier, larger rollout.

    Prevents an index beyond the slots, which a GPU answers by an assertion that ends the process.
    """
    force_page_size(monkeypatch, 4)
    monkeypatch.setattr(build, "_library", lambda: None)
    many, few = ragged_prompts([5] * 40), ragged_prompts([5] * 9, seed=1)
    plain, engine = torch_engine(model, 0), make_engine(model, 3, capture=record)
    sample(engine, prompts=many)
    engine.remember([prompt for prompt in few for _ in range(20)], [[5, 6, 7]] * 180)
    for _ in range(2):
        assert_same(sample(engine, prompts=few), sample(plain, prompts=few))
