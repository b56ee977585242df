"""The attention function of every model, target and drafter alike: it writes to and reads the paged cache.

Decode steps use our kernels where these support the shapes. Elsewhere grouped query heads are packed into the query
length of SDPA, so that no key is repeated in memory. transformers finds the function under `IMPLEMENTATION`. Each
attention module holds the cache (`bind_cache`), because not every architecture passes keyword arguments through. A
compiled layer gets its part of the cache as tensors, in the place of the mask, and calls one operator.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_selfspec import kernels
from trl_selfspec.kernels import triton_support
from trl_selfspec.kv_cache.family_attention import absorbed_query, expanded, scaled_by_position, values_of_latents
from trl_selfspec.kv_cache.paged_cache import PagedCache, PagedLayer, visibility_bias, write_states


IMPLEMENTATION = "selfspec"
MODULES_OWN: Any = object()  # where a model leaves its window to the mask (Qwen2-MoE)
MAX_GPU_STEPS = 17  # a token and a draft of 16
MAX_GPU_HEAD_BYTES = 1024  # a size of 256 in fp32, and in 16 bits of 512, as latents have


class PagedStates(NamedTuple):
    """Keys and values of one layer, and where the current forward of B rows and T tokens reads and writes them."""

    keys: Tensor  # (pages, page_size, K, D); of latents their rotated part, and K = 1
    values: Tensor  # (pages, page_size, K, Dv); of latents the rest of the keys, too
    addresses: Tensor  # (2,) int64: where the two lie; they may be put elsewhere under a captured graph
    table: Tensor  # (B, pages_per_row) int64: slot s of row b lies in page table[b, s // page_size]
    positions: Tensor  # (B, T) int64
    write_index: Tensor  # (B * T,) int64: page * page_size + slot
    num_slots: int  # no query sees a slot from here on


def paged_states(layer: PagedLayer) -> PagedStates:
    step = layer.owner
    return PagedStates(
        layer.keys, layer.values, layer.addresses, step.table, step.positions, step.write_index, step.num_slots
    )


def bind_cache(model: nn.Module, cache: PagedCache | None) -> None:
    """Gives every attention module of `model` the cache that it reads and writes; `None` takes it away."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.paged_cache = cache  # type: ignore[assignment]


def selfspec_attention(
    module: nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, T, D): the states of this forward, which are written to the cache here
    value: Tensor,  # (B, K, T, Dv); with latents (`family_attention`): key and value of the only head
    attention_mask: PagedStates | Tensor | None,  # within a compiled layer what it attends to, else not read
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = MODULES_OWN,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention over the row's slots, with sliding window or chunks, soft-cap and attention sinks.

    Returns:
        `(B, T, H, Dv)`, contiguous since some models take views of it, and `None` in the place of weights.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is MODULES_OWN:
        sliding_window = getattr(module, "sliding_window", None)
    chunk: int | None = getattr(module, "attention_chunk", None)
    extras = scale, chunk or sliding_window, chunk is not None, softcap, s_aux
    states = attention_mask if isinstance(attention_mask, PagedStates) else None
    cache: PagedCache | None = None if states is not None else module.paged_cache  # type: ignore[assignment]
    if (temperature := getattr(module, "temperature", None)) is not None:
        query = scaled_by_position(query, (states or cache).positions, temperature)  # type: ignore[union-attr]
    if cache is not None and cache.fresh:
        return _prefill(module, cache, query, key, value, *extras), None
    of_latents = key.shape[3] < query.shape[3]
    if of_latents:
        query = absorbed_query(module, query)
    if states is not None:
        out = paged_attention(query, key, value, *states, *extras)
    else:
        assert cache is not None
        out = _decode(cache, cache.layer_of(module.layer_idx, key, value), query, key, value, *extras)  # type: ignore[arg-type]
    return values_of_latents(module, out) if of_latents else out, None


def _prefill(
    module: nn.Module,
    cache: PagedCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    chunked: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of T queries to their own T keys, from position 0 on."""
    layer = cache.layer_of(module.layer_idx, key, value)  # type: ignore[arg-type]
    layer.write(key, value)
    if key.shape[3] < query.shape[3]:
        key, value = expanded(module, key, value)
    key = key.to(layer.keys.dtype)  # as they are stored, and will be read from now on
    query, value = query.to(key.dtype), value.to(key.dtype)
    num_queries, plain = query.shape[2], softcap is None and sinks is None
    if plain and (window is None or window >= num_queries):
        return _causal_attention(query, key, value, scale).transpose(1, 2).contiguous()
    bias = cache.bias(window, query.shape[1] // key.shape[1], query.dtype if plain else torch.float32, chunked)
    return _masked_attention(query, key, value, bias, scale, softcap, sinks)


def _decode(
    cache: PagedCache,
    layer: PagedLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    chunked: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention to what the cache holds, the states of this forward included."""
    plain = softcap is None and sinks is None
    simple = plain and not chunked and cache.rows_in_place and key.shape[3] == query.shape[3]
    if simple and kernels.can_attend(query, key, value, layer.keys):
        forward = cache.positions, cache.write_index, cache.num_slots
        return kernels.write_and_attend(query, key, value, layer.keys, layer.values, *forward, scale, window)
    if can_attend_on_gpu(query.shape[2], layer.keys, layer.values):
        extras = scale, window, chunked, softcap, sinks
        return write_and_attend_on_gpu(query, key, value, paged_states(layer), *extras)
    layer.write(key, value)
    keys, values = (states.transpose(1, 2) for states in cache.keys_and_values(layer))
    query, groups = query.to(keys.dtype), query.shape[1] // keys.shape[1]
    bias = cache.bias(window, groups, query.dtype if plain else torch.float32, chunked)
    return _masked_attention(query, keys, values, bias, scale, softcap, sinks)


def can_attend_on_gpu(num_steps: int, keys: Tensor, values: Tensor) -> bool:
    """Whether `write_and_attend_on_gpu` takes queries of T steps over these pages."""
    head_bytes = keys.itemsize * max(keys.shape[3], values.shape[3])
    sizes = num_steps <= MAX_GPU_STEPS and head_bytes <= MAX_GPU_HEAD_BYTES
    return sizes and keys.dtype in triton_support.DTYPES and triton_support.runs_triton(keys.device)


def write_and_attend_on_gpu(
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, T, D): the states to write
    value: Tensor,  # (B, K, T, Dv)
    states: PagedStates,
    scale: float,
    window: int | None = None,
    chunked: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,): one logit per head that takes probability and gives no value
) -> Tensor:  # (B, T, H, Dv), dtype of the pages
    """Writes the states, then attends: a query at position p sees slots max(0, p - window + 1)..p of its row, or
    p // window * window..p if `chunked`."""
    from trl_selfspec.kernels.triton import attention

    keys, values, addresses, table, positions, write_index, num_slots = states
    attention.write(key, value, keys, values, addresses, write_index)
    query, storage = query.to(keys.dtype), (keys, values, addresses)
    return attention.attend(query, *storage, table, positions, num_slots, scale, window, chunked, softcap, sinks)


@torch.library.custom_op("trl_selfspec::paged_attention", mutates_args=("keys", "values"))
def paged_attention(
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, T, D)
    value: Tensor,  # (B, K, T, Dv)
    keys: Tensor,
    values: Tensor,
    addresses: Tensor,
    table: Tensor,
    positions: Tensor,
    write_index: Tensor,
    num_slots: int,
    scale: float,
    window: int | None,
    chunked: bool,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # (B, T, H, Dv), dtype of the pages
    """What `selfspec_attention` computes in a decode step, as an operator of tensors: see `PagedStates`."""
    states = PagedStates(keys, values, addresses, table, positions, write_index, num_slots)
    if can_attend_on_gpu(query.shape[2], keys, values):
        return write_and_attend_on_gpu(query, key, value, states, scale, window, chunked, softcap, sinks)
    write_states(keys, key, write_index)
    write_states(values, value, write_index)
    pages = table[:, : -(-num_slots // keys.shape[1])]
    seen_keys, seen_values = (
        storage[pages].flatten(1, 2)[:, :num_slots].transpose(1, 2) for storage in (keys, values)
    )
    slots = torch.arange(num_slots, device=keys.device)
    dtype = keys.dtype if softcap is None and sinks is None else torch.float32
    bias = visibility_bias(positions, slots, window, query.shape[1] // keys.shape[2], dtype, chunked)
    return _masked_attention(query.to(keys.dtype), seen_keys, seen_values, bias, scale, softcap, sinks)


@paged_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, *rest: object) -> Tensor:
    heads_last = query.shape[0], query.shape[2], query.shape[1], values.shape[3]
    return query.new_empty(heads_last, dtype=keys.dtype)


def _masked_attention(
    query: Tensor,  # (B, H, T, D)
    keys: Tensor,  # (B, K, S, D), or the first part of them where the values are the rest
    values: Tensor,  # (B, K, S, Dv)
    bias: Tensor,  # (B, 1, G * T, S)
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # (B, T, H, Dv)
    num_rows, num_heads, num_queries, head_dim = query.shape
    groups = num_heads // keys.shape[1]
    if keys.shape[3] < head_dim:
        keys = torch.cat([keys, values], dim=3)
    packed = query.reshape(num_rows, keys.shape[1], groups * num_queries, head_dim)
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(packed, keys, values, attn_mask=bias, scale=scale)
    else:
        out = _eager_attention(packed, keys, values, bias, scale, softcap, sinks, groups)
    return out.reshape(num_rows, num_heads, num_queries, -1).transpose(1, 2).contiguous()


def _causal_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attention of T queries to their own T keys. Heads are grouped by the flash kernel where there is one."""
    causal, grouped = query.shape[2] > 1, query.is_cpu
    if query.is_cuda:
        arguments = torch.backends.cuda.SDPAParams(query, keys, values, None, 0.0, causal, True)
        grouped = torch.backends.cuda.can_use_flash_attention(arguments)
    if not grouped:  # SDPA would hold all scores in memory
        groups = query.shape[1] // keys.shape[1]
        keys, values = (states.repeat_interleave(groups, dim=1) for states in (keys, values))
    return scaled_dot_product_attention(query, keys, values, is_causal=causal, scale=scale, enable_gqa=grouped)


def _eager_attention(
    query: Tensor,  # (B, K, G * T, D)
    keys: Tensor,
    values: Tensor,
    bias: Tensor,  # (B, 1, G * T, S)
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # (H,): one logit per head that takes probability and gives no value
    groups: int,
) -> Tensor:
    scores = query.float() @ keys.float().transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if sinks is not None:
        num_rows, num_kv_heads, packed = scores.shape[:3]
        per_query = sinks.float().view(1, num_kv_heads, groups, 1).expand(num_rows, -1, -1, packed // groups)
        scores = torch.cat([scores, per_query.reshape(num_rows, num_kv_heads, packed, 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights @ values.float()).to(query.dtype)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, selfspec_attention)
