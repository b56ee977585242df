"""A whole decoder layer of Llama's family in one call, for the few tokens of a decode step. Its twin is the module."""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu.build import functions
from trl_selfspec.kernels.cpu.linear import DTYPES, PreparedLinear
from trl_selfspec.kernels.cpu.norm import FastRMSNorm


LANES = 16  # halves of a head, and features per thread, are whole vectors
_STEP = struct.Struct("8Q5q")  # the first fields of `DecoderLayer` in layer.c: addresses, then sizes


@dataclass(frozen=True)
class DecoderWeights:
    """What a layer is made of; every tensor has the same dtype, but for int4 weights.

    Attributes:
        projections: of q, k, v, o, gate, up, down.
        norms: before attention, before the MLP, of q's and of k's heads; the last two may be missing.
        head_dim: D, of queries, keys and values.
        scaling: of the attention scores.
        window: how many positions a query sees, itself included; `None` for all.
        rotary: whether queries and keys are rotated.
    """

    projections: tuple[PreparedLinear, ...]
    norms: tuple[FastRMSNorm, FastRMSNorm, FastRMSNorm | None, FastRMSNorm | None]
    head_dim: int
    scaling: float
    window: int | None
    rotary: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.projections[0].dtype

    @property
    def fits(self) -> bool:
        """Whether sizes and dtypes are ones that the kernel takes."""
        q, k, v, o, gate, up, down = self.projections
        hidden, inner, dim = q.k, gate.n, self.head_dim
        shapes = {(p.n, p.k) for p in (k, v)} == {(k.n, hidden)} and (o.n, o.k) == (hidden, q.n)
        shapes &= (gate.n, gate.k) == (up.n, up.k) == (inner, hidden) and (down.n, down.k) == (hidden, inner)
        shapes &= q.n % dim == k.n % dim == 0 and q.n % k.n == 0
        norms = [(norm, hidden if i < 2 else dim) for i, norm in enumerate(self.norms) if norm is not None]
        same = all(norm.weight.shape == (size,) and norm.weight.dtype is self.dtype for norm, size in norms)
        same &= all(projection.dtype is self.dtype for projection in self.projections)
        lanes = dim % LANES == 0 and hidden % LANES == 0 and inner % LANES == 0
        return shapes and same and lanes and self.scaling > 0 and self.dtype in DTYPES


class PreparedDecoderLayer:
    """A layer with what does not change from step to step packed once. Tensors may be re-pointed, not replaced."""

    def __init__(self, weights: DecoderWeights) -> None:
        assert weights.fits
        self.weights = weights
        q, k, *_ = weights.projections
        self.num_heads, self.num_kv_heads = q.n // weights.head_dim, k.n // weights.head_dim
        self._sizes = struct.pack(
            "7qd4d",
            DTYPES[weights.dtype], q.k, self.num_heads, self.num_kv_heads, weights.head_dim, weights.projections[4].n,
            weights.window or 0, weights.scaling, *(0.0 if norm is None else norm.eps for norm in weights.norms),
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,  # (B, T, hidden)
        cos: Tensor,  # (B or 1, T, D), as `sin`; not read without rotary embedding
        sin: Tensor,
        keys: Tensor,  # (1 + rows, slots, K, D): row b reads page b + 1
        values: Tensor,  # as `keys`
        positions: Tensor,  # (B, T) int64
        write_index: Tensor,  # (B * T,) int64: page * slots + slot
        num_slots: int,  # no query sees a slot from here on
    ) -> Tensor:  # (B, T, hidden)
        """Writes this step's keys and values, and gives the layer's output. A row's result is its own."""
        weights = self.weights
        num_rows, num_steps, _ = x.shape
        angle_row = 0
        if weights.rotary:
            assert cos.shape == sin.shape and cos.shape[1:] == (num_steps, weights.head_dim) and cos.dtype is x.dtype
            angle_row = 0 if len(cos) == 1 else num_steps * weights.head_dim
            cos, sin = cos.contiguous(), sin.contiguous()
        assert x.dtype is keys.dtype is values.dtype is weights.dtype and num_slots <= keys.shape[1]
        assert num_rows < len(keys) and len(write_index) == num_rows * num_steps
        x, positions = x.contiguous(), positions.contiguous()
        y = torch.empty_like(x)
        step = _STEP.pack(
            x.data_ptr(), cos.data_ptr() if weights.rotary else 0, sin.data_ptr(), y.data_ptr(), keys.data_ptr(),
            values.data_ptr(), positions.data_ptr(), write_index.data_ptr(),
            num_rows, num_steps, keys.shape[1], num_slots, angle_row,
        )  # fmt: skip
        norms = struct.pack("4Q", *(0 if norm is None else norm.weight.data_ptr() for norm in weights.norms))
        matrices = b"".join([projection.matrix() for projection in weights.projections])
        functions().decoder_layer(step + self._sizes + norms + matrices, torch.get_num_threads())
        return y
