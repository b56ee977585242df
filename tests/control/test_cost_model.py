"""Costs of measured and unmeasured sizes from noisy measurements."""

import pytest
from simulated_machine import Machine, gpu, one_drafter, share_of_gpu

from trl_selfspec.control.constants import WINDOW
from trl_selfspec.control.controller import Choice
from trl_selfspec.control.cost_model import CostCurve, bucket


def test_the_first_measurement_of_a_size_is_warm_up() -> None:
    """Capturing a graph takes a second; counted as a round's cost it would end speculation."""
    curve = CostCurve()
    curve.add(8, 1000.0)
    assert curve.at(8) is None
    for seconds in (1.0, 1.1, 1.2):
        curve.add(8, seconds)
    assert curve.at(8) == 1.1


def test_a_cost_is_the_median_of_recent_measurements() -> None:
    curve = CostCurve()
    for seconds in [0.0, *[1.0] * WINDOW, *[2.0] * (WINDOW // 2)]:
        curve.add(8, seconds)
    assert curve.at(8) == 1.0
    curve.add(8, 2.0)
    assert curve.at(8) == 2.0


def test_costs_between_and_beyond_measured_sizes() -> None:
    """Linear between; constant below; above by the last slope, but never falling and never above proportion."""
    curve = CostCurve()
    for n, seconds in ((4, 1.0), (8, 2.0), (16, 3.0)):
        curve.add(n, seconds)
        curve.add(n, seconds)
    assert [curve.at(n) for n in (1, 4, 6, 8, 12, 16, 24)] == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    falling, steep = CostCurve(), CostCurve()
    for n, low, high in ((4, 1.0, 0.1), (8, 0.9, 2.0)):
        for _ in range(2):
            falling.add(n, low)
            steep.add(n, high)
    assert falling.at(16) == 0.9
    assert steep.at(16) == 4.0


def test_buckets_are_the_nearest_of_powers_of_two_and_their_middles() -> None:
    sizes = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64}
    assert {bucket(n) for n in range(1, 70)} == sizes
    assert all(bucket(n) == n for n in sizes)
    assert all(abs(bucket(n) - n) <= n / 5 for n in range(1, 5000))


@pytest.mark.parametrize("measures_again", [True, False])
def test_a_bad_moment_does_not_rule_a_draft_length_out(monkeypatch: pytest.MonkeyPatch, measures_again: bool) -> None:
    """The only measurements of the best length fell into a stall. Negative control: nothing else corrects them."""
    if not measures_again:
        monkeypatch.setattr(CostCurve, "is_settled", lambda self, n: True)
    draft = share_of_gpu(0.3)
    machine, controller = Machine(gpu, draft, lambda rows, i: float(i < 4), noise=0.0), one_drafter(4)
    best, other = 4, 2
    controller._candidates = controller._rates._draft_lengths = range(other, best + 1, other)  # two lengths
    machine.rounds(1, controller, 5)
    for gamma, stall, rounds in ((other, 1, 20), (best, 3, 2)):
        for _ in range(rounds):
            verify_s, counts = stall * gpu(1, gamma + 1), [1] * gamma
            choice = Choice(gamma, "quantized")
            controller.observe_speculative(1, choice, gamma * draft(1), verify_s, counts, counts)
    machine.rounds(1, controller, 3000)
    assert machine.best(1).gamma == best and (machine.choices[-1] == best) == measures_again
