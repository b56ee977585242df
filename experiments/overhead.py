"""What the trainer costs beyond the engine: following the policy's weights, gathers, metrics. Shares of a step.

    python experiments/overhead.py [--max_steps 20] [--out overhead.json] [arguments of the recipe]

Trains the embedded default. Every method of ours and every method of TRL's that it calls keeps its own seconds on one
stack, so each second belongs to exactly one of: the engine's rollout, its refresh, our own code, and TRL's.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import FunctionType
from typing import Any

import torch
from trl import GRPOTrainer

from trl_selfspec.drafter.quantized_drafter import QuantizedDrafter
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.trainer.metrics import RolloutBar
from trl_selfspec.trainer.mixin import SelfSpecMixin
from trl_selfspec.trainer.trainers import SelfSpecGRPOTrainer


sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("recipes", "scripts"))
import grpo_math
from bench.report import provenance, spread


LIMIT = 0.03  # of a step
OWNERS = ("rollout", "refresh", "ours", "trl")
ENGINE = (
    (SelfSpecEngine, "generate", "rollout"),
    (SelfSpecEngine, "release", "rollout"),
    (SelfSpecEngine, "refresh", "refresh"),
    (QuantizedDrafter, "prepare", "refresh"),
)


class Ledger:
    """Seconds by owner; whoever was called last owns the time until it returns or calls another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(OWNERS, 0.0)
        self.steps: list[dict[str, float]] = []
        self._owners, self._since = ["trl"], time.perf_counter()

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._owners[-1]] += now - self._since
        self._since = now

    def owned(self, method: Callable, owner: str) -> Callable:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._charge()
            self._owners.append(owner)
            try:
                return method(*args, **kwargs)
            finally:
                self._charge()
                self._owners.pop()

        return timed

    def watch(self) -> None:
        """Wraps the engine, our trainer, and what our trainer overrides."""
        for cls, name, owner in ENGINE:
            setattr(cls, name, self.owned(getattr(cls, name), owner))
        for cls in (SelfSpecMixin, SelfSpecGRPOTrainer, RolloutBar):
            for name, method in list(vars(cls).items()):
                if not isinstance(method, FunctionType):
                    continue
                setattr(cls, name, self.owned(method, "ours"))
                for base in GRPOTrainer.__mro__ if cls is not RolloutBar else ():
                    if isinstance(theirs := vars(base).get(name), FunctionType):
                        setattr(base, name, self.owned(theirs, "trl"))
        self._end_steps_at_log()

    def _end_steps_at_log(self) -> None:
        log = SelfSpecMixin.log

        def logged(trainer: Any, logs: dict[str, float], *args: Any) -> None:
            log(trainer, logs, *args)
            if "loss" in logs:
                self._charge()
                self.steps.append(self.seconds)
                self.seconds = dict.fromkeys(OWNERS, 0.0)

        SelfSpecMixin.log = logged  # type: ignore[method-assign]


def summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Per step, the first one left out: it builds the engine."""
    steady = steps[1:]
    totals = [sum(step.values()) for step in steady]
    overheads = [step["ours"] + step["refresh"] for step in steady]
    return {
        "steps": len(steady),
        "overhead": sum(overheads) / sum(totals),
        "overhead_per_step": spread([part / whole for part, whole in zip(overheads, totals, strict=True)]),
        "step_s": median(totals),
        **{f"{owner}_s": median(step[owner] for step in steady) for owner in OWNERS},
        "limit": LIMIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/overhead"))
    parser.add_argument("--out", type=Path, help="where to write the result too")
    args, rest = parser.parse_known_args()
    where = provenance(sys.argv, torch.device("cpu"))
    ledger = Ledger()
    ledger.watch()
    grpo_math.main(["--max_steps", str(args.max_steps), "--output_dir", str(args.output_dir), *rest])
    result = json.dumps(summary(ledger.steps) | {"provenance": where})
    if args.out:
        args.out.write_text(result)
    print(result)
    sys.exit(summary(ledger.steps)["overhead"] > LIMIT)


if __name__ == "__main__":
    main()
