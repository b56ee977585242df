"""Multi-turn rollouts through TRL's own machinery: `tools`, `environment_factory` and `rollout_func`."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from tool_runs import (
    MAX_COMPLETION,
    NUM_CALLS,
    Doubler,
    double,
    make_tool_tokenizer,
    tool_dataset,
    tool_policy,
    tool_rollout,
)
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_runs import ALWAYS_SPECULATE, FP32_LOGP_TOLERANCE, Recorder, make_trainer, module_state, train, weights

from trl_selfspec import SelfSpecGRPOTrainer
from trl_selfspec.kv_cache.prefix_cache import PrefixCache, Tokens


pytestmark = pytest.mark.filterwarnings("ignore:You are using '(rollout_func|environment_factory)':UserWarning")

LOGP = "sampling/sampling_logp_difference/max"
WAYS: dict[str, dict[str, Any]] = {
    "tools": {"tools": [double]},
    "environment": {"environment_factory": Doubler},
    "rollout_func": {"rollout_func": tool_rollout},
}
GREEDY = {"generation_kwargs": {"do_sample": False}}


class _Watched(SelfSpecGRPOTrainer):
    """Keeps each rollout's counters, the policy's state before and after, and the cache it leaves."""

    def _generate(self, prompts: list) -> Any:
        before = module_state(self.model)
        self.rollouts = getattr(self, "rollouts", [])
        try:
            return super()._generate(prompts)
        finally:
            assert module_state(self.model) == before
            assert self._engine is None or self._engine.prefix_cache is None
            self.rollouts.append(self._rollout)


class _NudgeWeights(TrainerCallback):
    """A greedy group has no gradient; this moves the weights, but not so far that tools are no longer called."""

    @torch.no_grad()
    def on_step_end(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        for parameter in model.parameters():
            parameter += 0.01 * torch.arange(parameter.numel()).sin().view_as(parameter)


def tool_trainer(folder: Path, way: str, trainer_class: type[Any] = _Watched, **overrides: Any) -> Any:
    kwargs = {"processing_class": make_tool_tokenizer(), **WAYS[way], **overrides.pop("trainer_kwargs", {})}
    options = {"max_completion_length": MAX_COMPLETION, "shuffle_dataset": False} | overrides
    return make_trainer(
        folder, trainer_class, model=tool_policy(), train_dataset=tool_dataset(), trainer_kwargs=kwargs, **options
    )


def greedy_run(folder: Path, way: str, **overrides: Any) -> tuple[Any, Recorder, list[dict[str, float]]]:
    reward = Recorder()
    kwargs = {"callbacks": [_NudgeWeights()]}
    trainer = tool_trainer(folder, way, reward=reward, trainer_kwargs=kwargs, learning_rate=0.0, **GREEDY, **overrides)
    return trainer, reward, train(trainer)


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`greedy(way)`: a greedy run with the engine, made once."""
    return functools.cache(lambda way: greedy_run(tmp_path_factory.mktemp(way), way, **ALWAYS_SPECULATE))


@pytest.mark.parametrize("way", WAYS)
def test_greedy_conversations_are_those_of_trls_own_generation(tmp_path: Path, greedy: Any, way: str) -> None:
    """Prevents a turn that is answered from another row's history, from old weights or from a tool's former answer."""
    ours, reward, log = greedy(way)
    _, stock_reward, stock_log = greedy_run(tmp_path, way, trainer_class=GRPOTrainer, config_class=GRPOConfig)
    assert reward.completion_ids == stock_reward.completion_ids
    # Rows of a step take different numbers of turns: one more than the most calls of a row.
    assert [rollout.turns for rollout in ours.rollouts] == [1 + max(NUM_CALLS[:2]), 1 + max(NUM_CALLS[2:4])]
    if way != "rollout_func":
        frequencies = [[entry["tools/call_frequency"] for entry in entries] for entries in (log, stock_log)]
        assert frequencies[0] == frequencies[1] == [sum(NUM_CALLS[:2]) / 2, sum(NUM_CALLS[2:4]) / 2]
    for entry in log:
        assert entry["selfspec/fallback"] == 0
        assert entry["selfspec/reused_prompt_tokens"] > 0


def test_another_rows_history_shows_in_greedy_conversations(
    tmp_path: Path, greedy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: rows that go on from the other group's keys fail the comparison above."""
    _, expected, _ = greedy("tools")
    found = PrefixCache.longest_prefix

    def wrong(self: PrefixCache, prompt: Tokens) -> tuple[int, int]:
        row, num_tokens = found(self, prompt)
        return (row + 3) % self.cache.max_rows, num_tokens

    monkeypatch.setattr(PrefixCache, "longest_prefix", wrong)
    _, reward, _ = greedy_run(tmp_path, "tools", **ALWAYS_SPECULATE)
    assert reward.completion_ids[0] != expected.completion_ids[0]


@pytest.mark.parametrize("way", WAYS)
def test_two_steps_of_training_with_several_turns(tmp_path: Path, way: str) -> None:
    """The whole of a step: samples, tool results masked, scores of all turns, loss, changed weights, metrics."""
    trainer = tool_trainer(tmp_path, way, temperature=1.3, **ALWAYS_SPECULATE)
    before = weights(trainer)
    log = train(trainer)
    assert len(log) == 2
    for entry in log:
        assert entry["selfspec/fallback"] == 0
        assert entry["selfspec/alpha"] > 0
    assert log[0]["selfspec/reused_prompt_tokens"] > 0
    assert trainer.rollouts[0].turns > 1
    if way == "rollout_func":
        assert LOGP not in log[0], "it returned no log-probabilities"
    else:
        assert log[0]["tools/call_frequency"] > 0
        assert all(entry[LOGP] < FP32_LOGP_TOLERANCE for entry in log)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_a_turn_that_fails_leaves_nothing_allocated(tmp_path: Path) -> None:
    """Prevents keys of a broken conversation from holding memory, or from being found by the next one."""

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        tool_rollout(prompts, trainer)
        assert len(trainer._engine.prefix_cache) > 0
        raise InterruptedError

    kwargs = {"rollout_func": rollout}
    trainer = tool_trainer(tmp_path, "rollout_func", trainer_kwargs=kwargs)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert trainer._engine.prefix_cache is None
    trainer.generate_ids([[5, 6, 7]])  # outside of a rollout
    assert trainer._engine.prefix_cache is None
