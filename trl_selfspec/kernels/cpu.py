"""The linear layers of `linear.c`; inference only.

A decode step calls them dozens of times, so what does not change from call to call is checked and packed once, in
`PreparedLinear`. Addresses are read at every call: tensors may be re-pointed, not replaced.
"""

import struct

import torch
from torch import Tensor

from trl_selfspec.kernels.build import functions


GROUP_SIZES = (32, 64, 96, 128)
DTYPES = {torch.bfloat16: 0, torch.float32: 1}


class PreparedLinear:
    """x W^T + bias; an output element does not depend on the other rows.

    With `scale_shift` the weights are int4 codes and activations are rounded to int8 per (row, group); without, the
    weights are bf16. Sums are exact or fp32.

    Args:
        weight: bf16 `(N, K)`, read in place; or uint8 `(N, groups * group_size / 2)`, see `int4.pack`.
        scale_shift: `(N, groups, 2)` bf16 or fp32: weight = scale * code - shift.
        bias: `(N,)` bf16 or fp32.
        in_features: K of int4 weights.
        dtype: of int4 inputs and outputs.
    """

    __slots__ = ("bias", "bias_ptr", "dtype", "k", "n", "scale_shift", "spec", "weight", "weight_ptr")

    def __init__(
        self,
        weight: Tensor,
        scale_shift: Tensor | None = None,
        bias: Tensor | None = None,
        in_features: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.weight, self.scale_shift, self.bias, self.dtype = weight, scale_shift, bias, dtype
        group_size = scale_code = 0
        if scale_shift is None:
            assert weight.dtype == dtype == torch.bfloat16
            self.n, self.k = weight.shape
        else:
            self.n, groups, _ = scale_shift.shape
            group_size, self.k = weight.shape[1] * 2 // groups, in_features or 0
            assert weight.dtype == torch.uint8 and len(weight) == self.n and scale_shift.is_contiguous()
            assert group_size in GROUP_SIZES and (groups - 1) * group_size < self.k <= groups * group_size
            scale_code = DTYPES[scale_shift.dtype]
        bias_code = 0 if bias is None else DTYPES[bias.dtype]
        self.spec = struct.pack("6q", self.n, self.k, group_size, DTYPES[dtype], scale_code, bias_code)
        self._follow_addresses()

    def _follow_addresses(self) -> None:
        """Checks the tensors that may be re-pointed, wherever they are now."""
        assert self.weight.is_cpu and self.weight.is_contiguous() and self.weight.shape[0] == self.n
        assert self.bias is None or (self.bias.is_cpu and self.bias.is_contiguous() and self.bias.shape == (self.n,))
        self.weight_ptr = self.weight.data_ptr()
        self.bias_ptr = None if self.bias is None else self.bias.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N), both `dtype`
        weight, bias, scale_shift, dtype = self.weight, self.bias, self.scale_shift, self.dtype
        if (x.requires_grad or weight.requires_grad) and torch.is_grad_enabled():
            raise AssertionError("the kernels have no backward: use torch.no_grad()")
        if weight.data_ptr() != self.weight_ptr or (bias is not None and bias.data_ptr() != self.bias_ptr):
            self._follow_addresses()
        *leading, k = x.shape
        assert k == self.k and x.dtype is dtype and x.is_cpu
        if not x.is_contiguous():
            x = x.contiguous()
        y = torch.empty((*leading, self.n), dtype=dtype)
        if m := x.numel() // k:
            functions().linear(
                self.spec, torch.get_num_threads(), m, x.data_ptr(), self.weight_ptr,
                None if scale_shift is None else scale_shift.data_ptr(), self.bias_ptr, y.data_ptr(),
            )  # fmt: skip
        return y


def linear_bf16(
    x: Tensor,  # (..., K) bf16
    weight: Tensor,  # (N, K) bf16, contiguous; read in place
    bias: Tensor | None = None,  # (N,) bf16 or fp32
) -> Tensor:  # (..., N) bf16
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
