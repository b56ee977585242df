"""Laws of the measurement of the trainer's overhead: each second has one owner, and ours are seen."""

import time

import overhead
import pytest


pytestmark = pytest.mark.slow  # results of experiments stand in docs/LOG.md

NAP_S = 0.02
SLACK_S = 0.015  # a busy machine wakes late; half of a nap that is counted twice still shows


class _Theirs:
    def step(self) -> None:
        time.sleep(2 * NAP_S)


class _Ours(_Theirs):
    def step(self) -> None:
        time.sleep(NAP_S)
        super().step()
        time.sleep(NAP_S)


def test_a_second_belongs_to_whoever_was_called_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents TRL's own work inside our overriding methods from counting as ours, or twice."""
    ledger = overhead.Ledger()
    monkeypatch.setattr(_Theirs, "step", ledger.owned(_Theirs.step, "trl"))
    monkeypatch.setattr(_Ours, "step", ledger.owned(_Ours.step, "ours"))
    start = time.perf_counter()
    _Ours().step()
    elapsed = time.perf_counter() - start
    assert ledger.seconds["ours"] >= 2 * NAP_S
    assert ledger.seconds["trl"] >= 2 * NAP_S
    assert ledger.seconds["ours"] + ledger.seconds["trl"] == pytest.approx(elapsed, abs=SLACK_S)


def test_an_exception_hands_the_clock_back() -> None:
    """Prevents an error that somebody catches from counting all that follows as ours."""
    ledger = overhead.Ledger()

    def broken() -> None:
        raise ValueError("caught by the caller")

    with pytest.raises(ValueError, match="caught"):
        ledger.owned(broken, "ours")()
    before = ledger.seconds["ours"]
    time.sleep(NAP_S)
    ledger.owned(lambda: None, "trl")()
    assert ledger.seconds["ours"] == before


def test_overhead_is_a_ratio_of_sums_without_the_first_step() -> None:
    """Negative control too: a step whose refresh takes as long as its rollout is over the limit."""
    first = {"ours": 9.0, "refresh": 9.0, "rollout": 1.0, "trl": 1.0}
    light = {"ours": 0.01, "refresh": 0.01, "rollout": 1.0, "trl": 0.98}
    heavy = {"ours": 0.0, "refresh": 1.0, "rollout": 1.0, "trl": 0.0}
    assert overhead.summary([first, light, light])["overhead"] == pytest.approx(0.01)
    assert overhead.summary([first, light, light])["overhead"] < overhead.LIMIT
    assert overhead.summary([first, light, heavy])["overhead"] == pytest.approx(1.02 / 4)


def test_what_is_watched_exists() -> None:
    """A method of the engine that was renamed would end the measurement, or count as ours."""
    assert [(cls, name) for cls, name, _ in overhead.ENGINE if name not in vars(cls)] == []
