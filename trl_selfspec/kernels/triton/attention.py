"""Decode attention over the pages of the cache, in Triton. Its eager reference is SDPA over gathered pages.

The slots of a row are cut into splits, at the same places in every row and batch. A program takes one split
of one key head and the queries of that head's group, all their steps, as one tile: keys and values are read once, in
place, and only the slots that some query of the tile sees. `_combine` joins the splits of each query, whose number
follows from its position. So no result depends on the other rows, and nothing waits for the GPU.

Where keys and values lie is read on the device: a captured graph outlives their storage.

This module imports triton; import it only inside functions.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl_selfspec.kernels.triton.launch import launch


SPLIT = 256  # slots per program: enough programs for a few rows, while partial sums stay small against keys and values
WIDE_TILE = 64  # queries whose partial sums would be half as large as 256 slots' keys and values: twice the slots
COMBINED = 16  # splits joined at a time
NO_WINDOW = 2**31 - 1
LOG2E = tl.constexpr(math.log2(math.e))  # exp2 is what the hardware has
LOWEST = tl.constexpr(-1e30)  # a maximum of nothing that can be subtracted from -inf, and from itself

UNSPECIALISED = ["num_steps", "groups", "num_slots", "window", "table_row"]  # they change with the batch: one binary


@triton.jit
def storage(addresses, which: tl.constexpr, DTYPE: tl.constexpr):
    """Where keys (0) or values (1) begin, as torch allocates: in whole 16 bytes at least."""
    return tl.multiple_of(tl.load(addresses + which).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def oldest_slot(position, window, CHUNKED: tl.constexpr):
    """The first slot that a query sees."""
    if CHUNKED:
        oldest = position // window * window
    else:
        oldest = tl.maximum(position - window + 1, 0)
    return oldest


@triton.jit(do_not_specialize=UNSPECIALISED)
def _attend_split(
    query, addresses, table, positions, sums, statistics,
    query_row, query_head, query_step, table_row,  # strides
    num_steps, groups, num_slots, window, scale, softcap,
    HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    CHUNKED: tl.constexpr, LATENT: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Softmax over one split: unnormalised sums of values, and per query their maximum and total weight."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    kv_head, tile = tl.program_id(1) % HEADS, tl.program_id(1) // HEADS
    packed = tile * TILE + tl.arange(0, TILE)
    real = packed < groups * num_steps
    packed = tl.minimum(packed, groups * num_steps - 1)  # the rest of the tile repeats the last query
    head, step = kv_head * groups + packed // num_steps, packed % num_steps

    position = tl.load(positions + row * num_steps + step).to(tl.int32)
    oldest = oldest_slot(position, window, CHUNKED)
    newest = tl.minimum(position, num_slots - 1)
    begin = tl.maximum(split * SPLIT, tl.min(oldest, 0))
    end = tl.minimum(split * SPLIT + SPLIT, tl.max(newest, 0) + 1)
    if begin >= end:
        return

    dim, value_dim = tl.arange(0, DIMS)[None, :], tl.arange(0, VALUE_DIMS)[None, :]
    rows = query + row * query_row + head[:, None] * query_head + step[:, None] * query_step
    queries = tl.load(rows + dim, mask=dim < DIM, other=0.0)
    if LATENT:
        latent_queries = tl.load(rows + DIM + value_dim, mask=value_dim < VALUE_DIM, other=0.0)
    keys, values = storage(addresses, 0, query.dtype.element_ty), storage(addresses, 1, query.dtype.element_ty)
    maximum = tl.full([TILE], LOWEST, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    sum_ = tl.zeros([TILE, VALUE_DIMS], tl.float32)
    for start in range(begin // BLOCK * BLOCK, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        read = (slot >= begin) & (slot < end)
        page = tl.load(table + row * table_row + slot // PAGE_SIZE, mask=read, other=0)
        state = ((page * PAGE_SIZE + slot % PAGE_SIZE) * HEADS + kv_head)[:, None]
        key = tl.load(keys + state * DIM + dim, mask=read[:, None] & (dim < DIM), other=0.0)
        value = tl.load(
            values + state * VALUE_DIM + value_dim, mask=read[:, None] & (value_dim < VALUE_DIM), other=0.0
        )
        scores = tl.dot(queries, tl.trans(key), input_precision="ieee")
        if LATENT:
            scores += tl.dot(latent_queries, tl.trans(value), input_precision="ieee")
        scores *= scale
        if SOFTCAP:
            scores = softcap * (1 - 2 / (tl.exp(2 * scores) + 1))
        visible = (slot[None, :] >= oldest[:, None]) & (slot[None, :] <= newest[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(weights, 1)
        sum_ = sum_ * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        maximum = higher

    num_splits = tl.cdiv(num_slots, SPLIT)
    place = ((row * HEADS * groups + head) * num_steps + step) * num_splits + split
    tl.store(statistics + 2 * place, maximum, mask=real)
    tl.store(statistics + 2 * place + 1, total, mask=real)
    tl.store(sums + place[:, None] * VALUE_DIM + value_dim, sum_, mask=real[:, None] & (value_dim < VALUE_DIM))


@triton.jit(do_not_specialize=UNSPECIALISED)
def _combine(
    sums, statistics, positions, sinks, out, num_steps, num_slots, window,
    CHUNKED: tl.constexpr, SINKS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_DIMS: tl.constexpr,
    SPLIT: tl.constexpr, COMBINED: tl.constexpr,
):  # fmt: skip
    """Joins the splits that hold a slot the query sees; a sink is one more logit, whose value is zero."""
    token, head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    row, step = token // num_steps, token % num_steps
    position = tl.load(positions + token).to(tl.int32)
    first = oldest_slot(position, window, CHUNKED) // SPLIT
    last = tl.minimum(position, num_slots - 1) // SPLIT
    if SINKS:
        maximum = tl.load(sinks + head).to(tl.float32) * LOG2E
        total = tl.full([], 1.0, tl.float32)
    else:
        maximum = tl.full([], LOWEST, tl.float32)
        total = tl.full([], 0.0, tl.float32)
    value_dim = tl.arange(0, VALUE_DIMS)
    sum_ = tl.zeros([VALUE_DIMS], tl.float32)
    places = ((row * num_heads + head) * num_steps + step) * tl.cdiv(num_slots, SPLIT)
    for start in range(first // COMBINED * COMBINED, last + 1, COMBINED):
        split = start + tl.arange(0, COMBINED)
        seen = (split >= first) & (split <= last)
        place = places + split
        maxima = tl.load(statistics + 2 * place, mask=seen, other=LOWEST)
        totals = tl.load(statistics + 2 * place + 1, mask=seen, other=0.0)
        mask = seen[:, None] & (value_dim < VALUE_DIM)[None, :]
        parts = tl.load(sums + place[:, None] * VALUE_DIM + value_dim[None, :], mask=mask, other=0.0)
        higher = tl.maximum(maximum, tl.max(maxima, 0))
        shares, shrink = tl.exp2(maxima - higher), tl.exp2(maximum - higher)
        total = total * shrink + tl.sum(totals * shares, 0)
        sum_ = sum_ * shrink + tl.sum(parts * shares[:, None], 0)
        maximum = higher
    place = (token * num_heads + head) * VALUE_DIM + value_dim
    tl.store(out + place, sum_ / total, mask=value_dim < VALUE_DIM)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _write_slot(
    key, value, addresses, write_index, num_steps,
    key_row, key_head, key_step, value_row, value_head, value_step,  # strides
    DTYPE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PADDED_HEADS: tl.constexpr, DIMS: tl.constexpr, VALUE_DIMS: tl.constexpr,
):  # fmt: skip
    """Copies the states of one token, all heads, to its slot."""
    token = tl.program_id(0)
    row, step = (token // num_steps).to(tl.int64), token % num_steps
    head = tl.arange(0, PADDED_HEADS)[:, None]
    state = tl.load(write_index + token) * HEADS + head
    dim, value_dim = tl.arange(0, DIMS)[None, :], tl.arange(0, VALUE_DIMS)[None, :]
    mask = (head < HEADS) & (dim < DIM)
    new = tl.load(key + row * key_row + head * key_head + step * key_step + dim, mask=mask)
    tl.store(storage(addresses, 0, DTYPE) + state * DIM + dim, new, mask=mask)
    mask = (head < HEADS) & (value_dim < VALUE_DIM)
    new = tl.load(value + row * value_row + head * value_head + step * value_step + value_dim, mask=mask)
    tl.store(storage(addresses, 1, DTYPE) + state * VALUE_DIM + value_dim, new, mask=mask)


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


def write(
    key: Tensor,  # (B, K, T, D)
    value: Tensor,  # (B, K, T, Dv)
    keys: Tensor,  # (pages, page_size, K, D), contiguous
    values: Tensor,  # (pages, page_size, K, Dv), contiguous
    addresses: Tensor,  # (2,) int64: where the two lie
    write_index: Tensor,  # (B * T,) int64: page * page_size + slot
) -> None:
    """Writes new states to their slots, in the storage's dtype."""
    num_rows, num_heads, num_steps, dim = key.shape
    value_dim = value.shape[3]
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    assert keys.is_contiguous() and values.is_contiguous() and write_index.is_contiguous()
    launch(
        _write_slot, (num_rows * num_steps,),
        key, value, addresses, write_index, num_steps, *key.stride()[:3], *value.stride()[:3],
        triton_dtype(keys.dtype), num_heads, dim, value_dim,
        *map(triton.next_power_of_2, (num_heads, dim, value_dim)),
    )  # fmt: skip


def tiling(num_queries: int, dim: int, value_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Queries and slots at a time, and both dimensions padded, so that registers and shared memory hold the sums and
    two blocks of keys and values: fewer queries of wide heads. fp32 has no exact tensor cores to fill with queries.
    """
    dims, value_dims = (max(16, triton.next_power_of_2(x)) for x in (dim, value_dim))
    tile = min(64 if itemsize == 2 else 16, max(16, 16384 // value_dims), max(16, triton.next_power_of_2(num_queries)))
    block = min(64, 16384 // (itemsize * max(dims, value_dims)))
    return tile, block, dims, value_dims


def split_of(tile: int) -> int:
    """Slots per program, by the tile alone: a row's result must not depend on how many rows there are."""
    return SPLIT if tile < WIDE_TILE else 2 * SPLIT


def num_warps(tile: int, value_dims: int) -> int:
    return 8 if tile * value_dims > 8192 else 4


def attend(
    query: Tensor,  # (B, H, T, D) or (B, H, T, D + Dv), dtype of `keys`
    keys: Tensor,  # (pages, page_size, K, D) bf16, fp16 or fp32, contiguous
    values: Tensor,  # (pages, page_size, K, Dv), dtype of `keys`, contiguous
    addresses: Tensor,  # (2,) int64: where the two lie
    table: Tensor,  # (B, pages_per_row) int64: slot s of row b lies in page table[b, s // page_size]
    positions: Tensor,  # (B, T) int64
    num_slots: int,  # no query sees a slot from here on
    scale: float,
    window: int | None = None,
    chunked: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:  # (B, T, H, Dv), dtype of `keys`
    """Attention in fp32: a query at position p sees slots max(0, p - window + 1)..p of its row, or
    p // window * window..p if `chunked`. With latents a key is D and its value together, and a query has D + Dv.

    A query's result depends neither on the other rows nor on `num_slots`.
    """
    num_rows, num_heads, num_steps, query_dim = query.shape
    (page_size, num_kv_heads, dim), value_dim = keys.shape[1:], values.shape[3]
    groups = num_heads // num_kv_heads
    query = query if query.stride(3) == 1 else query.contiguous()
    positions = positions.contiguous()
    assert num_heads % num_kv_heads == 0 and 0 < num_slots <= table.shape[1] * page_size and table.stride(1) == 1
    assert keys.is_contiguous() and values.is_contiguous() and query.dtype is keys.dtype is values.dtype
    assert query_dim in (dim, dim + value_dim)
    tile, block, dims, value_dims = tiling(groups * num_steps, dim, value_dim, keys.itemsize)
    split = split_of(tile)
    num_splits = triton.cdiv(num_slots, split)
    window = NO_WINDOW if window is None else window
    grid = num_rows, num_kv_heads * triton.cdiv(groups * num_steps, tile), num_splits
    places = num_rows, num_heads, num_steps, num_splits
    sums = query.new_empty((*places, value_dim), dtype=torch.float32)
    statistics = query.new_empty((*places, 2), dtype=torch.float32)
    out = query.new_empty((num_rows, num_steps, num_heads, value_dim))
    scale, cap = (scale * LOG2E.value, 0.0) if softcap is None else (scale / softcap, softcap * LOG2E.value)
    launch(
        _attend_split, grid,
        query, addresses, table, positions, sums, statistics, *query.stride()[:3], table.stride(0),
        num_steps, groups, num_slots, window, scale, cap,
        num_kv_heads, dim, value_dim, page_size, chunked, query_dim > dim, softcap is not None,
        tile, block, dims, value_dims, split, num_warps=num_warps(tile, value_dims),
    )  # fmt: skip
    launch(
        _combine, (num_rows * num_steps, num_heads),
        sums, statistics, positions, sums if sinks is None else sinks, out, num_steps, num_slots, window,
        chunked, sinks is not None, value_dim, value_dims, split, COMBINED,
    )  # fmt: skip
    return out
