"""The kernels compile for GPUs without one: Triton brings its own assembler."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forking import Forks, forks


pytest.importorskip("triton", reason="triton is not installed")

SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a block may have, of Ampere's and Ada's consumer cards
SPILLED = 16  # bytes, outside the loop
CAPABILITIES = [pytest.param("80", marks=pytest.mark.slow), "90"]
COMPILE = """
import re, subprocess, sys, tempfile, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def compiled(kernel, pointers, constants, floats=(), aligned=(), **options):
    names = kernel.arg_names
    types = pointers | {name: "fp32" for name in floats} | {name: "constexpr" for name in constants}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *aligned)}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types.get(name, "i32") for name in names}, constants, aligned)
    options = {"enable_fp_fusion": True} | options  # as `launch` does
    binary = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    stack = re.search(r"STACK:(\\d+)", told(binary, triton.knobs.nvidia.cuobjdump.path, "-res-usage"))[1]
    ptx = binary.asm["ptx"]
    print(binary.metadata.shared, "mma" in ptx, stack, "cp.async" in ptx)
    return binary

def told(binary, *command):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout

TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
"""
ATTENTION = """
from trl_selfspec.kernels.triton.attention import SPLIT, COMBINED, _attend_split, _combine, _write_slot, num_warps
from trl_selfspec.kernels.triton.attention import tiling

dtype, dim, value_dim, queries = sys.argv[2], *map(int, sys.argv[3:6])
state, itemsize = "*" + dtype, 4 if dtype == "fp32" else 2
tile, block, dims, value_dims = tiling(queries, dim, value_dim, itemsize)
sizes = {"HEADS": 3, "DIM": dim, "VALUE_DIM": value_dim, "DIMS": dims, "VALUE_DIMS": value_dims}
pointers = {"query": state, "addresses": "*i64", "table": "*i64", "positions": "*i64"}
pointers |= {"sums": "*fp32", "statistics": "*fp32"}
constants = sizes | {"PAGE_SIZE": 64, "SOFTCAP": True, "TILE": tile, "BLOCK": block, "SPLIT": SPLIT}
constants |= {"CHUNKED": True, "LATENT": value_dim > dim}
warps = num_warps(tile, value_dims)
compiled(_attend_split, pointers, constants, ("scale", "softcap"), num_warps=warps)
pointers = {"sums": "*fp32", "statistics": "*fp32", "positions": "*i64", "sinks": state, "out": state}
constants = {"CHUNKED": True, "SINKS": True, "VALUE_DIM": value_dim, "VALUE_DIMS": value_dims}
constants |= {"SPLIT": SPLIT, "COMBINED": COMBINED}
compiled(_combine, pointers, constants)
pointers = {"key": state, "value": state, "addresses": "*i64", "write_index": "*i64"}
compiled(_write_slot, pointers, sizes | {"PADDED_HEADS": 4, "DTYPE": TYPES[dtype]})
"""
SPECIALISED = """
import pkgutil
from importlib import import_module
from trl_selfspec.kernels import triton as kernels

for module in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
    for kernel in vars(import_module(module.name)).values():
        if isinstance(kernel, triton.JITFunction) and "program_id(0)" in kernel.src:
            print(*(p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize))
"""
UNALIGNED = """
from trl_selfspec.kernels.triton import attention

@triton.jit
def storage(addresses, which: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(addresses + which).to(tl.pointer_type(DTYPE))

attention.storage = storage
"""
LINEAR = """
from trl_selfspec.kernels.triton.int4_linear import NUM_WARPS, STAGES, _linear_int4, num_splits, tiling

def compiled_linear(dtype, n, k, rows, warps=NUM_WARPS):
    splits = num_splits(n, k // 128)
    tile_m, tile_n = tiling(rows, n, splits)
    constants = {"SPLITS": splits, "STEP": 128, "WHOLE": True, "BIAS": True, "TILE_M": tile_m, "TILE_N": tile_n}
    constants |= {"GROUP": 128, "STAGES": STAGES, "ASSEMBLER": True}
    pointers = {name: "*" + dtype for name in ("x", "bias", "out")} | {"sums": "*fp32", "counters": "*i32"}
    pointers |= {"packed": "*u8", "scale_shift": "*i32"}
    return compiled(_linear_int4, pointers, constants, aligned=("N", "K"), num_warps=warps)
"""
SEVERAL_LINEAR = """
for dtype, n, k, rows in (shape.split("/") for shape in sys.argv[2:]):
    compiled_linear(dtype, int(n), int(k), int(rows))
"""
INSTRUCTIONS = """
n, k = 3584, 18944

def longest_loop(binary):
    places, longest, place = {}, 0, 0
    for line in told(binary, triton.knobs.nvidia.nvdisasm.path, "-c").splitlines():
        if label := re.match(r"(\\.L_\\w+):", line):
            places[label[1]] = place
        elif re.match(r"\\s+/\\*[0-9a-f]+\\*/", line):
            place += 1
            if branch := re.search(r"BRA.*`\\((\\.L_\\w+)\\)", line):
                longest = max(longest, place - places.get(branch[1], place))
    return longest

for rows in map(int, sys.argv[2].split()):
    step = 128 * tiling(rows, n, num_splits(n, k // 128))[1]
    for warps in map(int, sys.argv[3].split()):
        binary = compiled_linear("bf16", n, k, rows, warps)
        print("loop", longest_loop(binary) * 32 * warps / step)
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Without the interpreter, and with a cache of its own, or nothing would be compiled the second time."""
    with forks(TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("cache"))) as forked:
        yield forked


@pytest.fixture
def lines(forked: Forks, tmp_path: Path) -> Callable[..., list[list[str]]]:
    """Runs a program: the words of the lines that it prints."""

    def run(program: str, *arguments: object) -> list[list[str]]:
        file = tmp_path / "program.py"  # triton reads the source of its functions
        file.write_text(COMPILE + program)
        return [line.split() for line in forked.run(file, *arguments).splitlines()]

    return run


@pytest.fixture
def usage(lines: Callable[..., list[list[str]]]) -> Callable[..., list[tuple[int, bool, int, bool]]]:
    """Compiles a program's kernels: shared memory, tensor cores, bytes of spilled registers, asynchronous copies."""

    def run(program: str, *arguments: object) -> list[tuple[int, bool, int, bool]]:
        return [(int(a), b == "True", int(c), d == "True") for a, b, c, d in lines(program, *arguments)]

    return run


def test_what_changes_with_the_batch_compiles_nothing(lines):
    """Triton compiles anew for a number that is 1 or a multiple of 16: seconds in the middle of a rollout."""
    specialised = set().union(*lines(SPECIALISED))
    assert {"N", "K"} <= specialised, "negative control"
    assert not specialised & {"M", "num_steps", "groups", "gamma", "num_slots", "window", "table_row"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim", "queries"),
    [
        ("bf16", 128, 128, 7),
        ("bf16", 256, 256, 119),
        ("bf16", 512, 512, 119),
        ("bf16", 64, 512, 128),  # latents
        ("fp32", 80, 80, 7),
    ],
)
def test_attention_compiles(capability: str, dtype: str, dim: int, value_dim: int, queries: int, usage):
    """What the interpreter accepts may still be no Triton, or ask for more shared memory than a GPU has."""
    attend, combine, write = usage(ATTENTION, capability, dtype, dim, value_dim, queries)
    assert max(shared for shared, *_ in (attend, combine, write)) <= SMALLEST_SHARED_MEMORY
    assert [tensor_cores for _, tensor_cores, *_ in (attend, combine)] == [dtype != "fp32", False]


def test_pages_found_by_address_are_copied_ahead(usage):
    """An address says nothing of its alignment, and 2 bytes at a time cannot be copied in the background."""
    arguments = "90", "bf16", 128, 128, 7
    assert usage(ATTENTION, *arguments)[0][3]
    assert not usage(UNALIGNED + ATTENTION, *arguments)[0][3], "negative control"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_int4_layers_compile(capability: str, usage):
    """Narrow and wide tiles, few and more rows: on tensor cores, weights copied ahead, nothing spilled."""
    shapes = "bf16/3584/18944/8", "bf16/152064/3584/8", "fp16/152064/3584/16", "fp16/3584/18944/32"
    kernels = usage(LINEAR + SEVERAL_LINEAR, capability, *shapes)
    assert len(kernels) == len(shapes)
    for shared, tensor_cores, spilled, copies_ahead in kernels:
        assert shared <= SMALLEST_SHARED_MEMORY and tensor_cores and copies_ahead and spilled <= SPILLED


@pytest.mark.slow
def test_int4_weights_take_few_instructions(lines):
    """Per weight and thread, in the loop, at 8, 16 and 32 rows. An H200's SM can issue about 4 while a weight arrives
    (0.53 bytes, 4.3 TB/s, at 1.98 GHz).
    """
    loops = [float(words[1]) for words in lines(LINEAR + INSTRUCTIONS, "90", "8 16 32", "2 4") if words[0] == "loop"]
    ours, others = loops[::2], loops[1::2]
    bounds = 2.4, 3.1, 4.3
    assert all(few <= most for few, most in zip(ours, bounds, strict=True))
    assert all(many > most for many, most in zip(others, bounds, strict=True)), "negative control: four warps"
