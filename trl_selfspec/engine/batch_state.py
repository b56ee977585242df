"""The rows of a batch on the device: their tokens, lengths and limits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_selfspec.utils import to_device


class BatchState:
    """The rows being decoded. Row r's keys and values are valid for slots below `lengths[r] - 1`.

    Provisional drafts are written behind a row's length, where the sampling law finds each position's own history.
    A row whose length is its limit emits nothing. One that has ended otherwise may go on until the host has noticed:
    what it draws there lies behind its end.
    """

    def __init__(self, max_rows: int, capacity: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = zeros(max_rows, capacity)
        self.logprobs = zeros(max_rows, capacity, dtype=torch.float32)
        self.policy_logprobs = zeros(max_rows, capacity, dtype=torch.float32)
        self.lengths, self.prompt_lengths, self.limits, self.row_ids = (zeros(max_rows) for _ in range(4))
        self.num_drafted = zeros()  # drafts behind every row's length
        self.draft_nan = zeros(max_rows, dtype=torch.bool)  # one of these drafts came from a law that was not finite
        self.park(0)

    @property
    def max_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]

    def admit(self, row: int, prompt: Sequence[int], limit: int, row_id: int, done: Sequence[int] = ()) -> None:
        """Places a prompt and what was generated before; the row ends at the latest when it holds `limit` tokens."""
        length = len(prompt) + len(done)
        self.tokens[row, :length] = to_device([*prompt, *done], self.tokens.device)
        self.lengths[row], self.prompt_lengths[row] = length, len(prompt)
        self.limits[row], self.row_ids[row] = limit, row_id

    def move(self, source: int, target: int) -> None:
        for tensor in vars(self).values():
            if tensor.dim():
                tensor[target] = tensor[source]

    def reset(self) -> None:
        """Holds no row, and nothing that a rollout which failed left behind."""
        self.park(0)
        self.forget_drafts()

    def forget_drafts(self) -> None:
        """The next round begins at every row's length."""
        self.num_drafted.zero_()
        self.draft_nan.zero_()

    def park(self, first: int) -> None:
        """Takes rows from `first` on out of the rounds."""
        self.lengths[first:] = self.prompt_lengths[first:] = self.limits[first:] = 1
