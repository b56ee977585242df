"""Scheduling of one rollout: which request has which row, which ones wait, and whose keys a new row starts from.

Active rows are always rows 0..B-1, so that a round is a forward over a dense batch. Waiting requests keep their order;
a preempted one waits in front of them. Host-side bookkeeping, no tensors.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import replace

from trl_selfspec.engine.request import Request
from trl_selfspec.kv_cache.prefix_cache import PrefixCache


class Scheduler:
    """Active requests by row, and the queue of waiting ones."""

    def __init__(self, requests: list[Request], max_rows: int) -> None:
        self.waiting = deque(requests)
        self.max_rows = max_rows
        self.active: list[Request] = []
        self.lengths: list[int] = []  # tokens of each active row; the device's copy is `BatchState.lengths`
        self._admission_order: list[int] = []  # how many were admitted before each active row
        self._num_admitted = 0
        self._rows_by_prompt: defaultdict[tuple[int, ...], dict[int, None]] = defaultdict(dict)  # oldest first

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
            self._admission_order.append(self._next_number())
            self._rows_by_prompt[self.active[-1].prompt][len(self.active) - 1] = None
        return list(range(first, len(self.active)))

    def take_over(self, row: int) -> Request | None:
        """Gives a finished row to the next request in the queue if that has the same prompt, whose keys it reuses."""
        request = self.waiting[0] if self.waiting else None
        if request is None or request.done or request.prompt != self.active[row].prompt:
            return None
        self.waiting.popleft()
        self.active[row], self.lengths[row] = request, len(request.prompt)
        self._admission_order[row] = self._next_number()
        return request

    def retire(self, row: int) -> int:
        """Frees `row` and puts the last active row in its place. Returns that row (`row` itself if it was last)."""
        last = len(self.active) - 1
        for moved in {row, last}:
            del self._rows_by_prompt[self.active[moved].prompt][moved]
        self.active[row], self.lengths[row] = self.active[last], self.lengths[last]
        self._admission_order[row] = self._admission_order[last]
        del self.active[last], self.lengths[last], self._admission_order[last]
        if row != last:
            self._rows_by_prompt[self.active[row].prompt][row] = None
        return last

    def newest(self) -> int:
        """The row that was admitted last. It is the one to preempt, so that the oldest comes to its end."""
        return max(range(len(self._admission_order)), key=self._admission_order.__getitem__)

    def preempt(self, row: int, done: tuple[int, ...]) -> int:
        """Retires `row`. Its request waits in front of all others, to go on behind the tokens `done`."""
        self.waiting.appendleft(replace(self.active[row], done=done))
        return self.retire(row)

    def prefix_owner(self, prompt: tuple[int, ...]) -> int | None:
        """An active row with this prompt. It was not admitted after another one that has it now."""
        return next(iter(self._rows_by_prompt[prompt]), None)

    def _next_number(self) -> int:
        self._num_admitted += 1
        return self._num_admitted


class Admission:
    """Decides which requests fit, in the order of the queue, and whose keys each of them starts from.

    A request fits if there are pages for its tokens and one more for each active row: rows grow, and one that is
    preempted soon after would have been prefilled for little. Pages that it shares count once. Cached rows are evicted
    to make room, but not those that an admitted request starts from. Where no row is active or cached, every request
    fits, since the cache holds one row to its limit.

    Attributes:
        cached: for each new row that is the first with its prompt, the cached row with the longest common prefix, and
            that prefix's length, which may be 0.
        shared: for each other new row, the active row with the same prompt, and the number of keys that they share.
    """

    def __init__(self, scheduler: Scheduler, prefix_cache: PrefixCache) -> None:
        self.cached: dict[int, tuple[int, int]] = {}
        self.shared: dict[int, tuple[int, int]] = {}
        self._scheduler, self._prefix_cache = scheduler, prefix_cache
        self._promised = 0  # pages of the requests that were admitted: they don't hold them yet

    def fits(self, request: Request) -> bool:
        """Whether this request can be admitted now, as the next row. If so, its pages count as taken."""
        cache, row = self._prefix_cache.cache, self._scheduler.num_active
        owner = self._scheduler.prefix_owner(request.prompt)
        while True:
            if owner is not None:
                source, num_tokens = owner, len(request.prompt) - 1
            else:
                source, num_tokens = self._prefix_cache.longest_prefix(request.tokens)
            needed = 0 if cache.dense else self._needed_pages(request, num_tokens)
            if cache.dense or self._promised + needed + row <= cache.num_free:
                break
            spare = {source for source, num_tokens in self.cached.values() if num_tokens}
            own = {source} if owner is None and num_tokens else set()
            if not (self._prefix_cache.evict(spare | own) or self._prefix_cache.evict(spare)):
                return False
        self._promised += needed
        (self.cached if owner is None else self.shared)[row] = source, num_tokens
        return True

    def _needed_pages(self, request: Request, num_shared: int) -> int:
        cache = self._prefix_cache.cache
        return cache.pages_for(len(request.tokens)) - num_shared // cache.page_size
