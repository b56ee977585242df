"""What a benchmark says: ratios paired by repeat, a table for people, provenance and comparisons."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.device import copy_bytes_per_s, gpu_provenance


PACKAGES = ("torch", "transformers", "trl", "optimum-quanto", "accelerate", "triton", "humming-kernels", "vllm")
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
    """What git says; `None` where there is no git, or no repository."""
    if shutil.which("git") is None:
        return None
    root = Path(__file__).resolve().parent
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions | {"torch": torch.__version__}  # with its build, which the index's wheels leave out of their name


def provenance(argv: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Where the numbers come from: code, command, versions, machine, date."""
    status = _run_git("status", "--porcelain")
    return {
        "git_sha": _run_git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "argv": list(argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "hardware": {
            "cpu": _cpu_name(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpu": gpu_provenance(device),
            "measured_copy_bytes_per_s": copy_bytes_per_s(device),
        },
    }


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
        line = f"{name:<15}{_format_spread(figures['seconds'], ' s'):<28}{tokens_per_s:9.1f} tokens/s"
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
            lines.append(f"{'':<15}{', '.join(parts)}")
        for drafter, own in figures.get("drafters", {}).items():
            tokens = own["mean_acceptance_length"]
            lines.append(f"{'':<15}{drafter}: {own['rounds']:.0f} rounds of {tokens:.2f} tokens a row")
        if figures.get("gate"):
            lines.append(f"{'':<15}{figures['gate']}")
    lines.append("")
    lines += [f"{pair:<26}{_format_spread(values, 'x')}" for pair, values in result["ratios"].items()]
    return "\n".join(lines)


def write_result(result: dict[str, Any], path: Path) -> None:
    """At once: a process that is killed meanwhile leaves what was there before."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


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
