"""What `make demo` runs: GRPO on the embedded default in three modes, acceptance, and where speculation pays.

    python scripts/demo.py [--output_dir outputs/demo] [--max_steps 30]

Prints one table and writes demo_results.json. About 10 minutes on 2 cores.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

from trl_selfspec import RolloutStats, SelfSpecEngine, SelfSpecOptions


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import arithmetic


ROOT = Path(__file__).resolve().parents[1]
MODES = {
    "stock TRL": ["--use_selfspec", "false"],
    "engine, no speculation": ["--selfspec_num_speculative_tokens", "0"],
    "engine, gate in charge": ["--selfspec_num_speculative_tokens", "auto"],
}
PLAIN, GATED = "engine, no speculation", "engine, gate in charge"
HELD_OUT = 512  # problems for the reward before and after: the few of one step would hide the change
DRAFT_LENGTH = 4
BENCH_ROWS = 1
STEADY = 1.2  # times that the rest of a step may differ between modes: completions differ in length by 1.1
DRIFTED = (
    "[yellow]The rest of a step is nearly the same work in each mode, but took up to {:.2f}x as long in one as in "
    "another: this machine's speed changed meanwhile, so read ratios between modes with that in mind.[/]"
)


def run(command: list[str], log: Path) -> str:
    """Runs a command and returns its standard output, which also goes to `log`; progress bars show on a terminal.

    Raises:
        RuntimeError: the command failed; the message ends with what it said last.
    """
    bars = sys.stderr.isatty()
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=None if bars else subprocess.PIPE, text=True
    )
    log.write_text(done.stdout + (done.stderr or ""))
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return done.stdout


def train(mode: str, output_dir: Path, max_steps: int) -> dict[str, Any]:
    """One GRPO run; means over its steps, without the first, which pays for warm-up."""
    name = mode.replace(" ", "_").replace(",", "")
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/grpo_math.py", *MODES[mode]]
    command += ["--max_steps", str(max_steps), "--output_dir", str(output_dir / name)]
    start = time.monotonic()
    run(command, output_dir / f"{name}.log")
    state = json.loads((output_dir / name / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "reward" in entry]
    steady = steps[1:]
    return {
        "rollout_s": sum(step["selfspec/rollout_s"] for step in steady),
        "tokens_per_s": rollout_mean(steady, "tokens_per_s"),
        "estimated_speedup": rollout_mean(steady, "estimated_speedup"),
        "step_s": mean(step["step_time"] for step in steady),
        "rest_s": mean(map(rest_of_step, steady)),
        "speculative_round_fraction": mean(step.get("selfspec/speculative_round_fraction", 0.0) for step in steady),
        "refresh_s": mean(step.get("selfspec/refresh_s", 0.0) for step in steady),
        "wall_s": time.monotonic() - start,
        "tokens_per_s_by_epoch": by_epoch(steady),
        "suffix_round_fraction": mean(step.get("selfspec/suffix_round_fraction", 0.0) for step in steady),
        "rewards": [step["reward"] for step in steps],
        "policy_dir": str(output_dir / name),
    }


def by_epoch(steps: list[dict[str, float]]) -> list[float | None]:
    """Tokens per second of each epoch; `epoch` counts those that are over when a step ends."""
    epochs = range(math.ceil(max(step["epoch"] for step in steps)))
    return [
        rollout_mean([step for step in steps if epoch < step["epoch"] <= epoch + 1], "tokens_per_s")
        for epoch in epochs
    ]


def rest_of_step(step: dict[str, float]) -> float:
    return step["step_time"] - step["selfspec/rollout_s"] - step.get("selfspec/refresh_s", 0.0)


def rollout_mean(steps: list[dict[str, float]], metric: str) -> float | None:
    """Mean over the seconds of rollouts, where steps have the metric; `None` where none has."""
    weighted = [
        (step[f"selfspec/{metric}"], step["selfspec/rollout_s"]) for step in steps if f"selfspec/{metric}" in step
    ]
    total = sum(seconds for _, seconds in weighted)
    return sum(value * seconds for value, seconds in weighted) / total if total else None


def load_engine(policy_dir: Path, options: SelfSpecOptions) -> SelfSpecEngine:
    """The engine as the recipe runs it: fp32 weights, under bf16 autocast where the machine has bf16."""
    from grpo_math import has_native_bf16

    model = AutoModelForCausalLM.from_pretrained(policy_dir, dtype=torch.float32)
    return SelfSpecEngine(model, options, torch.bfloat16 if has_native_bf16() else None)


def held_out_reward(policy_dir: Path) -> float:
    """Share of right answers, one sample at temperature 1 to each of the same problems."""
    tokenizer, problems = AutoTokenizer.from_pretrained(policy_dir), arithmetic.make_dataset(HELD_OUT, seed=777)
    engine = load_engine(policy_dir, SelfSpecOptions(num_speculative_tokens=0))
    output = engine.generate(prompt_ids(tokenizer, problems), generation_config(), seed=0)
    texts = tokenizer.batch_decode(output.completion_ids, skip_special_tokens=True)
    return mean(arithmetic.product_reward([[{"content": text}] for text in texts], list(problems["solution"])))


def measure_acceptance(policy_dir: Path, qtype: str) -> dict[str, float]:
    """Acceptance of the trained policy's own drafter, speculating in every round."""
    options = SelfSpecOptions(draft_qtype=qtype, num_speculative_tokens=DRAFT_LENGTH, max_active_sequences=10**6)
    engine, stats = load_engine(policy_dir, options), RolloutStats()
    for seed in range(2):
        stats += engine.generate(step_prompts(policy_dir, seed), generation_config(), seed=seed).stats
    return {"alpha": stats.alpha or 0.0, "acceptance_rate": stats.acceptance_rate or 0.0}


def explain_gate(policy_dir: Path) -> str:
    """The gate's own words after one more rollout, with the costs and the acceptance it learned in training."""
    engine = load_engine(policy_dir, SelfSpecOptions())
    engine.load_state_dict(json.loads((policy_dir / "selfspec_state.json").read_text())["engine"])
    engine.generate(step_prompts(policy_dir, seed=9), generation_config(), seed=9)
    return engine.controller.explain()


def step_prompts(policy_dir: Path, seed: int, num_prompts: int = 8, num_generations: int = 8) -> list[list[int]]:
    """Prompts of one training step, each repeated as GRPO repeats it."""
    problems = arithmetic.make_dataset(num_prompts, seed=1000 + seed)
    ids = prompt_ids(AutoTokenizer.from_pretrained(policy_dir), problems)
    return [row for row in ids for _ in range(num_generations)]


def prompt_ids(tokenizer: Any, problems: Dataset) -> list[list[int]]:
    prompts = list(problems["prompt"])
    return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]


def generation_config() -> GenerationConfig:
    return GenerationConfig(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=320)


def bench(acceptance: float, log: Path) -> dict[str, Any]:
    """A policy of 150 million parameters, with the acceptance just measured; random weights have none of their own."""
    command = [sys.executable, "scripts/bench_rollout.py", "run", "--preset", "150m", "--dtype", "bf16"]
    command += ["--rows", str(BENCH_ROWS), "--max-new-tokens", "64", "--synthetic-acceptance", f"{acceptance:.4f}"]
    return json.loads(run(command, log).strip().splitlines()[-1])


def print_table(console: Console, modes: dict[str, dict[str, Any]]) -> None:
    columns = ("mode", "reward before", "after", "rollouts s", "tokens/s", "rest of step s", "speculative")
    table = Table(*columns, title="GRPO on the embedded default")
    table.columns[0].no_wrap = True
    for mode, figures in modes.items():
        table.add_row(
            mode,
            f"{figures['reward_before']:.2f}",
            f"{figures['reward_after']:.2f}",
            f"{figures['rollout_s']:.1f}",
            f"{figures['tokens_per_s']:.0f}",
            f"{figures['rest_s']:.2f}",
            "-" if mode.startswith("stock") else f"{100 * figures['speculative_round_fraction']:.0f} %",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--max_steps", type=int, default=30)
    args = parser.parse_args()
    if args.max_steps < 2:
        parser.error("--max_steps must be at least 2: the first step pays for warm-up and is left out")
    output_dir = args.output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    console, start = Console(width=100), time.monotonic()
    disable_progress_bar()  # of weights being loaded; rollouts show theirs

    policy_dir = arithmetic.tiny_policy_dir()
    if not policy_dir.exists():
        console.print("Training the policy (once, 3 to 8 minutes) ...")
        said = run([sys.executable, "scripts/make_tiny_policy.py"], output_dir / "policy.log")
        console.print("\n".join(said.strip().splitlines()[-5:]))
    results: dict[str, Any] = {"policy_s": time.monotonic() - start, "modes": {}}
    for mode in MODES:
        console.print(f"GRPO, {mode} ...")
        results["modes"][mode] = train(mode, output_dir, args.max_steps)

    console.print("Reward and acceptance of the trained policies ...")
    before = held_out_reward(policy_dir)
    for figures in results["modes"].values():
        figures["reward_before"], figures["reward_after"] = before, held_out_reward(Path(figures["policy_dir"]))
    gated = Path(results["modes"][GATED]["policy_dir"])
    results["acceptance"] = {qtype: measure_acceptance(gated, qtype) for qtype in ("qint4", "qint8")}
    results["gate"] = explain_gate(gated)
    console.print("Half a minute on a shape of 150 million parameters ...")
    results["bench"] = bench(results["acceptance"]["qint4"]["alpha"], output_dir / "bench.log")
    results["wall_s"] = time.monotonic() - start
    (output_dir / "demo_results.json").write_text(json.dumps(results, indent=2))

    print_table(console, results["modes"])
    for sentence in conclusions(results):
        console.print(sentence)
    console.print(f"{results['wall_s'] / 60:.1f} minutes; details in {output_dir / 'demo_results.json'}")


def conclusions(results: dict[str, Any]) -> list[str]:
    """What pays where, in sentences."""
    modes = results["modes"].values()
    stock, plain, gated = (figures["tokens_per_s"] for figures in modes)
    rest = [figures["rest_s"] for figures in modes]
    drift = max(rest) / min(rest)
    accepted = ", ".join(f"{qtype} {figures['alpha']:.3f}" for qtype, figures in results["acceptance"].items())
    ratios = results["bench"]["ratios"]
    spans = {name: f"{r['median']:.2f}x ({r['min']:.2f}-{r['max']:.2f})" for name, r in ratios.items()}
    logged = results["modes"][GATED]["estimated_speedup"]
    measured = "had too few of them to measure a gain" if logged is None else f"measured {logged:.2f}x"
    pairs = zip(*(results["modes"][mode]["tokens_per_s_by_epoch"] for mode in (PLAIN, GATED)), strict=False)
    epochs = [gated / plain for plain, gated in pairs if plain and gated]
    copied = 100 * results["modes"][GATED]["suffix_round_fraction"]
    return [
        f"Here the engine alone gives {plain / stock:.1f}x stock TRL's tokens/s, and speculation under the gate "
        f"{gated / plain:.2f}x the engine's; against plain rounds of the same rollouts, the log {measured}.",
        f"Prompts come again in every epoch, and drafts copy what was said to them before ({copied:.0f} % of rounds): "
        f"{', '.join(f'{ratio:.2f}x' for ratio in epochs)} the engine without speculation, epoch by epoch.",
        *([DRIFTED.format(drift)] if drift > STEADY else []),
        f"Acceptance per examined draft token, speculation forced on, trained policy: {accepted}.",
        f"The gate, at the end of a rollout: {results['gate']}.",
        f"A larger shape, 150M parameters in bf16, {BENCH_ROWS} row, acceptance set to that of qint4: speculation is "
        f"{spans['selfspec/plain']} as fast as the engine without speculation, {spans['selfspec/stock']} as fast as "
        "`model.generate`.",
    ]


if __name__ == "__main__":
    main()
