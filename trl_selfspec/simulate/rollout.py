"""A rollout as a fluid: every row gains the expected tokens of a round until the next row ends.

That is within 1 % of drawing each acceptance (tests/simulate/test_rollout.py). A controller may be in charge instead
of the known best choice; then every round is one step, and it is told what a clock would show.
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from statistics import NormalDist

from trl_selfspec.control.controller import Controller
from trl_selfspec.control.rates import PLAIN, Choice
from trl_selfspec.simulate.costs import Costs


STRIDE = 256  # tokens after which the cost of a round is computed anew: contexts have grown
Clock = Callable[[float, float], float]  # (seconds so far, seconds of a part of a round) -> what it takes


@dataclass(frozen=True)
class Work:
    """The completions of one rollout on one rank, longest first."""

    lengths: tuple[float, ...]
    prompt: int = 256
    prefilled: int = 0  # tokens of prompts, each shared by its samples counted once
    slots: int | None = None  # rows that fit at once; others wait

    @classmethod
    def of(cls, lengths: Iterable[float], prompt: int = 256, samples: int = 8, slots: int | None = None) -> "Work":
        ordered = tuple(sorted(lengths, reverse=True))
        return cls(ordered, prompt, -(-len(ordered) // samples) * prompt, slots)

    @classmethod
    def lognormal(cls, rows: int, median: float, p99: float, limit: float, samples: int = 8) -> "Work":
        """Quantiles of a lognormal law; the longest row runs to the limit, as on competition math it does."""
        sigma = log(max(p99 / median, 1.0)) / NormalDist().inv_cdf(0.99)
        ranks = (exp(sigma * NormalDist().inv_cdf((i + 0.5) / rows)) for i in range(rows - 1))
        return cls.of([limit, *(min(limit, max(1, round(median * rank))) for rank in ranks)], samples=samples)

    def without_longest(self) -> "Work":
        """Its longest row is as long as the next."""
        return replace(self, lengths=(self.lengths[min(1, len(self.lengths) - 1)], *self.lengths[1:]))

    def all_equal(self) -> "Work":
        """The same tokens in rows of one length."""
        return replace(self, lengths=(sum(self.lengths) / len(self.lengths),) * len(self.lengths))

    def ranks(self, dp: int) -> list["Work"]:
        """Dealt to data-parallel ranks, whose order has nothing to do with length."""
        prefilled = self.prefilled // dp
        return [
            replace(self, lengths=self.lengths[i::dp], prefilled=prefilled) for i in range(min(dp, len(self.lengths)))
        ]


def read_lengths(path: Path) -> list[float]:
    """Completion lengths, one a line: a number, a list of token ids, or an object with `length` or `completion_ids`.

    Raises:
        ValueError: a line is none of these.
    """
    lengths = []
    for number, line in enumerate(filter(str.strip, path.read_text().splitlines()), 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if isinstance(value, dict):
            value = value.get("length", value.get("completion_ids"))
        value = len(value) if isinstance(value, list) else value
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(
                f"Line {number} of {path} has no length: each line is a number, a list of token ids, or an object "
                "with `length` or `completion_ids`. Text has to be tokenized first."
            )
        lengths.append(float(value))
    if not lengths:
        raise ValueError(f"{path} has no lengths.")
    return lengths


@dataclass
class Rollout:
    """What a rollout came to."""

    seconds: float = 0.0
    prefill_s: float = 0.0
    prepare_s: float = 0.0
    rounds: float = 0.0
    speculative_rounds: float = 0.0
    starts_at: int | None = None  # unfinished rows when drafting began


def rollout(
    costs: Costs, work: Work, gate: Controller | Choice | None = None, margin: float = 1.0, clock: Clock | None = None
) -> Rollout:
    """Simulates one rank.

    Args:
        gate: who decides: a controller, one choice for all rounds, or None for the best choice known.
        margin: gain that the best choice has to promise before plain rounds are left.
        clock: gives the seconds that are measured, for noise and drift.
    """
    done, clock = Rollout(), clock or (lambda now, seconds: seconds)
    controller = gate if isinstance(gate, Controller) else None
    fixed = gate if isinstance(gate, Choice) else None
    prepared = {name for name, draft in costs.by_name.items() if not draft.prepare_s}
    if controller:
        controller.begin_rollout(prepared)
    done.prefill_s = costs.target.prefill_s(work.prefilled)
    done.seconds += done.prefill_s
    waiting, chance = list(work.lengths), random.Random(0)
    slots = work.slots or len(waiting)
    chance.shuffle(waiting)  # nobody knows which row will be the longest
    left: list[float] = []
    grown: list[float] = []
    while left or waiting:
        while waiting and len(left) < slots:
            left.append(waiting.pop())
            grown.append(0.0)
        rows = len(left)
        context = work.prompt + sum(grown) / rows
        choice = controller.choose(rows) if controller else fixed or costs.gated(rows, context, margin)
        if choice.gamma and choice.drafter not in prepared:
            prepared.add(choice.drafter)
            prepare_s = costs.by_name[choice.drafter].prepare_s
            done.prepare_s, done.seconds = done.prepare_s + prepare_s, done.seconds + prepare_s
            if controller:
                controller.observe_preparing(choice.drafter, prepare_s)
        tokens = costs.tokens(choice)
        step = tokens if controller else min(min(left), STRIDE)
        draft_s = clock(done.seconds, costs.draft_s(rows, choice, context + step / 2))
        target_s = clock(done.seconds, costs.target_s(rows, choice, context + step / 2))
        if controller:
            _observe(controller, costs.alpha(choice), chance, rows, choice, draft_s, target_s)
        rounds = step / tokens
        done.seconds += rounds * (draft_s + target_s)
        done.rounds += rounds
        if choice.gamma:
            done.speculative_rounds += rounds
            done.starts_at = done.starts_at or rows
        pairs = [(a - step, b + step) for a, b in zip(left, grown, strict=True) if a - step > 1e-9]
        left, grown = [a for a, _ in pairs], [b for _, b in pairs]
    return done


def _observe(
    controller: Controller,
    alpha: float,
    chance: random.Random,
    rows: int,
    choice: Choice,
    draft_s: float,
    target_s: float,
) -> None:
    """Reports a round. Which drafts are accepted is drawn: a controller has to live with few of them."""
    if choice == PLAIN:
        controller.observe_plain(rows, target_s)
        return
    examined, accepted = [rows], []
    for _ in range(choice.gamma):
        accepted.append(sum(chance.random() < alpha for _ in range(examined[-1])))
        examined.append(accepted[-1])
    controller.observe_speculative(rows, choice, draft_s, target_s, accepted, examined[:-1])


def slowest(costs: Costs, works: Iterable[Work], margin: float = 1.0, gate: Choice | None = None) -> Rollout:
    """The rank that a step waits for."""
    return max((rollout(costs, work, gate, margin) for work in works), key=lambda done: done.seconds)
