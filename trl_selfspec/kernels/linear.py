"""Chooses between torch's linear layers and our own."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from trl_selfspec.kernels.cpu import build, machine
from trl_selfspec.kernels.cpu.linear import DTYPES, PreparedLinear


def linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K), contiguous
    bias: Tensor | None = None,  # (N,)
) -> Tensor:  # (..., N)
    """`F.linear` for inference, through our kernel where that is faster: see `machine.MAX_ROWS`."""
    ours = _is_ours(weight) and x.dtype is weight.dtype
    return FewRowsLinear(weight, bias)(x) if ours else F.linear(x, weight, bias)


def prepare_linear(
    weight: Tensor,  # (N, K)
    bias: Tensor | None = None,  # (N,)
) -> Callable[[Tensor], Tensor]:
    """`linear` with its checks made once, for inputs of the weight's dtype.

    The tensors may be re-pointed (`parameter.data = ...`), not replaced.
    """
    return FewRowsLinear(weight, bias) if _is_ours(weight) else lambda x: F.linear(x, weight, bias)


class FewRowsLinear(PreparedLinear):
    """A prepared dense layer, which leaves many rows to torch."""

    __slots__ = ("_most",)

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias=bias)
        self._most = machine.max_rows(self.dtype) * self.k

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() <= self._most:
            return super().__call__(x)
        return F.linear(x, self.weight, self.bias)


def _is_ours(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype in DTYPES and build.available()
