"""Which GPUs our kernels run on."""

import functools
import logging
import subprocess
from importlib.util import find_spec

import torch


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


def errors() -> tuple[type[Exception], ...]:
    """What a kernel raises where it cannot be compiled or launched, a third party's among them."""
    raised = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, OSError)
    if find_spec("triton") is None:
        return raised
    from triton.errors import TritonError

    return (*raised, subprocess.SubprocessError, TritonError)


def _launches(device: torch.device) -> bool:
    """Triton builds its launcher with the system's C compiler and Python's headers, which slim images lack."""
    from trl_selfspec.kernels.triton.launch import works

    try:
        return works(device)
    except errors() as error:
        logger.warning(
            "trl_selfspec: Triton can't launch a kernel here, so rollouts run on torch's slower ones. It needs a C "
            "compiler and Python's headers (gcc, python3-dev): %s",
            error,
        )
        return False
