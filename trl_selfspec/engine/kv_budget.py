"""The memory budget of keys and values: how many pages a rollout gets, and how many rows share them.

On a GPU rows grow page by page. The number of pages comes from the budget, and rows are admitted as long as there are
pages. If the pages run out, rows are preempted, which costs less than a smaller batch from the start. On a CPU rows
are dense: the budget is divided by the length that a row can reach.
"""

from collections import Counter
from collections.abc import Sequence

import psutil
import torch
from torch import nn
from transformers.utils import logging

from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.engine.request import Request
from trl_selfspec.kv_cache.attention import bind_cache
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.kv_cache.prefix_cache import PrefixCache
from trl_selfspec.options import SelfSpecOptions


logger = logging.get_logger(__name__)

GPU_PAGE_SIZE = 64
MAX_ROWS = 256  # on a GPU, by default: more rows gain little speed, and their logits take memory too
SCARCE = 0.05  # share of a rollout's tokens that may be computed again without a warning
CAPACITY_STEPS = 8  # row capacities per power of two: a table that later rollouts fit into need not be replaced


def page_size(device: torch.device) -> int | None:
    """Slots per page; `None`: a page spans a row."""
    return None if device.type == "cpu" else GPU_PAGE_SIZE


def kv_bytes_per_token(model: nn.Module, num_layers: int, dtype: torch.dtype | None, device: torch.device) -> int:
    """Bytes of keys and values of one token over all layers, which may differ in their heads or share them.

    Args:
        dtype: of the stored keys and values; `None`: as they come.
    """
    cache = _filled_cache(model, num_layers, dtype, device)
    return (cache.nbytes - cache.state_bytes) // cache.num_pages


def state_bytes_per_row(model: nn.Module, num_layers: int, dtype: torch.dtype | None, device: torch.device) -> int:
    """Bytes of recurrent states of one row over all layers: as they are now, and at the end of its prompt."""
    return 2 * _filled_cache(model, num_layers, dtype, device).state_bytes


@torch.no_grad()
def _filled_cache(model: nn.Module, num_layers: int, dtype: torch.dtype | None, device: torch.device) -> PagedCache:
    """A cache for one row and token, after `model` has read one, attending by the engine's function.

    Measured since configs name their sizes in too many ways.
    """
    cache = PagedCache(num_layers, 1, 1, page_size=1, dtype=dtype, device=device)
    bind_cache(model, cache)
    cache.reserve(0, 1)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    cache.begin(zero, 1, fresh=True)
    model(input_ids=zero, position_ids=zero, past_key_values=cache, use_cache=True)
    bind_cache(model, None)
    return cache


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated, including those that torch has reserved and does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def warn_if_scarce(stats: RolloutStats) -> None:
    """Warns if a rollout computed many of its tokens again, and says what to change."""
    if stats.recomputed_tokens > SCARCE * (stats.prompt_tokens + stats.completion_tokens):
        logger.warning_once(
            "The pages for keys and values ran out, and many tokens were computed again for rows that had been paused "
            "(`selfspec/paused_rows`, `selfspec/recomputed_tokens`). Samples are the same, but slower: lower "
            "`max_batch_size` or the completion length, or raise `kv_memory_fraction`."
        )


class KVMemory:
    """Allocates an engine's cache to fit each rollout.

    Args:
        num_layers: layers of the model.
        token_bytes: keys and values of one token over all layers.
        kv_dtype: dtype of keys and values; `None`: as they come.
        options: `max_batch_size`, `kv_memory_fraction`, and the longest draft.
        row_bytes: recurrent states of one row over all layers.
    """

    def __init__(
        self,
        num_layers: int,
        token_bytes: int,
        kv_dtype: torch.dtype | None,
        options: SelfSpecOptions,
        row_bytes: int = 0,
    ) -> None:
        self._num_layers, self._kv_dtype, self._options = num_layers, kv_dtype, options
        self.token_bytes, self.row_bytes = token_bytes, row_bytes

    def allocate(
        self, requests: Sequence[Request], prefix_cache: PrefixCache | None, device: torch.device
    ) -> PrefixCache:
        """A cache that can hold the requests: `prefix_cache`, or a larger one that takes over what they can use of it.

        Raises:
            ValueError: the budget does not hold the longest row; says the numbers and what to change.
        """
        old = None if prefix_cache is None else prefix_cache.cache
        slots = page_size(device)
        capacity = max(map(self._slots, requests))
        free = free_bytes(device) + (0 if old is None else old.nbytes)
        budget = int(self._options.kv_memory_fraction * free)
        if slots is None:
            affordable = max(1, budget // (self.token_bytes * capacity + self.row_bytes))
            max_rows, num_pages = min(self._options.max_batch_size or affordable, len(requests)), None
        else:
            max_rows = min(self._options.max_batch_size or MAX_ROWS, len(requests))
            if self.row_bytes:  # states take half of the budget at most
                max_rows = min(max_rows, max(1, budget // (2 * self.row_bytes)))
                budget -= max_rows * self.row_bytes
            held = 0 if old is None else old.num_pages - 1
            affordable = max(held, budget // (self.token_bytes * slots))
            self._check(-(-capacity // slots), affordable, slots, free)
            num_pages = 1 + min(affordable, self._needed_pages(requests, max_rows, slots))
        if prefix_cache is None or old is None or old.max_rows < max_rows or old.row_capacity < capacity:
            if slots is not None:
                capacity = _rounded_up(capacity)
                if old is not None:
                    max_rows, capacity = max(max_rows, old.max_rows), max(capacity, old.row_capacity)
            cache = PagedCache(self._num_layers, max_rows, capacity, slots, self._kv_dtype, device, num_pages)
            if prefix_cache is None:
                return PrefixCache(cache)
            return prefix_cache.move_to(cache, (request.prompt for request in requests))
        if num_pages is not None:
            old.allocate(num_pages)
        return prefix_cache

    def release(self, prefix_cache: PrefixCache) -> PrefixCache | None:
        """Frees all storage. Paged caches leave their table at its address, where captured graphs read it."""
        if prefix_cache.cache.dense:
            return None
        prefix_cache.clear()
        prefix_cache.cache.free()
        return prefix_cache

    def _slots(self, request: Request) -> int:
        """Positions that a row may write to, its last draft included."""
        return request.limit + self._options.longest_draft + 1

    def _needed_pages(self, requests: Sequence[Request], max_rows: int, slots: int) -> int:
        """Pages with which no row waits or is preempted: those of the longest rows, or of all rows with shared prompts
        counted once, and the one per row that `Admission` leaves free."""
        pages = [-(-self._slots(request) // slots) for request in requests]
        groups = Counter(request.prompt for request in requests)
        twice = sum((groups[prompt] - 1) * ((len(prompt) - 1) // slots) for prompt in groups)
        return min(sum(sorted(pages)[-max_rows:]), sum(pages) - twice) + max_rows

    def _check(self, needed: int, affordable: int, slots: int, free: int) -> None:
        if needed > affordable:
            page_bytes, fraction = slots * self.token_bytes, self._options.kv_memory_fraction
            raise ValueError(
                f"The keys and values of one row of {needed * slots} tokens, its draft included, need "
                f"{_size(needed * page_bytes)}, but `kv_memory_fraction={fraction}` of {_size(free)} of free memory "
                f"gives {_size(affordable * page_bytes)}; raise `kv_memory_fraction`, or lower the completion length "
                "(`max_completion_length`, `max_new_tokens`)."
            )


def _rounded_up(num_slots: int) -> int:
    step = max(1, 2 ** (num_slots.bit_length() - 1) // CAPACITY_STEPS)
    return -(-num_slots // step) * step


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
