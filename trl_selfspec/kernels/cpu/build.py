"""Compiles `cpu.c` on first use and loads it.

The library is built with the system C compiler into the user's cache directory, under a name that depends on
source, flags and CPU, and moved into place atomically. It is linked without an OpenMP runtime: the symbols
resolve to the one torch has loaded, so there is a single thread pool. Each instruction set has a library of its own.
No compiler, or no AVX2: `available()`
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

from trl_selfspec.kernels.cpu import machine
from trl_selfspec.kernels.cpu.machine import InstructionSet
from trl_selfspec.utils import cache_directory


logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-ffp-contract=off")
COMPILE_TIMEOUT_S = 120

_SIZE, _POINTER, _INT, _DOUBLE, _STRUCT = (
    ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_double, ctypes.c_char_p
)  # fmt: skip
_SIGNATURES = {
    "linear": (_STRUCT, _INT, _SIZE, _POINTER, _POINTER, _INT),
    "decoder_layer": (_STRUCT, _INT),
    "attention": (_STRUCT, _INT),
    "sample": (_INT, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER),
    "suffix_match": (_INT, _SIZE, _SIZE, _SIZE, _POINTER, _SIZE, *(_POINTER,) * 7),
    "rms_norm": (_INT, _SIZE, _SIZE, _DOUBLE, _POINTER, _INT, _POINTER, _INT, _POINTER, _INT),
}


def available() -> bool:
    """Whether the kernels can be used here. Compiles them on the first call, which takes seconds."""
    return _library() is not None


def functions() -> ctypes.CDLL:
    library = _library()
    assert library is not None, "check available() first"
    return library


def _library() -> ctypes.CDLL | None:
    return _load(machine.instruction_set())


@functools.cache
def _load(instructions: InstructionSet) -> ctypes.CDLL | None:
    try:
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            raise OSError("the CPU has no AVX2")
        library = ctypes.CDLL(str(_build(instructions)))
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = signature, None
        return library
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("trl_selfspec: no CPU kernels, rollouts use torch's slower ones: %s", _reason(error))
        return None


def _reason(error: Exception) -> str:
    return getattr(error, "stderr", None) or str(error)


def variant(instructions: InstructionSet) -> tuple[str, ...]:
    """The flag that makes `vectors.c` compute as this instruction set does, on whatever CPU this is."""
    if instructions is InstructionSet.AVX2:
        return ("-DNARROW",)
    return ("-DEMULATE", "-O1") if machine.detected() is InstructionSet.AVX2 else ()


def _build(instructions: InstructionSet) -> Path:
    """Path of the compiled library, built if this source, compiler and CPU have none yet."""
    flags = FLAGS + variant(instructions)
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise OSError("no C compiler (cc) on the PATH")
    key = hashlib.sha256(_sources() + repr((compiler, flags, _cpu_name())).encode()).hexdigest()[:16]
    directory = cache_directory()
    target = directory / f"cpu-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            unit, library = f"{scratch}/cpu.o", f"{scratch}/cpu.so"
            _run(compiler, *flags, "-c", str(SOURCE), "-o", unit)
            _run(compiler, "-shared", unit, "-o", library, "-lm")  # no -fopenmp: torch's runtime is to be used
            os.replace(library, target)
    return target


def _sources() -> bytes:
    return b"".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.c")))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)


def _cpu_name() -> str:
    """What `-march=native` depends on; home directories are shared by machines that differ."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
