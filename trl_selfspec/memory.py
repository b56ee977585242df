"""How many rows fit: the key/value budget of a rollout."""

import psutil
import torch
from transformers import PretrainedConfig


KV_SHARE = 0.5  # of the memory that is free when a rollout starts; the rest is for activations and sampling


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token over all layers, from the config's head counts."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize


def affordable_rows(
    config: PretrainedConfig, dtype: torch.dtype, row_capacity: int, device: torch.device, held_bytes: int = 0
) -> int:
    """Rows of `row_capacity` positions whose keys and values fit into `KV_SHARE` of the free memory, at least one.

    `held_bytes` are those of the cache that the new one replaces: they count as free.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
    return max(1, int(KV_SHARE * (free + held_bytes)) // (kv_bytes_per_token(config, dtype) * row_capacity))
