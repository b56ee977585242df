"""The linear layers of `linear.c`; inference only.

A decode step calls them dozens of times, so what does not change from call to call is checked and packed once, in
`PreparedLinear`. Addresses are read at every call: tensors may be re-pointed, not replaced.
"""

import struct

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu.build import functions


GROUP_SIZES = (32, 64, 96, 128)
DTYPES = {torch.bfloat16: 0, torch.float32: 1}


class PreparedLinear:
    """x W^T + bias; an output element does not depend on the other rows.

    With `scale_shift` the weights are int4 codes and activations are rounded to int8 per (row, group); without, the
    weights are read in place. Sums are exact or fp32.

    Args:
        weight: bf16 or fp32 `(N, K)`; or uint8 `(N, groups * group_size / 2)`, see `int4.pack`.
        scale_shift: `(N, groups, 2)` bf16 or fp32: weight = scale * code - shift.
        bias: `(N,)` bf16 or fp32.
        in_features: K of int4 weights.
        dtype: of inputs and outputs; by default that of the weights or scales.
    """

    __slots__ = ("_addresses", "_matrix", "_sizes", "bias", "dtype", "dtype_code", "k", "n", "scale_shift", "weight")

    def __init__(
        self,
        weight: Tensor,
        scale_shift: Tensor | None = None,
        bias: Tensor | None = None,
        in_features: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.weight, self.scale_shift, self.bias = weight, scale_shift, bias
        self.dtype = dtype or (weight.dtype if scale_shift is None else scale_shift.dtype)
        self.dtype_code = DTYPES[self.dtype]
        group_size = scale_code = 0
        if scale_shift is None:
            assert weight.dtype == self.dtype
            self.n, self.k = weight.shape
        else:
            self.n, groups, _ = scale_shift.shape
            group_size, self.k = weight.shape[1] * 2 // groups, in_features or 0
            assert weight.dtype == torch.uint8 and len(weight) == self.n and scale_shift.is_contiguous()
            assert group_size in GROUP_SIZES and (groups - 1) * group_size < self.k <= groups * group_size
            scale_code = DTYPES[scale_shift.dtype]
        bias_code = 0 if bias is None else DTYPES[bias.dtype]
        self._sizes = self.n, self.k, group_size, scale_code, bias_code
        self._addresses = (0, 0)

    def matrix(self) -> bytes:
        """`Matrix` of linear.c: where the tensors are now, checked, and what they are."""
        weight, bias = self.weight, self.bias
        addresses = weight.data_ptr(), 0 if bias is None else bias.data_ptr()
        if addresses != self._addresses:
            assert weight.is_cpu and weight.is_contiguous() and weight.shape[0] == self.n
            assert bias is None or (bias.is_cpu and bias.is_contiguous() and bias.shape == (self.n,))
            scales = 0 if self.scale_shift is None else self.scale_shift.data_ptr()
            self._matrix = struct.pack("3Q5q", addresses[0], scales, addresses[1], *self._sizes)
            self._addresses = addresses
        return self._matrix

    def __call__(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N), both `dtype`
        if (x.requires_grad or self.weight.requires_grad) and torch.is_grad_enabled():
            raise AssertionError("the kernels have no backward: use torch.no_grad()")
        *leading, k = x.shape
        assert k == self.k and x.dtype is self.dtype and x.is_cpu
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((*leading, self.n), dtype=self.dtype, device=x.device)
        if m := x.numel() // k:
            threads = torch.get_num_threads()
            functions().linear(self.matrix(), threads, m, x.data_ptr(), y.data_ptr(), self.dtype_code)
        return y


def linear_dense(
    x: Tensor,  # (..., K) bf16 or fp32
    weight: Tensor,  # (N, K), dtype of x, contiguous; read in place
    bias: Tensor | None = None,  # (N,) bf16 or fp32
) -> Tensor:  # (..., N), dtype of x
    """A `PreparedLinear` for one call."""
    return PreparedLinear(weight, bias=bias)(x)


def linear_int4(
    x: Tensor,  # (..., K) bf16 or fp32
    packed: Tensor,  # (N, groups * group_size / 2) uint8, see `int4.pack`
    scale_shift: Tensor,  # (N, groups, 2) bf16 or fp32: weight = scale * code - shift
    bias: Tensor | None = None,  # (N,) bf16 or fp32
) -> Tensor:  # (..., N), dtype of x
    """A `PreparedLinear` for one call."""
    return PreparedLinear(packed, scale_shift, bias, x.shape[-1], x.dtype)(x)
