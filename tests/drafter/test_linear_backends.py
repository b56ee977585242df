"""Backends of quantized layers: formats, what is told, and on a GPU what each of them computes."""

import logging

import pytest
import torch
from torch import Tensor, nn

from trl_selfspec.drafter import autotune as choosing
from trl_selfspec.drafter import linear_backends as backends
from trl_selfspec.drafter.quantized_linear import QTYPES, QuantizedLinear, resolve_qtype
from trl_selfspec.kernels import humming, int4


BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.usefixtures("backend_cache")


@pytest.mark.parametrize("qtype", QTYPES)
def test_a_layer_takes_the_backend_it_is_given(qtype: str):
    """Prevents a benchmark, or the price of a form, that runs another one; and buffers of one that is not used."""
    layer = QuantizedLinear(256, 32, None, qtype, FP32, "cpu", backends.DEQUANTIZING)
    layer.requantize_(torch.randn(32, 256))
    x = torch.randn(3, 256)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.dequantize()))
    assert layer.backend is backends.DEQUANTIZING and dict(layer.named_buffers()).keys() == set(layer.storage_names)
    assert QuantizedLinear(256, 32, None, qtype, FP32, "cpu").backend is not backends.DEQUANTIZING


def test_dequantizing_on_a_gpu_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """On fake tensors. What it needs is in the message; fp32 policies have nothing to install."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(backends, "runs_triton", lambda device: False)
    monkeypatch.setattr(backends, "_supports_tinygemm", lambda layer: False)
    candidates = [b for b in backends.BACKENDS if b.name not in ("tinygemm", "humming")]
    monkeypatch.setattr(backends, "BACKENDS", candidates)
    with FakeTensorMode(), caplog.at_level(logging.WARNING, "trl_selfspec.drafter.linear_backends"):
        for dtype in (FP32, BF16, BF16):
            layer = QuantizedLinear(256, 32, None, "qint4", dtype, "cuda")
            assert layer.backend.name == "dequantized_per_call"
            assert len(caplog.records) == (dtype is BF16)
    assert "install triton" in caplog.text


@pytest.mark.parametrize(("dtype", "expected"), [(BF16, "qint4"), (torch.float16, "qint4"), (FP32, "qint8")])
def test_auto_is_int4_on_gpus_with_a_kernel(dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "runs_triton", lambda device: True)
    assert resolve_qtype("auto", "cuda", dtype) == expected
    monkeypatch.setattr(backends, "runs_triton", lambda device: False)
    assert resolve_qtype("auto", "cuda", dtype) == "qint8"


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """A word's first code is the lowest."""
    shifts = torch.arange(0, 32, bits)
    return (words[..., None].long() >> shifts & (1 << bits) - 1).flatten(-2)


@pytest.mark.parametrize("qtype", QTYPES)
def test_weights_in_hummings_format_are_the_same(qtype: str):
    """Its int4 is scale * (code - zero point), its integers have 128 on top. Control: a code of the other nibble."""
    layer = QuantizedLinear(256, 32, None, qtype, FP32, "cpu")
    layer.requantize_(torch.randn(32, 256))
    if qtype == "qint4":
        tensors = humming.int4_tensors(layer.packed, layer.scale_shift)
        codes = unpack_words(tensors["weight"], 4).view(32, -1, layer.group_size)
        weight = (codes - tensors["zero_point"][..., None]) * tensors["weight_scale"][..., None]
    else:
        tensors = humming.tensors_8bit(layer.codes, layer.scale)
        codes = unpack_words(tensors["weight"], 8)
        numbers = codes - 128 if qtype == "qint8" else codes.to(torch.uint8).view(torch.float8_e4m3fn)
        weight = tensors["weight_scale"] * numbers.float()
    torch.testing.assert_close(weight.reshape(32, 256), layer.dequantize(), rtol=0, atol=1e-5)
    assert not torch.allclose(weight.reshape(32, 256).roll(1, 1), layer.dequantize(), rtol=0, atol=1e-2)


def test_codes_in_order():
    """Byte i holds codes 2 i and 2 i + 1, whatever the kernels' order is."""
    codes = torch.randint(0, 16, (5, 96), dtype=torch.uint8)
    ordered = int4.in_order(int4.pack(codes, 96))
    assert torch.equal(torch.stack((ordered & 15, ordered >> 4), -1).view(5, 96), codes)


@pytest.mark.gpu
@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("k", "n"), [(3584, 4608), (18944, 3584), (1000, 70), (896, 128)])
def test_gpu_layers_equal_the_dequantized(qtype: str, dtype: torch.dtype, k: int, n: int):
    """Whatever was chosen, for every bucket, after requantizing in place, and in a captured graph."""
    bias = nn.Parameter(10 * torch.randn(n, device="cuda", dtype=dtype))
    layer = QuantizedLinear(k, n, bias, qtype, dtype, "cuda")
    assert layer.backend.name != "dequantized_per_call"
    for scale in (1.0, 3.0):
        layer.requantize_(scale * torch.randn(n, k, device="cuda", dtype=dtype))
        for rows in (1, 3, 16, 17, 64, 200, 600):
            x = torch.randn(rows, k, device="cuda", dtype=dtype)
            exact = nn.functional.linear(x.float(), layer.dequantize().float(), bias.float())
            assert (layer(x).float() - exact).norm() < choosing.TOLERANCE * exact.norm()
    x = torch.randn(4, k, device="cuda", dtype=dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    layer.requantize_(torch.randn(n, k, device="cuda", dtype=dtype))
    graph.replay()
    assert torch.equal(out, layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("backend_name", [b.name for b in backends.BACKENDS])
def test_each_gpu_backend_alone(backend_name: str, monkeypatch: pytest.MonkeyPatch):
    """Also those that were not the fastest: a GPU of another kind may choose them."""
    fallback = backends.BACKENDS[-1]
    only = tuple(dict.fromkeys((*(b for b in backends.BACKENDS if b.name == backend_name), fallback)))
    monkeypatch.setattr(backends, "BACKENDS", only)
    for qtype in QTYPES:
        layer = QuantizedLinear(1024, 256, None, qtype, BF16, "cuda")
        supported = len(only) == 2 and only[0].supports(layer)
        assert (layer.backend.name == backend_name) == (supported or backend_name == fallback.name)
        weight = torch.randn(256, 1024, device="cuda", dtype=BF16)
        layer.requantize_(weight)
        x = torch.randn(4, 1024, device="cuda", dtype=BF16)
        exact = nn.functional.linear(x.float(), layer.dequantize().float())
        assert (layer(x).float() - exact).norm() < choosing.TOLERANCE * exact.norm()
