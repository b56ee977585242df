"""Reward curves of the embedded default with and without speculation, over several seeds.

Those of quantized drafts should overlap with those of plain rounds; those of suffix drafts have to be the same, number
for number, since the policy trains in fp32 on a CPU without bf16 and their tokens are those of plain sampling.

    python experiments/reward_curves.py [--seeds 0 1 2] [--max_steps 40] [--out docs/reward_curves]

Speculation is forced on (4 drafted tokens at any batch size): on a policy this small the gate would turn it off, and
two curves without speculation would show nothing. Writes OUT.png and OUT.json (rewards, acceptance, provenance).
"""

import argparse
import json
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
FORCED = ["--selfspec_num_speculative_tokens", "4", "--selfspec_max_active_sequences", "100000", "--bf16", "false"]
PLAIN, QUANTIZED, SUFFIX = "without speculation", "quantized drafts forced on", "suffix drafts forced on"
MODES = {
    PLAIN: ["--selfspec_num_speculative_tokens", "0", "--bf16", "false"],
    QUANTIZED: [*FORCED, "--selfspec_drafter", "quantized"],
    SUFFIX: [*FORCED, "--selfspec_drafter", "suffix"],
}
STYLES = {  # line style and colour
    PLAIN: {"color": "tab:grey", "linewidth": 3},
    QUANTIZED: {"color": "tab:blue"},
    SUFFIX: {"color": "black", "linestyle": ":"},
}
SMOOTHING = 4  # steps per plotted point


def train(mode: str, seed: int, max_steps: int, output_dir: Path) -> list[dict[str, float]]:
    """One run of the recipe; its log, one entry per step."""
    run_dir = output_dir / f"{mode.replace(' ', '_')}-{seed}"
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/grpo_math.py", *MODES[mode]]
    command += ["--seed", str(seed), "--max_steps", str(max_steps), "--output_dir", str(run_dir)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    history = json.loads((run_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "reward" in entry]


def summary(runs: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Mean reward over the last quarter per seed, and the difference of the modes against its standard error."""
    ends = {mode: [mean(curve[-len(curve) // 4 :]) for curve in curves] for mode, curves in runs.items()}
    plain, speculative = ends[PLAIN], ends[QUANTIZED]
    error = (stdev(plain) ** 2 / len(plain) + stdev(speculative) ** 2 / len(speculative)) ** 0.5
    return {"final_reward": ends, "difference": mean(speculative) - mean(plain), "standard_error": error}


def plot(runs: dict[str, list[list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for mode, curves in runs.items():
        for i, curve in enumerate(curves):
            blocks = [curve[k : k + SMOOTHING] for k in range(0, len(curve) - SMOOTHING + 1, SMOOTHING)]
            steps = [SMOOTHING * (k + 0.5) for k in range(len(blocks))]
            axes.plot(steps, [mean(b) for b in blocks], **STYLES[mode], alpha=0.8, label=None if i else mode)
    axes.set(xlabel="optimizer step", ylabel=f"reward (mean of {SMOOTHING} steps)", ylim=(0, 1))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "reward_curves")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reward_curves"))
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error("give at least two seeds: one curve per mode can't tell overlap from chance")
    logs = {
        mode: [train(mode, seed, args.max_steps, args.output_dir.resolve()) for seed in args.seeds] for mode in MODES
    }
    runs = {mode: [[step["reward"] for step in log] for log in mode_logs] for mode, mode_logs in logs.items()}
    assert runs[SUFFIX] == runs[PLAIN], "suffix drafts changed a sample"
    alphas = {mode: [step["selfspec/alpha"] for log in logs[mode] for step in log] for mode in (QUANTIZED, SUFFIX)}
    result = {
        **summary(runs),
        "suffix_rewards_are_those_of_plain_rounds": True,
        "alpha": {mode: {"mean": mean(values), "min": min(values)} for mode, values in alphas.items()},
        "rewards": runs,
        "provenance": {
            "command": " ".join(["python", *sys.argv]),
            "date": date.today().isoformat(),
            "seeds": args.seeds,
            "versions": {name: version(name) for name in ("torch", "transformers", "trl", "optimum-quanto")},
        },
    }
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    plot(runs, args.out.with_suffix(".png"))
    print(json.dumps({name: result[name] for name in ("final_reward", "difference", "standard_error", "alpha")}))


if __name__ == "__main__":
    main()
