"""The check of the gate on a real model: its sums, and that each run is the recipe's with the mode's options."""

import json
import subprocess
from pathlib import Path
from typing import Any

import grpo_gate_check
import grpo_math
import pytest
from grpo_gate_check import MODES, summary


def step(rollout_s: float, refresh_s: float, tokens: float, **more: float) -> dict[str, float]:
    seconds = {"rollout_s": rollout_s, "refresh_s": refresh_s, "generation_s": rollout_s + refresh_s}
    return seconds | {"tokens": tokens} | more


def test_refreshing_counts_and_gains_are_ratios_of_sums() -> None:
    """The gate's run: 600 tokens in 8 s of rollouts and 2 s of refreshing; plain 600 in 12 s. A gain that leaves out
    refreshing, or a mean over steps of tokens/s, would be another number."""
    plain = [step(8, 0, 300), step(4, 0, 300)]
    gate = [step(6, 1, 400, estimated_speedup=1.0), step(2, 1, 200, estimated_speedup=2.0)]
    result = summary({"plain": [plain], "gate": [gate]})
    assert result["gate_cost"]["median"] == pytest.approx(10 / 12)
    assert result["measured_gain"]["median"] == pytest.approx(1.2)
    assert result["logged_gain"]["median"] == pytest.approx((1.0 * 6 + 2.0 * 2) / 8)
    assert result["logged_over_measured"] == pytest.approx(1.25 / 1.2)


def test_nothing_logged_is_nothing() -> None:
    result = summary({"plain": [[step(1, 0, 10)]], "gate": [[step(1, 0, 10)]]})
    assert result["logged_gain"] is None and "logged_over_measured" not in result
    assert result["measured_gain"]["median"] == 1


def test_modes_take_turns_with_the_repeats_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mode that is always first would have the machine of other minutes than the rest."""
    runs = []

    def fake(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        _, training, model = grpo_math.parse(command[2:])
        runs.append((training.use_selfspec, training.selfspec_num_speculative_tokens, training.seed))
        assert model.model_name_or_path == "smollm2" and training.max_steps == 2
        assert training.max_completion_length == 32  # an argument of the recipe, passed on
        entry = {"reward": 0.0, "step_time": 2.0, "selfspec/rollout_s": 1.0, "selfspec/tokens_per_s": 5.0}
        Path(training.output_dir, "trainer_state.json").write_text(json.dumps({"log_history": [entry, {"loss": 0}]}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(grpo_gate_check.subprocess, "run", fake)
    monkeypatch.setattr(grpo_gate_check, "provenance", lambda *_: {})
    out = tmp_path / "gate.json"
    grpo_gate_check.main(["--repeats", "2", "--max_steps", "2", "--out", str(out), "--max_completion_length", "32"])
    modes = [(False, "auto"), (True, 0), (True, "auto")]
    assert runs == [(*mode, seed) for seed in (0, 1) for mode in modes]
    result = json.loads(out.read_text())
    assert result["modes"].keys() == MODES.keys() and result["modes"]["gate"]["tokens_per_s"]["median"] == 5


def test_a_run_that_fails_says_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ValueError: no model")
    monkeypatch.setattr(grpo_gate_check.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="no model"):
        grpo_gate_check.train("plain", 0, 1, [])
