"""How kernels are launched, and whether one can be launched at all."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(
    kernel: Any,  # of triton.jit, or of its interpreter
    grid: tuple[int, ...],
    first: Tensor,  # the kernel's first argument, on whose device it runs
    *arguments: object,
    **options: object,
) -> None:
    """Allows FMA contraction: Triton 3.9 warns where that is not set, 3.10 turns it off. Options are Triton's."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, enable_fp_fusion=True, **options)


@triton.jit
def _store_one(x):
    tl.store(x, 1.0)


def works(device: torch.device) -> bool:
    """Whether the smallest kernel writes what it should.

    Raises:
        Whatever Triton raises where it finds no compiler or no driver.
    """
    x = torch.zeros(1, device=device)
    launch(_store_one, (1,), x)
    return bool(x)
