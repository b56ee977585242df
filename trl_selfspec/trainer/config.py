"""Configuration of the TRL trainers that draw their rollouts from [`SelfSpecEngine`]."""

import json
import re
import textwrap
from dataclasses import dataclass, field, fields
from typing import Any

from trl import GRPOConfig, RLOOConfig

from trl_selfspec.options import SelfSpecOptions


_PREFIX = "selfspec_"
_OPTIONS = {option.name: option for option in fields(SelfSpecOptions)}
_OWN_NAME = re.compile(rf"(?<=`)({'|'.join(_OPTIONS)})\b")  # quoted: some are ordinary words, as `history` is


def _prefixed(text: str) -> str:
    """Names of options as names of this config's fields."""
    return _OWN_NAME.sub(rf"{_PREFIX}\1", text)


def _option(name: str) -> Any:
    """A field with the default and the description of one of the engine's options."""
    option = _OPTIONS[name]
    return field(default=option.default, metadata={"help": _prefixed(option.metadata["help"])})


def _from_text(value: Any) -> Any:
    """Parses an integer or a boolean from the text of a command line; returns every other value unchanged."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    return {"true": True, "false": False}.get(text, text)


def _with_parameters(cls: type) -> type:
    """Adds the fields of a dataclass to its docstring, in TRL's form."""
    lines = ["\n\n    Parameters:"]
    for parameter in fields(cls):
        option = _OPTIONS.get(parameter.name.removeprefix(_PREFIX), parameter)  # its types are not the parser's
        types = re.findall(r"\b(?:bool|int|float|str|Literal)\b", str(option.type))
        kind = " or ".join(f"`{'str' if name == 'Literal' else name}`" for name in types)
        default = json.dumps(parameter.default) if isinstance(parameter.default, str) else str(parameter.default)
        defaults = "" if parameter.default is None else f", defaults to `{default}`"
        lines.append(f"        {parameter.name} ({kind}, *optional*{defaults}):")
        lines += textwrap.wrap(parameter.metadata["help"], 119, initial_indent=" " * 12, subsequent_indent=" " * 12)
    cls.__doc__ = (cls.__doc__ or "").rstrip() + "\n".join(lines) + "\n    "
    return cls


@_with_parameters
@dataclass
class SelfSpecConfigMixin:
    r"""
    The fields that [`SelfSpecMixin`] reads, for any TRL config: `class MyConfig(SelfSpecConfigMixin, RLOOConfig)`.

    Those with the prefix `selfspec_` are the engine's, and described in [`SelfSpecOptions`].
    """

    use_selfspec: bool = field(
        default=True,
        metadata={
            "help": "Whether to generate with the self-speculative engine. `False` takes TRL's own path, untouched, "
            "and so does `use_vllm=True` or `use_transformers_continuous_batching=True`."
        },
    )
    selfspec_draft_qtype: str = _option("draft_qtype")
    # HfArgumentParser gives one type to an argument. It picks `str` for these unions; `__post_init__` reads numbers.
    selfspec_num_speculative_tokens: int | str | None = _option("num_speculative_tokens")
    selfspec_max_speculative_tokens: int = _option("max_speculative_tokens")
    selfspec_max_active_sequences: int | None = _option("max_active_sequences")
    selfspec_verification: str = _option("verification")
    selfspec_refresh_interval: int = _option("refresh_interval")
    selfspec_max_batch_size: int | None = _option("max_batch_size")
    selfspec_kv_memory_fraction: float = _option("kv_memory_fraction")
    selfspec_cuda_graphs: int | str | None = _option("cuda_graphs")
    selfspec_drafter: str = _option("drafter")
    selfspec_history: bool = _option("history")

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
        values = {name: getattr(self, _PREFIX + name) for name in _OPTIONS}
        try:
            return SelfSpecOptions(**values)
        except ValueError as error:
            raise ValueError(_prefixed(str(error))) from None


@dataclass
class SelfSpecGRPOConfig(SelfSpecConfigMixin, GRPOConfig):
    r"""
    Configuration class for [`SelfSpecGRPOTrainer`].

    It has every parameter of [`~trl.GRPOConfig`], with its default, and those of [`SelfSpecConfigMixin`], which
    control the source of the completions. For a full list of the others, see the documentation of [`~trl.GRPOConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.
    """


@dataclass
class SelfSpecRLOOConfig(SelfSpecConfigMixin, RLOOConfig):
    r"""
    Configuration class for [`SelfSpecRLOOTrainer`].

    It has every parameter of [`~trl.RLOOConfig`], with its default, and those of [`SelfSpecConfigMixin`], which
    control the source of the completions. For a full list of the others, see the documentation of [`~trl.RLOOConfig`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.
    """
