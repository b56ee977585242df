"""Real TRL runs of two or three steps: only the source of tokens changes, and the log shows it."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer
from trl_runs import (
    ALWAYS_SPECULATE,
    FP32_LOGP_TOLERANCE,
    GREEDY,
    PROMPTS,
    Recorder,
    assert_same_weights,
    greedy_run,
    make_model,
    make_tokenizer,
    make_trainer,
    train,
    weights,
)

from trl_selfspec import SelfSpecEngine, SelfSpecMixin
from trl_selfspec.policy.replica import PolicyReplica
from trl_selfspec.trainer.fallback import input_reason


Run = tuple[Any, Recorder, list[dict[str, float]]]


def recorded(folder: Path, *classes: type, **options: Any) -> Run:
    """A trainer after its run, its reward function and its log."""
    reward = Recorder()
    trainer = make_trainer(folder, *classes, reward=reward, **options)
    return trainer, reward, train(trainer)


@pytest.fixture(scope="module")
def stock_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recorded(tmp_path_factory.mktemp("stock"), GRPOTrainer, GRPOConfig)


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return recorded(tmp_path_factory.mktemp("one_step"), max_steps=1, **ALWAYS_SPECULATE)


@pytest.fixture(scope="module")
def greedy_lora(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    return greedy_run(tmp_path_factory.mktemp("greedy_lora"), lora=True, **ALWAYS_SPECULATE)


def test_switched_off_it_is_stock_trl_bit_for_bit(tmp_path: Path, stock_run: Run) -> None:
    """The switch is for comparisons: a stray draw from a generator would make the baseline another run."""
    off, off_reward, off_log = recorded(tmp_path, use_selfspec=False)
    stock, stock_reward, stock_log = stock_run
    assert off_reward.completion_ids == stock_reward.completion_ids
    assert_same_weights(off, stock)
    timing = ("time", "selfspec", "per_second", "runtime")
    for ours, theirs in zip(off_log, stock_log, strict=True):
        assert {k: v for k, v in ours.items() if not any(word in k for word in timing)} == {
            k: v for k, v in theirs.items() if not any(word in k for word in timing)
        }
        assert {name for name in ours if name.startswith("selfspec/")} == {
            "selfspec/tokens_per_s",
            "selfspec/rollout_s",
            "selfspec/rollout_step_fraction",
        }


def test_the_comparison_with_stock_trl_sees_another_sampler(one_step: Run, stock_run: Run) -> None:
    """Negative control: with the engine on, samples have the same distribution but are not the same tokens."""
    assert one_step[1].completion_ids[0] != stock_run[1].completion_ids[0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_greedy_rollouts_equal_trls_own_path_over_a_run(
    tmp_path: Path, greedy_lora: list[list[list[int]]], lora: bool
) -> None:
    """Steps 2 and 3 only match if the engine was synced with the weights and nothing else of training changed."""
    ours = greedy_lora if lora else greedy_run(tmp_path, **ALWAYS_SPECULATE)
    assert ours == greedy_run(tmp_path, lora, trainer_class=GRPOTrainer, config_class=GRPOConfig)
    assert ours[0] != ours[2]  # the same prompts: without a change of weights this would say nothing


@pytest.mark.parametrize("drafter", ["suffix", "quantized"])
def test_suffix_drafts_train_the_same_policy(tmp_path: Path, drafter: str) -> None:
    """Three epochs over the prompts: the same completions, the same weights. Quantized drafts are the control."""
    options = {"max_steps": 6, "num_iterations": 1}
    plain, plain_reward, _ = recorded(tmp_path / "plain", selfspec_num_speculative_tokens=0, **options)
    drafts = ALWAYS_SPECULATE | {"selfspec_draft_qtype": "qint4", "selfspec_drafter": drafter}
    trainer, reward, log = recorded(tmp_path / drafter, **drafts, **options)
    assert log[-1]["selfspec/speculative_round_fraction"] == 1.0
    same = reward.completion_ids == plain_reward.completion_ids
    assert same == (drafter == "suffix")
    if same:
        assert_same_weights(trainer, plain)
        assert log[-1]["selfspec/history_hit_fraction"] == 1.0


def test_a_missed_refresh_shows_in_greedy_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, greedy_lora: list[list[list[int]]]
) -> None:
    """Negative control: an engine that is not synced with a LoRA policy fails the comparison above."""
    monkeypatch.setattr(PolicyReplica, "stale", False)
    monkeypatch.setattr(SelfSpecEngine, "refresh", lambda engine, draft=True: None)
    frozen = greedy_run(tmp_path, lora=True, **ALWAYS_SPECULATE)
    assert frozen[0] == greedy_lora[0]
    assert frozen[1:] != greedy_lora[1:]


def test_lora_trains_the_adapter_alone(tmp_path: Path) -> None:
    """The replica merges the adapter: the policy's base weights must not move, or they drift a little every step."""
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, trainer_kwargs={"peft_config": peft_config}, **ALWAYS_SPECULATE)
    before = weights(trainer)
    for entry in train(trainer):
        assert entry["sampling/sampling_logp_difference/max"] < FP32_LOGP_TOLERANCE
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize(
    ("generation_kwargs", "reason"), [({"num_beams": 2}, "num_beams=2"), ({"no_repeat_ngram_size": 2}, "ngram_size=2")]
)
def test_what_the_engine_cannot_honour_is_generated_by_trl_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, generation_kwargs: dict[str, Any], reason: str
) -> None:
    """A parameter dropped in silence trains on samples of another distribution."""
    with caplog.at_level(logging.WARNING, logger="trl_selfspec.trainer.mixin"):
        log = train(make_trainer(tmp_path, generation_kwargs=generation_kwargs))
    assert [entry["selfspec/fallback"] for entry in log] == [1, 1]
    assert "selfspec/alpha" not in log[0]
    warnings = [record.getMessage() for record in caplog.records if record.name == "trl_selfspec.trainer.mixin"]
    assert len(warnings) == 1
    assert reason in warnings[0]


def test_a_model_the_engine_cannot_replicate_is_generated_by_trl_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An unsupported architecture must train as it would with TRL, not end in an error from inside the engine."""
    model = make_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    with caplog.at_level(logging.WARNING, logger="trl_selfspec.trainer.mixin"):
        log = train(make_trainer(tmp_path, model=model))
    assert [entry["selfspec/fallback"] for entry in log] == [1, 1]
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "trl_selfspec.trainer.mixin"]
    assert "dynamic" in warning


def _draw_token_seven(input_ids: Tensor, **_: Any) -> Tensor:
    return torch.cat([input_ids, input_ids.new_full((len(input_ids), 2), 7)], dim=1)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("owner", ["instance", "class"])
def test_a_policy_with_a_generate_of_its_own_is_generated_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, owner: str, lora: bool
) -> None:
    """A repository's `custom_generate`, or a patch, decides how tokens are drawn: the engine must not bypass it."""
    model = make_model()
    target = model if owner == "instance" else type(model)
    monkeypatch.setattr(target, "generate", lambda *args, **kwargs: _draw_token_seven(**kwargs))
    reward = Recorder()
    peft_config = LoraConfig(r=4, task_type="CAUSAL_LM") if lora else None
    trainer = make_trainer(tmp_path, model=model, reward=reward, trainer_kwargs={"peft_config": peft_config})
    with caplog.at_level(logging.WARNING, logger="trl_selfspec.trainer.mixin"):
        log = train(trainer)
    assert [entry["selfspec/fallback"] for entry in log] == [1, 1]
    assert all(ids == [7, 7] for call in reward.completion_ids for ids in call)
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "trl_selfspec.trainer.mixin"]
    assert "`generate`" in warning


class _TwoTurns(GRPOTrainer):
    """A base trainer that, like TRL's tool loop, generates a second turn, with images a tool returned."""

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any, *args: Any) -> Any:
        assert images is not None, "text prompts belong to the engine"
        return [[5, 6]] * len(prompt_ids), None

    def _generate(self, prompts: list) -> Any:
        prompt_ids, images, fields = self._tokenize_prompts(prompts)
        self.turns = [self._generate_single_turn(prompt_ids, given, fields, 1) for given in (images, ["image"])]
        return None


class _SelfSpecTwoTurns(SelfSpecMixin, _TwoTurns):
    pass


def test_a_turn_that_falls_back_is_marked_unscored(tmp_path: Path) -> None:
    """TRL appends a later turn's log-probabilities to the first turn's; None there ends the run with a TypeError."""
    trainer = make_trainer(tmp_path, _SelfSpecTwoTurns)
    trainer._generate(PROMPTS[:2])
    (ids, scores), (later_ids, later_scores) = trainer.turns
    assert [len(row) for row in scores] == [len(row) for row in ids]
    assert later_ids == [[5, 6]] * 2
    assert all(math.isnan(value) for row in later_scores for value in row)
    assert [len(row) for row in later_scores] == [2, 2]


def test_token_type_ids_of_a_text_tokenizer_are_not_a_reason_to_fall_back() -> None:
    """Chat prompts of many plain tokenizers carry them, and the run would silently train at TRL's speed."""
    model = make_model()
    assert input_reason(model, None, {"token_type_ids": [[0, 0]]}) is None
    assert "pixel_values" in (input_reason(model, None, {"pixel_values": [1]}) or "")
    assert "images" in (input_reason(model, ["image"], {}) or "")


def test_conversational_prompts_run(tmp_path: Path) -> None:
    """The chat template's path through TRL brings extra fields and parses completions."""
    assert [entry["selfspec/fallback"] for entry in train(make_trainer(tmp_path, conversational=True))] == [0, 0]


def test_generate_ids_follows_the_trainers_generation_config(tmp_path: Path) -> None:
    """A rollout_func that samples from another distribution than the trainer's own rollouts trains off-policy."""
    model, tokenizer = make_model(), make_tokenizer()
    trainer = make_trainer(tmp_path, model=model, **GREEDY)
    prompt_ids = tokenizer(PROMPTS)["input_ids"]
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    expected = [
        model.generate(torch.tensor([ids]), generation_config=config, use_cache=True)[0, len(ids) :].tolist()
        for ids in prompt_ids
    ]
    assert trainer.generate_ids(prompt_ids) == expected
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert trainer.generate_ids(prompt_ids) != expected


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")  # TRL's, about its own API
def test_a_rollout_func_can_generate_with_the_engine(tmp_path: Path) -> None:
    """`rollout_func` replaces TRL's own call of the generation method, and with it the engine, unless it asks."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        prompt_ids = trainer.processing_class(text=prompts)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": trainer.generate_ids(prompt_ids), "logprobs": None}

    log = train(make_trainer(tmp_path, trainer_kwargs={"rollout_func": rollout}, **ALWAYS_SPECULATE))
    assert all(entry["selfspec/alpha"] > 0 for entry in log)


def test_iterating_and_accumulating_generate_as_often_as_trl(tmp_path: Path) -> None:
    """`num_iterations` and `steps_per_generation` reuse rollouts; their log-probabilities travel in TRL's buffer."""
    rewards = Recorder(), Recorder()
    options = {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2, "max_steps": 4}
    train(make_trainer(tmp_path / "a", reward=rewards[0], **options, **GREEDY, **ALWAYS_SPECULATE))
    train(make_trainer(tmp_path / "b", GRPOTrainer, GRPOConfig, reward=rewards[1], **options, **GREEDY))
    assert len(rewards[0].completion_ids) == len(rewards[1].completion_ids) == 2
    assert rewards[0].completion_ids[0] == rewards[1].completion_ids[0]


def test_the_seed_comes_from_the_global_generator(tmp_path: Path, one_step: Run) -> None:
    """Another run with the same seed repeats; another seed does not."""
    trainer, reward, _ = one_step
    _, again, _ = recorded(tmp_path, max_steps=1, seed=trainer.args.seed, **ALWAYS_SPECULATE)
    _, other, _ = recorded(tmp_path, max_steps=1, seed=trainer.args.seed + 1, **ALWAYS_SPECULATE)
    assert again.completion_ids == reward.completion_ids != other.completion_ids
