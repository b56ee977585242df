"""Tokens per second of what a round may be: plain, or drafts of one length by one drafter."""

from collections.abc import Sequence
from typing import NamedTuple

from trl_selfspec.control.constants import PRIOR_FLAT_ROWS
from trl_selfspec.control.cost_model import RoundCosts, VerifyCost
from trl_selfspec.control.drafters import DrafterEstimates


class Choice(NamedTuple):
    """How to run a round."""

    gamma: int  # 0: a plain round
    drafter: str = ""  # "" for a plain round


PLAIN = Choice(0)


class Option(NamedTuple):
    """A choice and its expected tokens per row and second."""

    choice: Choice
    rate: float
    ceiling: float  # the highest rate that costs of other sizes leave possible; the rate itself where known
    known: bool
    seconds: float

    def loss_s(self, incumbent: "Option") -> float:
        """Seconds of a round beyond those of the incumbent for the same tokens."""
        return self.seconds * (1 - self.rate / incumbent.rate)


class Rates:
    """Expected rates, from the costs of rounds and what is known of a drafter.

    Args:
        costs: of plain rounds and verifications.
        draft_lengths: those on offer, in ascending order.
    """

    def __init__(self, costs: RoundCosts, draft_lengths: Sequence[int]) -> None:
        self.costs, self._draft_lengths = costs, draft_lengths

    def plain(self, rows: int) -> Option | None:
        """A plain round; None before there is a measurement."""
        seconds = self.costs.plain_s(rows)
        return None if seconds is None else Option(PLAIN, 1 / seconds, 1 / seconds, True, seconds)

    def verifications(self, rows: int) -> list[VerifyCost]:
        return self.costs.verifications(rows, self._draft_lengths)

    def options(self, drafter: DrafterEstimates, rows: int, verifications: list[VerifyCost]) -> list[Option]:
        """Each draft length of a drafter; none before its drafts and a verification were measured."""
        step_s = drafter.cost.at(rows)
        if step_s is None:
            return []
        options, near, least_step_s = [], drafter.cost.covers(rows), drafter.cost.floor(rows)
        for gamma, verify_s, least_verify_s, verify_known in verifications:
            steps, tokens, known = drafter.steps(gamma), drafter.expected[gamma], near and verify_known
            seconds = self.costs.pace * (steps * step_s + verify_s)
            least_s = seconds if known else self.costs.pace * (steps * least_step_s + least_verify_s)
            choice = Choice(gamma, drafter.traits.name)
            options.append(Option(choice, tokens / seconds, tokens / least_s, known, seconds))
        return options

    def gain(self, drafter: DrafterEstimates, rows: int) -> float | None:
        """The best known rate of a drafter over that of plain rounds."""
        plain, options = self.plain(rows), self.options(drafter, rows, self.verifications(rows))
        return None if plain is None else max((o.rate / plain.rate for o in options if o.known), default=None)

    def promise(self, drafter: DrafterEstimates, rows: int, at_best: bool = False) -> float:
        """The gain over plain rounds that a drafter should have at a batch size at which it was not measured.

        A draft is taken to cost the share of a plain round that it does at other batch sizes, and a verification as
        much as a plain round with as many tokens, where neither was measured.

        Args:
            at_best: every draft is accepted, and a verification without a measurement costs a plain round.
        """
        curve, share = self.costs.plain, drafter.traits.prior_cost
        usual_s = curve.at(rows)
        assert usual_s is not None, "plain rounds were measured"
        if drafter.cost.largest:
            other, step_s = drafter.cost.nearest(rows)
            share = step_s / (curve.at(other) or step_s)
        measured = self.verifications(rows) if self.costs.has_verified(rows) else []
        gain = 1.0
        for i, gamma in enumerate(self._draft_lengths):
            verify = 1.0 if rows <= PRIOR_FLAT_ROWS or at_best else gamma + 1.0
            if measured:
                verify = (measured[i].least_s if at_best else measured[i].seconds) / usual_s
            elif len(curve.sizes) > 1 and not at_best:
                verify = max(1.0, (curve.at(rows * (gamma + 1)) or 0.0) / usual_s)
            tokens = gamma + 1 if at_best else drafter.expected[gamma]
            gain = max(gain, tokens / (drafter.steps(gamma) * share + verify))
        return gain
