"""Whatever goes wrong with the engine ends in TRL's own generation or in plain rounds, and one warning says why."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import TrainerCallback
from trl_runs import ALWAYS_SPECULATE, GREEDY, Recorder, make_model, make_trainer, train

from trl_selfspec.engine import engine as engines
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.policy.replica import PolicyReplica
from trl_selfspec.trainer.metrics import STATE_FILE
from trl_selfspec.trainer.mixin import FALLBACK_WARNING


LOGP = "sampling/sampling_logp_difference/max"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    """What the trainer has warned of so far."""
    caplog.set_level(logging.WARNING, logger="trl_selfspec.trainer.mixin")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "trl_selfspec.trainer.mixin"]


def out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")


def vanished(*args: Any, **kwargs: Any) -> Any:
    raise AttributeError("'Config' object has no attribute 'of_a_later_release'")


def assert_trl_generated(log: list[dict[str, float]], reward: Recorder) -> None:
    assert len(log) == len(reward.completion_ids) == 2  # nothing is lost
    assert [entry["selfspec/fallback"] for entry in log] == [1, 1]


def test_a_hybrid_of_another_recurrence_trains_with_trls_own_generation(tmp_path: Path, warnings: Any) -> None:
    """A recurrent layer's call of the cache ended the run, where TRL trains."""
    mixers = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8, "num_experts": 2}
    model = tiny_model("jamba", vocab_size=99, eos_token_id=2, head_dim=None, **mixers)
    reward = Recorder()
    assert_trl_generated(train(make_trainer(tmp_path, model=model, reward=reward)), reward)
    (warning,) = warnings()
    assert warning.startswith(FALLBACK_WARNING)
    assert "JambaMambaMixer" in warning


@pytest.mark.parametrize("error", [out_of_memory, vanished])
@pytest.mark.parametrize("place", ["replica", "check"])
def test_an_engine_that_can_not_be_built_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Any, place: str, error: Any
) -> None:
    """Whatever the exception: a model of tomorrow, or a device without memory for a second module tree."""
    monkeypatch.setattr(*{"replica": (PolicyReplica, "_complete"), "check": (engines, "self_check")}[place], error)
    reward = Recorder()
    assert_trl_generated(train(make_trainer(tmp_path, reward=reward)), reward)
    (warning,) = warnings()
    assert "of_a_later_release" in warning or "20.00 GiB" in warning


def test_a_rollout_that_fails_is_generated_by_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Any
) -> None:
    """Out of memory in the first round: the completions of this step are TRL's, and so are all later ones."""
    monkeypatch.setattr("trl_selfspec.engine.model_runner.ModelRunner.plain", out_of_memory)
    reward = Recorder()
    trainer = make_trainer(tmp_path, reward=reward, selfspec_num_speculative_tokens=0)
    assert_trl_generated(train(trainer), reward)
    (warning,) = warnings()
    assert "OutOfMemoryError: Tried to allocate 20.00 GiB." in warning
    assert trainer._engine is None


@pytest.fixture(scope="module")
def greedy_plain_run(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """The completions of two greedy steps without speculation."""
    reward = Recorder()
    train(make_trainer(tmp_path_factory.mktemp("plain"), reward=reward, selfspec_num_speculative_tokens=0, **GREEDY))
    return reward.completion_ids


@pytest.mark.parametrize(
    "place",
    [
        "trl_selfspec.drafter.quantized_drafter.make_drafter",
        "trl_selfspec.drafter.quantized_drafter.requantize",
        "trl_selfspec.engine.model_runner.ModelRunner._draft",
    ],
)
def test_a_drafter_that_fails_leaves_plain_rounds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    greedy_plain_run: list[list[list[int]]],
    place: str,
) -> None:
    """A layer that can't be quantized, or a router that reads its weights, ended the run."""
    reward = Recorder()
    monkeypatch.setattr(place, vanished)
    with caplog.at_level(logging.WARNING, logger="trl_selfspec.engine.rollout"):
        log = train(make_trainer(tmp_path, reward=reward, **ALWAYS_SPECULATE, **GREEDY))
    assert reward.completion_ids == greedy_plain_run
    assert [entry["selfspec/fallback"] for entry in log] == [0, 0]
    assert [entry["selfspec/speculative_round_fraction"] for entry in log] == [0, 0]
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "trl_selfspec.engine.rollout"]
    assert "of_a_later_release" in warning


def test_an_error_that_is_the_users_own_is_raised(tmp_path: Path) -> None:
    """TRL could not sample from such a policy either; a fallback would hide the loss that diverged."""
    model = make_model()

    class Diverge(TrainerCallback):
        @torch.no_grad()
        def on_step_end(self, *_: Any, **__: Any) -> None:
            model.lm_head.weight.fill_(torch.nan)

    trainer = make_trainer(tmp_path, model=model, trainer_kwargs={"callbacks": [Diverge()]})
    with pytest.raises(ValueError, match="not finite"):
        train(trainer)


def test_a_policy_that_begins_to_compute_something_else_is_found_out(tmp_path: Path, warnings: Any) -> None:
    """A hook that a callback registers in mid-training: the logged difference leaves what rounding explains."""
    model = make_model()

    class Hook(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not model.model.layers[0].mlp._forward_hooks:
                model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: -output)

    kwargs = {"callbacks": [Hook()]}
    log = train(make_trainer(tmp_path, model=model, trainer_kwargs=kwargs, max_steps=4, **ALWAYS_SPECULATE))
    assert [entry["selfspec/fallback"] for entry in log] == [0, 0, 1, 1]
    assert log[0][LOGP] < 1e-3 < log[1][LOGP]
    (warning,) = warnings()
    assert "has a forward hook" in warning
    assert "log-probabilities differ from the trainer's by" in warning


def test_a_doubt_without_ground_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Any
) -> None:
    """A check that finds the engine sound keeps it, and is not made again for as large a difference."""
    checks: list[SelfSpecEngine] = []
    check = SelfSpecEngine.check
    monkeypatch.setattr(SelfSpecEngine, "check", lambda self: [checks.append(self), check(self)])
    monkeypatch.setattr("trl_selfspec.trainer.engine_sync.LEAST_DOUBT", -1.0)
    monkeypatch.setattr("trl_selfspec.trainer.engine_sync.DOUBT_IN_NOISES", 0.0)
    trainer = make_trainer(tmp_path, max_steps=2, **ALWAYS_SPECULATE)
    log = train(trainer)
    assert [entry["selfspec/fallback"] for entry in log] == [0, 0]
    assert len(checks) == 1
    assert warnings() == []


class AtBegin(TrainerCallback):
    """Calls a function when training begins, after a checkpoint was loaded."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.action()


class Ema(TrainerCallback):
    """Swaps averaged weights in for evaluation and out again, as EMA callbacks do: through `.data`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.average = model, [2 * p.detach().clone() for p in model.parameters()]

    def swap(self) -> None:
        for parameter, average in zip(self.model.parameters(), self.average, strict=True):
            current = parameter.data.clone()
            parameter.data.copy_(average)
            average.copy_(current)


@pytest.mark.parametrize("bf16", [False, True])
def test_averaged_weights_of_an_evaluation_reach_no_training_rollout(tmp_path: Path, bf16: bool) -> None:
    """The next rollout sampled from the average: log-probabilities were off by 5.4 and 7.5 in bf16."""
    model = make_model()
    ema = Ema(model)
    trainer = make_trainer(tmp_path, model=model, bf16=bf16, max_steps=1, num_generations_eval=3)
    trainer.eval_dataset = trainer.train_dataset
    (first,) = train(trainer)
    ema.swap()
    trainer.evaluate()
    ema.swap()
    trainer.args.max_steps = 2
    second = train(trainer)[-1]
    assert second[LOGP] < max(3 * first[LOGP], 1e-3)


def test_a_prompt_that_fills_the_context_is_left_to_trl_for_that_generation(tmp_path: Path, warnings: Any) -> None:
    """It ended the run, where TRL's goes on past the context."""
    trainer = make_trainer(tmp_path, **ALWAYS_SPECULATE)
    trainer._prepare_engine()
    assert len(trainer.generate_ids([[5] * 130, [6, 7]])) == 2
    assert len(trainer.generate_ids([[5, 8], [6, 7]])) == 2
    assert (trainer._rollout.turns, trainer._rollout.fallbacks) == (2, 1)
    (warning,) = warnings()
    assert "a prompt of 130 tokens fills the model's context of 128 positions" in warning


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    """A trainer, the state file of its checkpoint after one step, and the file's content."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = make_trainer(folder, max_steps=1, save_strategy="steps", save_steps=1, **ALWAYS_SPECULATE)
    train(trainer)
    path = folder / "checkpoint-1" / STATE_FILE
    return trainer, path, path.read_text()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"engine": {}, "run": []}', '{"run": [1.0]}', '{"engine": {}, "run": {"turns": 1}}']
)
def test_a_state_file_that_can_not_be_read_costs_what_it_held(
    saved: tuple[Any, Path, str], warnings: Any, content: str
) -> None:
    """A truncated file must not keep a run from going on."""
    trainer, path, _ = saved
    path.write_text(content)
    state, run = trainer._engine_sync.state_dict(), trainer._run
    trainer._warned.clear()
    trainer._load_optimizer_and_scheduler(str(path.parent))
    assert (trainer._engine_sync.state_dict(), trainer._run) == (state, run)
    (warning,) = warnings()
    assert STATE_FILE in warning
    assert "measured afresh" in warning


@pytest.mark.parametrize("content", ["{", None], ids=["damaged", "of an earlier version"])
def test_a_run_resumes_from_any_state_file(
    tmp_path: Path, saved: tuple[Any, Path, str], warnings: Any, content: str | None
) -> None:
    """Of an earlier version, whose counters were one list, what the engine had learned is kept."""
    _, path, original = saved
    engine_state = json.loads(original)["engine"]
    path.write_text(content or json.dumps({"engine": engine_state, "run": [1.0] * 80}))
    trainer = make_trainer(tmp_path, **ALWAYS_SPECULATE)
    loaded: list[dict[str, Any]] = []
    trainer.add_callback(AtBegin(lambda: loaded.append(copy.deepcopy(trainer._engine_sync.state_dict()))))
    log = train(trainer, resume_from_checkpoint=str(path.parent))
    assert log[-1]["selfspec/fallback"] == 0
    assert loaded == [None if content else engine_state]
    assert trainer._run.generations == 1  # of the second step
    (warning,) = warnings()
    assert ("measured afresh" if content else "earlier version") in warning


def test_the_noise_of_neftune_stays_out_of_rollouts(tmp_path: Path) -> None:
    """`--neftune_noise_alpha` crashed; the noise belongs to training's forward alone."""
    log = train(make_trainer(tmp_path, neftune_noise_alpha=5.0, **ALWAYS_SPECULATE))
    assert [entry["selfspec/fallback"] for entry in log] == [0, 0]


def test_after_a_resume_the_engine_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights came from a file: what fitted before may not fit them."""
    trainer = make_trainer(tmp_path, **ALWAYS_SPECULATE)
    trainer._prepare_engine()
    checked: list[str] = []
    monkeypatch.setattr(SelfSpecEngine, "check", lambda self: checked.append("check"))
    trainer._engine_sync.load_state_dict(copy.deepcopy(trainer._engine_sync.state_dict()))
    trainer._prepare_engine()
    trainer._prepare_engine()
    assert checked == ["check"]
