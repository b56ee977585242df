"""Chooses the drafter and the draft length of each round, from the measured costs and acceptance of earlier rounds.

It maximises E[tokens per row and round | γ] / (draft + verification) over the drafters and γ in 0..max; 0 is a plain
round. A draft is γ draft steps, or one pass of a matcher. `cost_model` and `drafters` have the seconds and
the acceptance, `rates` what follows from them. Whatever lacks a measurement is tried in real rounds, as far as the
budget of `exploration` allows. No clock is read here and no randomness used.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

from trl_selfspec.control.constants import (
    CHANGE_MARGIN,
    FEW_ROWS,
    FREE_PLAIN_ROUNDS,
    MIN_PLAIN_ROUNDS,
    PATIENT_PLAIN_ROUNDS,
    PLAIN_SHARE,
    PROBE_SHARE,
    REACH,
    TOGGLE_MARGIN,
)
from trl_selfspec.control.cost_model import RoundCosts
from trl_selfspec.control.drafters import DrafterEstimates, DrafterTraits
from trl_selfspec.control.exploration import DrafterAccount, ExplorationBudget
from trl_selfspec.control.rates import PLAIN, Choice, Option, Rates
from trl_selfspec.control.rivals import needless
from trl_selfspec.control.saved_state import checked, positive
from trl_selfspec.options import MAX_DRAFT_LENGTH


STATE_VERSION = 3


class Trial(NamedTuple):
    """A round that is run to measure it, and the option it replaces."""

    choice: Choice
    incumbent: Option


class Situation(NamedTuple):
    """What a decision is about."""

    rows: int
    plain: Option
    options: dict[str, list[Option]]  # by drafter; none where its drafts or verifications were not measured yet
    incumbent: Option  # the best known


class Controller:
    """Chooses drafter and γ for each round.

    Args:
        drafters: what there is to choose from; cheap ones first, since ties go to the first.
        num_speculative_tokens: an int offers γ and 0 only, `"auto"` all lengths up to `max_speculative_tokens`.
        max_active_sequences: hard bound on the rows that speculate. With an int `num_speculative_tokens`, counts alone
            decide: the first drafter drafts and no measurement changes a choice, so runs repeat.
    """

    def __init__(
        self,
        drafters: Sequence[DrafterTraits],
        num_speculative_tokens: int | Literal["auto"] = "auto",
        max_speculative_tokens: int = 8,
        max_active_sequences: int | None = None,
    ) -> None:
        fixed = None if num_speculative_tokens == "auto" else num_speculative_tokens
        shortest, longest = (1, max_speculative_tokens) if fixed is None else (fixed, fixed)
        if not 0 <= shortest <= longest <= MAX_DRAFT_LENGTH:
            raise ValueError(f"A draft length of {longest} is not supported: use 0 to {MAX_DRAFT_LENGTH}.")
        self._candidates = range(shortest, longest + 1)
        self._max_active_sequences = max_active_sequences
        self.counts_alone = fixed is not None and max_active_sequences is not None
        self.measures = not self.counts_alone and longest > 0
        self.given_up: dict[str, str] = {}  # reasons by drafter
        self._drafters = {traits.name: DrafterEstimates(traits) for traits in drafters}
        self._rates, self._budget = Rates(RoundCosts(), self._candidates), ExplorationBudget(self._drafters)
        self._plain_rounds = 0
        self._plain_at_s = 0.0
        self._rows = 0
        self.begin_rollout()

    def begin_rollout(self, ready: Collection[str] = (), contexts: Mapping[str, str] | None = None) -> None:
        """Keeps what was learned.

        Args:
            ready: drafters that need no preparing before their first draft.
            contexts: circumstances that a drafter's acceptance depends on, by drafter; it is learned apart for each.
        """
        in_use = [drafter for name, drafter in self._drafters.items() if name not in self.given_up]
        for name, reason in needless(in_use, self._rates.gain):
            self.give_up(name, reason)
        self._budget.begin_rollout(ready)
        for name, drafter in self._drafters.items():
            drafter.begin_rollout((contexts or {}).get(name, ""))
        self._choice = PLAIN
        self._gains: dict[str, float] = {}  # of drafters that are ready, over plain rounds, at the last decision
        self._under_way: deque[Trial | None] = deque()  # by round chosen and not yet observed
        self._disabled: dict[str, str] = {}

    def expect_preparing(self, drafter: str, seconds: float) -> None:
        """Sets the estimated seconds of preparing, which count until it was measured."""
        self._budget.accounts[drafter].expected_s = seconds

    def observe_preparing(self, drafter: str, seconds: float, typical: bool = True) -> None:
        """Counts the seconds of getting a current drafter, before its first round of a rollout.

        Args:
            typical: later rollouts will take as long; not so where the drafter was built first.
        """
        self._budget.add_preparing(drafter, seconds, typical)

    def give_up(self, drafter: str, reason: str) -> None:
        """Never chooses this drafter again."""
        self.given_up[drafter] = reason

    def disable(self, drafter: str, reason: str) -> None:
        """Does not choose this drafter until the next rollout."""
        self._disabled[drafter] = reason

    def choose(self, rows: int) -> Choice:
        """How to run the next round. Rounds are observed or passed over in the order of their choice."""
        self._rows, trial = rows, None
        if not self._usable(rows):
            self._choice = PLAIN
        elif self.counts_alone:
            self._choice = Choice(self._candidates[0], self._usable(rows)[0].traits.name)
        elif situation := self._situation(rows):
            incumbent = situation.incumbent
            if incumbent.choice.gamma and incumbent.choice.drafter != self._choice.drafter:
                self._budget.expect_to_pay(incumbent.choice.drafter)
            self._choice = incumbent.choice
            if not any(self._under_way):  # one trial at a time: the cost of the last one has to be known
                tried = self._worth_trying(situation)
                trial = None if tried in (None, incumbent.choice) else Trial(tried, incumbent)
        self._under_way.append(trial)
        return self._choice if trial is None else trial.choice

    def pass_over(self, rows: int = 0, choice: Choice = PLAIN, seconds: float = 0.0) -> Trial | None:
        """Drops the oldest round that was chosen and not yet observed; its seconds are no measurement.

        The seconds of a speculative one beyond a plain round are charged: kernels were loaded or captured.
        """
        if choice.gamma:
            account = self._budget.accounts[choice.drafter]
            account.debt_s += max(seconds - (self.plain_seconds(rows) or 0.0), 0.0)
        return self._under_way.popleft() if self._under_way else None

    def plain_seconds(self, rows: int) -> float | None:
        """Seconds of a plain round of `rows` rows now; None before there is a measurement."""
        return self._rates.costs.plain_s(rows)

    def usual_plain_seconds(self, rows: int) -> float | None:
        """The same at one pace, to compare rounds of different sizes however fast the machine is now."""
        return self._rates.costs.plain.at(rows)

    def observe_plain(self, rows: int, seconds: float) -> None:
        if trial := self.pass_over():
            capped_s = min(seconds, 2 * (self.plain_seconds(rows) or seconds))
            self._budget.charge_trial(capped_s - 1 / trial.incumbent.rate)
        self._rates.costs.add_plain(rows, seconds, self._budget.clock_s)
        self._plain_rounds += 1
        for drafter in self._drafters.values():
            drafter.pass_round()
        self._budget.advance(seconds, seconds)
        self._plain_at_s = self._budget.clock_s

    def observe_speculative(
        self,
        rows: int,
        choice: Choice,
        draft_s: float,
        verify_s: float,  # the target's forward and the verification of its logits
        accepted: Sequence[int],  # per position, over rows
        examined: Sequence[int],  # per position, over rows: those whose earlier positions were all accepted
    ) -> None:
        gamma, drafter, account = choice.gamma, self._drafters[choice.drafter], self._budget.accounts[choice.drafter]
        seconds, plain_s = draft_s + verify_s, self.plain_seconds(rows)
        plain_s = seconds if plain_s is None else plain_s * (1 + sum(accepted) / examined[0])  # for the same tokens
        self._rates.costs.add_speculative(rows, gamma, verify_s, drafter.cost, draft_s / drafter.steps(gamma))
        if trial := self.pass_over():
            self._charge_trial(rows, choice, seconds, trial)
        else:
            account.debt_s += self._own_share(choice.drafter) * (seconds - plain_s)
        account.is_ready = True
        self._budget.advance(seconds, plain_s)
        drafter.add(rows, gamma, accepted, examined, self._budget.clock_s)
        for other in self._drafters.values():
            if other is not drafter:
                other.pass_round()

    def _own_share(self, drafter: str) -> float:
        """The share of its gain over plain rounds that the other drafters which are ready would not have brought."""
        own_s = 1 / self._gains.get(drafter, 1.0)
        without_s = 1 / max((gain for name, gain in self._gains.items() if name != drafter), default=1.0)
        return max(without_s - own_s, 0.0) / (1 - own_s) if own_s < 1 else 1.0

    def _charge_trial(self, rows: int, choice: Choice, seconds: float, trial: Trial) -> None:
        """Charges at most 3 times the expected seconds: outliers hit plain rounds too."""
        drafter = self._drafters[choice.drafter]
        options = self._rates.options(drafter, rows, self._rates.verifications(rows))
        expected_s = next((option.seconds for option in options if option.choice == choice), None)
        plain_s = self.plain_seconds(rows) or seconds
        cap_s = (2 * choice.gamma + 1) * plain_s if expected_s is None else 3 * expected_s
        self._budget.charge_trial(min(seconds, cap_s) - drafter.expected[choice.gamma] / trial.incumbent.rate)

    def _usable(self, rows: int) -> list[DrafterEstimates]:
        """The drafters that may draft for so many rows."""
        if self._is_over(rows) or self._candidates[-1] == 0:
            return []
        drafters = list(self._drafters.values())[: 1 if self.counts_alone else None]
        return [d for d in drafters if d.traits.name not in self.given_up | self._disabled]

    def _is_over(self, rows: int) -> bool:
        return self._max_active_sequences is not None and rows > self._max_active_sequences

    def _situation(self, rows: int) -> Situation | None:
        """What there is to decide; None before plain rounds were measured."""
        plain = self._rates.plain(rows)
        if plain is None:
            return None
        verifications = self._rates.verifications(rows)
        options = {d.traits.name: self._rates.options(d, rows, verifications) for d in self._usable(rows)}
        self._gains = {
            name: max([1.0, *(option.rate / plain.rate for option in own if option.known)])
            for name, own in options.items()
            if not self._budget.price_s(name)
        }
        return Situation(rows, plain, options, self._best(plain, list(chain(*options.values()))))

    def _best(self, plain: Option, options: list[Option]) -> Option:
        """The known option of the highest rate, if it beats the current one by a margin and pays for preparing."""
        current = next((option for option in options if option.choice == self._choice), plain)
        rest_s = self._budget.rest_plain_s

        def seconds_per_token(option: Option) -> float:
            price_s = self._budget.price_s(option.choice.drafter)
            return 1 / option.rate + (price_s / (rest_s * plain.rate) if price_s else 0.0)

        paying = [
            option
            for option in options
            if option.known
            and (
                option.choice.drafter == current.choice.drafter
                or self._budget.pays(option.choice.drafter, self._saving(plain, current, option.rate), plain.seconds)
            )
        ]
        best = min([plain, *paying], key=seconds_per_token)
        margin = CHANGE_MARGIN if current.choice.gamma else TOGGLE_MARGIN
        return best if best.rate > margin * current.rate else current

    @staticmethod
    def _saving(plain: Option, incumbent: Option, rate: float) -> float:
        """Seconds that a higher rate saves, per second of plain rounds for the same tokens."""
        return plain.rate / incumbent.rate - plain.rate / rate

    def _worth_trying(self, situation: Situation) -> Choice | None:
        """What to measure instead of the incumbent, if it may be faster and the budget allows it."""
        rows, plain, incumbent = situation.rows, situation.plain, situation.incumbent
        if self._plain_rounds < (MIN_PLAIN_ROUNDS if rows <= FEW_ROWS else PATIENT_PLAIN_ROUNDS):
            return None
        if incumbent.choice.gamma and self._plain_is_due(situation):
            return PLAIN
        drafters = self._usable(rows)
        if bet := self._bet(drafters, situation):
            self._budget.expect_to_pay(bet)
            return Choice(self._candidates[0], bet)
        measured = {d.traits.name: d for d in drafters if situation.options[d.traits.name]}
        promising = {name: self._promising(drafter, situation) for name, drafter in measured.items()}
        for name, option in promising.items():
            if option and self._budget.affords(name, option.loss_s(incumbent), plain.seconds):
                return option.choice
        for drafter in drafters:
            if drafter.traits.name not in measured and self._may_begin(drafter, situation):
                return Choice(self._candidates[0], drafter.traits.name)
        for name, drafter in measured.items():
            option = None if promising[name] else self._due_again(drafter, situation)
            if option and self._budget.affords(name, option.loss_s(incumbent), plain.seconds):
                return option.choice
        return None

    def _bet(self, drafters: list[DrafterEstimates], situation: Situation) -> str | None:
        """The drafter that promises most where nothing was drafted at about this batch size, if preparing it pays."""
        rows, plain, incumbent = situation.rows, situation.plain, situation.incumbent
        best_rate, best = TOGGLE_MARGIN * incumbent.rate, None
        for drafter in drafters:
            name = drafter.traits.name
            if self._budget.price_s(name) and not drafter.cost.covers(rows):
                rate = plain.rate * self._rates.promise(drafter, rows)
                if rate > best_rate and self._budget.may_bet(
                    name, self._saving(plain, incumbent, rate), plain.seconds
                ):
                    best_rate, best = rate, name
        return best

    def _may_begin(self, drafter: DrafterEstimates, situation: Situation) -> bool:
        """Whether to try a drafter that was not measured yet: not where it would lose with every draft accepted."""
        rows, plain, name = situation.rows, situation.plain, drafter.traits.name
        at_best = plain.rate * self._rates.promise(drafter, rows, at_best=True)
        if at_best <= TOGGLE_MARGIN * situation.incumbent.rate:
            return False
        free = not self._budget.price_s(name) and self._budget.lost_s <= FREE_PLAIN_ROUNDS * plain.seconds
        return free or self._budget.affords(name, 0.0, plain.seconds)

    def _promising(self, drafter: DrafterEstimates, situation: Situation) -> Option | None:
        """An unknown option that may beat the incumbent and is not far longer than what was measured."""
        rows = situation.rows
        reach = REACH * max(self._rates.costs.verify_curve(rows).largest, rows)
        promising = [
            option
            for option in situation.options[drafter.traits.name]
            if not option.known
            and option.ceiling > TOGGLE_MARGIN * situation.incumbent.rate
            and (rows * (option.choice.gamma + 1) <= reach or len(self._candidates) == 1)
        ]
        if not drafter.cost.covers(rows):
            return promising[0] if promising else None
        return max(promising, key=lambda option: option.ceiling, default=None)

    def _plain_is_due(self, situation: Situation) -> bool:
        """Whether to run a plain round while speculating: their price must be recent, and its pace certain."""
        if not self._rates.costs.plain.has(situation.rows) or self._rates.costs.pace_is_odd:
            return True
        loss_s = self._least_loss_s(situation.plain, situation)
        return loss_s <= PLAIN_SHARE * (self._budget.clock_s - self._plain_at_s)

    def _due_again(self, drafter: DrafterEstimates, situation: Situation) -> Option | None:
        """A known option to measure again: the best of a drafter not in use, or lengths with few measurements.

        A round of it must lose little against the time since its last one, unless that one was accepted surprisingly
        well. Without such rounds a bad moment, or an acceptance of former rows, would rule it out for good.
        """
        rows, options = situation.rows, situation.options[drafter.traits.name]
        is_in_use = situation.incumbent.choice.drafter == drafter.traits.name
        if is_in_use:
            curve = self._rates.costs.verify_curve(rows)
            others = [o for o in options if o.known and not curve.is_settled(rows * (o.choice.gamma + 1))]
        else:
            others = [max(options, key=lambda option: option.rate)]

        def due(other: Option) -> bool:
            if drafter.surprised and not is_in_use:
                return True
            since_s = self._budget.clock_s - drafter.measured_at_s(rows, other.choice.gamma)
            return self._least_loss_s(other, situation) <= PROBE_SHARE * since_s

        return max((other for other in others if due(other)), key=lambda option: option.rate, default=None)

    @staticmethod
    def _least_loss_s(option: Option, situation: Situation) -> float:
        """The loss of a round of the option, at least a tenth of a plain round, so that it is not run all the time."""
        return max(option.loss_s(situation.incumbent), 0.1 * situation.plain.seconds)

    def explain(self) -> str:
        """Why the last choice was made, in one sentence."""
        rows, (gamma, name) = self._rows, self._choice
        where = f"at {_count(rows)}"
        if self._candidates[-1] == 0:
            return "off: num_speculative_tokens is 0"
        if not self._drafters.keys() - self.given_up.keys():
            return f"off for good: {_by_drafter(self.given_up)}"
        if not self._drafters.keys() - self.given_up.keys() - self._disabled.keys():
            return f"off for the rest of this rollout: {_by_drafter(self._disabled)}"
        if self._is_over(rows):
            return f"off {where}: max_active_sequences is {self._max_active_sequences}"
        if self.counts_alone:
            return f"on {where} with γ = {gamma} ({name}): max_active_sequences is {self._max_active_sequences}"
        situation = self._situation(rows)
        if situation is None or not any(situation.options.values()):
            return f"off {where}: {'drafting' if situation else 'a plain round'} has not been measured yet"
        return self._explain_by_costs(where, situation.plain, list(chain(*situation.options.values())))

    def _explain_by_costs(self, where: str, plain: Option, options: list[Option]) -> str:
        best = max(options, key=lambda option: option.rate)
        shown = next((option for option in options if option.choice == self._choice), best)
        gamma, name = shown.choice
        drafter, gain = self._drafters[name], shown.rate / plain.rate
        cost = (drafter.cost.at(self._rows) or 0.0) * self._rates.costs.pace / plain.seconds
        figures = (
            f"a draft{'' if drafter.traits.per_round else ' step'} costs {cost:.2f} and a verify "
            f"{shown.seconds / plain.seconds - drafter.steps(gamma) * cost:.2f} of a plain round, so at the measured "
            f"acceptance of {drafter.recent.alpha:.2f}"
        )
        if self._choice.gamma:
            return f"on {where} with γ = {gamma} ({name}): {figures} it gives {gain:.2f}x"
        if gain > TOGGLE_MARGIN:
            caveat = ", too little to pay for preparing the drafter" if shown.known else ", still to be measured"
        else:
            caveat = f", and a switch has to promise {TOGGLE_MARGIN:.2f}x" if gain > 1 else ""
        return f"off {where}: {figures} the best draft length of {name} ({gamma}) would give {gain:.2f}x{caveat}"

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as JSON-able values, without settings and the rollout in progress."""
        return {
            "version": STATE_VERSION,
            **self._rates.costs.state(),
            **self._budget.state(),
            "plain_rounds": self._plain_rounds,
            "drafters": {name: d.state() | self._budget.drafter_state(name) for name, d in self._drafters.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`; drafters that it lacks are learned anew.

        Raises:
            ValueError: it is of another version, or not such a state; nothing is changed then.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise ValueError(f"Not a controller state of version {STATE_VERSION}: start without it.")
        try:
            saved = checked(isinstance(state["drafters"], dict), state["drafters"]) and state["drafters"]
            costs, budget = RoundCosts.from_state(state), ExplorationBudget.from_state(state)
            plain_rounds = int(positive(state["plain_rounds"], or_zero=True))
            known = {name: self._drafters.get(name, DrafterEstimates(DrafterTraits(name))) for name in saved}
            restored = {name: DrafterEstimates.from_state(d.traits, saved[name]) for name, d in known.items()}
        except (KeyError, TypeError, ValueError) as error:  # a name or a list is missing, or a number is out of range
            raise ValueError(f"Not a controller state ({error!r}): start without it.") from error
        for name, drafter in self._drafters.items():
            self._drafters[name] = restored.get(name, DrafterEstimates(drafter.traits))
            account = budget.accounts.setdefault(name, DrafterAccount())
            account.expected_s = self._budget.accounts[name].expected_s
        budget.accounts = {name: budget.accounts[name] for name in self._drafters}
        self._rates, self._budget = Rates(costs, self._candidates), budget
        self._plain_rounds = plain_rounds
        self._plain_at_s = budget.clock_s
        self.begin_rollout()


def _count(rows: int) -> str:
    return f"{rows} row{'s' if rows != 1 else ''}"


def _by_drafter(reasons: dict[str, str]) -> str:
    """The reasons; with several, each with its drafter."""
    return "; ".join(f"{name}: {why}" if len(reasons) > 1 else why for name, why in reasons.items())
