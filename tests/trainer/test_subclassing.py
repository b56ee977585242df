"""RLOO, users' own trainers and TRL's other ones get the engine by one base class, and docs/subclassing.md is true."""

import dataclasses
import importlib
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTTrainer, TrlParser
from trl.import_utils import TRLExperimentalWarning
from trl_runs import (
    ALWAYS_SPECULATE,
    FP32_LOGP_TOLERANCE,
    PROMPTS,
    Recorder,
    assert_same_weights,
    config_values,
    greedy_run,
    make_dataset,
    make_model,
    make_tokenizer,
    make_trainer,
    train,
    weights,
)

import trl_selfspec
from trl_selfspec import (
    SelfSpecGRPOTrainer,
    SelfSpecMixin,
    SelfSpecOptions,
    SelfSpecRLOOConfig,
    SelfSpecRLOOTrainer,
)


DOCUMENT = (Path(__file__).parents[2] / "docs" / "subclassing.md").read_text()
RLOO: dict[str, Any] = {"trainer_class": SelfSpecRLOOTrainer, "config_class": SelfSpecRLOOConfig, "beta": 0.0}
STOCK_RLOO: dict[str, Any] = {"trainer_class": RLOOTrainer, "config_class": RLOOConfig, "beta": 0.0}
METRICS = ["alpha", "acceptance_rate", "tokens_per_s", "rollout_s", "rollout_step_fraction"]


def experimental(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TRLExperimentalWarning)
        return getattr(importlib.import_module(f"trl.experimental.{module}"), name)


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    """The names that the document's own code defines."""
    names: dict[str, Any] = {"__name__": "subclassing"}
    for code in re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL):
        exec(compile(code, "docs/subclassing.md", "exec"), names)
    return names


# RLOO


@pytest.fixture(scope="module")
def rloo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, float]]]:
    """A trainer after two steps, and its log."""
    kwargs = {"eval_dataset": make_dataset()}
    trainer = make_trainer(tmp_path_factory.mktemp("rloo"), **RLOO, **ALWAYS_SPECULATE, trainer_kwargs=kwargs)
    return trainer, train(trainer)


@pytest.fixture(scope="module")
def greedy_stock_rloo(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    return greedy_run(tmp_path_factory.mktemp("greedy_stock"), **STOCK_RLOO)


def test_rloo_trains_and_reports(rloo_run: tuple[Any, list[dict[str, float]]]) -> None:
    """Two steps of the real trainer: weights move, and the log shows what the engine did."""
    trainer, log = rloo_run
    before = dict(make_model().named_parameters())
    assert len(log) == 2
    for entry in log:
        assert all(entry[f"selfspec/{name}"] > 0 for name in METRICS)
        assert entry["selfspec/fallback"] == 0
    assert trainer.evaluate()["eval_selfspec/alpha"] > 0
    assert all(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_greedy_rloo_rollouts_equal_trls_own_path_over_a_run(
    tmp_path: Path, greedy_stock_rloo: list[list[list[int]]]
) -> None:
    """Steps 2 and 3 only match if the engine was synced with the weights and nothing else of training changed."""
    ours = greedy_run(tmp_path, **RLOO, **ALWAYS_SPECULATE)
    assert ours == greedy_stock_rloo
    assert ours[0] != ours[2]


class _Shifted(SelfSpecRLOOTrainer):
    def _pack_rollout(self, completion_ids: list[list[int]], logprobs: list[list[float]]) -> list[list[int]]:
        return completion_ids[1:] + completion_ids[:1]


def test_the_comparison_with_stock_rloo_sees_rows_in_another_order(
    tmp_path: Path, greedy_stock_rloo: list[list[list[int]]]
) -> None:
    """Negative control: a rollout that is packed wrongly is not TRL's."""
    shifted = greedy_run(tmp_path, **RLOO | {"trainer_class": _Shifted}, **ALWAYS_SPECULATE)
    assert shifted != greedy_stock_rloo


def test_rloo_switched_off_is_stock_trl_bit_for_bit(tmp_path: Path) -> None:
    """The switch is for comparisons."""
    rewards = Recorder(), Recorder()
    off = make_trainer(tmp_path, **RLOO, use_selfspec=False, reward=rewards[0])
    train(off)
    stock = make_trainer(tmp_path, **STOCK_RLOO, reward=rewards[1])
    train(stock)
    assert rewards[0].completion_ids == rewards[1].completion_ids
    assert_same_weights(off, stock)


def test_a_plain_rloo_config_is_accepted(tmp_path: Path) -> None:
    """Swapping the trainer's name alone is the smallest change of a script."""
    trainer = make_trainer(tmp_path, SelfSpecRLOOTrainer, RLOOConfig, beta=0.0, max_steps=1)
    assert [entry["selfspec/fallback"] for entry in train(trainer)] == [0]


def test_the_rloo_config_parses_and_names_its_field(tmp_path: Path) -> None:
    """The mixin's checks must run in every config that it is mixed into."""
    arguments = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--selfspec_num_speculative_tokens", "3"]
    (config,) = TrlParser(SelfSpecRLOOConfig).parse_args_and_config(arguments)
    assert config.options() == SelfSpecOptions(num_speculative_tokens=3)
    with pytest.raises(ValueError, match="selfspec_max_batch_size"):
        SelfSpecRLOOConfig(str(tmp_path), use_cpu=True, selfspec_max_batch_size=0)


def test_the_rloo_model_card_names_its_trainer(rloo_run: tuple[Any, list[dict[str, float]]]) -> None:
    """The card is TRL's, with GRPO's name in it if the class were GRPO's in disguise."""
    trainer, _ = rloo_run
    trainer.create_model_card(model_name="tiny")
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "SelfSpecRLOOTrainer" in card
    assert "- selfspec" in card
    assert "GRPO" not in card


# Users' subclasses


@torch.no_grad()
def as_teacher(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Another policy than the student, who would have nothing to learn from itself."""
    model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    return model


def test_an_overridden_scoring_method_acts_on_the_engines_rollouts(tmp_path: Path, documented: dict[str, Any]) -> None:
    """The document's first example: same rollouts as without it, other advantages."""
    rewards = Recorder(), Recorder()
    options: dict[str, Any] = {"max_steps": 1, "max_completion_length": 32} | ALWAYS_SPECULATE
    plain = make_trainer(tmp_path, SelfSpecGRPOTrainer, reward=rewards[0], **options)
    train(plain)
    short = make_trainer(tmp_path, documented["ShortAnswersTrainer"], reward=rewards[1], **options)
    (entry,) = train(short)
    assert entry["selfspec/alpha"] > 0
    assert rewards[0].completion_ids == rewards[1].completion_ids
    assert len(set(map(len, rewards[0].completion_ids[0]))) > 1  # else there is nothing to prefer
    assert any(not torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(short).items())


class _ScaledLoss(SelfSpecGRPOTrainer):
    losses: list[float]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return 2 * loss


def test_an_overridden_loss_keeps_what_the_trainer_reports_from_it(tmp_path: Path) -> None:
    """The gap to the trainer's own log-probabilities is read off inside the loss."""
    trainer = make_trainer(tmp_path, _ScaledLoss, **ALWAYS_SPECULATE)
    trainer.losses = []
    for entry, loss in zip(train(trainer), trainer.losses, strict=True):
        assert entry["loss"] == pytest.approx(2 * loss, abs=1e-4)  # TRL rounds what it logs
        assert entry["sampling/sampling_logp_difference/max"] < FP32_LOGP_TOLERANCE


class _CountingGRPOTrainer(GRPOTrainer):
    turns = 0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self.turns += 1
        return super()._generate_single_turn(*args, **kwargs)


class _CountingInFront(_CountingGRPOTrainer, SelfSpecGRPOTrainer):
    pass


def test_a_users_trainer_may_stand_in_front_of_the_shipped_one(tmp_path: Path) -> None:
    """Python puts the mixin behind it and in front of TRL's: both are called."""
    trainer = make_trainer(tmp_path, _CountingInFront, max_steps=1, **ALWAYS_SPECULATE)
    assert train(trainer)[0]["selfspec/alpha"] > 0
    assert trainer.turns == 1


def test_the_mixin_serves_the_documents_distillation_trainer(tmp_path: Path, documented: dict[str, Any]) -> None:
    """The document's second example: another of TRL's trainers, with a method that returns something else."""
    config_class = documented["SelfSpecDistillationConfig"]
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = config_values(tmp_path) | ALWAYS_SPECULATE
    seen: list[Any] = []

    class Recording(documented["SelfSpecDistillationTrainer"]):
        def _pack_rollout(self, completion_ids: Any, logprobs: Any) -> Any:
            seen.append(completion_ids)
            return super()._pack_rollout(completion_ids, logprobs)

    trainer = Recording(
        model=make_model(),
        teacher_model=as_teacher(make_model()),
        args=config_class(**{name: value for name, value in values.items() if name in fields}),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
    )
    before = weights(trainer)
    for entry in train(trainer):
        assert entry["selfspec/alpha"] > 0
        assert entry["selfspec/fallback"] == 0
    assert len(seen) == 2
    assert len(trainer.generate_ids(make_tokenizer()(PROMPTS)["input_ids"])) == len(PROMPTS)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_gmpo_gets_the_engine_from_the_shipped_class_in_front(tmp_path: Path) -> None:
    """GMPO overrides the loss that the shipped class wraps; both have to run."""
    gmpo, config = experimental("gmpo", "GMPOTrainer"), experimental("gmpo", "GMPOConfig")
    with_loss = type("SelfSpecGMPO", (SelfSpecGRPOTrainer, gmpo), {})
    by_mixin = type("MixinGMPO", (SelfSpecMixin, gmpo), {})
    (entry,) = train(make_trainer(tmp_path, with_loss, config, max_steps=1))
    assert entry["sampling/sampling_logp_difference/max"] < FP32_LOGP_TOLERANCE
    assert "clip_ratio/region_mean" in entry
    (entry,) = train(make_trainer(tmp_path, by_mixin, config, max_steps=1))
    assert entry["selfspec/fallback"] == 0


# Wrong bases


def test_the_wrong_order_of_bases_says_how_to_turn_them_round() -> None:
    """TRL's methods would win, and the run would be plain GRPO without a word."""
    with pytest.raises(TypeError, match=r"class T\(SelfSpecMixin, GRPOTrainer\)"):
        type("T", (GRPOTrainer, SelfSpecMixin), {})


@pytest.mark.parametrize("base", [SFTTrainer, ("online_dpo", "OnlineDPOTrainer")], ids=["offline", "own-loop"])
def test_a_trainer_that_the_mixin_cannot_serve_is_named_at_definition(base: Any) -> None:
    """Its overrides would never be called."""
    base = experimental(*base) if isinstance(base, tuple) else base
    with pytest.raises(TypeError, match="SelfSpecGenerate"):
        type("T", (SelfSpecMixin, base), {})


def test_a_class_without_any_trainer_cannot_be_made() -> None:
    """Not an AttributeError from inside the first rollout."""
    alone = type("Alone", (SelfSpecMixin,), {})
    with pytest.raises(TypeError, match="no online trainer"):
        alone()


def test_a_users_mixin_may_derive_from_ours(tmp_path: Path) -> None:
    """The check must not refuse a class whose trainer is still to come."""
    own = type("Own", (SelfSpecMixin,), {})
    trainer = make_trainer(tmp_path, type("T", (own, GRPOTrainer), {}), GRPOConfig, max_steps=1)
    assert train(trainer)[0]["selfspec/fallback"] == 0


# Trainers that call `model.generate`


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


CHAT = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "12"}]} for p in PROMPTS * 4]
PRIVILEGED = [{"prompt": p, "privileged_context": "the answer is 3"} for p in PROMPTS * 4]
PLAIN = [{"prompt": p} for p in PROMPTS * 4]
SHORT = {"max_length": 64, "max_new_tokens": 12}
OWN_LOOPS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "OnlineDPO": ("online_dpo", PLAIN, SHORT, ["reward_funcs", "ref_model"]),
    "GKD": ("gkd", CHAT, SHORT | {"lmbda": 1.0}, ["teacher_model"]),
    "A2PO": ("a2po", PLAIN, {}, ["reward_funcs"]),
    "SDFT": ("sdft", PRIVILEGED, {"distillation_topk": 20}, []),
    "SDPO": ("sdpo", PRIVILEGED, {"distillation_topk": 20}, ["reward_funcs"]),
    "IWOPD": ("iw_opd", CHAT, SHORT | {"lmbda": 1.0}, ["teacher_model"]),
}


@pytest.mark.filterwarnings("ignore:Passing `generation_config` together with:UserWarning")
@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        *(pytest.param(name, False, marks=() if name in ("GKD", "SDPO") else pytest.mark.slow) for name in OWN_LOOPS),
        ("OnlineDPO", True),
    ],
)
def test_a_trainer_with_a_loop_of_its_own_takes_the_engine_in_generate(
    tmp_path: Path, documented: dict[str, Any], name: str, bf16: bool
) -> None:
    """The document's third example; each trainer asks `generate` for something else."""
    module, rows, values, arguments = OWN_LOOPS[name]
    make_model().save_pretrained(tmp_path / "model")  # some load a reference model from where the policy came
    make_tokenizer().save_pretrained(tmp_path / "model")

    def load() -> Any:
        return Qwen3ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)

    config_class = experimental(module, f"{name}Config")
    fields = {field.name for field in dataclasses.fields(config_class)}
    values = {key: value for key, value in (config_values(tmp_path, bf16=bf16) | values).items() if key in fields}
    given = {"reward_funcs": lambda: reward, "ref_model": load, "teacher_model": lambda: as_teacher(load())}
    trainer = experimental(module, f"{name}Trainer")(
        model=load(),
        args=config_class(**values),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        **{argument: given[argument]() for argument in arguments},
    )
    options = SelfSpecOptions(num_speculative_tokens=3, max_active_sequences=64, draft_qtype="qint8")
    speculative = documented["generate_with_engine"](trainer, options)
    before = weights(trainer)
    trainer.train()
    assert speculative.stats.completion_tokens > 0
    assert speculative.stats.alpha > 0
    assert speculative.engine.autocast_dtype == (torch.bfloat16 if bf16 else None)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in weights(trainer).items())


# The document


def test_every_public_name_of_the_document_exists() -> None:
    """Prevents a document about names that have moved."""
    named = set(re.findall(r"\bSelfSpec\w+", DOCUMENT)) - {"SelfSpecDistillationConfig", "SelfSpecDistillationTrainer"}
    assert named <= set(trl_selfspec.__all__)
    assert len(named) > 5
    for hook in ("_pack_rollout", "generate_ids"):
        assert f"`{hook}(" in DOCUMENT
        assert hook in vars(SelfSpecMixin)
