"""How tokens are drawn from processed scores and how drafts are judged: rejection, coupled, greedy.

Every draw depends on (seed, row, position) alone, so a row never sees its neighbours.
"""

from typing import Protocol

import torch
from torch import Tensor

from trl_selfspec.rejection import Verdict, verify_coupled, verify_rejection
from trl_selfspec.sampling import Purpose, gumbel, sample_inverse_cdf, uniform


class Verification(Protocol):
    """How tokens are drawn and drafts judged. Draws depend on (seed, row, position) alone."""

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B,) of a plain round, from processed scores (B, V)."""
        ...

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
        """The next draft tokens (B,) from the drafter's processed scores (B, V)."""
        ...

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Verdict:
        """Judges the (B, γ) proposals since the last call by the target's scores (B, γ+1, V)."""
        ...


class RejectionVerification:
    """Leviathan et al. 2023 (arXiv 2211.17192): the policy's law, at the highest acceptance."""

    def __init__(self, seed: Tensor) -> None:
        self.seed = seed
        self._draft_probs: list[Tensor] = []

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
        return sample_inverse_cdf(scores.softmax(-1), uniform(self.seed, row_ids, positions, Purpose.TOKEN))

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
        self._draft_probs.append(scores.softmax(-1))
        return sample_inverse_cdf(self._draft_probs[-1], uniform(self.seed, row_ids, positions, Purpose.DRAFT))

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Verdict:
        draft_probs, self._draft_probs = torch.stack(self._draft_probs, dim=1), []
        gamma = drafts.shape[1]
        purposes = torch.tensor([Purpose.ACCEPT, Purpose.RECOVER, Purpose.TOKEN], device=drafts.device)
        accept, recover, token = uniform(self.seed, row_ids[:, None, None], positions[..., None], purposes).unbind(-1)
        resample = torch.cat([recover[:, :gamma], token[:, gamma:]], dim=1)
        return verify_rejection(drafts, draft_probs, scores.softmax(-1), accept[:, :gamma], resample)


class CoupledVerification:
    """Daliri, Musco, Suresh 2024 (arXiv 2408.07978): every token is the one plain sampling gives for this seed."""

    def __init__(self, seed: Tensor) -> None:
        self.seed = seed

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
        return (scores + gumbel(self.seed, row_ids, positions, scores.shape[-1])).argmax(-1)

    propose = draw

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Verdict:
        return verify_coupled(drafts, self.draw(scores, row_ids[:, None], positions))


class GreedyVerification:
    """Greedy decoding: the coupled rule without noise."""

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Tensor:
        return scores.argmax(-1)

    propose = draw

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Verdict:
        return verify_coupled(drafts, scores.argmax(-1))
