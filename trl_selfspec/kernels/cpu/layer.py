"""A whole decoder layer of Llama's family in one call, for the few tokens of a decode step. Its twin is the module."""

import struct

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu import machine
from trl_selfspec.kernels.cpu.build import functions
from trl_selfspec.kernels.cpu.linear import DTYPES, PreparedLinear
from trl_selfspec.kernels.layer_interface import DecoderParts, Pages
from trl_selfspec.kernels.norm import FastRMSNorm


LANES = 16  # halves of a head, and features per thread, are whole vectors
MAX_TOKENS = 64  # per forward, at most; for more, a call more or less matters little
_STEP = struct.Struct("8Q5q")  # the first fields of `DecoderLayer` in layer.c: addresses, then sizes


class CpuDecoderLayer:
    """A layer with what does not change from step to step packed once. Tensors may be re-pointed, not replaced."""

    twin = None

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
        same &= parts.hidden_dtype is parts.dtype and parts.dtype in DTYPES
        sizes = parts.head_dim, parts.hidden_size, parts.linears[4].out_features
        return same and all(size % LANES == 0 for size in sizes) and len(_projections(parts)) == len(parts.linears)

    def takes(self, x: Tensor, cos: Tensor, pages: Pages) -> bool:
        """Whether these are few tokens of the right dtypes, and whole heads are rotated: so few that no linear layer
        would leave them to torch.
        """
        few = x.shape[0] * x.shape[1] <= self._most and (not self.parts.rotary or cos.shape[-1] == self.parts.head_dim)
        return few and pages.owner.rows_in_place and pages.keys.dtype is x.dtype is self._dtype

    def precede(self, norm: FastRMSNorm, dtype: torch.dtype | None) -> None:
        """Nothing to gain: the next call begins with that norm."""

    def __call__(
        self,
        x: Tensor,  # (B, T, hidden)
        cos: Tensor,  # (B or 1, T, D), as `sin`; not read without rotary embedding
        sin: Tensor,
        pages: Pages,  # row b reads page b + 1
    ) -> Tensor:  # (B, T, hidden)
        """Writes this step's keys and values, and gives the layer's output. A row's result is its own."""
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
