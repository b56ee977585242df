"""A decoder layer of Llama's family on CUDA, in about ten launches: between matrix products there is one kernel.

The same steps run on Triton's kernels or on their eager twins, which are what the layer's own modules compute.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from trl_selfspec.kernels import elementwise
from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.kernels.attention import MAX_DIM, attend_on_gpu, can_attend_on_gpu
from trl_selfspec.kernels.layer_interface import DecoderParts, Linear, Pages
from trl_selfspec.kernels.norm import MAX_GPU_SIZE, FastRMSNorm


class GpuDecoderLayer:
    """The steps of a layer. Tensors of its parts may be re-pointed, not replaced."""

    def __init__(self, parts: DecoderParts) -> None:
        from trl_selfspec.kernels.triton import elementwise as triton_elementwise

        self.parts, self._kernels = parts, triton_elementwise
        self._qkv, self._gate_up = JoinedLinear(parts.linears[:3]), JoinedLinear(parts.linears[4:6])
        self._o, self._down = parts.linears[3], parts.linears[6]
        self._successor: tuple[FastRMSNorm, torch.dtype | None] | None = None

    @staticmethod
    def fits(parts: DecoderParts) -> bool:
        """Whether the kernels take these dtypes and sizes."""
        dtypes = {parts.dtype, parts.hidden_dtype, *(norm.weight.dtype for norm in parts.norms if norm is not None)}
        sizes = parts.head_dim <= MAX_DIM and parts.head_dim % 2 == 0 and parts.hidden_size <= MAX_GPU_SIZE
        return sizes and dtypes <= set(gpu.DTYPES)

    def takes(self, x: Tensor, cos: Tensor, pages: Pages) -> bool:
        """Whether this is a decode step of the right dtypes."""
        num_steps, parts = x.shape[1], self.parts
        right = x.dtype is parts.hidden_dtype and pages.keys.dtype is parts.dtype and not pages.owner.fresh
        angles = not parts.rotary or cos.shape[1:] == (num_steps, parts.head_dim)
        return right and angles and can_attend_on_gpu(num_steps, pages)

    def precede(self, norm: FastRMSNorm, dtype: torch.dtype | None) -> None:
        """The kernel that adds the last residual computes that norm too."""
        self._successor = norm, dtype

    def __call__(
        self,
        x: Tensor,  # (B, T, hidden)
        cos: Tensor,  # (B or 1, T, D), as `sin`; not read without rotary embedding
        sin: Tensor,
        pages: Pages,
    ) -> Tensor:  # (B, T, hidden)
        """Writes this step's keys and values, and gives the layer's output."""
        x, out = self._residual_and_mlp(x, cos, sin, pages, self._kernels)
        if self._successor is None:
            return x + out
        norm, dtype = self._successor
        x, normed = self._kernels.add_rms_norm(out, x, norm, dtype)
        norm.foresee(x, normed)
        return x

    def twin(self, x: Tensor, cos: Tensor, sin: Tensor, pages: Pages) -> Tensor:
        """The same in eager torch, but for attention."""
        x, out = self._residual_and_mlp(x, cos, sin, pages, elementwise)
        return x + out

    def _residual_and_mlp(
        self, x: Tensor, cos: Tensor, sin: Tensor, pages: Pages, between: ModuleType
    ) -> tuple[Tensor, Tensor]:
        parts = self.parts
        before_attention, before_mlp, *head_norms = parts.norms
        normed = before_attention.foreseen(x)
        if normed is None:
            _, normed = between.add_rms_norm(x, None, before_attention, parts.dtype)
        heads = (states.unflatten(-1, (-1, parts.head_dim)) for states in self._qkv(normed))
        query = between.rotate_and_write(*heads, (cos, sin) if parts.rotary else None, head_norms, pages)
        attended = attend_on_gpu(query, pages, parts.scaling, parts.window)
        x, normed = between.add_rms_norm(self._o(attended.flatten(2)), x, before_mlp, parts.dtype)
        return x, self._down(between.silu_mul(*self._gate_up(normed)))


class JoinedLinear:
    """Layers of one input, as one product where their weights and biases lie next to each other.

    They do where they were put so (`whole`, the rows of one quantized layer), and where they are parts of one buffer.
    """

    def __init__(self, layers: Sequence[Linear]) -> None:
        self.layers, self.sizes = layers, [layer.out_features for layer in layers]
        wholes = {getattr(layer, "whole", None) for layer in layers}
        self._whole = wholes.pop() if len(wholes) == 1 else None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        if self._whole is not None:
            return self._whole(x).split(self.sizes, dim=-1)
        weights, biases = ([getattr(layer, name, None) for layer in self.layers] for name in ("weight", "bias"))
        weight, bias = _joined(weights), _joined(biases)
        if weight is None or (bias is None and biases != [None] * len(biases)):
            return [layer(x) for layer in self.layers]
        return linear(x.to(weight.dtype), weight, bias).split(self.sizes, dim=-1)


def _joined(tensors: list[Tensor | None]) -> Tensor | None:
    """A view of tensors that follow on each other in one storage, as one of more rows."""
    first, size = tensors[0], 0
    for tensor in tensors:
        if first is None or tensor is None or not tensor.is_contiguous() or tensor.shape[1:] != first.shape[1:]:
            return None
        if tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or tensor.dtype != first.dtype:
            return None
        if tensor.storage_offset() != first.storage_offset() + size:
            return None
        size += tensor.numel()
    assert first is not None
    return first.as_strided((size // first[0].numel(), *first.shape[1:]), first.stride())
