"""The kernels compile for GPUs without one: Triton brings its own assembler."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="triton is not installed")

SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a block may have, of Ampere's and Ada's consumer cards
SPILLED = 16  # bytes, outside the loop
COMPILE = """
import re, subprocess, sys, tempfile, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, pointers, constants, floats=(), aligned=(), **options):
    names = kernel.arg_names
    types = pointers | {name: "fp32" for name in floats} | {name: "constexpr" for name in constants}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *aligned)}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types.get(name, "i32") for name in names}, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    assert binary.asm["cubin"]
    tensor_cores = "mma" in binary.asm["ptx"]
    print(binary.metadata.shared, tensor_cores, spilled(binary), "cp.async" in binary.asm["ptx"])

def spilled(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"STACK:(\\d+)", usage).group(1)
"""
ATTENTION = """
from trl_selfspec.kernels.cuda.attention import SPLIT, COMBINED, _attend_split, _combine, _write_slot, num_warps
from trl_selfspec.kernels.cuda.attention import tiling

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


LINEAR = """
from trl_selfspec.kernels.cuda.linear import NUM_WARPS, STAGES, _linear_8bit, _linear_int4, num_splits, tiling

dtype, n, k, rows = sys.argv[2], *map(int, sys.argv[3:6])
splits = num_splits(n, k // 128)
tile_m, tile_n = tiling(rows, n, splits)
constants = {"SPLITS": splits, "STEP": 128, "WHOLE": True, "BIAS": True, "TILE_M": tile_m, "TILE_N": tile_n}
constants |= {"STAGES": STAGES, "ASSEMBLER": True}
pointers = {name: "*" + dtype for name in ("x", "bias", "out")} | {"sums": "*fp32", "counters": "*i32"}
int4 = {"packed": "*u8", "scale_shift": "*i32"}
compiled(_linear_int4, pointers | int4, constants | {"GROUP": 128}, aligned=("N", "K"), num_warps=NUM_WARPS)
for fp8 in (False, True):
    eight = {"codes": "*u8", "scale": "*" + dtype}
    compiled(_linear_8bit, pointers | eight, constants | {"FP8": fp8}, aligned=("N", "K"), num_warps=NUM_WARPS)
"""
QUANTIZE = """
from trl_selfspec.kernels.cuda.quantize import BYTES_AT_ONCE, COLUMNS_AT_ONCE, _quantize_4bit, _quantize_8bit

source, dtype = sys.argv[2:4]
constants = {"SIZE": 128, "BYTES": 64, "GROUPS": BYTES_AT_ONCE // 64, "WHOLE": True}
pointers = {"weight": "*" + source, "packed": "*u8", "scale_shift": "*" + dtype}
compiled(_quantize_4bit, pointers, constants, aligned=("num_weights_per_row", "row_stride"))
for fp8 in (False, True):
    pointers = {"weight": "*" + source, "codes": "*u8", "scales": "*" + dtype}
    compiled(_quantize_8bit, pointers, {"BLOCK": COLUMNS_AT_ONCE, "FP8": fp8}, aligned=("K", "row_stride"))
"""


@pytest.fixture
def usage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[tuple[int, bool, int, bool]]]:
    """Compiles a program's kernels: shared memory, tensor cores, bytes of spilled registers, asynchronous copies."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or nothing would be compiled the second time

    def run(program: str, *arguments: object) -> list[tuple[int, bool, int, bool]]:
        command = [sys.executable, "-c", COMPILE + program, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        return [(int(a), b == "True", int(c), d == "True") for a, b, c, d in lines]

    return run


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(("dtype", "dim", "queries"), [("bf16", 128, 7), ("bf16", 256, 119), ("fp32", 80, 7)])
def test_attention_compiles(capability: str, dtype: str, dim: int, queries: int, usage):
    """What the interpreter accepts may still be no Triton, or ask for more shared memory than a GPU has."""
    attend, combine, write = usage(ATTENTION, capability, dtype, dim, queries)
    assert max(shared for shared, *_ in (attend, combine, write)) <= SMALLEST_SHARED_MEMORY
    assert [tensor_cores for _, tensor_cores, *_ in (attend, combine)] == [dtype != "fp32", False]


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(
    ("dtype", "n", "k", "rows"), [("bf16", 3584, 18944, 8), ("bf16", 152064, 3584, 64), ("fp16", 3584, 18944, 32)]
)
def test_linear_layers_compile(capability: str, dtype: str, n: int, k: int, rows: int, usage):
    """Narrow and wide tiles, few and many rows: on tensor cores, weights copied ahead, nothing spilled."""
    for shared, tensor_cores, spilled, copies_ahead in usage(LINEAR, capability, dtype, n, k, rows):
        assert shared <= SMALLEST_SHARED_MEMORY and tensor_cores and copies_ahead and spilled <= SPILLED


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(("source", "dtype"), [("fp32", "bf16"), ("fp16", "fp16")])
def test_quantization_compiles(capability: str, source: str, dtype: str, usage):
    for shared, _, spilled, _ in usage(QUANTIZE, capability, source, dtype):
        assert shared <= SMALLEST_SHARED_MEMORY and spilled == 0
