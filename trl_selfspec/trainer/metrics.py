"""A trainer's metrics of its rollouts: counters over turns and ranks, their copy in a checkpoint, a progress bar."""

import json
import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from trl_selfspec.control.counters import Counters
from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.engine.rollout import Progress


STATE_FILE = "selfspec_state.json"  # in a checkpoint, beside TRL's files


@dataclass
class GenerationStats(Counters):
    """Rollout counters of one or more generations; adds up over turns, generations and ranks."""

    stats: RolloutStats = field(default_factory=RolloutStats)
    generations: int = 0  # per rank
    turns: int = 0  # calls of the generation method: one per generation, more with tools
    fallbacks: int = 0  # turns that TRL generated instead of the engine

    def add_turn(self, stats: RolloutStats, fallback: bool = False) -> None:
        self.stats += stats
        self.turns += 1
        self.fallbacks += fallback

    @property
    def used_engine(self) -> bool:
        return self.turns > self.fallbacks and self.stats.plain_rounds + self.stats.num_rounds_speculative > 0

    def metrics(self, num_ranks: int) -> dict[str, float]:
        """The metrics that a trainer logs. Seconds are means per generation and rank; the rest are ratios of sums."""
        metrics = self.stats.metrics(num_ranks, self.generations)
        if self.used_engine:
            return metrics
        return {name: metrics[name] for name in ("selfspec/rollout_s", "selfspec/tokens_per_s")}

    def gather(self) -> "GenerationStats":
        """The sum over all ranks; collective."""
        total = GenerationStats()
        for stats in gather_object([self]):
            total += stats
        return total


def gathered_rows(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
) -> tuple[list["array[int]"], list["array[int]"]]:
    """Prompts and completions of all ranks, in the same order on each of them. Collective."""
    prompts: dict[tuple[int, ...], array[int]] = {}  # equal prompts are one array, which pickle sends once
    rows = [
        (prompts.setdefault(tuple(prompt), array("i", prompt)), array("i", completion))
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
    ]
    rows = gather_object(rows)
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


def gathered_difference(
    logps: Tensor | None,  # (B, T)
    sampled: Tensor | None,  # (B, T), NaN where a token was not scored
    mask: Tensor,  # (B, T)
    accelerator: Any,
) -> dict[str, float]:
    """Mean and maximum of |logps - sampled| over the tokens of all ranks; empty without tokens. Collective."""
    local = torch.zeros(3, device=accelerator.device)
    if logps is not None and sampled is not None:
        delta = (logps - sampled).abs()[mask.bool() & ~sampled.isnan()]
        if delta.numel():
            local = torch.stack([delta.sum(), delta.max(), delta.new_tensor(delta.numel())])
    total, largest, count = accelerator.gather(local[None]).unbind(1)
    if count.sum() == 0:
        return {}
    return {"mean": (total.sum() / count.sum()).item(), "max": largest.max().item()}


def write_state(folder: str, engine_state: dict[str, Any], run: GenerationStats) -> None:
    with open(os.path.join(folder, STATE_FILE), "w", encoding="utf-8") as file:
        json.dump({"engine": engine_state, "run": asdict(run)}, file)


def read_state(folder: str) -> tuple[dict[str, Any], GenerationStats | None]:
    """The engine's state and the run's counters; no counters from before they were stored by name.

    Raises:
        ValueError: the file is no such state.
        FileNotFoundError: `folder` is a checkpoint of another trainer.
    """
    with open(os.path.join(folder, STATE_FILE), encoding="utf-8") as file:
        state = json.load(file)
    if not isinstance(state, dict) or not {"engine", "run"} <= state.keys():
        raise ValueError("it holds no engine state")
    return state["engine"], None if isinstance(state["run"], list) else GenerationStats.from_dict(state["run"])


class RolloutBar:
    """One line on a terminal while a rollout runs: finished sequences, unfinished ones, tokens/s, draft length."""

    def __init__(self, num_rows: int, show: bool) -> None:
        # With `disable=None`, tqdm draws on terminals alone.
        self._bar = tqdm(
            total=num_rows, desc="rollout", unit="seq", leave=False, disable=None if show else True, mininterval=0.2
        )
        self._next_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.close()

    def on_round(self, progress: Progress) -> None:
        now = time.perf_counter()
        if self._bar.disable or now < self._next_s:
            return
        self._next_s = now + self._bar.mininterval
        self._bar.n = self._bar.total - progress.unfinished
        self._bar.set_postfix_str(
            f"{progress.unfinished} unfinished, {progress.tokens_per_s:.0f} tokens/s, "
            f"draft {progress.num_speculative_tokens}"
        )
