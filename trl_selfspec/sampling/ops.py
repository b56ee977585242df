"""Draws from processed scores and verdicts on drafts, with the log-probabilities of what they yield.

Here are the eager twins; on a GPU that runs Triton the same functions read the scores about once. Every number depends
on (seed, row, position, purpose) alone. Nothing here waits for the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu import sampling as cpu
from trl_selfspec.kernels.triton_support import runs_triton
from trl_selfspec.sampling.rejection import Verdict, verify_coupled, verify_rejection
from trl_selfspec.sampling.rng import Purpose, gumbel, sample_inverse_cdf, uniform


class Draw(NamedTuple):
    tokens: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) fp32, NaN where the law is not finite


class Proposal(NamedTuple):
    tokens: Tensor  # (B,) int64
    broken: Tensor  # (B,) bool: the law is not finite


class Outcome(NamedTuple):
    """Of a round: row b yields `tokens[b, : num_accepted[b] + 1]`."""

    num_accepted: Tensor  # (B,) int64
    tokens: Tensor  # (B, γ+1) int64: accepted drafts, the recovered or bonus token; what follows means nothing
    logprobs: Tensor  # (B, γ+1) fp32, of the tokens under the target's law; NaN where that is not finite


class Memory(NamedTuple):
    """What `propose` leaves for `judge`, at fixed addresses. A GPU must not be handed numbers during a round."""

    laws: Tensor  # (B, longest γ, V), dtype of the scores: the drafter's probabilities, or scores where Triton runs
    summaries: Tensor  # (B, longest γ, 3) fp32: where Triton runs, what it wants to know of each of them
    purposes: Tensor  # (3,) int64, for the twin

    @classmethod
    def like(
        cls,
        scores: Tensor,  # (B, V)
        longest: int,
        num_rows: int | None = None,  # None: B
    ) -> "Memory":
        num_rows = num_rows or len(scores)
        laws = scores.new_empty((num_rows, longest, scores.shape[1]))
        summaries = scores.new_empty((num_rows, longest, 3), dtype=torch.float32)
        purposes = torch.tensor([Purpose.ACCEPT, Purpose.RECOVER, Purpose.TOKEN], device=scores.device)
        return cls(laws, summaries, purposes)

    def of_first(self, num_rows: int) -> "Memory":
        return Memory(self.laws[:num_rows], self.summaries[:num_rows], self.purposes)


def sample(
    scores: Tensor,  # (B, V), the law is their softmax
    seed: Tensor,  # () int64
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B,) int64
) -> Draw:
    """Draws by inverse CDF; never a word of mass 0."""
    if runs_triton(scores.device):
        from trl_selfspec.kernels.triton import sampling

        return Draw(*sampling.sample(scores, seed, row_ids, positions))
    tokens, total = _draw(scores, uniform(seed, row_ids, positions, Purpose.TOKEN))
    return Draw(tokens, scores.gather(-1, tokens[..., None])[..., 0] - total)


def propose(
    scores: Tensor,  # (B, V), the drafter's
    seed: Tensor,  # () int64
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B,) int64
    step: Tensor,  # () int64: how many drafts came before
    memory: Memory,
) -> Proposal:
    """Draws drafts as `sample` would, with numbers of their own, and remembers their law."""
    if runs_triton(scores.device):
        from trl_selfspec.kernels.triton import sampling

        return Proposal(*sampling.propose(scores, seed, row_ids, positions, step, memory))
    memory.laws.index_copy_(1, step[None], scores.softmax(-1)[:, None])
    tokens, total = _draw(scores, uniform(seed, row_ids, positions, Purpose.DRAFT))
    return Proposal(tokens, ~total.isfinite())


def judge(
    drafts: Tensor,  # (B, γ) int64, of `propose` at steps 0..γ-1
    memory: Memory,
    scores: Tensor,  # (B, γ+1, V), the target's
    seed: Tensor,  # () int64
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B, γ+1) int64
) -> Outcome:
    """`rejection.verify_rejection` on the laws of these scores."""
    if runs_triton(scores.device):
        from trl_selfspec.kernels.triton import rejection

        return Outcome(*rejection.verify(drafts, memory, scores, seed, row_ids, positions))
    gamma = drafts.shape[1]
    u = uniform(seed, row_ids[:, None, None], positions[..., None], memory.purposes)
    accept, recover, token = u.unbind(-1)
    resample = torch.cat([recover[:, :gamma], token[:, gamma:]], dim=1)
    draft_probs, target_probs = memory.laws[:, :gamma], scores.softmax(-1)
    return _outcome(verify_rejection(drafts, draft_probs, target_probs, accept[:, :gamma], resample), scores)


def sample_coupled(
    scores: Tensor,  # (B, V)
    seed: Tensor | None,  # () int64; None: no noise, which is greedy decoding
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B,) int64
) -> Draw:
    """The word that is best once Gumbel noise is added; the lowest where they tie."""
    if runs_triton(scores.device):
        from trl_selfspec.kernels.triton import sampling

        _, tokens, logprobs = sampling.best(scores[:, None], seed, row_ids, positions[:, None])
        return Draw(tokens[:, 0], logprobs[:, 0])
    tokens = _noisy(scores, seed, row_ids, positions).argmax(-1)
    return Draw(tokens, _logprobs(scores, tokens))


def propose_coupled(
    scores: Tensor,  # (B, V), the drafter's
    seed: Tensor | None,  # () int64
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B,) int64
) -> Proposal:
    """What `sample_coupled` would draw from these scores."""
    if runs_triton(scores.device):
        tokens, logprobs = sample_coupled(scores, seed, row_ids, positions)
        return Proposal(tokens, logprobs.isnan())
    largest, tokens = _noisy(scores, seed, row_ids, positions).max(-1)
    return Proposal(tokens, ~largest.isfinite())


def judge_coupled(
    drafts: Tensor,  # (B, γ) int64, of `propose_coupled`
    scores: Tensor,  # (B, γ+1, V), the target's
    seed: Tensor | None,  # () int64
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B, γ+1) int64
) -> Outcome:
    """`rejection.verify_coupled` on draws from these scores."""
    if runs_triton(scores.device):
        from trl_selfspec.kernels.triton import sampling

        return Outcome(*sampling.best(scores, seed, row_ids, positions, drafts))
    return _outcome(verify_coupled(drafts, _noisy(scores, seed, row_ids, positions).argmax(-1)), scores)


def token_logprobs(
    scores: Tensor,  # (..., V)
    tokens: Tensor,  # (...) int64
    temperature: float = 1.0,
) -> Tensor:  # (...) fp32
    """`log_softmax(scores / temperature)` of the tokens alone: no result of V words is kept."""
    if runs_triton(scores.device):
        from trl_selfspec.kernels.triton import sampling

        return sampling.token_logprobs(scores, tokens, temperature)
    return _logprobs(scores.float() / temperature, tokens)


def _draw(scores: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens by inverse CDF, and the logarithm of the sum of exp."""
    if cpu.takes(scores):
        return cpu.draw(scores, u)
    return sample_inverse_cdf(scores.softmax(-1), u), scores.logsumexp(-1)


def _logprobs(scores: Tensor, tokens: Tensor) -> Tensor:
    total = cpu.logsumexp(scores) if cpu.takes(scores) else scores.logsumexp(-1)
    return scores.gather(-1, tokens[..., None])[..., 0] - total


def _noisy(scores: Tensor, seed: Tensor | None, row_ids: Tensor, positions: Tensor) -> Tensor:
    if seed is None:
        return scores
    rows = row_ids.view(-1, *[1] * (positions.dim() - 1))
    return scores + gumbel(seed, rows, positions, scores.shape[-1])


def _outcome(verdict: Verdict, scores: Tensor) -> Outcome:
    return Outcome(*verdict, _logprobs(scores, verdict.tokens))
