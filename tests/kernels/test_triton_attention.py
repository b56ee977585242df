"""The Triton attention kernel against its eager reference: on a GPU where there is one, else in the interpreter."""

import copy
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pairwise import pairwise
from torch import Tensor
from triton_cases import BF16, DEVICE, FP16, FP32

from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.kv_cache import attention
from trl_selfspec.kv_cache.attention import _eager_attention, can_attend_on_gpu, selfspec_attention
from trl_selfspec.kv_cache.paged_cache import PagedCache


# The interpreter's way to a loop's bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
# Both sum in fp32, in different orders; the kernel rounds its weights to the dtype of the values, and both the result.
TOLERANCE = {FP32: 2e-5, FP16: 2**-9, torch.bfloat16: 2**-6}
MANY = pytest.param(17, marks=pytest.mark.slow)  # as many steps as the kernel takes: minutes in the interpreter


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture
def triton_attention() -> ModuleType:
    from trl_selfspec.kernels.triton import attention as triton_attention

    return triton_attention


class Case:
    """A cache whose rows' pages lie scattered, every unused slot NaN, and a forward over it."""

    def __init__(
        self,
        lengths: list[int],  # slots in use, the steps' own included
        steps: int = 1,
        heads: int = 2,
        groups: int = 1,
        dim: int = 64,
        value_dim: int | None = None,
        page_size: int = 16,
        dtype: torch.dtype = FP32,
        num_slots: int | None = None,
        shared: int = 0,  # leading slots that rows share with row 0
        latent: bool = False,  # queries attend to keys that are a key and its value
    ) -> None:
        self.heads, self.groups, self.steps, self.dim = heads, groups, steps, dim
        self.value_dim = value_dim or dim
        self.num_slots = num_slots or max(lengths)
        capacity = -(-self.num_slots // page_size) * page_size
        self.cache = PagedCache(1, len(lengths), capacity, page_size=page_size, dtype=dtype, device=DEVICE)
        layer = self.cache.pages_of[0]
        layer.lazy_initialization(*(torch.zeros(1, heads, 1, size, device=DEVICE) for size in (dim, self.value_dim)))
        for slot in range(page_size, capacity + page_size, page_size):  # rows take turns, so that pages interleave
            for row in range(len(lengths)):
                self.cache.reserve(row, min(slot, capacity))
        if shared:
            self.cache.rearrange(dict.fromkeys(range(1, len(lengths)), (0, shared)))
            for row in range(1, len(lengths)):
                self.cache.reserve(row, capacity)
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
        last = torch.tensor(lengths, device=DEVICE)[:, None] - 1
        self.positions = last - torch.arange(steps - 1, -1, -1, device=DEVICE)
        for row, length in enumerate(lengths):
            pages = self.cache._table[row].repeat_interleave(page_size)[:length]
            slots = torch.arange(length, device=DEVICE) % page_size
            layer.keys[pages, slots] = self.randn(length, heads, dim).to(dtype)
            layer.values[pages, slots] = self.randn(length, heads, self.value_dim).to(dtype)
        self.layer, self.dtype = layer, dtype
        self.latent = latent
        self.query = self.states(heads * groups, dim + latent * self.value_dim)
        self.cache.begin(self.positions, self.num_slots)

    @staticmethod
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE)

    def states(self, heads: int, dim: int) -> Tensor:
        """As transformers hands them over: (B, H, T, D) over (B, T, H, D) in memory."""
        return self.randn(len(self.positions), self.steps, heads, dim).to(self.dtype).transpose(1, 2)

    def kernel(self, rows: slice = slice(None), **kwargs) -> Tensor:
        from trl_selfspec.kernels.triton.attention import attend

        kwargs = {"num_slots": self.num_slots, "scale": self.dim**-0.5, **kwargs}
        table, positions = self.cache.table[rows], self.positions[rows]
        storage = self.layer.keys, self.layer.values, self.layer.addresses
        return attend(self.query[rows], *storage, table, positions, **kwargs)

    def reference(
        self,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        chunked: bool = False,
    ) -> Tensor:
        """Row by row over its own slots, so that NaN behind them stays out of 0 * NaN."""
        out = []
        for row, positions in enumerate(self.positions):
            length = int(positions[-1]) + 1
            start = max(0, int(positions[0]) - window + 1) if window else 0
            keys, values = (
                x.transpose(1, 2)[row : row + 1, :, start:length]
                for x in self.cache.keys_and_values(self.cache.pages_of[0])
            )
            keys = torch.cat([keys, values], -1) if self.latent else keys
            bias = self.cache.bias(window, self.groups, FP32, chunked)[row : row + 1, :, :, start:length]
            packed = self.query[row].reshape(1, self.heads, self.groups * self.steps, -1)
            out.append(_eager_attention(packed, keys, values, bias, self.dim**-0.5, softcap, sinks, self.groups))
        result = torch.cat(out).reshape(len(out), self.heads * self.groups, self.steps, self.value_dim)
        return result.transpose(1, 2)


def close(actual: Tensor, expected: Tensor) -> bool:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return bool(((actual - expected).abs() <= TOLERANCE[actual.dtype] * (1 + expected.abs())).all())


@pairwise(
    dtype=[FP32, pytest.param(FP16, marks=pytest.mark.slow), BF16],
    steps=[1, 2, 5, MANY],
    groups=[1, 4, 7],
    window=[None, 1, 20],
)
def test_the_kernel_equals_its_reference(dtype: torch.dtype, steps: int, groups: int, window: int | None):
    """Ragged rows, grouped heads, windows. Negative control: a window that is off by one is noticed."""
    case = Case([steps, 300], steps, groups=groups, dtype=dtype)
    fast = case.kernel(window=window)
    assert close(fast, case.reference(window))
    assert window is None or not close(fast, case.reference(window + 1))
    assert window is not None or not close(fast, case.reference(299))


@pairwise(dtype=[FP32, BF16], steps=[1, 5], window=[7, 256, 300], latent=[False, True])
def test_chunks(dtype: torch.dtype, steps: int, window: int, latent: bool):
    """A chunk ends within a split, with it, and behind it; steps of one row lie in two chunks."""
    case = Case([steps, 301, 516], steps, heads=1, groups=4, dim=16, dtype=dtype, latent=latent)
    fast = case.kernel(window=window, chunked=True)
    assert close(fast, case.reference(window, chunked=True))
    assert not close(fast, case.reference(window)), "negative control: a window"


@pairwise(dtype=[FP32, BF16], head=[(8, 24), (64, 128), (64, 512)], groups=[4, 20], steps=[1, 3], page_size=[16, 70])
def test_latents(dtype: torch.dtype, head: tuple[int, int], groups: int, steps: int, page_size: int):
    """Heads of all attend to one key, in two places of memory. Negative control: a key without its latent."""
    if head[1] == 512 and dtype is FP32:
        pytest.skip("more than the kernel takes")
    case = Case([steps, 37, 300], steps, 1, groups, *head, page_size, dtype, latent=True)
    fast = case.kernel()
    assert close(fast, case.reference())
    case.query[..., head[0] :] = 0
    assert not close(fast, case.reference())


@pairwise(dtype=[FP32, FP16, BF16], extras=[(2.0, False), (None, True), (2.0, True)], window=[None, 100])
def test_soft_caps_and_sinks(dtype: torch.dtype, extras: tuple[float | None, bool], window: int | None):
    """A sink counts once per query, not once per split; it must not be capped."""
    softcap, with_sinks = extras
    case = Case([290, 3], 2, heads=1, groups=2, dtype=dtype)
    sinks = 4 + 2 * case.randn(2) if with_sinks else None
    fast = case.kernel(softcap=softcap, sinks=sinks, window=window)
    assert close(fast, case.reference(window, softcap, sinks))
    assert not close(fast, case.reference(window, None, sinks if softcap else None))


@pairwise(
    dtype=[FP32, pytest.param(FP16, marks=pytest.mark.slow), BF16],
    head=[(64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)],
    page_size=[16, 64, 70],
)
def test_head_and_page_sizes(dtype: torch.dtype, head: tuple[int, int], page_size: int):
    """Sizes that are no powers of two are padded: the padding must reach neither scores nor the neighbouring head."""
    case = Case([70, 65], 1, 2, 2, *head, page_size, dtype)
    assert close(case.kernel(), case.reference())
    assert not close(case.kernel(scale=0.5), case.reference())


@pytest.mark.parametrize(
    "lengths", [[4200, 1], [256, 257, 255, 512, 513], pytest.param([4096, 4097], marks=pytest.mark.slow)]
)
def test_many_splits(lengths: list[int]):
    """More splits than are joined at a time, and lengths next to their borders."""
    case = Case(lengths, heads=1, groups=2, page_size=64)
    case.layer.keys.mul_(3)  # maxima that differ from split to split
    assert close(case.kernel(), case.reference())
    assert close(case.kernel(window=270), case.reference(270))


def test_a_combination_without_rescaling_is_noticed(monkeypatch: pytest.MonkeyPatch, triton_attention: ModuleType):
    """Negative control: sums taken against different maxima cannot be added as they are."""
    case = Case([600, 700], page_size=64)
    case.layer.keys.mul_(3)
    assert close(case.kernel(), case.reference())

    launch = triton_attention.launch

    def unscaled(kernel: object, grid: tuple[int, ...], first: Tensor, *arguments: object, **options: object) -> None:
        if kernel is triton_attention._combine:
            statistics = arguments[0]
            assert isinstance(statistics, Tensor)
            statistics[..., 0] = 0.0
        launch(kernel, grid, first, *arguments, **options)

    monkeypatch.setattr(triton_attention, "launch", unscaled)
    assert not close(case.kernel(), case.reference())


def test_rows_share_pages():
    """Samples of a prompt read its pages from one place."""
    case = Case([200, 250, 180], 2, groups=7, shared=128)
    table = case.cache.table
    assert torch.equal(table[0, :8], table[1, :8]) and not torch.equal(table[0, 8:], table[1, 8:])
    assert close(case.kernel(), case.reference())


def test_unused_slots_may_hold_anything():
    """Rejected drafts and former owners leave values behind, NaN among them; 0 * NaN would spread it."""
    case = Case([41, 300, 1])
    assert case.layer.values.isnan().any() and case.kernel().isfinite().all()
    case.layer.values[case.cache.table[1, :5]] = float("nan")  # slots 0 .. 79, of which a window of 220 sees none
    assert case.kernel(window=220).isfinite().all()
    assert not case.kernel(window=221)[1].isfinite().any()


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("longest", [700, pytest.param(4300, marks=pytest.mark.slow)])
def test_rows_do_not_see_their_neighbours(dtype: torch.dtype, longest: int):
    """Bitwise, whatever the batch and the longest row: splits lie at the same slots everywhere."""
    lengths, window = [5, 300, 256, longest], longest - 100
    case = Case(lengths, 2, heads=1, groups=2, dtype=dtype, page_size=64)
    together = case.kernel(window=window)
    for row, length in enumerate(lengths):
        assert torch.equal(case.kernel(slice(row, row + 1), num_slots=length, window=window)[0], together[row])


def test_positions_behind_the_last_slot_see_what_there_is():
    """Steps behind a row's capacity are dropped later; until then they must not read splits that nobody wrote."""
    case = Case([256, 256], 3, page_size=64)
    expected = case.kernel()
    case.positions[:, 2] += 600
    actual = case.kernel()
    assert torch.equal(actual, expected)


@pairwise(
    window=[None, 30], extras=[{}, {"softcap": 3.0}, {"s_aux": True}], picked=[False, True], query_dtype=[FP32, FP16]
)
def test_the_attention_function_gives_the_same_either_way(
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
    extras: dict[str, float | bool],
    picked: bool,
    query_dtype: torch.dtype,
):
    """Through `selfspec_attention`: the same result as SDPA's, and the same keys and values left behind."""
    case = Case([100, 90, 33], 2, groups=2, dtype=FP16)
    case.layer.keys.nan_to_num_()  # SDPA over gathered pages spreads NaN
    case.layer.values.nan_to_num_()
    rows = torch.tensor([2, 0, 1], device=DEVICE) if picked else None
    key, value = case.states(2, 64), case.states(2, 64)
    kwargs = dict(extras, s_aux=case.randn(4)) if "s_aux" in extras else extras
    calls = 0

    def attend_on_gpu(*args) -> Tensor:
        nonlocal calls
        calls += 1
        return write_and_attend(*args)

    def forward(on_gpu: bool) -> tuple[Tensor, Tensor, Tensor]:
        cache = copy.deepcopy(case.cache)
        cache.pages_of[0]._put(cache.pages_of[0].keys, cache.pages_of[0].values)
        monkeypatch.setattr(attention, "can_attend_on_gpu", lambda *states: on_gpu)
        cache.begin(case.positions, case.num_slots, rows)
        module = SimpleNamespace(paged_cache=cache, layer_idx=0)
        query = case.query.to(query_dtype)
        out, _ = selfspec_attention(module, query, key, value, None, sliding_window=window, **kwargs)  # type: ignore[arg-type]
        return out, cache.pages_of[0].keys, cache.pages_of[0].values

    write_and_attend = attention.write_and_attend_on_gpu
    monkeypatch.setattr(attention, "write_and_attend_on_gpu", attend_on_gpu)
    (out, *storage), (expected, *expected_storage) = forward(True), forward(False)
    assert calls == 1 and close(out, expected)
    assert all(torch.equal(*pair) for pair in zip(storage, expected_storage, strict=True))


def test_new_states_reach_their_slots_only(triton_attention: ModuleType):
    """Of any dtype, and heads that are no power of two."""
    keys, values = torch.zeros(3, 4, 3, 80, device=DEVICE), torch.zeros(3, 4, 3, 16, device=DEVICE)
    key, value = (torch.randn(2, 2, 3, size, device=DEVICE).to(FP16).transpose(1, 2) for size in (80, 16))
    index = torch.tensor([5, 6, 3, 11], device=DEVICE)
    addresses = torch.tensor([keys.data_ptr(), values.data_ptr()], device=DEVICE)
    triton_attention.write(key, value, keys, values, addresses, index)
    for states, storage in ((key, keys), (value, values)):
        expected = torch.zeros_like(storage)
        expected.flatten(0, 1)[index] = states.transpose(1, 2).reshape(4, 3, -1).float()
        assert torch.equal(storage, expected)


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch):
    """Tensors that only pretend to be on a GPU suffice for the question."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(gpu, "runs_triton", lambda device: device.type == "cuda")

    def takes(steps: int = 1, dim: int = 64, value_dim: int = 64, dtype: torch.dtype = FP16, on: str = "cuda") -> bool:
        keys, values = (torch.empty(3, 16, 2, size, dtype=dtype, device=on) for size in (dim, value_dim))
        return can_attend_on_gpu(steps, keys, values)

    with FakeTensorMode():
        assert takes() and takes(17) and takes(dim=512, value_dim=80) and takes(dtype=torch.bfloat16)
        assert takes(dim=256, dtype=FP32) and not takes(dim=257, dtype=FP32)
        assert not takes(on="cpu") and not takes(18) and not takes(dtype=torch.float64)
        assert not takes(dim=513) and not takes(value_dim=1024)


def test_the_kernels_go_where_the_addresses_say(triton_attention: ModuleType):
    """A captured graph keeps its arguments while keys and values are freed and allocated anew."""
    case, other = Case([70, 20], 2, groups=2), Case([70, 20], 2, groups=2)
    layer, elsewhere = case.layer, other.layer
    expected = case.kernel()
    before = layer.keys.clone(), layer.values.clone()
    elsewhere.keys.copy_(layer.keys), elsewhere.values.copy_(layer.values)
    layer.addresses.copy_(elsewhere.addresses)
    new = case.states(2, 64), case.states(2, 64)
    triton_attention.write(*new, layer.keys, layer.values, layer.addresses, case.cache.write_index)
    assert torch.equal(layer.keys.nan_to_num(), before[0].nan_to_num())
    assert not torch.equal(elsewhere.keys.nan_to_num(), before[0].nan_to_num())
    moved = case.kernel()
    assert not torch.equal(moved, expected)
    layer._put(elsewhere.keys, elsewhere.values)
    assert torch.equal(case.kernel(), moved) and close(moved, case.reference())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16, FP32])
def test_a_cuda_graph_replays_the_kernel(dtype: torch.dtype):
    """A host sync or an allocation that depends on data would fail the capture; stale positions or addresses, the
    replay."""
    case = Case([300, 40], 3, groups=4, dtype=dtype, num_slots=512)
    case.kernel()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.kernel()
    case.positions -= 20
    layer = case.layer
    layer._put(layer.keys.clone(), layer.values.clone())
    graph.replay()
    case.cache.begin(case.positions, 512)
    assert close(out, case.reference())


@pytest.mark.gpu
def test_a_gpu_takes_the_kernel(monkeypatch: pytest.MonkeyPatch):
    """Triton comes with torch for CUDA, so the predicate itself must say yes."""
    case = Case([70, 20], 1, dtype=torch.bfloat16)
    assert can_attend_on_gpu(1, case.layer.keys, case.layer.values)
