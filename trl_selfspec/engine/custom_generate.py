"""`model.generate` with the engine in place of its decoding loop.

transformers prepares inputs and the generation config as for any other call and hands them to `custom_generate`. What
comes back is what its own loop returns: prompts with their padding, completions, padding after a row's EOS token.
"""

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.engine.engine import SelfSpecEngine


# Arguments of `generate` that change what is drawn, or that would have to be called on the way.
REFUSED_ARGUMENTS = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
REFUSED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# Prepared by `generate` itself, or without a say in which tokens are drawn.
_HONOURED_MODEL_KWARGS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_GENERATE = inspect.unwrap(vars(GenerationMixin)["generate"]).__code__


class SelfSpecGenerate:
    """Speculative decoding for `model.generate(..., custom_generate=SelfSpecGenerate(engine))`.

    Greedy output is that of plain `generate`; samples follow the same logits_processor. Left-padded batches,
    `num_return_sequences`, `return_dict_in_generate` (with `sequences` alone) and every sampling parameter that the
    engine supports are honoured, everything else raises. Dropout is off.
    The engine follows changed weights by itself; where they are sharded, all processes have to call `generate`
    together. It keeps its model alive, and nothing but this object keeps the engine.

    Args:
        engine: built on the model (or on the PEFT model) whose `generate` is called.

    Attributes:
        stats: counters of the latest call; `None` before the first.

    Raises:
        ValueError: an argument or option that can't be honoured, by name; another model than the engine's.

    Example:
        >>> speculative = SelfSpecGenerate(SelfSpecEngine(model, SelfSpecOptions(draft_qtype="qint4")))
        >>> inputs = tokenizer(["1+2=", "13+29="], padding=True, return_tensors="pt")
        >>> output = model.generate(**inputs, do_sample=True, max_new_tokens=8, custom_generate=speculative)
        >>> tuple(output.shape) <= (2, 6 + 8)
        True
    """

    def __init__(self, engine: SelfSpecEngine) -> None:
        self.engine = engine
        self.stats: RolloutStats | None = None

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,  # (B, P) int64, repeated `num_return_sequences` times
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` calls; returns sequences, (B, P + T) int64, or the output that holds them."""
        self._check_model(model)
        _check_arguments()
        _check_outputs(generation_config)
        mask = model_kwargs.get("attention_mask")
        _check_model_kwargs(model_kwargs, mask)
        prompts = _unpadded(input_ids, mask)
        config = _per_row_config(generation_config, input_ids.shape[1])
        _check_context(model, prompts, config)
        if self.engine.stale:
            self.engine.refresh()
        # A greedy call draws nothing from torch's generator, as in `generate`.
        output = self.engine.generate(prompts, config, seed=None if config.do_sample else 0)
        self.engine.release()  # as after plain `generate`, whose cache goes with the call
        self.stats = output.stats
        sequences = _padded(input_ids, output.completion_ids, generation_config)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    def _check_model(self, model: PreTrainedModel) -> None:
        if model is not self.engine.model:
            raise ValueError(
                f"The engine was built on another model than this {type(model).__name__}; build one per model: "
                "`SelfSpecGenerate(SelfSpecEngine(model))`."
            )
        device_type = self.engine.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        if autocast not in (None, self.engine.autocast_dtype):
            raise ValueError(
                f"`generate` is called under autocast to {autocast}, which the engine does not follow; build it with "
                f"`SelfSpecEngine(model, autocast_dtype={autocast})` or leave the autocast context."
            )


def _check_arguments() -> None:
    """Refuses what `generate` was given and does not pass on, or mixes with its own: only its frame tells."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back
    if frame is None:
        raise ValueError("SelfSpecGenerate is not called directly: use `model.generate(..., custom_generate=...)`.")
    given = {name: frame.f_locals[name] for name in REFUSED_ARGUMENTS}
    _refuse([name for name, value in given.items() if value is not None and not _is_empty_list(value)])


def _is_empty_list(value: object) -> bool:
    return isinstance(value, list) and not value  # `generate` turns None into one


def _check_outputs(config: GenerationConfig) -> None:
    _refuse([name for name in REFUSED_OUTPUTS if getattr(config, name)])


def _check_model_kwargs(model_kwargs: dict[str, Any], mask: Tensor | None) -> None:
    given = [name for name, value in model_kwargs.items() if value is not None]
    refused = [name for name in given if name not in _HONOURED_MODEL_KWARGS]
    if getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False):
        refused.append("past_key_values")
    if (position_ids := model_kwargs.get("position_ids")) is not None:
        steps = torch.ones_like(position_ids) if mask is None else mask.long()
        if ((position_ids != steps.cumsum(-1) - 1) & (steps != 0)).any():
            refused.append("position_ids")
    _refuse(refused)


def _refuse(names: list[str]) -> None:
    if names:
        raise ValueError(
            f"SelfSpecGenerate can't honour {', '.join(f'`{name}`' for name in names)}; leave it out, or leave "
            "`custom_generate` out for this call."
        )


def _unpadded(input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    if mask is None:
        return input_ids.tolist()
    is_token = mask != 0
    length = input_ids.shape[1]
    counts = is_token.sum(1, keepdim=True)
    if not torch.equal(is_token, torch.arange(length, device=mask.device) >= length - counts):
        raise ValueError(
            "`attention_mask` hides tokens inside or behind a prompt, which can't be honoured; pad on the left "
            "(`padding_side='left'`)."
        )
    return [row[length - count :] for row, count in zip(input_ids.tolist(), counts[:, 0].tolist(), strict=True)]


def _per_row_config(generation_config: GenerationConfig, padded_length: int) -> GenerationConfig:
    """The same request for rows without padding, which `generate` counts as part of every length."""
    assert generation_config.max_length is not None, "`generate` always sets a length"
    config = copy.copy(generation_config)
    config.num_return_sequences = 1  # `generate` has repeated the rows
    config.max_new_tokens = generation_config.max_length - padded_length
    config.min_new_tokens, config.min_length = max((generation_config.min_length or 0) - padded_length, 0), 0
    return config


def _check_context(model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> None:
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if context is not None and longest + config.max_new_tokens > context:  # type: ignore[operator]
        raise ValueError(
            f"`max_new_tokens={config.max_new_tokens}` after a prompt of {longest} tokens exceeds the model's context "
            f"of {context} positions; use at most {context - longest}."
        )


def _padded(input_ids: Tensor, completions: list[list[int]], generation_config: GenerationConfig) -> Tensor:
    width = max(map(len, completions))
    pad = generation_config._pad_token_tensor  # set wherever there is an EOS token, and else no row ends early
    rows = [row + [0 if pad is None else int(pad)] * (width - len(row)) for row in completions]
    return torch.cat([input_ids, torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
