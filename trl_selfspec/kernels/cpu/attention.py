"""Attention over dense rows of keys and values, in the call that writes the new ones. Its eager reference is SDPA."""

import struct

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu.build import available, functions
from trl_selfspec.kernels.cpu.linear import DTYPES


_STRUCT = struct.Struct("8P21qd")  # `Attention` in attention.c: addresses, then sizes, dtypes and strides
LANES = 8


def can_attend(
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, T, D)
    value: Tensor,  # (B, K, T, Dv)
    keys: Tensor,  # (pages, slots, K, D)
) -> bool:
    """Whether `write_and_attend` takes these; they are read in place if their last dimension is contiguous."""
    dtypes = query.dtype in DTYPES and keys.dtype in DTYPES and key.dtype in DTYPES and value.dtype is key.dtype
    lanes = key.shape[-1] % LANES == 0 and value.shape[-1] % LANES == 0
    return query.is_cpu and dtypes and lanes and available()


def write_and_attend(
    query: Tensor,  # (B, H, T, D) bf16 or fp32
    key: Tensor,  # (B, K, T, D) bf16 or fp32: the states to write
    value: Tensor,  # (B, K, T, Dv), dtype of `key`
    keys: Tensor,  # (1 + rows, slots, K, D) bf16 or fp32: row b reads page b + 1
    values: Tensor,  # (1 + rows, slots, K, Dv), dtype of `keys`
    positions: Tensor,  # (B, T) int64
    write_index: Tensor,  # (B * T,) int64: page * slots + slot
    num_slots: int,  # no query sees a slot from here on
    scale: float,
    window: int | None = None,
) -> Tensor:  # (B, T, H, Dv), dtype of `keys`
    """Writes the states, then attends: a query at position p sees slots max(0, p - window + 1)..p of its row.

    A query's result depends neither on the other rows nor on the other queries.
    """
    num_rows, num_heads, num_steps, dim = query.shape
    num_kv_heads, value_dim, capacity = key.shape[1], value.shape[3], keys.shape[1]
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    assert scale > 0 and num_heads % num_kv_heads == 0 and num_slots <= capacity and num_rows < len(keys)
    assert write_index.is_contiguous() and len(write_index) == num_rows * num_steps
    positions = positions.contiguous()
    out = torch.empty((num_rows, num_steps, num_heads, value_dim), dtype=keys.dtype, device=keys.device)
    job = _STRUCT.pack(
        query.data_ptr(), key.data_ptr(), value.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
        positions.data_ptr(), write_index.data_ptr(),
        num_rows, num_steps, num_heads, num_kv_heads, dim, value_dim, capacity, num_slots, window or 0,
        DTYPES[query.dtype], DTYPES[key.dtype], DTYPES[keys.dtype],
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], scale,
    )  # fmt: skip
    functions().attention(job, torch.get_num_threads())
    return out
