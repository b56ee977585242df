"""Counters of a rollout, and the ratios people read.

Everything stored is a sum (but for `*_bytes`, which are maxima), so rollouts, tool-loop calls and ranks merge by
addition and every ratio is a ratio of sums. `acceptance_rate` is accepted / drafted; `alpha` is accepted /
examined, where a draft token is examined if all earlier ones of its round were accepted. Only `alpha` belongs into
speed formulas.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from math import sqrt
from typing import Self

from trl_selfspec.options import MAX_DRAFT_LENGTH


MIN_SEGMENTS = 3  # below, an estimate's error can't be told
MIN_COMPARED = 0.5  # of the seconds of speculative rounds; with less, the others might be different ones
ANCHOR_ROUNDS = 4  # consecutive plain rounds that one price is averaged over


def _per_position() -> list[int]:
    return [0] * MAX_DRAFT_LENGTH


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


@dataclass
class RolloutStats:
    """Raw counters and seconds of one or more rollouts.

    A *round* is one target forward for all active rows; a *row-round* is one row's share of it. Seconds are of one
    process. `rollout_s` is the wall time of `generate` and holds `prefill_s`, `plain_s`, `draft_s` and `verify_s`, but
    not `requantize_s`, which is a part of `refresh_s`. Ratios are `None` where their denominator is 0.
    """

    num_rows: int = 0
    prompt_tokens: int = 0
    reused_prompt_tokens: int = 0  # whose keys an earlier request had left in the cache
    completion_tokens: int = 0
    plain_rounds: int = 0
    plain_row_rounds: int = 0
    num_rounds_speculative: int = 0
    draft_steps: int = 0  # forwards of the drafter
    drafted_per_position: list[int] = field(default_factory=_per_position)
    examined_per_position: list[int] = field(default_factory=_per_position)
    accepted_per_position: list[int] = field(default_factory=_per_position)
    toggle_active_sequences_sum: int = 0  # rows unfinished when speculation first began in a rollout
    toggle_count: int = 0  # rollouts in which it began
    draft_nan_rounds: int = 0
    paused_rows: int = 0  # times that a row gave its pages to older ones, to go on later
    recomputed_tokens: int = 0  # whose keys were computed again because of that
    rollout_s: float = 0.0
    prefill_s: float = 0.0
    plain_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    requantize_s: float = 0.0  # bringing the drafter up to date, building it included
    refresh_s: float = 0.0  # following the policy's weights, which plain rounds need too, and requantizing
    # Sums over segments: plain rounds and the speculative ones nearest to them in time. See `PlainComparison`.
    segments: int = 0
    segment_s: float = 0.0  # of the speculative rounds
    segment_plain_s: float = 0.0  # what plain rounds would have taken for their tokens
    segment_sq: float = 0.0  # squares and products of the two, for the error
    segment_plain_sq: float = 0.0
    segment_product: float = 0.0
    drafter_bytes: int = 0
    kv_bytes: int = 0  # pages of keys and values, in use or not
    graph_pool_bytes: int = 0  # what captured rounds compute with

    def add_plain_round(self, rows: int, seconds: float) -> None:
        self.plain_rounds += 1
        self.plain_row_rounds += rows
        self.plain_s += seconds

    def add_idle_round(self, seconds: float) -> None:
        """One that was launched before the host knew that all its rows had ended."""
        self.plain_s += seconds

    def add_speculative_round(
        self,
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

    def add_segment(self, seconds: float, plain_s: float) -> None:
        """Speculative rounds, and what plain rounds of the same minute would have taken for their tokens."""
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
        pairs = zip(self.accepted_per_position, self.drafted_per_position, strict=True)
        return [accepted / drafted for accepted, drafted in pairs if drafted]

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

        The plain rollout keeps what both share (prefill, scheduling, following the policy), needs no drafter, and
        takes for the tokens of speculative rounds what the plain rounds next to them took. Without speculation it is
        1; `None` where too few plain rounds were sampled to say.
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

    def __iadd__(self, other: Self) -> Self:
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name in _MAXIMA:
                setattr(self, f.name, max(mine, theirs))
            elif isinstance(mine, list):
                setattr(self, f.name, [a + b for a, b in zip(mine, theirs, strict=True)])
            else:
                setattr(self, f.name, mine + theirs)
        return self

    def merge(self, other: Self) -> Self:
        """A new sum of both."""
        total = type(self)()
        total += self
        total += other
        return total

    def metrics(self, num_ranks: int = 1) -> dict[str, float]:
        """What a trainer logs; a ratio without data is left out.

        Args:
            num_ranks: Processes whose stats were summed. Seconds are means over them, `tokens_per_s` is their total.
        """
        values: dict[str, float | None] = {
            "acceptance_rate": self.acceptance_rate,
            "alpha": self.alpha,
            "mean_acceptance_length": self.mean_acceptance_length,
            "num_speculative_tokens": self.mean_num_speculative_tokens,
            "speculative_round_fraction": self.speculative_round_fraction,
            "toggle_active_sequences": self.toggle_active_sequences,
            "tokens_per_s": None if self.tokens_per_s is None else self.tokens_per_s * num_ranks,
            "rollout_s": self.rollout_s / num_ranks,
            "refresh_s": self.refresh_s / num_ranks,
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
        for i, rate in enumerate(self.acceptance_rate_per_position):
            values[f"acceptance_rate_pos_{i}"] = rate
        return {f"selfspec/{name}": value for name, value in values.items() if value is not None}

    def to_vector(self) -> list[float]:
        """All sums, in one fixed order and length, for an all-reduce; `maxima` have to be reduced apart."""
        vector: list[float] = []
        for f in _SUMMED:
            value = getattr(self, f)
            vector.extend(map(float, value) if isinstance(value, list) else [float(value)])
        return vector

    def maxima(self) -> list[int]:
        """What merges by maximum, in one fixed order and length."""
        return [getattr(self, name) for name in _MAXIMA]

    @classmethod
    def from_vector(cls, vector: Sequence[float], maxima: Sequence[int] = ()) -> Self:
        stats = cls()
        for name, value in zip(_MAXIMA, maxima, strict=False):
            setattr(stats, name, value)
        if len(vector) != len(stats.to_vector()):
            raise ValueError(f"{len(vector)} values are no RolloutStats, which hold {len(stats.to_vector())}.")
        values = iter(vector)
        for f in _SUMMED:
            value = getattr(stats, f)
            if isinstance(value, list):
                setattr(stats, f, [round(next(values)) for _ in value])
            else:
                setattr(stats, f, next(values) if isinstance(value, float) else round(next(values)))
        return stats


_MAXIMA = tuple(f.name for f in fields(RolloutStats) if f.name.endswith("_bytes"))
_SUMMED = tuple(f.name for f in fields(RolloutStats) if f.name not in _MAXIMA)


class PlainComparison:
    """Compares a rollout's speculative rounds with the plain rounds nearest to them in time, so that drift cancels.

    A segment is a run of plain rounds, up to `ANCHOR_ROUNDS` of them, with the speculative rounds on either side that
    are nearer to it than to the next run. Each run counts in one segment, so that segments err independently. Rounds
    of different sizes are compared by what plain rounds of these sizes usually take, of which only the ratio matters.

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
        tokens: float,  # kept per row
        usual_s: float | None,  # what a plain round over as many rows usually takes
    ) -> None:
        if usual_s is not None:
            self._after.append((seconds, tokens * usual_s))

    def end(self) -> None:
        """The rollout is over: the last rounds belong to the last run."""
        self._close(self._before + self._after)
        self._before, self._after = [], []

    def _half(self) -> int:
        """How many of the last rounds lie in the first half of their seconds."""
        ends = list(accumulate(seconds for seconds, _ in self._after))
        return sum(end <= ends[-1] / 2 for end in ends)

    def _close(self, rounds: list[tuple[float, float]]) -> None:
        if rounds and self._plain:
            pace = sum(self._plain) / len(self._plain)
            seconds, usual_s = (sum(values) for values in zip(*rounds, strict=True))
            self._stats.add_segment(seconds, pace * usual_s)
