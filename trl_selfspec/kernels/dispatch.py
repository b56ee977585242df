"""Chooses between torch's bf16 linear and our own."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_selfspec.kernels import build, cpu


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
    return cpu.linear_bf16(x, weight, bias) if _is_ours(x, weight) else F.linear(x, weight, bias)


def prepare_linear(
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
) -> Callable[[Tensor], Tensor]:
    """`linear_bf16` with its checks and its choice made once, for inputs of the weight's dtype.

    The tensors may be re-pointed (`parameter.data = ...`), not replaced.
    """
    if _is_ours(weight, weight):
        return cpu.PreparedLinear(weight, bias=bias)
    return lambda x: F.linear(x, weight, bias)


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    bf16_on_cpu = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cpu"
    return bf16_on_cpu and not torch_has_native_bf16() and build.available()
