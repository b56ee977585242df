"""Chooses between torch's linear layers and our own."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_selfspec.kernels.cpu import build
from trl_selfspec.kernels.cpu.linear import DTYPES, PreparedLinear, linear_dense


FEW_ROWS = 32  # of fp32, for which MKL takes up to three times as long (measured, docs/LOG.md 2026-11-21)


@functools.cache
def torch_has_native_bf16() -> bool:
    """Whether torch multiplies bf16 matrices with the CPU's own instructions (AVX512-BF16, AMX)."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K), contiguous
    bias: Tensor | None = None,  # (N,)
) -> Tensor:  # (..., N)
    """`F.linear` for inference, through our kernel where a CPU runs torch's slowly: bf16 without instructions for it
    (torch's time grows in proportion to the rows, which takes away what verifying several tokens at once should gain),
    and fp32 with few rows.
    """
    ours = _is_ours(weight) and x.dtype is weight.dtype and _few_enough(x)
    return linear_dense(x, weight, bias) if ours else F.linear(x, weight, bias)


def prepare_linear(
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
) -> Callable[[Tensor], Tensor]:
    """`linear` with its checks made once, for inputs of the weight's dtype.

    The tensors may be re-pointed (`parameter.data = ...`), not replaced.
    """
    if not _is_ours(weight):
        return lambda x: F.linear(x, weight, bias)
    return (PreparedLinear if weight.dtype is torch.bfloat16 else FewRowsLinear)(weight, bias=bias)


class FewRowsLinear(PreparedLinear):
    """A prepared fp32 layer, which leaves many rows to torch."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) if _few_enough(x) else F.linear(x, self.weight, self.bias)


def _is_ours(weight: Tensor) -> bool:
    if not weight.is_cpu or weight.dtype not in DTYPES or not build.available():
        return False
    return weight.dtype is torch.float32 or not torch_has_native_bf16()


def _few_enough(x: Tensor) -> bool:
    return x.dtype is torch.bfloat16 or x.numel() <= FEW_ROWS * x.shape[-1]
