"""The decode-attention kernel against its eager reference, SDPA over the same cache."""

import copy
from types import SimpleNamespace

import pytest
import torch
from pairwise import pairwise
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_selfspec import kernels
from trl_selfspec.kv_cache.attention import IMPLEMENTATION, bind_cache, selfspec_attention
from trl_selfspec.kv_cache.paged_cache import PagedCache


BF16, FP32 = torch.bfloat16, torch.float32
# Both sum in fp32, in different orders, and exp differs in its last bits; in bf16 SDPA rounds its weights as well.
TOLERANCE = {FP32: 2e-5, BF16: 2**-7}

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C compiler or no AVX2")


@pytest.fixture(autouse=True)
def _inference():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


class Spy:
    """Counts the kernel's calls and can forbid them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, self.kernel, self.can = 0, kernels.write_and_attend, kernels.can_attend
        self.allowed = True
        monkeypatch.setattr(kernels, "write_and_attend", self)
        monkeypatch.setattr(kernels, "can_attend", lambda *states: self.allowed and self.can(*states))

    def __call__(self, *args: object) -> Tensor:
        self.calls += 1
        return self.kernel(*args)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def states(rows: int, heads: int, steps: int, dim: int, dtype: torch.dtype) -> Tensor:
    """As transformers hands them over: (B, H, T, D) over (B, T, H, D) in memory."""
    return torch.randn(rows, steps, heads, dim).to(dtype).transpose(1, 2)


def filled_cache(rows: int, capacity: int, heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> PagedCache:
    cache = PagedCache(1, rows, capacity, dtype=dtype)
    layer = cache.layers[0]
    layer.lazy_initialization(torch.zeros(1, heads, 1, dim), torch.zeros(1, heads, 1, value_dim))
    layer.keys.normal_()
    layer.values.normal_()
    return cache


def forward(
    cache: PagedCache, positions: Tensor, num_slots: int, qkv: tuple[Tensor, Tensor, Tensor], **kwargs: float | None
) -> Tensor:
    """One layer as a model runs it, on a copy of the cache that it returns the effects of."""
    cache.begin(positions, num_slots)
    cache.layers[0].update(*qkv[1:])
    module = SimpleNamespace(paged_cache=cache, layer_idx=0)
    return selfspec_attention(module, *qkv, None, **kwargs)[0]  # type: ignore[arg-type]


def both_paths(spy: Spy, cache: PagedCache, *args: object, **kwargs: float | None) -> tuple[Tensor, Tensor]:
    """The kernel's result and SDPA's; both must leave the same keys and values behind."""
    reference = copy.deepcopy(cache)
    before = spy.calls
    fast = forward(cache, *args, **kwargs)  # type: ignore[arg-type]
    assert spy.calls == before + 1, "the fast path did not run"
    spy.allowed = False
    slow = forward(reference, *args, **kwargs)  # type: ignore[arg-type]
    spy.allowed = True
    assert spy.calls == before + 1
    for ours, theirs in (
        (cache.layers[0].keys, reference.layers[0].keys),
        (cache.layers[0].values, reference.layers[0].values),
    ):
        assert torch.equal(ours, theirs)
    return fast, slow


def close(actual: Tensor, expected: Tensor) -> bool:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return bool(((actual - expected).abs() <= TOLERANCE[actual.dtype] * (1 + expected.abs())).all())


@pairwise(dtype=[BF16, FP32], steps=[1, 2, 5, 9, 17], groups=[1, 3, 7], window=[None, 1, 20])
def test_the_kernel_equals_sdpa(spy: Spy, dtype: torch.dtype, steps: int, groups: int, window: int | None):
    """Ragged rows, grouped heads, windows. Negative control: one slot more or less is noticed."""
    heads, dim, capacity = 2, 64, 101
    cache = filled_cache(3, capacity, heads, dim, dim, dtype)
    positions = torch.tensor([[0], [37], [capacity - steps]]) + torch.arange(steps)
    qkv = states(3, heads * groups, steps, dim, dtype), *(states(3, heads, steps, dim, dtype) for _ in range(2))
    fast, slow = both_paths(spy, cache, positions, capacity, qkv, sliding_window=window)
    assert close(fast, slow)
    other = window + 1 if window else 36
    spy.allowed = False
    assert not close(forward(cache, positions, capacity, qkv, sliding_window=other), fast)


@pytest.mark.parametrize(("dim", "value_dim"), [(8, 8), (16, 24), (80, 80), (96, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_head_sizes_and_scales(spy: Spy, dim: int, value_dim: int, scaling: float | None):
    cache = filled_cache(2, 70, 3, dim, value_dim, FP32)
    positions = torch.tensor([[66, 67], [5, 6]])
    qkv = states(2, 6, 2, dim, FP32), states(2, 3, 2, dim, FP32), states(2, 3, 2, value_dim, FP32)
    fast, slow = both_paths(spy, cache, positions, 68, qkv, scaling=scaling)
    assert close(fast, slow)
    assert not close(forward(cache, positions, 68, qkv, scaling=0.5), fast)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_long_contexts(spy: Spy, dtype: torch.dtype):
    """Errors that grow with the number of keys would show here; SDPA in fp32 is the yardstick."""
    cache = filled_cache(2, 2000, 2, 64, 64, dtype)
    positions = torch.tensor([[1990], [1200]]) + torch.arange(5)
    qkv = states(2, 14, 5, 64, dtype), states(2, 2, 5, 64, dtype), states(2, 2, 5, 64, dtype)
    fast, slow = both_paths(spy, cache, positions, 1995, qkv)
    assert close(fast, slow)


def test_queries_and_keys_of_other_dtypes(spy: Spy):
    """Rotary embeddings may hand over fp32 queries for a bf16 cache: they are rounded, as a plain forward would."""
    cache = filled_cache(2, 40, 2, 64, 64, BF16)
    positions = torch.tensor([[30], [7]])
    qkv = states(2, 4, 1, 64, FP32), states(2, 2, 1, 64, FP32), states(2, 2, 1, 64, FP32)
    fast, slow = both_paths(spy, cache, positions, 31, qkv)
    assert fast.dtype == BF16 and close(fast, slow)


def test_hidden_slots_may_hold_anything(spy: Spy):
    """A rejected draft that overflowed leaves NaN behind the row's length; 0 * NaN would spread it."""
    cache = filled_cache(2, 64, 2, 64, 64, FP32)
    for storage in (cache.layers[0].keys, cache.layers[0].values):
        storage[:, 41:] = float("nan")
        storage[:, :10] = float("nan")
    positions = torch.tensor([[40], [38]])
    qkv = states(2, 4, 1, 64, FP32), states(2, 2, 1, 64, FP32), states(2, 2, 1, 64, FP32)
    assert forward(cache, positions, 64, qkv, sliding_window=25).isfinite().all()
    assert not forward(cache, positions, 64, qkv).isfinite().any()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_and_queries_do_not_see_their_neighbours(dtype: torch.dtype):
    """Bitwise: a row alone, in a batch, with more threads, and its tokens one by one instead of together."""
    rows, steps, capacity = 5, 6, 300
    cache = filled_cache(rows, capacity, 2, 64, 64, dtype)
    start = torch.tensor([[0], [9], [100], [293], [31]])
    positions = start + torch.arange(steps)
    qkv = states(rows, 14, steps, 64, dtype), states(rows, 2, steps, 64, dtype), states(rows, 2, steps, 64, dtype)
    original = copy.deepcopy(cache)
    together = forward(cache, positions, capacity, qkv)
    torch.set_num_threads(3)
    assert torch.equal(forward(copy.deepcopy(original), positions, capacity, qkv), together)
    alone = copy.deepcopy(original)
    alone.layers[0].keys[1], alone.layers[0].values[1] = original.layers[0].keys[3], original.layers[0].values[3]
    one = tuple(x[2:3] for x in qkv)
    assert torch.equal(forward(alone, positions[2:3], 106, one)[0], together[2])
    for step in range(steps):
        single = tuple(x[:, :, step : step + 1] for x in qkv)
        limit = int(positions[:, step].max()) + 1
        assert torch.equal(forward(original, positions[:, step : step + 1], limit, single)[:, 0], together[:, step])


def test_padding_is_written_where_no_row_reads():
    """`begin` sends positions behind a row's length to the first page."""
    cache = filled_cache(2, 8, 1, 8, 8, FP32)
    before = cache.layers[0].keys.clone()
    positions = torch.tensor([[2, 3], [4, 5]])
    key = states(2, 1, 2, 8, FP32)
    cache.begin(positions, 8, lengths=torch.tensor([3, 6]))
    selfspec_attention(SimpleNamespace(paged_cache=cache, layer_idx=0), key, key, key, None)  # type: ignore[arg-type]
    after = cache.layers[0].keys
    assert torch.equal(after[1, 3], before[1, 3]) and torch.equal(after[1, 2], key[0, :, 0])
    assert torch.equal(after[2, 4:6], key[1].transpose(0, 1))


@pytest.mark.parametrize(
    "case", ["softcap", "sinks", "odd head", "fp16", "paged", "picked rows", "fresh", "no kernels"]
)
def test_other_cases_take_the_other_path_and_write(spy: Spy, case: str):
    """What the kernel does not cover must neither reach it nor lose its write."""
    dim, dtype = 12 if case == "odd head" else 8, torch.float16 if case == "fp16" else FP32
    cache = PagedCache(1, 2, 16, page_size=4 if case == "paged" else None)
    for row in range(2):
        cache.reserve(row, 8) if case == "paged" else None
    spy.allowed = case != "no kernels"
    key = states(2, 1, 2, dim, dtype)
    positions = torch.arange(2).expand(2, -1)
    rows = torch.tensor([1, 0]) if case in ("picked rows", "fresh") else None
    cache.begin(positions, 2, rows, fresh=case == "fresh")
    cache.layers[0].update(key, key)
    assert not cache.layers[0].is_initialized
    kwargs = {"softcap": {"softcap": 5.0}, "sinks": {"s_aux": torch.zeros(1)}}.get(case, {})
    module = SimpleNamespace(paged_cache=cache, layer_idx=0)
    selfspec_attention(module, key, key, key, None, **kwargs)  # type: ignore[arg-type]
    assert spy.calls == 0
    cache.begin(positions, 2, rows)
    assert torch.equal(cache.keys_and_values(cache.pages_of[0])[0], key.transpose(1, 2))


def test_attention_modules_find_the_cache_that_is_bound():
    """Not every architecture passes keyword arguments through to its attention."""
    cache, model = PagedCache(1, 1, 4), nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[1].layer_idx = 0
    bind_cache(model, cache)
    assert model[1].paged_cache is cache and not hasattr(model[0], "paged_cache")
    bind_cache(model, None)
    assert model[1].paged_cache is None
    assert ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION] is selfspec_attention
