"""What the int4 kernels compute, in eager torch with float64 sums."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_selfspec.kernels import int4


def linear(
    x: Tensor,  # (..., K)
    packed: Tensor,  # (N, groups * group_size / 2) uint8
    scale_shift: Tensor,  # (N, groups, 2)
    bias: Tensor | None = None,  # (N,)
) -> Tensor:  # (..., N), dtype of x
    """`triton.int4_linear.linear_int4`: activations are as they come."""
    weight = int4.dequantize(packed, scale_shift.double(), x.shape[-1])
    return F.linear(x.double(), weight, None if bias is None else bias.double()).to(x.dtype)


def linear_w4a8(
    x: Tensor,  # (..., K) bf16 or fp32
    packed: Tensor,  # (N, groups * group_size / 2) uint8
    scale_shift: Tensor,  # (N, groups, 2)
    bias: Tensor | None = None,  # (N,)
) -> Tensor:  # (..., N), dtype of x
    """`cpu.linear_int4`: activations are rounded to int8 per row and group."""
    n, groups, _ = scale_shift.shape
    group_size = packed.shape[1] * 2 // groups
    codes = int4.unpack(packed, groups * group_size).view(n, groups, group_size).double()
    rows = F.pad(x.float(), (0, groups * group_size - x.shape[-1])).unflatten(-1, (groups, group_size))
    top = rows.abs().amax(-1, keepdim=True)
    inverse = torch.where(top > 0, torch.full_like(top, 127) / top, 0)  # `127 / top` would round twice
    rounded = (rows * inverse).round().double() * (top / 127).double()
    scale, shift = scale_shift.double().unbind(-1)
    y = torch.einsum("...gi,ngi->...n", rounded, codes * scale[..., None] - shift[..., None])
    return (y if bias is None else y + bias.double()).to(x.dtype)
