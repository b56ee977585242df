"""Which prompt occupies which row: host-side bookkeeping of one rollout, no tensors.

Active rows are always rows 0..B-1, so that a round is a forward over a dense batch. Waiting prompts keep their order;
a row that is paused waits in front of them.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Request:
    """One completion to generate: `prompt` plus tokens until EOS or until the row holds `limit` tokens."""

    row_id: int
    prompt: tuple[int, ...]
    limit: int
    done: tuple[int, ...] = ()  # tokens generated before the row was paused

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.done


class Scheduler:
    """Active requests by row, and the queue behind them."""

    def __init__(self, requests: list[Request], max_rows: int) -> None:
        self.waiting = deque(requests)
        self.max_rows = max_rows
        self.active: list[Request] = []
        self.lengths: list[int] = []  # tokens each active row holds
        self._ages: list[int] = []  # how many were admitted before each active row
        self._num_admitted = 0

    @property
    def num_active(self) -> int:
        return len(self.active)

    @property
    def num_unfinished(self) -> int:
        return len(self.active) + len(self.waiting)

    def admit(self, fits: Callable[[Request], bool] = lambda request: True) -> list[int]:
        """Fills free rows from the queue up to the first request that does not fit; returns the rows that are new."""
        first = len(self.active)
        while self.waiting and len(self.active) < self.max_rows and fits(self.waiting[0]):
            self.active.append(self.waiting.popleft())
            self.lengths.append(len(self.active[-1].tokens))
            self._ages.append(self._next_age())
        return list(range(first, len(self.active)))

    def waiting_sibling(self, row: int) -> Request | None:
        """The next waiting request if it starts from this row's prompt: it may take the row over with its keys."""
        first = self.waiting[0] if self.waiting else None
        if first is None or first.done or first.prompt != self.active[row].prompt:
            return None
        return self.waiting.popleft()

    def replace(self, row: int, request: Request) -> None:
        self.active[row], self.lengths[row], self._ages[row] = request, len(request.prompt), self._next_age()

    def retire(self, row: int) -> int:
        """Frees `row` and puts the last active row in its place. Returns that row (`row` itself if it was last)."""
        last = len(self.active) - 1
        self.active[row], self.lengths[row], self._ages[row] = self.active[last], self.lengths[last], self._ages[last]
        del self.active[last], self.lengths[last], self._ages[last]
        return last

    def newest(self) -> int:
        """The row that was admitted last; as long as it is the one to be paused, the oldest comes to its end."""
        return max(range(len(self._ages)), key=self._ages.__getitem__)

    def pause(self, row: int, done: tuple[int, ...]) -> int:
        """Retires `row`, whose request waits in front of all others to go on after the tokens `done`."""
        self.waiting.appendleft(replace(self.active[row], done=done))
        return self.retire(row)

    def holder(self, prompt: tuple[int, ...]) -> int | None:
        """An active row with this prompt."""
        return next((row for row, request in enumerate(self.active) if request.prompt == prompt), None)

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

    def _next_age(self) -> int:
        self._num_admitted += 1
        return self._num_admitted
