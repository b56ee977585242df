"""The attention kernels compile for GPUs without one: Triton brings its own assembler."""

import subprocess
import sys

import pytest


pytest.importorskip("triton", reason="triton is not installed")

SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a block may have, of Ampere's and Ada's consumer cards
PROGRAM = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl_selfspec.kernels.cuda.attention import SPLIT, COMBINED, _attend_split, _combine, _write_slot, num_warps
from trl_selfspec.kernels.cuda.attention import tiling

def compiled(kernel, pointers, constants, floats=(), **options):
    names = kernel.arg_names
    types = pointers | {name: "fp32" for name in floats} | {name: "constexpr" for name in constants}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types.get(name, "i32") for name in names}, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    assert binary.asm["cubin"]
    tensor_cores = "mma" in binary.asm["ptx"]
    print(binary.metadata.shared, tensor_cores)

dtype, dim, queries = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
state, itemsize = "*" + dtype, 4 if dtype == "fp32" else 2
tile, block, dims, value_dims = tiling(queries, dim, dim, itemsize)
sizes = {"HEADS": 3, "DIM": dim, "VALUE_DIM": dim, "DIMS": dims, "VALUE_DIMS": value_dims}
pointers = {name: state for name in ("query", "keys", "values")} | {"table": "*i64", "positions": "*i64"}
pointers |= {"sums": "*fp32", "statistics": "*fp32"}
constants = sizes | {"PAGE_SIZE": 64, "SOFTCAP": True, "TILE": tile, "BLOCK": block, "SPLIT": SPLIT}
warps = num_warps(tile, value_dims)
compiled(_attend_split, pointers, constants, ("scale", "softcap"), num_warps=warps)
pointers = {"sums": "*fp32", "statistics": "*fp32", "positions": "*i64", "sinks": state, "out": state}
constants = {"SINKS": True, "VALUE_DIM": dim, "VALUE_DIMS": value_dims, "SPLIT": SPLIT, "COMBINED": COMBINED}
compiled(_combine, pointers, constants)
pointers = {name: state for name in ("key", "value", "keys", "values")} | {"write_index": "*i64"}
compiled(_write_slot, pointers, sizes | {"PADDED_HEADS": 4})
"""


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(("dtype", "dim", "queries"), [("bf16", 128, 7), ("bf16", 256, 119), ("fp32", 80, 7)])
def test_the_kernels_compile(capability: str, dtype: str, dim: int, queries: int, monkeypatch, tmp_path):
    """What the interpreter accepts may still be no Triton, or ask for more shared memory than a GPU has."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or nothing would be compiled the second time
    command = [sys.executable, "-c", PROGRAM, capability, dtype, str(dim), str(queries)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    attend, combine, write = (line.split() for line in done.stdout.splitlines())
    assert max(int(shared) for shared, _ in (attend, combine, write)) <= SMALLEST_SHARED_MEMORY
    assert [tensor_cores for _, tensor_cores in (attend, combine)] == [str(dtype != "fp32"), "False"]
