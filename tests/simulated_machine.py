"""A machine with known costs and acceptance, and the regimes in which the controller has to find its way."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_selfspec.control.controller import PLAIN, Choice, Controller
from trl_selfspec.control.drafters import DrafterTraits
from trl_selfspec.control.stats import PlainComparison, RolloutStats


Chooser = Callable[[int], Choice]
QUANTIZED = DrafterTraits("quantized")


def one_drafter(*settings: Any, **more: Any) -> Controller:
    """A controller of the drafter that every machine has."""
    return Controller([QUANTIZED], *settings, **more)


@dataclass
class Drafter:
    """Seconds of a draft step of B rows (`per_round`: of the draft), and how drafts fare."""

    draft: Callable[[int], float]
    alpha: Callable[[int, int], float]  # rows, position
    per_round: bool = False
    prepare: float = 0.0  # before the first draft of a rollout
    build: float = 0.0  # before the first of all

    def draft_s(self, rows: int, gamma: int) -> float:
        return self.draft(rows) * (1 if self.per_round else gamma)


@dataclass
class Machine:
    """Seconds of a plain round or verify of T tokens and of a draft step, for B rows; and how drafts fare."""

    target: Callable[[int, int], float]
    draft: Callable[[int], float]
    alpha: Callable[[int, int], float]  # rows, position
    noise: float = 0.03
    outliers: float = 0.0  # chance of a measurement ten times too long
    seed: int = 0
    requantize: float = 0.0  # before the first draft of a rollout
    build: float = 0.0  # before the first of all
    slowness: Callable[[float], float] | None = None  # by the seconds so far; None: always 1
    seconds: float = 0.0  # without outliers, which no choice can avoid
    choices: list[int] = field(default_factory=list)  # draft lengths
    drafters: dict[str, Drafter] = field(default_factory=dict)  # in place of the one above

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.used: list[str] = []  # drafters, by round
        self.prepared: dict[str, int] = {}  # how often, by drafter
        self.context: dict[str, str] = {}  # told to the controller at the begin of a rollout
        self.plain_seconds = 0.0  # what plain rounds would have taken at each moment for the tokens of that moment
        self.stats = RolloutStats()
        self.comparison = PlainComparison(self.stats)

    @property
    def slowness_now(self) -> float:
        return 1.0 if self.slowness is None else self.slowness(self.seconds)

    def drafter(self, name: str) -> Drafter:
        """The machine's own, as its fields are now, or one of several."""
        own = Drafter(self.draft, self.alpha, prepare=self.requantize, build=self.build)
        return self.drafters[name] if self.drafters else own

    def measure(self, seconds: float) -> float:
        seconds *= self.slowness_now * max(0.5, self.random.gauss(1.0, self.noise))
        self.seconds += seconds
        return seconds * (10 if self.random.random() < self.outliers else 1)

    def round(self, rows: int, controller: Controller | None, choice: Choice) -> list[int]:
        """One round, reported to the controller; returns the tokens each row gained."""
        gamma, name = choice
        self.choices.append(gamma)
        self.used.append(name)
        plain_s = self.target(rows, 1) * self.slowness_now
        if gamma == 0:
            seconds = self.measure(self.target(rows, 1))
            self.plain_seconds += plain_s
            if controller is not None:
                controller.observe_plain(rows, seconds)
                self.comparison.add_plain_round(seconds, controller.usual_plain_seconds(rows))
                self.stats.add_plain_round(rows, seconds)
            return [1] * rows
        drafter = self.drafter(name)
        draft_s, verify_s = self.measure(drafter.draft_s(rows, gamma)), self.measure(self.target(rows, gamma + 1))
        counts = [self._accepted(drafter, rows, gamma) for _ in range(rows)]
        accepted = [sum(n > i for n in counts) for i in range(gamma)]
        examined, tokens = [rows, *accepted[:-1]], 1 + sum(counts) / rows
        self.plain_seconds += plain_s * tokens
        if controller is not None:
            usual_s = controller.usual_plain_seconds(rows)
            controller.observe_speculative(rows, choice, draft_s, verify_s, accepted, examined)
            self.comparison.add_speculative_round(draft_s + verify_s, tokens, usual_s)
            self.stats.add_speculative_round(name, rows, gamma, draft_s, verify_s, accepted, examined)
        return [n + 1 for n in counts]

    def _prepare(self, name: str, controller: Controller) -> None:
        """Before a drafter's first draft of a rollout."""
        drafter = self.drafter(name)
        building = name not in self.prepared
        seconds = drafter.prepare + drafter.build * building
        self.prepared[name] = self.prepared.get(name, 0) + 1
        self.seconds += seconds
        self.stats.requantize_s += seconds
        self.stats.refresh_s += seconds
        controller.observe_preparing(name, seconds, typical=not building)

    def _accepted(self, drafter: Drafter, rows: int, gamma: int) -> int:
        return next((i for i in range(gamma) if self.random.random() >= drafter.alpha(rows, i)), gamma)

    def rounds(self, rows: int, controller: Controller, count: int) -> list[int]:
        """So many rounds of constant size; returns their draft lengths."""
        start = len(self.choices)
        for _ in range(count):
            self.round(rows, controller, controller.choose(rows))
        return self.choices[start:]

    def rollout(self, lengths: Sequence[int], choose: Chooser, controller: Controller | None = None) -> float:
        """Until every row has its length; returns the seconds it took."""
        start, left, current = self.seconds, list(lengths), self._need_nothing()
        requantize_s = self.stats.requantize_s
        if controller is not None:
            controller.begin_rollout(current, self.context)
        while left:
            choice = choose(len(left))
            if choice.gamma and controller is not None and choice.drafter not in current:
                self._prepare(choice.drafter, controller)
                current.add(choice.drafter)
            gained = self.round(len(left), controller, choice)
            left = [need - got for need, got in zip(left, gained, strict=True) if need > got]
        if controller is not None:
            self.comparison.end()
        self.stats.rollout_s += self.seconds - start - (self.stats.requantize_s - requantize_s)
        return self.seconds - start

    def _need_nothing(self) -> set[str]:
        drafters = self.drafters or {"quantized": self.drafter("quantized")}
        return {name for name, drafter in drafters.items() if not drafter.prepare}

    def best(self, rows: int) -> Choice:
        """The choice of highest expected rate, preparing aside, by someone who knows this machine."""

        def rate(choice: Choice) -> float:
            drafter = self.drafter(choice.drafter or next(iter(names)))
            survivals = (math.prod(drafter.alpha(rows, i) for i in range(k)) for k in range(choice.gamma + 1))
            draft_s = drafter.draft_s(rows, choice.gamma) if choice.gamma else 0.0
            return sum(survivals) / (draft_s + self.target(rows, choice.gamma + 1))

        names = self.drafters or {"quantized": None}
        return max([PLAIN, *(Choice(gamma, name) for name in names for gamma in range(1, 9))], key=rate)


def gpu(rows: int, tokens: int) -> float:
    """Milliseconds: reading weights and keys, or else computing."""
    return max(10 + 0.02 * rows, 0.06 * rows * tokens) + 0.005 * rows * tokens


def share_of_gpu(share: float) -> Callable[[int], float]:
    return lambda rows: 10 * share + 0.02 * rows


def constant(alpha: float) -> Callable[[int, int], float]:
    return lambda rows, position: alpha


def other_kernel(rows: int, tokens: int) -> float:
    """A forward of several tokens per row takes another, slower path: no slope in n shows it."""
    return gpu(rows, tokens) * (1.3 if tokens > 1 else 1.0)


WINNING = {
    "memory-bound": (gpu, share_of_gpu(0.3), constant(0.93), 16),
    "memory-bound, one row": (gpu, share_of_gpu(0.3), constant(0.93), 1),
    "acceptance falls with the position": (gpu, share_of_gpu(0.3), lambda rows, i: 0.92 - 0.04 * i, 16),
    "compute-bound until few rows are left": (gpu, share_of_gpu(0.3), constant(0.93), 256),
    "linear cost, cheap draft": (lambda b, t: 3.0 + b * t, lambda b: 1 + 0.2 * b, constant(0.9), 4),
    "dear draft": (gpu, share_of_gpu(0.7), constant(0.9), 16),
    "costs jump beyond one token": (other_kernel, share_of_gpu(0.4), constant(0.93), 16),
    "almost everything is accepted": (gpu, share_of_gpu(0.25), constant(0.99), 4),
}
LOSING = {
    "draft as dear as plain": (gpu, share_of_gpu(1.0), constant(0.95), 16),
    "draft five times as dear": (gpu, share_of_gpu(5.0), constant(0.98), 16),
    "compute-bound": (lambda b, t: 2.0 + b * t, lambda b: 1.5 + 0.9 * b, constant(0.95), 32),
    "linear cost on a CPU": (lambda b, t: 0.5 + b * t, lambda b: 0.2 + 0.4 * b, constant(0.95), 16),
    "hardly anything is accepted": (gpu, share_of_gpu(0.4), constant(0.3), 16),
}


def lengths(rows: int, seed: int, mean: int = 400) -> list[int]:
    generator = random.Random(seed)
    return [max(8, int(generator.lognormvariate(0, 0.6) * mean)) for _ in range(rows)]


def always(gamma: int) -> Chooser:
    return lambda rows: Choice(gamma, "quantized") if gamma else PLAIN


def seconds_over_rollouts(regime: tuple, controller: Controller, seeds: Sequence[int]) -> float:
    *functions, rows = regime
    return sum(Machine(*functions, seed=s).rollout(lengths(rows, s), controller.choose, controller) for s in seeds)


def seconds_of(regime: tuple, choose: Chooser | None, seeds: Sequence[int]) -> float:
    """Of a fixed rule; None: of the best draft length at each batch size."""
    *functions, rows = regime
    machines = [Machine(*functions, seed=s) for s in seeds]
    return sum(m.rollout(lengths(rows, s), choose or m.best) for m, s in zip(machines, seeds, strict=True))


def cpu(rows: int, tokens: int) -> float:
    """Milliseconds of a policy of 135M parameters: 35 for 16 rows, 61 for 32 tokens."""
    return 9 + 1.625 * rows * tokens


SHORT_ROLLOUTS = (cpu, lambda rows: 0.6 * cpu(rows, 1), constant(0.72), 16)  # SmolLM2's, at 16 rows
PAYING_ROLLOUTS = (gpu, share_of_gpu(0.3), constant(0.8), 16)  # about 1.5 times as fast


def short_lengths(seed: int, rows: int = 16, longest: int = 96) -> list[int]:
    return [min(longest, length) for length in lengths(rows, seed, mean=80)]


def drifting(by: float = 3.0, period: float = 30e3) -> Callable[[float], float]:
    """Slows down to `by` times the seconds and recovers, over and over."""
    return lambda seconds: by ** (0.5 - 0.5 * math.cos(2 * math.pi * seconds / period))
