"""QuantizedLinear against quanto's own quantized tensors, and its kernels against dequantized weights."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_selfspec import kernels
from trl_selfspec.drafter import linear_backends as backends
from trl_selfspec.drafter import quantized_linear as quantize
from trl_selfspec.drafter.quantized_linear import QTYPES, QuantizedLinear, resolve_qtype


BF16, FP32 = torch.bfloat16, torch.float32

# A Gaussian row of 1024 loses this much at least, in dB: 4 bits over the range of 128 values (5.3 sigma / 15 per step)
# leave 19.8, 8 bits over 2 * 3.3 sigma leave 42; 3 bits of mantissa leave 31.5. Two or three below for luck.
SQNR_FLOOR_DB = {"qint4": 18, "qint8": 38, "qfloat8": 28}
# int8 activations add 1/127 of the largest of a group, about 0.7 % of the result; bf16 results 0.2 %.
KERNEL_RELATIVE = {
    "own_int4": 0.012,
    "torch_int4": 0.02,
    "torch_int8": 0.006,
    "dequantized_once": 0.004,
    "dequantized_per_call": 0.004,
}

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C compiler or no AVX2")

SHAPES = [(256, 32), (960, 48), (576, 30), (100, 7), (1000, 16), (129, 5), (256, 1), (20, 3)]


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def make_layer(k: int, n: int, qtype: str, dtype: torch.dtype, bias: bool = True) -> tuple[QuantizedLinear, nn.Linear]:
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    nn.init.normal_(linear.weight)
    layer = QuantizedLinear(k, n, linear.bias, qtype, dtype, "cpu")
    layer.requantize_(linear.weight)
    return layer, linear


def quanto_dequantized(linear: nn.Linear, qtype: str) -> Tensor:
    """What `quanto.quantize(model, weights=qtype)` makes of a Linear's weight."""
    import optimum.quanto as quanto

    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype))
    model[0].weight.copy_(linear.weight)
    quanto.quantize(model, weights=quanto.qtypes["qfloat8_e4m3fn" if qtype == "qfloat8" else qtype])
    module = model[0]
    if qtype != "qint4":
        return module.qweight.dequantize()
    grouping = {"qtype": module.weight_qtype, "axis": 0, "group_size": module.weight_group_size}
    scale, shift = module.optimizer(module.weight, **grouping)
    quantized = quanto.quantize_weight(module.weight, scale=scale, shift=shift, optimized=False, **grouping)
    packed = quantized._data._data  # quanto's own unpacking compiles a C++ extension
    codes = torch.cat((packed & 15, packed >> 4))[: quantized._data.shape[0]]
    dequantized = scale * codes
    dequantized -= shift
    return dequantized.view_as(linear.weight)


def sqnr_db(y: Tensor, exact: Tensor) -> float:
    return float(10 * torch.log10(exact.double().square().sum() / (y.double() - exact.double()).square().sum()))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_weights_are_quantos_bit_for_bit(k: int, n: int, qtype: str, dtype: torch.dtype):
    """Catches another grouping, rounding or order of operations than `quanto.quantize` has."""
    layer, linear = make_layer(k, n, qtype, dtype)
    expected = quanto_dequantized(linear, qtype)
    assert layer.dequantize().dtype == dtype
    assert torch.equal(layer.dequantize(), expected)
    layer.requantize_(linear.weight * 1.37)
    assert not torch.equal(layer.dequantize(), expected)


@pytest.mark.parametrize(
    ("qtype", "dtype", "tolerance"), [("qint8", FP32, 1e-5), ("qfloat8", FP32, 1e-5), ("qint4", BF16, 0.03)]
)
def test_logits_are_those_of_quantos_frozen_module(qtype: str, dtype: torch.dtype, tolerance: float):
    """The drafter must be the model that quanto users know; quanto's bf16 int4 kernel rounds scales once more."""
    import optimum.quanto as quanto

    layer, linear = make_layer(256, 64, qtype, dtype)
    model = nn.Sequential(linear)
    x = torch.randn(9, 256).to(dtype)
    quanto.quantize(model, weights=quanto.qtypes["qfloat8_e4m3fn" if qtype == "qfloat8" else qtype])
    quanto.freeze(model)
    expected = model(x).float()
    actual = F.linear(x.float(), layer.dequantize().float(), layer.bias.float())
    assert (actual - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("qtype", QTYPES)
def test_a_layer_presents_a_weight_as_a_linear_does(qtype: str):
    """Prevents a crash, and drafts from nothing, in models that read a weight themselves: some routers do."""
    layer, linear = make_layer(256, 40, qtype, BF16)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == (linear.weight.shape, BF16, linear.weight.device)
    assert torch.equal(weight, layer.dequantize())
    assert weight.any()


@pytest.mark.parametrize("qtype", QTYPES)
def test_storages_never_move(qtype: str):
    """Captured graphs and the kernels hold the addresses."""
    layer, linear = make_layer(256, 32, qtype, BF16)
    before, weight = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}, layer.dequantize()
    layer.requantize_(-linear.weight)
    assert before == {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    assert before and not torch.equal(layer.dequantize(), weight)
    assert layer.bias is linear.bias


@pytest.mark.parametrize("qtype", QTYPES)
def test_requantizing_is_the_same_as_quantizing_anew(qtype: str):
    layer, _ = make_layer(960, 32, qtype, BF16)
    other, linear = make_layer(960, 32, qtype, BF16)
    layer.requantize_(linear.weight.float())
    assert torch.equal(layer.dequantize(), other.dequantize())


@pytest.mark.parametrize("qtype", QTYPES)
def test_a_layer_is_quantized_in_parts(monkeypatch, qtype: str):
    """One layer stands for several of the policy's; a part that lands elsewhere overwrites its neighbour."""
    monkeypatch.setitem(quantize.QUANTIZE_AT_ONCE, "cpu", 5 * 256)
    whole, linear = make_layer(256, 40, qtype, FP32, bias=False)
    parts, _ = make_layer(256, 40, qtype, FP32, bias=False)
    parts.requantize_(linear.weight[17:], 17)
    assert torch.equal(parts.dequantize()[17:], whole.dequantize()[17:])
    parts.requantize_(linear.weight[:17])
    assert torch.equal(parts.dequantize(), whole.dequantize())
    x = torch.randn(3, 256)
    assert torch.equal(parts(x), whole(x))
    with pytest.raises(AssertionError):
        parts.requantize_(linear.weight[:2], 39)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("qtype", QTYPES)
def test_quantization_noise_is_below_its_floor(qtype: str, dtype: torch.dtype):
    """Layer and kernel together. Negative control: codes that are off by one."""
    layer, linear = make_layer(1024, 64, qtype, dtype, bias=False)
    x = torch.randn(8, 1024).to(dtype)
    exact = F.linear(x.double(), linear.weight.double())
    assert sqnr_db(layer(x), exact) > SQNR_FLOOR_DB[qtype]
    if qtype == "qint4":
        layer.scale_shift[..., 1] += layer.scale_shift[..., 0]
        x = x.abs()
        assert sqnr_db(layer(x), F.linear(x.double(), linear.weight.double())) < SQNR_FLOOR_DB[qtype]


BLOCKED_SHAPES = [(256, 32), (1024, 64)]
ANY_SHAPES = [*BLOCKED_SHAPES, (960, 48), (100, 7)]


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize(("name", "qtype", "dtype", "shapes"), [
    pytest.param("own_int4", "qint4", BF16, ANY_SHAPES, marks=needs_kernels),
    pytest.param("own_int4", "qint4", FP32, ANY_SHAPES, marks=needs_kernels),
    ("torch_int4", "qint4", BF16, BLOCKED_SHAPES),
    ("torch_int8", "qint8", BF16, BLOCKED_SHAPES),
    *[(f"dequantized_{when}", qtype, dtype, ANY_SHAPES)
      for when in ("once", "per_call") for qtype in QTYPES for dtype in (BF16, FP32)],
])  # fmt: skip
def test_backends_equal_the_dequantized_linear(
    monkeypatch, name: str, qtype: str, dtype: torch.dtype, shapes: list[tuple[int, int]], rows: int
):
    """Every way to multiply, with bias. Negative control: the result without it."""
    monkeypatch.setattr(backends, "BACKENDS", tuple(b for b in backends.BACKENDS if b.name == name))
    for k, n in shapes:
        layer, linear = make_layer(k, n, qtype, dtype)
        x = torch.randn(2, rows, k).to(dtype)
        exact = F.linear(x.double(), layer.dequantize().double())
        y, bias = layer(x), linear.bias.double()
        assert y.shape == (2, rows, n) and y.dtype == dtype
        bound = KERNEL_RELATIVE[name] * exact.norm()
        assert (y.double() - exact - bias).norm() < bound
        linear.bias.fill_(1e3)
        assert (layer(x).double() - exact).norm() > bound


@needs_kernels
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_int4_layers_of_any_shape_run_in_the_kernel(monkeypatch, k: int, n: int):
    """Proves that the fast path is taken, whatever group quanto picks."""
    calls = []
    monkeypatch.setattr(kernels.PreparedLinear, "__call__", lambda *args: calls.append(args) or torch.zeros(1))
    layer, _ = make_layer(k, n, "qint4", BF16)
    layer(torch.randn(1, k).to(BF16))
    assert len(calls) == 1 and layer.backend.name == "own_int4"


def test_without_our_kernels_torchs_take_over(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: False)
    names = {
        (qtype, dtype, shape): make_layer(*shape, qtype, dtype)[0].backend.name
        for qtype in QTYPES for dtype in (BF16, FP32) for shape in ((256, 32), (100, 7))
    }  # fmt: skip
    assert names.pop(("qint4", BF16, (256, 32))) == "torch_int4"
    assert names.pop(("qint8", BF16, (256, 32))) == "torch_int8"
    assert set(names.values()) == {"dequantized_once"}


@pytest.mark.parametrize("qtype", QTYPES)
def test_constant_rows_are_represented(qtype: str):
    """Rows of zeros are common (padded vocabularies); their scale is 0, and 0 / 0 makes quanto's qfloat8 NaN."""
    layer, linear = make_layer(256, 32, qtype, BF16)
    linear.weight[3] = 0
    if qtype == "qint4":
        linear.weight[5, :128] = 1.25
    layer.requantize_(linear.weight)
    assert torch.equal(layer.dequantize()[3], linear.weight[3])
    assert torch.equal(layer.dequantize()[5, :128], linear.weight[5, :128]) == (qtype == "qint4")
    assert layer(torch.randn(4, 256).to(BF16)).isfinite().all()


def test_a_layers_device_is_its_tensors(monkeypatch):
    """On fake tensors: weights on cuda:0 took quanto's many kernels where a layer was made on "cuda"."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(quantize, "runs_triton", lambda device: True)
    with FakeTensorMode():
        layer = QuantizedLinear(256, 8, None, "qint8", torch.bfloat16, "cuda")
        weight = torch.empty(8, 256, dtype=torch.bfloat16, device="cuda:0")
        assert layer._quantizes_on_gpu(weight) and not layer._quantizes_on_gpu(weight.to("cpu"))


def test_nbytes_counts_what_is_held():
    """Half a byte per weight and two bf16 numbers per group of 128."""
    layer, _ = make_layer(1024, 64, "qint4", BF16)
    if layer.backend.name == "own_int4":
        assert layer.nbytes == 1024 * 64 // 2 + 64 * 8 * 2 * 2
    assert make_layer(1024, 64, "qint8", BF16)[0].nbytes == 1024 * 64 + 64 * 2
    assert not layer.state_dict().keys() - {"bias"}


def test_auto_is_int4_where_int4_is_fast(monkeypatch):
    assert resolve_qtype("auto", "cpu", BF16) == "qint4"
    assert resolve_qtype("auto", "cpu", torch.float16) == "qint8"
    assert resolve_qtype("auto", torch.device("cuda"), BF16) == "qint8"
    for available in (True, False):
        monkeypatch.setattr(kernels, "available", lambda available=available: available)
        assert resolve_qtype("auto", "cpu", FP32) == ("qint4" if available else "qint8")
    assert all(resolve_qtype(qtype, "cpu", FP32) == qtype for qtype in QTYPES)


def test_unknown_qtypes_are_refused():
    with pytest.raises(ValueError, match="unknown qtype 'int4'"):
        resolve_qtype("int4", "cpu", FP32)
    with pytest.raises(ValueError, match="use one of 'qint4', 'qint8', 'qfloat8'"):
        QuantizedLinear(4, 4, None, "auto", FP32, "cpu")


def test_quanto_is_imported_on_the_first_quantization():
    """Importing quanto takes seconds and, on a GPU machine, touches CUDA."""
    program = "import sys, trl_selfspec.drafter.quantized_linear; sys.exit('optimum.quanto' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", program], timeout=60).returncode == 0
