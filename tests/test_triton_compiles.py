"""The attention kernels compile for GPUs without one: Triton brings its own assembler."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="triton is not installed")

SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a block may have, of Ampere's and Ada's consumer cards
COMPILE = """
import re, sys, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl_selfspec.kernels.cuda import attention

def compiled(kernel, pointers, constants, floats=(), whole=(), **options):
    names = kernel.arg_names
    types = pointers | {name: "fp32" for name in floats} | {name: "constexpr" for name in constants}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, *whole]}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types.get(name, "i32") for name in names}, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    assert binary.asm["cubin"]
    ptx = binary.asm["ptx"]
    print(binary.metadata.shared, "mma" in ptx, len(re.findall(r"cp.async.cg.*0x10|(?:ld|st).global.*v4.b32", ptx)))

dtype, dim = sys.argv[2], int(sys.argv[3])
state, itemsize = "*" + dtype, 4 if dtype == "fp32" else 2
DTYPE = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
"""
ATTENTION = """
tile, block, dims, value_dims = attention.tiling(int(sys.argv[4]), dim, dim, itemsize)
sizes = {"HEADS": 3, "DIM": dim, "VALUE_DIM": dim, "DIMS": dims, "VALUE_DIMS": value_dims}
pointers = {"query": state, "addresses": "*i64", "table": "*i64", "positions": "*i64"}
pointers |= {"sums": "*fp32", "statistics": "*fp32"}
constants = sizes | {"PAGE_SIZE": 64, "SOFTCAP": True, "TILE": tile, "BLOCK": block, "SPLIT": attention.SPLIT}
warps = attention.num_warps(tile, value_dims)
compiled(attention._attend_split, pointers, constants, ("scale", "softcap"), num_warps=warps)
pointers = {"sums": "*fp32", "statistics": "*fp32", "positions": "*i64", "sinks": state, "out": state}
split = {"SPLIT": attention.SPLIT, "COMBINED": attention.COMBINED}
compiled(attention._combine, pointers, {"SINKS": True, "VALUE_DIM": dim, "VALUE_DIMS": value_dims} | split)
pointers = {"key": state, "value": state, "addresses": "*i64", "write_index": "*i64"}
compiled(attention._write_slot, pointers, sizes | {"PADDED_HEADS": 4, "DTYPE": DTYPE})
"""
UNALIGNED = """
@triton.jit
def storage(addresses, which: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(addresses + which).to(tl.pointer_type(DTYPE))

attention.storage = storage
"""


Report = Callable[..., list[tuple[int, bool, int]]]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Report:
    """Of each kernel: bytes of shared memory, whether it uses tensor cores, how often it moves 16 bytes at once."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or nothing would be compiled the second time

    def run(program: str, *arguments: str) -> list[tuple[int, bool, int]]:
        file = tmp_path / "program.py"  # triton reads the source of its functions
        file.write_text(program)
        done = subprocess.run([sys.executable, str(file), *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        return [(int(shared), mma == "True", int(wide)) for shared, mma, wide in lines]

    return run


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(("dtype", "dim", "queries"), [("bf16", 128, 7), ("bf16", 256, 119), ("fp32", 80, 7)])
def test_the_attention_kernels_compile(capability: str, dtype: str, dim: int, queries: int, report: Report) -> None:
    """What the interpreter accepts may still be no Triton, or ask for more shared memory than a GPU has."""
    attend, combine, write = report(COMPILE + ATTENTION, capability, dtype, str(dim), str(queries))
    assert max(shared for shared, _, _ in (attend, combine, write)) <= SMALLEST_SHARED_MEMORY
    assert [tensor_cores for _, tensor_cores, _ in (attend, combine)] == [dtype != "fp32", False]
    assert attend[2] > 0


def test_pages_found_by_address_are_read_in_16_bytes(report: Report) -> None:
    """An address says nothing of its alignment, and loads of 2 bytes would take many times as long."""
    arguments = "90", "bf16", "128", "7"
    (_, _, wide), *_ = report(COMPILE + ATTENTION, *arguments)
    (_, _, control), *_ = report(COMPILE + UNALIGNED + ATTENTION, *arguments)
    assert wide >= control + 32
