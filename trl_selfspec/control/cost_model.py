"""Seconds of plain rounds and verifications by size, from the measurements of a noisy machine."""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from math import log
from statistics import median_low
from typing import Any, NamedTuple

from trl_selfspec.control.constants import (
    ODD,
    PACE_AGE,
    PACES,
    REACH,
    REACH_VERIFY,
    SETTLED,
    SURE_PACES,
    WINDOW,
)
from trl_selfspec.control.saved_state import checked, positive


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
        """Estimates by n. Seconds never fall with n: settled sizes bound those with few measurements."""
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

    @property
    def sizes(self) -> list[int]:
        return [round(n) for n, _ in self._points]

    def covers(self, n: int, reach: float = REACH) -> bool:
        return any(n / reach <= count <= n * reach for count, _ in self._points)

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
        for row in checked(isinstance(state, list), state):
            checked(isinstance(row, list) and len(row) == 3, row)
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


class VerifyCost(NamedTuple):
    """The estimated seconds of verifying drafts of one length, at pace 1."""

    gamma: int
    seconds: float
    least_s: float  # by what was measured at other sizes
    known: bool  # measured at this size or near it


class RoundCosts:
    """Seconds of plain rounds and verifications, and the machine's current pace.

    Curves hold seconds at pace 1, that of the first plain rounds. The last plain rounds give the pace, so the speed of
    the machine may drift.
    """

    def __init__(self) -> None:
        self.plain, self.verify = CostCurve(), CostCurve()
        self.verify_by_rows: dict[int, CostCurve] = {}  # by bucket; a curve of tokens alone leaves attention out
        self.pace = 1.0
        self.pace_is_odd = False  # the last plain round differs, and no other has confirmed it yet
        self._paces: deque[tuple[float, float]] = deque(maxlen=PACES)  # when, and pace

    def plain_s(self, rows: int) -> float | None:
        """Seconds of a plain round of `rows` rows now; None before there is a measurement."""
        seconds = self.plain.at(rows)
        return None if seconds is None else seconds * self.pace

    def verifications(self, rows: int, draft_lengths: Sequence[int]) -> list[VerifyCost]:
        """The cost of verifying each draft length; none before a verification was measured.

        A verification computes all that a plain round over the same rows does, so it never costs less.
        """
        plain, verify = self.plain.at(rows), self.verify_curve(rows)
        if plain is None or not verify.largest:
            return []
        costs, anchor, longest = [], (rows, plain), max(verify.largest, rows)
        seconds = plain
        for gamma in draft_lengths:
            n = rows * (gamma + 1)
            seconds = max(seconds, verify.above(anchor, n))  # never less than of a shorter draft
            known = n <= REACH_VERIFY * verify.largest
            least_s = max(plain, verify.above(anchor, min(n, longest)))
            costs.append(VerifyCost(gamma, seconds, least_s, known))
        return costs

    def verify_curve(self, rows: int) -> CostCurve:
        """Verifications over `rows` rows by tokens; those over any rows before there was one."""
        return self.verify_by_rows[bucket(rows)] if self.has_verified(rows) else self.verify

    def add_plain(self, rows: int, seconds: float, now_s: float) -> None:
        self._update_pace(rows, seconds, now_s)
        if len(self._paces) >= SURE_PACES or not self.plain.has(rows):
            self.plain.add(rows, seconds / self.pace)

    def has_verified(self, rows: int) -> bool:
        """Whether a verification over about so many rows was measured."""
        own = self.verify_by_rows.get(bucket(rows))
        return own is not None and own.largest > 0

    def add_speculative(self, rows: int, gamma: int, verify_s: float, draft: CostCurve, draft_s: float) -> None:
        """Counts a verification, and in the drafter's curve what a draft step cost."""
        if self.pace_is_odd:  # the pace to divide by is uncertain
            return
        draft.add(rows, draft_s / self.pace)
        for curve in (self.verify, self.verify_by_rows.setdefault(bucket(rows), CostCurve())):
            curve.add(rows * (gamma + 1), verify_s / self.pace)

    def _update_pace(self, rows: int, seconds: float, now_s: float) -> None:
        """Takes the median of the last plain rounds. One that differs much needs others that agree."""
        usual_s = self.plain.at(rows)
        if usual_s is None or not self.plain.has(rows):
            return
        while self._paces and now_s - self._paces[0][0] > PACE_AGE * self.pace * usual_s:
            self._paces.popleft()
        self._paces.append((now_s, seconds / usual_s))
        pace = median_low([pace for _, pace in self._paces])
        self.pace_is_odd = len(self._paces) < SURE_PACES and not 1 / ODD < pace / self.pace < ODD
        if not self.pace_is_odd:
            self.pace = pace

    def state(self) -> dict[str, Any]:
        return {
            "plain": self.plain.state(),
            "verify": self.verify.state(),
            "verify_by_rows": [[rows, curve.state()] for rows, curve in sorted(self.verify_by_rows.items())],
            "pace": self.pace,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "RoundCosts":
        costs = cls()
        costs.plain, costs.verify = CostCurve.from_state(state["plain"]), CostCurve.from_state(state["verify"])
        for rows, curve in state["verify_by_rows"]:
            costs.verify_by_rows[int(positive(rows))] = CostCurve.from_state(curve)
        costs.pace = positive(state["pace"])
        return costs
