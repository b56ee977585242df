"""Does training in two processes survive `kill -9`? The embedded default under DDP and FSDP2, on CPUs.

    python experiments/kill_and_resume.py [--launchers ddp fsdp2] [--max_steps 200] [--kill_at 120] [--out result.json]

Each launcher trains twice: uninterrupted, and killed once step KILL_AT is logged, then resumed from its last
checkpoint. What is checked, with exit status 1 if it does not hold: no step is missing from the resumed run's log, it
ends with the uninterrupted run's weights bit for bit, and the reward at the end is that of one process within noise.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint


sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from bench.processes import kill_tree
from bench.report import provenance


ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCHERS = {
    "one": [sys.executable],
    "ddp": [*ACCELERATE, "--config_file", "recipes/accelerate_configs/cpu.yaml", "--main_process_port", "0"],
    "fsdp2": [*TORCHRUN, "tests/fsdp_on_cpu.py"],
}
ROWS = 32  # per step, over all processes
# Counts alone decide when to speculate: measured seconds would let two runs draft at different moments.
OPTIONS = [
    *("--selfspec_num_speculative_tokens", "3", "--selfspec_max_active_sequences", "8"),
    *(
        "--num_generations",
        "8",
        "--max_completion_length",
        "160",
        "--save_strategy",
        "steps",
        "--disable_tqdm",
        "true",
    ),
]
NOISE = 3.0  # standard errors between the final rewards of two launchers
POLL_S = 0.2


def command(launcher: str, output_dir: Path, args: argparse.Namespace) -> list[str]:
    rows = ROWS // (1 if launcher == "one" else 2)
    given = {
        "output_dir": output_dir,
        "per_device_train_batch_size": rows,
        "max_steps": args.max_steps,
        "save_steps": args.save_steps,
        "seed": args.seed,
    }
    pairs = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return [*LAUNCHERS[launcher], "recipes/grpo_math.py", *OPTIONS, *pairs]


def run(launcher: str, output_dir: Path, args: argparse.Namespace, kill: bool = False, resume: bool = False) -> float:
    """Trains to the end, or until step `args.kill_at` is logged; returns the seconds that took.

    Raises:
        RuntimeError: the run failed, hung, or ended before it could be killed.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    words, log = command(launcher, output_dir, args), output_dir / ("resumed.log" if resume else "run.log")
    if resume:
        words += ["--resume_from_checkpoint", str(get_last_checkpoint(str(output_dir)))]
    start = time.monotonic()
    with log.open("w") as file:
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | os.environ
        process = subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=env)
        try:
            while process.poll() is None and time.monotonic() - start < args.timeout_s:
                if kill and steps_logged(log) >= args.kill_at:
                    break
                time.sleep(POLL_S)
            running = process.poll() is None
        finally:
            kill_tree(process)
    if running != kill or not (running or process.returncode == 0):
        raise RuntimeError(f"{' '.join(words)} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return time.monotonic() - start


def steps_logged(log: Path) -> int:
    return log.read_text(errors="replace").count("'reward':")


def outcome(output_dir: Path) -> dict[str, Any]:
    """The log of a run, one entry per step, and a digest of its final weights."""
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in history if "reward" in entry]
    return {
        "steps": [entry["step"] for entry in steps],
        "rewards": [entry["reward"] for entry in steps],
        "fallback": max(entry["selfspec/fallback"] for entry in steps),
        "logp_difference": max(entry["sampling/sampling_logp_difference/max"] for entry in steps),
        "alpha": mean(entry["selfspec/alpha"] for entry in steps if "selfspec/alpha" in entry),
        "step_s": mean(entry["step_time"] for entry in steps),
        "weights": hashlib.sha256((output_dir / "model.safetensors").read_bytes()).hexdigest(),
    }


def final_reward(rewards: list[float]) -> dict[str, float]:
    """Mean over the last quarter, and its standard error."""
    end = rewards[-max(len(rewards) // 4, 2) :]
    return {"mean": mean(end), "standard_error": stdev(end) / len(end) ** 0.5}


def uninterrupted(launcher: str, output_dir: Path, args: argparse.Namespace) -> dict[str, Any]:
    seconds = run(launcher, output_dir, args)
    return outcome(output_dir) | {"wall_s": seconds}


def interrupted(launcher: str, output_dir: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Killed, then resumed from the last checkpoint."""
    killed_s = run(launcher, output_dir, args, kill=True)
    checkpoint = get_last_checkpoint(str(output_dir))
    assert checkpoint is not None, "`save_steps` has to be less than `kill_at`"
    reached = steps_logged(output_dir / "run.log")
    resumed_s = run(launcher, output_dir, args, resume=True)
    resumed_from = int(checkpoint.rpartition("-")[2])
    return outcome(output_dir) | {"killed_at": reached, "resumed_from": resumed_from, "wall_s": killed_s + resumed_s}


def verdict(runs: dict[str, dict[str, Any]], max_steps: int) -> dict[str, Any]:
    """What holds, for each launcher of two processes."""
    ends = {name: final_reward(run["rewards"]) for name, run in runs.items()}
    checks = {}
    for name, end in ends.items():
        error = (end["standard_error"] ** 2 + ends["one"]["standard_error"] ** 2) ** 0.5
        whole = runs[name.removesuffix(" killed")]
        checks[name] = {
            "no_missing_step": runs[name]["steps"] == list(range(1, max_steps + 1)),
            "same_weights": runs[name]["weights"] == whole["weights"],
            "same_rewards": runs[name]["rewards"] == whole["rewards"],
            "reward_as_one_process": abs(end["mean"] - ends["one"]["mean"]) <= NOISE * error,
            "no_fallback": runs[name]["fallback"] == 0,
        }
    return {"final_reward": ends, "checks": checks, "holds": all(all(c.values()) for c in checks.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=["ddp", "fsdp2"], default=["ddp", "fsdp2"])
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--kill_at", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout_s", type=float, default=3600, help="longest one run may take: beyond, it hangs")
    parser.add_argument("--at_once", action="store_true", help="all runs side by side; their seconds mean nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/kill_and_resume"))
    parser.add_argument("--out", type=Path, help="where to write the result")
    args = parser.parse_args()
    if not args.save_steps <= args.kill_at < args.max_steps:
        parser.error("give --save_steps <= --kill_at < --max_steps")
    output_dir, names = args.output_dir.resolve(), ["one"]
    for launcher in args.launchers:
        names += [launcher, f"{launcher} killed"]
    where = provenance(sys.argv, torch.device("cpu"))

    def train(name: str) -> dict[str, Any]:
        launcher, _, killed = name.partition(" ")
        return (interrupted if killed else uninterrupted)(launcher, output_dir / name.replace(" ", "_"), args)

    with ThreadPoolExecutor(max_workers=len(names) if args.at_once else 1) as pool:
        runs = dict(zip(names, pool.map(train, names), strict=True))
    result = verdict(runs, args.max_steps)
    if args.out:
        args.out.write_text(json.dumps(result | {"runs": runs, "provenance": where}, indent=1))
    print(json.dumps(result))
    sys.exit(not result["holds"])


if __name__ == "__main__":
    main()
