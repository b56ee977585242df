"""Which GPUs our kernels run on."""

import functools
from importlib.util import find_spec

import torch


AMPERE = (8, 0)  # the first with bf16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and `device` is a GPU that its kernels here are written for."""
    if device.type != "cuda" or not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= AMPERE
