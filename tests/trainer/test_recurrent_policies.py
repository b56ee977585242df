"""Policies with recurrent layers train on what the engine samples: one per kind of recurrence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import stir
from peft import LoraConfig, get_peft_model
from sweep.configs import small_config
from tiny_models import scale_weights
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from trl_runs import FP32_LOGP_TOLERANCE, Recorder, make_trainer, train, weights

from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions


SUFFIX = {
    "selfspec_drafter": "suffix",
    "selfspec_num_speculative_tokens": 2,
    "selfspec_max_active_sequences": 100,
}
KINDS = ["lfm2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_next", "falcon_h1", "nemotron_h"))]
# Experts that no token was sent to have no gradient.
MAY_STAY = ("expert", "router", "e_score")


def make_policy(family: str) -> PreTrainedModel:
    config = small_config(family)
    config.vocab_size = 99
    model = AutoModelForCausalLM.from_config(config)
    scale_weights(model, seed=0)
    return model


@pytest.mark.parametrize("family", KINDS)
def test_a_recurrent_policy_trains_on_what_the_engine_samples(tmp_path: Path, family: str) -> None:
    """Prevents a fallback, and states or weights of the step before, which a gap of log-probabilities shows."""
    reward = Recorder()
    trainer = make_trainer(tmp_path, model=make_policy(family), reward=reward, **SUFFIX)
    before = weights(trainer)
    log = train(trainer)
    assert len(reward.completion_ids) == len(log) == 2
    for entry in log:
        assert entry["selfspec/fallback"] == 0
        assert entry["selfspec/speculative_round_fraction"] == 1
        assert entry["sampling/sampling_logp_difference/max"] < FP32_LOGP_TOLERANCE
    still = [name for name, tensor in weights(trainer).items() if torch.equal(tensor, before[name])]
    assert not [name for name in still if not any(part in name for part in MAY_STAY)]


@pytest.mark.parametrize(
    ("family", "targets"), [("lfm2", ["in_proj", "out_proj"]), ("qwen3_next", ["in_proj_qkvz", "out_proj"])]
)
def test_adapters_of_recurrent_projections_are_seen(family: str, targets: list[str]) -> None:
    """Prevents a state that is computed with weights of the base model."""
    base: Any = make_policy(family).eval()
    base.generation_config.eos_token_id = None
    prompt = [[5, 6, 7, 8]]
    config = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0)
    without = base.generate(torch.tensor(prompt), generation_config=config)[0, 4:].tolist()
    policy: Any = get_peft_model(base, LoraConfig(target_modules=targets, r=4)).eval()
    stir(policy)
    expected = policy.generate(input_ids=torch.tensor(prompt), generation_config=config)[0, 4:].tolist()
    engine = SelfSpecEngine(policy, SelfSpecOptions(drafter="suffix", num_speculative_tokens=3))
    assert engine.generate(prompt, config, seed=0).completion_ids == [expected]
    assert expected != without, "the adapter matters"
