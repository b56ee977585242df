"""Laws of the check that a killed run continues: it accepts a faithful run, and each kind of damage fails it."""

from pathlib import Path
from typing import Any

import kill_and_resume
import pytest


pytestmark = pytest.mark.slow  # results of experiments stand in docs/LOG.md

STEPS = 40


def a_run(**values: Any) -> dict[str, Any]:
    rewards = [0.5 + 0.1 * (step % 2) for step in range(STEPS)]
    return {"steps": list(range(1, STEPS + 1)), "rewards": rewards, "weights": "w", "fallback": 0} | values


def verdict(**damage: Any) -> dict[str, Any]:
    runs = {"one": a_run(weights="other"), "ddp": a_run(), "ddp killed": a_run(**damage)}
    return kill_and_resume.verdict(runs, STEPS)


def test_a_faithful_run_passes() -> None:
    """Prevents a check that nothing can pass."""
    assert verdict()["holds"]


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        ({"steps": [*range(1, 12), *range(13, STEPS + 2)]}, "no_missing_step"),
        ({"steps": [*range(1, STEPS), STEPS - 1]}, "no_missing_step"),
        ({"weights": "x"}, "same_weights"),
        ({"rewards": [0.5] * (STEPS - 1) + [0.6]}, "same_rewards"),
        ({"rewards": [0.2 + 0.1 * (step % 2) for step in range(STEPS)]}, "reward_as_one_process"),
        ({"fallback": 1}, "no_fallback"),
    ],
)
def test_damage_is_seen(damage: dict[str, Any], check: str) -> None:
    """Negative control: a lost step, other weights, other samples, a lower reward, TRL's own generation."""
    result = verdict(**damage)
    assert not result["holds"]
    assert not result["checks"]["ddp killed"][check]
    assert all(result["checks"]["ddp"].values())


def test_steps_are_counted_in_the_log_of_a_running_process(tmp_path: Path) -> None:
    """A count that is off kills before the first checkpoint, or never."""
    log = tmp_path / "run.log"
    log.write_text("{'loss': '0', 'reward': '0.5', 'reward_std': '0.1'}\n" * 3 + "{'train_runtime': '1'}\n")
    assert kill_and_resume.steps_logged(log) == 3
