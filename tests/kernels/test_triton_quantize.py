"""The Triton quantization against quanto's functions, bit for bit: on a GPU where there is one, else interpreted."""

import pytest
import torch
from torch import Tensor
from triton_cases import BF16, DEVICE, FP16, FP32

from trl_selfspec.drafter.quantized_linear import _quantize_4bit, _quantize_8bit, quanto_group_size
from trl_selfspec.kernels import int4
from trl_selfspec.kernels.quantized import quantizes_4bit_on_gpu


DTYPES = [FP32, FP16, BF16]
pytestmark = [
    # The interpreter's way to a loop's bounds; what numpy says to inf - inf and 0 / 0.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]


def quantize_4bit(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Storages that the kernel filled, on the CPU."""
    from trl_selfspec.kernels.triton import quantize

    n, k = weight.shape
    group_size = quanto_group_size(k) or -(-k // 32) * 32
    packed = torch.full((n, -(-k // group_size) * group_size // 2), 0xEE, dtype=torch.uint8, device=DEVICE)
    scale_shift = torch.full((n, -(-k // group_size), 2), torch.nan, dtype=dtype, device=DEVICE)
    quantize.quantize_4bit(weight.to(DEVICE), packed, scale_shift)
    return packed.cpu(), scale_shift.cpu()


def twin_4bit(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    k = weight.shape[1]
    codes, scale, shift = _quantize_4bit(weight.to(dtype).contiguous(), quanto_group_size(k))
    return int4.pack(codes, quanto_group_size(k) or -(-k // 32) * 32), torch.stack((scale, shift), -1)


def quantize_8bit(weight: Tensor, qtype: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from trl_selfspec.kernels.triton import quantize

    code_dtype = torch.int8 if qtype == "qint8" else torch.float8_e4m3fn
    codes = torch.full(weight.shape, 0x11, dtype=torch.uint8, device=DEVICE).view(code_dtype)
    scale = torch.full((len(weight), 1), torch.nan, dtype=dtype, device=DEVICE)
    quantize.quantize_8bit(weight.to(DEVICE), codes, scale)
    return codes.cpu(), scale.cpu()


def same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """Bitwise but for the sign of zero and of NaN."""
    if actual[0].dtype is torch.float8_e4m3fn:
        actual, expected = ((codes.float(), scale) for codes, scale in (actual, expected))
    shapes = [x.shape for x in actual] == [x.shape for x in expected]
    dtypes = [x.dtype for x in actual] == [x.dtype for x in expected]
    pairs = zip(actual, expected, strict=True)
    return shapes and dtypes and all(torch.allclose(x, y, 0, 0, equal_nan=x.is_floating_point()) for x, y in pairs)


def weights(n: int, k: int, kind: str, dtype: torch.dtype) -> Tensor:
    """Random ones with what is rare among them: constant groups, zeros, ties, numbers at the dtype's ends."""
    weight = torch.randn(n, k)
    if kind == "special":
        weight[0] = 0
        weight[1] = 1.25
        weight[2, : k // 2] = 0
        weight[3] = torch.arange(k) % 16  # each code once: quotients are whole, or between two
        weight[4] = (torch.arange(k) % 31) / 2
        weight[5] *= torch.finfo(dtype).max / 8
        weight[6] *= torch.finfo(dtype).tiny * 8
        weight[7, 3] = -0.0
        weight[8] = -weight[8].abs()
    elif kind == "infinite":
        weight[0, 1], weight[1, 2], weight[2, 3] = torch.inf, -torch.inf, torch.nan
        weight[3] *= torch.finfo(dtype).max  # where the range overflows
        weight[4, :2] = torch.tensor([torch.inf, -torch.inf])
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "special", "infinite"])
@pytest.mark.parametrize(("n", "k"), [(17, 256), (10, 192), (10, 288), (33, 20), (12, 100), (9, 128)])
def test_4bit_is_quantos_bit_for_bit(n: int, k: int, kind: str, dtype: torch.dtype):
    """Each group size, groups that end early, the range's ends. Negative control: a weight that moves by one code."""
    weight = weights(n, k, kind, dtype)
    actual, expected = quantize_4bit(weight, dtype), twin_4bit(weight, dtype)
    assert same(actual, expected)
    weight[7, 5] += 0.4 * (weight[7].max() - weight[7].min())
    assert not same(quantize_4bit(weight, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "special", "infinite"])
@pytest.mark.parametrize("qtype", ["qint8", "qfloat8"])
@pytest.mark.parametrize(("n", "k"), [(12, 100), (9, 5000)])
def test_8bit_is_quantos_bit_for_bit(n: int, k: int, qtype: str, kind: str, dtype: torch.dtype):
    """Rows longer than a block too. Negative control: a row scaled."""
    weight = weights(n, k, kind, dtype)
    actual, expected = quantize_8bit(weight, qtype, dtype), _quantize_8bit(weight, qtype)
    assert same(actual, expected)
    weight[8] *= 1.5
    assert not same(quantize_8bit(weight, qtype, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_codes_round_as_torch_does(dtype: torch.dtype):
    """Subnormals, ties and the largest."""
    values = torch.cat([torch.linspace(0, 2**-5, 999), torch.linspace(0, 448, 1000), torch.tensor([448.0])])
    weight = torch.stack([values, -values, values.flip(0)]).to(dtype)
    assert same(quantize_8bit(weight, "qfloat8", dtype), _quantize_8bit(weight, "qfloat8"))


@pytest.mark.parametrize("source", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_weights_are_rounded_first(source: torch.dtype, dtype: torch.dtype):
    """fp32 master weights are quantized as the policy's forward sees them; slices need not be contiguous."""
    weight = torch.randn(40, 512).to(source)[::2, :256]
    assert same(quantize_4bit(weight, dtype), twin_4bit(weight, dtype))
    assert same(quantize_8bit(weight, "qint8", dtype), _quantize_8bit(weight.to(dtype), "qint8"))


def test_fast_division_rounds_bf16_quotients_exactly():
    """Over all pairs of mantissas: an error of 2 ** -22 moves no quotient over a rounding boundary, 2 ** -16 would."""
    mantissas = torch.arange(128, 256, dtype=torch.float64)
    quotients = mantissas[:, None] / mantissas

    def moves(error: float) -> bool:
        rounded = [(quotients * (1 + e)).bfloat16() for e in (-error, 0.0, error)]
        return not (rounded[0].equal(rounded[1]) and rounded[1].equal(rounded[2]))

    assert not moves(2**-22) and not moves(2**-18) and moves(2**-16)


def test_what_is_taken():
    assert all(
        quantizes_4bit_on_gpu(k, quanto_group_size(k) or min(128, -(-k // 32) * 32)) for k in (20, 128, 256, 288, 960)
    )
    assert not quantizes_4bit_on_gpu(129, 128) and not quantizes_4bit_on_gpu(1000, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(3584, 18944), (37888, 3584), (152064, 3584)])
def test_real_shapes(n: int, k: int, dtype: torch.dtype):
    """Against quanto's functions on the same GPU, part by part."""
    weight = torch.randn(n, k, device="cuda", dtype=dtype)
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device="cuda")
    scale_shift = torch.empty(n, k // 128, 2, dtype=dtype, device="cuda")
    codes, scale = torch.empty(n, k, dtype=torch.int8, device="cuda"), torch.empty(n, 1, dtype=dtype, device="cuda")
    from trl_selfspec.kernels.triton import quantize

    quantize.quantize_4bit(weight, packed, scale_shift)
    quantize.quantize_8bit(weight, codes, scale)
    for start in range(0, n, 4096):
        rows = slice(start, start + 4096)
        assert same((packed[rows], scale_shift[rows]), twin_4bit(weight[rows], dtype))
        assert same((codes[rows], scale[rows]), _quantize_8bit(weight[rows], "qint8"))
