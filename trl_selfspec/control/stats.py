"""Counters of a rollout, and the ratios of them that are logged.

Rollouts, tool-loop calls and ranks merge by addition, so every ratio is a ratio of sums. `acceptance_rate` is
accepted / drafted. `alpha` is accepted / examined, where a draft token is examined if all earlier ones of its round
were accepted; speed formulas need `alpha`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import sqrt

from trl_selfspec.control.counters import Counters
from trl_selfspec.options import MAX_DRAFT_LENGTH


MIN_SEGMENTS = 3  # with fewer, the error of the estimated speed-up is unknown
MIN_COMPARED = 0.5  # share of the seconds of speculative rounds that segments must cover
ANCHOR_ROUNDS = 4  # a segment's price averages at most so many consecutive plain rounds


def _per_position() -> list[int]:
    return [0] * MAX_DRAFT_LENGTH


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


def _ratios(accepted: Sequence[int], drafted: Sequence[int]) -> list[float]:
    return [a / d for a, d in zip(accepted, drafted, strict=True) if d]


def _by_position(prefix: str, rates: Sequence[float]) -> dict[str, float]:
    return {f"{prefix}acceptance_rate_pos_{i}": rate for i, rate in enumerate(rates)}


@dataclass
class DrafterStats(Counters):
    """Counters of the rounds of one drafter."""

    rounds: int = 0
    draft_s: float = 0.0
    drafted_per_position: list[int] = field(default_factory=_per_position)
    accepted_per_position: list[int] = field(default_factory=_per_position)

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens per row and round, the recovered or bonus token included."""
        accepted = _ratio(sum(self.accepted_per_position), self.drafted_per_position[0])
        return None if accepted is None else 1.0 + accepted

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """Accepted / drafted for each position (from 0) that was ever drafted."""
        return _ratios(self.accepted_per_position, self.drafted_per_position)


@dataclass
class RolloutStats(Counters):
    """Raw counters and seconds of one or more rollouts.

    A *round* is one target forward for all active rows; a *row-round* is one row's share of it. Seconds are of one
    process. `rollout_s` is the wall time of `generate` and holds `prefill_s`, `plain_s`, `draft_s` and `verify_s`, but
    not `requantize_s`, which is a part of `refresh_s`. Ratios are `None` where their denominator is 0.
    """

    num_rows: int = 0
    prompt_tokens: int = 0
    reused_prompt_tokens: int = 0  # whose keys and values came from the prefix cache
    completion_tokens: int = 0
    plain_rounds: int = 0
    plain_row_rounds: int = 0
    num_rounds_speculative: int = 0
    draft_steps: int = 0  # tokens drafted per row
    drafted_per_position: list[int] = field(default_factory=_per_position)
    examined_per_position: list[int] = field(default_factory=_per_position)
    accepted_per_position: list[int] = field(default_factory=_per_position)
    by_drafter: dict[str, DrafterStats] = field(default_factory=dict, metadata={"values": DrafterStats})
    history_rows: int = 0  # whose prompt had completions of earlier rollouts to draft from
    history_tokens: int = 0  # kept for later rollouts
    toggle_active_sequences_sum: int = 0  # rows unfinished when speculation first began in a rollout
    toggle_count: int = 0  # rollouts in which it began
    draft_nan_rounds: int = 0
    paused_rows: int = 0  # preemptions: a row's pages were given to older rows, and it resumed later
    recomputed_tokens: int = 0  # whose keys and values were computed again after a preemption
    rollout_s: float = 0.0
    prefill_s: float = 0.0
    plain_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    requantize_s: float = 0.0  # bringing the drafter up to date, building it included
    refresh_s: float = 0.0  # syncing the replica with the policy's weights, and requantizing
    # Sums over segments: plain rounds and the speculative ones nearest to them in time. See `PlainComparison`.
    segments: int = 0
    segment_s: float = 0.0  # of the speculative rounds
    segment_plain_s: float = 0.0  # of plain rounds for the same tokens, estimated
    segment_sq: float = 0.0  # squares and products of the two, for the error
    segment_plain_sq: float = 0.0
    segment_product: float = 0.0
    drafter_bytes: int = 0
    kv_bytes: int = 0  # pages of keys and values, in use or not
    graph_pool_bytes: int = 0  # the memory pool of CUDA graphs

    def add_plain_round(self, rows: int, seconds: float) -> None:
        self.plain_rounds += 1
        self.plain_row_rounds += rows
        self.plain_s += seconds

    def add_idle_round(self, seconds: float) -> None:
        """A round that was launched before the host knew that all its rows had ended."""
        self.plain_s += seconds

    def add_speculative_round(
        self,
        drafter: str,
        rows: int,
        gamma: int,
        draft_s: float,
        verify_s: float,
        accepted: Sequence[int],  # per position, over rows
        examined: Sequence[int],  # per position, over rows
    ) -> None:
        self.num_rounds_speculative += 1
        self.draft_steps += gamma
        for i in range(gamma):
            self.drafted_per_position[i] += rows
            self.examined_per_position[i] += examined[i]
            self.accepted_per_position[i] += accepted[i]
        self.draft_s += draft_s
        self.verify_s += verify_s
        own = self.by_drafter.setdefault(drafter, DrafterStats())
        own.rounds += 1
        own.draft_s += draft_s
        for i in range(gamma):
            own.drafted_per_position[i] += rows
            own.accepted_per_position[i] += accepted[i]

    def add_segment(self, seconds: float, plain_s: float) -> None:
        """Adds the seconds of speculative rounds, and those of plain rounds of the same minute for their tokens."""
        self.segments += 1
        self.segment_s += seconds
        self.segment_plain_s += plain_s
        self.segment_sq += seconds * seconds
        self.segment_plain_sq += plain_s * plain_s
        self.segment_product += seconds * plain_s

    @property
    def num_drafts(self) -> int:
        """Row-rounds that had a draft."""
        return self.drafted_per_position[0]

    @property
    def num_draft_tokens(self) -> int:
        return sum(self.drafted_per_position)

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.accepted_per_position)

    @property
    def acceptance_rate(self) -> float | None:
        return _ratio(self.num_accepted_tokens, self.num_draft_tokens)

    @property
    def alpha(self) -> float | None:
        return _ratio(self.num_accepted_tokens, sum(self.examined_per_position))

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens per row and speculative round, the recovered or bonus token included."""
        accepted = _ratio(self.num_accepted_tokens, self.num_drafts)
        return None if accepted is None else 1.0 + accepted

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """Accepted / drafted for each position (from 0) that was ever drafted."""
        return _ratios(self.accepted_per_position, self.drafted_per_position)

    @property
    def mean_num_speculative_tokens(self) -> float | None:
        """Mean draft length over the row-rounds that had a draft."""
        return _ratio(self.num_draft_tokens, self.num_drafts)

    @property
    def speculative_round_fraction(self) -> float | None:
        return _ratio(self.num_rounds_speculative, self.plain_rounds + self.num_rounds_speculative)

    @property
    def toggle_active_sequences(self) -> float | None:
        return _ratio(self.toggle_active_sequences_sum, self.toggle_count)

    @property
    def tokens_per_s(self) -> float | None:
        """Completion tokens per second of rollout and process."""
        return _ratio(self.completion_tokens, self.rollout_s)

    @property
    def estimated_speedup(self) -> float | None:
        """Seconds that this rollout would have taken in plain rounds / seconds it took, refreshes included.

        The plain rollout has the same prefill, scheduling and sync with the policy, and no drafter. Its seconds for
        the tokens of speculative rounds are those of the plain rounds next to them. Without speculation the ratio is
        1; it is `None` where too few plain rounds were sampled.
        """
        speculative_s = self.draft_s + self.verify_s
        ratio = self._plain_ratio if speculative_s else 0.0
        if ratio is None:
            return None
        total_s = self.rollout_s + self.refresh_s
        return _ratio(total_s - self.requantize_s + (ratio - 1) * speculative_s, total_s)

    @property
    def estimated_speedup_error(self) -> float | None:
        """Standard error of `estimated_speedup`, by the spread of the ratio over segments."""
        speculative_s = self.draft_s + self.verify_s
        if not speculative_s:
            return None if self.estimated_speedup is None else 0.0
        if (ratio := self._plain_ratio) is None:
            return None
        squares = self.segment_plain_sq - 2 * ratio * self.segment_product + ratio**2 * self.segment_sq
        variance = max(squares, 0.0) * self.segments / (self.segments - 1) / self.segment_s**2
        return _ratio(sqrt(variance) * speculative_s, self.rollout_s + self.refresh_s)

    @property
    def _plain_ratio(self) -> float | None:
        """Seconds of plain rounds per second of speculative ones, for the same tokens."""
        enough = self.segment_s >= MIN_COMPARED * (self.draft_s + self.verify_s)
        return self.segment_plain_s / self.segment_s if enough and self.segments >= MIN_SEGMENTS else None

    def metrics(self, num_ranks: int = 1, num_rollouts: int | None = None) -> dict[str, float]:
        """The metrics that a trainer logs; a ratio without data is left out.

        Args:
            num_ranks: processes whose stats were summed; `tokens_per_s` is their total.
            num_rollouts: of all ranks; seconds are means over them. `None`: one per rank.
        """
        num_rollouts = num_rollouts or num_ranks
        values: dict[str, float | None] = {
            "acceptance_rate": self.acceptance_rate,
            "alpha": self.alpha,
            "mean_acceptance_length": self.mean_acceptance_length,
            "num_speculative_tokens": self.mean_num_speculative_tokens,
            "speculative_round_fraction": self.speculative_round_fraction,
            "toggle_active_sequences": self.toggle_active_sequences,
            "tokens_per_s": None if self.tokens_per_s is None else self.tokens_per_s * num_ranks,
            "rollout_s": self.rollout_s / num_rollouts,
            "refresh_s": self.refresh_s / num_rollouts,
            "estimated_speedup": self.estimated_speedup,
            "estimated_speedup_error": self.estimated_speedup_error,
            "reused_prompt_tokens": float(self.reused_prompt_tokens),
            "drafter_bytes": float(self.drafter_bytes),
            "kv_bytes": float(self.kv_bytes),
            "graph_pool_bytes": float(self.graph_pool_bytes) or None,  # left out where rounds are not captured
            "paused_rows": float(self.paused_rows) or None,  # left out as long as memory suffices
            "recomputed_tokens": float(self.recomputed_tokens) or None,
            "draft_nan_rounds": float(self.draft_nan_rounds),
        }
        if self.history_tokens:
            values["history_hit_fraction"] = _ratio(self.history_rows, self.num_rows)
            values["history_tokens"] = float(self.history_tokens)
        values |= _by_position("", self.acceptance_rate_per_position)
        for name, drafter in self.by_drafter.items():
            values[f"{name}_round_fraction"] = drafter.rounds / (self.plain_rounds + self.num_rounds_speculative)
            values[f"{name}_mean_acceptance_length"] = drafter.mean_acceptance_length
            values[f"{name}_draft_s"] = drafter.draft_s / num_rollouts
            values |= _by_position(f"{name}_", drafter.acceptance_rate_per_position)
        return {f"selfspec/{name}": value for name, value in values.items() if value is not None}


class PlainComparison:
    """Compares a rollout's speculative rounds with the plain rounds nearest to them in time, so that drift cancels.

    A segment is a run of plain rounds, up to `ANCHOR_ROUNDS` of them, with the speculative rounds on either side that
    are nearer to it than to the next run. Each run counts in one segment, so that errors of segments are independent.
    Rounds of different batch sizes are compared through the usual seconds of plain rounds of these sizes, of which
    only the ratio matters.

    Args:
        stats: where segments are added.
    """

    def __init__(self, stats: RolloutStats) -> None:
        self._stats = stats
        self._plain: deque[float] = deque(maxlen=ANCHOR_ROUNDS)  # seconds / usual seconds, of the last run
        self._before: list[tuple[float, float]] = []  # speculative rounds nearer to this run than to the one before
        self._after: list[tuple[float, float]] = []  # since this run

    def add_plain_round(self, seconds: float, usual_s: float | None) -> None:
        if usual_s is None:
            return
        if self._after:
            half = self._half() if self._plain else 0
            self._close(self._before + self._after[:half])
            self._before, self._after = self._after[half:], []
            self._plain.clear()
        self._plain.append(seconds / usual_s)
        if self._before and len(self._plain) == ANCHOR_ROUNDS:  # a long run's end may be another time
            self._close(self._before)
            self._before = []

    def add_speculative_round(
        self,
        seconds: float,
        tokens: float,  # committed per row
        usual_s: float | None,  # usual seconds of a plain round over as many rows
    ) -> None:
        if usual_s is not None:
            self._after.append((seconds, tokens * usual_s))

    def end(self) -> None:
        """Ends the rollout: its last rounds belong to the last run of plain rounds."""
        self._close(self._before + self._after)
        self._before, self._after = [], []

    def _half(self) -> int:
        """The number of the last rounds that lie in the first half of their seconds."""
        ends = list(accumulate(seconds for seconds, _ in self._after))
        return sum(end <= ends[-1] / 2 for end in ends)

    def _close(self, rounds: list[tuple[float, float]]) -> None:
        if rounds and self._plain:
            pace = sum(self._plain) / len(self._plain)
            seconds, usual_s = (sum(values) for values in zip(*rounds, strict=True))
            self._stats.add_segment(seconds, pace * usual_s)
