"""The controller with several drafters, on simulated machines: it finds the one that is fastest, and trying the others
stays within the budget that a single drafter has.

Seeds are fixed and no clock is read, so nothing here can fail by chance.
"""

import json
from collections.abc import Callable, Sequence

import pytest
from simulated_machine import (
    LOSING,
    SHORT_ROLLOUTS,
    WINNING,
    Drafter,
    Machine,
    constant,
    gpu,
    lengths,
    share_of_gpu,
    short_lengths,
)

from trl_selfspec.control.controller import PLAIN, Choice, Controller
from trl_selfspec.control.drafters import DrafterTraits


SUFFIX = DrafterTraits("suffix", per_round=True, prior_alpha=0.4, prior_cost=0.05)
TRAITS = {"suffix": SUFFIX} | {name: DrafterTraits(name) for name in ("qint4", "qint8", "qfloat8")}
TWO, FOUR = ("suffix", "qint4"), ("suffix", "qint4", "qint8", "qfloat8")


def matcher(target: Callable[[int, int], float], alpha: float) -> Drafter:
    """It takes 3 % of a plain round."""
    return Drafter(lambda rows: 0.03 * target(rows, 1), constant(alpha), per_round=True)


def machine_of(regime: tuple, names: Sequence[str], suffix_alpha: float, prepare: float = 0.0, **more) -> Machine:
    """The regime's drafter as each of the quantized types, the later ones a tenth dearer each."""
    target, draft, alpha, _ = regime
    drafters = {"suffix": matcher(target, suffix_alpha)}
    for i, name in enumerate(names[1:]):
        dearer = 1 + 0.1 * i
        drafters[name] = Drafter(
            lambda rows, dearer=dearer: dearer * draft(rows), alpha, False, prepare, 1.5 * prepare
        )
    return Machine(target, draft, alpha, drafters=drafters, **more)


def controller_of(machine: Machine) -> Controller:
    controller = Controller([TRAITS[name] for name in machine.drafters])
    for name, drafter in machine.drafters.items():
        controller.expect_preparing(name, 0.7 * drafter.prepare)
    return controller


def shares(machine: Machine, controller: Controller, rollouts: Sequence[Sequence[int]]) -> list[float]:
    """Seconds of each rollout over those of plain rounds for its tokens."""
    of_plain = []
    for rollout in rollouts:
        seconds, plain_seconds = machine.seconds, machine.plain_seconds
        machine.rollout(rollout, controller.choose, controller)
        of_plain.append((machine.seconds - seconds) / (machine.plain_seconds - plain_seconds))
    return of_plain


@pytest.mark.parametrize("names", [TWO, FOUR], ids=len)
@pytest.mark.parametrize("name", LOSING)
def test_more_drafters_lose_no_more(name: str, names: Sequence[str]) -> None:
    """The limits that hold for one: 3 % of the rollout that learns it, 2 % after and in total."""
    machine = machine_of(LOSING[name], names, suffix_alpha=0.0)
    rollouts = [lengths(LOSING[name][-1], seed) for seed in range(3)]
    first, *later = shares(machine, controller_of(machine), rollouts)
    assert first < 1.03 and max(later) < 1.02
    assert machine.seconds < 1.02 * machine.plain_seconds
    assert set(machine.used) == {"", *names}, "each was tried"


def test_a_budget_for_each_drafter_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control for the test above."""
    monkeypatch.setattr("trl_selfspec.control.exploration.BUDGET", 4 * 0.012)
    with pytest.raises(AssertionError):
        test_more_drafters_lose_no_more("draft five times as dear", FOUR)


@pytest.mark.parametrize("names", [TWO, FOUR], ids=len)
@pytest.mark.parametrize("suffix_alpha", [0.0, 0.15])
def test_preparing_several_drafters_shares_one_budget(names: Sequence[str], suffix_alpha: float) -> None:
    """Short rollouts that no drafter makes faster."""
    for seed in range(2):
        machine = machine_of(SHORT_ROLLOUTS, names, suffix_alpha, prepare=400.0, seed=seed)
        shares(machine, controller_of(machine), [short_lengths(s) for s in range(15)])
        assert machine.seconds < 1.02 * machine.plain_seconds


@pytest.mark.parametrize("suffix_alpha", [0.15, 0.6])
@pytest.mark.parametrize("name", ["memory-bound", "dear draft", "linear cost, cheap draft"])
def test_it_comes_near_the_best_drafter_and_length(name: str, suffix_alpha: float) -> None:
    """The best by someone who knows the machine; the rollouts that learn it are left out."""
    regime = WINNING[name]
    rollouts = [lengths(regime[-1], seed) for seed in range(5)]
    machine, knows = (machine_of(regime, FOUR, suffix_alpha) for _ in range(2))
    found = shares(machine, controller_of(machine), rollouts)
    best = [knows.rollout(rollout, knows.best) / knows.plain_seconds for rollout in rollouts[:1]]
    for rollout in rollouts[1:]:
        before = knows.plain_seconds
        best.append(knows.rollout(rollout, knows.best) / (knows.plain_seconds - before))
    assert sum(found[2:]) < 1.06 * sum(best[2:])


@pytest.mark.parametrize("per_round", [True, False])
def test_a_draft_of_a_matcher_is_priced_once(per_round: bool) -> None:
    """Whatever its length. Negative control: a drafter that runs once for each token."""
    draft_s, verify_s = 4.0, 11.0
    controller = Controller([DrafterTraits("one", per_round)])
    for choice in [PLAIN] * 8 + [Choice(2, "one")] * 4 + [Choice(8, "one")] * 4:
        controller.choose(4)
        if choice is PLAIN:
            controller.observe_plain(4, 10.0)
        else:
            in_all_s = draft_s if per_round else draft_s * choice.gamma / 2
            controller.observe_speculative(4, choice, in_all_s, verify_s, [4] * choice.gamma, [4] * choice.gamma)
    seconds = {option.choice.gamma: option.seconds for option in controller._situation(4).options["one"]}
    assert seconds[2] == pytest.approx(draft_s + verify_s)
    assert seconds[8] == pytest.approx((1 if per_round else 4) * draft_s + verify_s)


def test_drafts_without_matches_end_soon_and_are_probed_rarely() -> None:
    """A verification that is a quarter dearer makes each such round a loss."""
    machine = Machine(near_flat, share_of_gpu(9.0), constant(0.0), drafters={"suffix": matcher(near_flat, 0.0)})
    used = [choice > 0 for choice in machine.rounds(4, controller_of(machine), 1000)]
    assert sum(used[:100]) <= 8
    assert 0 < sum(used[500:]) <= 0.04 * 500


def near_flat(rows: int, tokens: int) -> float:
    """A verification of 4 rows takes 1.23 plain rounds for one draft token, 1.46 for two."""
    return 8 + 0.6 * rows * tokens


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("told", [True, False])
def test_an_epochs_end_is_noticed_within_50_rounds(told: bool, seed: int) -> None:
    """History fills: acceptance jumps from 0.15 to 0.75, in another context or without a word."""
    drafters = {"suffix": matcher(near_flat, 0.15), "qint4": Drafter(share_of_gpu(2.0), constant(0.9))}
    machine = Machine(near_flat, share_of_gpu(9.0), constant(0.0), seed=seed, drafters=drafters)
    controller = controller_of(machine)

    def suffix_rounds(context: str, alpha: float, count: int) -> list[bool]:
        machine.drafters["suffix"] = matcher(near_flat, alpha)
        controller.begin_rollout(TWO, {"suffix": context})
        machine.rounds(4, controller, count)
        return [name == "suffix" for name in machine.used[-count:]]

    before = suffix_rounds("no history", 0.15, 1000)
    after = suffix_rounds("history" if told else "no history", 0.75, 150)
    assert sum(before[-300:]) < 40 and sum(after[50:]) > 90
    if told:
        assert sum(after[:15]) > 8
        assert sum(suffix_rounds("no history", 0.15, 50)) < 10, "prompts that are new"
        assert sum(suffix_rounds("history", 0.75, 50)) > 40


def test_without_contexts_and_probes_an_epochs_end_would_pass_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control for the test above."""
    monkeypatch.setattr("trl_selfspec.control.controller.PROBE_SHARE", 1e-4)
    with pytest.raises(AssertionError):
        test_an_epochs_end_is_noticed_within_50_rounds(False, 0)


def quantized(share: float, alpha: float, prepare: float = 200.0) -> Drafter:
    return Drafter(share_of_gpu(share), constant(alpha), False, prepare, 1.5 * prepare)


def test_suffix_rounds_prepare_nothing() -> None:
    """Where they are so good that a quantized drafter can't win. Negative control: where they are not."""
    for suffix_alpha, prepares in ((0.8, False), (0.2, True)):
        machine = Machine(gpu, share_of_gpu(0.3), constant(0.0), drafters={"suffix": matcher(gpu, suffix_alpha)})
        machine.drafters |= {name: quantized(0.3, 0.9) for name in FOUR[1:]}
        shares(machine, controller_of(machine), [lengths(4, seed) for seed in range(6)])
        assert bool(machine.prepared) is prepares


def test_a_quantized_drafter_that_wins_by_far_is_found() -> None:
    """Suffix drafts win a little at once, so the quantized drafter has to promise more than they give."""
    machine = Machine(gpu, share_of_gpu(0.3), constant(0.0), drafters={"suffix": matcher(gpu, 0.15)})
    machine.drafters["qint4"] = quantized(0.2, 0.97)
    found = shares(machine, controller_of(machine), [lengths(4, seed) for seed in range(5)])
    assert machine.used[-100:].count("qint4") > 80
    assert max(found[2:]) < 0.6


INT8_IS_BETTER = {"qint4": quantized(0.35, 0.70), "qint8": quantized(0.45, 0.97)}
INT8_IS_DEAR = {"qint4": quantized(0.35, 0.70), "qint8": quantized(0.95, 0.97)}


@pytest.mark.parametrize(
    ("drafters", "better"), [(INT8_IS_BETTER, "qint8"), (INT8_IS_DEAR, "qint4")], ids=["int8", "int4"]
)
@pytest.mark.parametrize("rows", [1, 16])
def test_the_better_quantized_type_is_in_use_after_a_few_rollouts(
    drafters: dict[str, Drafter], better: str, rows: int
) -> None:
    """By acceptance or by cost, whichever decides on this policy and machine."""
    for seed in range(3):
        machine = Machine(gpu, share_of_gpu(0.3), constant(0.0), drafters=dict(drafters), seed=seed)
        controller = controller_of(machine)
        shares(machine, controller, [lengths(rows, seed * 10 + s) for s in range(4)])
        start = len(machine.used)
        shares(machine, controller, [lengths(rows, seed * 10 + s) for s in range(4, 8)])
        drafted = [name for name in machine.used[start:] if name]
        assert drafted.count(better) > 0.9 * len(drafted) > 100, f"{seed}"


def given_up_after(rollouts: int, shares_of_plain: Sequence[float], together: bool = True) -> dict[str, str]:
    """qint4 and qint8 of one acceptance at such costs, and suffix drafts without a match, in rounds of two sizes.

    `together`: in the same rollouts; else they take turns.
    """
    drafters = {name: quantized(share, 0.95) for name, share in zip(FOUR[1:3], shares_of_plain, strict=True)}
    drafters["suffix"] = matcher(gpu, 0.0)
    machine = Machine(gpu, share_of_gpu(0.3), constant(0.0), drafters=drafters)
    controller = controller_of(machine)
    for rollout in range(rollouts):
        controller.begin_rollout(["suffix"])
        for rows in (16, 4):
            for i, name in enumerate(["", *drafters]):
                for _ in range(6 if together or i in (0, 1 + rollout % 2) else 0):
                    machine.round(rows, controller, Choice(2, name) if name else PLAIN)
    controller.begin_rollout()
    return controller.given_up


def test_a_type_that_loses_everywhere_is_given_up_for_good() -> None:
    """Its memory can be freed. Suffix drafts lose by more, and stay: what there is to copy changes."""
    given_up = given_up_after(3, (0.3, 0.5))
    assert list(given_up) == ["qint8"]
    mine, other = (float(word.rstrip("x,")) for word in given_up["qint8"].split() if word.rstrip(",").endswith("x"))
    assert "qint4" in given_up["qint8"] and other > 1.1 * mine > 1
    assert list(given_up_after(3, (0.5, 0.3))) == ["qint4"]


def test_little_evidence_gives_nothing_up() -> None:
    """Two rollouts; figures of different rollouts; types that are close, of which training may turn the order."""
    assert not given_up_after(2, (0.3, 0.5))
    assert not given_up_after(6, (0.3, 0.5), together=False)
    assert not given_up_after(6, (0.3, 0.35))


def test_what_was_given_up_is_not_chosen_again() -> None:
    """Nor what failed; the others go on, and the last one's end is the end."""
    machine = Machine(gpu, share_of_gpu(0.3), constant(0.0), drafters={"suffix": matcher(gpu, 0.3)})
    machine.drafters["qint4"] = quantized(0.3, 0.95, prepare=0.0)
    controller = controller_of(machine)
    machine.rounds(4, controller, 200)
    assert "qint4" in machine.used[-50:]
    controller.give_up("qint4", "it failed")
    machine.rounds(4, controller, 200)
    controller.begin_rollout(TWO)
    machine.rounds(4, controller, 200)
    assert set(machine.used[-400:]) == {"", "suffix"}
    assert "(suffix)" in controller.explain()
    controller.disable("suffix", "it is ill")
    assert controller.choose(4) == PLAIN and controller.explain() == "off for the rest of this rollout: it is ill"
    controller.give_up("suffix", "it failed too")
    controller.begin_rollout(TWO)
    assert controller.choose(4) == PLAIN
    assert controller.explain() == "off for good: qint4: it failed; suffix: it failed too"


def test_counts_alone_use_the_first_drafter() -> None:
    machine = Machine(gpu, share_of_gpu(0.3), constant(0.0), drafters={"suffix": matcher(gpu, 0.0)})
    machine.drafters["qint4"] = quantized(0.1, 0.99, prepare=0.0)
    controller = Controller([TRAITS[name] for name in TWO], 4, max_active_sequences=8)
    machine.rounds(8, controller, 50)
    assert set(machine.used) == {"suffix"} and set(machine.choices) == {4}


def test_state_holds_every_drafter_and_context() -> None:
    """A drafter that the state lacks is learned anew, one that is no longer offered is left out."""
    machine = machine_of(WINNING["memory-bound"], TWO, 0.6)
    controller = controller_of(machine)
    for context in ("history", "no history"):
        controller.begin_rollout(TWO, {"suffix": context})
        for choice in [PLAIN] * 3 + [Choice(2, "suffix")] * 3 + [Choice(2, "qint4")] * 3:
            machine.round(8, controller, choice)
    state = json.loads(json.dumps(controller.state_dict()))
    assert set(state["drafters"]["suffix"]["accepted"]) == {"history", "no history"}
    same, other = (Controller([TRAITS[name] for name in names]) for names in (TWO, ("suffix", "qint8")))
    same.load_state_dict(state)
    other.load_state_dict(state)
    assert same.state_dict() == state
    drafters = other.state_dict()["drafters"]
    assert drafters["suffix"] == state["drafters"]["suffix"]
    assert set(drafters) == {"suffix", "qint8"} and not drafters["qint8"]["draft"]
