"""Two-level drafts: the quantized policy drafts along what a suffix match guesses, several tokens in one forward.

For policies so large that a forward of the quantized one is dear, and whose drafts are worth it. The policy verifies
the quantized policy's own draws; a guess only decides what these are given for a prefix.
"""

import torch
from torch import Tensor

from trl_selfspec.control.drafters import DrafterTraits
from trl_selfspec.drafter.matching import MAX_MATCH
from trl_selfspec.drafter.protocol import Batch, Drafter, DraftError, DraftRunner
from trl_selfspec.drafter.quantized_drafter import QuantizedDrafter
from trl_selfspec.drafter.suffix_drafter import SuffixDrafter
from trl_selfspec.kv_cache.paged_cache import PagedCache


# From here on it should beat both of its drafters. An estimate by replayed text, prices of a memory-bound forward and
# 0.97 of quantized drafts accepted, not measured on a GPU: over plain rounds, 1.2 to 1.8 at 1.5B and 7B, where suffix
# drafts alone give more, 2.1 against 2.0 at 14B and 2.4 against 1.9 at 32B, without a history.
FEWEST_PARAMETERS = 10e9


class TwoLevelDrafter(Drafter):
    """Drafts by a `QuantizedDrafter`'s model along a `SuffixDrafter`'s guesses. It has nothing of its own.

    A step guesses what comes behind a row's drafts so far, runs the model once over these guesses, and draws a token
    at each of their positions. The draws up to the first that differs from its guess, that one included, are what the
    model would have drafted token by token; the next step begins behind them. What follows them was given a false
    prefix: the next step draws it again, and after the last one it is a draft of little hope.

    With γ // 2 + 1 positions in each of ⌈γ / 2⌉ steps, each row gets γ drafts, whatever its guesses are worth.

    Exact by `rejection.verify_rejection`: guesses of a step are made of tokens before it, so the distribution at a
    position is known without the numbers of that position, and is the one kept for verification. Whether a draw
    stands or a later step draws again is decided by the drafts before it. Guesses also depend on other rows' tokens,
    which have other numbers, and on the history, whose rollouts had other seeds. A rollout that repeats the seed of
    one in its history is sure of the policy's distribution only with coupled verification, where no draft matters.

    Args:
        quantized: prepared and bound by this one too, in whichever rollouts it drafts.
        suffix: has to be told of rollouts and rounds by the engine.
    """

    # Half a quantized step of a large policy (0.45 to 0.55 of a plain round; an estimate) for each token.
    traits = DrafterTraits("two_level", prior_alpha=0.9, prior_cost=0.25)
    has_distribution = True

    def __init__(self, quantized: QuantizedDrafter, suffix: SuffixDrafter) -> None:
        self.quantized, self.suffix = quantized, suffix

    @property
    def is_ready(self) -> bool:
        return self.quantized.is_ready

    @property
    def context(self) -> str:
        return self.suffix.context

    def estimate_seconds(self) -> float:
        return self.quantized.estimate_seconds()

    def request_update(self) -> None:
        self.quantized.request_update()

    def prepare(self) -> tuple[float, bool]:
        if not self.suffix.nbytes:
            raise DraftError("there are no texts to guess from: suffix drafts were given up")
        was_ready = self.is_ready
        seconds, typical = self.quantized.prepare()
        return seconds, typical and not was_ready

    def bind(self, cache: PagedCache | None) -> None:
        self.quantized.bind(cache)

    def release(self) -> None:
        self.quantized.release()

    def num_steps(self, gamma: int) -> int:
        return (gamma + 1) // 2

    @property
    def program(self) -> str:
        return f"{self.quantized.program} along {self.suffix.program}"

    def step(self, runner: DraftRunner, batch: Batch, num_slots: int, gamma: int) -> Tensor:
        """One forward of T = γ // 2 + 1. Near the draft's end it begins earlier, and draws the last drafts again."""
        assert self.quantized.module is not None, "prepare comes first"
        width = gamma // 2 + 1
        offsets = torch.arange(width, device=batch.lengths.device)
        starts = batch.num_drafted.clamp(max=gamma - width)
        at = (batch.lengths + starts)[:, None] + offsets
        behind = (starts - batch.num_drafted)[:, None] + offsets  # of the drafts so far; below 0: is one of them
        guesses = self._guesses(batch, num_slots, width).gather(1, behind.clamp(min=0))
        guesses = torch.where(behind < 0, batch.tokens.gather(1, at), guesses)
        batch.tokens.scatter_(1, at, guesses)
        scores = runner.process(runner.forward(self.quantized.module, at - 1, num_slots), batch.lengths + starts)
        drafts, logprobs = runner.sampler.propose_several(scores, batch.row_ids, at, starts)
        batch.tokens.scatter_(1, at, drafts)
        batch.draft_nan.logical_or_(logprobs.isnan().any(1))
        as_guessed = (drafts == guesses)[:, :-1].long().cumprod(1).sum(1)
        batch.num_drafted.copy_(starts + as_guessed + 1)
        return drafts

    def _guesses(self, batch: Batch, num_slots: int, width: int) -> Tensor:
        """What may come behind the drafts so far, (B, width)."""
        back = torch.arange(MAX_MATCH, device=batch.lengths.device)
        at = (batch.lengths + batch.num_drafted)[:, None] - 1 - back
        recent = batch.tokens.gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)
        return self.suffix.match(batch, num_slots, width, recent.int())
