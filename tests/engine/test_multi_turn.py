"""Turns of a conversation: what the cache still holds is not computed again, and that changes no token."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conversations import (
    GREEDY,
    PAGES,
    PROMPTS,
    SAMPLED,
    converse,
    make_engine,
    next_prompts,
    reference_engine,
    shared_engine,
)
from pairwise import pairwise
from tiny_models import Schedule, force_page_size, ragged_prompts, tiny_model
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec.engine import rollout
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.engine.model_runner import ModelRunner
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.kv_cache.prefix_cache import PrefixCache, Tokens


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects how many tokens each prefill forward computes, padding not counted."""
    counts: list[int] = []
    prefill = ModelRunner.prefill

    def counted(
        self: ModelRunner, rows: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, width: int, *rest: Any
    ) -> None:
        counts.append(int((ends - starts).clamp(0, width).sum()))
        prefill(self, rows, starts, ends, width, *rest)

    monkeypatch.setattr(ModelRunner, "prefill", counted)
    return counts


@pairwise(
    law=[(GREEDY, "rejection"), (SAMPLED, "coupled"), (SAMPLED, "rejection")],
    max_batch_size=[None, 3],
    page_size=[None, 4],
)
def test_reuse_changes_no_token(
    monkeypatch: pytest.MonkeyPatch,
    model: PreTrainedModel,
    law: tuple[GenerationConfig, str],
    max_batch_size: int | None,
    page_size: int | None,
) -> None:
    """Prevents keys of another row, of a rejected draft or of a former answer from being taken for a prompt's."""
    force_page_size(monkeypatch, page_size)
    config, verification = law
    values: dict[str, Any] = {"verification": verification, "max_batch_size": max_batch_size}
    expected, without = converse(reference_engine(model, **values), config, keep=False)
    assert len({len(row) for row in expected[0]}) > 3, "rows must end at different times"
    reused, stats = converse(shared_engine(model, **values), config, keep=True)
    assert reused == expected
    assert without.reused_prompt_tokens == 0 < stats.reused_prompt_tokens


@pytest.mark.parametrize(
    ("family", "page_size"), [("mistral", 1), ("gemma2", 4), ("gemma3_text", None), ("gpt_neox", 64), ("qwen3_moe", 1)]
)
def test_reuse_changes_no_token_in_other_architectures(
    monkeypatch: pytest.MonkeyPatch, family: str, page_size: int | None
) -> None:
    """Prevents a sliding window, a soft-cap or positions that start anew behind the kept keys."""
    force_page_size(monkeypatch, page_size)
    model = tiny_model(family)
    expected, _ = converse(reference_engine(model), GREEDY, keep=False)
    reused, stats = converse(shared_engine(model), GREEDY, keep=True)
    assert reused == expected
    assert stats.reused_prompt_tokens > 0


def test_reuse_holds_whatever_the_rounds_were(model: PreTrainedModel) -> None:
    """Prevents the keys of provisional drafts from being kept after a plain, a short or a long last round."""
    expected, _ = converse(reference_engine(model), GREEDY, keep=False)
    for schedule in ([0], [7], [0, 5, 1]):
        engine = make_engine(model, gamma=7, controller=Schedule(*schedule))
        assert converse(engine, GREEDY, keep=True)[0] == expected


@PAGES
@pytest.mark.parametrize("gamma", [0, 3])
def test_only_what_is_new_is_computed(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, prefilled: list[int], gamma: int, page_size: int | None
) -> None:
    """Prevents forwards over tokens whose keys are there: the price of a long conversation."""
    force_page_size(monkeypatch, page_size)
    engine, prompts = shared_engine(model, gamma=gamma), PROMPTS
    for turn in range(3):
        output = engine.generate(prompts, GREEDY, keep=True)
        known = {tuple(prompt + new) for prompt, new in zip(prompts, output.completion_ids, strict=True)}
        prompts = next_prompts(prompts, output.completion_ids, turn)
        history = [next(row for row in known if tuple(prompt[: len(row)]) == row) for prompt in prompts]
        # The last completed token was never read, and the last of a prompt is read by the first round.
        new = sum(len(prompt) - len(row) for prompt, row in zip(prompts, history, strict=True))
        prefilled.clear()
        again = engine.generate(prompts, GREEDY, keep=True)
        assert sum(prefilled) == new
        assert again.stats.reused_prompt_tokens == sum(len(row) - 1 for row in history)
        assert again.stats.prompt_tokens == sum(map(len, prompts))


def continuation(model: PreTrainedModel, same: int) -> tuple[SelfSpecEngine, list[int], int]:
    """An engine that keeps one row, and a prompt that shares exactly its first `same` tokens."""
    engine, prompt = shared_engine(model), PROMPTS[0]
    row = prompt + engine.generate([prompt], GREEDY, keep=True).completion_ids[0]
    same = min(same, len(row))
    other = [3 + (token + 1) % 90 for token in row[same : same + 1]]
    return engine, row[:same] + other + [5, 6, 7], min(same, len(row) - 1)


@PAGES
@pytest.mark.parametrize("same", [0, 1, 4, 8, 9, 12, 99])
def test_a_changed_tail_reuses_the_common_part_alone(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, same: int, page_size: int | None
) -> None:
    """A chat template that renders an earlier turn anew, or a tool's answer that was cut, changes the tail."""
    force_page_size(monkeypatch, page_size)
    engine, prompt, known = continuation(model, same)
    expected = reference_engine(model).generate([prompt], GREEDY).completion_ids
    output = engine.generate([prompt], GREEDY, keep=True)
    assert output.completion_ids == expected
    assert output.stats.reused_prompt_tokens == known


@PAGES
def test_several_prompts_may_go_on_from_one_row(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, page_size: int | None
) -> None:
    """Prevents two rows from writing to the page in which their common part ends."""
    force_page_size(monkeypatch, page_size)
    engine = shared_engine(model)
    rows = [a + b for a, b in zip(PROMPTS, engine.generate(PROMPTS, GREEDY, keep=True).completion_ids, strict=True)]
    branches = [rows[2][:cut] + tail for cut in (7, 19, 22, 19) for tail in ([5, 6], [7, 8, 9])]
    expected = reference_engine(model).generate(branches, GREEDY).completion_ids
    output = engine.generate(branches, GREEDY, keep=True)
    assert output.completion_ids == expected
    assert output.stats.reused_prompt_tokens == 2 * (7 + 19 + 22)  # equal prompts are filled once


def test_a_long_continuation_is_computed_in_pieces(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, prefilled: list[int]
) -> None:
    """Prevents a mask of (new tokens x all tokens) that outgrows the memory after a long tool answer."""
    engine = shared_engine(model)
    completions = engine.generate(PROMPTS, GREEDY, keep=True).completion_ids
    prompts = [a + b + c for a, b, c in zip(PROMPTS, completions, ragged_prompts([40, 2, 9, 1] * 2), strict=True)]
    expected = reference_engine(model).generate(prompts, GREEDY).completion_ids
    prefilled.clear()
    monkeypatch.setattr(rollout, "PREFILL_SCORES", 1500)
    assert engine.generate(prompts, GREEDY, keep=True).completion_ids == expected
    assert sum(prefilled) == 2 * (40 + 2 + 9 + 1)
    assert len(prefilled) > 10


def test_padding_beyond_all_keys_cannot_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short row's padding may lie further behind the last key than the window reaches: a softmax over nothing."""
    model = tiny_model("gemma2")  # windows and soft-caps: an eager softmax
    rows = ragged_prompts([40, 4])
    for page_size in (None, 4):
        force_page_size(monkeypatch, page_size)
        engine = shared_engine(model)
        completions = engine.generate(rows, GREEDY, keep=True).completion_ids
        prompts = [a + b + c for a, b, c in zip(rows, completions, ragged_prompts([1, 30]), strict=True)]
        expected = reference_engine(model).generate(prompts, GREEDY).completion_ids
        assert engine.generate(prompts, GREEDY, keep=True).completion_ids == expected
        for layer in engine.prefix_cache.cache.pages_of:  # type: ignore[union-attr]
            assert layer.keys.isfinite().all()
            assert layer.values.isfinite().all()


def test_equal_prompts_of_a_later_turn_share_what_is_kept(model: PreTrainedModel, prefilled: list[int]) -> None:
    """Prevents a group that goes on from one conversation from filling its prompt once per sample."""
    engine = shared_engine(model, verification="coupled")
    row = PROMPTS[2] + engine.generate([PROMPTS[2]], SAMPLED, seed=0, keep=True).completion_ids[0]
    prompts = [[*row, 5, 6]] * 6
    expected = reference_engine(model, verification="coupled").generate(prompts, SAMPLED, seed=1).completion_ids
    prefilled.clear()
    output = engine.generate(prompts, SAMPLED, seed=1, keep=True)
    assert output.completion_ids == expected
    assert sum(prefilled) == 2
    assert output.stats.reused_prompt_tokens == len(row) - 1


# What must not pass: each breaks the reuse in one way that the law above is there to catch.


def trust_the_key_of_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    longest_prefix = PrefixCache.longest_prefix

    def one_more(self: PrefixCache, prompt: Tokens) -> tuple[int, int]:
        row, num_tokens = longest_prefix(self, prompt)
        return row, min(num_tokens + 1, len(prompt) - 1) if num_tokens else 0

    monkeypatch.setattr(PrefixCache, "longest_prefix", one_more)


def take_another_row(monkeypatch: pytest.MonkeyPatch) -> None:
    longest_prefix = PrefixCache.longest_prefix

    def wrong(self: PrefixCache, prompt: Tokens) -> tuple[int, int]:
        row, num_tokens = longest_prefix(self, prompt)
        return (row + 1) % self.cache.max_rows, num_tokens

    monkeypatch.setattr(PrefixCache, "longest_prefix", wrong)


def leave_finished_rows_where_others_move(monkeypatch: pytest.MonkeyPatch) -> None:
    rearrange = PagedCache.rearrange

    def overwritten(self: PagedCache, sources: dict[int, tuple[int, int]]) -> None:
        for row, source in reversed(sources.items()):
            rearrange(self, {row: source})

    monkeypatch.setattr(PagedCache, "rearrange", overwritten)


def continue_at_position_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ModelRunner._run

    def shifted(self: ModelRunner, model: Any, tokens: torch.Tensor, positions: torch.Tensor, **kwargs: int) -> Any:
        if kwargs:  # a prefill
            positions = positions - positions[:, :1]
        return run(self, model, tokens, positions, **kwargs)

    monkeypatch.setattr(ModelRunner, "_run", shifted)


def see_the_new_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = PagedCache.begin

    def fresh(self: PagedCache, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.fresh = self.rows is not None

    monkeypatch.setattr(PagedCache, "begin", fresh)


def drop_kept_pages_while_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagedCache, "adopt", lambda *args: None)


@pytest.mark.parametrize(
    "sabotage",
    [
        trust_the_key_of_the_last_token,
        take_another_row,
        leave_finished_rows_where_others_move,
        continue_at_position_zero,
        see_the_new_tokens_alone,
        drop_kept_pages_while_growing,
    ],
)
def test_a_broken_reuse_is_noticed(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, sabotage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Negative controls: the comparison of conversations sees each of these."""
    expected, _ = converse(reference_engine(model), GREEDY, keep=False)
    sabotage(monkeypatch)
    broken, _ = converse(make_engine(model), GREEDY, keep=True)
    assert broken[1:] != expected[1:]


def test_padding_that_sees_no_key_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the clamp the padding's keys are NaN."""
    begin = PagedCache.begin

    def unclamped(self: PagedCache, positions: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        begin(self, positions, *args, **kwargs)
        self.positions = positions

    monkeypatch.setattr(PagedCache, "begin", unclamped)
    with pytest.raises((AssertionError, ValueError)):
        test_padding_beyond_all_keys_cannot_poison(monkeypatch)
