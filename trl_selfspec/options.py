"""What a user may choose about a speculative rollout, validated when it is written down."""

from dataclasses import dataclass
from typing import Literal


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


@dataclass(frozen=True)
class SelfSpecOptions:
    """Options of [`SelfSpecEngine`].

    Args:
        draft_qtype: quanto type of the drafter's Linear weights; `"auto"` chooses by device and dtype.
        num_speculative_tokens: draft length. An int fixes it, `"auto"` adapts it to live acceptance and measured
            costs, 0 runs this engine without speculation (the baseline switch).
        max_speculative_tokens: upper end for `"auto"`.
        max_active_sequences: speculate only while at most this many sequences are unfinished; `None` decides from
            measured costs alone. With an int `num_speculative_tokens`, decisions then use counts alone and repeat.
        verification: `"rejection"` (Leviathan et al. 2023, arXiv 2211.17192) keeps the policy's law; `"coupled"`
            (Daliri, Musco, Suresh 2024, arXiv 2408.07978) also keeps every sample token for token, whatever the
            draft length.
        refresh_interval: requantize the drafter every this many optimizer steps (the target follows every step).
        max_batch_size: rows decoded at once; further prompts wait and are admitted as rows finish. `None`: on a GPU up
            to 256, as far as the pages of keys and values suffice; on a CPU as many as fit at their full length.
        kv_memory_fraction: how much of the memory that is free when a rollout starts may hold keys and values; the
            rest is for activations, logits and whatever else runs. On a GPU, rows get pages as they grow: when there
            are none left, the newest rows are paused and computed again later (`stats.paused_rows`).
        release_kv_cache: on a GPU, free the keys and values after each `generate` (after the last turn of a
            conversation with `keep`), so that training has the memory. `False` holds them until `release`. On a CPU
            `generate` holds them in any case; either way the trainers follow it after each generation.
        cuda_graphs: capture rounds on CUDA. `"auto"` runs eagerly what can't be captured, after one warning; `True`
            raises instead.
        quantize_lm_head: quantize the drafter's output head too.

    Raises:
        ValueError: for a value outside these ranges; says what was given and what to use.
    """

    draft_qtype: str = "auto"
    num_speculative_tokens: int | Literal["auto"] = "auto"
    max_speculative_tokens: int = 8
    max_active_sequences: int | None = None
    verification: Literal["rejection", "coupled"] = "rejection"
    refresh_interval: int = 1
    max_batch_size: int | None = None
    kv_memory_fraction: float = 0.5
    release_kv_cache: bool = True
    cuda_graphs: bool | Literal["auto"] = "auto"
    quantize_lm_head: bool = True

    def __post_init__(self) -> None:
        _require(
            self.draft_qtype in DRAFT_QTYPES, "draft_qtype", self.draft_qtype, f"use one of {', '.join(DRAFT_QTYPES)}"
        )
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
        _require(isinstance(self.release_kv_cache, bool), "release_kv_cache", self.release_kv_cache, "use a bool")
        _require(isinstance(self.quantize_lm_head, bool), "quantize_lm_head", self.quantize_lm_head, "use a bool")

    @property
    def longest_draft(self) -> int:
        """The largest draft length these options can lead to."""
        return self.max_speculative_tokens if self.num_speculative_tokens == "auto" else self.num_speculative_tokens
