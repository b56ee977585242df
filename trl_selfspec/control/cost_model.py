"""What rounds cost and how many drafts stand, estimated from a noisy machine and a changing policy."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from math import isfinite, log
from statistics import median_low
from typing import Any

from trl_selfspec.options import MAX_DRAFT_LENGTH


WINDOW = 9  # measurements per bucket: their median ignores 4 outliers and follows a change within 5 rounds
SETTLED = 4  # measurements of which the lower median outvotes two bad ones
REACH = 2.0  # a draft step's cost is known within this factor of a measured batch
PRIOR_ALPHA, PRIOR_WEIGHT = 0.8, 4.0  # 4-bit self-drafters reach 0.9 and more (arXiv 2606.18967); worth 4 tokens
SHRINK_WEIGHT = 8.0  # examined tokens at which a position trusts itself as much as the pool
SEED_WEIGHT = 64.0  # examined tokens the seed counts for


@lru_cache(maxsize=4096)
def bucket(n: int) -> int:
    """Nearest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    if n < 4:
        return n
    base = 1 << (n.bit_length() - 1)
    return min((base, base * 3 // 2, base * 2), key=lambda size: abs(size - n))


class CostCurve:
    """Seconds as a function of a count n, from noisy measurements.

    A bucket's estimate is the median of its last `WINDOW` measurements. Its first is warm-up (allocation, kernel
    choice, graph capture) and only used as an upper bound while there is a single other one, which may be an outlier.
    """

    def __init__(self) -> None:
        self._warm_up: dict[int, float] = {}
        self._samples: dict[int, deque[tuple[int, float]]] = {}
        self._estimates: dict[int, tuple[float, float]] = {}
        self._points: list[tuple[float, float]] = []  # estimates by n

    def add(self, n: int, seconds: float) -> None:
        key = bucket(n)
        if key not in self._warm_up:
            self._warm_up[key] = seconds
            return
        samples = self._samples.setdefault(key, deque(maxlen=WINDOW))
        samples.append((n, seconds))
        estimate = median_low([s for _, s in samples])
        if len(samples) == 1:
            estimate = min(estimate, self._warm_up[key])
        self._estimates[key] = (median_low([count for count, _ in samples]), estimate)
        self._points = self._monotone()

    def _monotone(self) -> list[tuple[float, float]]:
        """Estimates by n. More never costs less: what few measurements say is bounded by what many say of others."""
        points = sorted(self._estimates.items(), key=lambda item: item[1])
        settled = [point for key, point in points if self.is_settled(key)]
        bounded = []
        for key, (n, seconds) in points:
            if not self.is_settled(key):
                seconds = min([seconds, *(s for m, s in settled if m > n)])
                seconds = max([seconds, *(s for m, s in settled if m < n)])
            bounded.append((n, seconds))
        return bounded

    @property
    def largest(self) -> float:
        return self._points[-1][0] if self._points else 0.0

    def covers(self, n: int, reach: float = REACH) -> bool:
        return any(n / reach <= count <= n * reach for count, _ in self._points)

    @property
    def count(self) -> int:
        """Sizes measured."""
        return len(self._points)

    def has(self, n: int) -> bool:
        """Whether this very size, or one of its bucket, was measured."""
        return bucket(n) in self._estimates

    def nearest(self, n: int) -> tuple[float, float]:
        """The measured size nearest to n, and its seconds."""
        return min(self._points, key=lambda point: abs(log(point[0] / n)))

    def is_settled(self, n: int) -> bool:
        """Whether a single measurement in a bad moment can't make much of a difference at n."""
        return len(self._samples.get(bucket(n), ())) >= SETTLED

    def floor(self, n: int) -> float:
        """The least that n can cost if seconds never fall with n, and seconds / n never rise."""
        return max(seconds * min(1.0, n / count) for count, seconds in self._points)

    def at(self, n: float) -> float | None:
        return _interpolate(self._points, n) if self._points else None

    def above(self, anchor: tuple[float, float], n: float) -> float:
        """Seconds at n >= the anchor's n, from the anchor (n, seconds) and what was measured beyond it."""
        return _interpolate([anchor, *(point for point in self._points if point[0] > anchor[0])], n)

    def state(self) -> list[list[float]]:
        return [[key, *estimate] for key, estimate in sorted(self._estimates.items())]

    @classmethod
    def from_state(cls, state: Any) -> "CostCurve":
        """Restores each estimate with the weight of two measurements, so that another machine soon overrules it."""
        curve = cls()
        for row in _checked(isinstance(state, list), state):
            _checked(isinstance(row, list) and len(row) == 3, row)
            key, n, seconds = (positive(value) for value in row)
            curve._samples[int(key)] = deque([(int(n), seconds)] * 2, maxlen=WINDOW)
            curve._estimates[int(key)] = (int(n), seconds)
        curve._points = curve._monotone()
        return curve


def _interpolate(points: list[tuple[float, float]], n: float) -> float:
    """Linear between points, constant below them; above them by the last slope, at most in proportion."""
    i = bisect_left(points, (n, 0.0))
    if i == 0:
        return points[0][1]
    if i < len(points):
        (n0, s0), (n1, s1) = points[i - 1], points[i]
        return s0 + (s1 - s0) * (n - n0) / (n1 - n0) if n1 > n0 else s1
    (n0, s0), (n1, s1) = points[max(i - 2, 0)], points[-1]
    slope = (s1 - s0) / (n1 - n0) if n1 > n0 else 0.0
    return s1 + min(max(slope, 0.0), s1 / n1) * (n - n1)


class Acceptance:
    """Decayed counts of accepted and examined draft tokens per position.

    Args:
        decay: factor per round.
        prior: what to lean on where evidence is thin. With one, counts follow the rows that are left: those of
            earlier, larger batches are cut to what rounds of this size add up to.
    """

    def __init__(self, decay: float, prior: "Acceptance | None" = None) -> None:
        self.decay = decay
        self._prior = prior
        self.accepted = [0.0] * MAX_DRAFT_LENGTH
        self.examined = [0.0] * MAX_DRAFT_LENGTH

    def add(self, accepted: Sequence[float], examined: Sequence[float], rounds: int = 1) -> None:
        """Counts of one round, `rounds` rounds after the last ones."""
        factor = self.decay**rounds
        if self._prior is not None and self.examined[0] > 0:
            factor = min(factor, examined[0] * self.decay / (1 - self.decay) / self.examined[0])
        self.scale(factor)
        for i, (a, e) in enumerate(zip(accepted, examined, strict=True)):
            self.accepted[i] += a
            self.examined[i] += e

    def scale(self, factor: float) -> None:
        self.accepted = [a * factor for a in self.accepted]
        self.examined = [e * factor for e in self.examined]

    @property
    def alpha(self) -> float:
        prior = PRIOR_ALPHA if self._prior is None else self._prior.alpha
        return (sum(self.accepted) + prior * PRIOR_WEIGHT) / (sum(self.examined) + PRIOR_WEIGHT)

    def tokens_per_round(self, max_gamma: int) -> list[float]:
        """E[tokens per row and round | γ] for γ = 0..max: 1 + Σ_k Π_{i<=k} alpha_i."""
        pooled, survival, expected = self.alpha, 1.0, [1.0]
        for a, e in zip(self.accepted[:max_gamma], self.examined, strict=False):
            survival *= (a + SHRINK_WEIGHT * pooled) / (e + SHRINK_WEIGHT)
            expected.append(expected[-1] + survival)
        return expected

    def restart(self) -> None:
        """Starts over from the ratios of the prior, at little weight."""
        assert self._prior is not None
        self.accepted, self.examined = list(self._prior.accepted), list(self._prior.examined)
        self.scale(min(1.0, SEED_WEIGHT / max(sum(self.examined), 1.0)))

    def load(self, accepted: Any, examined: Any) -> None:
        for counts in (accepted, examined):
            _checked(isinstance(counts, list) and len(counts) == MAX_DRAFT_LENGTH, counts)
        self.accepted, self.examined = ([positive(c, or_zero=True) for c in counts] for counts in (accepted, examined))
        _checked(all(a <= e for a, e in zip(self.accepted, self.examined, strict=True)), accepted)


def positive(value: Any, or_zero: bool = False) -> float:
    """Checks a saved number.

    Raises:
        ValueError: it is not a finite positive number.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return _checked(number and (value > 0 or (or_zero and value == 0)), value)


def _checked(valid: bool, value: Any) -> Any:
    if not valid:
        raise ValueError(f"it holds {value!r}")
    return value
