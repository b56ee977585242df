"""How tokens are drawn from processed scores and how drafts are judged: rejection, coupled, greedy.

Every draw depends on (seed, row, position) alone, so a row never sees its neighbours.
"""

from typing import Protocol

import torch
from torch import Tensor

from trl_selfspec.rejection import Verdict, verify_coupled, verify_rejection
from trl_selfspec.sampling import Purpose, gumbel, sample_inverse_cdf, uniform


class Verification(Protocol):
    """How tokens are drawn and drafts judged. Draws depend on (seed, row, position) alone.

    Whatever outlives a call lies in tensors at fixed addresses, so that calls can be captured in CUDA graphs.
    """

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B,) of a plain round, from processed scores (B, V)."""
        ...

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Tensor:
        """The next draft tokens (B,) from the drafter's processed scores (B, V); `step` () counts those before."""
        ...

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Verdict:
        """Judges the (B, γ) proposals of steps 0..γ-1 by the target's scores (B, γ+1, V)."""
        ...


class RejectionVerification:
    """Leviathan et al. 2023 (arXiv 2211.17192): the policy's law, at the highest acceptance.

    Args:
        seed: () int64; a later seed is to be written into it.
        longest_draft: the largest γ.
    """

    def __init__(self, seed: Tensor, longest_draft: int) -> None:
        self.seed, self.longest_draft = seed, longest_draft
        self._purposes = torch.tensor([Purpose.ACCEPT, Purpose.RECOVER, Purpose.TOKEN], device=seed.device)
        self._draft_probs: dict[int, Tensor] = {}  # by B: (B, longest γ, V) fp32

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
        return sample_inverse_cdf(scores.softmax(-1), uniform(self.seed, row_ids, positions, Purpose.TOKEN))

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Tensor:
        num_rows, vocab_size = scores.shape
        if num_rows not in self._draft_probs:
            self._draft_probs[num_rows] = scores.new_empty(num_rows, self.longest_draft, vocab_size)
        probs = scores.softmax(-1)
        self._draft_probs[num_rows].index_copy_(1, step[None], probs[:, None])
        return sample_inverse_cdf(probs, uniform(self.seed, row_ids, positions, Purpose.DRAFT))

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Verdict:
        num_rows, gamma = drafts.shape
        draft_probs = self._draft_probs[num_rows][:, :gamma]
        u = uniform(self.seed, row_ids[:, None, None], positions[..., None], self._purposes)
        accept, recover, token = u.unbind(-1)
        resample = torch.cat([recover[:, :gamma], token[:, gamma:]], dim=1)
        return verify_rejection(drafts, draft_probs, scores.softmax(-1), accept[:, :gamma], resample)


class CoupledVerification:
    """Daliri, Musco, Suresh 2024 (arXiv 2408.07978): every token is the one plain sampling gives for this seed."""

    def __init__(self, seed: Tensor, longest_draft: int) -> None:
        self.seed = seed

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
        return (scores + gumbel(self.seed, row_ids, positions, scores.shape[-1])).argmax(-1)

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Tensor:
        return self.draw(scores, row_ids, positions)

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Verdict:
        return verify_coupled(drafts, self.draw(scores, row_ids[:, None], positions))


class GreedyVerification:
    """Greedy decoding: the coupled rule without noise."""

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
        return scores.argmax(-1)

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Tensor:
        return scores.argmax(-1)

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Verdict:
        return verify_coupled(drafts, scores.argmax(-1))
