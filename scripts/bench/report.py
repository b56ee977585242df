"""What a benchmark says: ratios paired by repeat, a table for people, provenance, comparisons and the figure."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trl_selfspec.stats import RolloutStats


PACKAGES = ("torch", "transformers", "trl", "optimum-quanto", "accelerate", "triton")
BUSY_LOAD_PER_CORE = 0.35  # load average before a run above which its seconds mean little


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """`A/B`: how many times faster A is than B, paired by repeat. Engines in `seconds` go from slow to fast."""
    return {
        f"{fast}/{slow}": spread([s / f for s, f in zip(seconds[slow], seconds[fast], strict=True)])
        for slow, fast in combinations(seconds, 2)
    }


def _run_git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def copy_gb_per_s(device: torch.device, num_bytes: int = 2**28, repeats: int = 5) -> float:
    """Bytes read plus written per second by a large copy: the bandwidth to hold rounds against."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        with Stopwatch(device) as watch:
            target.copy_(source)
        seconds.append(watch.seconds)
    return 2 * num_bytes / min(seconds) / 1e9


class Stopwatch:
    """Wall-clock seconds of a block, device work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> "Stopwatch":
        self.seconds = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self._now() - self.seconds


def provenance(argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Where the numbers come from: code, command, versions, machine, date."""
    status = _run_git("status", "--porcelain")
    cuda = device.type == "cuda"
    return {
        "git_sha": _run_git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "argv": list(argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p)) is not None},
        "hardware": {
            "cpu": _cpu_name(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": torch.cuda.get_device_name(device) if cuda else None,
            "copy_gb_per_s": round(copy_gb_per_s(device), 1),
        },
    }


def own_figures(stats: RolloutStats, rollouts: int, target_bytes: int) -> dict[str, Any]:
    """Acceptance and component seconds (per rollout) from the summed `RolloutStats` of the timed rollouts."""
    components = {name: getattr(stats, f"{name}_s") / rollouts for name in ("prefill", "plain", "draft", "verify")}
    figures: dict[str, Any] = {"component_s": components, "rounds": {}}
    for name, rounds in (("plain", stats.plain_rounds), ("speculative", stats.num_rounds_speculative)):
        figures["rounds"][name] = rounds / rollouts
    if stats.plain_rounds:
        round_s = stats.plain_s / stats.plain_rounds
        figures["plain_round_ms"] = 1e3 * round_s
        figures["plain_weights_gb_per_s"] = target_bytes / round_s / 1e9
    if stats.num_rounds_speculative:
        draft_length = stats.mean_num_speculative_tokens or 0.0
        figures["draft_step_ms"] = 1e3 * stats.draft_s / (stats.num_rounds_speculative * draft_length)
        figures["verify_ms"] = 1e3 * stats.verify_s / stats.num_rounds_speculative
        figures["acceptance"] = {
            "alpha": stats.alpha,
            "acceptance_rate": stats.acceptance_rate,
            "mean_acceptance_length": stats.mean_acceptance_length,
            "num_speculative_tokens": draft_length,
            "speculative_round_fraction": stats.speculative_round_fraction,
            "toggle_active_sequences": stats.toggle_active_sequences,
        }
    return figures


def _format_spread(values: dict[str, float], unit: str) -> str:
    return f"{values['median']:.3f}{unit} [{values['min']:.3f}, {values['max']:.3f}]"


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    workload = result["workload"]
    lengths = workload["lengths"]
    lines = [
        f"{workload['model']}, {workload['parameters'] / 1e6:.0f}M parameters, {workload['dtype']}, "
        f"{workload['device']}, {result['provenance']['hardware']['threads']} threads",
        f"{lengths['rows']} rows, {workload['length_profile']}: {lengths['tokens']} tokens, "
        f"median {lengths['median']}, p90 {lengths['p90']}, p99 {lengths['p99']}, max {lengths['max']}; "
        f"{result['provenance']['repeats']} repeats",
    ]
    synthetic = result["provenance"]["synthetic_acceptance"]
    if synthetic is not None:
        lines.append(f"SYNTHETIC acceptance {synthetic}: drafts are accepted by lot, not by what the drafter is worth")
    load, cores = result["provenance"]["load_average_before"], result["provenance"]["hardware"]["cpu_cores"]
    if load > BUSY_LOAD_PER_CORE * cores:
        lines.append(f"NOISY: other processes were running (load average {load:.1f} on {cores} cores)")
    lines.append("")
    for name, figures in result["engines"].items():
        tokens_per_s = figures["tokens_per_s"]["median"]
        line = f"{name:<11}{_format_spread(figures['seconds'], ' s'):<28}{tokens_per_s:9.1f} tokens/s"
        parts = [f"{part} {s:.2f}" for part, s in figures.get("component_s", {}).items() if s]
        lines.append(line + (f"   seconds: {', '.join(parts)}" if parts else ""))
        if accepted := figures.get("acceptance"):
            parts = [
                f"alpha {accepted['alpha']:.3f}",
                f"mean acceptance length {accepted['mean_acceptance_length']:.2f}",
                f"draft length {accepted['num_speculative_tokens']:.2f}",
                f"speculative rounds {100 * accepted['speculative_round_fraction']:.0f} %",
                f"first at {accepted['toggle_active_sequences']:.1f} rows",
            ]
            lines.append(f"{'':<11}{', '.join(parts)}")
        if figures.get("gate"):
            lines.append(f"{'':<11}{figures['gate']}")
    lines.append("")
    lines += [f"{pair:<20}{_format_spread(values, 'x')}" for pair, values in result["ratios"].items()]
    return "\n".join(lines)


def read_result(path: Path) -> dict[str, Any]:
    """A file written by `run --out`; `ValueError` if it is not one."""
    try:
        result = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a result of `bench_rollout.py run --out`: {error}") from error
    if not isinstance(result, dict) or not {"ratios", "engines", "provenance", "workload"} <= result.keys():
        raise ValueError(f"{path} is not a result of `bench_rollout.py run --out`: it lacks ratios or provenance")
    return result


def compare(before: dict[str, Any], after: dict[str, Any]) -> str:
    """How each ratio that both results have changed, and what differs between the two settings."""
    notes = [
        f"note: {key} differs: {before['workload'][key]} | {after['workload'][key]}"
        for key in before["workload"]
        if before["workload"][key] != after["workload"].get(key)
    ]
    shared = [pair for pair in before["ratios"] if pair in after["ratios"]]
    if not shared:
        raise ValueError("the two results have no ratio in common")
    lines = [f"{'':<20}{'before':<26}{'after':<26}change"]
    for pair in shared:
        old, new = before["ratios"][pair], after["ratios"][pair]
        overlap = old["min"] <= new["max"] and new["min"] <= old["max"]
        change = f"{100 * (new['median'] / old['median'] - 1):+.1f} %" + (" (ranges overlap)" if overlap else "")
        lines.append(f"{pair:<20}{_format_spread(old, 'x'):<26}{_format_spread(new, 'x'):<26}{change}")
    return "\n".join(notes + lines)


def plot(results: Sequence[dict[str, Any]], out: Path) -> None:
    """Ratio over rows, one line per pair of engines, model and profile; bars show the range over repeats."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for result in results:
        work = result["workload"]
        for pair, values in result["ratios"].items():
            label = f"{pair}, {work['model']} {work['dtype']} {work['length_profile']}"
            series.setdefault(label, []).append((work["lengths"]["rows"], values))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for label, points in sorted(series.items()):
        points.sort(key=lambda point: point[0])
        rows = [point[0] for point in points]
        middle = [point[1]["median"] for point in points]
        below = [point[1]["median"] - point[1]["min"] for point in points]
        above = [point[1]["max"] - point[1]["median"] for point in points]
        axes.errorbar(rows, middle, yerr=[below, above], marker="o", capsize=3, label=label)
    axes.axhline(1.0, color="0.6", linewidth=1)
    axes.set_xscale("log", base=2)
    ticks = sorted({point[0] for points in series.values() for point in points})
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.set(xlabel="rows", ylabel="times faster", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    synthetic = {result["provenance"]["synthetic_acceptance"] for result in results} - {None}
    if synthetic:
        axes.set_title(f"synthetic acceptance {', '.join(map(str, sorted(synthetic)))}", fontsize=9)
    figure.savefig(out, dpi=150)
    plt.close(figure)
