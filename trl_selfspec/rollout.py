"""The loop this project is about: decide -> draft -> verify -> commit -> retire."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from trl_selfspec.controller import Controller
from trl_selfspec.rounds import RoundResult, RoundRunner
from trl_selfspec.scheduler import Request, Scheduler
from trl_selfspec.stats import RolloutStats


PREFILL_TOKENS = 4096  # padded tokens per prefill forward: bounds its activations
SLOT_QUANTUM = 16  # attention reads a multiple of this many slots, so that shapes repeat over rounds


@dataclass(frozen=True)
class Progress:
    """Where a rollout stands, after each round."""

    unfinished: int
    completed_tokens: int
    tokens_per_s: float
    num_speculative_tokens: int  # draft length of the last round; 0 is a plain round


@dataclass
class Rollout:
    """One `generate` call. `completions[i]` and the log-probabilities belong to the i-th prompt."""

    runner: RoundRunner
    scheduler: Scheduler
    controller: Controller
    prepare_drafter: Callable[[], float]  # makes the drafter current; returns the seconds it took
    drafter_is_current: bool = False
    on_round: Callable[[Progress], None] | None = None
    stats: RolloutStats = field(default_factory=RolloutStats)

    def __post_init__(self) -> None:
        num_rows = self.scheduler.num_unfinished
        self.completions: list[list[int]] = [[] for _ in range(num_rows)]
        self.logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        self.policy_logprobs: list[list[float]] = [[] for _ in range(num_rows)]

    def run(self) -> None:
        start = time.perf_counter()
        self.controller.begin_rollout(self.drafter_is_current)
        self._admit()
        while self.scheduler.active:
            gamma = self.controller.choose(self.scheduler.num_active)
            result = self._speculate(gamma) if gamma else self._decode()
            self._retire(result)
            self._admit()
            if self.on_round is not None:
                self._report(gamma, time.perf_counter() - start)
        self.stats.rollout_s += time.perf_counter() - start

    def _decode(self) -> RoundResult:
        runner, num_rows = self.runner, self.scheduler.num_active
        num_slots = self._reserve(lookahead=0)
        runner.clock.start()
        result = runner.plain(num_rows, num_slots)
        runner.clock.mark()
        (seconds,) = runner.clock.laps()
        self.controller.observe_plain(num_rows, seconds)
        self.stats.add_plain_round(num_rows, seconds)
        return result

    def _speculate(self, gamma: int) -> RoundResult:
        runner, num_rows = self.runner, self.scheduler.num_active
        requantize_s = self.prepare_drafter()
        self.controller.observe_requantize(requantize_s)
        self.stats.requantize_s += requantize_s
        self.stats.rollout_s -= requantize_s  # counted as refresh_s
        if self.stats.num_rounds_speculative == 0:
            self.stats.toggle_active_sequences_sum += self.scheduler.num_unfinished
            self.stats.toggle_count += 1
        num_slots = self._reserve(lookahead=gamma)
        runner.clock.start()
        result = runner.speculative(num_rows, gamma, num_slots)
        runner.clock.mark()
        draft_s, verify_s = runner.clock.laps()
        accepted = [sum(n > i for n in result.accepted) for i in range(gamma)]
        examined = [num_rows, *accepted[:-1]]
        self.controller.observe_speculative(num_rows, gamma, draft_s, verify_s, accepted, examined)
        plain_s = self.controller.plain_seconds(num_rows)
        committed = sum(result.emitted)
        self.stats.add_speculative_round(num_rows, gamma, committed, draft_s, verify_s, accepted, examined, plain_s)
        if result.draft_nan:
            self.stats.draft_nan_rounds += 1
            self.controller.disable("the drafter's logits are not finite")
        return result

    def _reserve(self, lookahead: int) -> int:
        """Makes room for this round's writes; returns how many slots attention has to read."""
        cache, lengths = self.runner.cache, self.scheduler.lengths
        if not cache.dense:
            for row, length in enumerate(lengths):
                cache.reserve(row, length + lookahead)
        longest = max(lengths) + lookahead
        return min(-(-longest // SLOT_QUANTUM) * SLOT_QUANTUM, cache.row_capacity)

    def _retire(self, result: RoundResult) -> None:
        """Stores finished rows and compacts: from the last row down, so that a row that moves has been seen."""
        if result.target_nan:
            raise ValueError(
                "The policy's logits are not finite, so no token can be drawn; check for NaN in its weights (a loss "
                "that diverged, a learning rate that is too high, fp16 overflow)."
            )
        scheduler, state, cache = self.scheduler, self.runner.state, self.runner.cache
        for row, emitted in enumerate(result.emitted):
            scheduler.lengths[row] += emitted
        for row in range(scheduler.num_active - 1, -1, -1):
            if not result.finished[row]:
                continue
            self._store(row)
            if (sibling := scheduler.waiting_sibling(row)) is not None:  # its prompt's keys are in place
                scheduler.replace(row, sibling)
                self._place(row, sibling)
                continue
            cache.release(row)
            if (last := scheduler.retire(row)) != row:
                state.move(last, row)
                cache.move(last, row, scheduler.lengths[row])

    def _store(self, row: int) -> None:
        request, end = self.scheduler.active[row], self.scheduler.lengths[row]
        new, state = slice(len(request.prompt), end), self.runner.state
        self.completions[request.row_id] = state.tokens[row, new].tolist()
        self.logprobs[request.row_id] = state.logprobs[row, new].tolist()
        self.policy_logprobs[request.row_id] = state.policy_logprobs[row, new].tolist()
        self.stats.num_rows += 1
        self.stats.prompt_tokens += len(request.prompt)
        self.stats.completion_tokens += end - len(request.prompt)

    def _admit(self) -> None:
        rows = self.scheduler.admit()
        if not rows:
            return
        start = time.perf_counter()
        for row in rows:
            self._place(row, self.scheduler.active[row])
        groups = self.scheduler.prefix_groups(rows)
        new = [holder for holder, _ in groups if holder >= rows[0]]
        for chunk in self._prefill_chunks(new):
            self._prefill(chunk)
        for holder, members in groups:
            self.runner.cache.share_prefix(holder, members, len(self.scheduler.active[holder].prompt) - 1)
        self.stats.prefill_s += time.perf_counter() - start

    def _place(self, row: int, request: Request) -> None:
        self.runner.state.admit(row, request.prompt, request.limit, request.row_id)

    def _prefill_chunks(self, rows: list[int]) -> Iterator[list[int]]:
        """Splits rows into forwards of similar lengths and bounded size."""
        lengths = {row: len(self.scheduler.active[row].prompt) - 1 for row in rows}
        chunk: list[int] = []
        for row in sorted((row for row in rows if lengths[row]), key=lengths.__getitem__):
            if chunk and (len(chunk) + 1) * lengths[row] > PREFILL_TOKENS:
                yield chunk
                chunk = []
            chunk.append(row)
        if chunk:
            yield chunk

    def _prefill(self, rows: list[int]) -> None:
        """Keys and values of all prompt tokens but the last, so that the first round is an ordinary one."""
        runner = self.runner
        lengths = [len(self.scheduler.active[row].prompt) - 1 for row in rows]
        for row, length in zip(rows, lengths, strict=True):
            runner.cache.reserve(row, length)
        device = runner.state.tokens.device
        runner.prefill(torch.tensor(rows, device=device), torch.tensor(lengths, device=device), max(lengths))

    def _report(self, gamma: int, seconds: float) -> None:
        assert self.on_round is not None
        in_flight = sum(n - len(r.prompt) for n, r in zip(self.scheduler.lengths, self.scheduler.active, strict=True))
        tokens = self.stats.completion_tokens + in_flight
        self.on_round(Progress(self.scheduler.num_unfinished, tokens, tokens / seconds, gamma))
