"""How far to draft, decided before each round from what earlier rounds cost and accepted.

The rate to maximise is E[tokens per row and round | γ] / (γ · draft step + verify) over γ in 0..max (0 is a plain
round). Costs are curves learned online; acceptance is `alpha` per position (accepted / examined), decayed. What is not
known yet is tried in real rounds, optimistically and on a budget: the seconds such rounds take beyond the best known
choice stay within 2 % of the rollout's. No clock is read here and no randomness used.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median_low
from typing import Any, Literal, NamedTuple

from trl_selfspec.estimates import REACH, Acceptance, CostCurve, bucket, positive
from trl_selfspec.options import MAX_DRAFT_LENGTH


TOGGLE_MARGIN = 1.05  # what leaving plain rounds has to promise: measured costs scatter by about 3 %
CHANGE_MARGIN = 1.02  # what any other change has to; as large as the loss that a choice which turned bad can hide
BUDGET = 0.02  # share of a rollout's seconds that exploring may waste
PROBE_SHARE = 0.005  # a known choice is measured again once this share of the time since pays for it
FREE_PLAIN_ROUNDS = 2.0  # first exploration ever, in plain rounds wasted, before any budget has accrued
MIN_PLAIN_ROUNDS = 3  # before drafting: the first is warm-up
PATIENT_PLAIN_ROUNDS = 16  # the same for a large batch, where an early guess costs more and is worth less
FEW_ROWS = 8
REACH_VERIFY = 1.34  # a verify's within this factor above the longest measured at this batch (γ=2 -> 3, 5 -> 7)
PEER_SHARE = 0.7  # a verify takes at least this share of one with as many tokens over other rows
FAST_DECAY, SLOW_DECAY = 0.98, 0.998  # per round: half-lives of 34 and 346; the slow one seeds the next rollout
MAX_AGE = 35  # rounds since the last draft count for at most this many: one probe halves older evidence
STATE_VERSION = 1


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
    entry_s: float  # requantizing, which the incumbent would not have needed


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
        self._reset()

    def _reset(self) -> None:
        self._plain, self._draft, self._verify = CostCurve(), CostCurve(), CostCurve()
        self._verify_by_rows: dict[int, CostCurve] = {}  # n alone leaves out what attention over B rows costs
        self._lasting = Acceptance(SLOW_DECAY)
        self._recent = Acceptance(FAST_DECAY, prior=self._lasting)
        self._clock_s = self._wasted_s = 0.0  # of all rollouts
        self._plain_rounds = self._plain_since_draft = 0
        self._measured_at_s: dict[tuple[int, int], float] = {}  # per row bucket and draft length
        self._requantize_s: deque[float] = deque(maxlen=3)
        self._rollout_s = self._last_rollout_s = 0.0
        self._rows = 0
        self.begin_rollout()

    def begin_rollout(self, drafter_is_current: bool = False) -> None:
        """Starts afresh with what was learned. A current drafter can be used without requantizing first."""
        self._drafter_is_current = drafter_is_current
        self._last_rollout_s, self._rollout_s = self._rollout_s or self._last_rollout_s, 0.0
        self._spent_s = 0.0  # wasted by trials in this rollout
        self._gamma = 0
        self._under_way: deque[Trial | None] = deque()  # by round chosen and not yet observed
        self._drafted = False
        self._disabled: str | None = None
        self._recent.restart()
        self._expected = self._recent.tokens_per_round(MAX_DRAFT_LENGTH)

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
            self._gamma = incumbent.gamma
            # One trial at a time: what it takes and shows is not known before it is observed.
            tried = None if any(self._under_way) else self._worth_trying(rows, options, incumbent)
            if tried is not None and tried != incumbent.gamma:
                trial = Trial(tried, incumbent, self._entry_s if tried else 0.0)
        self._under_way.append(trial)
        return self._gamma if trial is None else trial.gamma

    def pass_over(self) -> Trial | None:
        """Takes the oldest round that was chosen and not yet observed for over, whatever it took."""
        return self._under_way.popleft() if self._under_way else None

    def plain_seconds(self, rows: int) -> float | None:
        """What a plain round of `rows` rows takes; None before it can be told."""
        return self._plain.at(rows)

    def observe_plain(self, rows: int, seconds: float) -> None:
        if trial := self.pass_over():
            self._charge(min(seconds, 2 * (self.plain_seconds(rows) or seconds)) - 1 / trial.incumbent.rate)
        self._plain.add(rows, seconds)
        self._plain_rounds += 1
        self._plain_since_draft += 1
        self._advance(seconds)
        self._measured_at_s[bucket(rows), 0] = self._clock_s

    def observe_speculative(
        self,
        rows: int,
        gamma: int,
        draft_s: float,  # γ draft steps
        verify_s: float,  # the target's forward and the verdict
        accepted: Sequence[int],  # per position, over rows
        examined: Sequence[int],  # per position, over rows: those whose earlier positions were all accepted
    ) -> None:
        if trial := self.pass_over():
            self._charge_trial(rows, gamma, draft_s + verify_s, trial)
        key, n = bucket(rows), rows * (gamma + 1)
        self._draft.add(rows, draft_s / gamma)
        self._verify.add(n, verify_s)
        self._verify_by_rows.setdefault(key, CostCurve()).add(n, verify_s)
        self._recent.add(accepted, examined, rounds=min(1 + self._plain_since_draft, MAX_AGE))
        self._lasting.add(accepted, examined)
        self._expected = self._recent.tokens_per_round(MAX_DRAFT_LENGTH)
        self._drafted, self._plain_since_draft = True, 0
        self._advance(draft_s + verify_s)
        self._measured_at_s[key, gamma] = self._clock_s

    def observe_requantize(self, seconds: float) -> None:
        """What it took to have a current drafter before a speculative round; the first of a rollout counts."""
        if not (self._drafted or self._drafter_is_current):
            self._requantize_s.append(seconds)

    def _advance(self, seconds: float) -> None:
        self._clock_s += seconds
        self._rollout_s += seconds

    def _charge(self, seconds: float) -> None:
        self._spent_s += max(seconds, 0.0)
        self._wasted_s += max(seconds, 0.0)

    def _charge_trial(self, rows: int, gamma: int, seconds: float, trial: Trial) -> None:
        """Warm-up counts as at worst a draft as dear as the target; an outlier would have hit a plain round too."""
        expected = next((o.seconds for o in self._options(rows) if o.gamma == gamma), None)
        plain = self.plain_seconds(rows) or seconds
        cap = (2 * gamma + 1) * plain if expected is None else 3 * expected
        self._charge(min(seconds, cap) - self._expected[gamma] / trial.incumbent.rate)
        self._wasted_s += trial.entry_s

    @property
    def _entry_s(self) -> float:
        """What the first draft of a rollout costs on top: a current drafter."""
        if self._drafted or self._drafter_is_current or not self._requantize_s:
            return 0.0
        return median_low(self._requantize_s)

    def _forbidden(self, rows: int) -> bool:
        over = self._max_active_sequences is not None and rows > self._max_active_sequences
        return over or self._disabled is not None or self._candidates[-1] == 0

    def _options(self, rows: int) -> list[Option]:
        """The plain round, then each γ whose cost can be guessed; nothing before plain rounds were measured."""
        plain, draft = self.plain_seconds(rows), self._draft.at(rows)
        if plain is None:
            return []
        options = [Option(0, 1 / plain, 1 / plain, True, plain)]
        curve = self._verify_curve(rows)
        if draft is None or not curve.largest:
            return options
        near, anchor, longest = self._draft.covers(rows), (rows, plain), max(curve.largest, rows)
        for gamma in self._candidates:
            n, tokens = rows * (gamma + 1), self._expected[gamma]
            seconds = least = gamma * draft + curve.above(anchor, n)
            known = near and n <= REACH_VERIFY * curve.largest
            if not known:
                verify = curve.above(anchor, min(n, longest))
                if n <= self._verify.largest:
                    verify = max(verify, PEER_SHARE * self._verify.above(anchor, n))
                least = gamma * self._draft.floor(rows) + verify
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

    def _pays_entry(self, share: float, times: float = 1.0) -> bool:
        """Whether the rest of the rollout, shortened to this share, makes up for requantizing `times` over."""
        rest_s = max(self._last_rollout_s - self._rollout_s, self._rollout_s / 2)
        return self._entry_s == 0 or rest_s * (1 - share) > times * self._entry_s

    def _worth_trying(self, rows: int, options: list[Option], incumbent: Option) -> int | None:
        """A γ to measure in the incumbent's place, if one may pay and the budget lasts."""
        if self._plain_rounds < (MIN_PLAIN_ROUNDS if rows <= FEW_ROWS else PATIENT_PLAIN_ROUNDS):
            return None
        if not self._draft.largest:
            free = self._wasted_s <= FREE_PLAIN_ROUNDS * options[0].seconds
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
        if option is None or not self._affords(_excess_s(option, incumbent), incumbent.rate / option.ceiling):
            return None
        return option.gamma

    def _due_again(self, rows: int, options: list[Option], incumbent: Option) -> Option | None:
        """A known choice of which a round costs little against the time since its last one: the other side of the
        gate, and draft lengths measured too rarely to be sure, of which a bad moment would otherwise stand for ever.
        """
        curve = self._verify_curve(rows)

        def due(other: Option) -> bool:
            since_s = self._clock_s - self._measured_at_s.get((bucket(rows), other.gamma), 0.0)
            cost_s = max(_excess_s(other, incumbent), 0.1 * options[0].seconds)
            return cost_s + (self._entry_s if other.gamma else 0.0) <= PROBE_SHARE * since_s

        others = [options[0]] if incumbent.gamma else [max(options[1:], key=lambda option: option.rate)]
        if incumbent.gamma:
            others += [o for o in options[1:] if o.known and not curve.is_settled(rows * (o.gamma + 1))]
        return max((other for other in others if due(other)), key=lambda option: option.rate, default=None)

    def _affords(self, excess_s: float, share: float = 1.0) -> bool:
        """Whether the budget covers a trial. Requantizing is on it, unless the promised share pays for that twice."""
        entry_s = 0.0 if self._pays_entry(share, times=2.0) else self._entry_s
        return self._spent_s + max(excess_s, 0.0) + entry_s <= BUDGET * self._rollout_s

    def explain(self) -> str:
        """Why the last choice was made, in one sentence."""
        rows, gamma = self._rows, self._gamma
        where = f"at {rows} row{'s' if rows != 1 else ''}"
        if self._candidates[-1] == 0:
            return "off: num_speculative_tokens is 0"
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
        draft, ratio = (self._draft.at(rows) or 0.0) / plain.seconds, shown.rate / plain.rate
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
            "wasted_s": self._wasted_s,
            "rollout_s": self._rollout_s or self._last_rollout_s,
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
            plain_rounds = int(positive(state["plain_rounds"], or_zero=True))
            wasted_s, rollout_s = (positive(state[name], or_zero=True) for name in ("wasted_s", "rollout_s"))
            requantize_s = [positive(seconds, or_zero=True) for seconds in state["requantize_s"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Not a controller state ({error!r}): start without it.") from error
        self._reset()
        self._plain, self._draft, self._verify, self._verify_by_rows = plain, draft, verify, by_rows
        self._lasting, self._recent = lasting, Acceptance(FAST_DECAY, prior=lasting)
        self._plain_rounds, self._wasted_s, self._last_rollout_s = plain_rounds, wasted_s, rollout_s
        self._requantize_s.extend(requantize_s)
        self.begin_rollout()
