"""Which waiting request still fits into the pages that are free."""

from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.kv_cache.prefix_cache import KeptRows
from trl_selfspec.scheduler import Request, Scheduler


class Admission:
    """Judges requests in the order in which they are admitted, before any of them takes its pages.

    A request fits if its tokens do and a page is left for each active row: rows grow, and one that is paused soon
    after would have been prefilled for little. Pages that it shares count once. Rows kept for later turns give way,
    but those that an admitted request begins with. Where nothing is active and nothing kept, every request fits,
    since the cache holds one row to its limit.
    """

    def __init__(self, cache: PagedCache, kept: KeptRows, scheduler: Scheduler) -> None:
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
