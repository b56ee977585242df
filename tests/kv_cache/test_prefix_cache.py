"""What the cache keeps between calls: the longest prefix, no more than there is room for, and not for too long."""

import gc
import weakref
from types import SimpleNamespace

import hypothesis.strategies as st
import psutil
import pytest
import torch
from conversations import GREEDY, PAGES, PROMPTS, SAMPLED, make_engine, next_prompts
from hypothesis import HealthCheck, given, settings
from tiny_models import force_page_size, tiny_model
from transformers import PreTrainedModel

from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.engine.kv_budget import KVMemory
from trl_selfspec.engine.request import Request
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.kv_cache.prefix_cache import PrefixCache, Tokens
from trl_selfspec.options import SelfSpecOptions


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), max_size=6),
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple),
)
def test_the_longest_common_prefix_is_found(rows: list[Tokens], prompt: Tokens) -> None:
    """Prevents a search that stops at the first row that fits."""
    prefix_cache = PrefixCache(PagedCache(1, 8, 8))
    for row, tokens in enumerate(rows):
        prefix_cache.insert(row, tokens)
    shared = [max(n for n in range(len(prompt)) if n <= len(tokens) and tokens[:n] == prompt[:n]) for tokens in rows]
    row, num_tokens = prefix_cache.longest_prefix(prompt)
    assert num_tokens == max(shared, default=0)
    assert not shared or shared[row] == num_tokens


@PAGES
def test_with_few_rows_the_kept_ones_go_first(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, page_size: int | None
) -> None:
    """Prevents a prompt without a history from displacing the one that another prompt is about to use."""
    force_page_size(monkeypatch, page_size)
    engine = make_engine(model, max_batch_size=3)
    completions = engine.generate(PROMPTS, GREEDY, keep=True).completion_ids
    held = set(engine.prefix_cache._tokens.values())  # type: ignore[union-attr]
    assert len(held) == 3
    prompts = [prompt + new + [5] for prompt, new in zip(PROMPTS, completions, strict=True)]
    output = engine.generate(prompts, GREEDY, keep=True)
    assert output.stats.reused_prompt_tokens >= sum(map(len, held))


def changed_weights(engine: SelfSpecEngine, model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1)  # type: ignore[union-attr, operator]
    engine.refresh()


@pytest.mark.parametrize("broken", [False, True], ids=["", "without forgetting"])
def test_nothing_outlives_a_change_of_weights(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    """Old keys under new weights are another model's. Negative control: they show."""
    model = tiny_model("llama")
    engine = make_engine(model)
    first = engine.generate(PROMPTS, GREEDY, keep=True).completion_ids
    prompts = [prompt + new + [5, 6] for prompt, new in zip(PROMPTS, first, strict=True)]
    if broken:
        monkeypatch.setattr(PrefixCache, "clear", lambda self: None)
    changed_weights(engine, model)
    output = engine.generate(prompts, GREEDY, keep=True)
    expected = make_engine(model).generate(prompts, GREEDY).completion_ids
    assert (output.completion_ids == expected) is not broken
    assert (output.stats.reused_prompt_tokens > 0) is broken


def test_a_release_keeps_nothing(model: PreTrainedModel) -> None:
    """Prevents memory from being held through the training step for rows that no one will ask for."""
    engine = make_engine(model)
    completions = engine.generate(PROMPTS, GREEDY, keep=True).completion_ids
    cache = weakref.ref(engine.prefix_cache.cache)  # type: ignore[union-attr]
    engine.release()
    gc.collect()
    assert cache() is None
    prompts = [prompt + new + [5] for prompt, new in zip(PROMPTS, completions, strict=True)]
    assert engine.generate(prompts, GREEDY, keep=True).stats.reused_prompt_tokens == 0


def test_unless_asked_a_call_does_not_know_the_ones_before(model: PreTrainedModel) -> None:
    """Prevents a seed from giving other bits the second time; a call that keeps may differ by rounding."""
    engine = make_engine(model)
    first = engine.generate(PROMPTS, SAMPLED, seed=1)
    engine.generate(PROMPTS, SAMPLED, seed=2, keep=True)
    again = engine.generate(PROMPTS, SAMPLED, seed=1)
    assert (again.completion_ids, again.logprobs) == (first.completion_ids, first.logprobs)
    assert again.stats.reused_prompt_tokens == 0


def test_memory_of_the_cache_that_is_replaced_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents later turns from decoding fewer rows at once because the earlier ones hold memory."""
    token_bytes = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, fp32
    total, row = 2**20, token_bytes * 64
    memory = KVMemory(2, token_bytes, None, SelfSpecOptions(num_speculative_tokens=0))
    requests = [Request(row_id, (1, 2, 3), limit=63) for row_id in range(100)]
    device = torch.device("cpu")

    def rows(held_rows: int, counted: bool) -> int:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=total - held_rows * row))
        cache = PagedCache(2, held_rows - 1, 32)  # one page more for padding; too short for these requests
        for layer in cache.pages_of:
            layer.lazy_initialization(torch.zeros(1, 2, 1, 32), torch.zeros(1, 2, 1, 32))
        return memory.allocate(requests, PrefixCache(cache) if counted else None, device).cache.max_rows

    assert rows(8, counted=True) == total // 2 // row > rows(8, counted=False)


@PAGES
def test_a_conversation_holds_no_more_memory_than_its_turn(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, page_size: int | None
) -> None:
    """Prevents a cache that grows by what it keeps, and a former one that stays allocated."""
    force_page_size(monkeypatch, page_size)
    engine, prompts, caches = make_engine(model), PROMPTS, []
    for turn in range(3):
        output = engine.generate(prompts, GREEDY, keep=True)
        caches.append(engine.prefix_cache.cache)  # type: ignore[union-attr]
        fresh = make_engine(model)
        fresh.generate(prompts, GREEDY)
        alone = fresh.prefix_cache.cache  # type: ignore[union-attr]
        if caches[-1] not in caches[:-1]:
            assert caches[-1].nbytes == alone.nbytes
        prompts = next_prompts(prompts, output.completion_ids, turn)
    assert all(cache.nbytes == 0 for cache in caches if cache is not caches[-1])
    assert len({id(cache) for cache in caches}) > 1, "the cache must have grown"
