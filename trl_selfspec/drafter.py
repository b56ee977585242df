"""The drafter: the target mirror's tree with quantized Linear layers.

Its weights come in two forms. Merged: the target's weights are quantized anew after every change. Live, for LoRA: the
frozen base is quantized once, and the active adapters run on top in the layer's dtype. A change of the adapters then
costs a copy of a few kilobytes, but every draft step two more small products per layer. `forms.py` chooses.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_selfspec import kernels
from trl_selfspec.adapters import effective_tensor, find_module, frozen_state, inner_module, lora_factors
from trl_selfspec.mirror import Mirror, MirrorLinear
from trl_selfspec.quantize import QuantizedLinear


class LiveLoraLinear(QuantizedLinear):
    """A quantized base with unmerged adapters on top: `x W^T + (x A^T) B^T`."""

    down: Tensor | None = None  # A: (R, in)
    up: Tensor | None = None  # B times the scaling: (out, R)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        y = super().forward(x)
        if self.down is None:
            return y
        assert self.up is not None
        return y + kernels.linear(kernels.linear(x, self.down), self.up)

    @property
    def kernel(self) -> None:
        """None: it does not know of adapters."""

    def follow(self, factors: tuple[Tensor, Tensor] | None) -> None:
        """Takes over adapters, in place unless their rank changed; `None` removes them."""
        if factors is None:
            self.down = self.up = None
            return
        for name, factor in zip(("down", "up"), factors, strict=True):
            held = getattr(self, name)
            if held is not None and held.shape == factor.shape:
                held.copy_(factor)
            else:
                setattr(self, name, factor.detach().to(self.dtype, copy=True).contiguous())

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(factor.nbytes for factor in (self.down, self.up) if factor is not None)


def make_drafter(
    mirror: Mirror, qtype: str, quantize_lm_head: bool = True, live_adapters: bool = False
) -> PreTrainedModel:
    """The target mirror's tree and tensors with a `QuantizedLinear` for every Linear layer; fill it by `requantize`.

    Args:
        mirror: the target mirror.
        qtype: quanto's name of the weights' type.
        quantize_lm_head: quantize the output head too.
        live_adapters: keep LoRA adapters unmerged, for `requantize` to be cheap.
    """
    head = mirror.model.get_output_embeddings()

    def quantized(name: str, layer: MirrorLinear) -> nn.Module:
        if layer is head and not quantize_lm_head:
            return layer
        live = live_adapters and lora_factors(find_module(mirror.base, name)) is not None
        (out_features, in_features), weight = layer.weight.shape, layer.weight
        form = LiveLoraLinear if live else QuantizedLinear
        return form(in_features, out_features, layer.bias, qtype, weight.dtype, weight.device)

    return mirror.tree(linear=quantized)


@torch.no_grad()
def requantize(drafter: nn.Module, mirror: Mirror) -> None:
    """Quantizes the current weights into the drafter, in place, layer by layer; skips frozen ones that stayed."""
    for name, module in drafter.named_modules():
        if not isinstance(module, QuantizedLinear):
            continue
        source, factors = find_module(mirror.base, name), None
        if isinstance(module, LiveLoraLinear):
            module.follow(factors := lora_factors(source))
        live, quantized = factors is not None, inner_module(source) if factors is not None else source
        state = frozen_state(quantized)
        if state is None or (live, state) != getattr(module, "quantized_state", None):
            weight = effective_tensor(quantized, "weight") if live else mirror.model.get_submodule(name).weight
            module.requantize_(weight)  # type: ignore[arg-type]
        module.quantized_state = (live, state)  # type: ignore[assignment]


def has_live_adapters(drafter: nn.Module) -> bool:
    """Whether this is a drafter of the form for LoRA."""
    return any(isinstance(module, LiveLoraLinear) for module in drafter.modules())


def drafter_bytes(drafter: nn.Module) -> int:
    """Bytes the drafter holds beyond what it shares with the target mirror."""
    return sum(module.nbytes for module in drafter.modules() if isinstance(module, QuantizedLinear))
