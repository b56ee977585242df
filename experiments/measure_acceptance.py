"""Acceptance of quantized drafters while their policy is trained, refreshed after every step or never.

    python experiments/measure_acceptance.py [--size 135m] [--measure_every 2] [--out OUT] [arguments of the recipe]

A policy is trained on generated arithmetic (once, some minutes), then by GRPO with SelfSpecGRPOTrainer; with
`--config recipes/smollm2-135m/grpo_word_problems.yaml` policy and problems are that recipe's. Every few optimizer
steps, each drafter drafts for the policy of that moment on problems that it does not train on, at the training's
temperature: alpha is accepted / examined. A stale drafter keeps the Linear weights of step 0, as if it were a separate
model; what it shares with the policy (embeddings, norms) follows. Writes OUT.json after every
measurement, and OUT.png in the end.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trl_selfspec import SelfSpecEngine, SelfSpecGRPOTrainer, SelfSpecOptions


sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("recipes", "scripts"))
import arithmetic
import grpo_math
import smollm2
from bench.report import provenance, write_result
from make_tiny_policy import SIZES


ROOT = Path(__file__).resolve().parents[1]
QTYPES = ("qint4", "qint8", "qfloat8")
KINDS = ("refreshed", "stale")
DRAFT_LENGTH = 4
HELD_OUT_SEED = 10**6  # of problems; training uses seeds from 0


class AcceptanceProbe(TrainerCallback):
    """Measures all drafters at step 0 and after every `every` steps.

    Args:
        model: the policy that is trained.
        tokenizer: the policy's.
        num_prompts: held-out problems per measurement, the same for all drafters.
        autocast_dtype: of the training, None for none.
        generation_config: of the drafted completions.
        make_dataset: makes so many problems, with a column `prompt`, from a seed.
        on_point: called after every measurement.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        num_prompts: int,
        every: int,
        autocast_dtype: torch.dtype | None,
        generation_config: GenerationConfig,
        make_dataset: Callable[[int, int], Dataset] = arithmetic.make_dataset,
        on_point: Callable[[], None] = lambda: None,
    ) -> None:
        self.generation_config, self.make_dataset = generation_config, make_dataset
        self.model, self.tokenizer, self.num_prompts, self.every = model, tokenizer, num_prompts, every
        self.on_point = on_point
        self.engines = {
            (qtype, kind): SelfSpecEngine(model, _always_drafting(qtype), autocast_dtype)
            for qtype in QTYPES
            for kind in KINDS
        }
        self.first = [parameter.detach().clone() for parameter in model.parameters()]
        self.points: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.measure(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step % self.every == 0:
            self.measure(state.global_step)

    def measure(self, step: int) -> None:
        problems = self.make_dataset(self.num_prompts, HELD_OUT_SEED + step)
        prompts = [
            self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            for prompt in problems["prompt"]
        ]
        point: dict[str, Any] = {"step": step, "relative_weight_change": self.relative_weight_change()}
        for (qtype, kind), engine in self.engines.items():
            if step:
                engine.refresh(draft=kind == "refreshed")
            stats = engine.generate(prompts, self.generation_config, seed=step).stats
            engine.release()
            examined = sum(stats.examined_per_position)
            point[f"{qtype} {kind}"] = {"alpha": stats.alpha, "examined": examined}
        self.points.append(point)
        alphas = ", ".join(f"{name} {value['alpha']:.4f}" for name, value in point.items() if isinstance(value, dict))
        print(f"step {step}: {alphas}", file=sys.stderr, flush=True)
        self.on_point()

    @torch.no_grad()
    def relative_weight_change(self) -> float:
        """|W - W0| / |W0| over all parameters."""
        pairs = list(zip(self.model.parameters(), self.first, strict=True))
        change = sum(float((now - then).square().sum()) for now, then in pairs)
        return (change / sum(float(then.square().sum()) for _, then in pairs)) ** 0.5


def _always_drafting(qtype: str) -> SelfSpecOptions:
    return SelfSpecOptions(draft_qtype=qtype, num_speculative_tokens=DRAFT_LENGTH, max_active_sequences=10**9)


def pooled(points: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per drafter over all steps after the first measurement: alpha, its standard error and the tokens examined."""
    result: dict[str, dict[str, float]] = {}
    if len(points) < 2:
        return result
    for name in [f"{qtype} {kind}" for qtype in QTYPES for kind in KINDS]:
        examined = sum(point[name]["examined"] for point in points[1:])
        alpha = sum(point[name]["alpha"] * point[name]["examined"] for point in points[1:]) / examined
        error = (alpha * (1 - alpha) / examined) ** 0.5
        result[name] = {"alpha": alpha, "standard_error": error, "examined": examined}
    return result


def plot(points: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [point["step"] for point in points]
    for i, qtype in enumerate(QTYPES):
        for kind, style in zip(KINDS, ("-", "--"), strict=True):
            values = [point[f"{qtype} {kind}"] for point in points]
            alphas = [value["alpha"] for value in values]
            errors = [(v["alpha"] * (1 - v["alpha"]) / v["examined"]) ** 0.5 for v in values]
            axes.errorbar(steps, alphas, errors, fmt=style, color=f"C{i}", capsize=2, label=f"{qtype}, {kind}")
    axes.set(xlabel="optimizer step", ylabel="alpha (accepted / examined)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_size = "135m" if torch.cuda.is_available() else "3m"
    parser.add_argument("--size", choices=SIZES, default=default_size, help="parameters of the policy")
    parser.add_argument("--policy", type=Path, help="a saved policy in place of one that is trained here")
    parser.add_argument("--measure_every", type=int, default=2, metavar="STEPS")
    parser.add_argument("--num_prompts", type=int, default=256, help="held-out problems per measurement")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/acceptance"))
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "acceptance" / "acceptance")
    args, rest = parser.parse_known_args(argv)
    command, start = list(sys.argv[1:] if argv is None else argv), time.monotonic()
    arguments, training, model = grpo_math.parse(["--output_dir", str(args.output_dir), *rest])
    make_dataset, reward = grpo_math.GENERATED[arguments.dataset_name]
    policy = args.policy or smollm2.resolve(model.model_name_or_path) or grpo_math.ensure_tiny_policy(args.size)
    training.model_init_kwargs = {"dtype": "float32"}
    trainer = SelfSpecGRPOTrainer(
        model=str(policy),
        reward_funcs=reward,
        args=training,
        train_dataset=grpo_math.make_datasets(arguments, training)[0],
    )
    tokenizer, autocast = AutoTokenizer.from_pretrained(policy), torch.bfloat16 if training.bf16 else None
    where = provenance(["measure_acceptance.py", *command], trainer.accelerator.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        result = {
            "pooled_after_step_0": pooled(probe.points),
            "points": probe.points,
            "rewards": rewards,
            "policy": {"parameters": parameters, "path": policy.name, "autocast": str(autocast)},
            "training": {
                "steps": trainer.state.global_step,
                "learning_rate": training.learning_rate,
                "completions_per_step": training.per_device_train_batch_size * training.gradient_accumulation_steps,
                "mean_reward": mean(rewards) if rewards else None,
            },
            "draft_length": DRAFT_LENGTH,
            "temperature": training.temperature,
            "num_prompts": args.num_prompts,  # per point
            "wall_s": time.monotonic() - start,
            "provenance": where,
        }
        write_result(result, args.out.with_suffix(".json"))

    generation_config = GenerationConfig(
        do_sample=True, temperature=training.temperature, top_k=0, max_new_tokens=training.max_completion_length
    )
    probe = AcceptanceProbe(
        trainer.model,  # type: ignore[arg-type]
        tokenizer,
        args.num_prompts,
        args.measure_every,
        autocast,
        generation_config,
        make_dataset,
        save,
    )
    parameters = sum(parameter.numel() for parameter in probe.first)
    trainer.add_callback(probe)
    trainer.train()
    save()
    device, rate = trainer.accelerator.device.type, training.learning_rate
    title = f"{parameters / 1e6:.1f}M parameters, GRPO at learning rate {rate:g}, {device}"
    title += f", T = {training.temperature:g}"
    plot(probe.points, title, args.out.with_suffix(".png"))
    print(json.dumps(pooled(probe.points)))


if __name__ == "__main__":
    main()
