"""Which prompt occupies which row: host-side bookkeeping of one rollout, no tensors.

Active rows are always rows 0..B-1, so that a round is a forward over a dense batch. Waiting prompts keep their order.
"""

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One completion to generate: `prompt` plus tokens until EOS or until the row holds `limit` tokens."""

    row_id: int
    prompt: tuple[int, ...]
    limit: int


class Scheduler:
    """Active requests by row, and the queue behind them."""

    def __init__(self, requests: list[Request], max_rows: int) -> None:
        self.waiting = deque(requests)
        self.max_rows = max_rows
        self.active: list[Request] = []
        self.lengths: list[int] = []  # tokens each active row holds

    @property
    def num_active(self) -> int:
        return len(self.active)

    @property
    def num_unfinished(self) -> int:
        return len(self.active) + len(self.waiting)

    def admit(self) -> list[int]:
        """Fills free rows from the queue; returns the rows that are new."""
        first = len(self.active)
        while self.waiting and len(self.active) < self.max_rows:
            self._occupy(self.waiting.popleft())
        return list(range(first, len(self.active)))

    def waiting_sibling(self, row: int) -> Request | None:
        """The next waiting request if it has this row's prompt: it may take the row over with its prompt's keys."""
        if self.waiting and self.waiting[0].prompt == self.active[row].prompt:
            return self.waiting.popleft()
        return None

    def replace(self, row: int, request: Request) -> None:
        self.active[row], self.lengths[row] = request, len(request.prompt)

    def retire(self, row: int) -> int:
        """Frees `row` and puts the last active row in its place. Returns that row (`row` itself if it was last)."""
        last = len(self.active) - 1
        self.active[row], self.lengths[row] = self.active[last], self.lengths[last]
        del self.active[last], self.lengths[last]
        return last

    def prefix_groups(self, rows: list[int]) -> list[tuple[int, list[int]]]:
        """Groups new rows by prompt: (the row that holds or will hold the prompt's keys, the rows to share with).

        The first element is one of `rows` where the prompt must be prefilled, else an older active row.
        """
        holders: dict[tuple[int, ...], int] = {}
        for row, request in enumerate(self.active):
            holders.setdefault(request.prompt, row)
        groups: dict[int, list[int]] = {}
        for row in rows:
            members = groups.setdefault(holders[self.active[row].prompt], [])
            if row != holders[self.active[row].prompt]:
                members.append(row)
        return list(groups.items())

    def _occupy(self, request: Request) -> None:
        self.active.append(request)
        self.lengths.append(len(request.prompt))
