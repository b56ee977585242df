"""The int4 kernels' weight format.

A row is a sequence of groups of 32, 64, 96 or 128 codes, the last one padded with zeros. Within each 32 codes,
byte i holds code i in its low nibble and code i + 16 in its high one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(
    codes: Tensor,  # (N, K) uint8 in 0..15
    group_size: int,
) -> Tensor:  # (N, groups * group_size / 2) uint8
    n, k = codes.shape
    codes = F.pad(codes, (0, -k % group_size))
    halves = codes.view(n, -1, 2, 16)
    return torch.add(halves[:, :, 0], halves[:, :, 1], alpha=16).view(n, -1)


def unpack(packed: Tensor, k: int) -> Tensor:  # (N, K) uint8
    lanes = packed.view(len(packed), -1, 1, 16)
    return torch.cat((lanes & 15, lanes >> 4), dim=2).view(len(packed), -1)[:, :k]


def in_order(packed: Tensor) -> Tensor:  # (N, K / 2) uint8
    """The codes of whole groups in their order: byte i holds code 2 i in its low nibble, 2 i + 1 in its high one."""
    even, odd = packed.view(len(packed), -1, 8, 2).unbind(-1)
    return torch.cat(((even & 15) | (odd << 4), (even >> 4) | (odd & 240)), dim=-1).view(len(packed), -1)


def dequantize(
    packed: Tensor,  # (N, groups * group_size / 2) uint8
    scale_shift: Tensor,  # (N, groups, 2)
    k: int,
) -> Tensor:  # (N, K), dtype of `scale_shift`
    """scale * code - shift, each operation rounded, as quanto does."""
    n, groups, _ = scale_shift.shape
    scale, shift = scale_shift.unbind(-1)
    weight = scale[..., None] * unpack(packed, packed.shape[1] * 2).view(n, groups, -1)
    weight -= shift[..., None]
    return weight.view(n, -1)[:, :k].contiguous()
