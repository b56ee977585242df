"""Does the gate cost anything on short rollouts of a real model, and is the gain that it logs the one that was had?

    python scripts/grpo_gate_check.py [--repeats 3] [--max_steps 3] [--out gate.json] [arguments of the recipe]

GRPO on SmolLM2 by recipes/smollm2-135m/grpo_word_problems.yaml: fp32 weights, under bf16 autocast where the CPU has
bf16, 16 completions of up to 96 tokens, 8 a group. Modes take turns (stock, plain, gate, stock, ...), each run in a
process of its own. Repeat i has the seed i in every mode. A run's samples are its mode's own, so seconds are compared
per token as well as per rollout. The last line on stdout is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench.report import provenance, spread, write_result


ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "smollm2-135m" / "grpo_word_problems.yaml"
MODES = {
    "stock": ["--use_selfspec", "false"],
    "plain": ["--selfspec_num_speculative_tokens", "0"],
    "gate": ["--selfspec_num_speculative_tokens", "auto"],
}
LARGEST_COST = 1.02  # rollout and refresh seconds with the gate, over those without speculation
LARGEST_ERROR = 0.1  # of the logged gain, relative to the measured one


def train(mode: str, seed: int, max_steps: int, rest: Sequence[str]) -> list[dict[str, float]]:
    """One run of the recipe in a process of its own.

    Returns:
        Per step, all that was logged of its rollout, and `generation_s` (rollout and refresh) and `tokens`.

    Raises:
        RuntimeError: the run failed; the message ends with what it said last.
    """
    with tempfile.TemporaryDirectory() as output_dir:
        command = [sys.executable, str(ROOT / "recipes" / "grpo_math.py"), "--config", str(RECIPE), *MODES[mode]]
        command += ["--seed", str(seed), "--max_steps", str(max_steps), "--output_dir", output_dir, *rest]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        history = json.loads((Path(output_dir) / "trainer_state.json").read_text())["log_history"]
    steps = []
    for entry in history:
        if "reward" in entry:
            step = {name.removeprefix("selfspec/"): v for name, v in entry.items() if name.startswith("selfspec/")}
            step["generation_s"] = step["rollout_s"] + step.get("refresh_s", 0.0)
            step["tokens"] = step["tokens_per_s"] * step["rollout_s"]
            steps.append(step | {"step_time": entry["step_time"]})
    return steps


def summary(runs: dict[str, list[list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians and ranges per mode over its runs, and what the gate costs and gains against `plain`.

    A run's figures are ratios of sums over its steps, the first one included: short runs of a real model are what
    people try first. `logged_gain` is the mean of `estimated_speedup` over the seconds of the steps that have one.

    Args:
        runs: per mode and repeat, the steps of `train`.
    """
    totals = {mode: [_total(steps) for steps in repeats] for mode, repeats in runs.items()}
    modes = {
        mode: {name: spread([run[name] for run in repeats]) for name in repeats[0] if repeats[0][name] is not None}
        for mode, repeats in totals.items()
    }
    pairs = list(zip(totals["plain"], totals["gate"], strict=True))
    cost = spread([gate["generation_s"] / plain["generation_s"] for plain, gate in pairs])
    gains = [gate["tokens_per_s"] / plain["tokens_per_s"] for plain, gate in pairs]
    result = {"modes": modes, "gate_cost": cost, "measured_gain": spread(gains), "logged_gain": None}
    logged = [run["logged_gain"] for run in totals["gate"] if run["logged_gain"] is not None]
    if logged:
        result["logged_gain"] = spread(logged)
        result["logged_over_measured"] = median(logged) / median(gains)
    return result


def _total(steps: list[dict[str, float]]) -> dict[str, Any]:
    seconds = sum(step["generation_s"] for step in steps)
    logged = [(step["estimated_speedup"], step["rollout_s"]) for step in steps if "estimated_speedup" in step]
    weight = sum(s for _, s in logged)
    return {
        "generation_s": seconds / len(steps),
        "rollout_s": sum(step["rollout_s"] for step in steps) / len(steps),
        "refresh_s": sum(step.get("refresh_s", 0.0) for step in steps) / len(steps),
        "tokens_per_s": sum(step["tokens"] for step in steps) / seconds,
        "speculative_round_fraction": sum(step.get("speculative_round_fraction", 0.0) for step in steps) / len(steps),
        "fallback": max(step.get("fallback", 0.0) for step in steps),
        "logged_gain": sum(gain * s for gain, s in logged) / weight if weight else None,
    }


def table(result: dict[str, Any]) -> str:
    lines = []
    for mode, figures in result["modes"].items():
        parts = [f"{name} {v['median']:.3g} [{v['min']:.3g}, {v['max']:.3g}]" for name, v in figures.items()]
        lines.append(f"{mode:<6}{', '.join(parts)}")
    cost, gain, logged = result["gate_cost"], result["measured_gain"], result["logged_gain"]
    lines.append(f"seconds with the gate / without speculation: {_text(cost)}, at most {LARGEST_COST} is wanted")
    lines.append(f"tokens/s with the gate / without speculation: {_text(gain)}; logged: {_text(logged)}")
    return "\n".join(lines)


def _text(values: dict[str, float] | None) -> str:
    return "nothing" if values is None else f"{values['median']:.3f} [{values['min']:.3f}, {values['max']:.3f}]"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max_steps", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args, rest = parser.parse_known_args(argv)
    if args.repeats < 1 or args.max_steps < 1:
        parser.error("--repeats and --max_steps must be at least 1")
    result: dict[str, Any] = {"provenance": provenance(sys.argv if argv is None else argv, torch.device("cpu"))}
    runs: dict[str, list[list[dict[str, float]]]] = {mode: [] for mode in MODES}
    for repeat in range(args.repeats):
        for mode in MODES:
            runs[mode].append(train(mode, repeat, args.max_steps, rest))
            total = _total(runs[mode][-1])
            speed = f"{total['generation_s']:8.2f} s a rollout, {total['tokens_per_s']:.0f} tokens/s"
            print(f"repeat {repeat + 1}/{args.repeats}  {mode:<6}{speed}", file=sys.stderr, flush=True)
        result |= summary(runs) | {"runs": runs}
        if args.out is not None:
            write_result(result, args.out)
    print(table(result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
