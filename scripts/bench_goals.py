"""All goals for a GPU: measures what is missing, then prints goal / measured / met.

    python scripts/bench_goals.py                          # everything, well under an hour
    python scripts/bench_goals.py --only 7b-steps 32b-steps  # parts take at most 8 minutes each
    python scripts/bench_goals.py --dry-run                # the commands

Every measurement is a `bench_rollout.py run` in a process of its own and leaves its JSON under benchmarks/gpu, where
the next call finds it: an interrupted run goes on where it stopped. What a measurement that failed, or took too long,
has shown until then counts; it is tried again by the next call. goals.json, written after each measurement, holds the
table and what failed. `--tiny` tries it on a CPU, without verdict.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench.goals import GOALS, MEASUREMENTS, PARTS, Goal, Measurement, Result
from bench.report import read_result, write_result


ROOT = Path(__file__).resolve().parents[1]
CACHE_VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
LAST_WORDS = 4000  # characters of a failed measurement's log that goals.json takes along
BAD_ARGUMENTS = 2  # argparse's exit status: a measurement that can't run here, such as vLLM where it isn't installed


def command(measurement: Measurement, args: argparse.Namespace, out: Path) -> list[str]:
    script = [sys.executable, str(ROOT / "scripts" / "bench_rollout.py"), "run", *measurement.arguments()]
    device = ["--device", "cpu", "--dtype", "fp32", "--repeats", "2"] if args.tiny else ["--device", "cuda"]
    python = ["--vllm-python", args.vllm_python] if "vllm" in measurement.engines else []
    return [*script, *device, *python, "--out", str(out)]


def environment(measurement: Measurement, cache: Path) -> dict[str, str]:
    """The caller's, with caches of compiled kernels of its own where start-up is what counts."""
    if measurement.caches is None:
        return dict(os.environ)
    if measurement.caches == "empty":
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
    return os.environ | {name: str(cache / name.lower()) for name in CACHE_VARIABLES}


def measure(measurement: Measurement, args: argparse.Namespace, out: Path, log: Path) -> str | None:
    """Runs it; None, or why there is no whole result. Its children end with it."""
    if measurement.caches == "kept" and not (args.out / "caches").exists():
        return "failed: there are no caches to start from; measure those that fill them --again"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command(measurement, args, out),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment(measurement, args.out / "caches"),
            start_new_session=True,
        )
        try:
            status = process.wait(measurement.limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status == 0:
        return None
    if status is None:
        return f"failed: not done after {measurement.limit_s} s"
    said = log.read_text(errors="replace").strip().splitlines()
    return f"{'skipped' if status == BAD_ARGUMENTS else 'failed'}: {said[-1] if said else f'exit status {status}'}"


def is_done(path: Path) -> bool:
    return path.exists() and read_result(path).get("complete", True)


def load_results(folder: Path, tiny: bool) -> dict[str, Result]:
    """What was measured so far, by name; a CPU's results never stand among a GPU's."""
    paths = {m.name: folder / f"{m.name}.json" for m in MEASUREMENTS}
    results = {name: read_result(path) for name, path in paths.items() if path.exists()}
    device = "cpu" if tiny else "cuda"
    return {name: result for name, result in results.items() if result["workload"]["device"] == device}


def row(goal: Goal, results: dict[str, Result], tiny: bool) -> dict[str, Any]:
    """One line of the table as data; `met` is None without a number, or where it isn't a GPU's."""
    try:
        measured = goal.measured([results[name] for name in goal.needs])
    except KeyError:  # not measured, or without an engine that failed
        measured = None
    return {
        "goal": goal.text,
        "bound": goal.bound_text,
        "measured": measured,
        "met": None if measured is None or tiny else goal.is_met(measured),
        "measurements": list(goal.needs),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    words = {True: "yes", False: "NO", None: "-"}
    lines = [f"{'goal':<54}{'bound':>15}{'measured':>11}{'met':>6}"]
    for line in rows:
        measured = "-" if line["measured"] is None else f"{line['measured']:.3f}"
        lines.append(f"{line['goal']:<54}{line['bound']:>15}{measured:>11}{words[line['met']]:>6}")
    return "\n".join(lines)


def summary(
    rows: Sequence[dict[str, Any]], results: dict[str, Result], failed: dict[str, str], tiny: bool
) -> dict[str, Any]:
    """The table with where its numbers come from; each measurement's file has the rest."""
    sources = [result["provenance"] for result in results.values()]
    return {
        "goals": list(rows),
        "repeats": {name: result["provenance"]["repeats"] for name, result in results.items()},
        "failed": failed,
        "tiny_on_cpu": tiny,
        "provenance": {
            "git_shas": sorted({str(source["git_sha"]) for source in sources}),
            "git_dirty": any(source["git_dirty"] for source in sources),
            "dates": sorted(source["date"] for source in sources),
            "gpus": sorted({gpu["name"] for source in sources if (gpu := source["hardware"]["gpu"])}),
            "versions": sources[0]["versions"] if sources else {},
        },
    }


def last_words(folder: Path) -> dict[str, str]:
    """What measurements said that were begun and not brought to an end, by name."""
    logs = {m.name: folder / f"{m.name}.log" for m in MEASUREMENTS if not is_done(folder / f"{m.name}.json")}
    return {name: log.read_text(errors="replace")[-LAST_WORDS:] for name, log in logs.items() if log.exists()}


def write_table(folder: Path, tiny: bool) -> tuple[list[dict[str, Any]], dict[str, Result]]:
    results = load_results(folder, tiny)
    rows = [row(goal, results, tiny) for goal in GOALS]
    write_result(summary(rows, results, last_words(folder), tiny), folder / "goals.json")
    return rows, results


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/gpu, or outputs/goals with --tiny")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: does it run?")
    parser.add_argument("--vllm-python", default=sys.executable, help="interpreter of an environment that has vLLM")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    args.out = args.out or ROOT / ("outputs/goals" if args.tiny else "benchmarks/gpu")
    chosen = [m.tiny() if args.tiny else m for m in MEASUREMENTS if m.part in args.only]
    if args.dry_run:
        print("\n".join(shlex.join(command(m, args, args.out / f"{m.name}.json")) for m in chosen))
        return
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("These are goals for a GPU, and there is no CUDA device here; --tiny tries the runner on a CPU.")
    args.out.mkdir(parents=True, exist_ok=True)
    reasons: dict[str, str] = {}
    for measurement in chosen:
        out, start = args.out / f"{measurement.name}.json", time.monotonic()
        if args.again:
            out.unlink(missing_ok=True)
        try:
            if not is_done(out) and (why := measure(measurement, args, out, out.with_suffix(".log"))):
                reasons[measurement.name] = why
        finally:  # also where this process is to end
            write_table(args.out, args.tiny)
        print(
            f"{measurement.name:<14}{time.monotonic() - start:6.0f} s  {reasons.get(measurement.name, '')}", flush=True
        )
    rows, results = write_table(args.out, args.tiny)
    print(table(rows))
    if missing := [m.name for m in MEASUREMENTS if m.name not in results]:
        print(f"Not measured yet: {', '.join(missing)}")
    sys.exit(any(why.startswith("failed") for why in reasons.values()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # the measurement under way ends too
    main()
