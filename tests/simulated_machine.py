"""A machine with known costs and acceptance, and the regimes in which the controller has to find its way."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trl_selfspec.control.controller import Controller
from trl_selfspec.control.stats import PlainComparison, RolloutStats


Chooser = Callable[[int], int]


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
    choices: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.plain_seconds = 0.0  # what plain rounds would have taken at each moment for the tokens of that moment
        self.stats = RolloutStats()
        self.comparison = PlainComparison(self.stats)

    @property
    def slowness_now(self) -> float:
        return 1.0 if self.slowness is None else self.slowness(self.seconds)

    def measure(self, seconds: float) -> float:
        seconds *= self.slowness_now * max(0.5, self.random.gauss(1.0, self.noise))
        self.seconds += seconds
        return seconds * (10 if self.random.random() < self.outliers else 1)

    def round(self, rows: int, controller: Controller | None, gamma: int) -> list[int]:
        """One round, reported to the controller; returns the tokens each row gained."""
        self.choices.append(gamma)
        plain_s = self.target(rows, 1) * self.slowness_now
        if gamma == 0:
            seconds = self.measure(self.target(rows, 1))
            self.plain_seconds += plain_s
            if controller is not None:
                controller.observe_plain(rows, seconds)
                self.comparison.add_plain_round(seconds, controller.usual_plain_seconds(rows))
                self.stats.add_plain_round(rows, seconds)
            return [1] * rows
        draft_s, verify_s = self.measure(gamma * self.draft(rows)), self.measure(self.target(rows, gamma + 1))
        counts = [self._accepted(rows, gamma) for _ in range(rows)]
        accepted = [sum(n > i for n in counts) for i in range(gamma)]
        examined, tokens = [rows, *accepted[:-1]], 1 + sum(counts) / rows
        self.plain_seconds += plain_s * tokens
        if controller is not None:
            usual_s = controller.usual_plain_seconds(rows)
            controller.observe_speculative(rows, gamma, draft_s, verify_s, accepted, examined)
            self.comparison.add_speculative_round(draft_s + verify_s, tokens, usual_s)
            self.stats.add_speculative_round(rows, gamma, draft_s, verify_s, accepted, examined)
        return [n + 1 for n in counts]

    def _prepare_drafter(self, controller: Controller) -> None:
        """Before the first draft of a rollout."""
        building = not any(self.choices)
        seconds = self.requantize + self.build * building
        self.seconds += seconds
        self.stats.requantize_s += seconds
        self.stats.refresh_s += seconds
        controller.observe_requantize(seconds, typical=not building)

    def _accepted(self, rows: int, gamma: int) -> int:
        return next((i for i in range(gamma) if self.random.random() >= self.alpha(rows, i)), gamma)

    def rounds(self, rows: int, controller: Controller, count: int) -> list[int]:
        """So many rounds of constant size; returns their draft lengths."""
        start = len(self.choices)
        for _ in range(count):
            self.round(rows, controller, controller.choose(rows))
        return self.choices[start:]

    def rollout(self, lengths: Sequence[int], choose: Chooser, controller: Controller | None = None) -> float:
        """Until every row has its length; returns the seconds it took."""
        start, left, drafted = self.seconds, list(lengths), False
        requantize_s = self.stats.requantize_s
        if controller is not None:
            controller.begin_rollout()
        while left:
            gamma = choose(len(left))
            if gamma and not drafted and controller is not None and self.requantize:
                self._prepare_drafter(controller)
            drafted |= gamma > 0
            gained = self.round(len(left), controller, gamma)
            left = [need - got for need, got in zip(left, gained, strict=True) if need > got]
        if controller is not None:
            self.comparison.end()
        self.stats.rollout_s += self.seconds - start - (self.stats.requantize_s - requantize_s)
        return self.seconds - start

    def best(self, rows: int) -> int:
        """The draft length of highest expected rate, by someone who knows this machine."""

        def rate(gamma: int) -> float:
            survivals = (math.prod(self.alpha(rows, i) for i in range(k)) for k in range(gamma + 1))
            return sum(survivals) / (gamma * self.draft(rows) + self.target(rows, gamma + 1))

        return max(range(9), key=rate)


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
    return lambda rows: gamma


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
