"""Quantized weights against quanto's own quantized tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_selfspec.drafter import quantized_weight
from trl_selfspec.drafter.quantized_weight import QTYPES, Int4Weight, QuantizedWeight, make_quantized_weight


BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = [(256, 32), (960, 48), (576, 30), (100, 7), (1000, 16), (129, 5), (256, 1), (20, 3)]


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def quantized(weight: Tensor, qtype: str) -> QuantizedWeight:
    made = make_quantized_weight(qtype, *weight.shape, weight.dtype, "cpu")
    made.quantize_(weight)
    return made


def quanto_dequantized(weight: Tensor, qtype: str) -> Tensor:
    """What `quanto.quantize(model, weights=qtype)` makes of a Linear's weight."""
    import optimum.quanto as quanto

    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype))
    model[0].weight.copy_(weight)
    quanto.quantize(model, weights=quanto.qtypes["qfloat8_e4m3fn" if qtype == "qfloat8" else qtype])
    module = model[0]
    if qtype != "qint4":
        return module.qweight.dequantize()
    grouping = {"qtype": module.weight_qtype, "axis": 0, "group_size": module.weight_group_size}
    scale, shift = module.optimizer(module.weight, **grouping)
    theirs = quanto.quantize_weight(module.weight, scale=scale, shift=shift, optimized=False, **grouping)
    packed = theirs._data._data  # quanto's own unpacking compiles a C++ extension
    codes = torch.cat((packed & 15, packed >> 4))[: theirs._data.shape[0]]
    dequantized = scale * codes
    dequantized -= shift
    return dequantized.view_as(weight)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_weights_are_quantos_bit_for_bit(k: int, n: int, qtype: str, dtype: torch.dtype):
    """Catches another grouping, rounding or order of operations than `quanto.quantize` has."""
    weight = torch.randn(n, k).to(dtype)
    ours, expected = quantized(weight, qtype), quanto_dequantized(weight, qtype)
    assert ours.dequantize().dtype == dtype
    assert torch.equal(ours.dequantize(), expected)
    ours.quantize_(weight * 1.37)
    assert not torch.equal(ours.dequantize(), expected)


@pytest.mark.parametrize(
    ("qtype", "dtype", "tolerance"), [("qint8", FP32, 1e-5), ("qfloat8", FP32, 1e-5), ("qint4", BF16, 0.03)]
)
def test_logits_are_those_of_quantos_frozen_module(qtype: str, dtype: torch.dtype, tolerance: float):
    """The drafter must be the model that quanto users know; quanto's bf16 int4 kernel rounds scales once more."""
    import optimum.quanto as quanto

    linear = nn.Linear(256, 64).to(dtype)
    nn.init.normal_(linear.weight)
    ours = quantized(linear.weight, qtype)
    model = nn.Sequential(linear)
    x, bias = torch.randn(9, 256).to(dtype), linear.bias.float().clone()
    quanto.quantize(model, weights=quanto.qtypes["qfloat8_e4m3fn" if qtype == "qfloat8" else qtype])
    quanto.freeze(model)
    expected = model(x).float()
    actual = F.linear(x.float(), ours.dequantize().float(), bias)
    assert (actual - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("qtype", QTYPES)
def test_a_weight_is_quantized_in_parts(monkeypatch: pytest.MonkeyPatch, qtype: str):
    """One weight stands for several of the policy's; a part that lands elsewhere overwrites its neighbour."""
    monkeypatch.setitem(quantized_weight.QUANTIZE_AT_ONCE, "cpu", 5 * 256)
    weight = torch.randn(40, 256)
    whole, parts = quantized(weight, qtype), quantized(torch.randn(40, 256), qtype)
    parts.quantize_(weight[17:], 17)
    assert torch.equal(parts.dequantize()[17:], whole.dequantize()[17:])
    assert not torch.equal(parts.dequantize()[:17], whole.dequantize()[:17])
    parts.quantize_(weight[:17])
    assert torch.equal(parts.dequantize(), whole.dequantize())
    with pytest.raises(AssertionError):
        parts.quantize_(weight[:2], 39)


@pytest.mark.parametrize("qtype", QTYPES)
def test_some_rows_are_dequantized(qtype: str):
    """A part of a joined layer presents its own weight."""
    whole = quantized(torch.randn(40, 100), qtype)
    assert torch.equal(whole.dequantize(slice(3, 17)), whole.dequantize()[3:17])


@pytest.mark.parametrize("qtype", QTYPES)
def test_other_dtypes_are_rounded_first(qtype: str):
    """fp32 master weights of a bf16 policy: the replica computes with rounded ones, and so must the drafter."""
    weight = torch.randn(32, 960)
    ours = make_quantized_weight(qtype, 32, 960, BF16, "cpu")
    ours.quantize_(weight)
    assert torch.equal(ours.dequantize(), quantized(weight.to(BF16), qtype).dequantize())


@pytest.mark.parametrize("qtype", QTYPES)
def test_constant_rows_are_represented(qtype: str):
    """Rows of zeros are common (padded vocabularies); their scale is 0, and 0 / 0 makes quanto's qfloat8 NaN."""
    weight = torch.randn(32, 256).to(BF16)
    weight[3] = 0
    if qtype == "qint4":
        weight[5, :128] = 1.25
    ours = quantized(weight, qtype).dequantize()
    assert torch.equal(ours[3], weight[3])
    assert torch.equal(ours[5, :128], weight[5, :128]) == (qtype == "qint4")
    assert ours.isfinite().all()


def test_shapes_are_those_of_the_docstrings():
    """Kernels read the tensors by these. A row of 1000 is one group for quanto and 8 of 128 here."""
    weight = make_quantized_weight("qint4", 16, 1000, BF16, "cpu")
    assert isinstance(weight, Int4Weight)
    assert (weight.quanto_group_size, weight.group_size) == (None, 128)
    assert {name: (tuple(b.shape), b.dtype) for name, b in weight.named_buffers()} == {
        "packed": ((16, 512), torch.uint8),
        "scale_shift": ((16, 8, 2), BF16),
    }
    for qtype, dtype in (("qint8", torch.int8), ("qfloat8", torch.float8_e4m3fn)):
        weight = make_quantized_weight(qtype, 16, 1000, BF16, "cpu")
        assert {name: (tuple(b.shape), b.dtype) for name, b in weight.named_buffers()} == {
            "codes": ((16, 1000), dtype),
            "scale": ((16, 1), BF16),
        }
        assert not weight.state_dict()


def test_unknown_qtypes_are_refused():
    with pytest.raises(ValueError, match="use one of 'qint4', 'qint8', 'qfloat8'"):
        make_quantized_weight("auto", 4, 4, FP32, "cpu")
