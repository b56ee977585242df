"""Quantizing weights into the drafter's storages, in Triton: each weight is read once and no temporary is written.

The arithmetic is quanto's, bit for bit: every operation is rounded to the weights' dtype, divisions by a constant are
divisions. `quantize.py` has the eager twins, which are quanto's own functions.

This module imports triton; import it only inside functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl_selfspec.kernels.quantized import quantizes_4bit_on_gpu
from trl_selfspec.kernels.triton.launch import launch


BYTES_AT_ONCE = 2048  # of packed codes, by a program
COLUMNS_AT_ONCE = 4096  # of a row
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: adding it leaves no room for a fraction
E4M3_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
E4M3_SUBNORMAL = tl.constexpr(2.0**14)  # its last bit in fp32 is worth 2 ** -9, that of a subnormal
E4M3_SUBNORMAL_BITS = tl.constexpr((127 + 14) << 23)
E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _quotient(a, b, DTYPE: tl.constexpr):
    """a / b for numbers of `DTYPE`. Quotients of two bf16 numbers keep a distance of 2 ** -17 from the middle between
    two others, so that the GPU's fast division, with errors of 2 ** -22, rounds as the exact one does.
    """
    if tl.bfloat16 == DTYPE:
        return _rounded(a / b, DTYPE)
    else:
        return _rounded(tl.div_rn(a, b), DTYPE)


@triton.jit
def _whole(x, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """The nearest integer, ties to even, within bounds; 0 for NaN, as where torch casts one to an integer."""
    x = tl.where(x == x, x, 0.0)
    return (tl.minimum(tl.maximum(x, LOWEST), HIGHEST) + ROUND - ROUND).to(tl.int32)


@triton.jit
def _e4m3(x):
    """Bits of the nearest float8_e4m3fn, ties to even, the largest for what is larger."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), E4M3_MAX)
    normal = magnitude.to(tl.int32, bitcast=True)
    normal = (normal + 0x7FFFF + ((normal >> 20) & 1) >> 20) - (120 << 3)
    subnormal = (magnitude + E4M3_SUBNORMAL).to(tl.int32, bitcast=True) - E4M3_SUBNORMAL_BITS
    code = tl.where(magnitude < E4M3_SMALLEST_NORMAL, subnormal, normal)
    return tl.where(x == x, code, 127) | ((bits >> 24) & 128)


@triton.jit
def _quantize_4bit(
    weight, packed, scale_shift, num_groups, num_weights_per_row, groups_per_row, row_stride,
    SIZE: tl.constexpr, BYTES: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """`GROUPS` groups, each of which is a row of the tile, `SIZE` / 2 bytes wide."""
    DTYPE: tl.constexpr = scale_shift.dtype.element_ty
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    byte = tl.arange(0, BYTES)[None, :]
    stored = (group < num_groups)[:, None] & (byte < SIZE // 2)
    column = (group % groups_per_row)[:, None] * SIZE + byte // 16 * 32 + byte % 16
    place = weight + (group // groups_per_row)[:, None] * row_stride + column
    low_real, high_real = stored, stored
    if not WHOLE:
        low_real = stored & (column < num_weights_per_row)
        high_real = stored & (column + 16 < num_weights_per_row)
    low = _rounded(tl.load(place, mask=low_real, other=0.0), DTYPE)
    high = _rounded(tl.load(place + 16, mask=high_real, other=0.0), DTYPE)

    infinite, nan = float("inf"), float("nan")
    smallest = tl.minimum(tl.where(low_real, low, infinite), tl.where(high_real, high, infinite))
    largest = tl.maximum(tl.where(low_real, low, -infinite), tl.where(high_real, high, -infinite))
    bad = tl.max(((low != low) | (high != high)).to(tl.int32), 1) != 0  # the GPU's extrema pass over NaN
    smallest, largest = tl.where(bad, nan, tl.min(smallest, 1)), tl.max(largest, 1)
    scale = _quotient(_rounded(largest - smallest, DTYPE), tl.full([GROUPS], 15.0, tl.float32), DTYPE)
    scale = tl.where(scale == 0, 1.0, scale)
    low = _whole(_quotient(_rounded(low - smallest[:, None], DTYPE), scale[:, None], DTYPE), 0.0, 15.0)
    high = _whole(_quotient(_rounded(high - smallest[:, None], DTYPE), scale[:, None], DTYPE), 0.0, 15.0)
    codes = tl.where(low_real, low, 0) + 16 * tl.where(high_real, high, 0)
    tl.store(packed + group[:, None] * (SIZE // 2) + byte, codes.to(tl.uint8), mask=stored)
    tl.store(scale_shift + 2 * group, scale.to(DTYPE), mask=group < num_groups)
    tl.store(scale_shift + 2 * group + 1, (-smallest).to(DTYPE), mask=group < num_groups)


@triton.jit
def _quantize_8bit(weight, codes, scales, K, row_stride, BLOCK: tl.constexpr, FP8: tl.constexpr):
    """One row: its largest weight, then its codes, for which the row comes from the cache."""
    DTYPE: tl.constexpr = scales.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, K, BLOCK):
        part = tl.load(weight + row * row_stride + start + column, mask=start + column < K, other=0.0)
        bits = tl.abs(_rounded(part, DTYPE)).to(tl.int32, bitcast=True)  # which order magnitudes, NaN last
        largest = tl.maximum(largest, bits)
    limit: tl.constexpr = 448.0 if FP8 else 127.0
    magnitude = tl.max(largest, 0).to(tl.float32, bitcast=True)
    scale = _quotient(magnitude, tl.full([], limit, tl.float32), DTYPE)
    scale = tl.where(scale == 0, 1.0, scale)
    tl.store(scales + row, scale.to(DTYPE))
    for start in range(0, K, BLOCK):
        real = start + column < K
        part = tl.load(weight + row * row_stride + start + column, mask=real, other=0.0)
        quotient = _quotient(_rounded(part, DTYPE), scale, DTYPE)
        code = _e4m3(quotient) if FP8 else _whole(quotient, -128.0, 127.0) & 255
        tl.store(codes + row * K + start + column, code.to(tl.uint8), mask=real)


def quantize_4bit(
    weight: Tensor,  # (N, K), any floating dtype
    packed: Tensor,  # (N, groups * group_size / 2) uint8
    scale_shift: Tensor,  # (N, groups, 2), the dtype in which weights are quantized
) -> None:
    """Fills the storages of `int4.pack` with quanto's codes, scales and shifts."""
    (n, k), groups_per_row = weight.shape, scale_shift.shape[1]
    size = packed.shape[1] * 2 // groups_per_row
    assert (
        quantizes_4bit_on_gpu(k, size)
        and packed.is_contiguous()
        and scale_shift.is_contiguous()
        and weight.stride(1) == 1
    )
    width = triton.next_power_of_2(size // 2)
    groups = BYTES_AT_ONCE // width
    launch(
        _quantize_4bit, (triton.cdiv(n * groups_per_row, groups),),
        weight, packed, scale_shift, n * groups_per_row, k, groups_per_row, weight.stride(0),
        size, width, groups, k == groups_per_row * size,
    )  # fmt: skip


def quantize_8bit(
    weight: Tensor,  # (N, K), any floating dtype
    codes: Tensor,  # (N, K) int8 or float8_e4m3fn
    scale: Tensor,  # (N, 1), the dtype in which weights are quantized
) -> None:
    """Fills `codes` and `scale` with quanto's."""
    n, k = weight.shape
    assert codes.is_contiguous() and scale.is_contiguous() and weight.stride(1) == 1
    block = min(COLUMNS_AT_ONCE, triton.next_power_of_2(k))
    launch(
        _quantize_8bit, (n,),
        weight, codes.view(torch.uint8), scale, k, weight.stride(0), block, codes.dtype is torch.float8_e4m3fn
    )  # fmt: skip
