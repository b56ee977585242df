"""The Triton int4 layer against its eager reference: on a GPU where there is one, else in Triton's interpreter."""

from types import ModuleType

import int4_reference
import pytest
import torch
from torch import Tensor
from triton_cases import BF16, DEVICE, FP16, FP32, ON_GPU

from trl_selfspec.kernels import int4


# The interpreter's way to a loop's bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
# Of the magnitudes that are summed: fp32 sums of up to a few thousand terms, of which int4 codes in fp16 are offset by
# 1024, 70 times the largest code; and of the result, which is rounded once.
SUM_RELATIVE = {FP32: 2e-6, FP16: 2e-5, torch.bfloat16: 5e-6}
RESULT_RELATIVE = {FP32: 2e-6, FP16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture
def triton_linear() -> ModuleType:
    from trl_selfspec.kernels.triton import int4_linear

    return int4_linear


class Int4:
    """Random weights, and what multiplies by them."""

    def __init__(self, n: int, k: int, group_size: int = 128, dtype: torch.dtype = FP32, bias: bool = True) -> None:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=DEVICE)
        self.packed = int4.pack(codes, group_size)
        scale_shift = torch.rand(n, -(-k // group_size), 2, device=DEVICE) + 0.1
        self.scale_shift = (scale_shift * torch.tensor([1.0, 8.0], device=DEVICE)).to(dtype)
        self.bias = 30 * torch.randn(n, device=DEVICE).to(dtype) if bias else None
        self.n, self.k, self.dtype = n, k, dtype

    def __call__(self, x: Tensor) -> Tensor:
        from trl_selfspec.kernels.triton import int4_linear

        counters = int4_linear.make_counters(self.n, x.device)
        y = int4_linear.linear_int4(x, self.packed, self.scale_shift, self.bias, counters)
        assert not counters.any()
        return y

    def exact(self, x: Tensor) -> Tensor:
        return int4_reference.linear(x.double(), self.packed, self.scale_shift, self.bias)

    def magnitudes(self, x: Tensor) -> Tensor:
        """Sums of absolute terms."""
        signs = torch.tensor([1, -1], device=DEVICE)
        return int4_reference.linear(x.double().abs(), self.packed, self.scale_shift * signs) + self.absolute_bias

    @property
    def absolute_bias(self) -> Tensor:
        return torch.zeros((), device=DEVICE) if self.bias is None else self.bias.double().abs()


def activations(m: int, layer: Int4) -> Tensor:
    return torch.randn(m, layer.k, device=DEVICE).to(layer.dtype)


def close(layer: Int4, x: Tensor, y: Tensor, exact: Tensor) -> bool:
    assert y.shape == exact.shape and y.dtype == layer.dtype
    bound = SUM_RELATIVE[layer.dtype] * layer.magnitudes(x) + RESULT_RELATIVE[layer.dtype] * exact.abs()
    return bool(((y.double() - exact).abs() <= bound).all())


SHAPES = [(70, 512, 128), (5, 192, 96), (64, 128, 64), (130, 96, 32)]
ROWS = [1, 5, 9, 16, 17, 64]
CASES = [(m, *shape, (FP32, FP16)[(i + j) % 2]) for i, m in enumerate(ROWS) for j, shape in enumerate(SHAPES)]
CASES += [pytest.param(m, *SHAPES[i % 4], torch.bfloat16, marks=pytest.mark.gpu) for i, m in enumerate(ROWS)]


@pytest.mark.parametrize(("m", "n", "k", "group_size", "dtype"), CASES)
def test_int4_equals_its_reference(m: int, n: int, k: int, group_size: int, dtype: torch.dtype):
    """Tiles that are not full, each group size, bias. Negative controls: the result without bias, and another code."""
    layer = Int4(n, k, group_size, dtype)
    x = activations(m, layer)
    y, exact = layer(x), layer.exact(x)
    assert close(layer, x, y, exact)
    assert layer.bias is not None and not close(layer, x, y, exact - layer.bias.double())
    layer.packed[n - 1, -1] ^= 0x80
    assert not close(layer, x, layer(x), exact)


@pytest.mark.parametrize(("k", "group_size", "dtype"), [
    (20, 32, FP32), (100, 128, FP16), (129, 128, FP32), (1000, 128, FP16), (1001, 32, FP32), (1001, 32, FP16),
    pytest.param(129, 128, torch.bfloat16, marks=pytest.mark.gpu),
])  # fmt: skip
def test_rows_that_end_within_a_group(k: int, group_size: int, dtype: torch.dtype):
    """The padding's codes, and what lies behind a row of activations, must not count."""
    layer = Int4(6, k, group_size, dtype, bias=False)
    storage = torch.full((3 * k + 256,), float("nan"), device=DEVICE, dtype=dtype)
    x = storage[: 3 * k].view(3, k).copy_(activations(3, layer))
    exact = layer.exact(x)
    assert close(layer, x, layer(x), exact)
    x[:, -1] += 8
    assert not close(layer, x, layer(x), exact)


def test_layers_are_split_where_they_are_narrow(triton_linear: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """Parts are added once each, whatever was left in their memory; a lost or doubled one is noticed."""
    layer = Int4(40, 1280)
    x = activations(3, layer)
    assert triton_linear.num_splits(40, 10) == 5
    exact = layer.exact(x)
    assert close(layer, x, layer(x), exact)
    monkeypatch.setattr(triton_linear, "PROGRAMS", 1)
    assert triton_linear.num_splits(40, 10) == 1
    assert close(layer, x, layer(x), exact)
    monkeypatch.undo()
    monkeypatch.setattr(
        triton_linear, "make_counters", lambda n, device: torch.ones(99, dtype=torch.int32, device=device)
    )
    with pytest.raises(AssertionError):  # a part was not waited for
        layer(x)


def test_splits_all_have_work(triton_linear: ModuleType):
    for n in (1, 64, 1536, 3584, 4608, 37888, 152064):
        for steps in (1, 2, 3, 7, 12, 28, 70, 148):
            splits = triton_linear.num_splits(n, steps)
            per_split = -(-steps // splits)
            assert 1 <= splits <= triton_linear.MAX_SPLITS and (splits - 1) * per_split < steps
            assert splits * per_split >= steps


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
def test_rows_do_not_see_their_neighbours(dtype: torch.dtype):
    """Bitwise, whatever the number of rows: tiles may change, the order of sums may not.

    numpy's products, in the interpreter, depend on the shape of the tile: there, all these rows take the same.
    """
    layer = Int4(70, 1280, dtype=dtype)
    x = activations(40, layer)
    together = layer(x)
    for m in (1, 3, 16, 17, 33) if ON_GPU else (17, 18, 33):
        assert torch.equal(layer(x[:m]), together[:m])
    x[1:] = float("nan")
    assert torch.equal(layer(x)[0], together[0])


@pytest.mark.parametrize(
    ("m", "programs", "tile"), [(1, 18, (8, 128)), (1, 19, (8, 64)), (9, 18, (16, 128)), (33, 18, (32, 64))]
)
def test_many_columns(
    m: int, programs: int, tile: tuple[int, int], triton_linear: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """Wide tiles, unless they are too few or would be spilled, and a layer without splits, as an output head's."""
    monkeypatch.setattr(triton_linear, "PROGRAMS", programs)
    n = 1100
    assert triton_linear.num_splits(n, 2) == 1 and triton_linear.tiling(m, n, 1) == tile
    layer = Int4(n, 64, 32)
    x = activations(m, layer)
    assert close(layer, x, layer(x), layer.exact(x))


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(3584, 18944), (37888, 3584), (4608, 3584), (152064, 3584), (1536, 8960)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP16])
def test_real_shapes(dtype: torch.dtype, n: int, k: int):
    """A missing part, a race between splits or an offset beyond 2**31 shows only at size."""
    layer = Int4(n, k, dtype=dtype)
    x = activations(64, layer)
    exact = layer.exact(x)
    together = layer(x)
    assert close(layer, x, together, exact)
    for m in (1, 4, 8, 16, 32):
        for _ in range(5):
            assert torch.equal(layer(x[:m]), together[:m])


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_kernels(triton_linear: ModuleType):
    """A host sync or counters that are left non-zero would break the capture or the second replay."""
    layer = Int4(3584, 3584, dtype=torch.bfloat16)
    counters, x = triton_linear.make_counters(3584, torch.device("cuda")), activations(8, layer)
    expected = triton_linear.linear_int4(x, layer.packed, layer.scale_shift, layer.bias, counters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_linear.linear_int4(x, layer.packed, layer.scale_shift, layer.bias, counters)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
