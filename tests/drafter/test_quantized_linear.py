"""Quantized layers against Linear layers of their dequantized weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_selfspec import kernels
from trl_selfspec.drafter import linear_backends as backends
from trl_selfspec.drafter.linear_backends import LinearBackend
from trl_selfspec.drafter.quantized_linear import QuantizedLinear
from trl_selfspec.drafter.quantized_weight import QTYPES


BF16, FP32 = torch.bfloat16, torch.float32

# A Gaussian row of 1024 loses this much at least, in dB: 4 bits over the range of 128 values (5.3 sigma / 15 per step)
# leave 19.8, 8 bits over 2 * 3.3 sigma leave 42; 3 bits of mantissa leave 31.5. Two or three below for luck.
SQNR_FLOOR_DB = {"qint4": 18, "qint8": 38, "qfloat8": 28}
# int8 activations add 1/127 of the largest of a group, about 0.7 % of the result; bf16 results 0.2 %.
KERNEL_RELATIVE = {
    backends.CpuInt4: 0.012,
    backends.TorchInt4: 0.02,
    backends.TorchInt8: 0.006,
    backends.DequantizedOnce: 0.004,
    backends.DequantizedPerCall: 0.004,
}

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C compiler or no AVX2")

SHAPES = [(256, 32), (960, 48), (576, 30), (100, 7), (1000, 16), (129, 5), (256, 1), (20, 3)]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def make_layer(
    k: int, n: int, qtype: str, dtype: torch.dtype, bias: bool = True, backend: type[LinearBackend] | None = None
) -> tuple[QuantizedLinear, nn.Linear]:
    linear = nn.Linear(k, n, bias=bias).to(dtype)
    nn.init.normal_(linear.weight)
    layer = QuantizedLinear(k, n, linear.bias, qtype, dtype, "cpu", backend)
    layer.requantize_(linear.weight)
    return layer, linear


def sqnr_db(y: Tensor, exact: Tensor) -> float:
    return float(10 * torch.log10(exact.double().square().sum() / (y.double() - exact.double()).square().sum()))


@pytest.mark.parametrize("qtype", QTYPES)
def test_a_layer_presents_a_weight_as_a_linear_does(qtype: str):
    """Prevents a crash, and drafts from nothing, in models that read a weight themselves: some routers do."""
    layer, linear = make_layer(256, 40, qtype, BF16)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == (linear.weight.shape, BF16, linear.weight.device)
    assert torch.equal(weight, layer.dequantize())
    assert weight.any()


@pytest.mark.parametrize("backend", [None, backends.TorchInt4, backends.DequantizedOnce], ids=str)
@pytest.mark.parametrize("qtype", QTYPES)
def test_buffers_never_move(qtype: str, backend: type[LinearBackend] | None):
    """Captured graphs and the kernels hold the addresses. What a backend keeps is brought up to date in them."""
    if backend is backends.TorchInt4 and qtype != "qint4":
        pytest.skip("torch's int4 kernel")
    layer, linear = make_layer(256, 32, qtype, BF16, backend=backend)
    before, x = {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}, torch.randn(3, 256).to(BF16)
    y = layer(x)
    layer.requantize_(-linear.weight)
    assert before and before == {name: buffer.data_ptr() for name, buffer in layer.named_buffers()}
    product = (y - linear.bias).float()
    assert (layer(x).float() - linear.bias.float() + product).norm() < 0.3 * product.norm()
    layer.requantize_(linear.weight)
    assert torch.equal(layer(x), y), "as quantized anew"
    assert layer.bias is linear.bias


@pytest.mark.parametrize("qtype", QTYPES)
def test_a_layer_is_quantized_in_parts(qtype: str):
    """One layer stands for several of the policy's; its backend sees them once the last of them is there."""
    whole, linear = make_layer(256, 40, qtype, FP32, bias=False, backend=backends.DequantizedOnce)
    parts, _ = make_layer(256, 40, qtype, FP32, bias=False, backend=backends.DequantizedOnce)
    x = torch.randn(3, 256)
    before = parts(x)
    parts.requantize_(linear.weight[17:], 17, repack=False)
    parts.requantize_(linear.weight[:17], repack=False)
    assert torch.equal(parts(x), before)
    parts.repack_()
    assert torch.equal(parts(x), whole(x))


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("qtype", QTYPES)
def test_quantization_noise_is_below_its_floor(qtype: str, dtype: torch.dtype):
    """Layer and kernel together. Negative control: codes that are off by one."""
    layer, linear = make_layer(1024, 64, qtype, dtype, bias=False)
    x = torch.randn(8, 1024).to(dtype)
    exact = F.linear(x.double(), linear.weight.double())
    assert sqnr_db(layer(x), exact) > SQNR_FLOOR_DB[qtype]
    if qtype == "qint4":
        scale_shift = layer.quantized.get_buffer("scale_shift")
        scale_shift[..., 1] += scale_shift[..., 0]
        x = x.abs()
        assert sqnr_db(layer(x), F.linear(x.double(), linear.weight.double())) < SQNR_FLOOR_DB[qtype]


BLOCKED_SHAPES = [(256, 32), (1024, 64)]
ANY_SHAPES = [*BLOCKED_SHAPES, (960, 48), (100, 7)]


@pytest.mark.parametrize(("backend", "qtype", "dtype", "shapes"), [
    pytest.param(backends.CpuInt4, "qint4", BF16, ANY_SHAPES, marks=needs_kernels),
    pytest.param(backends.CpuInt4, "qint4", FP32, ANY_SHAPES, marks=needs_kernels),
    (backends.TorchInt4, "qint4", BF16, BLOCKED_SHAPES),
    (backends.TorchInt8, "qint8", BF16, BLOCKED_SHAPES),
    *[(backend, qtype, dtype, ANY_SHAPES)
      for backend in (backends.DequantizedOnce, backends.DequantizedPerCall)
      for qtype, dtype in (("qint4", BF16), ("qint8", FP32), ("qfloat8", BF16))],
])  # fmt: skip
def test_backends_equal_the_dequantized_linear(
    backend: type[LinearBackend], qtype: str, dtype: torch.dtype, shapes: list[tuple[int, int]]
):
    """Every way to multiply, with bias. Negative control: the result without it."""
    for (k, n), rows in zip(shapes, (1, 4, 9, 2), strict=False):
        layer, linear = make_layer(k, n, qtype, dtype, backend=backend)
        assert backend.supports(layer.quantized)
        x = torch.randn(2, rows, k).to(dtype)
        exact = F.linear(x.double(), layer.dequantize().double())
        y, bias = layer(x), linear.bias.double()
        assert y.shape == (2, rows, n) and y.dtype == dtype
        bound = KERNEL_RELATIVE[backend] * exact.norm()
        assert (y.double() - exact - bias).norm() < bound
        linear.bias.fill_(1e3)
        assert (layer(x).double() - exact).norm() > bound


@needs_kernels
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_int4_layers_of_any_shape_run_in_the_kernel(monkeypatch: pytest.MonkeyPatch, k: int, n: int):
    """Proves that the fast path is taken, whatever group quanto picks."""
    calls = []
    monkeypatch.setattr(kernels.PreparedLinear, "__call__", lambda *args: calls.append(args) or torch.zeros(1))
    layer, _ = make_layer(k, n, "qint4", BF16)
    layer(torch.randn(1, k).to(BF16))
    assert len(calls) == 1 and layer.kernel is not None


@pytest.mark.parametrize("qtype", QTYPES)
def test_inputs_are_cast_as_autocast_would(qtype: str):
    """fp32 hidden states of a model under autocast."""
    layer, _ = make_layer(256, 32, qtype, BF16)
    x = torch.randn(3, 256)
    assert torch.equal(layer(x), layer(x.to(BF16)))


def test_nbytes_counts_what_is_held():
    """Half a byte per weight and two bf16 numbers per group of 128; copies in other formats count too."""
    for backend in (backends.CpuInt4,) if kernels.available() else ():
        layer, _ = make_layer(1024, 64, "qint4", BF16, backend=backend)
        assert layer.nbytes == 1024 * 64 // 2 + 64 * 8 * 2 * 2
    assert make_layer(1024, 64, "qint8", BF16)[0].nbytes == 1024 * 64 + 64 * 2
    layer, _ = make_layer(1024, 64, "qint8", BF16, backend=backends.DequantizedOnce)
    assert layer.nbytes == 1024 * 64 + 64 * 2 + 1024 * 64 * 2
    assert not layer.state_dict().keys() - {"bias"}
