"""The attention function of every model, target and drafter alike: it writes to and reads the paged cache.

Decode steps use our kernels where these support the shapes. Elsewhere grouped query heads are packed into the query
length of SDPA, so that no key is repeated in memory. transformers finds the function under `IMPLEMENTATION`. Each
attention module holds the cache (`bind_cache`), because not every architecture passes keyword arguments through.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_selfspec import kernels
from trl_selfspec.kv_cache.paged_cache import PagedCache


IMPLEMENTATION = "selfspec"
MODULES_OWN: Any = object()  # where a model leaves its window to the mask (Qwen2-MoE)


def bind_cache(model: nn.Module, cache: PagedCache | None) -> None:
    """Gives every attention module of `model` the cache that it reads and writes; `None` takes it away."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.paged_cache = cache  # type: ignore[assignment]


def selfspec_attention(
    module: nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, T, D): the states of this forward, which are written to the cache here
    value: Tensor,  # (B, K, T, Dv)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = MODULES_OWN,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention over the row's slots, with sliding window, soft-cap and attention sinks.

    Returns:
        `(B, T, H, Dv)`, contiguous since some models take views of it, and `None` in the place of weights.
    """
    cache: PagedCache = module.paged_cache  # type: ignore[assignment]
    plain = softcap is None and s_aux is None
    layer = cache.layer_of(module.layer_idx, key, value)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sliding_window is MODULES_OWN:
        sliding_window = getattr(module, "sliding_window", None)
    forward = cache.positions, cache.write_index, cache.num_slots, scale, sliding_window
    if plain and cache.rows_in_place and kernels.can_attend(query, key, value, layer.keys):
        return kernels.write_and_attend(query, key, value, layer.keys, layer.values, *forward), None
    if not cache.fresh and kernels.can_attend_on_gpu(query.shape[2], layer):
        extras = scale, sliding_window, softcap, s_aux
        return kernels.write_and_attend_on_gpu(query, key, value, layer, *extras), None
    layer.write(key, value)
    if cache.fresh:  # as they are stored, and will be read from now on
        keys, values = key.to(layer.keys.dtype), value
    else:
        keys, values = (states.transpose(1, 2) for states in cache.keys_and_values(layer))
    num_rows, num_heads, num_queries, head_dim = query.shape
    groups = num_heads // keys.shape[1]
    query, values = query.to(keys.dtype), values.to(keys.dtype)
    if cache.fresh and plain and (sliding_window is None or sliding_window >= num_queries):
        return _causal_attention(query, keys, values, scale).transpose(1, 2).contiguous(), None
    packed = query.reshape(num_rows, keys.shape[1], groups * num_queries, head_dim)
    if plain:
        bias = cache.bias(sliding_window, groups, query.dtype)
        out = scaled_dot_product_attention(packed, keys, values, attn_mask=bias, scale=scaling)
    else:
        bias = cache.bias(sliding_window, groups, torch.float32)
        out = _eager_attention(packed, keys, values, bias, scale, softcap, s_aux, groups)
    return out.reshape(num_rows, num_heads, num_queries, -1).transpose(1, 2).contiguous(), None


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
