"""The key/value cache that target and drafter share.

Slot == position: the token at position s of a row lives in the row's slot s, and a key is visible to a query at
position p iff s <= p. Rejected drafts and padding lie beyond every visible position until they are overwritten, so
there is no mask to keep and nothing to roll back. Slots lie in pages; a page table per row maps them. On a CPU one
page spans a row and row r owns page r + 1, so attention reads dense rows without a gather. Page 0 takes the writes
of padding.
"""

from collections.abc import Sequence

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
        self._table = torch.zeros(max_rows, self.pages_per_row, dtype=torch.int64, device=self.device)
        self.reset()

    def reset(self) -> None:
        """Empties all rows; what their pages hold is finite and never visible before it is overwritten."""
        rows = range(self.max_rows)
        self._pages: list[list[int]] = [[row + 1] if self.dense else [] for row in rows]
        self._free = [] if self.dense else list(range(self.num_pages - 1, TRASH_PAGE, -1))
        self._owners = [0] * self.num_pages
        self._sync_table(rows)

    # Current forward, set by `begin` and read by the attention function.
    rows: Tensor | None
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
        table = self._table[: len(positions)] if rows is None else self._table[rows]
        pages = table.gather(1, (positions // self.page_size).clamp_(max=self.pages_per_row - 1))
        if lengths is not None:
            pages = torch.where(positions < lengths[:, None], pages, TRASH_PAGE)
        self.write_index = (pages * self.page_size + positions % self.page_size).flatten()
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
        table = self._table[:num_rows] if self.rows is None else self._table[self.rows]
        pages = table[:, : -(-self.num_slots // self.page_size)]
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
        missing = -(-num_slots // self.page_size) - len(self._pages[row])
        for _ in range(missing):
            page = self._free.pop()
            self._owners[page] = 1
            self._pages[row].append(page)
        if missing > 0:
            self._sync_table([row])

    def share_prefix(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        """Gives `targets` the first `num_tokens` slots of `source`: full pages are shared, the rest is copied."""
        if self.dense:
            self._copy_page(source + 1, [row + 1 for row in targets], num_tokens)
            return
        full_pages = num_tokens // self.page_size
        shared, tail = self._pages[source][:full_pages], num_tokens - full_pages * self.page_size
        for row in targets:
            assert not self._pages[row], "a row that shares a prefix starts empty"
            self._pages[row] = list(shared)
            for page in shared:
                self._owners[page] += 1
            self.reserve(row, max(num_tokens, 1))
            if tail:
                self._copy_page(self._pages[source][full_pages], self._pages[row][full_pages], tail)
        self._sync_table(targets)

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Moves a row's first `num_tokens` slots to the released row `target`; dense rows copy, pages change hands."""
        if self.dense:
            self._copy_page(source + 1, target + 1, num_tokens)
            return
        assert not self._pages[target], "a row moves into a released place"
        self._pages[target], self._pages[source] = self._pages[source], []
        self._sync_table([source, target])

    def release(self, row: int) -> None:
        """Returns the row's pages; a shared page returns with its last owner."""
        if self.dense:
            return
        for page in self._pages[row]:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
        self._pages[row] = []
        self._sync_table([row])

    @property
    def nbytes(self) -> int:
        """Bytes of all pages of all layers that have been written to."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.pages_of if layer.is_initialized)

    def _copy_page(self, source: int, targets: int | list[int], num_slots: int) -> None:
        for layer in self.pages_of:
            if layer.is_initialized:
                for storage in (layer.keys, layer.values):
                    storage[targets, :num_slots] = storage[source, :num_slots]

    def _sync_table(self, rows: Sequence[int]) -> None:
        padded = [self._pages[row] + [TRASH_PAGE] * (self.pages_per_row - len(self._pages[row])) for row in rows]
        if padded:
            self._table[list(rows)] = torch.tensor(padded, device=self.device)
