"""RMSNorm of `norm.c`, for inference."""

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu.build import available, functions
from trl_selfspec.kernels.cpu.linear import DTYPES


LANES = 8


def takes(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype in DTYPES and len(weight) % LANES == 0 and available()


def rms_norm(
    x: Tensor,  # (..., D) bf16 or fp32
    weight: Tensor,  # (D,) bf16 or fp32, contiguous
    eps: float,
) -> Tensor:  # (..., D), the dtype to which those of x and weight promote
    """Llama's norm: fp32 statistics, a cast back to x's dtype, then the weight."""
    x_dtype, weight_dtype, n = x.dtype, weight.dtype, x.shape[-1]
    if (x.requires_grad or weight.requires_grad) and torch.is_grad_enabled():
        raise AssertionError("the kernels have no backward: use torch.no_grad()")
    assert x.is_cpu and weight.is_cpu and weight.numel() == n and n % LANES == 0
    if not x.is_contiguous():
        x = x.contiguous()
    y_dtype = x_dtype if x_dtype is weight_dtype else torch.float32
    y = torch.empty_like(x, dtype=y_dtype)
    functions().rms_norm(
        torch.get_num_threads(), x.numel() // n, n, eps, x.data_ptr(), DTYPES[x_dtype],
        weight.data_ptr(), DTYPES[weight_dtype], y.data_ptr(), DTYPES[y_dtype],
    )  # fmt: skip
    return y
