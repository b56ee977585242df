"""The device work of a round, which advances every active row by one token (plain) or 1 to γ + 1 (speculative).

There are three kinds of program: a plain round, a drafter's step, and verification. Each reads and writes tensors at
fixed addresses alone, the first rows of `BatchState` among them, so that it can be captured (`cuda_graphs.py`). A
graph may be for more rows than are active: the others emit nothing. The one host sync is `PendingRound.result`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trl_selfspec.control.controller import PLAIN, Choice
from trl_selfspec.drafter.protocol import Drafter, DraftError
from trl_selfspec.engine.batch_state import BatchState
from trl_selfspec.engine.cuda_graphs import CaptureError, GraphPool, Program
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.sampling.logits_processing import BatchedLogitsProcessor
from trl_selfspec.sampling.samplers import Sampler, VerifyResult, token_logprobs
from trl_selfspec.utils import Clock, failures_raised_as


class RoundResult(NamedTuple):
    """What the host needs to schedule and to count, one entry per row."""

    finished: list[bool]
    emitted: list[int]  # tokens the row gained
    accepted: list[int]  # drafts that were accepted, before truncation at EOS or the limit
    draft_nan: int  # rows with a draft from non-finite logits
    target_nan: bool  # a token was drawn from non-finite logits


class PendingRound:
    """A round that the device may still be busy with.

    Attributes:
        num_rows: rows of the round.
        choice: its drafter and draft length.
        steady_state: nothing was warmed up or captured, so its seconds are those of any round of this size.
    """

    def __init__(self, report: Tensor, num_rows: int, choice: Choice, clock: Clock, steady_state: bool) -> None:
        self.num_rows, self.choice, self.steady_state = num_rows, choice, steady_state
        self._clock, self._report, self._copied = clock, report, None
        if report.is_cuda:  # the next replay overwrites it
            self._report = torch.empty(report.shape, dtype=report.dtype, device="cpu", pin_memory=True)
            self._report.copy_(report, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def result(self) -> RoundResult:
        if self._copied is not None:
            self._copied.synchronize()  # host sync: the only one of a round
        *rows, draft_nan, target_nan = self._report.tolist()
        padded = len(rows) // 3
        finished, emitted, accepted = (rows[at : at + self.num_rows] for at in range(0, len(rows), padded))
        return RoundResult([bool(flag) for flag in finished], emitted, accepted, draft_nan, bool(target_nan))

    def laps(self) -> list[float]:
        """Seconds of the drafts, if there were any, and of the target's part."""
        return self._clock.laps()


@dataclass
class ModelRunner:
    """Runs rounds over the first rows of `state`, none of which is active at first. One per rollout.

    Attributes:
        sampler: draws tokens, and drafts that have a distribution.
        token_sampler: draws the same tokens; verifies drafts without a distribution by them.
        observers: drafters that take note of every round.
    """

    target: nn.Module
    cache: PagedCache
    state: BatchState
    logits_processor: BatchedLogitsProcessor
    sampler: Sampler
    token_sampler: Sampler
    observers: Sequence[Drafter]
    max_position: int | None  # largest position the model embeds
    graphs: GraphPool
    prefill_kwargs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._eos = torch.tensor(
            self.logits_processor.eos_token_ids, dtype=torch.int64, device=self.state.tokens.device
        )
        self.state.forget_drafts()  # of a rollout that failed
        self.deactivate(0)

    def deactivate(self, first: int) -> None:
        """Takes rows from `first` on out of the rounds, which may be replays for more rows than are active."""
        self.state.deactivate(first)
        self.cache.deactivate(first)

    def prefill(
        self,
        rows: Tensor,  # (B,)
        starts: Tensor,  # (B,): slots below are written
        ends: Tensor,  # (B,)
        width: int,  # tokens per row in this forward, padding included
        num_slots: int,  # the largest end
        fresh: bool,  # all start at 0
    ) -> None:
        """Computes and writes the keys and values of each row's tokens from `starts` to `ends`."""
        positions = starts[:, None] + torch.arange(width, device=rows.device)
        self.cache.begin(positions, num_slots, rows, ends, fresh)
        tokens = self.state.tokens[rows].gather(1, positions.clamp(max=num_slots - 1))
        self._run(self.target, tokens, positions, **self.prefill_kwargs)

    def plain(self, num_rows: int, num_slots: int) -> PendingRound:
        """One target forward of T = 1."""
        return self._finish(Program("plain", num_rows, num_slots), PLAIN, self._plain, self._clock())

    def speculative(self, drafter: Drafter, num_rows: int, gamma: int, num_slots: int) -> PendingRound:
        """The steps of a draft of γ tokens, then one target forward of T = γ + 1 that verifies; both are timed.

        Raises:
            DraftError: a draft step failed; the rows are as they were before.
        """
        clock, num_steps = self._clock(), drafter.num_steps(gamma)
        same_for_all = 1 < num_steps == gamma  # a step for each token is the same whatever γ
        draft = Program(drafter.program, num_rows, num_slots, 0 if same_for_all else gamma)
        try:
            with failures_raised_as(DraftError, passing=CaptureError):  # the user asked for graphs or an error
                for _ in range(num_steps):
                    self.graphs.run(draft, partial(self._draft, drafter))
        except DraftError:
            self.state.forget_drafts()
            raise
        clock.mark()
        kind, sampler = ("verify", self.sampler) if drafter.has_distribution else ("verify known", self.token_sampler)
        program, choice = Program(kind, num_rows, num_slots, gamma), Choice(gamma, drafter.traits.name)
        return self._finish(program, choice, partial(self._verify, sampler), clock)

    def _clock(self) -> Clock:
        self.graphs.begin_round()
        clock = Clock(self.state.tokens.device)
        clock.mark()
        return clock

    def _finish(
        self, program: Program, choice: Choice, function: Callable[[Program], Tensor], clock: Clock
    ) -> PendingRound:
        report = self.graphs.run(program, function)
        clock.mark()
        return PendingRound(report, program.num_rows, choice, clock, self.graphs.steady_state)

    def _plain(self, program: Program) -> Tensor:
        state, rows = self.state, slice(0, program.num_rows)
        lengths, row_ids = state.lengths[rows], state.row_ids[rows]
        logits = self.forward(self.target, lengths[:, None] - 1, program.num_slots)
        scores = self.process(logits, lengths)
        tokens, logprobs = self.sampler.draw(scores[:, 0], row_ids, lengths)
        return self._commit(VerifyResult(torch.zeros_like(tokens), tokens[:, None], logprobs[:, None]), logits)

    def _draft(self, drafter: Drafter, program: Program) -> Tensor:
        return drafter.step(self, self.state.batch(program.num_rows), program.num_slots, program.gamma)

    def _verify(self, sampler: Sampler, program: Program) -> Tensor:
        state, rows, gamma = self.state, slice(0, program.num_rows), program.gamma
        lengths, row_ids = state.lengths[rows], state.row_ids[rows]
        positions = lengths[:, None] + torch.arange(gamma + 1, device=lengths.device)
        drafts = state.tokens[rows].gather(1, positions[:, :gamma])
        logits = self.forward(self.target, positions - 1, program.num_slots)
        scores = self.process(logits, lengths)
        return self._commit(sampler.verify(drafts, scores, row_ids, positions), logits)

    def forward(self, model: nn.Module, positions: Tensor, num_slots: int) -> Tensor:
        """Logits of the first rows' tokens at these positions, whose keys go to the cache."""
        self.cache.begin(positions, num_slots)
        return self._run(model, self.state.tokens[: len(positions)].gather(1, positions), positions)

    def _run(self, model: nn.Module, tokens: Tensor, positions: Tensor, **kwargs: int) -> Tensor:
        if self.max_position is not None:  # lookahead past the context limit is never kept, only embedded
            positions = positions.clamp(max=self.max_position)
        out = model(input_ids=tokens, position_ids=positions, past_key_values=self.cache, use_cache=True, **kwargs)
        return out.logits

    def process(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """Scores from the logits of positions `lengths`, ..., of the first rows."""
        num_rows = len(lengths)
        return self.logits_processor.process(
            logits, self.state.tokens[:num_rows], lengths, self.state.prompt_lengths[:num_rows]
        )

    def _commit(self, result: VerifyResult, logits: Tensor) -> Tensor:
        """Writes a round's tokens, truncated at the first EOS and at the row's limit; returns the report."""
        state, (num_accepted, tokens, logprobs) = self.state, result
        num_rows, width = tokens.shape
        lengths, limits = state.lengths[:num_rows], state.limits[:num_rows]
        offsets = torch.arange(width, device=tokens.device)
        is_eos = (tokens[..., None] == self._eos).any(-1)  # `isin` waits for the device where there are many
        stops = is_eos & (offsets <= num_accepted[:, None])
        stopped = stops.any(1)
        emitted = torch.where(stopped, stops.int().argmax(1), num_accepted) + 1
        emitted = torch.minimum(emitted, limits - lengths)
        stopped &= (stops & (offsets < emitted[:, None])).any(1)

        positions = lengths[:, None] + offsets
        policy_logprobs = logprobs
        if not self.logits_processor.is_full_softmax:
            policy_logprobs = token_logprobs(logits, tokens, self.logits_processor.temperature)
        state.tokens[:num_rows].scatter_(1, positions, tokens)
        state.logprobs[:num_rows].scatter_(1, positions, logprobs)
        state.policy_logprobs[:num_rows].scatter_(1, positions, policy_logprobs)
        draft_nan = (state.draft_nan[:num_rows] & (lengths < limits)).sum()
        target_nan = (logprobs.isnan() & (offsets < emitted[:, None])).any()
        lengths += emitted
        self.cache.commit(emitted)
        finished = stopped | (lengths >= limits)
        for drafter in self.observers:
            drafter.observe(state.batch(num_rows), positions, tokens, emitted)
        state.forget_drafts()
        flags = torch.stack([draft_nan, target_nan.long()])
        return torch.cat([finished.long(), emitted, num_accepted, flags])
