"""What is left of a benchmark when an engine fails, the process is killed or a tool is missing."""

import json
from pathlib import Path

import bench_rollout
import pytest
import torch
from bench import report
from bench.workload import Workload


def test_without_git_the_result_is_not_lost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Slim images have none, and provenance comes when all the work is done."""
    monkeypatch.setenv("PATH", str(tmp_path))
    provenance = report.provenance(["run"], torch.device("cpu"))
    assert provenance["git_sha"] is None and provenance["git_dirty"] is None


class Faulty:
    """An engine that does its work for some rollouts."""

    def __init__(self, good: int) -> None:
        self.good = good

    def rollout(self, workload: Workload, seed: int) -> list[list[int]]:
        self.good -= 1
        return [[1] * (length if self.good >= 0 else 0) for length in workload.lengths]


def test_an_engine_that_fails_leaves_the_others_their_results(capsys: pytest.CaptureFixture[str]) -> None:
    """When it is built, in its warm-up and in a repeat: half an hour of a GPU must not be lost to one of three."""
    bench = bench_rollout.Bench([Workload([[1], [2]], [20, 30])], torch.device("cpu"), seed=0)
    bench.add("none", lambda: Faulty(int("none")), 1)
    for name, good in {"cold": 0, "late": 2, "sound": 9}.items():
        bench.add(name, lambda good=good: Faulty(good), 1)
    assert bench.failures.keys() == {"none", "cold"}
    for number in (1, 2):
        bench.repeat(number, 2)
    assert list(bench.engines) == list(bench.seconds) == ["sound"] and len(bench.seconds["sound"]) == 2
    assert "int()" in bench.failures["none"] and "forced [20, 30]" in bench.failures["late"]
    assert "engine late failed" in capsys.readouterr().err


def test_each_repeat_is_kept(tmp_path: Path) -> None:
    """A run that is killed at its limit must leave what it has measured."""
    options = (
        "run --preset tiny --dtype fp32 --device cpu --engines stock,plain --rows 2 --max-new-tokens 4 --repeats 2"
    )
    args = bench_rollout.make_parser().parse_args(options.split())
    parts = [json.loads(json.dumps(part)) for part in bench_rollout.run(args, options.split())]
    assert [part["complete"] for part in parts] == [False, False, True]
    assert [part["provenance"]["repeats"] for part in parts] == [1, 2, 2]
    assert [len(part["engines"]["plain"]["seconds"]["all"]) for part in parts] == [1, 2, 2]
    path = tmp_path / "result.json"
    report.write_result(parts[0], path)
    assert report.read_result(path) == parts[0] and list(tmp_path.iterdir()) == [path]
