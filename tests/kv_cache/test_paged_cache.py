"""The paged cache against a list of lists, and the attention function against plain masked softmax."""

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from cache_machine import CAPACITY, LAYERS, ROWS, STATEFUL, CacheMachine, assert_noticed
from pairwise import pairwise
from torch import Tensor, nn
from torch.nn.functional import pad

from trl_selfspec.kernels.cpu import build
from trl_selfspec.kv_cache.attention import bind_cache, selfspec_attention
from trl_selfspec.kv_cache.paged_cache import PagedCache


TOLERANCE = 1e-5  # fp32 rounding of sums in another order; one key too many or too few is 1e-2 or more


class PagesOfFour(CacheMachine):
    page_size = 4


class PagesOfOne(CacheMachine):
    page_size = 1


class ForgetsOwners(PagedCache):
    def rearrange(self, sources: Mapping[int, tuple[int, int]]) -> None:
        self._owners = [min(owners, 1) for owners in self._owners]
        super().rearrange(sources)


class SharesTheTail(PagedCache):
    def _copy_pages(self, pairs: Sequence[tuple[int, int]], num_slots: int) -> None:
        pass


class MovesOneSlotTooFew(PagedCache):
    def rearrange(self, sources: Mapping[int, tuple[int, int]]) -> None:
        super().rearrange({row: (source, max(n - 1, 0)) for row, (source, n) in sources.items()})


class CopiesOneAfterAnother(PagedCache):
    def rearrange(self, sources: Mapping[int, tuple[int, int]]) -> None:
        for row, source in sources.items():
            super().rearrange({row: source})


class AdoptsInItsOwnOrder(PagedCache):
    def adopt(self, other: PagedCache, sources: Sequence[tuple[int, int]]) -> None:
        super().adopt(other, sorted(sources))


for machine in (CacheMachine, PagesOfFour, PagesOfOne):
    machine.TestCase.settings = STATEFUL  # type: ignore[attr-defined]
TestDenseRows = CacheMachine.TestCase
TestPagesOfFour = PagesOfFour.TestCase
TestPagesOfOne = pytest.mark.slow(PagesOfOne.TestCase)


@pytest.mark.parametrize(
    ("broken", "page_size"),
    [
        (ForgetsOwners, 4),
        (SharesTheTail, 4),
        (MovesOneSlotTooFew, None),
        (MovesOneSlotTooFew, 4),
        (CopiesOneAfterAnother, None),
        (CopiesOneAfterAnother, 4),
        (AdoptsInItsOwnOrder, None),
        (AdoptsInItsOwnOrder, 4),
    ],
    ids=str,
)
def test_a_broken_cache_is_noticed(broken: type[PagedCache], page_size: int | None) -> None:
    """Negative controls: random operations find each fault."""

    class Machine(CacheMachine):
        def make_cache(self) -> PagedCache:
            return broken(LAYERS, ROWS, CAPACITY, page_size)

    assert_noticed(Machine)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_idx = 0


def masked_softmax(
    query: Tensor,  # (H, T, D) of one row
    keys: Tensor,  # (K, S, D)
    values: Tensor,
    positions: Tensor,  # (T,)
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # (T, H, Dv)
    """The textbook, one query and one head at a time, over the visible keys alone."""
    num_heads, num_queries, head_dim = query.shape
    groups = num_heads // len(keys)
    out = torch.zeros(num_queries, num_heads, values.shape[-1])
    for head in range(num_heads):
        for t, position in enumerate(positions.tolist()):
            first = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            seen = slice(first, position + 1)
            scores = keys[head // groups, seen] @ query[head, t] * (scaling or 1 / math.sqrt(head_dim))
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head, None]])
            weights = scores.softmax(-1)[: position + 1 - first]
            out[t, head] = weights @ values[head // groups, seen]
    return out


VARIANTS = {
    "plain": {},
    "scaled": {"scaling": 0.3},
    "window": {"sliding_window": 4},
    "long window": {"sliding_window": 100},
    "softcap": {"softcap": 2.0, "scaling": 1.5},
    "softcap and window": {"softcap": 2.0, "sliding_window": 4},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "sinks and window": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0]), "sliding_window": 3},
}


def attend(page_size: int | None, variant: dict, num_kv_heads: int, slack: int = 0) -> tuple[Tensor, Tensor]:
    """A ragged prefill, then a verify forward: the function's outputs, and the textbook's."""
    generator = torch.Generator().manual_seed(0)
    prompts, width, heads, head_dim = torch.tensor([1, 7, 10]), 3, 4, 8
    total = int(prompts.max()) + width
    query = 2 * torch.randn(3, heads, total, head_dim, generator=generator)
    keys, values = (torch.randn(3, num_kv_heads, total, head_dim, generator=generator) for _ in range(2))
    cache, module = PagedCache(1, 5, total + 2, page_size), Layer()
    bind_cache(module, cache)
    for row in (2, 0, 1):  # pages out of order
        cache.reserve(row, total)
    arguments = {"s_aux": None, "sliding_window": None, "softcap": None, "scaling": None} | variant

    def run(positions: Tensor) -> Tensor:
        at = positions[:, None, :, None]
        picked = [states.gather(2, at.expand(-1, states.shape[1], -1, head_dim)) for states in (query, keys, values)]
        cache.layers[0].update(*picked[1:])
        return selfspec_attention(module, *picked, None, **arguments)[0]

    prompt = torch.arange(int(prompts.max())).expand(3, -1)
    cache.begin(prompt, prompt.shape[1], rows=torch.arange(3), lengths=prompts, fresh=True)
    first = run(prompt)
    positions = prompts[:, None] + torch.arange(width)
    cache.begin(positions, total)
    cache.positions = cache.positions + slack
    second = run(positions)
    ours, textbook = [], []
    for row, length in enumerate(prompts.tolist()):
        for output, at in ((first, prompt[row, :length]), (second, positions[row])):
            ours.append(output[row, : len(at)])
            rest = [arguments[name] for name in ("scaling", "sliding_window", "softcap", "s_aux")]
            textbook.append(masked_softmax(query[row][:, at], keys[row], values[row], at, *rest))
    return torch.cat(ours), torch.cat(textbook)


@pairwise(
    num_kv_heads=[1, 2, 4], where=["dense, our kernel", "dense", "pages of 1", "pages of 4"], variant=[*VARIANTS]
)
def test_attention_is_masked_softmax(
    monkeypatch: pytest.MonkeyPatch, variant: str, where: str, num_kv_heads: int
) -> None:
    """Prevents a key too many, a key too few, and heads that read another group's keys."""
    if where != "dense, our kernel":
        monkeypatch.setattr(build, "_library", lambda: None)
    elif not build.available():
        pytest.skip("needs a C compiler and AVX2")
    page_size = {"pages of 1": 1, "pages of 4": 4}.get(where)
    ours, textbook = attend(page_size, VARIANTS[variant], num_kv_heads)
    torch.testing.assert_close(ours, textbook, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pages_change_nothing(variant: str) -> None:
    """Prevents a gather that reorders or rounds."""
    dense, paged = (attend(page_size, VARIANTS[variant], 2)[0] for page_size in (None, 4))
    torch.testing.assert_close(dense, paged, rtol=0, atol=1e-6)


def test_one_key_too_many_is_noticed() -> None:
    """Negative control for the tolerance."""
    ours, textbook = attend(None, {}, 2, slack=1)
    assert (ours - textbook).abs().max() > 1000 * TOLERANCE


def write(cache: PagedCache, states: Tensor, layer_idx: int = 0) -> None:
    """Writes (B, K, T, D) states as keys and as values."""
    cache.layer_of(layer_idx, states, states).write(states, states)


def test_what_is_not_written_cannot_poison() -> None:
    """Prevents NaN from memory that was never written: 0 x NaN is NaN."""
    cache = PagedCache(1, 2, 8, page_size=None)
    cache.begin(torch.zeros(2, 1, dtype=torch.int64), 8)
    write(cache, torch.ones(2, 1, 1, 4))
    assert all(states.isfinite().all() for states in cache.keys_and_values(cache.pages_of[0]))


def test_padding_is_written_to_the_spare_page() -> None:
    """Prevents the padding of a short prompt from overwriting keys of its own row."""
    cache = PagedCache(1, 2, 8, page_size=4)
    for row in range(2):
        cache.reserve(row, 5)
    lengths = torch.tensor([2, 5])
    cache.begin(torch.arange(5).expand(2, -1), 5, torch.arange(2), lengths, fresh=True)
    states = torch.arange(1.0, 11).view(2, 1, 5, 1)
    write(cache, states)
    cache.begin(torch.tensor([[1], [4]]), 5)
    keys, _ = cache.keys_and_values(cache.pages_of[0])
    assert keys[0, :, 0, 0].tolist() == [1, 2, 0, 0, 0]
    assert keys[1, :, 0, 0].tolist() == pad(states[1, 0, :, 0], (0, 0)).tolist()


def test_bytes_are_counted() -> None:
    """Prevents a memory report that leaves out values or layers."""
    cache = PagedCache(2, 3, 8, page_size=4, dtype=torch.bfloat16)
    assert cache.nbytes == 0
    cache.begin(torch.zeros(3, 1, dtype=torch.int64), 1)
    for layer_idx in range(2):
        write(cache, torch.ones(3, 2, 1, 4), layer_idx)
    assert cache.nbytes == 2 * 2 * cache.num_pages * 4 * (2 * 4) * 2


def test_layers_that_share_keys_share_their_pages() -> None:
    """Prevents memory for states that another layer keeps, and another layer's states where keys are not shared."""
    cache = PagedCache(3, 1, 8)
    cache.begin(torch.zeros(1, 1, dtype=torch.int64), 1)
    key, value = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 6)
    cache.pages_of[0].update(key, value)
    assert not cache.pages_of[0].is_initialized, "what attention is handed may have another shape"
    assert cache.layer_of(0, key, value) is cache.pages_of[0]
    assert cache.layer_of(2, key, value) is cache.pages_of[0]
    assert not cache.pages_of[2].is_initialized
    other = key.clone()
    cache.pages_of[1].update(other, value)
    assert cache.layer_of(1, other, value) is cache.pages_of[1]
    assert cache.layer_of(0, other, value) is cache.pages_of[0], "a layer with pages reads its own"
    assert (cache.pages_of[1].keys.shape[3], cache.pages_of[1].values.shape[3]) == (4, 6)
