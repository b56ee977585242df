"""Policies with adapters that matter, and what tests of them share."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import ragged_prompts, tiny_model
from torch import Tensor, nn
from transformers import GenerationConfig

from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions


LAYERS = ["q_proj", "v_proj", "down_proj"]


def stir(policy: nn.Module, seed: int = 3, std: float = 0.15) -> None:
    """Moves all that is trained: PEFT initialises most adapters to none at all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


def adapted(
    family: str = "qwen2",
    config: peft.PeftConfig | None = None,
    model_values: dict[str, Any] | None = None,
    **values: Any,
) -> PeftModel:
    model = tiny_model(family, **(model_values or {}))
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    policy = get_peft_model(model, config or LoraConfig(**defaults | values))
    stir(policy)
    return policy


def snapshot(policy: nn.Module) -> dict[str, Any]:
    """All of a policy that a replica must leave as it was, bit for bit."""
    tensors = [*policy.named_parameters(remove_duplicate=False), *policy.named_buffers(remove_duplicate=False)]
    return {
        name: (tensor.data_ptr(), tensor._version, tensor.requires_grad, _bytes(tensor)) for name, tensor in tensors
    } | {
        f"{name} (module)": (
            module.training,
            type(module),
            tuple(getattr(module, "merged_adapters", ())),
            sorted(vars(module)),
        )
        for name, module in policy.named_modules()
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def two_adapters(**values: Any) -> PeftModel:
    policy = adapted(**values)
    policy.add_adapter("ref", copy.deepcopy(policy.peft_config["default"]))
    policy.set_adapter("ref")
    stir(policy, seed=4)
    policy.set_adapter("default")
    return policy


SWITCHES: dict[str, Callable[[PeftModel], Any]] = {
    "set_adapter": lambda policy: policy.set_adapter("ref"),
    "both": lambda policy: policy.base_model.set_adapter(["default", "ref"]),
    "disabled": lambda policy: policy.base_model.disable_adapter_layers(),
    "scaled": lambda policy: [m.scale_layer(3.0) for m in policy.modules() if hasattr(m, "scale_layer")],
    "merged": lambda policy: policy.merge_adapter(),
    "deleted": lambda policy: policy.delete_adapter("default"),
}


def speculating(policy: nn.Module) -> SelfSpecEngine:
    return SelfSpecEngine(policy, SelfSpecOptions("qint8", num_speculative_tokens=3, max_active_sequences=8))  # type: ignore[arg-type]


def greedy(engine: SelfSpecEngine) -> tuple[list[list[int]], float]:
    output = engine.generate(ragged_prompts([3, 7, 12]), GenerationConfig(max_new_tokens=12, do_sample=False))
    return output.completion_ids, output.stats.alpha
