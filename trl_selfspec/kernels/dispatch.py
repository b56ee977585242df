"""Chooses between torch's bf16 linear and our own."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_selfspec.kernels import cpu


@functools.cache
def torch_has_native_bf16() -> bool:
    """Whether torch multiplies bf16 matrices with the CPU's own instructions (AVX512-BF16, AMX)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear_bf16(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K), contiguous
    bias: Tensor | None = None,  # (N,)
) -> Tensor:  # (..., N)
    """`F.linear` for inference, through our kernel for bf16 on a CPU without instructions for it.

    Without native bf16, torch's time grows in proportion to the rows (measured, docs/LOG.md 2026-11-21), which
    takes away what verifying several tokens at once should gain.
    """
    bf16_on_cpu = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    if bf16_on_cpu and not torch_has_native_bf16() and cpu.available():
        return cpu.linear_bf16(x, weight, bias)
    return F.linear(x, weight, bias)
