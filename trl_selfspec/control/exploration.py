"""The budget of exploring: the seconds that trials, preparing drafters and first uses of kernels may lose.

It is one for all drafters and rollouts. A trial round is charged for the seconds it takes beyond those of the best
known choice for its tokens. Preparing a drafter is a debt that its rounds pay off within the rollout, as far as they
are faster than what could be done without it; the rest is charged at the end.
"""

from collections import deque
from collections.abc import Collection, Iterable
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


class DrafterAccount:
    """What preparing one drafter costs, and whether that was won back. All values are seconds."""

    def __init__(self) -> None:
        self.expected_s = 0.0  # of preparing: an estimate, until it was measured
        self.prepare_s: deque[float] = deque(maxlen=3)
        self.failures = 0  # rollouts in a row in which preparing did not pay
        self._balance_s = 0.0  # won and lost by preparing since the last failure, at most its price
        self.begin_rollout(is_ready=False)

    def begin_rollout(self, is_ready: bool) -> None:
        self.is_ready = is_ready  # a draft needs no preparing first
        self.debt_s = 0.0  # preparing and first uses, less what its rounds have won since
        self.spent_s = 0.0  # on preparing in this rollout
        self.expected_to_pay = False  # within the rollout, so that the budget did not have to cover it

    @property
    def price_s(self) -> float:
        """The extra seconds of a first draft: a current drafter. 0 where there is one."""
        if self.is_ready or self.spent_s:
            return 0.0
        return median_low(self.prepare_s) if self.prepare_s else self.expected_s

    @property
    def owed_s(self) -> float:
        return max(self.debt_s, 0.0)

    def add_preparing(self, seconds: float, typical: bool) -> None:
        if typical:
            self.prepare_s.append(seconds)
        self.spent_s += seconds
        self.debt_s += seconds

    def close(self) -> None:
        """Draws the balance of a rollout. After losses, the next preparing has to wait twice as long."""
        if not (self.spent_s and self.prepare_s):  # the first drafter had to be built, and began late
            return
        price_s = median_low(self.prepare_s)
        won_s = (0.0 if self.expected_to_pay else self.spent_s) - self.debt_s
        self._balance_s = min(self._balance_s + won_s, price_s)
        if self._balance_s < -price_s or (won_s <= 0 and not self.expected_to_pay):
            self.failures, self._balance_s = min(self.failures + 1, MAX_FAILURES), 0.0
        elif won_s > 0:
            self.failures = 0


class ExplorationBudget:
    """Accounts of one engine over its rollouts, by drafter where preparing is concerned. All values are seconds."""

    def __init__(self, drafters: Iterable[str]) -> None:
        self.accounts = {name: DrafterAccount() for name in drafters}
        self.clock_s = 0.0  # of all rollouts
        self.lost_s = 0.0  # charged, of all rollouts
        self._rollouts_plain_s: deque[float] = deque(maxlen=ROLLOUTS)
        self._rollout_plain_s = 0.0  # of plain rounds for the tokens of this rollout, estimated
        self._rollout_s = self._trials_s = 0.0  # seconds of this rollout, and those charged for its trials

    def begin_rollout(self, ready: Collection[str]) -> None:
        self.lost_s = self._owed_s
        for name, account in self.accounts.items():
            account.close()
            account.begin_rollout(name in ready)
        if self._rollout_plain_s:
            self._rollouts_plain_s.append(self._rollout_plain_s)
        self._rollout_s = self._rollout_plain_s = self._trials_s = 0.0

    def advance(self, seconds: float, plain_s: float) -> None:
        """Counts a round and the seconds that plain rounds take for its tokens."""
        self.clock_s += seconds
        self._rollout_s += seconds
        self._rollout_plain_s += plain_s

    def charge_trial(self, seconds: float) -> None:
        self._trials_s += max(seconds, 0.0)
        self.lost_s += max(seconds, 0.0)

    def add_preparing(self, drafter: str, seconds: float, typical: bool) -> None:
        """Counts the preparing before a drafter's first draft of a rollout; `typical` if later ones take as long."""
        account = self.accounts[drafter]
        if not account.is_ready:
            self.clock_s += seconds
            account.add_preparing(seconds, typical)

    def expect_to_pay(self, drafter: str) -> None:
        """Notes that the rest of the rollout should pay for the preparing that comes next."""
        account = self.accounts[drafter]
        account.expected_to_pay |= account.price_s > 0

    def price_s(self, drafter: str) -> float:
        """The seconds of preparing that a draft needs first; 0 for a plain round."""
        return self.accounts[drafter].price_s if drafter else 0.0

    @property
    def rest_plain_s(self) -> float:
        """Plain rounds for the rest of the rollout. One that takes longer than usual may take longer still."""
        past_s = self._rollout_plain_s - self._usual_rollout_s
        return max(-past_s, past_s / 2)

    @property
    def _usual_rollout_s(self) -> float:
        """In plain rounds; 0 before the first rollout."""
        return sum(self._rollouts_plain_s) / max(len(self._rollouts_plain_s), 1)

    def pays(self, drafter: str, saving: float, plain_s: float) -> bool:
        """Whether the rest of the rollout makes up for preparing, with a margin.

        After a rollout in which it did not pay, the budget has to cover it too.

        Args:
            saving: seconds saved per second of plain rounds for the same tokens.
            plain_s: of a plain round.
        """
        account = self.accounts[drafter]
        if account.price_s == 0:
            return True
        pays = self.rest_plain_s * saving > PAYBACK * account.price_s
        return pays and (not account.failures or self.affords(drafter, 0.0, plain_s))

    def may_bet(self, drafter: str, saving: float, plain_s: float) -> bool:
        """The same for a saving that nothing was measured of.

        While another drafter's preparing has not paid, the budget has to cover this one: a policy or machine that is
        bad for one is often bad for all.
        """
        others = (account for name, account in self.accounts.items() if name != drafter)
        is_sole = not any(account.failures or (account.spent_s and account.owed_s) for account in others)
        return self.pays(drafter, saving, plain_s) and (is_sole or self.affords(drafter, 0.0, plain_s))

    def affords(self, drafter: str, loss_s: float, plain_s: float) -> bool:
        """Whether the budget covers a trial, and the preparing that it needs with some rounds to make use of it."""
        account = self.accounts[drafter]
        if account.spent_s:
            prepared = sum(account.spent_s > 0 for account in self.accounts.values())
            return self._trials_s + loss_s <= prepared * TRIAL_PLAIN_ROUNDS * plain_s + BUDGET * self._rollout_s
        price_s = account.price_s
        if price_s:
            if self._rollout_plain_s > self._usual_rollout_s / 2:
                return False  # the rest is too short, and its rows too few, to learn much
            price_s *= 2**account.failures if account.prepare_s else FIRST_ENTRY
            price_s += TRIAL_PLAIN_ROUNDS * plain_s
        return self._owed_s + max(loss_s, 0.0) + price_s <= BUDGET * self.clock_s

    @property
    def _owed_s(self) -> float:
        return self.lost_s + sum(account.owed_s for account in self.accounts.values())

    def state(self) -> dict[str, Any]:
        current = [self._rollout_plain_s] if self._rollout_plain_s else []
        return {
            "clock_s": self.clock_s,
            "wasted_s": self._owed_s,
            "rollouts_s": [*self._rollouts_plain_s, *current],
        }

    def drafter_state(self, drafter: str) -> dict[str, Any]:
        account = self.accounts[drafter]
        return {"failures": account.failures, "prepare_s": list(account.prepare_s)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "ExplorationBudget":
        budget = cls(state["drafters"])
        budget.clock_s = positive(state["clock_s"], or_zero=True)
        budget.lost_s = positive(state["wasted_s"], or_zero=True)
        budget._rollouts_plain_s.extend(positive(seconds) for seconds in state["rollouts_s"])
        for name, account in budget.accounts.items():
            saved = state["drafters"][name]
            account.failures = min(int(positive(saved["failures"], or_zero=True)), MAX_FAILURES)
            account.prepare_s.extend(positive(seconds, or_zero=True) for seconds in saved["prepare_s"])
        return budget
