"""The drafter: the target mirror's tree with quantized Linear layers.

Its weights come in two forms. Merged: the target's weights are quantized anew after every change. Live, for LoRA: the
frozen base is quantized once, and the active adapters run on top in the layer's dtype. A change of the adapters then
costs a copy of a few kilobytes, but every draft step two more small products per layer (`live_adapter_seconds`).
"""

from collections import Counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_selfspec import kernels
from trl_selfspec.adapters import effective_tensor, find_module, frozen_state, inner_module, lora_factors
from trl_selfspec.mirror import Mirror, MirrorLinear
from trl_selfspec.quantize import QuantizedLinear
from trl_selfspec.timing import Clock


TIMED_STEPS = 3


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


@torch.no_grad()
def live_adapter_seconds(mirror: Mirror, num_rows: int) -> float | None:
    """What live adapters add to one draft step of `num_rows`, measured layer shape by layer shape.

    `None` where there are no LoRA layers. Live adapters are cheaper than merged ones if this, times the draft steps
    between two changes of the weights, is less than requantizing takes.
    """
    shapes: Counter[tuple[int, int, int]] = Counter()
    like = mirror.embeddings[:1].to(mirror.dtype)
    for name, module in mirror.model.named_modules():
        if isinstance(module, MirrorLinear) and (factors := lora_factors(find_module(mirror.base, name))) is not None:
            down, up = factors
            shapes[down.shape[1], down.shape[0], up.shape[0]] += 1
    return sum(count * _seconds(like, num_rows, *shape) for shape, count in shapes.items()) if shapes else None


def _seconds(like: Tensor, num_rows: int, in_features: int, rank: int, out_features: int) -> float:
    x, down = like.new_zeros(num_rows, in_features), like.new_zeros(rank, in_features)
    up, y = like.new_zeros(out_features, rank), like.new_zeros(num_rows, out_features)
    clock, laps = Clock(like.device), []
    for _ in range(TIMED_STEPS):
        clock.start()
        y = y + kernels.linear(kernels.linear(x, down), up)
        clock.mark()
        laps += clock.laps()
    return min(laps)


def drafter_bytes(drafter: nn.Module) -> int:
    """Bytes the drafter holds beyond what it shares with the target mirror."""
    return sum(module.nbytes for module in drafter.modules() if isinstance(module, QuantizedLinear))
