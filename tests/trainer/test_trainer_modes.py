"""GRPO's ways to train and to evaluate, two steps each: the engine samples in all of them, from the current policy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOTrainer
from trl_runs import (
    ALWAYS_SPECULATE,
    FP32_LOGP_TOLERANCE,
    PROMPTS,
    Recorder,
    make_dataset,
    make_model,
    make_trainer,
    train,
    weights,
)

from trl_selfspec import SelfSpecMixin


LOGP = "sampling/sampling_logp_difference/max"
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2}
# Options, and how often two optimizer steps generate.
MODES: dict[str, tuple[dict[str, Any], int]] = {
    "num_iterations": ({"num_iterations": 2}, 1),
    "steps_per_generation": ({"steps_per_generation": 2}, 1),
    "accumulation": ({"gradient_accumulation_steps": 2}, 2),
    "generation_spans_two_accumulations": ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 1),
    "two_generations_per_accumulation": ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, 4),
    "mask_truncated_completions": ({"mask_truncated_completions": True, "max_completion_length": 100}, 2),
    "log_completions": ({"log_completions": True}, 2),
    "reference_model": ({"beta": 0.1}, 2),
    "gradient_checkpointing_off": ({"gradient_checkpointing": False}, 2),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_trains_on_what_the_engine_samples(tmp_path: Path, mode: str) -> None:
    """Each of them moves, repeats or masks rollouts on their way to the loss."""
    options, num_generations = MODES[mode]
    make_model().save_pretrained(tmp_path / "model")  # from where TRL loads the reference model
    reward = Recorder()
    trainer = make_trainer(tmp_path, model=str(tmp_path / "model"), reward=reward, **(ALWAYS_SPECULATE | options))
    before = weights(trainer)
    log = train(trainer)
    assert len(reward.completion_ids) == num_generations
    assert len(log) == 2
    assert log[0]["selfspec/fallback"] == 0
    assert log[0]["selfspec/speculative_round_fraction"] == 1
    assert log[0][LOGP] < FP32_LOGP_TOLERANCE
    assert all(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_completions_that_all_ran_out_of_tokens_leave_nothing_to_compare(tmp_path: Path) -> None:
    """Masked completions count neither in the loss nor in the distance to the sampler: a mean of nothing is NaN."""
    options = {"mask_truncated_completions": True, "max_completion_length": 2, "max_steps": 1}
    (entry,) = train(make_trainer(tmp_path, **ALWAYS_SPECULATE, **options))
    assert entry["completions/clipped_ratio"] == 1
    assert LOGP not in entry
    assert entry["selfspec/fallback"] == 0


@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "iterable"])
def test_training_and_evaluation_datasets_may_be_streamed(tmp_path: Path, streamed: bool) -> None:
    """Iterable datasets reach the trainer without a length, and evaluation with groups of another size."""
    train_dataset, eval_dataset = make_dataset(), make_dataset().select(range(3))
    if streamed:
        train_dataset, eval_dataset = train_dataset.to_iterable_dataset(), eval_dataset.to_iterable_dataset()
    reward = Recorder()
    trainer = make_trainer(
        tmp_path,
        reward=reward,
        trainer_kwargs={"eval_dataset": eval_dataset},
        train_dataset=train_dataset,
        **ALWAYS_SPECULATE,
        **EVALUATION,
    )
    log = train(trainer)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(log) == len(evaluations) == 2
    assert [len(rows) for rows in reward.completion_ids] == [6] * 4
    for entry in evaluations:
        assert entry[f"eval_{LOGP}"] < FP32_LOGP_TOLERANCE
        assert entry["eval_selfspec/fallback"] == 0


class _OtherBackend(GRPOTrainer):
    """Stands for vLLM, which is not installed: the trainer believes in it once it is constructed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_vllm = True

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return [[5, 2]] * len(prompt_ids), None


class _SelfSpecOtherBackend(SelfSpecMixin, _OtherBackend):
    pass


def test_with_vllm_the_engine_stays_out_of_the_way(tmp_path: Path) -> None:
    """Two engines on one GPU, or a warning about a fallback that the user asked for."""
    trainer = make_trainer(tmp_path, _SelfSpecOtherBackend)
    assert trainer._generate(PROMPTS[:2])[1] == [[5, 2]] * 2
    assert trainer._engine is None
    assert not trainer._warned
