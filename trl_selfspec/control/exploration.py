"""The budget of exploring: the seconds that trials, requantizing and first uses of kernels may lose in all rollouts.

A trial round is charged for the seconds it takes beyond those of the best known choice for its tokens. Requantizing is
a debt that speculation pays off within the rollout; the rest of it is charged at the end.
"""

from collections import deque
from statistics import median_low
from typing import Any

from trl_selfspec.control.constants import (
    BUDGET,
    FIRST_ENTRY,
    MAX_FAILURES,
    PAYBACK,
    ROLLOUTS,
    TRIAL_PLAIN_ROUNDS,
)
from trl_selfspec.control.saved_state import positive


class ExplorationBudget:
    """Accounts of one engine over its rollouts. All values are seconds."""

    def __init__(self) -> None:
        self.clock_s = 0.0  # of all rollouts
        self.lost_s = 0.0  # charged, of all rollouts
        self.expected_requantize_s = 0.0  # an estimate, until it was measured
        self._requantize_s: deque[float] = deque(maxlen=3)
        self._failures = 0  # rollouts in a row in which requantizing did not pay
        self._balance_s = 0.0  # won and lost by requantizing since the last failure, at most its price
        self._rollouts_plain_s: deque[float] = deque(maxlen=ROLLOUTS)
        self._rollout_plain_s = 0.0  # of plain rounds for the tokens of this rollout, estimated
        self._begin(drafter_is_current=False)

    def begin_rollout(self, drafter_is_current: bool) -> None:
        self._close_account()
        if self._rollout_plain_s:
            self._rollouts_plain_s.append(self._rollout_plain_s)
        self._begin(drafter_is_current)

    def _begin(self, drafter_is_current: bool) -> None:
        self.is_ready = drafter_is_current  # a draft needs no requantizing first
        self._rollout_s = self._rollout_plain_s = 0.0
        self._trials_s = 0.0  # charged for trials in this rollout
        self._debt_s = 0.0  # requantizing and first uses, less what speculation has won since
        self._requantized_s = 0.0  # spent on requantizing in this rollout
        self._expected_to_pay = False  # within the rollout, so that the budget did not have to cover it

    def _close_account(self) -> None:
        """Charges the rest of the debt. After losses, the next drafter has to wait twice as long."""
        self.lost_s += max(self._debt_s, 0.0)
        if not (self._requantized_s and self._requantize_s):  # the first drafter had to be built, and began late
            return
        price_s = median_low(self._requantize_s)
        won_s = (0.0 if self._expected_to_pay else self._requantized_s) - self._debt_s
        self._balance_s = min(self._balance_s + won_s, price_s)
        if self._balance_s < -price_s or (won_s <= 0 and not self._expected_to_pay):
            self._failures, self._balance_s = min(self._failures + 1, MAX_FAILURES), 0.0
        elif won_s > 0:
            self._failures = 0

    def advance(self, seconds: float, plain_s: float) -> None:
        """Counts a round and the seconds that plain rounds take for its tokens."""
        self.clock_s += seconds
        self._rollout_s += seconds
        self._rollout_plain_s += plain_s

    def charge_trial(self, seconds: float) -> None:
        self._trials_s += max(seconds, 0.0)
        self.lost_s += max(seconds, 0.0)

    def add_debt(self, seconds: float) -> None:
        """A loss, or, if negative, a gain that pays debts off."""
        self._debt_s += seconds

    def add_requantizing(self, seconds: float, typical: bool) -> None:
        """Counts the requantizing before the first draft of a rollout; `typical` if later ones will take as long."""
        if self.is_ready:
            return
        if typical:
            self._requantize_s.append(seconds)
        self.clock_s += seconds
        self._requantized_s += seconds
        self.add_debt(seconds)

    def expect_to_pay(self) -> None:
        """Notes that the rest of the rollout should pay for the requantizing that comes next."""
        self._expected_to_pay |= self.requantize_price_s > 0

    @property
    def requantize_price_s(self) -> float:
        """The extra seconds of a first draft: a current drafter. 0 where there is one."""
        if self.is_ready or self._requantized_s:
            return 0.0
        return median_low(self._requantize_s) if self._requantize_s else self.expected_requantize_s

    @property
    def _usual_rollout_s(self) -> float:
        """In plain rounds; 0 before the first rollout."""
        return sum(self._rollouts_plain_s) / max(len(self._rollouts_plain_s), 1)

    def pays_requantizing(self, share: float, plain_s: float) -> bool:
        """Whether the rest of the rollout, shortened to this share, makes up for requantizing, with a margin.

        After a rollout in which it did not pay, the budget has to cover it too.
        """
        price_s = self.requantize_price_s
        if price_s == 0:
            return True
        past_s = self._rollout_plain_s - self._usual_rollout_s
        rest_s = max(-past_s, past_s / 2)  # a rollout that takes longer than usual may take longer still
        pays = rest_s * (1 - share) > PAYBACK * price_s
        return pays and (not self._failures or self.affords(0.0, plain_s))

    def affords(self, loss_s: float, plain_s: float) -> bool:
        """Whether the budget covers a trial, and the requantizing that it needs with some rounds to make use of it."""
        if self._requantized_s:
            return self._trials_s + loss_s <= TRIAL_PLAIN_ROUNDS * plain_s + BUDGET * self._rollout_s
        price_s = self.requantize_price_s
        if price_s:
            if self._rollout_plain_s > self._usual_rollout_s / 2:
                return False  # the rest is too short, and its rows too few, to learn much
            price_s *= 2**self._failures if self._requantize_s else FIRST_ENTRY
            price_s += TRIAL_PLAIN_ROUNDS * plain_s
        return self._owed_s + max(loss_s, 0.0) + price_s <= BUDGET * self.clock_s

    @property
    def _owed_s(self) -> float:
        return self.lost_s + max(self._debt_s, 0.0)

    def state(self) -> dict[str, Any]:
        current = [self._rollout_plain_s] if self._rollout_plain_s else []
        return {
            "clock_s": self.clock_s,
            "wasted_s": self._owed_s,
            "failures": self._failures,
            "rollouts_s": [*self._rollouts_plain_s, *current],
            "requantize_s": list(self._requantize_s),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "ExplorationBudget":
        budget = cls()
        budget.clock_s = positive(state["clock_s"], or_zero=True)
        budget.lost_s = positive(state["wasted_s"], or_zero=True)
        budget._failures = min(int(positive(state["failures"], or_zero=True)), MAX_FAILURES)
        budget._rollouts_plain_s.extend(positive(seconds) for seconds in state["rollouts_s"])
        budget._requantize_s.extend(positive(seconds, or_zero=True) for seconds in state["requantize_s"])
        return budget
