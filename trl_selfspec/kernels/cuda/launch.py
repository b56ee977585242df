"""How kernels are launched. This module needs no triton."""

from typing import Any

import torch
from torch import Tensor


def launch(
    kernel: Any,  # of triton.jit, or of its interpreter
    grid: tuple[int, ...],
    first: Tensor,  # the kernel's first argument, on whose device it runs
    *arguments: object,
    **options: object,
) -> None:
    """Options are Triton's. Products and sums may be fused: 3.9 warns where that is not said, 3.10 is to refrain."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, enable_fp_fusion=True, **options)
