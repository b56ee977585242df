"""Laws of the choice between the drafter's forms: it follows costs, and nothing that is sampled depends on it."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from adapted import SWITCHES, adapted, stir, two_adapters
from peft import PeftModel
from tiny_models import Schedule, ragged_prompts, tiny_model
from transformers import GenerationConfig

from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.drafter.drafter import LiveLoraLinear, make_drafter
from trl_selfspec.drafter.lora_mode import FormChoice, FormCosts, form_costs, measured_choice
from trl_selfspec.engine.engine import RolloutOutput, SelfSpecEngine
from trl_selfspec.options import MAX_DRAFT_LENGTH, SelfSpecOptions
from trl_selfspec.policy.replica import PolicyReplica


MERGED_IS_CHEAP, LIVE_IS_CHEAP = FormCosts(live_s=1.0, merged_s=1e-6), FormCosts(live_s=1e-6, merged_s=1.0)
PROMPTS = ragged_prompts([3, 7, 12])
CONFIG = GenerationConfig(max_new_tokens=12, do_sample=True, top_k=0)


def drafted(steps: int, rows: int, seconds: float = 0.0) -> RolloutStats:
    tokens = [steps * rows, *[0] * (MAX_DRAFT_LENGTH - 1)]
    return RolloutStats(draft_steps=steps, drafted_per_position=tokens, draft_s=seconds)


def choices(costs: FormCosts, steps: Iterable[int], step_s: dict[bool, float] | None = None) -> list[bool]:
    """The form after each refresh, where so many draft steps of 3 rows were made before it."""
    choice, live, forms = FormChoice(lambda rows: costs), False, []
    for number in steps:
        seconds = number * (step_s or {})[live] if step_s else 0.0
        choice.add(drafted(number, rows=3, seconds=seconds))
        live = choice.live(live)
        forms.append(live)
    return forms


@pytest.mark.parametrize(("steps", "live"), [(9, True), (11, False)])
def test_the_cheaper_form_is_chosen_after_the_first_rollout(steps: int, live: bool) -> None:
    """Prevents a fixed form: quantizing takes as long as ten steps with live adapters cost more."""
    assert choices(FormCosts(live_s=0.1, merged_s=1.0), [0, steps]) == [False, live]


def test_the_form_follows_how_often_is_drafted() -> None:
    """Prevents a form for ever that was right when the gate drafted less, or more, than it does now."""
    costs = FormCosts(live_s=0.1, merged_s=1.0)
    assert choices(costs, [0, 100, 1, 1]) == [False, False, False, True]
    assert choices(costs, [0, 1, 100, 100]) == [False, True, True, False]


def test_going_back_has_to_pay_and_the_choice_is_rare() -> None:
    """Prevents a drafter that is rebuilt back and forth around the point where both forms cost the same."""
    costs = FormCosts(live_s=0.1, merged_s=1.0)
    assert choices(costs, [0, 9, *[11] * 6]) == [False, *[True] * 7], "a tenth of a quantization pays in ten refreshes"
    assert choices(costs, [0, 9, *[11] * 14]) == [False, *[True] * 14, False]
    assert choices(costs, [0, *itertools.islice(itertools.cycle([9, 11]), 40)]) == [False, *[True] * 40]
    assert choices(costs, [0, 100, 1, 100]) == [False] * 4, "not looked at in the third refresh, nor by it alone"


def test_what_steps_really_took_counts_once_both_forms_have_run() -> None:
    """Prevents live adapters for ever where they hinder more than their own products: layers that ran in one call."""
    costs = FormCosts(live_s=0.1, merged_s=1.0)
    assert choices(costs, [0, *[2] * 7], {False: 1.0, True: 1.1}) == [False, *[True] * 7]
    assert choices(costs, [0, *[2] * 7], {False: 1.0, True: 2.0}) == [False, True, True, *[False] * 5]


def test_where_counts_alone_decide_the_form_stays() -> None:
    """Prevents a run that is to repeat from drawing other samples because a clock said so."""
    choice = FormChoice(lambda rows: LIVE_IS_CHEAP, by_cost=False)
    for current in (False, False, False, True):
        choice.add(drafted(1, rows=1))
        assert choice.live(current) is current
    options = {"num_speculative_tokens": 3, "max_active_sequences": 8}
    assert not SelfSpecEngine(adapted(), SelfSpecOptions("qint8", **options))._form._by_cost  # type: ignore[arg-type]
    assert SelfSpecEngine(adapted(), SelfSpecOptions("qint8"))._form._by_cost


def measured(replica: PolicyReplica, qtype: str, draft_steps: int) -> bool:
    """The form at the second refresh after so many draft steps of 4 rows."""
    choice = measured_choice(replica, qtype, by_cost=True)
    assert choice.live(False) is False
    choice.add(drafted(draft_steps, rows=4))
    return choice.live(False)


@pytest.mark.parametrize("values", [None, {"use_dora": True}])
def test_without_adapters_that_may_stay_live_there_is_nothing_to_choose(values: dict[str, Any] | None) -> None:
    """Prevents a form that is chosen for layers that it does not fit, or measured where it can't be."""
    replica = PolicyReplica(tiny_model("llama") if values is None else adapted(**values))
    assert form_costs(replica, "qint8", num_rows=4) is None
    assert measured(replica, "qint8", draft_steps=1) is False


@pytest.mark.parametrize("qtype", ["qint4", "qint8"])
def test_measured_costs_choose_both_forms(qtype: str) -> None:
    """Prevents a measurement that is the same whatever is measured: one draft step is not worth a quantization."""
    replica = PolicyReplica(adapted())
    costs = form_costs(replica, qtype, num_rows=4)
    assert costs is not None
    assert 0 < costs.live_s < 1
    assert 0 < costs.merged_s < 1
    assert measured(replica, qtype, draft_steps=1) is True
    assert measured(replica, qtype, draft_steps=10**6) is False


def engine_with(policy: PeftModel, *costs: FormCosts, draft_length: int = 3) -> SelfSpecEngine:
    """An engine that drafts in every round, by the form that these costs ask for at its first, second, ... choice."""
    engine = SelfSpecEngine(policy, SelfSpecOptions("qint8", verification="coupled"))
    engine.controller = Schedule(draft_length)  # type: ignore[assignment]
    following = itertools.chain(costs, itertools.repeat(costs[-1]))
    engine._form = FormChoice(lambda rows: next(following))
    return engine


def sample(engine: SelfSpecEngine) -> RolloutOutput:
    engine.refresh()
    return engine.generate(PROMPTS, CONFIG, seed=7)


FORMS: dict[tuple[FormCosts, ...], list[str]] = {
    (MERGED_IS_CHEAP,): ["merged"] * 5,
    (LIVE_IS_CHEAP,): ["merged", *["live"] * 4],
    (LIVE_IS_CHEAP, MERGED_IS_CHEAP): ["merged", "live", "live", "merged", "merged"],
}


@pytest.mark.parametrize(("costs", "expected"), FORMS.items(), ids=["merged", "live", "back"])
def test_samples_are_those_of_plain_sampling_in_every_form(costs: tuple[FormCosts, ...], expected: list[str]) -> None:
    """Prevents a form, or a switch between two, that changes what the policy says; adapters change before each."""
    policy = two_adapters()
    drafting, plain = engine_with(policy, *costs), engine_with(policy, MERGED_IS_CHEAP, draft_length=0)
    assert drafting.draft_form is None
    forms, texts = [], []
    for change in (lambda policy: None, stir, SWITCHES["set_adapter"], SWITCHES["disabled"], SWITCHES["scaled"]):
        change(policy)
        output = sample(drafting)
        assert output.completion_ids == sample(plain).completion_ids
        assert output.stats.draft_steps == 3 * output.stats.num_rounds_speculative > 0
        assert output.stats.alpha > 0.5, "the drafter follows the policy"
        forms.append(drafting.draft_form)
        texts.append(output.completion_ids)
    assert forms == expected
    assert texts[0] != texts[1] != texts[2] != texts[3]


def test_merging_under_live_adapters_is_followed() -> None:
    """Prevents adapters that count twice once PEFT has merged them into the base."""
    policy = two_adapters()
    engine = engine_with(policy, LIVE_IS_CHEAP)
    sample(engine)
    stir(policy, std=0.01)  # a form is changed when a change of weights makes quantizing due
    before = sample(engine)
    assert engine.draft_form == "live"
    policy.merge_adapter()
    after = sample(engine)
    assert engine.draft_form == "live"
    assert after.completion_ids == before.completion_ids
    assert after.stats.alpha == pytest.approx(before.stats.alpha, abs=0.1)


def test_live_adapters_that_are_left_behind_draft_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the acceptance above tells a drafter that follows from one that does not."""
    policy = two_adapters()
    engine = engine_with(policy, LIVE_IS_CHEAP)
    good = [sample(engine).stats.alpha for _ in range(2)][-1]
    monkeypatch.setattr(LiveLoraLinear, "follow", lambda layer, factors: False)
    stir(policy, std=0.5)
    bad = sample(engine).stats.alpha
    assert bad < good - 0.2


def test_a_switch_keeps_what_the_drafter_shares() -> None:
    """Prevents copies of embeddings and norms, and a figure of the form that was given up."""
    policy = adapted()
    engine = engine_with(policy, LIVE_IS_CHEAP)
    for form in ("merged", "live"):
        output = sample(engine)
        assert engine.draft_form == form
        own = {name: parameter.data_ptr() for name, parameter in engine._drafter.named_parameters()}
        target = {name: parameter.data_ptr() for name, parameter in engine._replica.model.named_parameters()}
        assert own
        assert own.items() <= target.items()
        factors = [f for m in engine._drafter.modules() if isinstance(m, LiveLoraLinear) for f in (m.down, m.up)]
        assert bool(factors) == (form == "live")
        whole = make_drafter(engine._replica, "qint8")
        storages = sum(buffer.nbytes for m in whole.modules() if hasattr(m, "qtype") for buffer in m.buffers())
        assert engine.drafter_bytes == storages + sum(factor.nbytes for factor in factors)
        assert output.stats.drafter_bytes == engine.drafter_bytes
        stir(policy)


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Prevents a drafter whose form nobody can find out, and a line per step."""
    with caplog.at_level("INFO", logger="trl_selfspec.drafter.lora_mode"):
        assert choices(LIVE_IS_CHEAP, [0, *[10] * 7]) == [False, *[True] * 7]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "live" in message
    assert "1e+03 ms" in message
    assert "10 draft steps of 3 rows" in message


def test_the_engine_counts_the_draft_steps_of_all_rollouts() -> None:
    """Prevents a choice by the last of several rollouts, as tools and evaluation make them with one drafter."""
    policy = adapted()
    engine = engine_with(policy, LIVE_IS_CHEAP)
    first, second = sample(engine), engine.generate(PROMPTS, CONFIG, seed=8)
    assert engine._form._since.draft_steps == first.stats.draft_steps + second.stats.draft_steps > 0
    stir(policy)
    third = sample(engine)  # chooses, and counts anew
    assert engine._form._since.draft_steps == third.stats.draft_steps
