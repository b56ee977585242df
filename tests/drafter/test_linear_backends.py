"""Which backend a quantized layer takes, what is told of it, formats, and on a GPU what each of them computes."""

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from trl_selfspec import kernels
from trl_selfspec.drafter import linear_backends as backends
from trl_selfspec.drafter.linear_backends import LinearBackend, choose_backend, resolve_qtype
from trl_selfspec.drafter.quantized_linear import QuantizedLinear
from trl_selfspec.drafter.quantized_weight import QTYPES, Int4Weight, Int8Weight, make_quantized_weight
from trl_selfspec.kernels import humming, int4


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU_TOLERANCE = 0.02  # of the result: dequantized bf16 weights are off by 0.003, another zero point by 0.06 and more
needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C compiler or no AVX2")


@pytest.fixture(autouse=True)
def _nothing_has_been_told() -> Iterator[None]:
    backends._warn_of_dequantizing.cache_clear()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("qtype", QTYPES)
def test_a_layer_takes_the_backend_it_is_given(qtype: str):
    """Prevents a benchmark that runs another one, and buffers of one that is not used."""
    layer = QuantizedLinear(256, 32, None, qtype, FP32, "cpu", backends.DequantizedPerCall)
    layer.requantize_(torch.randn(32, 256))
    x = torch.randn(3, 256)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize()))
    assert isinstance(layer.backend, backends.DequantizedPerCall)
    assert len(list(layer.buffers())) == len(list(layer.quantized.buffers()))


def chosen(qtype: str, dtype: torch.dtype, device: str, k: int = 256, n: int = 64) -> type[LinearBackend]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return choose_backend(make_quantized_weight(qtype, n, k, dtype, device))


@pytest.mark.parametrize(
    ("ours", "qtype", "dtype", "k", "expected"),
    [
        pytest.param(True, "qint4", BF16, 256, backends.CpuInt4, marks=needs_kernels),
        pytest.param(True, "qint4", FP32, 100, backends.CpuInt4, marks=needs_kernels),
        (True, "qint4", FP16, 256, backends.DequantizedOnce),
        (False, "qint4", BF16, 256, backends.TorchInt4),
        (False, "qint4", BF16, 100, backends.DequantizedOnce),
        (False, "qint4", FP32, 256, backends.DequantizedOnce),
        (True, "qint8", BF16, 256, backends.TorchInt8),
        (True, "qint8", BF16, 100, backends.DequantizedOnce),
        (True, "qint8", FP32, 256, backends.DequantizedOnce),
        (True, "qfloat8", BF16, 256, backends.DequantizedOnce),
    ],
)
def test_the_order_on_a_cpu(
    ours: bool, qtype: str, dtype: torch.dtype, k: int, expected: type[LinearBackend], monkeypatch: pytest.MonkeyPatch
):
    """Our kernel, torch's where it is right, else weights that are dequantized once."""
    if not ours:
        monkeypatch.setattr(kernels, "available", lambda: False)
    assert chosen(qtype, dtype, "cpu", k) is expected


@pytest.mark.parametrize(
    ("triton", "package", "qtype", "dtype", "expected"),
    [
        (True, True, "qint4", BF16, backends.TritonInt4),
        (True, False, "qint4", FP16, backends.TritonInt4),
        (False, True, "qint4", BF16, backends.Humming),
        (True, True, "qint8", BF16, backends.Humming),
        (True, True, "qfloat8", FP16, backends.Humming),
        (True, False, "qint8", BF16, backends.DequantizedPerCall),
        (False, False, "qint4", BF16, backends.DequantizedPerCall),
        (True, False, "qint4", FP32, backends.DequantizedPerCall),
    ],
)
def test_the_order_on_a_gpu(
    triton: bool,
    package: bool,
    qtype: str,
    dtype: torch.dtype,
    expected: type[LinearBackend],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """Our int4, humming, dequantized; the last one is told once, with what to do about it.

    fp32 policies have nothing to install.
    """
    monkeypatch.setattr(backends, "runs_triton", lambda device: triton)
    monkeypatch.setattr(humming, "supports", lambda shape: package)
    with caplog.at_level(logging.WARNING, "trl_selfspec.drafter.linear_backends"):
        assert [chosen(qtype, dtype, "cuda") for _ in range(2)] == [expected] * 2
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (expected is backends.DequantizedPerCall and dtype is not FP32)
    assert all("trl-selfspec[cuda]" in message and qtype in message for message in told)
    assert all(("install triton" in message) == (qtype == "qint4") for message in told)


@pytest.mark.parametrize(("dtype", "expected"), [(BF16, "qint4"), (FP16, "qint4"), (FP32, "qint8")])
def test_auto_is_int4_on_gpus_with_a_kernel(dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "runs_triton", lambda device: True)
    assert resolve_qtype("auto", "cuda", dtype) == expected
    monkeypatch.setattr(backends, "runs_triton", lambda device: False)
    assert resolve_qtype("auto", "cuda", dtype) == "qint8"


def test_auto_is_int4_where_int4_is_fast(monkeypatch: pytest.MonkeyPatch):
    assert resolve_qtype("auto", "cpu", BF16) == "qint4"
    assert resolve_qtype("auto", "cpu", FP16) == "qint8"
    for available in (True, False):
        monkeypatch.setattr(kernels, "available", lambda available=available: available)
        assert resolve_qtype("auto", "cpu", FP32) == ("qint4" if available else "qint8")
    assert all(resolve_qtype(qtype, "cpu", FP32) == qtype for qtype in QTYPES)
    with pytest.raises(ValueError, match="unknown qtype 'int4'"):
        resolve_qtype("int4", "cpu", FP32)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """A word's first code is the lowest."""
    shifts = torch.arange(0, 32, bits)
    return (words[..., None].long() >> shifts & (1 << bits) - 1).flatten(-2)


@pytest.mark.parametrize("qtype", QTYPES)
def test_weights_in_hummings_format_are_the_same(qtype: str):
    """Its int4 is scale * (code - zero point), its integers have 128 on top. Control: a code of the other nibble."""
    quantized = make_quantized_weight(qtype, 32, 256, FP32, "cpu")
    quantized.quantize_(torch.randn(32, 256))
    if isinstance(quantized, Int4Weight):
        tensors = humming.int4_tensors(quantized.packed, quantized.scale_shift)
        codes = unpack_words(tensors["weight"], 4).view(32, -1, quantized.group_size)
        weight = (codes - tensors["zero_point"][..., None]) * tensors["weight_scale"][..., None]
    else:
        assert isinstance(quantized, Int8Weight)
        tensors = humming.tensors_8bit(quantized.codes, quantized.scale)
        codes = unpack_words(tensors["weight"], 8)
        numbers = codes - 128 if qtype == "qint8" else codes.to(torch.uint8).view(torch.float8_e4m3fn)
        weight = tensors["weight_scale"] * numbers.float()
    torch.testing.assert_close(weight.reshape(32, 256), quantized.dequantize(), rtol=0, atol=1e-5)
    assert not torch.allclose(weight.reshape(32, 256).roll(1, 1), quantized.dequantize(), rtol=0, atol=1e-2)


def test_hummings_buffers_do_not_collide_with_a_layers(monkeypatch: pytest.MonkeyPatch):
    """The package calls one `weight`, which a layer has too; and they are handed to it under its own names."""
    handed = []

    def linear(x: Tensor, shape: humming.Shape, buffers: dict[str, Tensor]) -> Tensor:
        handed.append(buffers)
        return x.new_zeros(len(x), shape.n)

    monkeypatch.setattr(humming, "_buffers", lambda shape, tensors: tensors)
    monkeypatch.setattr(humming, "linear", linear)
    bias = nn.Parameter(torch.randn(64), requires_grad=False)
    layer = QuantizedLinear(256, 64, bias, "qint4", FP32, "cpu", backends.Humming)
    layer.requantize_(torch.randn(64, 256))
    assert torch.equal(layer(torch.randn(2, 3, 256)), bias.expand(2, 3, 64))
    assert layer.weight.shape == (64, 256)
    quantized = layer.quantized
    assert isinstance(quantized, Int4Weight)
    expected = humming.int4_tensors(quantized.packed, quantized.scale_shift)
    assert handed[0].keys() == expected.keys()
    assert all(torch.equal(handed[0][name], tensor) for name, tensor in expected.items()), "repacked in place"


def test_codes_in_order():
    """Byte i holds codes 2 i and 2 i + 1, whatever the kernels' order is."""
    codes = torch.randint(0, 16, (5, 96), dtype=torch.uint8)
    ordered = int4.in_order(int4.pack(codes, 96))
    assert torch.equal(torch.stack((ordered & 15, ordered >> 4), -1).view(5, 96), codes)


@pytest.mark.gpu
@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("k", "n"), [(3584, 4608), (18944, 3584), (1000, 70), (896, 128)])
def test_gpu_layers_equal_the_dequantized(qtype: str, dtype: torch.dtype, k: int, n: int):
    """Whatever was chosen, for few rows and many, after requantizing in place, and in a captured graph."""
    bias = nn.Parameter(10 * torch.randn(n, device="cuda", dtype=dtype))
    layer = QuantizedLinear(k, n, bias, qtype, dtype, "cuda")
    assert qtype != "qint4" or isinstance(layer.backend, backends.TritonInt4)
    for scale in (1.0, 3.0):
        layer.requantize_(scale * torch.randn(n, k, device="cuda", dtype=dtype))
        for rows in (1, 3, 16, 17, 64, 200, 600):
            x = torch.randn(rows, k, device="cuda", dtype=dtype)
            exact = nn.functional.linear(x.float(), layer.dequantize().float(), bias.float())
            assert (layer(x).float() - exact).norm() < GPU_TOLERANCE * exact.norm()
    x = torch.randn(4, k, device="cuda", dtype=dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    layer.requantize_(torch.randn(n, k, device="cuda", dtype=dtype))
    graph.replay()
    assert torch.equal(out, layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("backend", [backends.TritonInt4, backends.Humming, backends.DequantizedPerCall], ids=str)
def test_each_gpu_backend_alone(backend: type[LinearBackend], qtype: str):
    """Also those that are not chosen where another is there."""
    if not backend.supports(make_quantized_weight(qtype, 256, 1024, BF16, "cuda")):
        pytest.skip("it does not support this type, or is not installed")
    layer = QuantizedLinear(1024, 256, None, qtype, BF16, "cuda", backend)
    layer.requantize_(torch.randn(256, 1024, device="cuda", dtype=BF16))
    x = torch.randn(4, 1024, device="cuda", dtype=BF16)
    exact = nn.functional.linear(x.float(), layer.dequantize().float())
    assert (layer(x).float() - exact).norm() < GPU_TOLERANCE * exact.norm()
