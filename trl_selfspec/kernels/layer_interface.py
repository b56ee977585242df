"""What a decoder layer is made of, and what it reads and writes, as its kernels see them."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trl_selfspec.kernels.norm import FastRMSNorm


class Linear(Protocol):
    """A linear layer that casts its input to its dtype."""

    in_features: int
    out_features: int
    dtype: torch.dtype

    def __call__(self, x: Tensor, /) -> Tensor: ...


class Step(Protocol):
    """The forward that is under way, of B rows and T tokens."""

    table: Tensor  # (B, pages_per_row) int64: slot s of row b lies in page table[b, s // page_size]
    positions: Tensor  # (B, T) int64
    write_index: Tensor  # (B * T,) int64: page * page_size + slot
    num_slots: int  # no query sees a slot from here on
    fresh: bool  # its own keys are all there is

    @property
    def rows_in_place(self) -> bool: ...  # row b reads page b + 1


class Pages(Protocol):
    """Keys and values of one layer."""

    keys: Tensor  # (pages, page_size, K, D)
    values: Tensor  # (pages, page_size, K, Dv)
    addresses: Tensor  # (2,) int64: where the two lie; they may be put elsewhere under a captured graph

    @property
    def owner(self) -> Step: ...

    def write(self, key_states: Tensor, value_states: Tensor) -> None: ...


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
        hidden_dtype: of what goes from layer to layer.
    """

    linears: tuple[Linear, ...]
    norms: tuple[FastRMSNorm, FastRMSNorm, FastRMSNorm | None, FastRMSNorm | None]
    head_dim: int
    scaling: float
    window: int | None
    rotary: bool
    hidden_dtype: torch.dtype

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
