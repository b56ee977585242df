"""The private names of TRL and transformers that the trainers lean on; a failure names the one that moved."""

import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trl
from packaging.requirements import Requirement
from transformers import Trainer
from trl import DistillationTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.extras.profiling import profiling_context
from trl.trainer.utils import get_config_model_id
from trl_runs import make_trainer

import trl_selfspec


# Method -> its leading parameters; what follows them is passed through.
SIGNATURES: dict[Callable[..., Any], list[str]] = {
    GRPOTrainer._generate: ["self", "prompts"],
    GRPOTrainer._generate_single_turn: ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
    GRPOTrainer._compute_loss: ["self", "model", "inputs"],
    GRPOTrainer._get_per_token_logps_and_entropies: ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    GRPOTrainer.log: ["self", "logs", "start_time"],
    GRPOTrainer._save_checkpoint: ["self", "model", "trial"],
    GRPOTrainer._load_optimizer_and_scheduler: ["self", "checkpoint"],
    GRPOTrainer.create_model_card: ["self", "model_name", "dataset_name", "tags"],
    RLOOTrainer._generate: ["self", "prompts"],
    RLOOTrainer._generate_single_turn: ["self", "prompt_ids", "images", "multimodal_fields"],
    RLOOTrainer.log: ["self", "logs", "start_time"],
    DistillationTrainer._generate: ["self", "prompts"],
    DistillationTrainer._generate_single_turn: ["self", "prompt_ids", "images", "multimodal_fields"],
    DistillationTrainer.log: ["self", "logs", "start_time"],
    Trainer._load_best_model: ["self"],
    Trainer._get_output_dir: ["self", "trial"],
    Trainer.save_state: ["self"],
    profiling_context: ["trainer", "name"],
    get_config_model_id: ["config"],
}
# Method -> what its source has to say for our overrides to be on its way.
CALLS: list[tuple[Callable[..., Any], str]] = [
    (GRPOTrainer._generate_and_score_completions, "self._generate("),
    (GRPOTrainer._generate_and_score_completions, 'output["sampling_per_token_logps"]'),
    (GRPOTrainer._generate, "self._generate_single_turn("),
    (GRPOTrainer._generate, "self.rollout_func(prompts, self)"),
    (GRPOTrainer._generate, "return prompt_ids, completion_ids, "),
    (GRPOTrainer._tool_call_loop, "self._generate_single_turn("),
    (GRPOTrainer._tool_call_loop, "completion_ids[idx_with_tool] = pct[prompt_length:] + post_tool_ids[idx]"),
    (GRPOTrainer._compute_loss, "self._get_per_token_logps_and_entropies("),
    (GRPOTrainer.training_step, '["step_time"].append('),
    (GRPOTrainer._prepare_inputs, "self._step % generate_every == 0"),
    (GRPOTrainer.log, "self._metrics[mode].clear()"),
    (RLOOTrainer._generate_and_score_completions, "self._generate("),
    (RLOOTrainer._generate, "self._generate_single_turn("),
    (RLOOTrainer._generate, "return prompt_ids, completion_ids, "),
    (RLOOTrainer._generate_single_turn, "return completion_ids\n"),
    (DistillationTrainer._generate, "self._generate_single_turn("),
    (DistillationTrainer._generate, "return prompt_ids, completion_ids, "),
    (DistillationTrainer._generate_single_turn, "return completion_ids\n"),
    (Trainer._prepare_for_training, "self._load_optimizer_and_scheduler(resume_from_checkpoint)"),
]
# Read by the mixin in any trainer, and by GRPO's own methods.
ATTRIBUTES = [
    "accelerator",
    "args",
    "eos_token_ids",
    "generation_config",
    "is_fsdp_enabled",
    "model",
    "model_wrapped",
    "state",
    "use_vllm",
    "_dist",
    "_is_vlm",
    "_metrics",
]
GRPO_ATTRIBUTES = ["num_iterations", "use_transformers_continuous_batching", "_step"]
CARD_ANCHORS = [
    "### Framework versions",
    "- Transformers:",
    "Cite TRL as:",
    "[{{ base_model }}](https://huggingface.co/{{ base_model }})",
    'model="{{ hub_model_id }}"',
]


def starts_with(function: Callable[..., Any], names: list[str]) -> bool:
    return list(inspect.signature(function).parameters)[: len(names)] == names


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_a_method_we_override_or_call_has_the_signature_we_rely_on(function: Callable[..., Any]) -> None:
    """TRL changes private signatures in minor releases, and a shifted argument need not raise."""
    assert starts_with(function, SIGNATURES[function]), (
        f"{function.__qualname__} moved in TRL {trl.__version__}: expected {SIGNATURES[function]}, found "
        f"{inspect.signature(function)}"
    )


def test_the_signature_check_sees_a_shifted_argument() -> None:
    """Negative control: the check must not pass on any list of names."""
    assert not starts_with(GRPOTrainer._generate_single_turn, ["self", "prompts", "images"])


@pytest.mark.parametrize(("method", "call"), CALLS, ids=lambda value: getattr(value, "__qualname__", value))
def test_trl_still_comes_by_our_override(method: Callable[..., Any], call: str) -> None:
    """A method that TRL no longer calls leaves the run on TRL's own path, correct and unnoticed."""
    assert call in inspect.getsource(method), f"{method.__qualname__} no longer has `{call}` in TRL {trl.__version__}"


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "attributes"),
    [
        (GRPOTrainer, GRPOConfig, ATTRIBUTES + GRPO_ATTRIBUTES),
        (RLOOTrainer, RLOOConfig, [*ATTRIBUTES, "use_transformers_continuous_batching"]),
    ],
)
def test_a_trainer_has_the_attributes_we_read(
    tmp_path: Path, trainer_class: type, config_class: type, attributes: list[str]
) -> None:
    """An attribute that is set late or renamed fails in the first rollout, not at construction."""
    trainer = make_trainer(tmp_path, trainer_class, config_class, beta=0.0)
    missing = [name for name in attributes if not hasattr(trainer, name)]
    assert not missing, f"{trainer_class.__name__} of TRL {trl.__version__} has no {missing}"
    assert trainer._dist.is_zero3 is trainer._dist.is_fsdp is False
    assert trainer._dist.fsdp_version is None
    assert trainer._metrics["train"] is not trainer._metrics["eval"]
    assert isinstance(trainer.args.steps_per_generation, int)


@pytest.mark.parametrize("anchor", CARD_ANCHORS)
def test_the_card_template_has_what_we_look_for(anchor: str) -> None:
    """Text is inserted next to these; without them it goes to the end of the card."""
    template = Path(inspect.getfile(trl)).parent / "templates" / "lm_model_card.md"
    assert anchor in template.read_text(), f"TRL {trl.__version__}'s model card no longer has `{anchor}`"


def test_private_names_of_trl_are_used_in_the_trainers_alone() -> None:
    """Three files to read when TRL moves."""
    package = Path(trl_selfspec.__file__).parent
    users = {
        path.name for path in package.rglob("*.py") if re.search(r"^\s*(from|import) trl\b", path.read_text(), re.M)
    }
    assert users == {"config.py", "mixin.py", "trainers.py"}
    private = re.compile(r"from trl\.\S+ import")
    assert {path.name for path in package.rglob("*.py") if private.search(path.read_text())} == {
        "mixin.py",
        "trainers.py",
    }


def test_the_installed_trl_is_the_one_that_is_pinned() -> None:
    """Everything above was checked against one minor release; a wider pin promises more."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (specifier,) = [r.specifier for r in map(Requirement, project["dependencies"]) if r.name == "trl"]
    assert trl.__version__ in specifier
    major, minor = map(int, trl.__version__.split(".")[:2])
    assert f"{major}.{minor + 1}.0" not in specifier
