"""The smallest kernel there is: whether Triton can build and launch anything here."""

import torch
import triton
import triton.language as tl

from trl_selfspec.kernels.cuda.launch import launch


@triton.jit
def _store_one(x):
    tl.store(x, 1.0)


def works(device: torch.device) -> bool:
    """Whether a kernel wrote what it should; raises what Triton raises where it finds no compiler or no driver."""
    x = torch.zeros(1, device=device)
    launch(_store_one, (1,), x)
    return bool(x)
