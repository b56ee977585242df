"""The real controller on simulated machines: seconds over those of an oracle that knows every cost.

Six devices, four models, three profiles of lengths; clocks are noisy and drift by 30 %. Preparing the drafter is free
here: tests/control holds what that may cost.
"""

import math
import random
from dataclasses import replace
from functools import cache
from statistics import mean

import pytest
from accuracy import SHAPES

from trl_selfspec.control.controller import Controller
from trl_selfspec.control.rates import PLAIN, Choice
from trl_selfspec.simulate.costs import Costs
from trl_selfspec.simulate.engines import self_drafting
from trl_selfspec.simulate.hardware import find_device
from trl_selfspec.simulate.rollout import Clock, Work, rollout
from trl_selfspec.simulate.shapes import Shape


DEVICES = ("a100-80gb", "h200", "rtx-4090", "l40s", "gb200", "cpu-2-cores")
MODELS = {
    "0.5B": (Shape(24, 896, 14, 2, 64, 4864, 151936, tied=True), 0.93),
    "1.5B": (SHAPES["Qwen2.5-1.5B"], 0.95),
    "7B": (SHAPES["Qwen2.5-7B"], 0.965),
    "32B": (Shape(64, 5120, 40, 8, 128, 27648, 152064), 0.97),
}
WORKS = {
    "long tail": Work.lognormal(64, 250, 1500, 4096),
    "equal": Work.of([1536] * 16),
    "few rows": Work.lognormal(8, 400, 1600, 3072),
}
Case = tuple[str, str, str]
BAR = 0.04  # of seconds, in the first rollout
CPU_BAR = 0.08  # where 64 rows are compute-bound, trials there use up what the last rows would need
OFF_BAR = 0.01  # where nothing pays
DRIFT, NOISE = 1.3, 0.03


def fits(device: str, model: str) -> bool:
    return 2 * MODELS[model][0].parameters < 0.6 * find_device(device).memory_bytes


CASES = [(d, m, w) for d in DEVICES for m in MODELS for w in WORKS if fits(d, m)]
FEW = [case for i, case in enumerate(CASES) if (i + i // len(WORKS)) % len(WORKS) == 0]  # every device and model


def machine(case: Case) -> tuple[Costs, Work]:
    device, (shape, alpha), work = find_device(case[0]), MODELS[case[1]], WORKS[case[2]]
    costs = self_drafting(shape, device, alpha)
    return replace(costs, drafts=tuple(replace(draft, prepare_s=0.0) for draft in costs.drafts)), work


def clocks(costs: Costs, work: Work, seed: int) -> tuple[Clock, Clock]:
    """What is measured on a machine that slows down and recovers three times, and the same without noise."""
    period, chance = rollout(costs, work, PLAIN).seconds / 3, random.Random(seed)

    def drifting(now: float, seconds: float) -> float:
        return seconds * DRIFT ** (0.5 - 0.5 * math.cos(2 * math.pi * now / period))

    return lambda now, seconds: drifting(now, seconds) * max(0.5, chance.gauss(1.0, NOISE)), drifting


def regret(
    case: Case, gate: Controller | Choice | None = None, seed: int = 0, rollouts: int = 1
) -> tuple[float, float]:
    """Seconds of the last rollout over the oracle's, and what the oracle gains over plain rounds."""
    costs, work = machine(case)
    noisy, drifting = clocks(costs, work, seed)
    plain_s = rollout(costs, work, PLAIN, clock=drifting).seconds
    best_s = min(plain_s, rollout(costs, work, clock=drifting).seconds)
    gate = gate or Controller([draft.traits for draft in costs.drafts])
    seconds = [rollout(costs, work, gate, clock=noisy).seconds for _ in range(rollouts)][-1]
    return seconds / best_s - 1, plain_s / best_s


@cache
def regrets(cases: tuple[Case, ...], seed: int = 0, rollouts: int = 1) -> dict[Case, tuple[float, float]]:
    return {case: regret(case, seed=seed, rollouts=rollouts) for case in cases}


def check(found: dict[Case, tuple[float, float]]) -> None:
    over = {
        case: (loss, gain)
        for case, (loss, gain) in found.items()
        if loss > (OFF_BAR if gain < 1.005 else CPU_BAR if case[0].startswith("cpu") else BAR)
    }
    assert not over
    assert mean(loss for loss, _ in found.values()) < BAR / 2


def test_the_controller_comes_close_to_an_oracle_in_its_first_rollout() -> None:
    """Prevents a gate that was tuned on invented machines alone."""
    check(regrets(tuple(FEW)))
    assert {case[0] for case in FEW} == set(DEVICES) and {case[1] for case in FEW} == set(MODELS)
    gains = [gain for _, gain in regrets(tuple(FEW)).values()]
    assert min(gains) < 1.005 and max(gains) > 1.5  # both sides of the gate


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "rollouts"), [(0, 1), (1, 1), (0, 2)])
def test_the_same_on_all_machines(seed: int, rollouts: int) -> None:
    """With other noise, and in the second rollout."""
    check(regrets(tuple(CASES), seed, rollouts))


@pytest.mark.parametrize("gamma", [0, 2, 8])
def test_a_fixed_draft_length_would_be_seen(gamma: int) -> None:
    """Negative control: no fixed choice is near the oracle on all of these machines."""
    choice = Choice(gamma, "qint4") if gamma else PLAIN
    with pytest.raises(AssertionError):
        check({case: regret(case, choice) for case in FEW})
