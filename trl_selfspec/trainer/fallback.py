"""Reasons for TRL's own generation: inputs and settings that the engine does not support exactly.

Each function returns the reason in words that fit behind a colon, or `None`.
"""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import GenerationConfig
from transformers.generation.utils import GenerationMixin

from trl_selfspec.policy.peft_weights import base_model
from trl_selfspec.sampling.logits_processing import effective_generation_config, unsupported_parameters


_GENERATE: Any = vars(GenerationMixin)["generate"]


def sharding_reason(
    accelerator: Any,
    distribution: Any,  # TRL's description of the launch
    is_multimodal: bool,
) -> str | None:
    """The same on every rank."""
    if distribution.is_fsdp:
        if distribution.fsdp_version != 2:
            return "the policy is sharded by FSDP 1, whose weights can't be gathered alone; use `fsdp_version: 2`"
        if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            return "FSDP keeps the policy's weights off the device (`fsdp_offload_params`)"
    if (distribution.is_fsdp or distribution.is_zero3) and is_multimodal:
        # TRL's generation is collective here: a process with images in its prompts would wait for the others.
        return "the policy is sharded and multimodal"
    return None


def policy_reason(policy: nn.Module, generation_config: GenerationConfig) -> str | None:
    """The same on every rank."""
    peft_configs = getattr(policy, "peft_config", {})
    if any(config.is_prompt_learning for config in peft_configs.values()):
        return "prompt-learning PEFT methods have no weights that a replica of the policy could merge"
    base = base_model(policy)
    if _replaces_generate(policy) or _replaces_generate(base):
        return "the policy's `generate` is not transformers' own"
    config = effective_generation_config(base, generation_config)
    if names := unsupported_parameters(config):
        return "the engine can't honour " + ", ".join(f"`{name}={getattr(config, name)!r}`" for name in names)
    return None


def input_reason(policy: nn.Module, images: Any, fields: Iterable[str]) -> str | None:
    """`fields` are the names that a processor returned besides token ids and images."""
    # Some text tokenizers return token type ids; they count only if the model takes them.
    accepted = inspect.signature(type(base_model(policy)).forward).parameters
    names = [name for name in fields if name != "token_type_ids" or name in accepted]
    if images is None and not names:
        return None
    return "the prompts hold more than text (" + ", ".join(names or ["images"]) + ")"


def length_reason(policy: nn.Module, prompt_ids: list[list[int]]) -> str | None:
    """TRL lets a model generate past its context; the engine ends rows there and can't hold longer prompts."""
    context = getattr(base_model(policy).config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(map(len, prompt_ids), default=0)
    if context is None or longest < context:
        return None
    return f"a prompt of {longest} tokens fills the model's context of {context} positions"


def _replaces_generate(model: Any) -> bool:
    """Whether `generate` is not transformers' own: a repository's `custom_generate`, or a patch."""
    of_class, of_instance = getattr(type(model), "generate", None), vars(model).get("generate")
    wrapper = getattr(of_instance, "__func__", None)
    if wrapper is not None and wrapper.__globals__["__name__"].startswith("torch.distributed.fsdp"):
        of_instance = None  # FSDP gathers the weights around transformers' own
    return of_instance is not None or (isinstance(model, GenerationMixin) and of_class is not _GENERATE)
