"""Chooses between torch's linear layers and our own, which are one operator each to torch.compile."""

import itertools
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class OpaqueLinear(nn.Module):
    """A linear layer by kernels that torch.compile must not look into: it sees one operator in their place.

    The operator finds the layer by a number in a tensor. A number in the graph would be another one in each layer of
    a model, and compile each of them anew.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype
    multiply: Callable[[Tensor], Tensor]  # (..., in_features) -> (..., out_features), both of the layer's dtype

    def __init__(self) -> None:
        super().__init__()
        number = next(_numbers)
        _layers[number] = self
        self.number = torch.tensor(number, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype is self.dtype else x.to(self.dtype)  # as autocast would
        if torch.compiler.is_compiling():
            return _opaque_linear(x, self.number, self.out_features)
        return self.multiply(x)


_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, OpaqueLinear] = weakref.WeakValueDictionary()


@torch.library.custom_op("trl_selfspec::linear", mutates_args=())
def _opaque_linear(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    return _layers[int(number)].multiply(x)


@_opaque_linear.register_fake
def _(x: Tensor, number: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
