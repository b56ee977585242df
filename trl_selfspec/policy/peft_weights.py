"""Effective weights of a policy under PEFT: adapters merged, shards gathered, the policy left unchanged.

LoRA on any layer (Linear, Embedding, Conv1D, expert parameters) and DoRA are added up in fp32 and rounded once. Other
PEFT methods merge on a copy of the layer. A layer without a merged form raises `NotImplementedError`.
"""

import copy
from typing import cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from trl_selfspec.policy.sharding import gathered


def base_model(policy: nn.Module) -> PreTrainedModel:
    """The transformers model inside `policy`, PEFT's wrapper removed."""
    return cast(PreTrainedModel, policy.get_base_model() if isinstance(policy, PeftModel) else policy)


def find_module(base: nn.Module, path: str) -> nn.Module:
    """The module of `base`, in its own wrapper, at a path of the model without PEFT's wrappers."""
    module = base
    for name in filter(None, path.split(".")):
        module = _active_copy(module) if isinstance(module, AuxiliaryTrainingWrapper) else module
        if isinstance(module, BaseTunerLayer):
            if not isinstance(module, ParamWrapper):
                raise NotImplementedError(f"{_name(module)} adapts more than one tensor")
            module = module.get_base_layer()
        module = module.get_submodule(name)
    return module


def inner_module(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrappers."""
    module = _active_copy(module) if isinstance(module, AuxiliaryTrainingWrapper) else module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def effective_tensor(module: nn.Module, attribute: str) -> Tensor | None:
    """The value of `module.<attribute>` with active adapters merged and shards gathered.

    Returns the module's own `nn.Parameter` if that is the effective value (it may be aliased), else a new tensor.
    Gathering a sharded tensor is collective: all ranks must call this in the same order.

    Raises:
        NotImplementedError: there is no such tensor, because an adapter or a quantized layer computes something else.
    """
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = _active_copy(module)
    if not isinstance(module, BaseTunerLayer):
        return _dense(module, attribute)
    base, tuners = module.get_base_layer(), _contributing(module)
    if all(_adds_up(layer, names) for layer, names in tuners):
        return _lora_sum(base, tuners, attribute)
    if len(tuners) > 1:
        raise NotImplementedError(f"{_name(module)} around {_name(tuners[0][0])} can't be merged")
    return _merged_on_a_copy(*tuners[0], attribute)


def adapter_state(base: nn.Module) -> tuple[object, ...]:
    """Which adapters are active, and their scales: switching one changes no parameter and no version."""
    return tuple(
        (
            module.disable_adapters,
            tuple(module.active_adapters),
            tuple(module.merged_adapters),
            tuple(module.scaling.items()) if isinstance(module, LoraLayer) else (),
        )
        for module in base.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    )


def frozen_state(module: nn.Module) -> tuple[object, ...] | None:
    """A key that changes whenever a frozen `module` does; `None` for a trained one, whose versions may not change."""
    parameters = list(module.parameters())
    if is_sharded(module) or any(parameter.requires_grad for parameter in parameters):
        return None
    return adapter_state(module), tuple((id(p), p.data_ptr(), p._version) for p in parameters)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a 4-bit layer of bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ == "Params4bit"


def _contributing(module: nn.Module) -> list[tuple[BaseTunerLayer, list[str]]]:
    """The tuner layers around a module, from the inside out, each with the adapters that its forward adds."""
    found = []
    while isinstance(module, BaseTunerLayer):
        if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
            raise NotImplementedError(f"{_name(module)} has a forward of its own, as in X-LoRA")
        if module.merged and module.disable_adapters:
            raise NotImplementedError(f"{_name(module)} is merged and disabled at once; unmerge it")
        if not module.merged and not module.disable_adapters:
            names = [name for name in module.active_adapters if name in module._get_available_adapters()]
            found += [(module, names)] if names else []
        module = module.base_layer  # type: ignore[assignment]
    return found[::-1]


def _adds_up(layer: BaseTunerLayer, names: list[str]) -> bool:
    if not isinstance(layer, LoraLayer):
        return False
    variants = [layer.lora_variant[name] for name in names if name in layer.lora_variant]
    dora = all(type(variant) is DoraLinearVariant for variant in variants) and not layer.fan_in_fan_out  # type: ignore[attr-defined]
    return not variants or dora


def _lora_sum(base: nn.Module, tuners: list[tuple[BaseTunerLayer, list[str]]], attribute: str) -> Tensor | None:
    value = _dense(base, attribute)
    added = []
    for layer, names in tuners:
        assert isinstance(layer, LoraLayer)
        for name in names:
            has_bias = layer.lora_bias.get(name, False)
            if has_bias and getattr(base, "bias", None) is None:
                raise NotImplementedError("`lora_bias=True` on a layer without a bias")
            if attribute == getattr(layer, "parameter_name", "weight"):
                added.append(_lora_delta(layer, name, value))
            elif attribute == "bias" and has_bias:
                added.append(gathered(layer.lora_B[name].bias).float() * layer.scaling[name])  # type: ignore[union-attr]
    if not added:
        return value
    assert value is not None
    return sum(added, start=value.detach().float()).to(value.dtype)


def _lora_delta(layer: LoraLayer, name: str, weight: Tensor | None) -> Tensor:
    """What the adapter adds to `weight`, in fp32."""
    assert weight is not None
    delta = gathered(layer.get_delta_weight(name)).float()  # type: ignore[union-attr, operator]
    if name not in layer.lora_variant:
        return delta
    magnitude = gathered(layer.lora_magnitude_vector[name].weight).float()  # type: ignore[union-attr]
    merged = weight.detach().float() + delta
    return merged * (magnitude / merged.norm(dim=1))[:, None] - weight.detach().float()


def _merged_on_a_copy(layer: BaseTunerLayer, names: list[str], attribute: str) -> Tensor | None:
    value = _dense(layer.get_base_layer(), attribute)
    if is_quantized(layer.get_base_layer()):
        raise NotImplementedError(f"{_name(layer)} around a quantized layer can't be merged")
    clone = copy.deepcopy(layer)
    clone.float()  # type: ignore[operator]
    try:
        clone.merge(adapter_names=names)
    except ValueError as error:
        raise NotImplementedError(f"{_name(layer)}: {error}") from error
    merged = gathered(getattr(clone.get_base_layer(), attribute))
    return None if merged is None or value is None else merged.detach().to(value.dtype)


def _active_copy(wrapper: AuxiliaryTrainingWrapper) -> nn.Module:
    if not isinstance(wrapper, ModulesToSaveWrapper):
        raise NotImplementedError(f"{_name(wrapper)} can't be merged")
    active = wrapper.active_adapters[0] if wrapper.active_adapters else None
    if active is None or active not in wrapper.modules_to_save or wrapper.disable_adapters:
        return wrapper.original_module
    return wrapper.modules_to_save[active]


def _dense(module: nn.Module, attribute: str) -> Tensor | None:
    """The whole tensor in the dtype in which the module computes."""
    tensor = getattr(module, attribute)
    if is_quantized(module) and tensor is not None:
        state = module.weight.quant_state  # type: ignore[union-attr]
        if getattr(state, "packing_format_for_cpu", False):
            raise NotImplementedError("bitsandbytes has packed its 4-bit weights for CPU inference")
        whole = dequantize_bnb_weight(tensor) if attribute == "weight" else tensor.detach()  # type: ignore[arg-type]
        return whole.to(module.compute_dtype or state.dtype)  # type: ignore[arg-type, call-overload]
    if tensor is not None and type(tensor) not in (Tensor, nn.Parameter) and not isinstance(tensor, DTensor):
        raise NotImplementedError(f"weights of class {type(tensor).__name__} are quantized in a way of their own")
    return gathered(tensor)


def _name(module: object) -> str:
    return f"{type(module).__module__.removeprefix('peft.tuners.').split('.')[0]}.{type(module).__name__}"
