"""The goals for a GPU: their commands are valid, their verdicts right, and the runner runs, here on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_goals
import bench_rollout
import psutil
import pytest
import torch
from bench.goals import GOALS, MEASUREMENTS, Goal, in_plain_rounds, in_reads_of_the_weights, ratio


LONGEST_PART_S = 480
BY_NAME = {measurement.name: measurement for measurement in MEASUREMENTS}


def _result(plain_s: float, selfspec_s: float, device: str = "cuda") -> dict[str, Any]:
    return {
        "ratios": {},
        "engines": {
            "plain": {"seconds": {"median": plain_s}, "plain_round_ms": 5.0, "wall_ms_per_round": 5.2},
            "selfspec": {"seconds": {"median": selfspec_s}, "draft_step_ms": 3.0},
        },
        "workload": {"device": device, "weight_bytes": 16e9},
        "provenance": {"hardware": {"measured_copy_bytes_per_s": 4e12}},
    }


@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda measurement: measurement.name)
def test_every_measurement_is_a_valid_command(measurement: Any) -> None:
    """A mistyped option must fail here, not on a rented GPU."""
    for variant in (measurement, measurement.tiny()):
        args = bench_rollout.make_parser().parse_args(["run", *variant.arguments(), "--device", "cpu"])
        args.engines = [engine for engine in args.engines if engine != "vllm"]
        bench_rollout.check_arguments(args)
        assert (args.preset, args.rows) == (variant.preset, variant.rows)
        assert args.num_speculative_tokens == (variant.draft_length or "auto")


def test_names_are_unique_and_every_goal_has_its_measurements() -> None:
    assert len(BY_NAME) == len(MEASUREMENTS)
    needed = {name for goal in GOALS for name in goal.needs}
    assert needed == BY_NAME.keys()


def test_parts_fit_into_eight_minutes() -> None:
    seconds: Counter[str] = Counter()
    for measurement in MEASUREMENTS:
        seconds[measurement.part] += measurement.limit_s
    assert max(seconds.values()) <= LONGEST_PART_S


def test_the_worst_measurement_counts() -> None:
    """A mean over row counts would hide the one at which speculation loses."""
    goal = Goal("ratio", ("a", "b"), ratio("selfspec/plain"), 1.35)
    fast, slow = _result(2.0, 1.0), _result(2.0, 1.6)
    assert goal.measured([fast, slow]) == pytest.approx(1.25)
    assert goal.is_met(goal.measured([fast])) and not goal.is_met(goal.measured([fast, slow]))
    bound = replace(goal, figure=lambda result: _seconds(result), bound=1.5, at_least=False)
    assert bound.is_met(bound.measured([fast])) and not bound.is_met(bound.measured([fast, slow]))


def _seconds(result: dict[str, Any]) -> float:
    return result["engines"]["selfspec"]["seconds"]["median"]


def test_figures_are_relative_to_the_same_run() -> None:
    """16 GB at 4 TB/s are 4 ms: 5.2 ms of wall time are 1.3 reads, a draft step of 3 ms 0.6 of a round of 5 ms."""
    result = _result(2.0, 1.0)
    assert in_reads_of_the_weights(result) == pytest.approx(1.3)
    assert in_plain_rounds("draft_step_ms")(result) == pytest.approx(0.6)
    assert ratio("plain/selfspec")(result) == pytest.approx(0.5)


def test_a_cpu_never_passes_for_a_gpu(tmp_path: Path) -> None:
    """Numbers of a tiny model on a CPU, left in the folder, must not enter the table of goals."""
    path = tmp_path / f"{MEASUREMENTS[0].name}.json"
    path.write_text(json.dumps(_result(2.0, 1.0, device="cpu")))
    assert bench_goals.load_results(tmp_path, tiny=False) == {}
    path.write_text(json.dumps(_result(2.0, 1.0)))
    assert bench_goals.load_results(tmp_path, tiny=False).keys() == {MEASUREMENTS[0].name}
    goal = Goal("ratio", (MEASUREMENTS[0].name,), ratio("selfspec/plain"), 1.35)
    results = {MEASUREMENTS[0].name: _result(2.0, 1.0)}
    verdicts = [
        bench_goals.row(goal, *arguments)["met"] for arguments in ((results, False), (results, True), ({}, False))
    ]
    assert verdicts == [True, None, None]


def test_a_measurement_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    """An engine that hangs must not take the rest of the table with it."""
    args = Namespace(tiny=True, out=tmp_path, vllm_python="python")
    hasty = replace(BY_NAME["7b-stock"].tiny(), limit_s=1)
    why = bench_goals.measure(hasty, args, tmp_path / "x.json", tmp_path / "x.log")
    assert why == "failed: not done after 1 s"
    assert not (tmp_path / "x.json").exists()


def test_a_warm_start_needs_caches(tmp_path: Path) -> None:
    """Results are kept, caches may be gone: a cold start must not pass for a warm one."""
    args = Namespace(tiny=True, out=tmp_path, vllm_python="python")
    why = bench_goals.measure(BY_NAME["7b-warm"].tiny(), args, tmp_path / "x.json", tmp_path / "x.log")
    assert why is not None and "no caches" in why and not (tmp_path / "x.json").exists()


@pytest.mark.slow
def test_vllm_is_skipped_where_it_cannot_run(tmp_path: Path) -> None:
    args = Namespace(tiny=True, out=tmp_path, vllm_python="python")
    why = bench_goals.measure(BY_NAME["7b-vllm"].tiny(), args, tmp_path / "x.json", tmp_path / "x.log")
    assert why is not None and why.startswith("skipped: ") and "engine vllm: python has no vLLM" in why


@pytest.mark.slow
def test_the_runner_measures_once_and_shows_all_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second call goes on from the files of the first."""
    arguments = ["--tiny", "--only", "7b-stock", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        bench_goals.main(arguments)
    assert not ended.value.code, (tmp_path / "7b-stock.log").read_text()
    written = (tmp_path / "7b-stock.json").stat().st_mtime_ns
    with pytest.raises(SystemExit):
        bench_goals.main(arguments)
    assert (tmp_path / "7b-stock.json").stat().st_mtime_ns == written
    table = json.loads((tmp_path / "goals.json").read_text())
    assert table["tiny_on_cpu"] and len(table["goals"]) == len(GOALS)
    assert [line["measured"] is not None for line in table["goals"]] == [True] + [False] * (len(GOALS) - 1)
    assert all(line["met"] is None for line in table["goals"])
    said = capsys.readouterr().out
    assert GOALS[0].text in said and "Not measured yet: 7b-cold" in said


def test_what_was_not_finished_counts_and_is_tried_again(tmp_path: Path) -> None:
    """A measurement that was killed at its limit has some repeats; one whose engine failed, the other engine's."""
    path, log = tmp_path / "7b-longtail.json", tmp_path / "7b-longtail.log"
    result = _result(2.0, 1.0, device="cpu") | {"complete": False}
    result["provenance"] |= {"repeats": 1, "git_sha": None, "git_dirty": None, "date": "", "versions": {}}
    result["provenance"]["hardware"]["gpu"] = None
    path.write_text(json.dumps(result))
    log.write_text("RuntimeError: CUDA error: an illegal memory access was encountered")
    assert not bench_goals.is_done(path)
    bench_goals.write_table(tmp_path, tiny=True)
    table = json.loads((tmp_path / "goals.json").read_text())
    assert [line["measured"] for line in table["goals"] if line["measurements"] == ["7b-longtail"]] == [2.0]
    assert table["repeats"] == {"7b-longtail": 1} and "illegal" in table["failed"]["7b-longtail"]
    del result["engines"]["selfspec"]
    path.write_text(json.dumps(result))
    rows, _ = bench_goals.write_table(tmp_path, tiny=True)
    assert all(line["measured"] is None for line in rows)
    path.write_text(json.dumps(result | {"complete": True}))
    assert bench_goals.is_done(path)
    bench_goals.write_table(tmp_path, tiny=True)
    assert not json.loads((tmp_path / "goals.json").read_text())["failed"]


def test_what_ends_the_runner_ends_its_measurement(tmp_path: Path) -> None:
    """One left behind on the GPU would slow down whatever is timed next."""
    root = Path(bench_goals.__file__).parents[1]
    runner = subprocess.Popen(
        [sys.executable, "scripts/bench_goals.py", "--tiny", "--only", "7b-stock", "--out", str(tmp_path)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.DEVNULL,
    )
    start, children = time.monotonic(), []
    while not children and time.monotonic() - start < 60:
        time.sleep(0.1)
        children = psutil.Process(runner.pid).children()
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(30) == 1 and children
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert "7b-stock" in json.loads((tmp_path / "goals.json").read_text())["failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench_goals.main([])


def test_dry_run_prints_one_command_per_measurement(capsys: pytest.CaptureFixture[str]) -> None:
    bench_goals.main(["--dry-run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(MEASUREMENTS) and all("--device cuda" in line for line in lines)
