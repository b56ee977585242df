"""Which prompt occupies which row: host-side bookkeeping of one rollout, no tensors.

Active rows are always rows 0..B-1, so that a round is a forward over a dense batch. Waiting prompts keep their order;
a row that is paused waits in front of them.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from trl_selfspec.engine.request import Request
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.kv_cache.prefix_cache import PrefixCache


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


class Admission:
    """Judges requests in the order in which they are admitted, before any of them takes its pages.

    A request fits if its tokens do and a page is left for each active row: rows grow, and one that is paused soon
    after would have been prefilled for little. Pages that it shares count once. Rows kept for later turns give way,
    but those that an admitted request begins with. Where nothing is active and nothing kept, every request fits,
    since the cache holds one row to its limit.
    """

    def __init__(self, cache: PagedCache, kept: PrefixCache, scheduler: Scheduler) -> None:
        self._cache, self._kept, self._scheduler = cache, kept, scheduler
        self._promised = 0
        self._sources: set[int] = set()  # kept rows that admitted requests begin with

    def fits(self, request: Request) -> bool:
        """Whether this request can be admitted now; if so, its pages count as taken."""
        cache, kept = self._cache, self._kept
        while not cache.dense:
            source, needed = self._needs(request)
            if self._promised + needed + self._scheduler.num_active <= cache.num_free:
                self._promised += needed
                self._sources.add(source)
                break
            if not (kept.evict(spare={*self._sources, source}) or kept.evict(spare=self._sources)):
                return False
        return True

    def _needs(self, request: Request) -> tuple[int, int]:
        """The kept row that a request begins with (-1: none), and the pages it needs beyond those it shares."""
        source, shared = -1, len(request.prompt) - 1
        if self._scheduler.holder(request.prompt) is None:
            source, shared = self._kept.longest_prefix(request.tokens)
            source = source if shared else -1
        return source, self._cache.pages_for(len(request.tokens)) - shared // self._cache.page_size
