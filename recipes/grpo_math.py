"""GRPO on math with speculative rollouts.

Without arguments: the embedded default, a small policy on generated arithmetic, on any machine, offline.

    accelerate launch recipes/grpo_math.py

A small real model, SmolLM2-135M-Instruct, on generated word problems, offline as well (`recipes/smollm2.py`):

    accelerate launch recipes/grpo_math.py --config recipes/smollm2-135m/grpo_word_problems.yaml

The real thing, or any dataset of questions and answers of your own (a hub id or a local folder or file):

    accelerate launch recipes/grpo_math.py --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
        --dataset_name openai/gsm8k --dataset_config main --use_peft --output_dir outputs/gsm8k
    accelerate launch recipes/grpo_math.py --config recipes/qwen2.5-1.5b/grpo_gsm8k_full.yaml
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import arithmetic
import smollm2
import torch
import word_problems
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward

from trl_selfspec import SelfSpecGRPOConfig, SelfSpecGRPOTrainer


RECIPES = Path(__file__).resolve().parent
EMBEDDED_CONFIG = RECIPES / "tiny" / "grpo_arithmetic.yaml"
# Datasets that are made here, each with its reward.
GENERATED = {
    None: (arithmetic.make_dataset, arithmetic.product_reward),
    "word_problems": (word_problems.make_dataset, word_problems.answer_reward),
}
LAUNCHER_VARIABLES = (
    "ACCELERATE_",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "TORCHELASTIC_",
)


@dataclass
class RecipeArguments:
    """What is trained on; everything else is `SelfSpecGRPOConfig`'s and `ModelConfig`'s."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local folder or json/csv/parquet file; word_problems for generated ones. "
            "Default: generated arithmetic."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, with `eval_strategy`."})
    dataset_prompt_column: str = field(default="question", metadata={"help": "Column of the questions."})
    dataset_answer_column: str = field(
        default="answer",
        metadata={"help": "Column of the answers. What follows the last `####`, as in gsm8k, counts, else all of it."},
    )
    instruction: str = field(
        default="Reason step by step and put the final answer within \\boxed{}.",
        metadata={"help": "Appended to each question; the reward reads the last box."},
    )
    num_problems: int = field(default=4096, metadata={"help": "Size of the generated dataset."})


def make_parser() -> TrlParser:
    return TrlParser((RecipeArguments, SelfSpecGRPOConfig, ModelConfig))  # type: ignore[arg-type]


def parse(argv: Sequence[str]) -> tuple[RecipeArguments, SelfSpecGRPOConfig, ModelConfig]:
    """Arguments over the YAML of `--config`; the embedded default's where neither it nor a dataset is given."""
    args, given = list(argv), {argument.split("=")[0] for argument in argv}
    if not given & {"--config", "--dataset_name"}:
        args = ["--config", str(EMBEDDED_CONFIG), *args]
    if not torch.accelerator.is_available():
        # Without these the training arguments refuse a machine without a GPU.
        args += [] if "--use_cpu" in given else ["--use_cpu", "true"]
        args += [] if "--bf16" in given or has_native_bf16() else ["--bf16", "false"]
    return make_parser().parse_args_and_config(args)  # type: ignore[return-value]


def has_native_bf16() -> bool:
    """CPUs without bf16 instructions emulate them, about 5 times slower than fp32."""
    return torch.accelerator.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def ensure_tiny_policy(size: str = "3m") -> Path:
    """Trains the embedded default's policy if it is not there yet, in a process of its own, once per machine."""
    script, path = RECIPES.parent / "scripts" / "make_tiny_policy.py", arithmetic.tiny_policy_dir(size)
    with PartialState().local_main_process_first():
        if not path.exists():
            env = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
            subprocess.run([sys.executable, str(script), "--size", size], env=env, check=True)
    return path


def load_math_dataset(arguments: RecipeArguments) -> DatasetDict:
    """Conversational prompts with a column `solution`.

    Raises:
        ValueError: a column or split that the dataset does not have, naming those that it has.
    """
    assert arguments.dataset_name is not None
    path = Path(arguments.dataset_name)
    if path.is_file():
        raw = load_dataset(path.suffix.lstrip(".").replace("jsonl", "json"), data_files=str(path))
    else:
        raw = load_dataset(arguments.dataset_name, arguments.dataset_config)
    columns = raw[arguments.dataset_train_split].column_names if arguments.dataset_train_split in raw else None
    if columns is None:
        raise ValueError(
            f"{path} has no split {arguments.dataset_train_split!r}: use one of {', '.join(map(str, raw))}."
        )
    for name in (arguments.dataset_prompt_column, arguments.dataset_answer_column):
        if name not in columns:
            raise ValueError(f"{path} has no column {name!r}: use one of {', '.join(columns)}.")

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        question = f"{row[arguments.dataset_prompt_column]}\n{arguments.instruction}"
        return {
            "prompt": [{"role": "user", "content": question}],
            "solution": final_answer(str(row[arguments.dataset_answer_column])),
        }

    return raw.map(convert, remove_columns=columns)


def final_answer(answer: str) -> str:
    """What math-verify is to compare with: a box as it stands, else the text after the last `####`, as LaTeX."""
    text = answer.rpartition("####")[2].strip()
    return text if "\\boxed" in text or "$" in text else f"${text.replace(',', '')}$"


def make_datasets(arguments: RecipeArguments, training: SelfSpecGRPOConfig) -> tuple[Dataset, Dataset | None]:
    evaluates = training.eval_strategy != "no"
    if arguments.dataset_name in GENERATED:
        make_dataset, _ = GENERATED[arguments.dataset_name]
        evaluation = make_dataset(128, seed=training.seed + 1) if evaluates else None
        return make_dataset(arguments.num_problems, seed=training.seed), evaluation
    splits = load_math_dataset(arguments)
    if evaluates and arguments.dataset_test_split not in splits:
        raise ValueError(
            f"`eval_strategy` needs a split {arguments.dataset_test_split!r}: there is {', '.join(map(str, splits))}."
        )
    return splits[arguments.dataset_train_split], splits[arguments.dataset_test_split] if evaluates else None


def main(argv: Sequence[str]) -> None:
    arguments, training, model = parse(argv)
    if model.model_name_or_path is None:
        if arguments.dataset_name is not None:
            raise ValueError("`--dataset_name` needs `--model_name_or_path`: the small policy knows arithmetic only.")
        model.model_name_or_path = str(ensure_tiny_policy())
    if model.model_name_or_path == smollm2.NAME:
        with PartialState().local_main_process_first():
            model.model_name_or_path = str(smollm2.smollm2_dir())
    own = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    given: Any = training.model_init_kwargs  # TRL has parsed a string from the command line
    training.model_init_kwargs = own | (given or {})  # pyright: ignore[reportAttributeAccessIssue]
    train_dataset, eval_dataset = make_datasets(arguments, training)
    _, reward = GENERATED.get(arguments.dataset_name, (None, accuracy_reward))
    trainer = SelfSpecGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=reward,
        args=training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    trainer.save_state()
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1:])
