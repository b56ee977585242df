"""How large the cache is: from a budget, no larger than can be used, freed between rollouts."""

import logging
from typing import Any

import pytest
import torch
from conversations import GREEDY, PROMPTS, make_engine
from tiny_models import force_page_size, tiny_model
from transformers import PreTrainedModel

from trl_selfspec import SelfSpecOptions
from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.engine import kv_budget as memory
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.engine.kv_budget import MAX_ROWS, KVMemory
from trl_selfspec.engine.request import Request
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.kv_cache.prefix_cache import PrefixCache


PAGE = 4
DEVICE = torch.device("cpu")
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, fp32: of `tiny_model("llama")`


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _pages(monkeypatch: pytest.MonkeyPatch) -> None:
    force_page_size(monkeypatch, PAGE)


def allocate(
    monkeypatch: pytest.MonkeyPatch,
    free_pages: int,
    requests: list[Request],
    prefix_cache: PrefixCache | None = None,
    **options: Any,
) -> PrefixCache:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free_pages * PAGE * TOKEN_BYTES)
    chosen = SelfSpecOptions(num_speculative_tokens=3, **options)
    return KVMemory(2, TOKEN_BYTES, None, chosen).allocate(requests, prefix_cache, DEVICE)


def requests(count: int, limit: int = 28) -> list[Request]:
    """Each may need 8 pages: its tokens, a draft of 3, and one slot."""
    return [Request(row_id, (row_id, 1, 2), limit) for row_id in range(count)]


@pytest.mark.parametrize(("fraction", "num_pages"), [(0.5, 50), (0.25, 25), (0.9, 90)])
def test_pages_are_a_fraction_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, fraction: float, num_pages: int
) -> None:
    """Prevents a cache that leaves training and activations nothing."""
    cache = allocate(monkeypatch, 100, requests(40), kv_memory_fraction=fraction).cache
    assert cache.num_free == num_pages
    assert cache.max_rows == 40, "rows are not limited to those that fit at their full length"


def test_no_more_pages_than_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a handful of short rows from taking half of the memory."""
    assert allocate(monkeypatch, 10_000, requests(5)).cache.num_free == 5 * 8 + 5
    assert allocate(monkeypatch, 10_000, requests(5), max_batch_size=2).cache.num_free == 2 * 8 + 2


@pytest.mark.parametrize(("given", "rows"), [(None, MAX_ROWS), (7, 7), (300, 300)])
def test_rows_are_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch, given: int | None, rows: int) -> None:
    """Prevents logits of a thousand rows where nobody asked for them."""
    assert allocate(monkeypatch, 100, requests(500), max_batch_size=given).cache.max_rows == rows


def test_pages_that_are_held_count_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a conversation from losing memory with each turn to the turns before."""
    prefix_cache = allocate(monkeypatch, 32, requests(40))
    cache, page = prefix_cache.cache, PAGE * TOKEN_BYTES
    for layer in cache.pages_of:
        layer.lazy_initialization(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    assert cache.nbytes == 17 * page
    assert allocate(monkeypatch, 100 - 17, requests(40), prefix_cache) is prefix_cache, "it grows in place"
    assert cache.num_free == 50
    assert cache.nbytes == 51 * page


def test_a_row_that_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a rollout that stands still, and an error that does not say what to do. One page more suffices."""
    with pytest.raises(ValueError, match=r"kv_memory_fraction=0\.5") as error:
        allocate(monkeypatch, 2 * 7, requests(3))
    for part in ("32 tokens", "max_completion_length", "max_new_tokens", "KiB"):
        assert part in str(error.value)
    assert allocate(monkeypatch, 2 * 8, requests(3)).cache.num_free == 8


def addresses(cache: PagedCache) -> list[int]:
    return [cache._table.data_ptr(), *(id(layer) for layer in cache.pages_of)]


def test_released_pages_come_back_to_the_same_table(model: PreTrainedModel) -> None:
    """A captured graph goes on reading the table where it was; and a rollout must not see what lay there before."""
    engine = make_engine(model)
    first = engine.generate(PROMPTS, GREEDY, seed=1)
    cache = engine.prefix_cache.cache  # type: ignore[union-attr]
    before = addresses(cache)
    engine.release()
    assert cache.nbytes == 0
    again = engine.generate(PROMPTS, GREEDY, seed=1)
    assert engine.prefix_cache.cache is cache  # type: ignore[union-attr]
    assert addresses(cache) == before
    assert (again.completion_ids, again.logprobs) == (first.completion_ids, first.logprobs)
    assert again.stats.kv_bytes == first.stats.kv_bytes == cache.nbytes > 0


def test_a_release_frees_the_memory_and_ends_a_conversation(model: PreTrainedModel) -> None:
    """Prevents training without the memory that it was promised, and rows that outlive their conversation."""
    engine = make_engine(model)
    output = engine.generate(PROMPTS, GREEDY, keep=True)
    engine.release()
    assert len(engine.prefix_cache) == 0  # type: ignore[arg-type]
    assert engine.prefix_cache.cache.nbytes == 0  # type: ignore[union-attr]
    turns = [prompt + new + [5] for prompt, new in zip(PROMPTS, output.completion_ids, strict=True)]
    expected = make_engine(model).generate(turns, GREEDY)
    actual = engine.generate(turns, GREEDY, keep=True)
    assert actual.completion_ids == expected.completion_ids
    assert actual.stats.reused_prompt_tokens == 0


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_failed_rollout_leaves_nothing_behind(family: str) -> None:
    """Prevents NaN in a page from reaching the next rollout through keys that are masked."""
    model = tiny_model(family)
    engine = make_engine(model)
    expected = engine.generate(PROMPTS, GREEDY).completion_ids
    weight = model.get_parameter("model.layers.0.self_attn.v_proj.weight")
    good = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    engine.refresh()
    with pytest.raises(ValueError, match="not finite"):
        engine.generate(PROMPTS, GREEDY)
    with torch.no_grad():
        weight.copy_(good)
    engine.refresh()
    assert engine.generate(PROMPTS, GREEDY).completion_ids == expected


def test_scarce_memory_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Prevents a slow run whose user does not know which option to change, and a warning about a few tokens."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]  # other tests may have caused it
    with caplog.at_level(logging.WARNING, logger="trl_selfspec.engine.kv_budget"):
        memory.warn_if_scarce(RolloutStats(prompt_tokens=100, completion_tokens=900, recomputed_tokens=49))
        assert not caplog.records
        for recomputed in (51, 200):
            memory.warn_if_scarce(RolloutStats(prompt_tokens=100, completion_tokens=900, recomputed_tokens=recomputed))
    (message,) = caplog.messages
    assert all(name in message for name in ("max_batch_size", "kv_memory_fraction", "completion length"))


def test_pauses_are_logged_when_there_are_any() -> None:
    """Prevents two more columns of zeros in every log."""
    names = {"selfspec/paused_rows", "selfspec/recomputed_tokens"}
    assert not names & RolloutStats().metrics().keys()
    metrics = RolloutStats(paused_rows=2, recomputed_tokens=9).metrics()
    assert [metrics[name] for name in sorted(names)] == [2, 9]


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, -0.1, 1.5, True, "0.5", None, float("nan")])
def test_a_fraction_that_is_none_is_refused(value: Any) -> None:
    """Prevents a budget of nothing, and one that leaves no room for a forward."""
    with pytest.raises(ValueError, match="kv_memory_fraction"):
        SelfSpecOptions(kv_memory_fraction=value)
    assert SelfSpecOptions(kv_memory_fraction=0.3).kv_memory_fraction == 0.3


@pytest.mark.gpu
def test_on_a_gpu_the_memory_is_given_back() -> None:
    """Prevents pages that training can't use; rows kept for a later turn hold theirs until then."""
    engine = SelfSpecEngine(tiny_model("llama").to("cuda"), SelfSpecOptions(num_speculative_tokens=0))  # type: ignore[arg-type]
    allocated = []
    for keep in (False, True, False):
        engine.generate(PROMPTS, GREEDY, keep=keep)
        allocated.append(engine.prefix_cache.cache.nbytes)  # type: ignore[union-attr]
    assert allocated[0] == allocated[2] == 0 < allocated[1]
