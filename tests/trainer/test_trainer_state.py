"""A rollout leaves the policy unchanged, the engine is synced with it; checkpoint and model card outlive a run."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer
from trl_runs import (
    ALWAYS_SPECULATE,
    Recorder,
    assert_same_weights,
    make_dataset,
    make_model,
    make_trainer,
    module_state,
    train,
)

from trl_selfspec import SelfSpecEngine, SelfSpecGRPOTrainer
from trl_selfspec.drafter import quantized_drafter
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.trainer.metrics import STATE_FILE, GenerationStats
from trl_selfspec.trainer.model_card import rollout_section


class _Watched(SelfSpecGRPOTrainer):
    """Keeps the policy's state right before and right after each rollout."""

    def _generate(self, prompts: list) -> Any:
        self.states = getattr(self, "states", [])
        before = module_state(self.model)
        try:
            return super()._generate(prompts)
        finally:
            self.states.append((before, module_state(self.model)))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_rollout_leaves_the_policy_as_it_was(tmp_path: Path, lora: bool) -> None:
    """Mode, hooks, checkpointing, `use_cache`, addresses: the rest of the step is TRL's and relies on all of them."""
    peft_config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None
    trainer = make_trainer(tmp_path, _Watched, trainer_kwargs={"peft_config": peft_config}, **ALWAYS_SPECULATE)
    train(trainer)
    assert len(trainer.states) == 2
    for before, after in trainer.states:
        assert after == before


def run_until_the_policy_breaks(tmp_path: Path, **overrides: Any) -> Any:
    """Makes the policy's weights NaN before the second rollout, which raises."""
    model = make_model()

    def poison(call: int) -> None:
        with torch.no_grad():
            model.model.norm.weight.fill_(math.nan)

    trainer = make_trainer(tmp_path, _Watched, model=model, reward=Recorder(poison), **overrides)
    with pytest.raises((ValueError, RuntimeError)):
        trainer.train()
    assert len(trainer.states) == 2
    return trainer


def test_an_exception_in_a_rollout_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    """Whoever catches it and goes on would train without checkpointing or in the wrong mode, and not know."""
    trainer = run_until_the_policy_breaks(tmp_path, **ALWAYS_SPECULATE)
    before, after = trainer.states[-1]
    assert after == before
    assert trainer._engine.prefix_cache is None


def test_the_state_comparison_sees_what_trls_own_path_leaves_behind(tmp_path: Path) -> None:
    """Negative control: TRL switches gradient checkpointing off for `generate` and, on an exception, leaves it so."""
    before, after = run_until_the_policy_breaks(tmp_path, use_selfspec=False).states[-1]
    assert after != before


@pytest.mark.parametrize(("interval", "draft"), [(1, [True, True, True]), (2, [False, True, False])])
def test_the_drafter_follows_every_nth_step_and_the_target_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: int, draft: list[bool]
) -> None:
    """A stale target samples from another distribution; requantizing too often costs the time the user saved."""
    calls: list[bool] = []
    original = SelfSpecEngine.refresh
    monkeypatch.setattr(
        SelfSpecEngine, "refresh", lambda engine, draft=True: (calls.append(draft), original(engine, draft))[1]
    )
    train(make_trainer(tmp_path, max_steps=4, selfspec_refresh_interval=interval, **ALWAYS_SPECULATE))
    assert calls == draft


def test_one_quantization_serves_all_generations_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation generates once per batch with the same weights; only copies of the target are renewed each time."""
    calls: list[int] = []
    original = quantized_drafter.requantize
    monkeypatch.setattr(quantized_drafter, "requantize", lambda *args: (calls.append(1), original(*args))[1])
    trainer = make_trainer(tmp_path, trainer_kwargs={"eval_dataset": make_dataset()}, **ALWAYS_SPECULATE)
    trainer.evaluate()
    assert len(calls) == 1
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
    trainer.evaluate()
    assert len(calls) == 1  # the same step: not before the interval is over


def test_the_best_model_is_followed_where_versions_do_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed loads past version counters and without a step: evaluation would sample from the last weights."""
    monkeypatch.setattr(Trainer, "_load_best_model", lambda trainer: trainer.model.lm_head.weight.data.mul_(-1.0))
    trainer = make_trainer(tmp_path, bf16=True, **ALWAYS_SPECULATE)  # under autocast the target has copies
    trainer.generation_config.do_sample = False
    before = trainer.generate_ids([[5, 6, 7]])
    assert trainer.generate_ids([[5, 6, 7]]) == before
    trainer._load_best_model()
    best = make_trainer(tmp_path, model=trainer.model, bf16=True, **ALWAYS_SPECULATE)
    best.generation_config.do_sample = False
    assert trainer.generate_ids([[5, 6, 7]]) == best.generate_ids([[5, 6, 7]]) != before


def test_a_resumed_run_continues_the_interrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """With counts alone deciding, a resumed run that differs has lost a generator's state or the drafter's version."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, **ALWAYS_SPECULATE}
    whole = make_trainer(tmp_path, **options)
    train(whole)
    resumed = make_trainer(tmp_path, **options)
    train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(resumed, whole)
    assert resumed._run.generations == whole._run.generations == 3
    assert resumed._run.stats.completion_tokens == whole._run.stats.completion_tokens


def test_the_controller_comes_back_from_a_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without it each resumed run measures costs and acceptance again; a checkpoint of stock TRL has none to give."""
    first = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, **ALWAYS_SPECULATE)
    train(first)
    path = tmp_path / "checkpoint-1" / STATE_FILE
    saved = json.loads(path.read_text())
    assert saved["engine"] == json.loads(json.dumps(first._engine.state_dict()))

    resumed, fresh = (make_trainer(tmp_path, **ALWAYS_SPECULATE) for _ in range(2))
    resumed.create_optimizer_and_scheduler(num_training_steps=2)
    resumed._load_optimizer_and_scheduler(str(path.parent))
    resumed.save_state()
    assert json.loads((tmp_path / STATE_FILE).read_text()) == saved
    for trainer in (resumed, fresh):
        trainer._prepare_engine()
    assert json.loads(json.dumps(resumed._engine.state_dict())) == saved["engine"]
    assert json.loads(json.dumps(fresh._engine.state_dict())) != saved["engine"]

    path.unlink()
    with caplog.at_level(logging.WARNING, logger="trl_selfspec.trainer.mixin"):
        fresh.train(resume_from_checkpoint=str(path.parent))
    assert [STATE_FILE in record.getMessage() for record in caplog.records if "selfspec" in record.name] == [True]
    assert fresh.state.global_step == 2


def test_the_model_card_says_how_completions_were_generated(tmp_path: Path) -> None:
    """A card that cites a figure nobody measured, or a model called None, is worse than no card."""
    model = make_model()
    model.config._name_or_path = str(tmp_path)
    trainer = make_trainer(tmp_path / "run", model=model, **ALWAYS_SPECULATE)
    train(trainer)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "run" / "README.md").read_text()
    for text in ("- selfspec", "- grpo", "SelfSpecGRPOTrainer", "qint8", "trl-selfspec:", "2402.03300", "2606.18967"):
        assert text in card
    assert "None" not in card
    assert f"`{tmp_path.name}`" in card
    assert f"{trainer._run.stats.acceptance_rate:.3f}" in card
    assert f"{trainer._run.stats.mean_acceptance_length:.2f}" in card
    assert "speed-up" not in card  # every round speculated, so that no plain round was there to compare with
    before_framework, _, _ = card.partition("### Framework versions")
    assert "### Rollouts" in before_framework


def test_the_model_card_has_no_figures_without_a_measurement() -> None:
    """Zero tokens/s, or a speed-up of 1.00, would be read as a result."""
    assert "|" not in rollout_section("T", SelfSpecOptions(), GenerationStats())
    plain = SelfSpecOptions(num_speculative_tokens=0)
    assert "without speculation" in rollout_section("T", plain, GenerationStats())
