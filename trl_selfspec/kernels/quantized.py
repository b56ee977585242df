"""Quantized linear layers on CUDA, and quantizing for them; triton is imported when one first runs."""

import torch
from torch import Tensor


MAX_ROWS = 512  # of activations; cuBLAS on dequantized weights takes more
DTYPES = (torch.bfloat16, torch.float16)


def counters_on_gpu(n: int, device: torch.device) -> Tensor:
    """What a layer with `n` outputs needs besides its weights."""
    from trl_selfspec.kernels.triton import linear

    return linear.make_counters(n, device)


def linear_int4_on_gpu(
    x: Tensor,  # (M, K) bf16 or fp16
    packed: Tensor,  # (N, groups * group_size / 2) uint8, see `int4.pack`
    scale_shift: Tensor,  # (N, groups, 2), dtype of x
    bias: Tensor | None,  # (N,)
    counters: Tensor,
) -> Tensor:  # (M, N), dtype of x
    from trl_selfspec.kernels.triton import linear

    return linear.linear_int4(x, packed, scale_shift, bias, counters)


def linear_8bit_on_gpu(
    x: Tensor,  # (M, K) bf16 or fp16
    codes: Tensor,  # (N, K) int8 or float8_e4m3fn
    scale: Tensor,  # (N, 1)
    bias: Tensor | None,  # (N,)
    counters: Tensor,
) -> Tensor:  # (M, N), dtype of x
    from trl_selfspec.kernels.triton import linear

    return linear.linear_8bit(x, codes, scale, bias, counters)


def quantizes_4bit_on_gpu(k: int, group_size: int) -> bool:
    """Whether `quantize_4bit_on_gpu` knows rows of `k`: one group that may end early, or several that do not."""
    return k <= group_size or k % group_size == 0


def quantize_4bit_on_gpu(
    weight: Tensor,  # (N, K), any floating dtype
    packed: Tensor,  # (N, groups * group_size / 2) uint8, filled
    scale_shift: Tensor,  # (N, groups, 2), filled
) -> None:
    from trl_selfspec.kernels.triton import quantize

    quantize.quantize_4bit(weight, packed, scale_shift)


def quantize_8bit_on_gpu(
    weight: Tensor,  # (N, K), any floating dtype
    codes: Tensor,  # (N, K) int8 or float8_e4m3fn, filled
    scale: Tensor,  # (N, 1), filled
) -> None:
    from trl_selfspec.kernels.triton import quantize

    quantize.quantize_8bit(weight, codes, scale)
