"""The controller against a simulated machine: it finds what is fastest, and pays little where nothing is to be won.

Seeds are fixed and no clock is read, so nothing here can fail by chance.
"""

import json
import math

import pytest
from simulated_machine import (
    LOSING,
    QUANTIZED,
    WINNING,
    Machine,
    always,
    constant,
    gpu,
    lengths,
    one_drafter,
    seconds_of,
    seconds_over_rollouts,
    share_of_gpu,
)

from trl_selfspec.control.controller import PLAIN, Choice, Controller


def test_a_draft_step_with_a_price_and_a_verification_without_one_are_tried_again() -> None:
    """The first measurement of a size is warm-up: two draft lengths left the verification without a price."""
    controller = one_drafter()
    controller.begin_rollout()
    for _ in range(200):
        controller.choose(2)
        controller.observe_plain(2, 0.01)
    for gamma in (1, 2):
        controller.choose(2)
        choice = Choice(gamma, "quantized")
        controller.observe_speculative(2, choice, 0.001 * gamma, 0.01, [2] * gamma, [2] * gamma)
    choices = set()
    for _ in range(200):
        choices.add(choice := controller.choose(2))
        if gamma := choice.gamma:
            controller.observe_speculative(2, choice, 0.001 * gamma, 0.01, [2] * gamma, [2] * gamma)
        else:
            controller.observe_plain(2, 0.01)
    assert choices - {PLAIN}


@pytest.mark.parametrize("name", WINNING)
def test_it_comes_within_5_percent_of_the_best_draft_length(name: str) -> None:
    """The best by someone who knows the machine, at each batch size. The first, learning rollout gets 10 %."""
    controller, regime = one_drafter(), WINNING[name]
    assert seconds_over_rollouts(regime, controller, [0]) < 1.10 * seconds_of(regime, None, [0])
    assert seconds_over_rollouts(regime, controller, [1, 2, 3]) < 1.05 * seconds_of(regime, None, [1, 2, 3])


@pytest.mark.parametrize("name", ["memory-bound", "almost everything is accepted", "costs jump beyond one token"])
def test_it_beats_or_meets_every_fixed_draft_length(name: str) -> None:
    controller, regime = one_drafter(), WINNING[name]
    seconds_over_rollouts(regime, controller, [0])
    best_fixed = min(seconds_of(regime, always(gamma), [1, 2, 3]) for gamma in range(9))
    assert seconds_over_rollouts(regime, controller, [1, 2, 3]) < 1.05 * best_fixed


def test_taking_acceptance_rate_for_alpha_would_be_caught() -> None:
    """Negative control: accepted / drafted counted as if every draft had been examined ends at drafts too short."""

    class Confused(Controller):
        def observe_speculative(self, rows, choice, draft_s, verify_s, accepted, examined) -> None:
            super().observe_speculative(rows, choice, draft_s, verify_s, accepted, [rows] * choice.gamma)

    regime = (gpu, share_of_gpu(0.08), constant(0.93), 16)
    best = seconds_of(regime, None, [1, 2, 3])
    for kind, within in ((Controller, True), (Confused, False)):
        controller = kind([QUANTIZED])
        seconds_over_rollouts(regime, controller, [0])
        assert (seconds_over_rollouts(regime, controller, [1, 2, 3]) < 1.05 * best) is within


@pytest.mark.parametrize("name", LOSING)
def test_it_ends_at_off_where_nothing_is_to_be_won(name: str) -> None:
    """Loss against plain rounds: 3 % of the rollout that learns it, 2 % after."""
    controller, regime = one_drafter(), LOSING[name]
    assert seconds_over_rollouts(regime, controller, [0]) < 1.03 * seconds_of(regime, always(0), [0])
    assert seconds_over_rollouts(regime, controller, [1, 2, 3]) < 1.02 * seconds_of(regime, always(0), [1, 2, 3])
    assert controller.explain().startswith("off at 1 row")


@pytest.mark.parametrize("name", LOSING)
def test_a_loss_would_be_seen(name: str) -> None:
    """Negative control: in these regimes the shortest draft, always on, loses more than the test above allows."""
    regime = LOSING[name]
    assert seconds_of(regime, always(2), [1]) > 1.03 * seconds_of(regime, always(0), [1])


@pytest.mark.parametrize("name", LOSING)
def test_exploring_stays_within_its_budget_at_every_moment(name: str) -> None:
    """2 % of the seconds so far, beyond the rounds before there was a budget (two, and the one that overshoots)."""
    *functions, rows = LOSING[name]
    machine, controller = Machine(*functions, noise=0.0), one_drafter()
    plain_s, tokens = machine.target(rows, 1), 0.0
    allowance = 3 * (machine.draft(rows) + machine.target(rows, 2))
    for _ in range(3000):
        tokens += sum(machine.round(rows, controller, controller.choose(rows))) / rows
        assert machine.seconds - tokens * plain_s <= 0.02 * machine.seconds + allowance


def test_an_overdrawn_budget_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control for the test above."""
    monkeypatch.setattr("trl_selfspec.control.exploration.BUDGET", 1.0)
    monkeypatch.setattr("trl_selfspec.control.controller.PROBE_SHARE", 0.2)
    with pytest.raises(AssertionError):
        test_exploring_stays_within_its_budget_at_every_moment("draft five times as dear")


def test_a_single_row_speculates_within_a_few_rounds() -> None:
    """A rollout of one short completion would be over before a patient controller began."""
    assert any(Machine(gpu, share_of_gpu(0.3), constant(0.93)).rounds(1, one_drafter(), 5))


def test_a_large_batch_waits_for_its_first_draft() -> None:
    """Where speculation seldom wins, a few good measurements of plain rounds come first."""
    assert not any(Machine(gpu, share_of_gpu(0.3), constant(0.93)).rounds(256, one_drafter(), 10))


def test_it_turns_off_when_acceptance_collapses_and_on_again_when_it_recovers() -> None:
    """The last rows of a rollout can be the ones that draft badly."""
    good, bad = 0.93, 0.15
    machine, controller = Machine(gpu, share_of_gpu(0.4), constant(good)), one_drafter()
    assert sum(map(bool, machine.rounds(8, controller, 300)[50:])) > 0.9 * 250
    machine.alpha = constant(bad)
    collapsed = machine.rounds(2, controller, 600)
    assert sum(map(bool, collapsed[200:])) < 0.1 * 400
    machine.alpha = constant(good)
    recovered = machine.rounds(2, controller, 1000)
    assert sum(map(bool, recovered[500:])) > 0.9 * 500


def test_the_next_rollout_does_not_start_from_the_last_rows_acceptance() -> None:
    """A bad tail says little about a full batch."""
    machine, controller = Machine(gpu, share_of_gpu(0.4), constant(0.93)), one_drafter()
    machine.rounds(16, controller, 300)
    machine.alpha = constant(0.1)
    machine.rounds(1, controller, 150)
    machine.alpha = constant(0.93)
    controller.begin_rollout()
    assert all(machine.rounds(16, controller, 5))


@pytest.mark.parametrize("regime", [WINNING["memory-bound"], WINNING["dear draft"], LOSING["draft as dear as plain"]])
def test_outliers_do_not_move_it(regime: tuple) -> None:
    """One round in fifty takes ten times as long, as on a shared machine: costs 3 % at most, over eight rollouts."""
    *functions, rows = regime
    spent = []
    for outliers in (0.0, 0.02):
        runs = [(one_drafter(), Machine(*functions, outliers=outliers, seed=seed)) for seed in range(4)]
        spent.append(sum(m.rollout(lengths(rows, m.seed + s), c.choose, c) for c, m in runs for s in range(2)))
    assert spent[1] < 1.03 * spent[0]


@pytest.mark.parametrize("at", range(12))
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_one_outlier_does_not_flip_the_gate(share: float, at: int) -> None:
    """Wherever it falls, in the first measurements too. While on, plain rounds are sampled now and then."""
    machine, controller = Machine(gpu, share_of_gpu(share), constant(0.9), noise=0.0), one_drafter()
    for i in range(200):
        rows, machine.outliers = 4, float(i == at)
        machine.round(rows, controller, controller.choose(rows))
    assert sum(map(bool, machine.choices[-50:])) == pytest.approx(50 if share == 0.3 else 0, abs=4)


def test_without_the_median_an_outlier_would_flip_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: costs that are the last measurement alone."""
    monkeypatch.setattr("trl_selfspec.control.cost_model.WINDOW", 1)
    with pytest.raises(AssertionError):
        test_outliers_do_not_move_it(WINNING["memory-bound"])


def test_the_gate_does_not_flap() -> None:
    """A speculative round that gains 2 % at 3 % noise must not switch to and fro; trial rounds stand alone."""
    survival = 0.9
    gain_of_2_percent = (1 + survival) / 1.02 - 1.0
    machine = Machine(lambda b, t: 10.0, lambda b: 10 * gain_of_2_percent, constant(survival))
    choices = machine.rounds(64, one_drafter(1), 3000)
    lasting = sum(a != b == c for a, b, c in zip(choices, choices[1:], choices[2:], strict=False))
    trials = sum(a != b != c for a, b, c in zip(choices, choices[1:], choices[2:], strict=False))
    assert lasting - trials <= 6  # a trial ends in a change that lasts


def test_without_a_margin_the_gate_would_flap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control for the test above."""
    monkeypatch.setattr("trl_selfspec.control.controller.TOGGLE_MARGIN", 1.0)
    monkeypatch.setattr("trl_selfspec.control.controller.CHANGE_MARGIN", 1.0)
    with pytest.raises(AssertionError):
        test_the_gate_does_not_flap()


def test_costs_follow_a_growing_context() -> None:
    """A plain cost that stayed at its first value would keep speculation off, or on, for the wrong reason."""
    context = 0
    machine = Machine(lambda b, t: 10 + 0.01 * context, lambda b: 3 + 0.003 * context, constant(0.9))
    controller = one_drafter()
    for _ in range(1500):
        context += round(sum(machine.round(8, controller, controller.choose(8))) / 8)
    assert sum(map(bool, machine.choices)) > 0.9 * 1500
    assert controller.plain_seconds(8) == pytest.approx(machine.target(8, 1), rel=0.15)


def scripted(controller: Controller, rows: int, noise: float, seed: int) -> list[int]:
    machine = Machine(gpu, share_of_gpu(5.0), constant(0.1), noise=noise, seed=seed)
    return machine.rounds(rows, controller, 100)


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_a_fixed_length_and_a_bound_decide_by_counts_alone(rows: int) -> None:
    """Runs have to repeat; here speculation loses badly and stays on all the same."""
    for seed in range(3):
        assert scripted(one_drafter(4, 8, max_active_sequences=8), rows, 0.3, seed) == [4 if rows <= 8 else 0] * 100
    assert 0 in scripted(one_drafter(4, 8), 8, 0.3, 0)  # negative control: without the bound, costs decide


def test_the_bound_is_hard() -> None:
    """However much there is to win above it."""
    machine, controller = (
        Machine(gpu, share_of_gpu(0.1), constant(0.99)),
        one_drafter("auto", 8, max_active_sequences=4),
    )
    assert not any(machine.rounds(5, controller, 200))
    assert any(machine.rounds(4, controller, 20))
    assert not any(machine.rounds(5, controller, 20))
    assert "max_active_sequences is 4" in controller.explain()


def test_a_fixed_length_is_taken_or_left() -> None:
    machine = Machine(gpu, share_of_gpu(0.3), constant(0.93))
    assert set(machine.rounds(8, one_drafter(3), 300)) == {0, 3}


@pytest.mark.parametrize("bound", [None, 100])
def test_zero_tokens_means_off(bound: int | None) -> None:
    """The baseline switch must not draft to find out what it costs."""
    controller = one_drafter(0, 8, bound)
    assert not any(Machine(gpu, share_of_gpu(0.1), constant(0.99)).rounds(1, controller, 100))
    assert controller.explain() == "off: num_speculative_tokens is 0"


def test_a_length_without_counters_is_refused() -> None:
    for arguments in ((17, 8), (-1, 8), ("auto", 17), ("auto", 0)):
        with pytest.raises(ValueError, match="draft length"):
            one_drafter(*arguments)


@pytest.mark.parametrize("bound", [None, 100])
def test_disabling_lasts_until_the_next_rollout(bound: int | None) -> None:
    machine, controller = Machine(gpu, share_of_gpu(0.3), constant(0.93)), one_drafter(4, 8, bound)
    machine.rounds(4, controller, 50)
    controller.disable("quantized", "the drafter broke")
    assert not any(machine.rounds(4, controller, 300))
    assert controller.explain() == "off for the rest of this rollout: the drafter broke"
    controller.begin_rollout()
    assert any(machine.rounds(4, controller, 5))


@pytest.mark.parametrize(("requantize_s", "drafts"), [(0.0, True), (3e2, True), (5e3, False)])
def test_a_gain_too_small_to_pay_for_requantizing_is_left(requantize_s: float, drafts: bool) -> None:
    """Rollouts of about 3 s (in ms) that speculation halves, behind a requantizing of nothing, 0.3 s or 5 s."""
    *functions, rows = WINNING["memory-bound"]
    controller = one_drafter()
    for seed in range(4):
        machine, first = Machine(*functions, seed=seed), True
        controller.begin_rollout()
        for _ in range(200):
            choice = controller.choose(rows)
            if choice.gamma and first:
                controller.observe_preparing("quantized", requantize_s)
                first = False
            machine.round(rows, controller, choice)
    assert any(machine.choices) is drafts


@pytest.mark.parametrize("name", ["memory-bound", "draft as dear as plain"])
def test_state_goes_through_json(name: str) -> None:
    """What is saved is what was loaded."""
    *functions, rows = (WINNING | LOSING)[name]
    controller, loaded = one_drafter(), one_drafter()
    Machine(*functions).rounds(rows, controller, 300)
    state = controller.state_dict()
    loaded.load_state_dict(json.loads(json.dumps(state)))
    assert loaded.state_dict() == state
    loaded.load_state_dict(state)
    controller.begin_rollout()
    controller.choose(rows), loaded.choose(rows)
    acceptance = [c.explain().split("acceptance of ")[1][:4] for c in (controller, loaded)]
    assert acceptance[0] == acceptance[1]


@pytest.mark.parametrize(("name", "drafts"), [("memory-bound", True), ("draft five times as dear", False)])
def test_a_resumed_run_does_not_learn_again(name: str, drafts: bool) -> None:
    """It goes on where it was; a fresh controller (negative control) first measures."""
    *functions, rows = (WINNING | LOSING)[name]
    controller, resumed = one_drafter(), one_drafter()
    Machine(*functions).rounds(rows, controller, 300)
    resumed.load_state_dict(controller.state_dict())
    choices = {c: Machine(*functions, seed=1).rounds(rows, c, 50) for c in (resumed, one_drafter())}
    as_learned = [sum(bool(gamma) is drafts for gamma in chosen) for chosen in choices.values()]
    assert as_learned[0] >= (47 if drafts else 50) > as_learned[1]


def test_state_of_another_machine_is_unlearned() -> None:
    """A run resumed on other hardware: speculation lost there and wins here, and the other way round."""
    for (*old, rows), (*new, _), drafts in (
        (LOSING["draft as dear as plain"], WINNING["memory-bound"], True),
        (WINNING["memory-bound"], LOSING["draft as dear as plain"], False),
    ):
        controller, resumed = one_drafter(), one_drafter()
        Machine(*old).rounds(rows, controller, 300)
        resumed.load_state_dict(controller.state_dict())
        choices = Machine(*new).rounds(rows, resumed, 1500)
        assert sum(map(bool, choices[-300:])) > 270 if drafts else sum(map(bool, choices[-300:])) < 30


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 1),
        ("version", 2),
        ("pace", 0.0),
        ("clock_s", None),
        ("plain", None),
        ("plain", [[4, 4.0]]),
        ("plain", [[4, 4.0, -1.0]]),
        ("verify_by_rows", [[4]]),
        ("verify_by_rows", [[0, []]]),
        ("rollouts_s", [0.0]),
        ("plain_rounds", True),
        ("drafters", None),
        ("drafters", []),
        ("drafters", {"quantized": None}),
        ("failures", -1),
        ("draft", [[4, 4.0, math.nan]]),
        ("accepted", [1.0]),
        ("accepted", {}),
        ("accepted", {"": [1.0]}),
        ("accepted", {"": [9.0] * 16}),
        ("examined", {"": ["1"] * 16}),
        ("prepare_s", 1.0),
    ],
)
@pytest.mark.parametrize("has_it", [True, False])
def test_a_bad_state_is_refused_and_changes_nothing(key: str, value: object, has_it: bool) -> None:
    """A damaged checkpoint must not become a cost of NaN that no measurement can beat.

    The drafter's part of a checkpoint is checked even where the drafter is no longer offered.
    """
    *functions, rows = WINNING["memory-bound"]
    controller = one_drafter()
    Machine(*functions).rounds(rows, controller, 50)
    before = controller.state_dict()
    reader = controller if has_it else Controller([])
    at_first = reader.state_dict()
    for broken in ({key: value}, None):
        state = json.loads(json.dumps(before))
        place = state if key in state else state["drafters"]["quantized"]
        place |= broken or {}
        if broken is None:
            del place[key]
        with pytest.raises(ValueError, match="controller state"):
            reader.load_state_dict(state)
    assert reader.state_dict() == at_first


def test_the_explanation_gives_figures() -> None:
    """What a user reads when nothing speculates."""
    controller = one_drafter()
    assert controller.explain()
    Machine(gpu, share_of_gpu(1.0), constant(0.9), noise=0.0).rounds(16, controller, 300)
    assert controller.explain().startswith("off at 16 rows: a draft step costs 0.99 and a verify 1.01 of a ")
    winner = one_drafter()
    Machine(gpu, share_of_gpu(0.3), constant(0.95), noise=0.0).rounds(1, winner, 100)
    assert winner.explain().startswith("on at 1 row with γ = ")
    assert "a draft step costs 0.30" in winner.explain()
