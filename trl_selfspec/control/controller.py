"""Chooses the draft length of each round, from the measured costs and acceptance of earlier rounds.

It maximises E[tokens per row and round | γ] / (γ · draft step + verification) over γ in 0..max; 0 is a plain round.
`cost_model` has the seconds, `acceptance` the tokens. Sizes without a measurement are tried in real rounds, as far as
the budget of `exploration` allows. No clock is read here and no randomness used.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from trl_selfspec.control.acceptance import Acceptance
from trl_selfspec.control.constants import (
    CHANGE_MARGIN,
    FAST_DECAY,
    FEW_ROWS,
    FREE_PLAIN_ROUNDS,
    MAX_AGE,
    MIN_PLAIN_ROUNDS,
    PATIENT_PLAIN_ROUNDS,
    PLAIN_SHARE,
    PRIOR_DRAFT,
    PRIOR_FLAT_ROWS,
    PROBE_SHARE,
    REACH,
    SLOW_DECAY,
    TOGGLE_MARGIN,
)
from trl_selfspec.control.cost_model import RoundCosts, bucket
from trl_selfspec.control.exploration import ExplorationBudget
from trl_selfspec.control.saved_state import positive
from trl_selfspec.options import MAX_DRAFT_LENGTH


STATE_VERSION = 2


class Option(NamedTuple):
    """A draft length and its expected tokens per row and second."""

    gamma: int
    rate: float
    ceiling: float  # the highest rate that costs of other sizes leave possible; the rate itself where known
    known: bool
    seconds: float

    def loss_s(self, incumbent: "Option") -> float:
        """Seconds of a round beyond those of the incumbent for the same tokens."""
        return self.seconds * (1 - self.rate / incumbent.rate)


class Trial(NamedTuple):
    """A round that is run to measure it, and the option it replaces."""

    gamma: int
    incumbent: Option


class Controller:
    """Chooses γ for each round.

    Args:
        num_speculative_tokens: an int offers γ and 0 only, `"auto"` all lengths up to `max_speculative_tokens`.
        max_active_sequences: hard bound on the rows that speculate. With an int `num_speculative_tokens`, counts alone
            decide: no measurement changes a choice, so runs repeat.
    """

    def __init__(
        self,
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
        self._gave_up: str | None = None
        self._costs, self._budget = RoundCosts(), ExplorationBudget()
        self._restore_acceptance(Acceptance(SLOW_DECAY))
        self._plain_rounds = self._plain_since_draft = 0
        self._plain_at_s = 0.0
        self._measured_at_s: dict[tuple[int, int], float] = {}  # by row bucket and draft length
        self._rows = 0
        self.begin_rollout()

    def _restore_acceptance(self, lasting: Acceptance) -> None:
        self._lasting, self._recent = lasting, Acceptance(FAST_DECAY, prior=lasting)

    def begin_rollout(self, drafter_is_current: bool = False) -> None:
        """Keeps what was learned. A current drafter needs no requantizing before its first draft."""
        self._budget.begin_rollout(drafter_is_current)
        self._gamma = 0
        self._under_way: deque[Trial | None] = deque()  # by round chosen and not yet observed
        self._disabled: str | None = None
        self._recent.restart()
        self._expected = self._recent.tokens_per_round(MAX_DRAFT_LENGTH)

    def expect_requantizing(self, seconds: float) -> None:
        """Sets the estimated seconds of requantizing, which count until it was measured."""
        self._budget.expected_requantize_s = seconds

    def give_up(self, reason: str) -> None:
        """Chooses plain rounds from here on: there is no drafter."""
        self._gave_up = reason

    def disable(self, reason: str) -> None:
        """Chooses plain rounds until the next rollout."""
        self._disabled = reason

    def choose(self, rows: int) -> int:
        """The draft length of the next round. Rounds are observed or passed over in the order of their choice."""
        self._rows, trial = rows, None
        if self._forbidden(rows):
            self._gamma = 0
        elif self.counts_alone:
            self._gamma = self._candidates[0]
        elif options := self._options(rows):
            incumbent = self._best(options)
            if incumbent.gamma and not self._gamma:
                self._budget.expect_to_pay()
            self._gamma = incumbent.gamma
            if not any(self._under_way):  # one trial at a time: the cost of the last one has to be known
                tried = self._worth_trying(rows, options, incumbent)
                trial = None if tried in (None, incumbent.gamma) else Trial(tried, incumbent)
        self._under_way.append(trial)
        return self._gamma if trial is None else trial.gamma

    def pass_over(self, rows: int = 0, gamma: int = 0, seconds: float = 0.0) -> Trial | None:
        """Drops the oldest round that was chosen and not yet observed; its seconds are no measurement.

        The seconds of a speculative one beyond a plain round are charged: kernels were loaded or captured.
        """
        if gamma:
            self._budget.add_debt(max(seconds - (self.plain_seconds(rows) or 0.0), 0.0))
        return self._under_way.popleft() if self._under_way else None

    def plain_seconds(self, rows: int) -> float | None:
        """Seconds of a plain round of `rows` rows now; None before there is a measurement."""
        return self._costs.plain_s(rows)

    def usual_plain_seconds(self, rows: int) -> float | None:
        """The same at one pace, to compare rounds of different sizes however fast the machine is now."""
        return self._costs.plain.at(rows)

    def observe_plain(self, rows: int, seconds: float) -> None:
        if trial := self.pass_over():
            capped_s = min(seconds, 2 * (self.plain_seconds(rows) or seconds))
            self._budget.charge_trial(capped_s - 1 / trial.incumbent.rate)
        self._costs.add_plain(rows, seconds, self._budget.clock_s)
        self._plain_rounds += 1
        self._plain_since_draft += 1
        self._budget.advance(seconds, seconds)
        self._plain_at_s = self._budget.clock_s

    def observe_speculative(
        self,
        rows: int,
        gamma: int,
        draft_s: float,  # γ draft steps
        verify_s: float,  # the target's forward and the verification of its logits
        accepted: Sequence[int],  # per position, over rows
        examined: Sequence[int],  # per position, over rows: those whose earlier positions were all accepted
    ) -> None:
        seconds, plain_s = draft_s + verify_s, self.plain_seconds(rows)
        plain_s = seconds if plain_s is None else plain_s * (1 + sum(accepted) / examined[0])  # for the same tokens
        if trial := self.pass_over():
            self._charge_trial(rows, gamma, seconds, trial)
        else:
            self._budget.add_debt(seconds - plain_s)
        self._costs.add_speculative(rows, gamma, draft_s, verify_s)
        self._recent.add(accepted, examined, rounds=min(1 + self._plain_since_draft, MAX_AGE))
        self._lasting.add(accepted, examined)
        self._expected = self._recent.tokens_per_round(MAX_DRAFT_LENGTH)
        self._plain_since_draft = 0
        self._budget.is_ready = True
        self._budget.advance(seconds, plain_s)
        self._measured_at_s[bucket(rows), gamma] = self._budget.clock_s

    def _charge_trial(self, rows: int, gamma: int, seconds: float, trial: Trial) -> None:
        """Charges at most 3 times the expected seconds: outliers hit plain rounds too."""
        expected_s = next((option.seconds for option in self._options(rows) if option.gamma == gamma), None)
        plain_s = self.plain_seconds(rows) or seconds
        cap_s = (2 * gamma + 1) * plain_s if expected_s is None else 3 * expected_s
        self._budget.charge_trial(min(seconds, cap_s) - self._expected[gamma] / trial.incumbent.rate)

    def observe_requantize(self, seconds: float, typical: bool = True) -> None:
        """Counts the seconds of getting a current drafter, before the first speculative round of a rollout.

        Args:
            typical: later rollouts will take as long; not so where the drafter was built first.
        """
        self._budget.add_requantizing(seconds, typical)

    def _forbidden(self, rows: int) -> bool:
        over = self._max_active_sequences is not None and rows > self._max_active_sequences
        return over or (self._gave_up or self._disabled) is not None or self._candidates[-1] == 0

    def _options(self, rows: int) -> list[Option]:
        """The plain round, then each γ whose cost can be estimated; none before plain rounds were measured."""
        plain_s = self.plain_seconds(rows)
        if plain_s is None:
            return []
        options = [Option(0, 1 / plain_s, 1 / plain_s, True, plain_s)]
        for gamma, seconds, least_s, known in self._costs.speculative(rows, self._candidates):
            tokens = self._expected[gamma]
            options.append(Option(gamma, tokens / seconds, tokens / least_s, known, seconds))
        return options

    def _best(self, options: list[Option]) -> Option:
        """The known option of the highest rate, if it beats the current one by a margin."""
        current = next((option for option in options if option.gamma == self._gamma), options[0])
        best = max((option for option in options if option.known), key=lambda option: option.rate)
        margin = CHANGE_MARGIN if current.gamma else TOGGLE_MARGIN
        if best.rate <= margin * current.rate:
            return current
        pays = self._budget.pays_requantizing(current.rate / best.rate, options[0].seconds)
        return best if pays else current

    def _worth_trying(self, rows: int, options: list[Option], incumbent: Option) -> int | None:
        """A γ to measure instead of the incumbent, if one may be faster and the budget allows it."""
        plain, covered = options[0], self._costs.draft.covers(rows)
        if self._plain_rounds < (MIN_PLAIN_ROUNDS if rows <= FEW_ROWS else PATIENT_PLAIN_ROUNDS):
            return None
        if incumbent.gamma and self._plain_is_due(rows, plain, incumbent):
            return 0
        if self._budget.requantize_price_s and not covered and self._promises_to_pay(rows, plain):
            self._budget.expect_to_pay()
            return self._candidates[0]
        if len(options) < 2:  # a draft step or a verification was not measured yet
            free = not self._budget.requantize_price_s and self._budget.lost_s <= FREE_PLAIN_ROUNDS * plain.seconds
            return self._candidates[0] if free or self._budget.affords(0.0, plain.seconds) else None
        if promising := self._promising(rows, options, incumbent):
            option = max(promising, key=lambda option: option.ceiling) if covered else promising[0]
        else:
            option = self._due_again(rows, options, incumbent)
        if option is None or not self._budget.affords(option.loss_s(incumbent), plain.seconds):
            return None
        return option.gamma

    def _promising(self, rows: int, options: list[Option], incumbent: Option) -> list[Option]:
        """Unknown options that may beat the incumbent and are not far longer than what was measured."""
        reach = REACH * max(self._costs.verify_curve(rows).largest, rows)
        return [
            option
            for option in options
            if not option.known
            and option.ceiling > TOGGLE_MARGIN * incumbent.rate
            and (rows * (option.gamma + 1) <= reach or len(self._candidates) == 1)
        ]

    def _promises_to_pay(self, rows: int, plain: Option) -> bool:
        """Whether requantizing should pay where nothing was drafted at about this batch size.

        A draft step is taken to cost the share of a plain round that it does at other batch sizes, and a verification
        as much as a plain round with as many tokens.
        """
        curve, share = self._costs.plain, PRIOR_DRAFT
        usual_s = curve.at(rows)
        assert usual_s is not None, "there are options"
        if self._costs.draft.largest:
            other, draft_s = self._costs.draft.nearest(rows)
            share = draft_s / (curve.at(other) or draft_s)
        promise = plain.rate
        for gamma in self._candidates:
            verify = 1.0 if rows <= PRIOR_FLAT_ROWS else gamma + 1.0
            if curve.count > 1:
                verify = max(1.0, (curve.at(rows * (gamma + 1)) or 0.0) / usual_s)
            promise = max(promise, plain.rate * self._expected[gamma] / (gamma * share + verify))
        enough = promise > TOGGLE_MARGIN * plain.rate
        return enough and self._budget.pays_requantizing(plain.rate / promise, plain.seconds)

    def _plain_is_due(self, rows: int, plain: Option, incumbent: Option) -> bool:
        """Whether to run a plain round while speculating: their price must be recent, and its pace certain."""
        if not self._costs.plain.has(rows) or self._costs.pace_is_odd:
            return True
        return self._least_loss_s(plain, plain, incumbent) <= PLAIN_SHARE * (self._budget.clock_s - self._plain_at_s)

    def _due_again(self, rows: int, options: list[Option], incumbent: Option) -> Option | None:
        """A known option to measure again: the other side of the gate, and draft lengths with few measurements.

        A round of it must lose little against the time since its last one. Otherwise a bad moment, or an acceptance of
        former rows, would rule it out for good.
        """
        if incumbent.gamma:
            curve = self._costs.verify_curve(rows)
            others = [o for o in options[1:] if o.known and not curve.is_settled(rows * (o.gamma + 1))]
        else:
            others = [max(options[1:], key=lambda option: option.rate)]

        def due(other: Option) -> bool:
            since_s = self._budget.clock_s - self._measured_at_s.get((bucket(rows), other.gamma), 0.0)
            return self._least_loss_s(other, options[0], incumbent) <= PROBE_SHARE * since_s

        return max((other for other in others if due(other)), key=lambda option: option.rate, default=None)

    @staticmethod
    def _least_loss_s(option: Option, plain: Option, incumbent: Option) -> float:
        """The loss of a round of the option, at least a tenth of a plain round, so that it is not run all the time."""
        return max(option.loss_s(incumbent), 0.1 * plain.seconds)

    def explain(self) -> str:
        """Why the last choice was made, in one sentence."""
        rows, gamma = self._rows, self._gamma
        where = f"at {rows} row{'s' if rows != 1 else ''}"
        if self._candidates[-1] == 0:
            return "off: num_speculative_tokens is 0"
        if self._gave_up is not None:
            return f"off for good: {self._gave_up}"
        if self._disabled is not None:
            return f"off for the rest of this rollout: {self._disabled}"
        if self._forbidden(rows):
            return f"off {where}: max_active_sequences is {self._max_active_sequences}"
        if self.counts_alone:
            return f"on {where} with γ = {gamma}: max_active_sequences is {self._max_active_sequences}"
        options = self._options(rows)
        if len(options) < 2:
            return f"off {where}: {'drafting' if options else 'a plain round'} has not been measured yet"
        return self._explain_by_costs(where, *options)

    def _explain_by_costs(self, where: str, plain: Option, *drafts: Option) -> str:
        best = max(drafts, key=lambda option: option.rate)
        shown = next((option for option in drafts if option.gamma == self._gamma), best)
        draft = (self._costs.draft.at(self._rows) or 0.0) * self._costs.pace / plain.seconds
        gain = shown.rate / plain.rate
        figures = (
            f"a draft step costs {draft:.2f} and a verify {shown.seconds / plain.seconds - shown.gamma * draft:.2f} "
            f"of a plain round, so at the measured acceptance of {self._recent.alpha:.2f}"
        )
        if self._gamma:
            return f"on {where} with γ = {self._gamma}: {figures} it gives {gain:.2f}x"
        if gain > TOGGLE_MARGIN:
            caveat = ", too little to pay for requantizing the drafter" if shown.known else ", still to be measured"
        else:
            caveat = f", and a switch has to promise {TOGGLE_MARGIN:.2f}x" if gain > 1 else ""
        return f"off {where}: {figures} the best draft length ({shown.gamma}) would give {gain:.2f}x{caveat}"

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as JSON-able values, without settings and the rollout in progress."""
        return {
            "version": STATE_VERSION,
            **self._costs.state(),
            **self._budget.state(),
            "accepted": list(self._lasting.accepted),
            "examined": list(self._lasting.examined),
            "plain_rounds": self._plain_rounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`.

        Raises:
            ValueError: it is of another version, or not such a state; nothing is changed then.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise ValueError(f"Not a controller state of version {STATE_VERSION}: start without it.")
        try:
            costs, budget = RoundCosts.from_state(state), ExplorationBudget.from_state(state)
            lasting = Acceptance.from_counts(SLOW_DECAY, state["accepted"], state["examined"])
            plain_rounds = int(positive(state["plain_rounds"], or_zero=True))
        except (KeyError, TypeError, ValueError) as error:  # a name or a list is missing, or a number is out of range
            raise ValueError(f"Not a controller state ({error!r}): start without it.") from error
        budget.expected_requantize_s = self._budget.expected_requantize_s
        self._costs, self._budget, self._plain_rounds = costs, budget, plain_rounds
        self._restore_acceptance(lasting)
        self._plain_at_s = budget.clock_s
        self._plain_since_draft, self._measured_at_s = 0, {}
        self.begin_rollout()
