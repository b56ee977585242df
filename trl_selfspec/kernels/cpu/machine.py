"""What this CPU multiplies with, and up to how many rows our kernels are the faster ones there."""

import functools
from enum import Enum
from pathlib import Path

import torch


class InstructionSet(Enum):
    """The widest that matters here; each has those before it."""

    AVX2 = "avx2"
    AVX512_BF16 = "avx512_bf16"  # with VNNI
    AMX = "amx"


ANY = 2**62
# Rows of a dense layer for which our kernel runs; torch's takes more. AVX2: measured, docs/LOG.md. There torch has no
# instruction for bf16 and its time grows in proportion to the rows; MKL's fp32 product reaches ours at 64 rows. The
# other two are estimates, never timed: with AVX512-BF16 torch's 896 x 4864 takes 0.50, 0.75, 0.78 ms at 1, 8, 16 rows;
# half of the AVX2 kernel's time there is 0.15, 0.27, 0.56, and a fused layer saves calls besides.
MAX_ROWS = {
    (InstructionSet.AVX2, torch.bfloat16): ANY,
    (InstructionSet.AVX2, torch.float32): 64,
    (InstructionSet.AVX512_BF16, torch.bfloat16): 32,
    (InstructionSet.AVX512_BF16, torch.float32): 64,
    (InstructionSet.AMX, torch.bfloat16): 16,
    (InstructionSet.AMX, torch.float32): 64,
}


@functools.cache
def detected() -> InstructionSet:
    """What the CPU has."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # no Linux: the kernels are not built there
        flags = set()
    if not {"avx512_bf16", "avx512_vnni", "avx512vl"} <= flags:
        return InstructionSet.AVX2
    return InstructionSet.AMX if "amx_bf16" in flags else InstructionSet.AVX512_BF16


def instruction_set() -> InstructionSet:
    """For which kernels are compiled and chosen: what the CPU has. Tests put another one in its place."""
    return detected()


def max_rows(dtype: torch.dtype) -> int:
    """Rows up to which our kernel multiplies by weights of this dtype, bf16 or fp32."""
    return MAX_ROWS[instruction_set(), dtype]
