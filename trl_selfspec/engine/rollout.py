"""The loop of a rollout: decide -> draft -> verify -> commit -> retire."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from trl_selfspec.control.controller import PLAIN, Choice, Controller
from trl_selfspec.control.stats import PlainComparison, RolloutStats
from trl_selfspec.drafter.protocol import Drafter, DraftError
from trl_selfspec.engine.model_runner import ModelRunner, PendingRound, RoundResult
from trl_selfspec.engine.request import Request
from trl_selfspec.engine.scheduler import Admission, Scheduler
from trl_selfspec.kv_cache.prefix_cache import PrefixCache
from trl_selfspec.utils import Clock, to_device


logger = logging.getLogger(__name__)

PREFILL_TOKENS = 4096  # padded tokens per prefill forward, which bounds its activations
PREFILL_SCORES = PREFILL_TOKENS**2  # queries x keys of a prefill that continues a row, whose attention needs a mask
SLOT_QUANTUM = 16  # attention reads a multiple of this many slots, so that shapes repeat over rounds


@dataclass(frozen=True)
class Progress:
    """The state of a rollout after a round."""

    unfinished: int
    completed_tokens: int
    tokens_per_s: float
    num_speculative_tokens: int  # draft length of the last round; 0 is a plain round


class Launched(NamedTuple):
    """A round in flight, and the ids of the rows it advances. Rows may move or end before it is read."""

    pending: PendingRound
    row_ids: list[int]


class Span(NamedTuple):
    """Tokens of a row whose keys have to be computed."""

    row: int
    start: int
    end: int

    @property
    def width(self) -> int:
        return self.end - self.start


@dataclass
class Rollout:
    """One `generate` call. `completions[i]` and the log-probabilities belong to the i-th prompt.

    The host knows each row's length up to the last round it has read, the device up to the last one that ran.
    """

    runner: ModelRunner
    scheduler: Scheduler
    prefix_cache: PrefixCache  # over the runner's cache
    controller: Controller
    drafters: Mapping[str, Drafter]  # by name
    keep: bool = False  # finished rows in the prefix cache, for later rollouts
    recurrent: bool = False  # layers keep a state that padding would change
    on_round: Callable[[Progress], None] | None = None
    rounds_ahead: int = 0  # rounds launched before the host reads the last one (asynchronous scheduling)
    stats: RolloutStats = field(default_factory=RolloutStats)

    def __post_init__(self) -> None:
        num_rows = self.scheduler.num_unfinished
        self.completions: list[list[int]] = [[] for _ in range(num_rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        self.policy_logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        self._in_flight: deque[Launched] = deque()
        self._prefills: list[Clock] = []
        self._comparison = PlainComparison(self.stats)
        self._prepared: set[str] = set()  # drafters, in this rollout
        self._stash: list[tuple] = []  # row ids, numbers of tokens; tokens and both log-probabilities, on the device

    def run(self) -> None:
        start = time.perf_counter()
        ready = [name for name, drafter in self.drafters.items() if drafter.is_ready]
        self.controller.begin_rollout(ready, {name: drafter.context for name, drafter in self.drafters.items()})
        self._admit()
        while self.scheduler.active:
            self._launch(self.controller.choose(self.scheduler.num_active))
            while len(self._in_flight) > self.rounds_ahead:
                gamma = self._complete()
                if self.on_round is not None:
                    self._report(gamma, time.perf_counter() - start)
        assert not self.scheduler.waiting, "every request fits into an empty cache"
        self._read_back()
        self._comparison.end()
        self.stats.prefill_s += sum(clock.laps()[0] for clock in self._prefills)
        self.stats.rollout_s += time.perf_counter() - start

    def _launch(self, choice: Choice) -> None:
        """Launches a round: a plain one, or drafts and their verification."""
        try:
            self._launch_round(choice)
        except DraftError as error:  # the rows are as they were
            self.controller.give_up(choice.drafter, f"it failed ({error})")
            logger.warning("trl_selfspec: no %s drafts from here on, they failed: %s", choice.drafter, error)
            self._launch_round(PLAIN)

    def _launch_round(self, choice: Choice) -> None:
        gamma, drafter = choice.gamma, self.drafters.get(choice.drafter)
        if drafter is not None:
            self._prepare(drafter)
        num_slots, num_rows = self._reserve(lookahead=gamma), self.scheduler.num_active
        if not num_rows:  # `_reserve` has completed rounds, and all rows have ended
            return
        if drafter is None:
            pending = self.runner.plain(num_rows, num_slots)
        else:
            pending = self.runner.speculative(drafter, num_rows, gamma, num_slots)
        self._in_flight.append(Launched(pending, [request.row_id for request in self.scheduler.active]))

    def _complete(self) -> int:
        """Reads the oldest round in flight, retires finished rows, admits waiting ones; returns its draft length."""
        pending, row_ids = self._in_flight.popleft()
        result = pending.result()
        if result.target_nan:
            raise ValueError(
                "The policy's logits are not finite, so no token can be drawn; check for NaN in its weights (a loss "
                "that diverged, a learning rate that is too high, fp16 overflow)."
            )
        rows = {request.row_id: row for row, request in enumerate(self.scheduler.active)}
        at = {rows[row_id]: i for i, row_id in enumerate(row_ids) if row_id in rows}  # the others had ended before
        for row, i in at.items():
            self.scheduler.lengths[row] += result.emitted[i]
        self._count(pending, result, list(at.values()))
        self._retire(sorted((row for row, i in at.items() if result.finished[i]), reverse=True))
        self._admit()
        return pending.choice.gamma

    def _prepare(self, drafter: Drafter) -> None:
        """Before a drafter's first draft of this rollout."""
        name = drafter.traits.name
        if name in self._prepared:
            return
        seconds, typical = drafter.prepare()
        drafter.bind(self.runner.cache)
        self.controller.observe_preparing(name, seconds, typical)
        self.stats.requantize_s += seconds
        self.stats.rollout_s -= seconds  # counted as refresh_s
        if not self._prepared:
            self.stats.toggle_active_sequences_sum += self.scheduler.num_unfinished
            self.stats.toggle_count += 1
        self._prepared.add(name)

    def _count(self, pending: PendingRound, result: RoundResult, live: list[int]) -> None:
        """Adds a round to statistics and controller: its seconds, and what its rows `live` gained."""
        *draft, target_s = pending.laps()
        num_rows, choice, draft_s = pending.num_rows, pending.choice, sum(draft)
        gamma = choice.gamma
        if not (live and pending.steady_state):
            self.controller.pass_over(num_rows, choice, draft_s + target_s)
        if not live:  # all rows had ended when it began: the price of launching before reading
            self.stats.add_idle_round(draft_s + target_s)
            return
        usual_s = self.controller.usual_plain_seconds(num_rows)
        if not gamma:
            if pending.steady_state:
                self.controller.observe_plain(num_rows, target_s)
                self._comparison.add_plain_round(target_s, usual_s)
            self.stats.add_plain_round(len(live), target_s)
            return
        accepted = [sum(result.accepted[row] > i for row in live) for i in range(gamma)]
        examined = [len(live), *accepted[:-1]]
        if pending.steady_state:
            self.controller.observe_speculative(num_rows, choice, draft_s, target_s, accepted, examined)
        committed = sum(result.emitted[row] for row in live)
        self._comparison.add_speculative_round(draft_s + target_s, committed / len(live), usual_s)
        self.stats.add_speculative_round(choice.drafter, len(live), gamma, draft_s, target_s, accepted, examined)
        if result.draft_nan:
            self.stats.draft_nan_rounds += 1
            self.controller.disable(choice.drafter, "the drafter's logits are not finite")

    def _reserve(self, lookahead: int) -> int:
        """Gives each row pages for a round's writes: free ones, those of cached rows, then those of the newest rows.

        Returns how many slots attention has to read.
        """
        cache = self.runner.cache
        lengths = [self._longest(row) for row in range(self.scheduler.num_active)]
        while not cache.dense and cache.missing_pages(lengths, lookahead) > cache.num_free:
            if self.prefix_cache.evict():
                continue
            if self._in_flight:  # rows may have ended
                self._complete()
            else:
                assert self.scheduler.num_active > 1, "the cache holds one row to its limit"
                self._preempt(self.scheduler.newest())
            lengths = [self._longest(row) for row in range(self.scheduler.num_active)]
        if not cache.dense:
            for row, length in enumerate(lengths):
                cache.reserve(row, length + lookahead)
            cache.sync_table()
        longest = max(lengths, default=0) + lookahead
        return min(-(-longest // SLOT_QUANTUM) * SLOT_QUANTUM, cache.row_capacity)

    def _longest(self, row: int) -> int:
        """The most tokens that a row can hold after the rounds in flight."""
        return min(self.scheduler.lengths[row] + self._ahead, self.scheduler.active[row].limit)

    @property
    def _ahead(self) -> int:
        """The most tokens that rounds in flight can add to a row."""
        return sum(pending.choice.gamma + 1 for pending, _ in self._in_flight)

    def _retire(self, finished: Sequence[int]) -> None:
        """Frees finished rows, from the last one down, so that a row that moves is not one of them."""
        scheduler, cache = self.scheduler, self.runner.cache
        self._stash_drawn(finished)
        for row in finished:
            request, num_keys = scheduler.active[row], scheduler.lengths[row] - 1 if self.keep else 0
            self.stats.num_rows += 1
            self.stats.prompt_tokens += len(request.prompt)
            if (successor := scheduler.take_over(row)) is not None:
                self._assign(row, successor)
                cache.rearrange({row: (row, len(successor.prompt) - 1)})
                continue
            last = scheduler.retire(row)
            self._free(row, last, num_keys)
            if num_keys:
                self.prefix_cache.insert(last, self._tokens(request)[:num_keys])
        if finished:
            self.runner.deactivate(scheduler.num_active)

    def _preempt(self, row: int) -> None:
        """Frees a row's pages. It is computed again from its tokens so far, and draws what it would have drawn."""
        request = self.scheduler.active[row]
        self._stash_drawn([row])
        last = self.scheduler.preempt(row, self._tokens(request)[len(request.prompt) :])
        self._free(row, last, num_keys=0)
        self.runner.deactivate(self.scheduler.num_active)
        self.stats.paused_rows += 1

    def _free(self, row: int, last: int, num_keys: int) -> None:
        """Moves row `last` to `row` in state and cache, as the scheduler did; `num_keys` keys go the other way."""
        moves = {last: (row, num_keys)}
        if last != row:
            self.runner.state.move(last, row)
            moves[row] = last, self._longest(row) - 1  # the last token has been drawn, not read
        self.runner.cache.rearrange(moves)

    def _stash_drawn(self, rows: Sequence[int]) -> None:
        """Copies what these rows drew since they were admitted. Reading it now would wait for the rounds in flight."""
        if not rows:
            return
        requests = [self.scheduler.active[row] for row in rows]
        starts = [len(request.tokens) for request in requests]
        counts = [self.scheduler.lengths[row] - start for row, start in zip(rows, starts, strict=True)]
        drawn = self.runner.state.drawn(rows, starts, max(counts))
        self._stash.append(([request.row_id for request in requests], counts, *drawn))
        self.stats.completion_tokens += sum(counts)

    def _read_back(self) -> None:
        """Reads what was stashed."""
        for row_ids, counts, *drawn in self._stash:  # host sync
            for row_id, count, *values in zip(row_ids, counts, *(tensor.tolist() for tensor in drawn), strict=True):
                outputs = self.completions[row_id], self.logprobs[row_id], self.policy_logprobs[row_id]
                for output, new in zip(outputs, values, strict=True):
                    output += new[:count]
        self._stash.clear()

    def _tokens(self, request: Request) -> tuple[int, ...]:
        """All tokens of a row that was stashed."""
        self._read_back()
        return (*request.prompt, *self.completions[request.row_id])

    def _admit(self) -> None:
        """Gives free rows to waiting requests, and computes the keys of their prompts that no row holds."""
        scheduler, admission = self.scheduler, Admission(self.scheduler, self.prefix_cache)
        rows = scheduler.admit(admission.fits)
        if not rows:
            return
        self._prefills.append(clock := Clock(self.runner.state.tokens.device))
        clock.mark()
        for row in rows:
            self._assign(row, scheduler.active[row])
        for sources in (admission.cached, admission.shared):  # the second may start from the first
            self.prefix_cache.assign(sources)
            self._fill(list(sources), [num_tokens for _, num_tokens in sources.values()])
        self.stats.reused_prompt_tokens += sum(
            num_tokens for row, (_, num_tokens) in admission.cached.items() if not scheduler.active[row].done
        )
        clock.mark()

    def _assign(self, row: int, request: Request) -> None:
        self.runner.state.assign(row, request.prompt, request.limit, request.row_id, request.done)

    def _fill(self, rows: list[int], starts: list[int]) -> None:
        """Computes the keys of these rows' tokens from `starts` on."""
        ends = [self.scheduler.lengths[row] - 1 for row in rows]
        if self.recurrent and rows:  # rows with the same prompt start from the states at its end
            prompts = [len(self.scheduler.active[row].prompt) - 1 for row in rows]
            self._fill_until(prompts, rows, starts)
            self.runner.cache.mark_prompts(rows, prompts)
            starts = prompts
        self._fill_until(ends, rows, starts)

    def _fill_until(self, ends: list[int], rows: list[int], starts: list[int]) -> None:
        for spans in self._prefill_batches([Span(*span) for span in zip(rows, starts, ends, strict=True)]):
            self._prefill(spans)
            resumed = [span.width for span in spans if self.scheduler.active[span.row].done]
            self.stats.recomputed_tokens += sum(resumed)

    def _prefill_batches(self, spans: list[Span]) -> Iterator[list[Span]]:
        """Splits rows into forwards of similar lengths and bounded size; fresh rows have forwards of their own.

        Lengths are equal where padding would change a recurrent state.
        """
        batch: list[Span] = []
        for span in sorted((span for span in spans if span.width), key=lambda span: (span.start > 0, span.width)):
            too_large = (len(batch) + 1) * span.width > PREFILL_TOKENS
            other_width = self.recurrent and bool(batch) and span.width != batch[0].width
            if batch and (too_large or other_width or (span.start > 0) != (batch[0].start > 0)):
                yield batch
                batch = []
            batch.append(span)
        if batch:
            yield batch

    def _prefill(self, spans: list[Span]) -> None:
        """Keys and values of all tokens but the last, so that the first round is an ordinary one."""
        runner, device = self.runner, self.runner.state.tokens.device
        for span in spans:
            runner.cache.reserve(span.row, span.end)
        rows, starts, ends = to_device(list(zip(*spans, strict=True)), device)
        longest, num_slots = max(span.width for span in spans), max(span.end for span in spans)
        fresh = spans[0].start == 0
        width = longest if fresh else min(longest, max(1, PREFILL_SCORES // (len(spans) * num_slots)))
        for offset in range(0, longest, width):
            runner.prefill(rows, starts + offset, ends, min(width, longest - offset), num_slots, fresh)

    def _report(self, gamma: int, seconds: float) -> None:
        assert self.on_round is not None
        in_flight = sum(n - len(r.tokens) for n, r in zip(self.scheduler.lengths, self.scheduler.active, strict=True))
        tokens = self.stats.completion_tokens + in_flight
        self.on_round(Progress(self.scheduler.num_unfinished, tokens, tokens / seconds, gamma))
