"""Compiles `cpu.c` on first use and wraps its functions; inference only.

The library is built with the system C compiler into the user's cache directory, under a name that depends on
source, flags and CPU, and moved into place atomically. It is linked without an OpenMP runtime: the symbols
resolve to the one torch has loaded, so there is a single thread pool. No compiler, or no AVX2: `available()`
is False after one warning, and callers use torch.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor


logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno")
COMPILE_TIMEOUT_S = 120
GROUP_SIZES = (32, 64, 96, 128)
_DTYPES = {torch.bfloat16: 0, torch.float32: 1}

_SIZE, _POINTER, _INT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "linear_bf16": (_INT, *[_SIZE] * 3, _POINTER, _POINTER, _POINTER, _INT, _POINTER),
    "linear_int4": (_INT, *[_SIZE] * 4, _POINTER, _INT, _POINTER, _POINTER, _INT, _POINTER, _INT, _POINTER),
}


def available() -> bool:
    """Whether the kernels can be used here. Compiles them on the first call, which takes seconds."""
    return _library() is not None


def linear_bf16(
    x: Tensor,  # (..., K) bf16
    weight: Tensor,  # (N, K) bf16, contiguous; read in place
    bias: Tensor | None = None,  # (N,) bf16 or fp32
) -> Tensor:  # (..., N) bf16
    """x W^T + bias with fp32 accumulation; an output element does not depend on the other rows."""
    assert x.dtype == weight.dtype == torch.bfloat16 and weight.is_contiguous()
    _check_inference(x, weight, bias)
    (n, k), x = weight.shape, x.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel():
        m, threads = x.numel() // k, torch.get_num_threads()
        _functions().linear_bf16(threads, m, n, k, x.data_ptr(), weight.data_ptr(), *_bias(bias, n), y.data_ptr())
    return y


def linear_int4(
    x: Tensor,  # (..., K) bf16 or fp32
    packed: Tensor,  # (N, groups * group_size / 2) uint8, see `int4.pack`
    scale_shift: Tensor,  # (N, groups, 2) bf16 or fp32: weight = scale * code - shift
    bias: Tensor | None = None,  # (N,) bf16 or fp32
) -> Tensor:  # (..., N), dtype of x
    """W4A8: activations are rounded to int8 per (row, group); an output element does not depend on the other rows."""
    _check_inference(x, packed, bias)
    n, groups, _ = scale_shift.shape
    group_size = packed.shape[1] * 2 // groups
    k = x.shape[-1]
    assert group_size in GROUP_SIZES and (groups - 1) * group_size < k <= groups * group_size
    assert packed.is_contiguous() and scale_shift.is_contiguous() and len(packed) == n
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], n)
    if y.numel():
        weights = packed.data_ptr(), scale_shift.data_ptr(), _DTYPES[scale_shift.dtype]
        m, threads = x.numel() // k, torch.get_num_threads()
        _functions().linear_int4(
            threads, m, n, k, group_size, x.data_ptr(), _DTYPES[x.dtype], *weights, *_bias(bias, n), y.data_ptr()
        )
    return y


def _functions() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "check available() first"
    return library


def _check_inference(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if torch.is_grad_enabled():
        assert not (x.requires_grad or weight.requires_grad), "the kernels have no backward: use torch.no_grad()"
    assert x.device.type == weight.device.type == "cpu"


def _bias(bias: Tensor | None, n: int) -> tuple[int | None, int]:
    if bias is None:
        return None, 0
    assert bias.shape == (n,) and bias.is_contiguous()
    return bias.data_ptr(), _DTYPES[bias.dtype]


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            raise OSError("the CPU has no AVX2")
        library = ctypes.CDLL(str(_build()))
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = signature, None
        return library
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("trl_selfspec: no CPU kernels, rollouts use torch's slower ones: %s", _reason(error))
        return None


def _reason(error: Exception) -> str:
    return getattr(error, "stderr", None) or str(error)


def _build() -> Path:
    """Path of the compiled library, built if this source, compiler and CPU have none yet."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise OSError("no C compiler (cc) on the PATH")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS, _cpu_name())).encode()).hexdigest()[:16]
    directory = _cache_directory()
    target = directory / f"cpu-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            unit, library = f"{scratch}/cpu.o", f"{scratch}/cpu.so"
            _run(compiler, *FLAGS, "-c", str(SOURCE), "-o", unit)
            _run(compiler, "-shared", unit, "-o", library, "-lm")  # no -fopenmp: torch's runtime is to be used
            os.replace(library, target)
    return target


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)


def _cpu_name() -> str:
    """What `-march=native` depends on; home directories are shared by machines that differ."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(base) / "trl_selfspec"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory
