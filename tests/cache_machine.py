"""Random operations of a rollout on a paged cache, against a list of lists."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from trl_selfspec.kv_cache.paged_cache import NULL_PAGE, PagedCache


ROWS, CAPACITY, LAYERS, HEADS, HEAD_DIM = 4, 13, 2, 2, 3
STATEFUL = settings(max_examples=100, stateful_step_count=25, deadline=None, derandomize=True)


class CacheMachine(RuleBasedStateMachine):
    """Random operations of a rollout; row r must always read back what was written for it.

    A row of the model is the list of values written to its slots. Every write is a new number.
    """

    page_size: int | None = None
    num_pages: int | None = None  # None: as many as can be needed

    @initialize()
    def make(self) -> None:
        self.cache = self.make_cache()
        self.table_address = self.cache._table.data_ptr()
        self.model: list[list[float] | None] = [None] * ROWS
        self.written = 0.0

    def make_cache(self) -> PagedCache:
        return PagedCache(LAYERS, ROWS, CAPACITY, self.page_size, num_pages=self.num_pages)

    def room_for(self, num_pages: int) -> bool:
        return self.num_pages is None or num_pages <= self.cache.num_free

    def write(self, rows: list[int], starts: list[int], width: int, kept: list[int]) -> None:
        """A forward of `width` positions per row of which row i keeps the first `kept[i]`; the rest is overwritten."""
        for row, start in zip(rows, starts, strict=True):
            self.cache.reserve(row, start + width)
        positions = torch.tensor(starts)[:, None] + torch.arange(width)
        values = self.written + 1 + torch.arange(len(rows) * width, dtype=torch.float32).view(len(rows), width)
        self.written = float(values.max())
        self.cache.begin(positions, max(starts) + width, rows=torch.tensor(rows))
        self.update(values)
        for i, row in enumerate(rows):
            self.model[row] = (self.model[row] or [])[: starts[i]] + values[i, : kept[i]].tolist()

    def update(self, values: Tensor) -> None:
        states = values[:, None, :, None].expand(-1, HEADS, -1, HEAD_DIM)
        for index in range(LAYERS):
            keys, values = states + 10_000 * index, -states - 10_000 * index
            self.cache.layer_of(index, keys, values).write(keys, values)

    def rows_where(self, empty: bool) -> list[int]:
        return [row for row in range(ROWS) if (self.model[row] is None) is empty]

    @rule(data=st.data(), length=st.integers(1, 8))
    @precondition(lambda self: self.rows_where(empty=True))
    def prefill(self, data: st.DataObject, length: int) -> None:
        row = data.draw(st.sampled_from(self.rows_where(empty=True)))
        padding = data.draw(st.integers(0, 3))
        if not self.room_for(self.cache.pages_for(length)):
            return
        self.cache.reserve(row, length)
        positions = torch.arange(length + padding)[None]
        values = self.written + 1 + torch.arange(length + padding, dtype=torch.float32)[None]
        self.written = float(values.max())
        self.cache.begin(positions, length + padding, torch.tensor([row]), torch.tensor([length]), fresh=True)
        self.update(values)
        self.model[row] = values[0, :length].tolist()

    @rule(data=st.data(), width=st.integers(1, 4))
    @precondition(lambda self: self.rows_where(empty=False))
    def speculate(self, data: st.DataObject, width: int) -> None:
        rows = [row for row in self.rows_where(empty=False) if len(self.model[row] or []) + width <= CAPACITY]
        while not self.room_for(self.missing_pages(rows, width)):
            rows.pop()
        if rows:
            kept = [data.draw(st.integers(1, width)) for _ in rows]
            self.write(rows, [len(self.model[row] or []) for row in rows], width, kept)

    def missing_pages(self, rows: list[int], width: int) -> int:
        """What the cache says, which counts rows from the first."""
        lengths = [len(self.model[row] or []) if row in rows else -width for row in range(ROWS)]
        return self.cache.missing_pages(lengths, width)

    @rule(data=st.data())
    @precondition(lambda self: self.rows_where(empty=False))
    def rearrange(self, data: st.DataObject) -> None:
        """Any rows from any prefixes of any rows: sharing, moving, swapping and releasing are cases of it."""
        targets = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, unique=True))
        if not self.room_for(len(targets)):  # each may need a copy of its last page
            return
        sources = [data.draw(st.sampled_from(self.rows_where(empty=False))) for _ in targets]
        lengths = [data.draw(st.integers(0, len(self.model[source] or []))) for source in sources]
        prefixes = [(self.model[source] or [])[:n] or None for source, n in zip(sources, lengths, strict=True)]
        self.cache.rearrange(dict(zip(targets, zip(sources, lengths, strict=True), strict=True)))
        for row, prefix in zip(targets, prefixes, strict=True):
            self.model[row] = prefix

    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        """A larger cache takes over some rows, in another order and cut short."""
        rows = data.draw(st.lists(st.sampled_from(self.rows_where(empty=False) or [0]), unique=True))
        lengths = [data.draw(st.integers(0, len(self.model[row] or []))) for row in rows]
        if self.num_pages is not None and sum(map(self.cache.pages_for, lengths)) >= self.num_pages:
            return
        old, self.cache = self.cache, self.make_cache()
        self.table_address = self.cache._table.data_ptr()
        self.cache.adopt(old, list(zip(rows, lengths, strict=True)))
        assert old.nbytes == 0
        prefixes = [(self.model[row] or [])[:n] or None for row, n in zip(rows, lengths, strict=True)]
        self.model = prefixes + [None] * (ROWS - len(rows))

    @rule(more=st.integers(1, 3))
    @precondition(lambda self: self.num_pages is not None)
    def grow(self, more: int) -> None:
        """A later turn may be given more pages than the one whose rows are kept."""
        self.cache.allocate(self.cache.num_pages + more)

    @rule(num_pages=st.integers(5, 12))
    @precondition(lambda self: self.num_pages is not None)
    def release(self, num_pages: int) -> None:
        """Between rollouts all storage goes, and comes back in another size."""
        self.cache.free()
        assert self.cache.nbytes == self.cache.num_free == 0
        self.cache.allocate(num_pages)
        assert self.cache.num_free == num_pages - 1
        self.model = [None] * ROWS

    @invariant()
    def the_table_stays_where_it_is(self) -> None:
        assert self.cache._table.data_ptr() == self.table_address

    @invariant()
    def rows_read_back_what_was_written(self) -> None:
        for row, expected in enumerate(self.model):
            if not expected or not self.cache.layers[0].is_initialized:
                continue
            self.cache.begin(torch.tensor([[len(expected) - 1]]), len(expected), rows=torch.tensor([row]))
            for index in range(LAYERS):
                keys, values = self.cache.keys_and_values(self.cache.pages_of[index])
                assert (keys[0, :, 0, 0] - 10_000 * index).tolist() == expected
                assert torch.equal(values, -keys)

    @invariant()
    def pages_are_neither_lost_nor_owned_twice(self) -> None:
        cache = self.cache
        if cache.dense:
            return
        owned = [page for pages in cache._pages for page in pages]
        assert sorted([NULL_PAGE, *set(owned), *cache._free]) == list(range(cache.num_pages))
        assert all(cache._owners[page] == owned.count(page) for page in set(owned))


def assert_noticed(machine: type[CacheMachine]) -> None:
    machine.TestCase.settings = settings(STATEFUL, phases=[Phase.generate], database=None)  # type: ignore[attr-defined]
    with pytest.raises((AssertionError, IndexError)):
        machine.TestCase("runTest").runTest()
