"""Launching a round before the last one is read changes nothing but what the host waits for."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import pairwise
from simulated_machine import LOSING, Machine
from tiny_models import Schedule, built_once, force_page_size, ragged_prompts, spoil, tiny_model
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec import SelfSpecEngine, SelfSpecOptions
from trl_selfspec.control.controller import Choice, Controller, DrafterTraits
from trl_selfspec.engine import engine
from trl_selfspec.engine.batch_state import BatchState
from trl_selfspec.engine.engine import RolloutOutput
from trl_selfspec.engine.model_runner import ModelRunner
from trl_selfspec.engine.rollout import Rollout


GREEDY = {"do_sample": False, "eos_token_id": [7, 9, 30, 31, 32]}
SAMPLING = {"do_sample": True, "temperature": 1.2, "eos_token_id": [7, 9, 30, 31, 32]}
COUNTERS = ["completion_tokens", "plain_row_rounds", "prompt_tokens", "num_rows"]
COUNTERS += ["drafted_per_position", "examined_per_position", "accepted_per_position"]
PROMPTS = [*ragged_prompts([5, 9, 3, 14]), *ragged_prompts([5, 5]) * 2]  # a group of three too


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen2")


@built_once
def make_engine(model: PreTrainedModel, schedule: tuple[int, ...], **options: Any) -> SelfSpecEngine:
    made = SelfSpecEngine(
        model,
        SelfSpecOptions(draft_qtype="qint8", num_speculative_tokens=3, **options),
        controller=Schedule(*schedule),
    )
    spoil(made, noise=0.5)
    return made


def outputs(
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    ahead: int,
    law: dict[str, Any] = SAMPLING,
    schedule: tuple[int, ...] = (3,),
    **options: Any,
) -> list[RolloutOutput]:
    """Two turns of a conversation with rows that end early, in groups, at their limit."""
    monkeypatch.setitem(engine.ROUNDS_AHEAD, "cpu", ahead)
    made = make_engine(model, schedule, **options)
    config = GenerationConfig(max_new_tokens=14, pad_token_id=0, **law)
    first = made.generate(PROMPTS, config, seed=0, keep=True)
    prompts = [[*prompt, *ids, 11] for prompt, ids in zip(PROMPTS, first.completion_ids, strict=True)]
    return [first, made.generate(prompts, config, seed=1, keep=True)]


def same(left: list[RolloutOutput], right: list[RolloutOutput]) -> bool:
    return all(
        a.completion_ids == b.completion_ids
        and all(
            torch.allclose(torch.tensor(x), torch.tensor(y), atol=2e-5)
            for x, y in zip(a.logprobs, b.logprobs, strict=True)
        )
        for a, b in zip(left, right, strict=True)
    )


@pairwise(page_size=[None, 4], schedule=[(0,), (3,)], law=[GREEDY, SAMPLING], max_batch_size=[None, 3])
def test_rounds_ahead_change_no_token(
    model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    page_size: int | None,
    schedule: tuple[int, ...],
    law: dict[str, Any],
    max_batch_size: int | None,
):
    """Rows end, move, and are taken over while a round is in flight; what it brings ended rows must not be counted."""
    force_page_size(monkeypatch, page_size)
    options = {"law": law, "schedule": schedule, "max_batch_size": max_batch_size}
    read_at_once = outputs(model, monkeypatch, 0, **options)
    for ahead in (1, 2):
        late = outputs(model, monkeypatch, ahead, **options)
        assert same(late, read_at_once)
        for a, b in zip(late, read_at_once, strict=True):
            for counter in COUNTERS:
                assert getattr(a.stats, counter) == getattr(b.stats, counter), counter


def moves_that_forget_what_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rollout, "_ahead", 0)


def results_read_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had moved since the launch."""
    move = BatchState.move
    monkeypatch.setattr(BatchState, "move", lambda self, source, target: move(self, target, source))


@pytest.mark.parametrize(
    "sabotage",
    [moves_that_forget_what_is_in_flight, results_read_by_position],
)
def test_a_mistake_with_rounds_in_flight_is_noticed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, sabotage: Callable[[pytest.MonkeyPatch], None]
):
    """Negative control."""
    force_page_size(monkeypatch, 4)
    read_at_once = outputs(model, monkeypatch, 0)
    sabotage(monkeypatch)
    try:
        late = outputs(model, monkeypatch, 1)
    except (AssertionError, IndexError, RuntimeError):
        return
    assert not same(late, read_at_once)


def test_a_policy_that_fails_is_told_with_rounds_in_flight(monkeypatch: pytest.MonkeyPatch):
    """A round late is early enough; not at all would train on garbage."""
    broken = tiny_model("qwen2")
    made = SelfSpecEngine(broken, SelfSpecOptions(num_speculative_tokens=0))
    monkeypatch.setitem(engine.ROUNDS_AHEAD, "cpu", 1)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    made.refresh()
    with pytest.raises(ValueError, match="logits are not finite"):
        made.generate(PROMPTS, GenerationConfig(max_new_tokens=8, do_sample=True, pad_token_id=0), seed=0)


def test_a_rollout_that_was_interrupted_leaves_nothing_behind(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    """Drafts that were never verified would shift those of the next rollout, behind the end of what holds them."""
    force_page_size(monkeypatch, 4)  # the state of rows outlives a failed rollout with the table of its pages
    config = GenerationConfig(max_new_tokens=14, pad_token_id=0, **SAMPLING)
    expected = make_engine(model, (3,)).generate(PROMPTS, config, seed=0)
    interrupted = make_engine(model, (3,))
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "_verify", interrupt)
        with pytest.raises(KeyboardInterrupt):
            interrupted.generate(PROMPTS, config, seed=0)
    assert interrupted._state is not None and interrupted._state.num_drafted[0] == 3
    assert same([interrupted.generate(PROMPTS, config, seed=0)], [expected])


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def test_building_the_drafter_is_no_price_of_quantizing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    """Kernels compile once; a gate that took this for the price of every rollout would never draft again."""
    controller, prices = Schedule(2), []
    monkeypatch.setattr(controller, "observe_preparing", lambda name, seconds, typical: prices.append(typical))
    made = SelfSpecEngine(model, SelfSpecOptions(num_speculative_tokens=2), controller=controller)
    for _ in range(3):
        made.generate(PROMPTS, GenerationConfig(max_new_tokens=6, pad_token_id=0), seed=0)
        made.refresh()
    assert prices == [False, True, True], "of three rollouts, the first built the drafter"


QUANTIZED = [DrafterTraits("quantized")]


class ReadLate(Controller):
    """Hears of a round when the next one has been chosen."""

    heard: Callable[[], None] = staticmethod(lambda: None)

    def choose(self, rows: int) -> Choice:
        choice = super().choose(rows)
        self.heard()
        return choice

    def observe_plain(self, *measurement: Any) -> None:
        self.heard = functools.partial(super().observe_plain, *measurement)

    def observe_speculative(self, *measurement: Any) -> None:
        self.heard = functools.partial(super().observe_speculative, *measurement)


@pytest.mark.parametrize("name", LOSING)
def test_exploring_takes_no_longer_where_rounds_are_read_late(name: str):
    """A trial that is started again before it is read, and charged to the round before it, costs twice the budget."""
    *law, rows = LOSING[name]
    wasted = []
    for controller in (Controller(QUANTIZED), ReadLate(QUANTIZED)):
        machine, tokens = Machine(*law, noise=0.0), 0.0
        for _ in range(3000):
            tokens += sum(machine.round(rows, controller, controller.choose(rows))) / rows
        wasted.append(machine.seconds - tokens * machine.target(rows, 1))
    assert wasted[1] < 1.2 * wasted[0]


def test_rounds_that_teach_nothing_are_passed_over(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    """Else each later round would be taken for the one before it, and its trial charged to another."""
    monkeypatch.setitem(engine.ROUNDS_AHEAD, "cpu", 1)
    force_page_size(monkeypatch, 4)
    # With captures, the first two rounds of a kind teach nothing.
    made = SelfSpecEngine(model, SelfSpecOptions(num_speculative_tokens=2), capture=lambda function: function)
    for seed in range(3):
        made.generate(PROMPTS, GenerationConfig(max_new_tokens=14, pad_token_id=0, **SAMPLING), seed=seed)
        assert len(made.controller._under_way) <= 1, "the round that began when all rows had ended"
