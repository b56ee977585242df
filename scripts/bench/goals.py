"""What is to be measured on a GPU, and the goals held against it: data, and the few functions that read a result.

Random weights throughout; acceptance is synthetic. Goals were set for one H200.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal


Result = dict[str, Any]
ACCEPTANCE = 0.97
VERIFIED_TOKENS = 8


@dataclass(frozen=True)
class Measurement:
    """One `bench_rollout.py run` in a process of its own."""

    name: str  # of its result file
    part: str  # of the table: parts take at most 8 minutes each
    preset: str
    rows: int
    max_new_tokens: int
    limit_s: int  # after which it is given up
    engines: str = "plain,selfspec"
    length_profile: str = "uniform"
    prompt_length: int = 64
    acceptance: float | None = ACCEPTANCE
    draft_length: int | None = None  # in every round, whatever it costs; None leaves it to the gate
    caches: Literal["empty", "kept"] | None = None  # of compiled kernels: fresh ones, or those of the one before

    def arguments(self) -> list[str]:
        """For `bench_rollout.py run`, but for the device."""
        options: dict[str, Any] = {
            "preset": self.preset,
            "engines": self.engines,
            "rows": self.rows,
            "max-new-tokens": self.max_new_tokens,
            "length-profile": self.length_profile,
            "prompt-length": self.prompt_length,
            "synthetic-acceptance": self.acceptance,
            "num-speculative-tokens": self.draft_length,
            "max-active-sequences": None if self.draft_length is None else self.rows,
        }
        return [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]

    def tiny(self) -> "Measurement":
        """The same for a CPU in seconds."""
        return replace(self, preset="tiny", rows=min(self.rows, 2), max_new_tokens=16, prompt_length=8)


@dataclass(frozen=True)
class Goal:
    """A bound on the worst of some measurements."""

    text: str
    needs: tuple[str, ...]
    figure: Callable[[Result], float]
    bound: float
    at_least: bool = True
    aim: bool = False  # wished for, not promised

    def measured(self, results: Sequence[Result]) -> float:
        return (min if self.at_least else max)(self.figure(result) for result in results)

    def is_met(self, measured: float) -> bool:
        return measured >= self.bound if self.at_least else measured <= self.bound

    @property
    def bound_text(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}{' (aim)' if self.aim else ''}"


def ratio(pair: str) -> Callable[[Result], float]:
    """How many times faster, by the medians of one run."""
    fast, slow = pair.split("/")
    return lambda result: _median_s(result, slow) / _median_s(result, fast)


def _median_s(result: Result, engine: str) -> float:
    return result["engines"][engine]["seconds"]["median"]


def in_plain_rounds(figure: str) -> Callable[[Result], float]:
    """A figure of selfspec's in milliseconds over the plain engine's round."""
    return lambda result: result["engines"]["selfspec"][figure] / result["engines"]["plain"]["plain_round_ms"]


def in_reads_of_the_weights(result: Result) -> float:
    """A plain round by the wall clock over the time that all parameters take at the bandwidth of a device copy."""
    bandwidth = result["provenance"]["hardware"]["measured_copy_bytes_per_s"]
    read_ms = 1e3 * result["workload"]["weight_bytes"] / bandwidth
    return result["engines"]["plain"]["wall_ms_per_round"] / read_ms


def startup_s(result: Result) -> float:
    return result["engines"]["selfspec"]["startup_s"]


def requantize_s(result: Result) -> float:
    return result["engines"]["selfspec"]["requantize_s"]["median"]


def _stock(preset: str) -> Measurement:
    part = f"{preset}-stock"
    return Measurement(part, part, preset, 8, 256, limit_s=240, engines="stock,plain", acceptance=None)


def _steps(preset: str, rows: int, part: str) -> Measurement:
    """All drafts accepted, so that rows stay together: each round is one of `rows` rows."""
    name = f"{preset}-steps{rows}"
    drafts = VERIFIED_TOKENS - 1
    return Measurement(
        name, part, preset, rows, 128, limit_s=120, prompt_length=1280, acceptance=1.0, draft_length=drafts
    )


def _rows(preset: str, rows: int, part: str, limit_s: int) -> Measurement:
    return Measurement(f"{preset}-rows{rows}", part, preset, rows, 384, limit_s)


MEASUREMENTS = (
    Measurement("7b-cold", "7b-startup", "7b", 8, 384, limit_s=240, engines="selfspec", caches="empty"),
    Measurement("7b-warm", "7b-startup", "7b", 8, 384, limit_s=180, engines="selfspec", caches="kept"),
    _steps("7b", 8, "7b-steps"),
    _steps("7b", 1, "7b-steps"),
    _stock("7b"),
    _stock("1.5b"),
    *(_rows("7b", rows, "7b-rows", limit_s=150) for rows in (1, 8, 32)),
    *(_rows("7b", rows, "7b-many-rows", limit_s=150) for rows in (64, 128, 256)),
    Measurement("7b-longtail", "7b-longtail", "7b", 128, 8192, limit_s=480, length_profile="longtail"),
    Measurement(
        "7b-vllm", "7b-vllm", "7b", 128, 4096, limit_s=480, engines="vllm,plain,selfspec", length_profile="longtail"
    ),
    *(_steps("32b", rows, "32b-steps") for rows in (8, 1)),
    *(_rows("32b", rows, "32b-rows", limit_s=200) for rows in (8, 1)),
)
PARTS = tuple(dict.fromkeys(measurement.part for measurement in MEASUREMENTS))

STEPS_7B, STEPS_32B = ("7b-steps8", "7b-steps1"), ("32b-steps8", "32b-steps1")
ALL_ROWS = tuple(f"7b-rows{rows}" for rows in (1, 8, 32, 64, 128, 256))
GOALS = (
    Goal("plain ÷ stock, 7B, 8 rows", ("7b-stock",), ratio("plain/stock"), 8),
    Goal("plain ÷ stock, 1.5B, 8 rows", ("1.5b-stock",), ratio("plain/stock"), 18),
    Goal("plain step in reads of the weights, 7B, 8 rows, 1k", STEPS_7B[:1], in_reads_of_the_weights, 1.45, False),
    Goal("draft step in plain steps, 7B, up to 8 rows", STEPS_7B, in_plain_rounds("draft_step_ms"), 0.60, False),
    Goal("draft step in plain steps, 32B, up to 8 rows", STEPS_32B, in_plain_rounds("draft_step_ms"), 0.45, False),
    Goal("verifying 8 tokens in plain steps, 7B", STEPS_7B, in_plain_rounds("verify_ms"), 1.10, False),
    Goal("selfspec ÷ plain, 7B, up to 8 rows", ALL_ROWS[:2], ratio("selfspec/plain"), 1.35),
    Goal("selfspec ÷ plain, 32B, up to 8 rows", ("32b-rows8", "32b-rows1"), ratio("selfspec/plain"), 1.6),
    Goal("selfspec ÷ plain, 7B, long tail of 128 rows", ("7b-longtail",), ratio("selfspec/plain"), 1.25),
    Goal("selfspec ÷ plain, 7B, worst of 1 to 256 rows", ALL_ROWS, ratio("selfspec/plain"), 0.98),
    Goal("plain ÷ vLLM, 7B, long tail of 128 rows", ("7b-vllm",), ratio("plain/vllm"), 0.9, aim=True),
    Goal("selfspec ÷ vLLM, 7B, long tail of 128 rows", ("7b-vllm",), ratio("selfspec/vllm"), 1.1, aim=True),
    Goal("start-up, 7B, nothing cached, s", ("7b-cold",), startup_s, 60, False),
    Goal("start-up, 7B, warm caches, s", ("7b-warm",), startup_s, 15, False),
    Goal("requantizing, 7B, s", STEPS_7B[:1], requantize_s, 0.3, False),
)
