"""What some families do within attention besides attending, done by the engine instead: latents, chunks, temperature.

**Latent attention** (DeepSeek-V2 and V3, Moonlight, GLM-4.7-Flash, MiniCPM3, LongCat). transformers caches one latent
and one rotated key per token, and expands them to the keys and values of every head before each attention. The engine
caches the same and never expands them in a decode step: a head's part of the projection goes into its query, and into
its output (section 2.1.2 of arXiv 2405.04434), so that all heads attend to one key, which is the rotated key and the
latent, and one value, which is the latent.

**Llama 4** sees its chunk of the context alone in most layers, and in the others scales queries by position, which its
module would count from the cache's length.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


class Temperature(NamedTuple):
    """A query at position p is scaled by `1 + attn_scale * log(1 + floor((p + 1) / floor_scale))`."""

    floor_scale: float
    attn_scale: float


def prepare_attention(tree: nn.Module) -> None:
    """Leaves to the engine's attention function what it does in the place of these modules."""
    for module in tree.modules():
        if hasattr(module, "expand_kv"):
            module.expand_kv = _not_expanded  # type: ignore[assignment]
            module.kv_b_proj.keeps_weight = True  # type: ignore[union-attr]  # read here, and not called
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and hasattr(module, "layer_idx"):
            kinds = getattr(config, "layer_types", None) or ()
            if module.layer_idx < len(kinds) and kinds[module.layer_idx] == "chunked_attention":  # type: ignore[operator]
                module.attention_chunk = config.attention_chunk_size  # type: ignore[assignment]
        if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
            module.attn_temperature_tuning = False  # type: ignore[assignment]
            module.temperature = Temperature(module.floor_scale, module.attn_scale)  # type: ignore[assignment, arg-type]


def _not_expanded(latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """What the attention function gets, and the cache keeps, as keys and values of one head."""
    return rotated, latents


def expanded(module: nn.Module, rotated: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `(B, H, T, D)` and values `(B, H, T, Dv)` of every head, as the policy computes them."""
    return type(module).expand_kv(module, latents, rotated)  # type: ignore[attr-defined]


def absorbed_query(module: nn.Module, query: Tensor) -> Tensor:
    """`(B, H, T, D)`, without a position and then rotated, to what attends to a rotated key and a latent."""
    plain, rotated = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], dim=3)  # type: ignore[list-item]
    weight = _head_weights(module, query.shape[1])[:, : plain.shape[3]]
    return torch.cat([rotated, _multiply_heads(plain, weight).to(query.dtype)], dim=3)


def values_of_latents(module: nn.Module, out: Tensor) -> Tensor:
    """From what heads saw of latents, `(B, T, H, rank)`, what they would have seen of values, `(B, T, H, Dv)`."""
    weight = _head_weights(module, out.shape[2])[:, module.qk_nope_head_dim :]  # type: ignore[misc]
    return _multiply_heads(out.transpose(1, 2), weight.transpose(1, 2)).transpose(1, 2).contiguous()


def _multiply_heads(x: Tensor, weight: Tensor) -> Tensor:
    """`(B, H, T, n)` by `(H, n, m)`.

    einsum and reshape would be compiled anew for T = 1, and matmul would copy the weight B times.
    """
    num_rows, num_heads, num_steps, size = x.shape
    heads_first = x.to(weight.dtype).transpose(0, 1).clone(memory_format=torch.contiguous_format)
    return (
        torch.bmm(heads_first.view(num_heads, num_rows * num_steps, size), weight)
        .view(num_heads, num_rows, num_steps, -1)
        .transpose(0, 1)
    )


def _head_weights(module: nn.Module, num_heads: int) -> Tensor:  # (H, D without a position + Dv, rank)
    weight: Tensor = module.kv_b_proj.weight  # type: ignore[union-attr, assignment]
    return weight.view(num_heads, -1, weight.shape[1])


def scaled_by_position(
    query: Tensor,  # (B, H, T, D)
    positions: Tensor,  # (B, T)
    temperature: Temperature,
) -> Tensor:
    steps = torch.floor((positions.float() + 1.0) / temperature.floor_scale)
    scales = torch.log1p(steps) * temperature.attn_scale + 1.0
    return (query * scales[:, None, :, None]).to(query.dtype)
