"""The options of a speculative rollout: their descriptions, defaults and checks."""

from dataclasses import dataclass, field
from typing import Any, Literal


DRAFTERS = ("auto", "quantized", "suffix")
DRAFT_QTYPES = ("auto", "qint4", "qint8", "qfloat8")
VERIFICATIONS = ("rejection", "coupled")
MAX_DRAFT_LENGTH = 16


def _require(condition: bool, name: str, value: object, advice: str) -> None:
    if not condition:
        raise ValueError(f"`{name}={value!r}` is not supported: {advice}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    bounds = f"from {low} to {high}" if high is not None else f"of at least {low}"
    in_range = _is_int(value) and value >= low and (high is None or value <= high)  # type: ignore[operator]
    _require(in_range, name, value, f"use an integer {bounds}")


def _option(default: Any, text: str) -> Any:
    """A field with its description. `SelfSpecGRPOConfig` takes both over for its own field."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class SelfSpecOptions:
    """Options of [`SelfSpecEngine`]; each field says what it does.

    Raises:
        ValueError: for a value that is not supported; the message names the value and what to use.
    """

    draft_qtype: str = _option(
        "auto",
        "optimum-quanto type of the drafter's Linear weights: `qint4`, `qint8`, `qfloat8`, or `auto` to choose by "
        "device and dtype.",
    )
    num_speculative_tokens: int | Literal["auto"] = _option(
        "auto",
        "Tokens drafted per round. An integer fixes the number, `auto` adapts it to the measured acceptance and "
        "costs, 0 runs this engine without speculation.",
    )
    max_speculative_tokens: int = _option(8, "Largest number of tokens that `auto` may draft per round.")
    max_active_sequences: int | None = _option(
        None,
        "Speculate only while at most this many sequences are unfinished. If `None`, measured costs alone decide. "
        "With an integer `num_speculative_tokens`, counts alone decide, so runs repeat.",
    )
    verification: Literal["rejection", "coupled"] = _option(
        "rejection",
        "`rejection` (Leviathan et al. 2023, arXiv 2211.17192) keeps the policy's distribution. `coupled` (Daliri, "
        "Musco, Suresh 2024, arXiv 2408.07978) also draws draft and target with the same noise, so that every "
        "sample is, token for token, the one plain sampling gives for that seed.",
    )
    refresh_interval: int = _option(
        1, "Requantize the drafter every this many optimizer steps. The target is synced every step in any case."
    )
    max_batch_size: int | None = _option(
        None,
        "Number of sequences decoded at once; further prompts wait and are admitted as others finish. If `None`, "
        "it follows from the free memory; on a GPU it is at most 256.",
    )
    kv_memory_fraction: float = _option(
        0.5,
        "Share of the memory that is free when a rollout starts that keys and values may take; the rest is for "
        "activations and logits. On a GPU, rows get pages as they grow: when there are none left, the newest rows "
        "are preempted and computed again later, which changes no token and is logged as `selfspec/paused_rows`. "
        "If that happens often, lower `max_batch_size` or raise this.",
    )
    cuda_graphs: bool | Literal["auto"] = _option(
        "auto",
        "Whether to capture rounds in CUDA graphs. `auto` runs eagerly what can't be captured, after one warning; "
        "`True` raises there, and without a GPU.",
    )

    drafter: Literal["auto", "quantized", "suffix"] = _option(
        "auto",
        "What drafts: `quantized`, the policy itself with quantized weights; `suffix`, what the row, its siblings of "
        "the same prompt and the last epoch's completions said after the same tokens, which costs nothing and needs "
        "no memory for weights; `auto` lets measured costs and acceptance choose for every round. Where counts alone "
        "decide (see `max_active_sequences`), `auto` is `quantized`.",
    )
    history: bool = _option(
        True,
        "Keep the newest completions of each prompt, on the host, for `suffix` drafts of the next epoch: at most 64 "
        "million tokens. They never change a sample, so checkpoints need not hold them.",
    )

    def __post_init__(self) -> None:
        _require(
            self.draft_qtype in DRAFT_QTYPES, "draft_qtype", self.draft_qtype, f"use one of {', '.join(DRAFT_QTYPES)}"
        )
        _require(self.drafter in DRAFTERS, "drafter", self.drafter, f"use one of {', '.join(DRAFTERS)}")
        _require(isinstance(self.history, bool), "history", self.history, "use a bool")
        if self.num_speculative_tokens != "auto":
            _require(
                _is_int(self.num_speculative_tokens) and 0 <= self.num_speculative_tokens <= MAX_DRAFT_LENGTH,
                "num_speculative_tokens",
                self.num_speculative_tokens,
                f'use "auto" or an integer from 0 (no speculation) to {MAX_DRAFT_LENGTH}',
            )
        _check_int("max_speculative_tokens", self.max_speculative_tokens, 1, MAX_DRAFT_LENGTH)
        if self.max_active_sequences is not None:
            _check_int("max_active_sequences", self.max_active_sequences, 1)
        _require(
            self.verification in VERIFICATIONS,
            "verification",
            self.verification,
            f"use one of {', '.join(VERIFICATIONS)}",
        )
        _check_int("refresh_interval", self.refresh_interval, 1)
        if self.max_batch_size is not None:
            _check_int("max_batch_size", self.max_batch_size, 1)
        fraction = self.kv_memory_fraction
        in_range = isinstance(fraction, float) and 0 < fraction < 1
        _require(in_range, "kv_memory_fraction", fraction, "use a float above 0 and below 1")
        _require(
            self.cuda_graphs == "auto" or isinstance(self.cuda_graphs, bool),
            "cuda_graphs",
            self.cuda_graphs,
            'use "auto" or a bool',
        )

    @property
    def longest_draft(self) -> int:
        """The largest draft length these options can lead to."""
        return self.max_speculative_tokens if self.num_speculative_tokens == "auto" else self.num_speculative_tokens

    @property
    def keeps_history(self) -> bool:
        """Whether earlier completions can be of any use to these options."""
        return self.history and self.drafter != "quantized" and self.longest_draft > 0
