"""Fewer pages than rows can need: pages are never lost or shared by accident, and come and go between rollouts."""

import pytest
from cache_machine import CAPACITY, LAYERS, ROWS, STATEFUL, CacheMachine, assert_noticed

from trl_selfspec.kv_cache.paged_cache import PagedCache


class FewPages(CacheMachine):
    """Half of what all rows can need, and a table that is not the host's, as on a GPU."""

    page_size, num_pages = 4, 9

    def make_cache(self) -> PagedCache:
        cache = super().make_cache()
        cache._table = cache._host_table.clone()
        return cache


FewPages.TestCase.settings = STATEFUL  # type: ignore[attr-defined]
TestFewPages = FewPages.TestCase


class SyncsOneRow(PagedCache):
    def sync_table(self) -> None:
        self._stale = set(list(self._stale)[:1])
        super().sync_table()


class GrowsFromNothing(PagedCache):
    def allocate(self, num_pages: int) -> None:
        for layer in self.pages_of:
            if layer.is_initialized:
                layer.free()
        super().allocate(num_pages)


class FreesNoPage(PagedCache):
    def free(self) -> None:
        free = self._free
        super().free()
        self._free = free


@pytest.mark.parametrize("broken", [SyncsOneRow, GrowsFromNothing, FreesNoPage])
def test_a_broken_budget_is_noticed(broken: type[PagedCache]) -> None:
    """Negative controls of few pages."""

    class Machine(FewPages):
        def make_cache(self) -> PagedCache:
            cache = broken(LAYERS, ROWS, CAPACITY, self.page_size, num_pages=self.num_pages)
            cache._table = cache._host_table.clone()
            return cache

    assert_noticed(Machine)
