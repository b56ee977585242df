"""Decode attention on CUDA in the same call that writes the new states; triton is imported when it first runs."""

import torch
from torch import Tensor

from trl_selfspec.kernels import gpu


MAX_STEPS = 17  # a token and a draft of 16
MAX_DIM = 256
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def can_attend_on_gpu(
    query: Tensor,  # (B, H, T, D)
    keys: Tensor,  # (pages, page_size, K, D)
    values: Tensor,  # (pages, page_size, K, Dv)
) -> bool:
    """Whether `write_and_attend_on_gpu` takes these."""
    if query.shape[2] > MAX_STEPS or max(keys.shape[3], values.shape[3]) > MAX_DIM or keys.dtype not in DTYPES:
        return False
    return gpu.runs_triton(query.device)


def write_and_attend_on_gpu(
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, T, D): the states to write
    value: Tensor,  # (B, K, T, Dv)
    keys: Tensor,  # (pages, page_size, K, D) bf16, fp16 or fp32
    values: Tensor,  # (pages, page_size, K, Dv), dtype of `keys`
    addresses: Tensor,  # (2,) int64: where the two lie; a captured graph follows them
    table: Tensor,  # (B, pages_per_row) int64: slot s of row b lies in page table[b, s // page_size]
    positions: Tensor,  # (B, T) int64
    write_index: Tensor,  # (B * T,) int64: page * page_size + slot
    num_slots: int,  # no query sees a slot from here on
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,): one logit per head that takes probability and gives no value
) -> Tensor:  # (B, T, H, Dv), dtype of `keys`
    """Writes the states, then attends: a query at position p sees slots max(0, p - window + 1)..p of its row."""
    from trl_selfspec.kernels.cuda import attention

    attention.write(key, value, keys, values, addresses, write_index)
    query = query.to(keys.dtype)
    return attention.attend(query, keys, values, addresses, table, positions, num_slots, scale, window, softcap, sinks)
