"""The tensors a policy really computes with: adapters merged, shards gathered, without touching the policy."""

import copy

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from trl_selfspec.sharding import gathered


def base_model(policy: nn.Module) -> nn.Module:
    """The transformers model inside `policy`, PEFT's wrapper removed."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def effective_tensor(module: nn.Module, attribute: str) -> Tensor | None:
    """What `module.<attribute>` amounts to with its active adapters merged and its shards gathered.

    Returns the module's own `nn.Parameter` where that is the effective value (it may be aliased), else a new tensor.
    Gathering a sharded tensor is collective: every rank must ask in the same order.
    """
    if isinstance(module, ModulesToSaveWrapper):
        module = _active_copy(module)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise NotImplementedError(f"{type(module).__name__} can't be merged")
    if not isinstance(module, BaseTunerLayer):
        return gathered(getattr(module, attribute))
    base = module.get_base_layer()
    merged = attribute == "weight" and bool(module.active_adapters) and not module.merged and not module.disable_adapters
    if not merged:
        return gathered(getattr(base, attribute))
    if isinstance(module, LoraLayer) and not any(_is_dora(module, name) for name in module.active_adapters):
        return _merged_lora(module, gathered(base.weight))
    clone = copy.deepcopy(module)
    clone.merge()
    return clone.get_base_layer().weight.detach().clone()


def _merged_lora(layer: LoraLayer, weight: Tensor) -> Tensor:
    merged = weight.detach().float()
    for name in layer.active_adapters:
        if name in layer.lora_A or name in layer.lora_embedding_A:
            merged = merged + gathered(layer.get_delta_weight(name)).float()  # type: ignore[operator]
    return merged.to(weight.dtype)


def _active_copy(wrapper: ModulesToSaveWrapper) -> nn.Module:
    active = wrapper.active_adapters[0] if wrapper.active_adapters else None
    if active is None or active not in wrapper.modules_to_save or wrapper.disable_adapters:
        return wrapper.original_module
    return wrapper.modules_to_save[active]


def _is_dora(layer: LoraLayer, name: str) -> bool:
    return bool(layer.use_dora.get(name, False)) if isinstance(layer.use_dora, dict) else bool(layer.use_dora)
