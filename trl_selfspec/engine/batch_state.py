"""The rows of a batch on the device: their tokens, log-probabilities, lengths and limits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_selfspec.drafter.protocol import Batch
from trl_selfspec.utils import to_device


class BatchState:
    """The rows being decoded. Row r's keys and values are valid for slots below `lengths[r] - 1`.

    Drafts are written behind a row's length, where the logits processor finds each position's own history. A row whose
    length is its limit emits nothing. A row that ended otherwise goes on until the host has read of it: what it draws
    until then lies behind its end.
    """

    def __init__(self, max_rows: int, capacity: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens = zeros(max_rows, capacity)
        self.logprobs = zeros(max_rows, capacity, dtype=torch.float32)
        self.policy_logprobs = zeros(max_rows, capacity, dtype=torch.float32)
        self.lengths, self.prompt_lengths, self.limits, self.row_ids = (zeros(max_rows) for _ in range(4))
        self.num_drafted = zeros(max_rows)  # drafts behind each row's length
        self.draft_nan = zeros(max_rows, dtype=torch.bool)  # one of these drafts was drawn from non-finite logits
        self.deactivate(0)

    @property
    def max_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]

    def batch(self, num_rows: int) -> Batch:
        """The first rows, as drafters see them."""
        state = self.tokens, self.lengths, self.row_ids, self.num_drafted
        tokens, lengths, row_ids, num_drafted = (tensor[:num_rows] for tensor in state)
        return Batch(tokens, lengths, row_ids, num_drafted, self.draft_nan[:num_rows])

    def assign(self, row: int, prompt: Sequence[int], limit: int, row_id: int, done: Sequence[int] = ()) -> None:
        """Gives `row` a prompt and the tokens `done` generated before; it ends at `limit` tokens at the latest."""
        length = len(prompt) + len(done)
        self.tokens[row, :length] = to_device([*prompt, *done], self.tokens.device)
        self.lengths[row], self.prompt_lengths[row] = length, len(prompt)
        self.limits[row], self.row_ids[row] = limit, row_id

    def move(self, source: int, target: int) -> None:
        for tensor in vars(self).values():
            if tensor.dim():
                tensor[target] = tensor[source]

    def drawn(self, rows: Sequence[int], starts: Sequence[int], width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies `width` tokens of each of these rows, from `starts` on, and both log-probabilities: `(rows, width)`.

        Positions beyond the capacity repeat the last one.
        """
        index, first = to_device([rows, starts], self.tokens.device).unsqueeze(-1)
        positions = (first + torch.arange(width, device=first.device)).clamp_(max=self.capacity - 1)
        return self.tokens[index, positions], self.logprobs[index, positions], self.policy_logprobs[index, positions]

    def forget_drafts(self) -> None:
        """The next round begins at every row's length."""
        self.num_drafted.zero_()
        self.draft_nan.zero_()

    def deactivate(self, first: int) -> None:
        """Rows from `first` on emit nothing until they are assigned."""
        self.lengths[first:] = self.prompt_lengths[first:] = self.limits[first:] = 1
