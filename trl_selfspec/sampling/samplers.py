"""Samplers: how tokens are drawn from processed scores and how drafts are verified.

There is one way to draw, Gumbel-max: the token whose score plus noise is largest. The noise depends on (seed, row,
position, purpose) alone, so a row never sees its neighbours. Nothing here waits for the device, and whatever outlives
a call lies in tensors at fixed addresses, so that calls can be captured in CUDA graphs.

On GPUs the functions of this module run compiled by torch.compile, on CPUs in `kernels/cpu/sampling.c` or eagerly.
"""

import functools
from collections.abc import Callable
from typing import Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu import sampling as cpu
from trl_selfspec.kernels.triton_support import runs_triton
from trl_selfspec.sampling.rejection import verify_coupled, verify_rejection
from trl_selfspec.sampling.rng import Purpose, gumbel, random_key, uniform


FEWEST_ROWS = 16  # that a draft buffer has room for

P = ParamSpec("P")
R = TypeVar("R")


class Draw(NamedTuple):
    tokens: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) fp32, NaN where the distribution is not finite


class VerifyResult(NamedTuple):
    """Of a round: row b yields `tokens[b, : num_accepted[b] + 1]`."""

    num_accepted: Tensor  # (B,) int64
    tokens: Tensor  # (B, γ+1) int64: accepted drafts, the recovered or bonus token; what follows means nothing
    logprobs: Tensor  # (B, γ+1) fp32, of the tokens under the target's distribution; NaN where that is not finite


class Sampler(Protocol):
    """How tokens are drawn and drafts verified."""

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Draw:
        """Tokens (B,) of a plain round, from processed scores (B, V)."""
        ...

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Draw:
        """The next draft tokens (B,) from the drafter's processed scores (B, V); `step` () counts those before."""
        ...

    def propose_several(self, scores: Tensor, row_ids: Tensor, positions: Tensor, starts: Tensor) -> Draw:
        """Draft tokens (B, T) of T positions at once, from scores (B, T, V); `starts` (B,) counts those before.

        They take the place of what was proposed for these positions before.
        """
        ...

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> VerifyResult:
        """Verifies the (B, γ) drafts of steps 0..γ-1 by the target's scores (B, γ+1, V)."""
        ...


class RejectionSampler:
    """Leviathan et al. 2023 (arXiv 2211.17192): the policy's distribution, at the highest acceptance.

    Args:
        seed: () int64; a later seed is to be written into it.
        longest_draft: the largest γ.
    """

    def __init__(self, seed: Tensor, longest_draft: int) -> None:
        self.seed = seed
        self.drafts = DraftBuffer(longest_draft)

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Draw:
        return sample(scores, self.seed, row_ids, positions, Purpose.TOKEN)

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Draw:
        self.drafts.of(scores).index_copy_(1, step[None], scores.softmax(-1)[:, None])
        return sample(scores, self.seed, row_ids, positions, Purpose.DRAFT)

    def propose_several(self, scores: Tensor, row_ids: Tensor, positions: Tensor, starts: Tensor) -> Draw:
        rows, offsets = (torch.arange(size, device=scores.device) for size in positions.shape)
        self.drafts.of(scores[:, 0])[rows[:, None], starts[:, None] + offsets] = scores.softmax(-1)
        return _sample_positions(scores, self.seed, row_ids, positions, Purpose.DRAFT)

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> VerifyResult:
        draft_probs = self.drafts.of(scores[:, 0])[:, : drafts.shape[1]]
        return verify_by_rejection(scores, drafts, draft_probs, self.seed, row_ids, positions)


class CoupledSampler:
    """Daliri, Musco, Suresh 2024 (arXiv 2408.07978): every token is the one plain sampling gives for this seed."""

    def __init__(self, seed: Tensor | None, longest_draft: int = 0) -> None:
        self.seed = seed

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Draw:
        return sample(scores, self.seed, row_ids, positions, Purpose.TOKEN)

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Draw:
        return self.draw(scores, row_ids, positions)

    def propose_several(self, scores: Tensor, row_ids: Tensor, positions: Tensor, starts: Tensor) -> Draw:
        return _sample_positions(scores, self.seed, row_ids, positions, Purpose.TOKEN)

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> VerifyResult:
        return verify_by_coupling(scores, drafts, self.seed, row_ids, positions)


class GreedySampler(CoupledSampler):
    """Greedy decoding: the coupled rule without noise."""

    def __init__(self) -> None:
        super().__init__(None)


class DraftBuffer:
    """Draft distributions kept for verification, in static buffers; smaller batches are views of larger ones.

    Args:
        longest_draft: the largest γ.
    """

    def __init__(self, longest_draft: int) -> None:
        self._longest_draft = longest_draft
        self._by_rows: dict[int, Tensor] = {}

    def of(
        self,
        scores: Tensor,  # (B, V)
    ) -> Tensor:  # (B, longest γ, V), dtype of the scores
        """The probabilities of this batch size's drafts."""
        num_rows, vocab_size = scores.shape
        if num_rows not in self._by_rows:
            whole = next((buffer for rows, buffer in self._by_rows.items() if rows > num_rows), None)
            if whole is None:  # with room for more: the first to be speculated on are few
                size = max(FEWEST_ROWS, 1 << (num_rows - 1).bit_length())
                self._by_rows[size] = whole = scores.new_empty((size, self._longest_draft, vocab_size))
            self._by_rows[num_rows] = whole[:num_rows]
        return self._by_rows[num_rows]


def compiled_on_gpu(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Compiles a function by torch.compile when it first gets scores of a GPU; on CPUs it runs as it is written.

    Sizes are dynamic, so that batches of all sizes share few variants. None is compiled within a CUDA graph's capture,
    since `GraphPool` runs every program once before it captures it.
    """

    @functools.cache
    def compiled() -> Callable[Concatenate[Tensor, P], R]:
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(scores: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return (compiled() if runs_triton(scores.device) else function)(scores, *args, **kwargs)

    return run


@compiled_on_gpu
def sample(
    scores: Tensor,  # (B, V), the distribution is their softmax
    seed: Tensor | None,  # () int64; None: no noise, which is greedy decoding
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B,) int64
    purpose: Purpose,
) -> Draw:
    return _gumbel_max(scores, None if seed is None else random_key(seed, row_ids, positions, purpose))


@compiled_on_gpu
def verify_by_rejection(
    scores: Tensor,  # (B, γ+1, V), the target's
    drafts: Tensor,  # (B, γ) int64
    draft_probs: Tensor,  # (B, γ, V)
    seed: Tensor,  # () int64
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B, γ+1) int64
) -> VerifyResult:
    """`rejection.verify_rejection` with keyed numbers."""
    gamma = drafts.shape[1]

    def draw(probs: Tensor, num_accepted: Tensor) -> Tensor:
        is_bonus = (num_accepted == gamma).long()
        purpose = is_bonus * Purpose.TOKEN.value + (1 - is_bonus) * Purpose.RECOVER.value
        position = positions.gather(1, num_accepted[:, None])[:, 0]
        return _gumbel_max(probs.log(), random_key(seed, row_ids, position, purpose)).tokens

    u = uniform(random_key(seed, row_ids[:, None], positions[:, :gamma], Purpose.ACCEPT))
    num_accepted, tokens = verify_rejection(drafts, draft_probs, scores.softmax(-1), u, draw)
    return VerifyResult(num_accepted, tokens, _logprobs(scores, tokens))


def verify_by_coupling(
    scores: Tensor,  # (B, γ+1, V), the target's
    drafts: Tensor,  # (B, γ) int64
    seed: Tensor | None,  # () int64; None: no noise
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B, γ+1) int64
) -> VerifyResult:
    """`rejection.verify_coupled` with keyed noise."""
    tokens, logprobs = _sample_positions(scores, seed, row_ids, positions, Purpose.TOKEN)
    return VerifyResult(*verify_coupled(drafts, tokens), logprobs)


def _sample_positions(
    scores: Tensor,  # (B, T, V)
    seed: Tensor | None,  # () int64; None: no noise
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B, T) int64
    purpose: Purpose,
) -> Draw:  # (B, T)
    """`sample` of several positions. They are drawn like rows: one compiled function does both."""
    rows = row_ids[:, None].expand_as(positions)
    draws = sample(scores.flatten(0, 1), seed, rows.flatten(), positions.flatten(), purpose)
    return Draw(*(of_rows.view(positions.shape) for of_rows in draws))


@compiled_on_gpu
def token_logprobs(
    scores: Tensor,  # (..., V)
    tokens: Tensor,  # (...) int64
    temperature: float = 1.0,
) -> Tensor:  # (...) fp32
    """`log_softmax(scores / temperature)` of the given tokens."""
    return _logprobs(scores.float() / temperature, tokens)


def _gumbel_max(
    scores: Tensor,  # (..., V)
    keys: Tensor | None,  # (...) int64; None: no noise
) -> Draw:
    """The token whose score plus noise is largest, the lowest where they tie, and its log-probability."""
    if cpu.is_supported(scores):
        tokens, total = cpu.draw(scores, keys)
        return Draw(tokens, _at(scores, tokens) - total)
    noisy = scores if keys is None else scores + gumbel(keys, scores.shape[-1])
    tokens = noisy.argmax(-1)
    return Draw(tokens, _logprobs(scores, tokens))


def _logprobs(scores: Tensor, tokens: Tensor) -> Tensor:
    total = cpu.logsumexp(scores) if cpu.is_supported(scores) else scores.logsumexp(-1)
    return _at(scores, tokens) - total


def _at(scores: Tensor, tokens: Tensor) -> Tensor:
    return scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
