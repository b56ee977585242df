"""Linear layers over int4 weights, in groups, for few rows, in Triton.

Decoding waits for the weights, so each byte is read once, 16 at a time, several steps ahead, and becomes a tensor
core's operand in registers. An SM can hardly issue the instructions for that as fast as int4 weights arrive, so few
are spent on anything else: weights are the left operand and activations the right one, which may be 8 columns narrow.
Codes come with a power of two on top (see `int4_decode`), which sums of activations take out again together with the
shifts, once per group; tensor cores compute the sums too, against ones. Narrow layers are split along K so that every
SM has work; the last program to arrive adds the parts in their order.

Steps and splits along K follow from the layer alone, tiles of rows and columns also from the number of rows: a row's
result does not depend on how many others there are.

This module imports triton; import it only inside functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl_selfspec.kernels.triton.int4_decode import nibbles, scale_and_shift
from trl_selfspec.kernels.triton.launch import launch


MAX_ROWS = 512  # of activations; cuBLAS on dequantized weights takes more
PROGRAMS = 1056  # eight for each of an H100's SMs, which hide each other's waiting; tiles of few rows find room
MAX_SPLITS = 16
MIN_STEPS = 2  # along K, of a split
STAGES = 4
NUM_WARPS = 2  # with four, Triton takes Hopper's own instructions, which want twice as many others around them
NARROW, WIDE = 64, 128  # outputs of a tile
ROWS = 8, 16, 32  # of a tile


@triton.jit
def _store(acc, bias, out, m, n, M, N, BIAS: tl.constexpr):
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    real = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=real)


@triton.jit
def _finish(acc, bias, out, sums, counters, m, n, M, N, tile, SPLITS: tl.constexpr, BIAS: tl.constexpr):
    """Stores a tile: at once, or the sum of all splits, in their order, by the program that arrives last."""
    if SPLITS == 1:
        _store(acc, bias, out, m, n, M, N, BIAS)
    else:
        parts, real = sums + m[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
        size = M.to(tl.int64) * N
        tl.store(parts + tl.program_id(1) * size, acc, mask=real)
        tl.debug_barrier()  # all threads' stores come before the one thread that counts
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = tl.zeros_like(acc)
            for split in range(SPLITS):
                total += tl.load(parts + split * size, mask=real, other=0.0, cache_modifier=".cg")
            _store(total, bias, out, m, n, M, N, BIAS)
            tl.store(counters + tile, 0)


@triton.jit(do_not_specialize=["M"])
def _linear_int4(
    x, packed, scale_shift, bias, out, sums, counters, M, N, K, num_groups,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, STAGES: tl.constexpr, ASSEMBLER: tl.constexpr,
):  # fmt: skip
    """One tile and split; a step is `STEP` codes of one group, in `STEP` / 2 bytes of each row."""
    tile, num_tiles_m = tl.program_id(0), tl.cdiv(M, TILE_M)  # tiles that read the same weights are neighbours
    m = tile % num_tiles_m * TILE_M + tl.arange(0, TILE_M)
    n = tile // num_tiles_m * TILE_N + tl.arange(0, TILE_N)
    row = tl.minimum(n, N - 1).to(tl.int64)  # the tile's rest repeats the last row
    DTYPE: tl.constexpr = x.dtype.element_ty
    OFFSET: tl.constexpr = 128 if tl.bfloat16 == DTYPE else 1024 if tl.float16 == DTYPE else 0
    byte = tl.arange(0, STEP // 2)
    weights = packed + row[:, None] * (num_groups * (GROUP // 2)) + byte[None, :]
    column = byte // 16 * 32 + byte % 16
    rows = x + m.to(tl.int64)[None, :] * K + column[:, None]
    pairs = scale_shift + row * num_groups
    acc = tl.zeros([TILE_N, TILE_M], tl.float32)

    steps = num_groups * (GROUP // STEP)
    steps_per_split = tl.cdiv(steps, SPLITS)
    first = tl.program_id(1) * steps_per_split
    for step in tl.range(first, tl.minimum(first + steps_per_split, steps), num_stages=STAGES):
        if WHOLE:
            x_low = tl.load(rows + step * STEP, mask=(m < M)[None, :], other=0.0)
            x_high = tl.load(rows + step * STEP + 16, mask=(m < M)[None, :], other=0.0)
        else:
            left = K - step * STEP
            x_low = tl.load(rows + step * STEP, mask=(m < M)[None, :] & (column < left)[:, None], other=0.0)
            x_high = tl.load(rows + step * STEP + 16, mask=(m < M)[None, :] & (column + 16 < left)[:, None], other=0.0)
        pair = tl.load(pairs + step // (GROUP // STEP))
        low, high, ones = nibbles(tl.load(weights + step * (STEP // 2)), DTYPE, ASSEMBLER)
        product = tl.dot(low, x_low, input_precision="ieee")
        product = tl.dot(high, x_high, product, input_precision="ieee")
        total = tl.dot(ones, x_low, input_precision="ieee")
        total = tl.dot(ones, x_high, total, input_precision="ieee")
        scale, shift = scale_and_shift(pair, DTYPE)
        acc += product * scale[:, None]
        acc -= total * (OFFSET * scale + shift)[:, None]
    _finish(tl.trans(acc), bias, out, sums, counters, m, n, M, N, tile, SPLITS, BIAS)


COMPILED = isinstance(_linear_int4, triton.JITFunction)  # the interpreter knows no assembler


def num_splits(n: int, steps: int) -> int:
    """Parts of K; each of them has work."""
    splits = max(1, min(MAX_SPLITS, round(PROGRAMS / triton.cdiv(n, NARROW)), steps // MIN_STEPS))
    return triton.cdiv(steps, triton.cdiv(steps, splits))


def tiling(m: int, n: int, splits: int) -> tuple[int, int]:
    """Rows and outputs of a tile. Narrow tiles fill the GPU; wide ones read activations half as often, which at 8 rows
    are half as many bytes as the weights, from the L2 cache.
    """
    rows = next((rows for rows in ROWS if m <= rows), ROWS[-1])
    fills = 2 * triton.cdiv(n, WIDE) * splits >= PROGRAMS  # with twice the bytes under way
    return rows, WIDE if fills and rows < ROWS[-1] else NARROW  # the widest tile of the most rows would be spilled


def make_counters(n: int, device: torch.device) -> Tensor:
    """What the programs of a layer with `n` outputs count themselves in; zero before and after each call, so calls
    on different streams need different ones.
    """
    return torch.zeros(triton.cdiv(n, NARROW) * triton.cdiv(MAX_ROWS, ROWS[-1]), dtype=torch.int32, device=device)


def linear_int4(
    x: Tensor,  # (M, K) bf16, fp16 or fp32
    packed: Tensor,  # (N, groups * group_size / 2) uint8, see `int4.pack`
    scale_shift: Tensor,  # (N, groups, 2), dtype of x: weight = scale * code - shift
    bias: Tensor | None,  # (N,)
    counters: Tensor,  # see `make_counters`
) -> Tensor:  # (M, N), dtype of x
    """`F.linear` by `int4.dequantize`, with fp32 sums."""
    (m, k), (n, num_groups, _) = x.shape, scale_shift.shape
    group_size = packed.shape[1] * 2 // num_groups
    assert (num_groups - 1) * group_size < k <= num_groups * group_size and group_size % 32 == 0
    assert packed.is_contiguous() and scale_shift.is_contiguous() and scale_shift.dtype is x.dtype
    assert x.is_contiguous() and m <= MAX_ROWS and (bias is None or bias.is_contiguous())
    step = group_size & -group_size  # a power of two
    splits = num_splits(n, num_groups * group_size // step)
    tile_m, tile_n = tiling(m, n, splits)
    num_tiles = triton.cdiv(m, tile_m) * triton.cdiv(n, tile_n)
    assert num_tiles <= len(counters)
    out = x.new_empty((m, n))
    sums = x.new_empty((splits, m, n), dtype=torch.float32) if splits > 1 else out
    pairs = scale_shift.view(torch.int64 if x.dtype is torch.float32 else torch.int32)
    launch(
        _linear_int4, (num_tiles, splits),
        x, packed, pairs, out if bias is None else bias, out, sums, counters, m, n, k, num_groups,
        SPLITS=splits, GROUP=group_size, STEP=step, WHOLE=k == num_groups * group_size, BIAS=bias is not None,
        TILE_M=tile_m, TILE_N=tile_n, STAGES=STAGES, ASSEMBLER=COMPILED, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
