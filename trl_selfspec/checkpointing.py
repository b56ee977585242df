"""What a checkpoint keeps besides TRL's files: what the controller learned, and the counters of the run so far."""

import json
import os
from typing import Any

from trl_selfspec.reporting import Tally


STATE_FILE = "selfspec_state.json"


def write_state(folder: str, engine_state: dict[str, Any], run: Tally) -> None:
    with open(os.path.join(folder, STATE_FILE), "w", encoding="utf-8") as file:
        json.dump({"engine": engine_state, "run": run.to_vector()}, file)


def read_state(folder: str) -> tuple[dict[str, Any], Tally] | None:
    """Engine state and counters; `None` if `folder` is a checkpoint of another trainer."""
    path = os.path.join(folder, STATE_FILE)
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        state = json.load(file)
    return state["engine"], Tally.from_vector(state["run"])
