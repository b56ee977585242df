"""What lies between the matrix products of a decoder layer, in eager torch: the twin of `cuda/elementwise.py`.

It computes what transformers' modules do, operation by operation.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_selfspec.kernels.layer_interface import Pages
from trl_selfspec.kernels.norm import FastRMSNorm


def add_rms_norm(
    x: Tensor,  # (..., hidden)
    residual: Tensor | None,  # shape of x
    norm: FastRMSNorm,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`residual + x`, and its norm in `dtype`; by default in the one to which those of sum and weight promote."""
    total = x if residual is None else residual + x
    normed = norm(total)
    return total, normed if dtype is None else normed.to(dtype)


def rotate_and_write(
    query: Tensor,  # (B, T, H, D)
    key: Tensor,  # (B, T, K, D)
    value: Tensor,  # (B, T, K, D)
    angles: tuple[Tensor, Tensor] | None,  # cosines and sines, (B or 1, T, D) each
    norms: Sequence[FastRMSNorm | None],  # of the query's and the key's heads
    pages: Pages,
) -> Tensor:  # (B, H, T, D), dtype of the pages
    """Norms and rotates the heads, writes keys and values to their slots and hands the queries back."""
    query, key = (x if norm is None else norm(x) for x, norm in zip((query, key), norms, strict=True))
    if angles is not None:
        cos, sin = (angle[:, :, None] for angle in angles)
        query, key = (x * cos + _rotate_half(x) * sin for x in (query, key))
    pages.write(key.transpose(1, 2), value.transpose(1, 2))
    return query.to(pages.keys.dtype).transpose(1, 2)


def silu_mul(
    gate: Tensor,  # (..., inner)
    up: Tensor,  # shape and dtype of gate
) -> Tensor:  # the same
    """SwiGLU's activation."""
    return F.silu(gate) * up


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
