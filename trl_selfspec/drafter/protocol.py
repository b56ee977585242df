"""What the engine asks of a drafter. Another kind needs no change outside a file of its own and `_make_drafters`."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from trl_selfspec.control.drafters import DrafterTraits
from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.sampling.samplers import Sampler


class DraftError(RuntimeError):
    """A drafter could not be made ready, or failed in a draft; plain rounds need none."""


class Batch(NamedTuple):
    """The rows of a round: the active ones, and others that emit nothing where a captured round is for more rows."""

    tokens: Tensor  # (B, capacity) int64; a draft is written behind the row's length
    lengths: Tensor  # (B,) int64
    row_ids: Tensor  # (B,) int64, each row's index among the prompts of the rollout
    num_drafted: Tensor  # (B,) int64, drafts behind each row's length; for a drafter of several steps to count
    draft_nan: Tensor  # (B,) bool, to be set where a draft was drawn from logits that are not finite


class DraftRunner(Protocol):
    """What a drafter may use of the engine in a draft step."""

    sampler: Sampler

    def forward(self, model: nn.Module, positions: Tensor, num_slots: int) -> Tensor:
        """Logits (B, T, V) of the first B rows' tokens at positions (B, T), over the target's cache."""
        ...

    def process(self, logits: Tensor, lengths: Tensor) -> Tensor:
        """Scores (B, T, V) whose softmax is the distribution to draw from, as for the target's logits."""
        ...


class Drafter(Protocol):
    """Proposes tokens behind every row's length.

    What it proposes decides how fast tokens come, and never which tokens come or with what probability.

    Attributes:
        traits: its name, and what the controller assumes of it before there are measurements.
        has_distribution: `propose` or `propose_several` of `runner.sampler` draws its drafts, and `verify` of the same
            sampler verifies them. Otherwise they are known tokens, verified by the target's own draws.
    """

    traits: DrafterTraits
    has_distribution: bool

    @property
    def is_ready(self) -> bool:
        """Whether `prepare` has nothing to do."""
        return True

    @property
    def context(self) -> str:
        """A circumstance of this rollout on which acceptance depends."""
        return ""

    @property
    def nbytes(self) -> int:
        """Bytes of the device's memory that it holds."""
        return 0

    def estimate_seconds(self) -> float:
        """What the first `prepare` should take."""
        return 0.0

    def request_update(self) -> None:
        """The target's weights have changed."""

    def begin_rollout(self, prompts: Sequence[Sequence[int]], width: int, keep: bool) -> bool:
        """Announces a rollout.

        Args:
            prompts: of each row id.
            width: tokens that a row can hold.
            keep: later rollouts may go on with these rows.

        Returns:
            Whether tensors that captured rounds read have moved.
        """
        return False

    def prepare(self) -> tuple[float, bool]:
        """Does what is due before the first draft of a rollout.

        Returns:
            Seconds it took, and whether it will take about as long next time.

        Raises:
            DraftError: it can't be done. Later calls try again.
        """
        return 0.0, True

    def bind(self, cache: PagedCache | None) -> None:
        """Drafts over this cache from here on; `None`: lets go of it."""

    @abstractmethod
    def num_steps(self, gamma: int) -> int:
        """Steps that make a draft of γ tokens."""

    @property
    @abstractmethod
    def program(self) -> str:
        """A name for its step. Captured steps of one name and size are the same."""

    @abstractmethod
    def step(self, runner: DraftRunner, batch: Batch, num_slots: int, gamma: int) -> Tensor:
        """One step of a draft of γ tokens; returns tokens that it wrote.

        It can be captured in a CUDA graph: it waits for nothing, and reads and writes tensors at fixed addresses.
        """

    def observe(self, batch: Batch, positions: Tensor, tokens: Tensor, emitted: Tensor) -> None:
        """Takes note of a round, as a part of it: row b got `tokens[b, : emitted[b]]` at `positions[b]`.

        It is captured with the round, like `step`. `batch.lengths` count the new tokens.
        """

    def end_rollout(self, completions: Sequence[Sequence[int]], stats: RolloutStats) -> None:
        """Gets the completion of each row id, and may count what only it knows."""

    def release(self) -> None:
        """Frees what it holds."""
