"""How tokens are drawn from processed scores and how drafts are judged: rejection, coupled, greedy.

Every draw depends on (seed, row, position) alone, so a row never sees its neighbours.
"""

from typing import Protocol

from torch import Tensor

from trl_selfspec.sampling import ops as draws
from trl_selfspec.sampling.ops import Draw, Memory, Outcome, Proposal


FEWEST_ROWS = 16  # that what drafts leave has room for


class Sampler(Protocol):
    """How tokens are drawn and drafts judged. Draws depend on (seed, row, position) alone.

    Whatever outlives a call lies in tensors at fixed addresses, so that calls can be captured in CUDA graphs.
    """

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Draw:
        """Tokens (B,) of a plain round, from processed scores (B, V)."""
        ...

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Proposal:
        """The next draft tokens (B,) from the drafter's processed scores (B, V); `step` () counts those before."""
        ...

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Outcome:
        """Judges the (B, γ) proposals of steps 0..γ-1 by the target's scores (B, γ+1, V)."""
        ...


class RejectionSampler:
    """Leviathan et al. 2023 (arXiv 2211.17192): the policy's law, at the highest acceptance.

    Args:
        seed: () int64; a later seed is to be written into it.
        longest_draft: the largest γ.
    """

    def __init__(self, seed: Tensor, longest_draft: int) -> None:
        self.seed, self.longest_draft = seed, longest_draft
        self._memory: dict[int, Memory] = {}  # by B

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Draw:
        return draws.sample(scores, self.seed, row_ids, positions)

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Proposal:
        return draws.propose(scores, self.seed, row_ids, positions, step, self._remember(scores))

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Outcome:
        return draws.judge(drafts, self._memory[len(drafts)], scores, self.seed, row_ids, positions)

    def _remember(self, scores: Tensor) -> Memory:
        """A round's own tensors: rounds of fewer rows share those of more."""
        num_rows = len(scores)
        if num_rows not in self._memory:
            whole = next((memory for rows, memory in self._memory.items() if rows > num_rows), None)
            if whole is None:  # with room for more: the first to be speculated on are few
                size = max(FEWEST_ROWS, 1 << (num_rows - 1).bit_length())
                self._memory[size] = whole = Memory.like(scores, self.longest_draft, size)
            self._memory[num_rows] = whole.of_first(num_rows)
        return self._memory[num_rows]


class CoupledSampler:
    """Daliri, Musco, Suresh 2024 (arXiv 2408.07978): every token is the one plain sampling gives for this seed."""

    def __init__(self, seed: Tensor | None, longest_draft: int = 0) -> None:
        self.seed = seed

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Draw:
        return draws.sample_coupled(scores, self.seed, row_ids, positions)

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Proposal:
        return draws.propose_coupled(scores, self.seed, row_ids, positions)

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Outcome:
        return draws.judge_coupled(drafts, scores, self.seed, row_ids, positions)


class GreedySampler(CoupledSampler):
    """Greedy decoding: the coupled rule without noise."""

    def __init__(self) -> None:
        super().__init__(None)
