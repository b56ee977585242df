"""Decode attention on CUDA in the same call that writes the new states; triton is imported when it first runs."""

from torch import Tensor

from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.kernels.layer_interface import Pages


MAX_STEPS = 17  # a token and a draft of 16
MAX_DIM = 256


def can_attend_on_gpu(
    num_steps: int,  # T
    pages: Pages,
) -> bool:
    """Whether `write_and_attend_on_gpu` takes queries of T steps over these pages."""
    keys, values = pages.keys, pages.values
    if num_steps > MAX_STEPS or max(keys.shape[3], values.shape[3]) > MAX_DIM or keys.dtype not in gpu.DTYPES:
        return False
    return gpu.runs_triton(keys.device)


def write_and_attend_on_gpu(
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, T, D): the states to write
    value: Tensor,  # (B, K, T, Dv)
    pages: Pages,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,): one logit per head that takes probability and gives no value
) -> Tensor:  # (B, T, H, Dv), dtype of the pages
    """Writes the states, then attends: a query at position p sees slots max(0, p - window + 1)..p of its row."""
    from trl_selfspec.kernels.triton import attention

    attention.write(key, value, pages.keys, pages.values, pages.addresses, pages.owner.write_index)
    return attend_on_gpu(query, pages, scale, window, softcap, sinks)


def attend_on_gpu(
    query: Tensor,  # (B, H, T, D)
    pages: Pages,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:  # (B, T, H, Dv), dtype of the pages
    """Attends to states that have been written."""
    from trl_selfspec.kernels.triton import attention

    step = pages.owner
    storage, query = (pages.keys, pages.values, pages.addresses), query.to(pages.keys.dtype)
    return attention.attend(query, *storage, step.table, step.positions, step.num_slots, scale, window, softcap, sinks)
