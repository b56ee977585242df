"""How far to draft, decided before each round from what earlier rounds cost and accepted.

The rate to maximise is E[tokens per row and round | γ] / (γ · draft step + verify) over γ in 0..max (0 is a plain
round). Costs are curves learned online, at the pace of the machine that the last plain rounds show, so that its speed
may drift; acceptance is `alpha` per position (accepted / examined), decayed. What is not known yet is tried in real
rounds, on one account: the seconds that trials, requantizing and first uses take beyond what they bring stay within
2 % of all rollouts' seconds. No clock is read here and no randomness used.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median_low
from typing import Any, Literal, NamedTuple

from trl_selfspec.control.cost_model import REACH, Acceptance, CostCurve, bucket, positive
from trl_selfspec.options import MAX_DRAFT_LENGTH


TOGGLE_MARGIN = 1.05  # what leaving plain rounds has to promise: measured costs scatter by about 3 %
CHANGE_MARGIN = 1.02  # what any other change has to; as large as the loss that a choice which turned bad can hide
BUDGET = 0.012  # share of all rollouts' seconds that trials may waste; with plain samples, 2 % are the limit
PLAIN_SHARE = 0.008  # of the seconds spent speculating, for plain rounds that keep their price fresh
PROBE_SHARE = 0.005  # a known choice is measured again once this share of the time since pays for it
FREE_PLAIN_ROUNDS = 2.0  # first exploration ever, in plain rounds wasted, before any budget has accrued
TRIAL_PLAIN_ROUNDS = 4.0  # what has been requantized is tried for at least this much waste
PAYBACK = 1.5  # times over that the rest of a rollout has to make up for requantizing
FIRST_ENTRY = 3.0  # times over that the first one costs: the drafter has to be built
ROLLOUTS = 4  # whose mean length is expected of the next
MIN_PLAIN_ROUNDS = 3  # before drafting: the first is warm-up
PATIENT_PLAIN_ROUNDS = 16  # the same for a large batch, where an early guess costs more and is worth less
FEW_ROWS = 8
PRIOR_DRAFT = 0.3  # a draft step in plain rounds, before the first: int4 kernels at few rows (docs/LOG.md 2026-11-21)
PRIOR_FLAT_ROWS = 2  # up to so many rows, a verification is taken to cost a plain round until plain rounds tell
REACH_VERIFY = 1.34  # a verify's within this factor above the longest measured at this batch (γ=2 -> 3, 5 -> 7)
PEER_SHARE = 0.7  # a verify takes at least this share of one with as many tokens over other rows
FAST_DECAY, SLOW_DECAY = 0.98, 0.998  # per round: half-lives of 34 and 346; the slow one seeds the next rollout
MAX_AGE = 35  # rounds since the last draft count for at most this many: one probe halves older evidence
PACES = 5  # plain rounds whose median is the machine's pace
PACE_AGE = 10.0  # of those, in plain rounds: older ones tell of another moment
SURE_PACES = 3  # so many tell an outlier from a machine that has changed its pace
ODD = 1.3  # a pace that differs by more from the last one wants so many
MAX_FAILURES = 10
STATE_VERSION = 2


class Option(NamedTuple):
    """A draft length and the tokens per row and second it should give."""

    gamma: int
    rate: float
    ceiling: float  # the most it can give, by what other sizes cost; the rate itself where known
    known: bool
    seconds: float


def _excess_s(option: Option, incumbent: Option) -> float:
    """What a round of the option takes beyond the incumbent's seconds for the same tokens."""
    return option.seconds * (1 - option.rate / incumbent.rate)


class Trial(NamedTuple):
    """A trial round, and what it gives up."""

    gamma: int
    incumbent: Option


class Controller:
    """Chooses γ for each round.

    Args:
        num_speculative_tokens: an int offers γ and 0 only, `"auto"` all lengths up to `max_speculative_tokens`.
        max_active_sequences: hard bound on the rows that speculate. Together with an int `num_speculative_tokens` it
            decides alone: no measurement changes a choice, so runs repeat.
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
        self._reset()

    def _reset(self) -> None:
        # Seconds at pace 1, which is that of the first plain rounds.
        self._plain, self._draft, self._verify = CostCurve(), CostCurve(), CostCurve()
        self._verify_by_rows: dict[int, CostCurve] = {}  # n alone leaves out what attention over B rows costs
        self._pace = 1.0  # of the machine: seconds now, per second of the curves
        self._paces: deque[tuple[float, float]] = deque(maxlen=PACES)  # the latest, and when
        self._pace_is_odd = False  # the last one differs, and was not confirmed yet
        self._lasting = Acceptance(SLOW_DECAY)
        self._recent = Acceptance(FAST_DECAY, prior=self._lasting)
        self._clock_s = self._wasted_s = 0.0  # of all rollouts
        self._failures = 0  # times in a row that requantizing did not pay
        self._balance_s = 0.0  # what requantizing has won since, at most its price
        self._plain_rounds = self._plain_since_draft = 0
        self._plain_at_s = 0.0
        self._measured_at_s: dict[tuple[int, int], float] = {}  # per row bucket and draft length
        self._requantize_s: deque[float] = deque(maxlen=3)
        self._expected_requantize_s = 0.0
        self._rollout_s = 0.0
        self._rollout_plain_s = 0.0  # what plain rounds would have taken for its tokens
        self._rollouts_plain_s: deque[float] = deque(maxlen=ROLLOUTS)  # of the last ones
        self._rows = 0
        self._paid_entry_s = self._invested_s = 0.0
        self.begin_rollout()

    def begin_rollout(self, drafter_is_current: bool = False) -> None:
        """Starts afresh with what was learned. A current drafter can be used without requantizing first."""
        self._close_account()
        self._drafter_is_current = drafter_is_current
        if self._rollout_plain_s:
            self._rollouts_plain_s.append(self._rollout_plain_s)
        self._rollout_s = self._rollout_plain_s = 0.0
        self._spent_s = 0.0  # by trials in this rollout
        self._invested_s = 0.0  # requantizing and first uses, less what speculation has won since
        self._paid_entry_s = 0.0  # the requantizing of it
        self._bet = False  # it was expected to pay within the rollout, and not paid from the budget
        self._gamma = 0
        self._under_way: deque[Trial | None] = deque()  # by round chosen and not yet observed
        self._drafted = False
        self._disabled: str | None = None
        self._recent.restart()
        self._expected = self._recent.tokens_per_round(MAX_DRAFT_LENGTH)

    def _close_account(self) -> None:
        """Charges what a rollout's speculation has lost; after losses, a drafter has to wait twice as long."""
        self._wasted_s += max(self._invested_s, 0.0)
        if not (self._paid_entry_s and self._requantize_s):  # the first one had to build the drafter, and began late
            return
        price_s = median_low(self._requantize_s)
        won_s = (0.0 if self._bet else self._paid_entry_s) - self._invested_s
        self._balance_s = min(self._balance_s + won_s, price_s)
        if self._balance_s < -price_s or (won_s <= 0 and not self._bet):
            self._failures, self._balance_s = min(self._failures + 1, MAX_FAILURES), 0.0
        elif won_s > 0:
            self._failures = 0

    def expect_requantizing(self, seconds: float) -> None:
        """What a current drafter will cost, as far as can be told before there was one."""
        self._expected_requantize_s = seconds

    def give_up(self, reason: str) -> None:
        """Plain rounds from here on: there is no drafter to be had."""
        self._gave_up = reason

    def disable(self, reason: str) -> None:
        """Plain rounds until the next rollout."""
        self._disabled = reason

    def choose(self, rows: int) -> int:
        """Draft length of the next round; 0 is a plain round. Rounds are observed or passed over in this order."""
        self._rows, trial = rows, None
        if self._forbidden(rows):
            self._gamma = 0
        elif self.counts_alone:
            self._gamma = self._candidates[0]
        elif options := self._options(rows):
            incumbent = self._decide(options)
            if incumbent.gamma and not self._gamma:
                self._bet |= self._entry_s > 0
            self._gamma = incumbent.gamma
            # One trial at a time: what it takes and shows is not known before it is observed.
            tried = None if any(self._under_way) else self._worth_trying(rows, options, incumbent)
            if tried is not None and tried != incumbent.gamma:
                trial = Trial(tried, incumbent)
        self._under_way.append(trial)
        return self._gamma if trial is None else trial.gamma

    def pass_over(self, rows: int = 0, gamma: int = 0, seconds: float = 0.0) -> Trial | None:
        """Takes the oldest round that was chosen and not yet observed for over. It teaches no price.

        What a speculative one took beyond a plain round is charged: kernels were loaded or captured.
        """
        if gamma:
            self._invested_s += max(seconds - (self.plain_seconds(rows) or 0.0), 0.0)
        return self._under_way.popleft() if self._under_way else None

    def plain_seconds(self, rows: int) -> float | None:
        """What a plain round of `rows` rows takes now; None before it can be told."""
        seconds = self._plain.at(rows)
        return None if seconds is None else seconds * self._pace

    def usual_plain_seconds(self, rows: int) -> float | None:
        """The same at one pace: what rounds of different sizes cost beside each other, however fast the machine is."""
        return self._plain.at(rows)

    def observe_plain(self, rows: int, seconds: float) -> None:
        if trial := self.pass_over():
            self._charge(min(seconds, 2 * (self.plain_seconds(rows) or seconds)) - 1 / trial.incumbent.rate)
        self._follow_pace(rows, seconds)
        if len(self._paces) >= SURE_PACES or not self._plain.has(rows):
            self._plain.add(rows, seconds / self._pace)
        self._plain_rounds += 1
        self._plain_since_draft += 1
        self._advance(seconds, seconds)
        self._measured_at_s[bucket(rows), 0] = self._plain_at_s = self._clock_s

    def _follow_pace(self, rows: int, seconds: float) -> None:
        """The pace by the latest plain rounds. One round that differs much is not believed before others agree."""
        if not self._plain.has(rows):
            return
        usual_s = self._at(self._plain, rows)
        while self._paces and self._clock_s - self._paces[0][0] > PACE_AGE * self._pace * usual_s:
            self._paces.popleft()
        self._paces.append((self._clock_s, seconds / usual_s))
        pace = median_low([pace for _, pace in self._paces])
        self._pace_is_odd = len(self._paces) < SURE_PACES and not 1 / ODD < pace / self._pace < ODD
        if not self._pace_is_odd:
            self._pace = pace

    def observe_speculative(
        self,
        rows: int,
        gamma: int,
        draft_s: float,  # γ draft steps
        verify_s: float,  # the target's forward and the verdict
        accepted: Sequence[int],  # per position, over rows
        examined: Sequence[int],  # per position, over rows: those whose earlier positions were all accepted
    ) -> None:
        plain_s = self.plain_seconds(rows)
        plain_s = draft_s + verify_s if plain_s is None else plain_s * (1 + sum(accepted) / examined[0])
        if trial := self.pass_over():
            self._charge_trial(rows, gamma, draft_s + verify_s, trial)
        else:
            self._invested_s += draft_s + verify_s - plain_s
        key, n = bucket(rows), rows * (gamma + 1)
        if not self._pace_is_odd:  # else what it is to be divided by is not known
            self._draft.add(rows, draft_s / gamma / self._pace)
            self._verify.add(n, verify_s / self._pace)
            self._verify_by_rows.setdefault(key, CostCurve()).add(n, verify_s / self._pace)
        self._recent.add(accepted, examined, rounds=min(1 + self._plain_since_draft, MAX_AGE))
        self._lasting.add(accepted, examined)
        self._expected = self._recent.tokens_per_round(MAX_DRAFT_LENGTH)
        self._drafted, self._plain_since_draft = True, 0
        self._advance(draft_s + verify_s, plain_s)
        self._measured_at_s[key, gamma] = self._clock_s

    def observe_requantize(self, seconds: float, typical: bool = True) -> None:
        """What it took to have a current drafter before a speculative round; the first of a rollout counts.

        Args:
            typical: later rollouts will take as long; not so where the drafter was built first.
        """
        if self._drafted or self._drafter_is_current:
            return
        if typical:
            self._requantize_s.append(seconds)
        self._clock_s += seconds
        self._invested_s += seconds
        self._paid_entry_s += seconds

    def _advance(self, seconds: float, plain_s: float) -> None:
        self._clock_s += seconds
        self._rollout_s += seconds
        self._rollout_plain_s += plain_s

    def _charge(self, seconds: float) -> None:
        self._spent_s += max(seconds, 0.0)
        self._wasted_s += max(seconds, 0.0)

    def _charge_trial(self, rows: int, gamma: int, seconds: float, trial: Trial) -> None:
        """Counts a draft step at most as a plain round, or 3 times what is known: outliers hit plain rounds too."""
        expected = next((o.seconds for o in self._options(rows) if o.gamma == gamma), None)
        plain = self.plain_seconds(rows) or seconds
        cap = (2 * gamma + 1) * plain if expected is None else 3 * expected
        self._charge(min(seconds, cap) - self._expected[gamma] / trial.incumbent.rate)

    @property
    def _usual_rollout_s(self) -> float:
        """What one takes in plain rounds; 0 before there was one."""
        return sum(self._rollouts_plain_s) / max(len(self._rollouts_plain_s), 1)

    @property
    def _entry_s(self) -> float:
        """What the first draft of a rollout costs on top: a current drafter."""
        if self._drafted or self._drafter_is_current or self._paid_entry_s:
            return 0.0
        return median_low(self._requantize_s) if self._requantize_s else self._expected_requantize_s

    @staticmethod
    def _at(curve: CostCurve, n: float) -> float:
        seconds = curve.at(n)
        assert seconds is not None
        return seconds

    def _forbidden(self, rows: int) -> bool:
        over = self._max_active_sequences is not None and rows > self._max_active_sequences
        return over or (self._gave_up or self._disabled) is not None or self._candidates[-1] == 0

    def _options(self, rows: int) -> list[Option]:
        """The plain round, then each γ whose cost can be guessed; nothing before plain rounds were measured.

        A verification does all that a plain round over the same rows does, so it never costs less.
        """
        plain, draft, pace = self._plain.at(rows), self._draft.at(rows), self._pace
        if plain is None:
            return []
        options = [Option(0, 1 / (plain * pace), 1 / (plain * pace), True, plain * pace)]
        curve = self._verify_curve(rows)
        if draft is None or not curve.largest:
            return options
        near, anchor, longest = self._draft.covers(rows), (rows, plain), max(curve.largest, rows)
        dearest = plain  # of the shorter ones
        for gamma in self._candidates:
            n, tokens = rows * (gamma + 1), self._expected[gamma]
            dearest = max(dearest, curve.above(anchor, n))
            seconds = least = pace * (gamma * draft + dearest)
            known = near and n <= REACH_VERIFY * curve.largest
            if not known:
                verify = max(plain, curve.above(anchor, min(n, longest)))
                if n <= self._verify.largest:
                    verify = max(verify, PEER_SHARE * self._verify.above(anchor, n))
                least = pace * (gamma * self._draft.floor(rows) + verify)
            options.append(Option(gamma, tokens / seconds, tokens / least, known, seconds))
        return options

    def _verify_curve(self, rows: int) -> CostCurve:
        own = self._verify_by_rows.get(bucket(rows))
        return own if own is not None and own.largest else self._verify

    def _decide(self, options: list[Option]) -> Option:
        current = next((option for option in options if option.gamma == self._gamma), options[0])
        best = max((option for option in options if option.known), key=lambda option: option.rate)
        margin = CHANGE_MARGIN if current.gamma else TOGGLE_MARGIN
        if best.rate <= margin * current.rate or not self._pays_entry(current.rate / best.rate):
            return current
        return best

    def _pays_entry(self, share: float) -> bool:
        """Whether the rest of the rollout, shortened to this share, makes up for requantizing, with a margin.

        After a promise that was not kept, the budget has to cover it too.
        """
        if self._entry_s == 0:
            return True
        past_s = self._rollout_plain_s - self._usual_rollout_s
        rest_s = max(-past_s, past_s / 2)  # one that takes longer than usual may take longer still
        pays = rest_s * (1 - share) > PAYBACK * self._entry_s
        return pays and (not self._failures or self._affords(0.0))

    def _worth_trying(self, rows: int, options: list[Option], incumbent: Option) -> int | None:
        """A γ to measure in the incumbent's place, if one may pay and the budget lasts."""
        if self._plain_rounds < (MIN_PLAIN_ROUNDS if rows <= FEW_ROWS else PATIENT_PLAIN_ROUNDS):
            return None
        if incumbent.gamma and self._plain_is_due(rows, options[0], incumbent):
            return 0
        if self._entry_s and not self._draft.covers(rows) and self._promises_to_pay(rows, options[0]):
            self._bet = True
            return self._candidates[0]
        if len(options) < 2:  # a draft step or a verification has no price yet
            free = self._entry_s == 0 and self._wasted_s <= FREE_PLAIN_ROUNDS * options[0].seconds
            return self._candidates[0] if free or self._affords(0.0) else None
        reach = REACH * max(self._verify_curve(rows).largest, rows)
        promising = [
            option
            for option in options
            if not option.known
            and option.ceiling > TOGGLE_MARGIN * incumbent.rate
            and (rows * (option.gamma + 1) <= reach or len(self._candidates) == 1)
        ]
        if promising:
            blind = not self._draft.covers(rows)
            option = promising[0] if blind else max(promising, key=lambda option: option.ceiling)
        else:
            option = self._due_again(rows, options, incumbent)
        if option is None or not self._affords(_excess_s(option, incumbent)):
            return None
        return option.gamma

    def _promises_to_pay(self, rows: int, plain: Option) -> bool:
        """Whether requantizing should pay where nothing was drafted over about so many rows.

        Drafts are taken to cost the share of a plain round that they do at other rows, and a verification what a plain
        round with as many tokens does.
        """
        curve, share = self._plain, PRIOR_DRAFT
        if self._draft.largest:
            other, draft = self._draft.nearest(rows)
            share = draft / self._at(curve, other)
        promise = plain.rate
        for gamma in self._candidates:
            verify = 1.0 if rows <= PRIOR_FLAT_ROWS else gamma + 1.0
            if curve.count > 1:
                verify = max(1.0, self._at(curve, rows * (gamma + 1)) / self._at(curve, rows))
            promise = max(promise, plain.rate * self._expected[gamma] / (gamma * share + verify))
        return promise > TOGGLE_MARGIN * plain.rate and self._pays_entry(plain.rate / promise)

    def _plain_is_due(self, rows: int, plain: Option, incumbent: Option) -> bool:
        """While speculating, plain rounds are sampled all along: their price must be of the same minutes."""
        cost_s = max(_excess_s(plain, incumbent), 0.1 * plain.seconds)
        if not self._plain.has(rows) or self._pace_is_odd:
            return True
        return cost_s <= PLAIN_SHARE * (self._clock_s - self._plain_at_s)

    def _due_again(self, rows: int, options: list[Option], incumbent: Option) -> Option | None:
        """A known choice of which a round costs little against the time since its last one: the other side of the
        gate, and draft lengths measured too rarely to be sure, of which a bad moment would otherwise stand for ever.
        """
        curve = self._verify_curve(rows)

        def due(other: Option) -> bool:
            since_s = self._clock_s - self._measured_at_s.get((bucket(rows), other.gamma), 0.0)
            return max(_excess_s(other, incumbent), 0.1 * options[0].seconds) <= PROBE_SHARE * since_s

        others = [] if incumbent.gamma else [max(options[1:], key=lambda option: option.rate)]
        if incumbent.gamma:
            others = [o for o in options[1:] if o.known and not curve.is_settled(rows * (o.gamma + 1))]
        return max((other for other in others if due(other)), key=lambda option: option.rate, default=None)

    def _affords(self, excess_s: float) -> bool:
        """Whether the budget covers a trial, requantizing included, which comes with some rounds to make use of it."""
        plain_s = self.plain_seconds(self._rows) or 0.0
        if self._paid_entry_s:
            return self._spent_s + excess_s <= TRIAL_PLAIN_ROUNDS * plain_s + BUDGET * self._rollout_s
        entry_s = 0.0
        if self._entry_s:
            if self._rollout_plain_s > self._usual_rollout_s / 2:
                return False  # the rest is too short, and its rows too few, to learn much
            times = 2**self._failures if self._requantize_s else FIRST_ENTRY
            entry_s = self._entry_s * times + TRIAL_PLAIN_ROUNDS * plain_s
        owed_s = self._wasted_s + max(self._invested_s, 0.0)
        return owed_s + max(excess_s, 0.0) + entry_s <= BUDGET * self._clock_s

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
        plain, drafts = options[0], options[1:]
        shown = next((o for o in drafts if o.gamma == gamma), None) or max(drafts, key=lambda option: option.rate)
        draft = (self._draft.at(rows) or 0.0) * self._pace / plain.seconds
        ratio = shown.rate / plain.rate
        figures = (
            f"a draft step costs {draft:.2f} and a verify {shown.seconds / plain.seconds - shown.gamma * draft:.2f} "
            f"of a plain round, so at the measured acceptance of {self._recent.alpha:.2f}"
        )
        if gamma:
            return f"on {where} with γ = {gamma}: {figures} it gives {ratio:.2f}x"
        if ratio > TOGGLE_MARGIN:
            caveat = ", too little to pay for requantizing the drafter" if shown.known else ", still to be measured"
        else:
            caveat = f", and a switch has to promise {TOGGLE_MARGIN:.2f}x" if ratio > 1 else ""
        return f"off {where}: {figures} the best draft length ({shown.gamma}) would give {ratio:.2f}x{caveat}"

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as JSON-able values; settings and the rollout in progress are not part of it."""
        return {
            "version": STATE_VERSION,
            "plain": self._plain.state(),
            "draft": self._draft.state(),
            "verify": self._verify.state(),
            "verify_by_rows": [[rows, curve.state()] for rows, curve in sorted(self._verify_by_rows.items())],
            "accepted": list(self._lasting.accepted),
            "examined": list(self._lasting.examined),
            "plain_rounds": self._plain_rounds,
            "pace": self._pace,
            "clock_s": self._clock_s,
            "wasted_s": self._wasted_s + max(self._invested_s, 0.0),
            "failures": self._failures,
            "rollouts_s": [*self._rollouts_plain_s, *([self._rollout_plain_s] if self._rollout_plain_s else [])],
            "requantize_s": list(self._requantize_s),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`.

        Raises:
            ValueError: it is of another version, or not such a state; nothing is changed then.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            raise ValueError(f"Not a controller state of version {STATE_VERSION}: start without it.")
        try:
            plain, draft, verify = (CostCurve.from_state(state[name]) for name in ("plain", "draft", "verify"))
            by_rows = {int(positive(rows)): CostCurve.from_state(curve) for rows, curve in state["verify_by_rows"]}
            lasting = Acceptance(SLOW_DECAY)
            lasting.load(state["accepted"], state["examined"])
            pace = positive(state["pace"])
            plain_rounds, failures = (
                int(positive(state[name], or_zero=True)) for name in ("plain_rounds", "failures")
            )
            wasted_s, clock_s = (positive(state[name], or_zero=True) for name in ("wasted_s", "clock_s"))
            rollouts_s = [positive(seconds) for seconds in state["rollouts_s"]]
            requantize_s = [positive(seconds, or_zero=True) for seconds in state["requantize_s"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Not a controller state ({error!r}): start without it.") from error
        expected_requantize_s = self._expected_requantize_s
        self._reset()
        self._plain, self._draft, self._verify, self._verify_by_rows = plain, draft, verify, by_rows
        self._lasting, self._recent = lasting, Acceptance(FAST_DECAY, prior=lasting)
        self._plain_rounds, self._pace, self._failures = plain_rounds, pace, min(failures, MAX_FAILURES)
        self._clock_s, self._wasted_s = clock_s, wasted_s
        self._rollouts_plain_s.extend(rollouts_s)
        self._plain_at_s = clock_s
        self._requantize_s.extend(requantize_s)
        self._expected_requantize_s = expected_requantize_s
        self.begin_rollout()
