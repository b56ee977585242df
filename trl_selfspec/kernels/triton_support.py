"""Which GPUs our kernels run on."""

import functools
import logging
from importlib.util import find_spec

import torch

from trl_selfspec.utils import failures_raised_as


logger = logging.getLogger(__name__)

AMPERE = (8, 0)  # the first with bf16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is installed and works, and `device` is a GPU that its kernels here are written for."""
    if device.type != "cuda" or not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < AMPERE:
        return False
    return _launches(device)


class LaunchError(RuntimeError):
    """Triton can't compile or launch a kernel here."""


def _launches(device: torch.device) -> bool:
    """Triton builds its launcher with the system's C compiler and Python's headers, which slim images lack."""
    try:
        with failures_raised_as(LaunchError):
            from trl_selfspec.kernels.triton.launch import works

            return works(device)
    except LaunchError as error:
        logger.warning(
            "trl_selfspec: Triton can't launch a kernel here, so rollouts run on torch's slower ones. It needs a C "
            "compiler and Python's headers (gcc, python3-dev): %s",
            error,
        )
        return False
