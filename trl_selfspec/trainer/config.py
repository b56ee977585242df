"""Configuration of the TRL trainers that draw their rollouts from [`SelfSpecEngine`]."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig, RLOOConfig

from trl_selfspec.options import SelfSpecOptions


_PREFIX = "selfspec_"
_OPTION_NAMES = tuple(option.name for option in fields(SelfSpecOptions))


def _from_text(value: Any) -> Any:
    """Turns what a command line gives for an integer or a boolean into one; every other value is left as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    return {"true": True, "false": False}.get(text, text)


@dataclass
class SelfSpecConfigMixin:
    r"""
    The fields that [`SelfSpecMixin`] reads, for any TRL config: `class MyConfig(SelfSpecConfigMixin, RLOOConfig)`.

    Parameters:
        use_selfspec (`bool`, *optional*, defaults to `True`):
            Whether to generate with the self-speculative engine. `False` takes TRL's own path, untouched, and so does
            `use_vllm=True` or `use_transformers_continuous_batching=True`.

        > Parameters that control speculation

        selfspec_draft_qtype (`str`, *optional*, defaults to `"auto"`):
            optimum-quanto type of the drafter's Linear weights: `"qint4"`, `"qint8"`, `"qfloat8"`, or `"auto"` to
            choose by device and dtype.
        selfspec_num_speculative_tokens (`int` or `str`, *optional*, defaults to `"auto"`):
            Tokens drafted per round. An integer fixes the number, `"auto"` adapts it to the measured acceptance and
            costs, `0` runs the engine without speculation.
        selfspec_max_speculative_tokens (`int`, *optional*, defaults to `8`):
            Largest number of tokens that `"auto"` may draft per round.
        selfspec_max_active_sequences (`int`, *optional*):
            Speculate only while at most this many sequences are unfinished. If `None`, measured costs alone decide.
        selfspec_verification (`str`, *optional*, defaults to `"rejection"`):
            `"rejection"` accepts drafts by rejection sampling; `"coupled"` draws draft and target with the same noise,
            so that every sample is, token for token, the one plain sampling gives for that seed.
        selfspec_refresh_interval (`int`, *optional*, defaults to `1`):
            Requantize the drafter every this many optimizer steps. The target follows every step in any case.

        > Parameters that control the engine

        selfspec_max_batch_size (`int`, *optional*):
            Number of sequences decoded at once; further prompts wait and are admitted as others finish. If `None`, it
            follows from the free memory; on a GPU it is at most 256.
        selfspec_kv_memory_fraction (`float`, *optional*, defaults to `0.5`):
            How much of the memory that is free when a rollout starts may hold keys and values; the rest is for
            activations and logits. On a GPU, rows get pages as they grow: when there are none left, the newest rows
            are paused and computed again later, which changes no token and is logged as `selfspec/paused_rows`. If
            that happens often, lower `selfspec_max_batch_size` or raise this.
        selfspec_release_kv_cache (`bool`, *optional*, defaults to `True`):
            Whether to free the keys and values after each generation, so that training has the memory. `False` holds
            them for the next one.
        selfspec_cuda_graphs (`bool` or `str`, *optional*, defaults to `"auto"`):
            Whether to capture rounds in CUDA graphs. `"auto"` runs eagerly what can't be captured, after one warning;
            `True` raises there, and without a GPU.
        selfspec_quantize_lm_head (`bool`, *optional*, defaults to `True`):
            Whether to quantize the drafter's output head too.
    """

    use_selfspec: bool = field(
        default=True,
        metadata={
            "help": "Whether to generate with the self-speculative engine. `False` takes TRL's own path, untouched, "
            "and so does `use_vllm=True` or `use_transformers_continuous_batching=True`."
        },
    )
    selfspec_draft_qtype: str = field(
        default="auto",
        metadata={
            "help": "optimum-quanto type of the drafter's Linear weights: 'qint4', 'qint8', 'qfloat8', or 'auto' to "
            "choose by device and dtype."
        },
    )
    # HfArgumentParser gives one type to an argument. It picks `str` for these unions; `__post_init__` reads numbers.
    selfspec_num_speculative_tokens: int | str | None = field(
        default="auto",
        metadata={
            "help": "Tokens drafted per round. An integer fixes the number, 'auto' adapts it to the measured "
            "acceptance and costs, 0 runs the engine without speculation."
        },
    )
    selfspec_max_speculative_tokens: int = field(
        default=8,
        metadata={"help": "Largest number of tokens that 'auto' may draft per round."},
    )
    selfspec_max_active_sequences: int | None = field(
        default=None,
        metadata={
            "help": "Speculate only while at most this many sequences are unfinished. If `None`, measured costs alone "
            "decide."
        },
    )
    selfspec_verification: str = field(
        default="rejection",
        metadata={
            "help": "'rejection' accepts drafts by rejection sampling; 'coupled' draws draft and target with the same "
            "noise, so that every sample is, token for token, the one plain sampling gives for that seed.",
        },
    )
    selfspec_refresh_interval: int = field(
        default=1,
        metadata={
            "help": "Requantize the drafter every this many optimizer steps. The target follows every step in any "
            "case."
        },
    )
    selfspec_max_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of sequences decoded at once; further prompts wait and are admitted as others finish. If "
            "`None`, it follows from the free memory; on a GPU it is at most 256."
        },
    )
    selfspec_kv_memory_fraction: float = field(
        default=0.5,
        metadata={
            "help": "How much of the memory that is free when a rollout starts may hold keys and values. When a GPU's "
            "pages run out, the newest rows are paused and computed again later, which changes no token."
        },
    )
    selfspec_release_kv_cache: bool = field(
        default=True,
        metadata={"help": "Whether to free the keys and values after each generation, for training to use."},
    )
    selfspec_cuda_graphs: int | str | None = field(
        default="auto",
        metadata={"help": "Whether to capture rounds in CUDA graphs: 'auto', true or false."},
    )
    selfspec_quantize_lm_head: bool = field(
        default=True,
        metadata={"help": "Whether to quantize the drafter's output head too."},
    )

    def __post_init__(self) -> None:
        self.selfspec_num_speculative_tokens = _from_text(self.selfspec_num_speculative_tokens)
        self.selfspec_cuda_graphs = _from_text(self.selfspec_cuda_graphs)
        self.options()
        super().__post_init__()  # type: ignore[misc]  # the TRL config this class is mixed into

    def options(self) -> SelfSpecOptions:
        """
        The engine's options.

        Raises:
            `ValueError`: for a value that is not possible, naming the field of this config.
        """
        values = {name: getattr(self, _PREFIX + name) for name in _OPTION_NAMES}
        try:
            return SelfSpecOptions(**values)
        except ValueError as error:
            names = "|".join(_OPTION_NAMES)
            raise ValueError(re.sub(rf"\b(?<!{_PREFIX})({names})\b", rf"{_PREFIX}\1", str(error))) from None


@dataclass
class SelfSpecGRPOConfig(SelfSpecConfigMixin, GRPOConfig):
    r"""
    Configuration class for [`SelfSpecGRPOTrainer`].

    It has every parameter of [`~trl.GRPOConfig`], with its default, and those of [`SelfSpecConfigMixin`], which say
    where the completions come from. For a full list of the others, see the documentation of [`~trl.GRPOConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.
    """


@dataclass
class SelfSpecRLOOConfig(SelfSpecConfigMixin, RLOOConfig):
    r"""
    Configuration class for [`SelfSpecRLOOTrainer`].

    It has every parameter of [`~trl.RLOOConfig`], with its default, and those of [`SelfSpecConfigMixin`], which say
    where the completions come from. For a full list of the others, see the documentation of [`~trl.RLOOConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.
    """
