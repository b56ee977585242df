"""A whole decoder layer of Llama's family in one call, for the few tokens of a decode step.

The reference is the module. Measured against a compiled layer in docs/LOG.md.
"""

import struct
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu import machine
from trl_selfspec.kernels.cpu.build import functions
from trl_selfspec.kernels.cpu.linear import DTYPES, PreparedLinear
from trl_selfspec.kernels.cpu.norm import FastRMSNorm


LANES = 16  # halves of a head, and features per thread, are whole vectors
MAX_TOKENS = 64  # per forward, at most; for more, a call more or less matters little
_STEP = struct.Struct("8Q5q")  # the first fields of `DecoderLayer` in layer.c: addresses, then sizes


class Linear(Protocol):
    """A linear layer that casts its input to its dtype."""

    in_features: int
    out_features: int
    dtype: torch.dtype

    def __call__(self, x: Tensor, /) -> Tensor: ...


class Step(Protocol):
    """The current forward, of B rows and T tokens."""

    positions: Tensor  # (B, T) int64
    write_index: Tensor  # (B * T,) int64: page * page_size + slot
    num_slots: int  # no query sees a slot from here on

    @property
    def rows_in_place(self) -> bool: ...  # row b reads page b + 1


class Pages(Protocol):
    """Keys and values of one layer."""

    keys: Tensor  # (pages, page_size, K, D)
    values: Tensor  # (pages, page_size, K, D)

    @property
    def owner(self) -> Step: ...


@dataclass(frozen=True)
class DecoderParts:
    """A layer of Llama's family.

    Attributes:
        linears: q, k, v, o, gate, up, down.
        norms: before attention, before the MLP, of q's and of k's heads; the last two may be missing.
        head_dim: D, of queries, keys and values.
        scaling: of the attention scores.
        window: how many positions a query sees, itself included; `None` for all.
        rotary: whether queries and keys are rotated.
    """

    linears: tuple[Linear, ...]
    norms: tuple[FastRMSNorm, FastRMSNorm, FastRMSNorm | None, FastRMSNorm | None]
    head_dim: int
    scaling: float
    window: int | None
    rotary: bool

    @property
    def dtype(self) -> torch.dtype:
        """In which the linear layers compute, and of keys and values."""
        return self.linears[0].dtype

    @property
    def hidden_size(self) -> int:
        return self.linears[0].in_features

    @property
    def num_heads(self) -> int:
        return self.linears[0].out_features // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        return self.linears[1].out_features // self.head_dim

    @property
    def match(self) -> bool:
        """Whether the sizes are those of a layer, and the linear layers of one dtype."""
        q, k, v, o, gate, up, down = self.linears
        hidden, inner, dim = q.in_features, gate.out_features, self.head_dim
        shapes = {(p.out_features, p.in_features) for p in (k, v)} == {(k.out_features, hidden)}
        shapes &= (o.out_features, o.in_features) == (hidden, q.out_features)
        shapes &= {(p.out_features, p.in_features) for p in (gate, up)} == {(inner, hidden)}
        shapes &= (down.out_features, down.in_features) == (hidden, inner)
        shapes &= q.out_features % dim == k.out_features % dim == 0 and q.out_features % k.out_features == 0
        sizes = hidden, hidden, dim, dim
        norms = zip(self.norms, sizes, strict=True)
        shapes &= all(norm.weight.shape == (size,) for norm, size in norms if norm is not None)
        return shapes and self.scaling > 0 and len({linear.dtype for linear in self.linears}) == 1


class CpuDecoderLayer:
    """A layer with what does not change from step to step packed once. Tensors may be re-pointed, not replaced."""

    def __init__(self, parts: DecoderParts) -> None:
        self.parts, self._projections = parts, _projections(parts)
        self._dtype, self._most = parts.dtype, min(MAX_TOKENS, machine.max_rows(parts.dtype))
        tensors = [norm.weight for norm in parts.norms if norm is not None]
        tensors += [t for p in self._projections for t in (p.weight, p.scale_shift, p.bias) if t is not None]
        self._tensors, self._addresses, self._constants = tensors, (), b""
        self._sizes = struct.pack(
            "7qd4d",
            DTYPES[parts.dtype], parts.hidden_size, parts.num_heads, parts.num_kv_heads, parts.head_dim,
            parts.linears[4].out_features, parts.window or 0, parts.scaling,
            *(0.0 if norm is None else norm.eps for norm in parts.norms),
        )  # fmt: skip

    @staticmethod
    def fits(parts: DecoderParts) -> bool:
        """Whether every linear layer is one of ours, and the sizes and dtypes are ones that the kernel takes."""
        same = all(norm.weight.dtype is parts.dtype for norm in parts.norms if norm is not None)
        same &= parts.match and parts.dtype in DTYPES
        sizes = parts.head_dim, parts.hidden_size, parts.linears[4].out_features
        return same and all(size % LANES == 0 for size in sizes) and len(_projections(parts)) == len(parts.linears)

    def takes(
        self,
        pages: Pages,
        x: Tensor,  # (B, T, hidden)
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: object,
    ) -> bool:
        """Whether these are few tokens of the right dtypes, and whole heads are rotated: so few that no linear layer
        would leave them to torch.
        """
        if position_embeddings is None or x.shape[0] * x.shape[1] > self._most:
            return False
        whole_heads = not self.parts.rotary or position_embeddings[0].shape[-1] == self.parts.head_dim
        return whole_heads and pages.owner.rows_in_place and pages.keys.dtype is x.dtype is self._dtype

    def __call__(
        self,
        pages: Pages,  # row b reads page b + 1
        x: Tensor,  # (B, T, hidden)
        position_embeddings: tuple[Tensor, Tensor],  # cosines and sines, (B or 1, T, D), not read without rotation
        **kwargs: object,
    ) -> Tensor:  # (B, T, hidden)
        """Writes this step's keys and values, and gives the layer's output. A row's result is its own."""
        cos, sin = position_embeddings
        parts, step, keys, values = self.parts, pages.owner, pages.keys, pages.values
        num_rows, num_steps, _ = x.shape
        angle_row = 0
        if parts.rotary:
            assert cos.shape == sin.shape and cos.shape[1:] == (num_steps, parts.head_dim) and cos.dtype is x.dtype
            angle_row = 0 if cos.shape[0] == 1 else num_steps * parts.head_dim
            cos, sin = cos.contiguous(), sin.contiguous()
        assert x.dtype is keys.dtype is values.dtype is self._dtype and step.num_slots <= keys.shape[1]
        assert num_rows < keys.shape[0] and step.write_index.shape[0] == num_rows * num_steps
        x, positions = x.contiguous(), step.positions.contiguous()
        y = torch.empty_like(x)
        addresses = _STEP.pack(
            x.data_ptr(), cos.data_ptr() if parts.rotary else 0, sin.data_ptr(), y.data_ptr(), keys.data_ptr(),
            values.data_ptr(), positions.data_ptr(), step.write_index.data_ptr(),
            num_rows, num_steps, keys.shape[1], step.num_slots, angle_row,
        )  # fmt: skip
        functions().decoder_layer(addresses + self._packed(), torch.get_num_threads())
        return y

    def _packed(self) -> bytes:
        """The other fields of `DecoderLayer`, packed again where a tensor was put elsewhere."""
        addresses = tuple(map(Tensor.data_ptr, self._tensors))
        if addresses != self._addresses:
            norms = struct.pack("4Q", *(0 if norm is None else norm.weight.data_ptr() for norm in self.parts.norms))
            matrices = b"".join([projection.matrix() for projection in self._projections])
            self._constants, self._addresses = self._sizes + norms + matrices, addresses
        return self._constants


def _projections(parts: DecoderParts) -> list[PreparedLinear]:
    kernels = [getattr(linear, "kernel", None) for linear in parts.linears]
    return [kernel for kernel in kernels if isinstance(kernel, PreparedLinear)]
