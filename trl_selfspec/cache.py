"""The key/value cache that target and drafter share.

Slot == position: the token at position s of a row lives in the row's slot s, and a key is visible to a query at
position p iff s <= p. Rejected drafts and padding lie beyond every visible position until they are overwritten, so
there is no mask to keep and nothing to roll back. Slots lie in pages; a page table per row maps them. On a CPU one
page spans a row and row r owns page r + 1, so attention reads dense rows without a gather. Page 0 takes the writes
of padding.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


TRASH_PAGE = 0


class PagedLayer(CacheLayerMixin):
    """Keys and values of one layer, `(pages, page_size, K, D)`; every write goes through the owner's slot index."""

    is_compileable = False
    is_sliding = False
    keys: Tensor  # never None once initialised
    values: Tensor

    def __init__(self, owner: "PagedCache") -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        owner = self.owner
        dtype = owner.dtype or key_states.dtype

        def storage(states: Tensor) -> Tensor:  # zeros: a masked NaN from uninitialised memory would poison 0 * NaN
            return states.new_zeros((owner.num_pages, owner.page_size, states.shape[1], states.shape[3]), dtype=dtype)

        self.keys = storage(key_states)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.values = storage(value_states)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Writes `(B, K, T, D)` states, unless attention will, and hands them back unchanged."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not self.owner.attention_writes:
            self.write(key_states, value_states)
        return key_states, value_states

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Writes `(B, K, T, D)` states to the current forward's slots."""
        index = self.owner.write_index
        for storage, states in ((self.keys, key_states), (self.values, value_states)):
            flat = states.transpose(1, 2).reshape(-1, states.shape[1], states.shape[3])
            storage.flatten(0, 1).index_copy_(0, index, flat.to(storage.dtype))

    def copy_pages(
        self,
        layer: "PagedLayer",
        pages: Tensor,  # (N, 2): from, to
        num_slots: int,
    ) -> None:
        """Copies the first slots of pages of `layer`, all at once."""
        sources, targets = pages.unbind(1)
        self.keys[targets, :num_slots] = layer.keys[sources, :num_slots]
        self.values[targets, :num_slots] = layer.values[sources, :num_slots]

    def free(self) -> None:
        del self.keys, self.values
        self.is_initialized = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.num_slots, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.owner.row_capacity


class PagedCache(Cache):
    """Pages of keys and values for up to `max_rows` rows of `row_capacity` positions each.

    Args:
        num_layers: layers of the model.
        max_rows: rows decoded at once.
        row_capacity: positions a row may hold, lookahead included.
        page_size: slots per page; `None` gives each row one page (dense rows, for CPUs).
        dtype: dtype of the storage; `None` takes that of the first keys written.
    """

    def __init__(
        self,
        num_layers: int,
        max_rows: int,
        row_capacity: int,
        page_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pages_of = [PagedLayer(self) for _ in range(num_layers)]  # by layer; transformers' `layers`, typed
        super().__init__(layers=list(self.pages_of))
        self.dense = page_size is None
        self.page_size = row_capacity if page_size is None else page_size
        self.pages_per_row = -(-row_capacity // self.page_size)
        self.row_capacity = self.pages_per_row * self.page_size
        self.num_pages = 1 + max_rows * self.pages_per_row
        self.max_rows, self.dtype, self.device = max_rows, dtype, torch.device(device)
        self.attention_writes = False  # True: states are written by the attention function that `bind_cache` bound
        self._pages: list[list[int]] = [[row + 1] if self.dense else [] for row in range(max_rows)]
        self._free = [] if self.dense else list(range(self.num_pages - 1, TRASH_PAGE, -1))
        self._owners = [0] * self.num_pages
        self._table = torch.zeros(max_rows, self.pages_per_row, dtype=torch.int64, device=self.device)
        self._sync_table(range(max_rows))

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
        """Announces a forward over `positions`; `fresh` means its keys are all there is (prefill from position 0)."""
        self.table = self._table[: len(positions)] if rows is None else self._table[rows]
        pages = self.table.gather(1, (positions // self.page_size).clamp_(max=self.pages_per_row - 1))
        if lengths is not None:
            pages = torch.where(positions < lengths[:, None], pages, TRASH_PAGE)
        self.write_index = (pages * self.page_size + positions % self.page_size).flatten()
        if lengths is not None:
            positions = positions.clamp(max=num_slots - 1)  # padding that sees no key at all would become NaN
        self.positions, self.num_slots, self.rows, self.fresh = positions, num_slots, rows, fresh
        self._bias: dict[tuple[int | None, int, torch.dtype], Tensor] = {}

    @property
    def rows_in_place(self) -> bool:
        """Whether this forward reads the keys of row b from page b + 1 and not from its own states."""
        return self.dense and self.rows is None and not self.fresh

    def keys_and_values(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Slots 0..num_slots-1 of the current rows, `(B, num_slots, K, D)` each; views where rows are dense."""
        layer = self.pages_of[layer_idx]
        num_rows = len(self.positions)
        if self.dense and self.rows is None:
            window = slice(1, num_rows + 1), slice(0, self.num_slots)
            return layer.keys[window], layer.values[window]
        pages = self.table[:, : -(-self.num_slots // self.page_size)]
        keys, values = (storage[pages].flatten(1, 2)[:, : self.num_slots] for storage in (layer.keys, layer.values))
        return keys, values

    def bias(self, sliding_window: int | None, repeats: int, dtype: torch.dtype) -> Tensor:
        """Additive visibility mask `(B, 1, repeats * T, S)`, built once per forward and window.

        S is `num_slots`, or T in a fresh prefill. The T queries repeat `repeats` times (grouped heads packed into
        the query length).
        """
        key = (sliding_window, repeats, dtype)
        if key not in self._bias:
            queries = self.positions[:, :, None]
            slots = self.positions[:, None, :] if self.fresh else torch.arange(self.num_slots, device=self.device)
            hidden = slots > queries
            if sliding_window is not None:
                hidden |= slots <= queries - sliding_window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, float("-inf"))
            num_rows, num_queries, num_keys = bias.shape
            packed = bias[:, None, None].expand(num_rows, 1, repeats, num_queries, num_keys)
            self._bias[key] = packed.reshape(num_rows, 1, repeats * num_queries, num_keys)
        return self._bias[key]

    def reserve(self, row: int, num_slots: int) -> None:
        """Gives `row` pages for slots 0..num_slots-1."""
        assert num_slots <= self.row_capacity
        missing = self._num_pages(num_slots) - len(self._pages[row])
        for _ in range(missing):
            page = self._free.pop()
            self._owners[page] = 1
            self._pages[row].append(page)
        if missing > 0:
            self._sync_table([row])

    def park(self, first: int) -> None:
        """Until they hold pages again, rows from `first` on write to the trash page; what they keep stays untouched.

        Only where rows have pages: rounds over dense rows stop at the last active one.
        """
        if not self.dense:
            self._table[first:] = TRASH_PAGE

    def rearrange(self, sources: Mapping[int, tuple[int, int]]) -> None:
        """Row t becomes a copy of the first n slots of row s, for all `{t: (s, n)}` at once; what t held is released.

        A source may be a target too, and n may be 0, which empties the row. Full pages are shared, not copied.
        """
        if self.dense:
            pairs = [(source + 1, row + 1) for row, (source, n) in sources.items() if n and row != source]
            self._copy_pages(pairs, max((n for _, n in sources.values()), default=0))
            return
        taken = {row: self._pages[source][: self._num_pages(n)] for row, (source, n) in sources.items()}
        for page in chain.from_iterable(taken.values()):
            self._owners[page] += 1
        for row, pages in taken.items():
            self._release(row)
            self._pages[row] = pages
        copies = []
        for row, pages in taken.items():
            if sources[row][1] % self.page_size and self._owners[pages[-1]] > 1:  # others write to it, or read on
                copies.append((pages[-1], self._free.pop()))
                self._owners[pages[-1]] -= 1
                pages[-1] = copies[-1][1]
                self._owners[pages[-1]] = 1
        self._copy_pages(copies, self.page_size)
        self._sync_table(list(sources))

    def adopt(self, other: "PagedCache", sources: Sequence[tuple[int, int]]) -> None:
        """Row i becomes a copy of the first n slots of `other`'s row s, for each `(s, n)`; `other` loses its storage.

        Layer by layer, so that at most one layer is held twice.
        """
        assert self.dense == other.dense and (self.dense or self.page_size == other.page_size)
        pairs: list[tuple[int, int]] = []
        for row, (source, n) in enumerate(sources):
            self.reserve(row, n)
            used = self._num_pages(n)
            pairs += zip(other._pages[source][:used], self._pages[row][:used], strict=True)
        pages = self._page_pairs(pairs)
        num_slots = max((n for _, n in sources), default=0) if self.dense else self.page_size
        for mine, theirs in zip(self.pages_of, other.pages_of, strict=True):
            if theirs.is_initialized:
                mine.lazy_initialization(theirs.keys.transpose(1, 2), theirs.values.transpose(1, 2))
                mine.copy_pages(theirs, pages, num_slots)
                theirs.free()

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers that have been written to."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.pages_of if layer.is_initialized)

    def _num_pages(self, num_slots: int) -> int:
        return -(-num_slots // self.page_size)

    def _release(self, row: int) -> None:
        """Returns the row's pages; a shared page returns with its last owner."""
        for page in self._pages[row]:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def _copy_pages(self, pairs: Sequence[tuple[int, int]], num_slots: int) -> None:
        if not pairs:
            return
        pages = self._page_pairs(pairs)
        for layer in self.pages_of:
            if layer.is_initialized:
                layer.copy_pages(layer, pages, num_slots)

    def _page_pairs(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        return torch.tensor(pairs, dtype=torch.int64, device=self.device).view(-1, 2)

    def _sync_table(self, rows: Sequence[int]) -> None:
        padded = [self._pages[row] + [TRASH_PAGE] * (self.pages_per_row - len(self._pages[row])) for row in rows]
        if padded:
            self._table[list(rows)] = torch.tensor(padded, device=self.device)
