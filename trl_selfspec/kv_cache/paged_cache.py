"""The paged key/value cache that target and drafter share.

Slot == position: the token at position s of a row lives in the row's slot s, and a key is visible to a query at
position p iff s <= p. Rejected drafts and padding lie beyond every visible position until they are overwritten, so
there is no mask to keep and nothing to roll back. Slots lie in pages; a page table per row maps them. On a CPU one
page spans a row and row r owns page r + 1, so attention reads dense rows without a gather. Page 0, the null page,
takes the writes of padding. Storage may be freed and allocated anew; the table stays at its address.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from trl_selfspec.kv_cache.recurrent_state import StateCache
from trl_selfspec.utils import to_device


NULL_PAGE = 0


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer, `(pages, page_size, K, D)`. The cache (`owner`) says which slots a forward writes.

    Attributes:
        addresses: of `keys` and `values`, `(2,)` int64 on the device. Captured kernels read them at each replay, so
            that storage may move.
        in_rounds: rounds use the tensors themselves. Captured ones must not outlive these.
    """

    is_compileable = False
    is_sliding = False
    keys: Tensor  # never None once initialised
    values: Tensor

    def __init__(self, owner: "PagedCache") -> None:
        super().__init__()
        self.owner = owner
        self.latest: Callable[[], Tensor | None] = lambda: None  # keys of the last update, as long as they are alive
        self.addresses = torch.zeros(2, dtype=torch.int64, device=owner.device)
        self.in_rounds = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        dtype = self.owner.dtype or key_states.dtype

        def no_pages(states: Tensor) -> Tensor:
            return states.new_empty((0, self.owner.page_size, states.shape[1], states.shape[3]), dtype=dtype)

        self._put(no_pages(key_states), no_pages(value_states))
        self.is_initialized = True
        self.allocate()

    def allocate(self) -> None:
        """Allocates storage for all pages of the cache. Pages that had storage keep their contents."""
        if len(self.keys) < self.owner.num_pages:  # one after the other, so that only one is held twice
            self._put(_grown(self.keys, self.owner.num_pages), self.values)
            self._put(self.keys, _grown(self.values, self.owner.num_pages))

    def _put(self, keys: Tensor, values: Tensor) -> None:
        self.owner.moved_in_rounds |= self.in_rounds
        self.in_rounds = False
        self.keys = keys  # pyright: ignore[reportIncompatibleVariableOverride]
        self.values = values  # pyright: ignore[reportIncompatibleVariableOverride]
        self.addresses.copy_(to_device([keys.data_ptr(), values.data_ptr()], self.addresses.device))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Returns the states unchanged: the attention function writes them."""
        self.latest = weakref.ref(key_states)
        return key_states, value_states

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Writes `(B, K, T, D)` states to the current forward's slots."""
        index = self.owner.write_index
        self.in_rounds |= self.owner.rows is None and not self.owner.fresh
        write_states(self.keys, key_states, index)
        write_states(self.values, value_states, index)

    def copy_pages(
        self,
        layer: "PagedLayer",
        pages: Tensor,  # (N, 2): from, to
        num_slots: int,
    ) -> None:
        """Copies the first slots of pages of `layer`, as if all at the same time."""
        sources, targets = pages.unbind(1)
        self.keys[targets, :num_slots] = layer.keys[sources, :num_slots]
        self.values[targets, :num_slots] = layer.values[sources, :num_slots]

    def free(self) -> None:
        """Frees the storage; its shape per page stays known."""
        self._put(*(states.new_empty(0, *states.shape[1:]) for states in (self.keys, self.values)))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.num_slots, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.owner.row_capacity


class PagedCache(StateCache):
    """Pages of keys and values for up to `max_rows` rows of `row_capacity` positions each, and recurrent states.

    Args:
        num_layers: layers of the model.
        max_rows: rows decoded at once.
        row_capacity: positions a row may hold, lookahead included.
        page_size: slots per page; `None` gives each row one page (dense rows, for CPUs).
        dtype: dtype of the storage; `None` takes that of the first keys written.
        num_pages: pages to share among the rows, page 0 included; `None`: as many as all rows can ever need.
    """

    def __init__(
        self,
        num_layers: int,
        max_rows: int,
        row_capacity: int,
        page_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        num_pages: int | None = None,
    ) -> None:
        self.max_rows, self.dtype, self.device = max_rows, dtype, torch.device(device)
        self.moved_in_rounds = False  # see `rounds_outdated`
        self.pages_of = [PagedLayer(self) for _ in range(num_layers)]  # by layer; transformers' `layers`, typed
        super().__init__(self.pages_of, max_rows)
        self.dense = page_size is None
        self.page_size = row_capacity if page_size is None else page_size
        self.pages_per_row = -(-row_capacity // self.page_size)
        self.row_capacity = self.pages_per_row * self.page_size
        self.num_pages = 1 + max_rows * self.pages_per_row if num_pages is None else num_pages
        self._pages: list[list[int]] = [[row + 1] if self.dense else [] for row in range(max_rows)]
        self._free = [] if self.dense else list(range(self.num_pages - 1, NULL_PAGE, -1))
        self._owners = [0] * self.num_pages
        self._host_table = torch.zeros(max_rows, self.pages_per_row, dtype=torch.int64, device="cpu")
        self._table = self._host_table.to(self.device)  # itself on a CPU
        self._stale: set[int] = set()  # rows whose entries the device's table does not have yet
        self._write_table(range(max_rows))

    # Current forward, set by `begin` and read by the attention function.
    rows: Tensor | None
    table: Tensor  # (B, pages_per_row) int64: the pages of its rows
    positions: Tensor
    write_index: Tensor
    num_slots: int
    fresh: bool

    def begin(
        self,
        positions: Tensor,  # (B, T) int64
        num_slots: int,
        rows: Tensor | None = None,  # (B,) int64; None: rows 0..B-1
        lengths: Tensor | None = None,  # (B,) int64: positions >= length are padding
        fresh: bool = False,
    ) -> None:
        """Prepares a forward over `positions`. `fresh`: a prefill from position 0, which reads no earlier keys."""
        self.sync_table()
        self.table = self._table[: len(positions)] if rows is None else self._table[rows]
        pages = self.table.gather(1, (positions // self.page_size).clamp_(max=self.pages_per_row - 1))
        if lengths is not None:
            pages = torch.where(positions < lengths[:, None], pages, NULL_PAGE)
        self.write_index = (pages * self.page_size + positions % self.page_size).flatten()
        if lengths is not None:
            positions = positions.clamp(max=num_slots - 1)  # padding that sees no key at all would become NaN
        self.positions, self.num_slots, self.rows, self.fresh = positions, num_slots, rows, fresh
        self._bias: dict[tuple[int | None, int, torch.dtype, bool], Tensor] = {}
        self._deferred.clear()

    def sync_table(self) -> None:
        """Copies changed rows of the table to the device, in place and without a host sync.

        `begin` does it too. A round that is replayed does not call `begin` and needs it beforehand.
        """
        if self._stale and self._table is not self._host_table:
            rows = slice(min(self._stale), max(self._stale) + 1)
            changed = self._host_table[rows]
            if self.device.type == "cuda":
                changed = changed.pin_memory()  # a copy, so that the next change does not reach into this transfer
            self._table[rows].copy_(changed, non_blocking=True)
        self._stale.clear()

    def layer_of(self, layer_idx: int, key: Tensor, value: Tensor) -> PagedLayer:
        """The layer that stores these `(B, K, T, D)` states: an earlier one if it produced them (shared keys)."""
        layer = self.pages_of[layer_idx]
        if not layer.is_initialized:
            for other in self.pages_of:
                if other.is_initialized and other.latest() is key:
                    return other
            layer.lazy_initialization(key, value)
        return layer

    @property
    def rows_in_place(self) -> bool:
        """Whether this forward reads the keys of row b from page b + 1 and not from its own states."""
        return self.dense and self.rows is None and not self.fresh

    def keys_and_values(self, layer: PagedLayer) -> tuple[Tensor, Tensor]:
        """Slots 0..num_slots-1 of the current rows, `(B, num_slots, K, D)` each; views where rows are dense."""
        num_rows = len(self.positions)
        if self.dense and self.rows is None:
            window = slice(1, num_rows + 1), slice(0, self.num_slots)
            return layer.keys[window], layer.values[window]
        pages = self.table[:, : -(-self.num_slots // self.page_size)]
        keys, values = (storage[pages].flatten(1, 2)[:, : self.num_slots] for storage in (layer.keys, layer.values))
        return keys, values

    def bias(self, window: int | None, repeats: int, dtype: torch.dtype, chunked: bool = False) -> Tensor:
        """Additive visibility mask `(B, 1, repeats * T, S)`, built once per forward and window.

        S is `num_slots`, or T in a fresh prefill. The T queries repeat `repeats` times (grouped heads packed into
        the query length).
        """
        key = (window, repeats, dtype, chunked)
        if key not in self._bias:
            slots = self.positions[:, None, :] if self.fresh else torch.arange(self.num_slots, device=self.device)
            self._bias[key] = visibility_bias(self.positions, slots, window, repeats, dtype, chunked)
        return self._bias[key]

    @property
    def num_free(self) -> int:
        """Pages that no row holds."""
        return len(self._free)

    def pages_for(self, num_slots: int) -> int:
        return -(-num_slots // self.page_size)

    def missing_pages(self, lengths: Sequence[int], lookahead: int) -> int:
        """Pages that rows 0, 1, ... need beyond those they hold, for `length + lookahead` slots each."""
        held = (len(pages) for pages in self._pages)
        needed = (self.pages_for(length + lookahead) for length in lengths)
        return sum(max(n - m, 0) for n, m in zip(needed, held, strict=False))

    def reserve(self, row: int, num_slots: int) -> None:
        """Gives `row` pages for slots 0..num_slots-1. As many as it needs have to be free."""
        assert num_slots <= self.row_capacity
        pages = self._pages[row]
        for index in range(len(pages), self.pages_for(num_slots)):
            page = self._free.pop()
            self._owners[page] = 1
            pages.append(page)
            self._host_table[row, index] = page
            self._stale.add(row)

    def deactivate(self, first: int) -> None:
        """Rows from `first` on write to the null page until they get pages again. Their pages keep their contents.

        Dense rows need no such thing: rounds over them stop at the last active row.
        """
        if not self.dense:
            self._host_table[first:] = NULL_PAGE
            self._stale.update(range(first, self.max_rows))

    def rearrange(self, sources: Mapping[int, tuple[int, int]]) -> None:
        """Makes row t a copy of the first n slots of row s, for all `{t: (s, n)}` at once. Frees what t held.

        A source may be a target too. n = 0 empties the row, and n beyond its pages is all that it holds: a row that
        was just admitted may have none yet. Full pages are shared, not copied. Recurrent states: see `move_states`.
        """
        self.move_states(sources)
        if self.dense:
            pairs = [(source + 1, row + 1) for row, (source, n) in sources.items() if n and row != source]
            self._copy_pages(pairs, max((n for _, n in sources.values()), default=0))
            return
        taken = {row: self._pages[source][: self.pages_for(n)] for row, (source, n) in sources.items()}
        for page in chain.from_iterable(taken.values()):
            self._owners[page] += 1
        for row, pages in taken.items():
            self._release(row)
            self._pages[row] = pages
        copies = []
        for row, pages in taken.items():
            if (
                pages and sources[row][1] % self.page_size and self._owners[pages[-1]] > 1
            ):  # others write to it, or read on
                copies.append((pages[-1], self._free.pop()))
                self._owners[pages[-1]] -= 1
                pages[-1] = copies[-1][1]
                self._owners[pages[-1]] = 1
        self._copy_pages(copies, self.page_size)
        self._write_table(sources)

    def adopt(self, other: "PagedCache", sources: Sequence[tuple[int, int]]) -> None:
        """Makes row i a copy of the first n slots of `other`'s row s, for each `(s, n)`. Frees `other`'s storage.

        Layer by layer, so that at most one layer is held twice. Rows that shared pages have their own from here on.
        """
        assert self.dense == other.dense and (self.dense or self.page_size == other.page_size)
        pairs: list[tuple[int, int]] = []
        for row, (source, n) in enumerate(sources):
            self.reserve(row, n)
            used = self.pages_for(n)
            pairs += zip(other._pages[source][:used], self._pages[row][:used], strict=True)
        pages = to_device(pairs, self.device).view(-1, 2)
        num_slots = max((n for _, n in sources), default=0) if self.dense else self.page_size
        for mine, theirs in zip(self.pages_of, other.pages_of, strict=True):
            if theirs.is_initialized:
                mine.lazy_initialization(theirs.keys.transpose(1, 2), theirs.values.transpose(1, 2))
                if pairs:
                    mine.copy_pages(theirs, pages, num_slots)
                theirs.free()

    def allocate(self, num_pages: int) -> None:
        """Grows to at least this many pages, page 0 included, with storage for them. Rows keep their contents.

        Layer by layer, so that at most one layer is held twice.
        """
        if num_pages > self.num_pages:
            self._free[:0] = range(num_pages - 1, self.num_pages - 1, -1)
            self._owners += [0] * (num_pages - self.num_pages)
            self.num_pages = num_pages
        for layer in self.pages_of:
            if layer.is_initialized:
                layer.allocate()

    def free(self) -> None:
        """Frees all pages and their storage until `allocate`. All rows are empty then."""
        assert not self.dense, "the pages of dense rows are the rows"
        self._pages = [[] for _ in range(self.max_rows)]
        self.num_pages, self._free, self._owners = 1, [], [0]
        self._write_table(range(self.max_rows))
        self.free_prompts()
        for layer in self.pages_of:
            if layer.is_initialized:
                layer.free()

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers that have been written to, and of recurrent states."""
        pages = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.pages_of if layer.is_initialized)
        return pages + self.state_bytes

    @property
    def storage_in_rounds(self) -> bool:
        """Whether rounds use storage itself, and not only its `addresses`."""
        return any(layer.in_rounds for layer in self.pages_of)

    def rounds_outdated(self) -> bool:
        """Whether storage used by rounds has moved since the last call: captured rounds must not be replayed."""
        moved, self.moved_in_rounds = self.moved_in_rounds, False
        return moved

    def _release(self, row: int) -> None:
        """Frees the row's pages; a shared page is free when its last owner frees it."""
        for page in self._pages[row]:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def _copy_pages(self, pairs: Sequence[tuple[int, int]], num_slots: int) -> None:
        if not pairs:
            return
        pages = to_device(pairs, self.device)
        for layer in self.pages_of:
            if layer.is_initialized:
                layer.copy_pages(layer, pages, num_slots)

    def _write_table(self, rows: Iterable[int]) -> None:
        for row in rows:
            pages = self._pages[row]
            self._host_table[row] = NULL_PAGE
            self._host_table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int64, device="cpu")
            self._stale.add(row)


def write_states(
    storage: Tensor,  # (pages, page_size, K, D)
    states: Tensor,  # (B, K, T, D)
    index: Tensor,  # (B * T,) int64: page * page_size + slot
) -> None:
    flat = states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
    storage.flatten(0, 1).index_copy_(0, index, flat.to(storage.dtype))


def visibility_bias(
    positions: Tensor,  # (B, T)
    slots: Tensor,  # (S,), or (B, 1, S)
    window: int | None,
    repeats: int,
    dtype: torch.dtype,
    chunked: bool = False,
) -> Tensor:  # (B, 1, repeats * T, S)
    """0 where a query sees a slot, else -inf. It sees `window` slots back, or those of its chunk of `window` slots."""
    queries = positions[:, :, None]
    hidden = slots > queries
    if window is not None:
        hidden |= slots < queries // window * window if chunked else slots <= queries - window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
    num_rows, num_queries, num_keys = bias.shape
    packed = bias[:, None, None].expand(num_rows, 1, repeats, num_queries, num_keys)
    return packed.reshape(num_rows, 1, repeats * num_queries, num_keys)


def _grown(storage: Tensor, num_pages: int) -> Tensor:
    """Zeros behind what is there: a masked NaN from uninitialised memory would poison 0 * NaN."""
    grown = storage.new_zeros(num_pages, *storage.shape[1:])
    grown[: len(storage)] = storage
    return grown
