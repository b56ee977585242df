"""Rollouts that run out of pages: rows pause and go on, and nobody can tell from what comes out."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conversations import PROMPTS, converse, make_engine, reference_engine, shared_engine
from recorded_graph import record
from tiny_models import Schedule, force_page_size, ragged_prompts, tiny_model
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec.engine import engine as engine_module
from trl_selfspec.engine import kv_budget as memory
from trl_selfspec.engine.batch_state import BatchState
from trl_selfspec.engine.engine import RolloutOutput, SelfSpecEngine
from trl_selfspec.engine.request import Request
from trl_selfspec.engine.rollout import Rollout, Span
from trl_selfspec.engine.scheduler import Admission, Scheduler
from trl_selfspec.kernels.cpu import build
from trl_selfspec.kv_cache.prefix_cache import PrefixCache


PAGE = 4
GROUPS = [prompt for prompt in PROMPTS for _ in range(3)]
EOS = list(range(20, 25))
LONGEST = 12  # pages of 20 tokens, 24 new ones, a draft of 3, and one slot: what the longest of these rows may need
SEED = 2  # one of those whose residual laws no rounding tips over
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8}
PROCESSED = SAMPLED | {"top_k": 40, "repetition_penalty": 1.1, "min_new_tokens": 6}
TOLERANCE = 1e-4  # fp32 rounding of log-probabilities in other shapes; another history is off by 0.1 or more


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _pages(monkeypatch: pytest.MonkeyPatch) -> None:
    force_page_size(monkeypatch, PAGE)


def config(law: dict[str, Any]) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": 24, "eos_token_id": EOS, "top_k": 0} | law)


def give_pages(monkeypatch: pytest.MonkeyPatch, engine: SelfSpecEngine, num_pages: int) -> None:
    """Half of the memory that is free, or that this engine's cache holds, is as many pages from here on."""
    total = 2 * num_pages * PAGE * engine._memory.token_bytes

    def free_bytes(device: torch.device) -> int:
        return total - (0 if engine.prefix_cache is None else engine.prefix_cache.cache.nbytes)

    monkeypatch.setattr(memory, "free_bytes", free_bytes)


def assert_same(actual: RolloutOutput, expected: RolloutOutput) -> None:
    assert actual.completion_ids == expected.completion_ids
    for ours, theirs in ((actual.logprobs, expected.logprobs), (actual.policy_logprobs, expected.policy_logprobs)):
        for row, reference in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(row), torch.tensor(reference), rtol=0, atol=TOLERANCE)


_UNPRESSED: dict[Any, RolloutOutput] = {}


def unpressed(
    model: PreTrainedModel, law: dict[str, Any], prompts: list[list[int]] = GROUPS, **options: Any
) -> RolloutOutput:
    """With all pages that can be used; the same for all tests."""
    key = model, str(law), str(prompts), str(options)
    if key not in _UNPRESSED:
        _UNPRESSED[key] = reference_engine(model, **options).generate(prompts, config(law), seed=SEED)
    assert _UNPRESSED[key].stats.paused_rows == 0
    return _UNPRESSED[key]


def compare(
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
    law: dict[str, Any],
    num_pages: int,
    prompts: list[list[int]] = GROUPS,
    **options: Any,
) -> tuple[RolloutOutput, RolloutOutput]:
    """With as many pages, and with all that can be used."""
    expected = unpressed(model, law, prompts, **options)
    pressed = shared_engine(model, **options)
    give_pages(monkeypatch, pressed, num_pages)
    return pressed.generate(prompts, config(law), seed=SEED), expected


@pytest.mark.parametrize("num_pages", [LONGEST, 20, 40])
@pytest.mark.parametrize(
    ("law", "verification", "gamma"),
    [
        (GREEDY, "rejection", 0),
        (GREEDY, "rejection", 3),
        pytest.param(SAMPLED, "rejection", 0, marks=pytest.mark.slow),
        (SAMPLED, "rejection", 3),
        pytest.param(PROCESSED, "rejection", 3, marks=pytest.mark.slow),
        (PROCESSED, "coupled", 3),
    ],
)
def test_too_few_pages_change_no_token(
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
    law: dict[str, Any],
    verification: str,
    gamma: int,
    num_pages: int,
) -> None:
    """Prevents tokens or keys that are lost, drawn twice or another row's when rows pause; down to one row's pages."""
    actual, expected = compare(monkeypatch, model, law, num_pages, verification=verification, gamma=gamma)
    assert_same(actual, expected)
    assert len({len(row) for row in expected.completion_ids}) > 3, "rows must end at different times"
    ours, theirs = actual.stats, expected.stats
    assert ours.paused_rows > 0
    assert ours.recomputed_tokens > 0
    for counter in ("num_rows", "prompt_tokens", "completion_tokens"):
        assert getattr(ours, counter) == getattr(theirs, counter)


@pytest.mark.parametrize("family", ["mistral", "gemma2", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_rows_go_on_in_other_architectures(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Prevents a sliding window or a soft-cap that a recomputed row does not see."""
    actual, expected = compare(monkeypatch, tiny_model(family), GREEDY, 20)
    assert_same(actual, expected)
    assert actual.stats.paused_rows > 0


def test_rows_pause_between_rounds_of_any_length(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """Prevents keys of a draft that was rejected before the pause from counting as the row's."""
    expected = unpressed(model, GREEDY, gamma=7)
    engine = make_engine(model, gamma=7, controller=Schedule(7, 0, 1, 0, 3))
    give_pages(monkeypatch, engine, 20)
    actual = engine.generate(GROUPS, config(GREEDY), seed=SEED)
    assert_same(actual, expected)
    assert actual.stats.paused_rows > 0


@pytest.mark.parametrize(
    ("gamma", "ahead"), [(0, 2), (3, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 1), (3, 2)))]
)
def test_rows_pause_with_rounds_in_flight(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, gamma: int, ahead: int
) -> None:
    """Prevents a row from being taken down before the host has read what it has drawn."""
    expected = unpressed(model, SAMPLED, gamma=gamma)
    monkeypatch.setitem(engine_module.ROUNDS_AHEAD, "cpu", ahead)
    for num_pages in (LONGEST, 20):
        engine = shared_engine(model, gamma=gamma)
        give_pages(monkeypatch, engine, num_pages)
        actual = engine.generate(GROUPS, config(SAMPLED), seed=SEED, keep=True)
        assert_same(actual, expected)
        assert actual.stats.paused_rows > 0


def recorded(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A recording whose report is copied when it is launched, as a GPU's is: the next replay overwrites it."""
    replay = record(function)
    return lambda: replay().clone()


@pytest.mark.parametrize("ahead", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_replayed_rounds_follow_rows_that_pause(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, ahead: int
) -> None:
    """Prevents a captured round from reading a table that the host has since changed, or storage that has gone."""
    monkeypatch.setitem(engine_module.ROUNDS_AHEAD, "cpu", ahead)
    monkeypatch.setattr(build, "_library", lambda: None)  # our C kernels are no operations of torch: none is recorded
    prompts = GROUPS[:12]
    expected = make_engine(model).generate(prompts, config(SAMPLED), seed=SEED)
    engine = make_engine(model, capture=recorded)
    for num_pages in (LONGEST, 20):
        give_pages(monkeypatch, engine, num_pages)
        actual = engine.generate(prompts, config(SAMPLED), seed=SEED)
        assert_same(actual, expected)
        assert actual.stats.paused_rows > 0
        assert len(engine.graphs) > 0
        engine.release()


@pytest.mark.parametrize("law", [pytest.param(GREEDY, marks=pytest.mark.slow), SAMPLED])
def test_conversations_go_on_from_what_there_was_room_to_keep(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, law: dict[str, Any]
) -> None:
    """Rows kept for later turns give way before a live one does, and a prompt loses its history at worst."""
    cached_then: list[int] = []
    preempt = Rollout._preempt

    def watched(self: Rollout, row: int) -> None:
        cached_then.append(len(self.prefix_cache))
        preempt(self, row)

    monkeypatch.setattr(Rollout, "_preempt", watched)
    expected, _ = converse(reference_engine(model), config(law), keep=False)
    for num_pages in (28, 40, 80):
        engine = shared_engine(model)
        give_pages(monkeypatch, engine, num_pages)
        actual, stats = converse(engine, config(law), keep=True)
        assert actual == expected
    assert stats.reused_prompt_tokens > 0, "with the most of these, something must have been kept"
    assert cached_then
    assert set(cached_then) == {0}


@pytest.mark.parametrize("broken", [False, True], ids=["", "forgotten alone"])
def test_rows_that_no_call_can_reuse_hold_no_pages(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, broken: bool
) -> None:
    """Prevents a rollout that waits for pages which idle rows hold for nobody. Negative control: it can't begin."""
    engine = make_engine(model)
    give_pages(monkeypatch, engine, LONGEST)
    for end in (engine.refresh, lambda: None):  # or by a call that keeps nothing
        engine.generate(PROMPTS, config(GREEDY), keep=True)
        if broken:
            monkeypatch.setattr(PrefixCache, "clear", lambda self: self._drop(list(self._tokens)))
        end()
        if broken:
            with pytest.raises(AssertionError):
                engine.generate([max(PROMPTS, key=len)], config(GREEDY))
            return
        assert len(engine.generate([max(PROMPTS, key=len)], config(GREEDY)).completion_ids[0]) > 0


@pytest.mark.parametrize("broken", [False, True], ids=["", "the oldest pauses"])
def test_the_oldest_row_comes_to_its_end(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, broken: bool
) -> None:
    """Prevents rows that take each other's pages in turn. Negative control: the other order is seen."""
    preempt, newest, from_the_oldest = Scheduler.preempt, Scheduler.newest, []

    def oldest(self: Scheduler) -> int:
        return self._admission_order.index(min(self._admission_order))

    def watched(self: Scheduler, row: int, done: tuple[int, ...]) -> int:
        from_the_oldest.append(row == oldest(self))
        return preempt(self, row, done)

    monkeypatch.setattr(Scheduler, "preempt", watched)
    monkeypatch.setattr(Scheduler, "newest", oldest if broken else newest)
    actual, _ = compare(monkeypatch, model, SAMPLED, LONGEST)
    rounds = actual.stats.plain_rounds + actual.stats.num_rounds_speculative
    assert len(from_the_oldest) == actual.stats.paused_rows > 0
    assert rounds <= actual.stats.completion_tokens
    assert any(from_the_oldest) is broken


def test_paused_rows_share_their_prompt_again(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """Prevents a group from needing its prompt's pages once per row after a pause, and from computing it again."""
    done: list[int] = []
    preempt = Scheduler.preempt

    def watched(self: Scheduler, row: int, tokens: tuple[int, ...]) -> int:
        done.append(len(tokens))
        return preempt(self, row, tokens)

    monkeypatch.setattr(Scheduler, "preempt", watched)
    prompts = ragged_prompts([33]) * 6  # 8 pages once, and at most 8 for each row's own
    actual, expected = compare(monkeypatch, model, SAMPLED | {"eos_token_id": None}, 8 + 3 * 8, prompts)
    assert_same(actual, expected)
    assert actual.stats.recomputed_tokens == sum(done) > 0


def test_a_group_counts_its_prompt_once(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """Prevents memory for prompts that no row holds alone, and rows that wait for it."""
    prompts = ragged_prompts([33]) * 6
    engine = make_engine(model)
    give_pages(monkeypatch, engine, 10_000)
    output = engine.generate(prompts, config(SAMPLED | {"eos_token_id": None}), seed=SEED)
    needed = -(-(33 + 24 + 3 + 1) // PAGE)
    assert engine.prefix_cache.cache.num_pages == 1 + 8 + 6 * (needed - 8) + 6  # type: ignore[union-attr]
    assert output.stats.paused_rows == 0
    assert output.stats.kv_bytes == engine.prefix_cache.cache.nbytes > 0  # type: ignore[union-attr]


def test_a_row_in_flight_counts_as_completed_tokens(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """Prevents a progress bar that runs backwards whenever a row pauses."""
    engine, progress = make_engine(model), []
    give_pages(monkeypatch, engine, 20)
    output = engine.generate(GROUPS, config(SAMPLED), seed=SEED, on_round=progress.append)
    tokens = [round_.completed_tokens for round_ in progress]
    assert output.stats.paused_rows > 0
    assert tokens == sorted(tokens)
    assert tokens[-1] == sum(map(len, output.completion_ids))


# What must not pass.


def forget_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    preempt = Scheduler.preempt
    monkeypatch.setattr(Scheduler, "preempt", lambda self, row, done: preempt(self, row, done[:-1]))


def go_on_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Rollout._prefill_batches

    def prompts_alone(self: Rollout, all_spans: list[Span]) -> Any:
        for spans in batches(self, all_spans):
            ends = [len(self.scheduler.active[span.row].prompt) - 1 for span in spans]
            short = [
                Span(span.row, span.start, end) for span, end in zip(spans, ends, strict=True) if end > span.start
            ]
            for span in spans:
                self.runner.cache.reserve(span.row, span.end)
            if short:
                yield short

    monkeypatch.setattr(Rollout, "_prefill_batches", prompts_alone)


def count_what_was_generated_as_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    assign = BatchState.assign

    def longer(self: BatchState, row: int, prompt: tuple, limit: int, row_id: int, done: tuple = ()) -> None:
        assign(self, row, (*prompt, *done), limit, row_id)

    monkeypatch.setattr(BatchState, "assign", longer)


def take_a_preempted_row_for_a_fresh_one(monkeypatch: pytest.MonkeyPatch) -> None:
    take_over = Scheduler.take_over

    def fresh(self: Scheduler, row: int) -> Request | None:
        if self.waiting:
            self.waiting[0] = replace(self.waiting[0], done=())
        return take_over(self, row)

    monkeypatch.setattr(Scheduler, "take_over", fresh)


@pytest.mark.parametrize(
    "sabotage",
    [forget_a_token, go_on_without_keys, count_what_was_generated_as_prompt, take_a_preempted_row_for_a_fresh_one],
)
def test_a_broken_pause_is_noticed(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, sabotage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Negative controls: the comparison with a rollout that has all pages sees each of these."""
    unpressed(model, PROCESSED)  # before it is broken
    sabotage(monkeypatch)
    actual, expected = compare(monkeypatch, model, PROCESSED, 20)
    assert actual.stats.paused_rows > 0
    with pytest.raises(AssertionError):
        assert_same(actual, expected)


@pytest.mark.parametrize("broken", ["nothing is needed", "cached rows stay"])
def test_broken_admission_is_noticed(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, broken: str) -> None:
    """Negative controls: pages that are promised twice, and rows that starve behind cached ones."""
    if broken == "cached rows stay":
        monkeypatch.setattr(PrefixCache, "evict", lambda *args, **kwargs: False)
    else:
        monkeypatch.setattr(Admission, "_needed_pages", lambda self, request, num_shared: 0)
    engine = make_engine(model)
    give_pages(monkeypatch, engine, 20)
    with pytest.raises((AssertionError, IndexError)):
        converse(engine, config(GREEDY), keep=True)
