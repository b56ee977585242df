"""How many draft tokens are accepted: decayed counts per position of the draft."""

from collections.abc import Sequence
from typing import Any

from trl_selfspec.control.constants import PRIOR_WEIGHT, SEED_WEIGHT, SHRINK_WEIGHT
from trl_selfspec.control.saved_state import checked, positive
from trl_selfspec.options import MAX_DRAFT_LENGTH


class Acceptance:
    """Decayed counts of accepted and examined draft tokens per position.

    Args:
        decay: factor per round.
        prior: gives alpha where counts are small, or longer-lived counts that do. With counts, these here are also cut
            to what rounds of the current size add up to, so that the last rows of a rollout are not outweighed by
            earlier, larger batches.
    """

    def __init__(self, decay: float, prior: "Acceptance | float") -> None:
        self.decay = decay
        self._prior = prior
        self.accepted = [0.0] * MAX_DRAFT_LENGTH
        self.examined = [0.0] * MAX_DRAFT_LENGTH

    def add(self, accepted: Sequence[float], examined: Sequence[float], rounds: int = 1) -> None:
        """Adds the counts of one round, `rounds` rounds after the last ones."""
        factor = self.decay**rounds
        if isinstance(self._prior, Acceptance) and self.examined[0] > 0:
            factor = min(factor, examined[0] * self.decay / (1 - self.decay) / self.examined[0])
        self.scale(factor)
        for i, (a, e) in enumerate(zip(accepted, examined, strict=True)):
            self.accepted[i] += a
            self.examined[i] += e

    def scale(self, factor: float) -> None:
        self.accepted = [a * factor for a in self.accepted]
        self.examined = [e * factor for e in self.examined]

    @property
    def alpha(self) -> float:
        prior = self._prior.alpha if isinstance(self._prior, Acceptance) else self._prior
        return (sum(self.accepted) + prior * PRIOR_WEIGHT) / (sum(self.examined) + PRIOR_WEIGHT)

    def tokens_per_round(self, max_gamma: int) -> list[float]:
        """E[tokens per row and round | γ] for γ = 0..max: 1 + Σ_k Π_{i<=k} alpha_i."""
        pooled, survival, expected = self.alpha, 1.0, [1.0]
        for a, e in zip(self.accepted[:max_gamma], self.examined, strict=False):
            survival *= (a + SHRINK_WEIGHT * pooled) / (e + SHRINK_WEIGHT)
            expected.append(expected[-1] + survival)
        return expected

    def restart(self) -> None:
        """Starts over from the ratios of the prior, at little weight."""
        assert isinstance(self._prior, Acceptance)
        self.accepted, self.examined = list(self._prior.accepted), list(self._prior.examined)
        self.scale(min(1.0, SEED_WEIGHT / max(sum(self.examined), 1.0)))

    def restore(self, accepted: Any, examined: Any) -> None:
        """Takes over saved counts.

        Raises:
            ValueError: they are no such counts.
        """
        for counts in (accepted, examined):
            checked(isinstance(counts, list) and len(counts) == MAX_DRAFT_LENGTH, counts)
        self.accepted = [positive(count, or_zero=True) for count in accepted]
        self.examined = [positive(count, or_zero=True) for count in examined]
        checked(all(a <= e for a, e in zip(self.accepted, self.examined, strict=True)), accepted)
