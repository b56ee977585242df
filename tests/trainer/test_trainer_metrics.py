"""What a run logs about its rollouts, measured on real TRL runs."""

import io
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig
from trl_runs import (
    ALWAYS_SPECULATE,
    FP32_LOGP_TOLERANCE,
    make_dataset,
    make_model,
    make_trainer,
    train,
    weights,
)

from trl_selfspec import SelfSpecGRPOTrainer
from trl_selfspec.engine.rollout import Progress
from trl_selfspec.trainer.metrics import RolloutBar


BF16_LOGP_TOLERANCE = 0.1  # same, in bf16: 2-3 significant digits of a log-probability of a few nats
REJECTED_DRAFTS = ALWAYS_SPECULATE | {"selfspec_draft_qtype": "qint4"}  # of qint8 the policy accepts all
ALWAYS_LOGGED = [
    "selfspec/tokens_per_s",
    "selfspec/rollout_s",
    "selfspec/rollout_step_fraction",
    "selfspec/refresh_s",
    "selfspec/drafter_bytes",
    "selfspec/kv_bytes",
    "selfspec/speculative_round_fraction",
    "selfspec/fallback",
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
]
LOGGED_IF_SPECULATING = [
    "selfspec/acceptance_rate",
    "selfspec/alpha",
    "selfspec/mean_acceptance_length",
    "selfspec/acceptance_rate_pos_0",
    "selfspec/acceptance_rate_pos_2",
    "selfspec/num_speculative_tokens",
    "selfspec/toggle_active_sequences",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, float]]]:
    """A trainer after two steps, and its log."""
    trainer = make_trainer(tmp_path_factory.mktemp("run"), **REJECTED_DRAFTS)
    return trainer, train(trainer)


def test_a_run_changes_all_weights_and_logs_every_metric(run: tuple[Any, list[dict[str, float]]]) -> None:
    """Without them nobody can judge speed, acceptance and the distance between sampler and trainer."""
    trainer, log = run
    before = dict(make_model().named_parameters())
    for name, tensor in weights(trainer).items():
        assert not torch.equal(tensor, before[name]), name
    for entry in log:
        for name in ALWAYS_LOGGED + LOGGED_IF_SPECULATING:
            assert math.isfinite(entry[name]), name
        assert entry["selfspec/speculative_round_fraction"] == 1
        assert entry["selfspec/num_speculative_tokens"] == 3
        assert entry["selfspec/fallback"] == 0
        assert 0 < entry["selfspec/rollout_step_fraction"] <= 1
        assert entry["sampling/sampling_logp_difference/max"] < FP32_LOGP_TOLERANCE


def test_a_plain_grpo_config_is_enough(tmp_path: Path) -> None:
    """Changing one class name in a script has to do; the defaults then decide by themselves whether to speculate."""
    for entry in train(make_trainer(tmp_path, config_class=GRPOConfig)):
        assert set(ALWAYS_LOGGED) <= set(entry)


def test_the_default_mixed_precision_runs(tmp_path: Path) -> None:
    """TRL's default is fp32 weights under bf16 autocast: a cache or a replica in the wrong dtype fails only there."""
    trainer = make_trainer(tmp_path, bf16=True, **ALWAYS_SPECULATE)
    assert trainer.accelerator.mixed_precision == "bf16"
    for entry in train(trainer):
        assert entry["sampling/sampling_logp_difference/mean"] < BF16_LOGP_TOLERANCE
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_metrics_are_ratios_of_sums_over_the_logging_interval(
    tmp_path: Path, run: tuple[Any, list[dict[str, float]]]
) -> None:
    """A mean of per-step ratios weighs a short rollout like a long one."""
    _, each = run
    (both,) = train(make_trainer(tmp_path, logging_steps=2, **REJECTED_DRAFTS))
    rates = [entry["selfspec/acceptance_rate"] for entry in each]
    assert min(rates) <= both["selfspec/acceptance_rate"] <= max(rates)
    assert rates[0] != rates[1]
    assert both["selfspec/drafter_bytes"] == each[0]["selfspec/drafter_bytes"]


def test_logp_difference_compares_the_trainers_distribution_not_the_processed_one(tmp_path: Path) -> None:
    """Under top-k the processed log-probabilities are larger than those TRL computes, which would look like drift."""
    for entry in train(make_trainer(tmp_path, top_k=5, temperature=0.7, **ALWAYS_SPECULATE)):
        assert entry["sampling/sampling_logp_difference/max"] < FP32_LOGP_TOLERANCE


class _OffByATenth(SelfSpecGRPOTrainer):
    def _pack_rollout(self, completion_ids: Any, logprobs: Any) -> Any:
        return super()._pack_rollout(completion_ids, [[value + 0.1 for value in row] for row in logprobs])


def test_logp_difference_shows_a_sampler_that_is_off(tmp_path: Path) -> None:
    """Negative control: rows are shuffled on the way to the loss, and the difference must still be the row's own."""
    for entry in train(make_trainer(tmp_path, _OffByATenth, **ALWAYS_SPECULATE)):
        assert entry["sampling/sampling_logp_difference/mean"] == pytest.approx(0.1, abs=FP32_LOGP_TOLERANCE)


def test_evaluation_is_logged_under_eval(tmp_path: Path) -> None:
    """Counters of evaluation in the training log would mix two temperatures of traffic and reset the wrong window."""
    trainer = make_trainer(
        tmp_path,
        trainer_kwargs={"eval_dataset": make_dataset()},
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=2,
        max_steps=1,
        **ALWAYS_SPECULATE,
    )
    train(trainer)
    (entry,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    for name in ("selfspec/acceptance_rate", "selfspec/tokens_per_s", "sampling/sampling_logp_difference/max"):
        assert math.isfinite(entry[f"eval_{name}"])
    assert trainer._run.generations == 1


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "show", "drawn"), [(_Terminal, True, True), (_Terminal, False, False), (io.StringIO, True, False)]
)
def test_the_progress_bar_draws_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], show: bool, drawn: bool
) -> None:
    """A log file with a line per round, or the bars of sixteen ranks on one terminal, can't be read."""
    monkeypatch.setattr(sys, "stderr", screen := stream())
    with RolloutBar(8, show) as bar:
        bar.on_round(Progress(unfinished=5, completed_tokens=30, tokens_per_s=120.0, num_speculative_tokens=4))
    assert ("3/8" in screen.getvalue() and "5 unfinished, 120 tokens/s, draft 4" in screen.getvalue()) == drawn
    assert bool(screen.getvalue()) == drawn
