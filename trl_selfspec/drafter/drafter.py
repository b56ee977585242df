"""The drafter: the target replica's tree with quantized Linear layers.

Its weights come in two forms. Merged: the target's weights are quantized anew after every change. Live, for LoRA: the
frozen base is quantized once, and the active adapters run on top in the layer's dtype. A change of the adapters then
costs a copy of a few kilobytes, but every draft step two more small products per layer. `forms.py` chooses.

On GPUs, merged projections of one input are rows of one quantized layer. Each row has scales of its own, so this
changes no code; under their own names they are still there, to be quantized one by one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_selfspec import kernels
from trl_selfspec.drafter.quantized_linear import QuantizedLinear
from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.policy.fused_layers import joinable_projections
from trl_selfspec.policy.peft_weights import effective_tensor, find_module, frozen_state, inner_module, lora_factors
from trl_selfspec.policy.replica import PolicyReplica, ReplicaLinear


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
    def weight(self) -> Tensor:
        base = self.dequantize()
        return base if self.down is None or self.up is None else base + self.up @ self.down

    @property
    def kernel(self) -> None:
        """None: it does not know of adapters."""

    def follow(self, factors: tuple[Tensor, Tensor] | None) -> bool:
        """Takes over adapters, in place unless their rank changed; `None` removes them.

        Returns whether it computes with other tensors than before.
        """
        if factors is None:
            had = self.down is not None
            self.down = self.up = None
            return had
        if self.down is not None and self.up is not None and self.down.shape == factors[0].shape:
            self.down.copy_(factors[0])
            self.up.copy_(factors[1])
            return False
        self.down, self.up = (factor.detach().to(self.dtype, copy=True).contiguous() for factor in factors)
        return True

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(factor.nbytes for factor in (self.down, self.up) if factor is not None)


class QuantizedRows(nn.Module):
    """A Linear layer whose weight is a part of a larger quantized one: its output rows from `first_row` on."""

    def __init__(self, whole: QuantizedLinear, first_row: int, out_features: int) -> None:
        super().__init__()
        self.whole, self.first_row = whole, first_row
        self.in_features, self.out_features, self.dtype = whole.in_features, out_features, whole.dtype

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.out_features)

    @property
    def weight(self) -> Tensor:
        return self.whole.dequantize(self.rows)

    @property
    def bias(self) -> Tensor | None:
        return None if self.whole.bias is None else self.whole.bias[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)[..., self.rows]

    def requantize_(
        self,
        weight: Tensor,  # (out_features, in_features)
        derive: bool = True,
    ) -> None:
        self.whole.requantize_(weight, self.first_row, derive)

    @torch.no_grad()
    def copy_bias_(self, bias: Tensor | None) -> None:
        """Takes over what the layer would have shared alone."""
        if bias is not None:
            assert self.whole.bias is not None
            self.whole.bias[self.rows].copy_(bias)


def make_drafter(replica: PolicyReplica, qtype: str, live_adapters: bool = False) -> PreTrainedModel:
    """The target replica's tree and tensors with a `QuantizedLinear` for every Linear layer; fill it by `requantize`.

    Args:
        replica: the target replica.
        qtype: quanto's name of the weights' type.
        live_adapters: keep LoRA adapters unmerged, for `requantize` to be cheap.
    """
    live = {name for name in _linear_names(replica) if live_adapters and _has_factors(replica, name)}
    joined = _joined(replica, qtype, live)

    def quantized(name: str, layer: ReplicaLinear) -> nn.Module:
        if name in joined:
            return joined[name]
        form = LiveLoraLinear if name in live else QuantizedLinear
        sizes = layer.in_features, layer.out_features
        return form(*sizes, layer.bias, qtype, layer.weight.dtype, layer.weight.device)

    return replica.tree(linear=quantized)


def _linear_names(replica: PolicyReplica) -> list[str]:
    return [name for name, module in replica.model.named_modules() if isinstance(module, ReplicaLinear)]


def _has_factors(replica: PolicyReplica, name: str) -> bool:
    return lora_factors(find_module(replica.base, name)) is not None


def _joined(replica: PolicyReplica, qtype: str, live: set[str]) -> dict[str, QuantizedRows]:
    """The parts of the joined layers by name, where kernels run them at once."""
    joined: dict[str, QuantizedRows] = {}
    if not gpu.runs_triton(replica.embeddings.device):
        return joined
    for layer in replica.fast_layers:
        for group in joinable_projections(replica.model.get_submodule(layer)):
            names = [f"{layer}.{name}" for name in group]
            linears = [replica.model.get_submodule(name) for name in names]
            biases = [linear.bias for linear in linears if linear.bias is not None]
            if live & set(names) or len(biases) not in (0, len(names)):
                continue
            weight: Tensor = linears[0].weight  # type: ignore[assignment]
            sizes: list[int] = [linear.out_features for linear in linears]  # type: ignore[misc]
            bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None  # type: ignore[arg-type]
            whole = QuantizedLinear(weight.shape[1], sum(sizes), bias, qtype, weight.dtype, weight.device)
            for index, name in enumerate(names):
                joined[name] = QuantizedRows(whole, sum(sizes[:index]), sizes[index])
    return joined


def quantized_layers(drafter: nn.Module) -> Iterator[tuple[str, QuantizedLinear | QuantizedRows]]:
    """The drafter's quantized layers, with the names of the target's that they stand for."""
    wholes: set[nn.Module] = {module.whole for module in drafter.modules() if isinstance(module, QuantizedRows)}
    for name, module in drafter.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedRows) and module not in wholes:
            yield name, module


@torch.no_grad()
def requantize(drafter: nn.Module, replica: PolicyReplica) -> bool:
    """Quantizes the current weights into the drafter, in place, layer by layer; skips frozen ones that stayed.

    Returns whether a layer computes with other tensors than before: adapters changed their rank, came or went.
    """
    moved, changed = False, dict[QuantizedLinear, None]()
    for name, module in quantized_layers(drafter):
        source, factors = find_module(replica.base, name), None
        if isinstance(module, LiveLoraLinear):
            moved |= module.follow(factors := lora_factors(source))
        live, quantized = factors is not None, inner_module(source) if factors is not None else source
        state = frozen_state(quantized)
        if state is None or (live, state) != getattr(module, "quantized_state", None):
            layer = replica.model.get_submodule(name)
            weight = effective_tensor(quantized, "weight") if live else layer.weight
            module.requantize_(weight, derive=False)  # type: ignore[arg-type]
            changed[module.whole if isinstance(module, QuantizedRows) else module] = None
            if isinstance(module, QuantizedRows):
                module.copy_bias_(layer.bias)  # type: ignore[arg-type]
        module.quantized_state = (live, state)  # type: ignore[assignment]
    for whole in changed:
        whole.derive_()
    return moved


def has_live_adapters(drafter: nn.Module) -> bool:
    """Whether this is a drafter of the form for LoRA."""
    return any(isinstance(module, LiveLoraLinear) for module in drafter.modules())


def drafter_bytes(drafter: nn.Module) -> int:
    """Bytes the drafter holds beyond what it shares with the target replica."""
    wholes = {module.whole for module in drafter.modules() if isinstance(module, QuantizedRows)}
    biases = sum(whole.bias.nbytes for whole in wholes if whole.bias is not None)
    return biases + sum(module.nbytes for module in drafter.modules() if isinstance(module, QuantizedLinear))
