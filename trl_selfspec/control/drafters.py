"""What is known of one drafter: what drafting costs, and how many of its drafts are accepted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_selfspec.control.acceptance import Acceptance
from trl_selfspec.control.constants import FAST_DECAY, MAX_AGE, SLOW_DECAY, SURPRISE
from trl_selfspec.control.cost_model import CostCurve, bucket
from trl_selfspec.control.saved_state import checked
from trl_selfspec.options import MAX_DRAFT_LENGTH


@dataclass(frozen=True)
class DrafterTraits:
    """What the controller is told of a drafter."""

    name: str  # in the state, explanations and metrics
    per_round: bool = False  # a draft of any length costs the same; else its cost grows with the draft length
    prior_alpha: float = 0.8  # before there is evidence; 4-bit self-drafters reach 0.9 and more (arXiv 2606.18967)
    prior_cost: float = 0.3  # of a draft step (`per_round`: of the draft) in plain rounds, before the first one


class DrafterEstimates:
    """The price of a drafter's drafts and their acceptance, from the rounds observed so far.

    Acceptance is kept per context. The lasting counts of a context seed the recent ones of a rollout, which decide.
    """

    def __init__(self, traits: DrafterTraits) -> None:
        self.traits = traits
        self.cost = CostCurve()  # seconds of a draft step (`per_round`: of the draft) by rows, at pace 1
        self.losses = 0  # rollouts in a row in which it lost clearly to a drafter that may replace it
        self._lasting: dict[str, Acceptance] = {}  # by context
        self._measured_at_s: dict[tuple[str, int, int], float] = {}  # by context, row bucket and draft length
        self._rounds_since = 0  # rounds of other kinds since its last one
        self.begin_rollout("")

    def begin_rollout(self, context: str) -> None:
        self._context = context
        lasting = self._lasting.setdefault(context, Acceptance(SLOW_DECAY, self.traits.prior_alpha))
        self.recent = Acceptance(FAST_DECAY, lasting)
        self.recent.restart()
        self.expected = self.recent.tokens_per_round(MAX_DRAFT_LENGTH)  # by draft length
        self.has_drafted = False  # in this rollout
        self.surprised = False  # its last round was accepted far better than expected

    @property
    def num_examined(self) -> float:
        """Draft tokens that its lasting acceptance rests on."""
        return sum(sum(lasting.examined) for lasting in self._lasting.values())

    def steps(self, gamma: int) -> int:
        """How often a draft of this length costs `cost`."""
        return 1 if self.traits.per_round else gamma

    def add(self, rows: int, gamma: int, accepted: Sequence[int], examined: Sequence[int], now_s: float) -> None:
        """Counts what became of a round's drafts."""
        self.surprised = sum(accepted) > (self.recent.alpha + SURPRISE) * sum(examined)
        self.recent.add(accepted, examined, rounds=min(1 + self._rounds_since, MAX_AGE))
        self._lasting[self._context].add(accepted, examined)
        self.expected = self.recent.tokens_per_round(MAX_DRAFT_LENGTH)
        self._measured_at_s[self._context, bucket(rows), gamma] = now_s
        self._rounds_since, self.has_drafted = 0, True

    def pass_round(self) -> None:
        """Notes a round of another kind: what is known gets older."""
        self._rounds_since += 1

    def measured_at_s(self, rows: int, gamma: int) -> float:
        return self._measured_at_s.get((self._context, bucket(rows), gamma), 0.0)

    def state(self) -> dict[str, Any]:
        contexts = {context: a for context, a in self._lasting.items() if any(a.examined)}
        return {
            "draft": self.cost.state(),
            "accepted": {context: list(acceptance.accepted) for context, acceptance in contexts.items()},
            "examined": {context: list(acceptance.examined) for context, acceptance in contexts.items()},
        }

    @classmethod
    def from_state(cls, traits: DrafterTraits, state: Any) -> "DrafterEstimates":
        restored = cls(traits)
        restored.cost = CostCurve.from_state(state["draft"])
        accepted, examined = state["accepted"], state["examined"]
        checked(
            isinstance(accepted, dict) and isinstance(examined, dict) and accepted.keys() == examined.keys(), state
        )
        for context in accepted:
            lasting = Acceptance(SLOW_DECAY, traits.prior_alpha)
            lasting.restore(accepted[context], examined[context])
            restored._lasting[context] = lasting
        restored.begin_rollout("")
        return restored
