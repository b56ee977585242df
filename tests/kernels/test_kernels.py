"""The CPU kernels against their eager references, and what happens where they can't be built."""

import itertools
import logging
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import int4_reference
import pytest
import torch
import torch.nn.functional as F
from pairwise import pairwise
from torch import Tensor

from trl_selfspec import kernels
from trl_selfspec.kernels import int4
from trl_selfspec.kernels.cpu import build, machine
from trl_selfspec.kernels.cpu import linear as cpu


BF16, FP32 = torch.bfloat16, torch.float32
INSTRUCTION_SETS = ["avx2", "avx512_bf16"]  # the fixture's

# A correctly rounded bf16 result is within 2^-9 of the exact sum; twice that leaves room for the sum's own error.
BF16_RELATIVE = 2**-8
# fp32 sums err by at most K * 2^-24 of the sum of magnitudes, and by far less in practice.
SUM_RELATIVE = 1e-5

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no C compiler or no AVX2")


@pytest.fixture(autouse=True)
def _inference():
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_library():
    """Lets a test load the library under changed circumstances."""
    build._load.cache_clear()
    yield
    build._load.cache_clear()


def random_int4(n: int, k: int, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * k)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scale_shift = torch.rand(n, -(-k // group_size), 2, generator=generator) + 0.1
    scale_shift[..., 1] *= 8
    return int4.pack(codes, group_size), (scale_shift / 16).to(dtype)


def magnitudes(x: Tensor, packed: Tensor, scale_shift: Tensor) -> Tensor:
    """The sum of |activation| * (|scale * code| + |shift|) per output: what rounding errors are relative to."""
    return int4_reference.linear_w4a8(x.abs().float(), packed, scale_shift * torch.tensor([1, -1])).double()


def within(y: Tensor, exact: Tensor, magnitude: Tensor) -> bool:
    relative = BF16_RELATIVE if y.dtype == BF16 else 0
    return bool(((y.double() - exact.double()).abs() <= relative * exact.abs() + SUM_RELATIVE * magnitude).all())


@needs_kernels
@pytest.mark.usefixtures("instruction_set")
@pairwise(
    indirect=["instruction_set"],
    instruction_set=INSTRUCTION_SETS,
    m=[*range(1, 12), 16, 17, 33, 64, 65, 130],
    shape=[(768, 256), (31, 2049), (1, 17), (7, 100), (98, 1)],
    scale=[1e-4, 1.0, 1e4],
    bias_dtype=[None, BF16, FP32],
    dtype=[BF16, FP32],
)
def test_dense_kernel_equals_its_reference(
    m: int, shape: tuple[int, int], scale: float, bias_dtype: torch.dtype | None, dtype: torch.dtype
):
    """Catches wrong tails, tiles and biases."""
    n, k = shape
    torch.manual_seed(m * n * k)
    x, w = (torch.randn(m, k) * scale).to(dtype), torch.randn(n, k).to(dtype)
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    exact = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert within(cpu.linear_dense(x, w, bias), exact, F.linear(x.abs().double(), w.abs().double()) + 1)
    if m * n > 100:
        shifted = F.linear(x.roll(1, -1).double(), w.double()) if k > 1 else 2 * exact
        assert not within(cpu.linear_dense(x, w, bias), shifted, torch.zeros(()))


@needs_kernels
@pytest.mark.usefixtures("instruction_set")
@pairwise(
    indirect=["instruction_set"],
    instruction_set=INSTRUCTION_SETS,
    dtype=[BF16, FP32],
    m=[1, 2, 3, 4, 5, 8, 33, 65],
    shape=[(130, 896, 128), (7, 100, 128), (31, 960, 96), (17, 576, 64), (5, 96, 32), (33, 20, 32), (2, 1000, 128)],
    scale=[1e-3, 1.0, 1e3],
)
def test_int4_kernel_equals_its_reference(dtype: torch.dtype, m: int, shape: tuple[int, int, int], scale: float):
    """Catches wrong nibbles, groups, tails and zero points. Negative control: the sign of the shift."""
    n, k, group_size = shape
    torch.manual_seed(m * n * k)
    x = (torch.randn(m, k) * scale).to(dtype)
    packed, scale_shift = random_int4(n, k, group_size, dtype)
    bias = torch.randn(n).to(dtype)
    y = cpu.linear_int4(x, packed, scale_shift, bias)
    exact = int4_reference.linear_w4a8(x.float(), packed, scale_shift, bias)
    magnitude = magnitudes(x, packed, scale_shift) + 1
    assert y.dtype == dtype and within(y, exact, magnitude)
    wrong = int4_reference.linear_w4a8(x.float(), packed, scale_shift * torch.tensor([1, -1]), bias)
    assert not within(y, wrong, magnitude)


@needs_kernels
@pytest.mark.usefixtures("instruction_set")
def test_int4_group_sums_do_not_overflow():
    """Largest codes times largest activations in the longest group: 16-bit sums must hold them."""
    x = torch.tensor([[1.0], [-1.0]]).expand(2, 128).contiguous()
    packed = int4.pack(torch.full((3, 128), 15, dtype=torch.uint8), 128)
    scale_shift = torch.tensor([1.0, 0.0]).expand(3, 1, 2).contiguous()
    expected = torch.tensor([[1920.0], [-1920.0]]).expand(2, 3)
    torch.testing.assert_close(cpu.linear_int4(x, packed, scale_shift), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("k", "group_size"), [(256, 128), (100, 128), (960, 96), (64, 32)])
def test_unpack_inverts_pack(k: int, group_size: int):
    codes = torch.randint(0, 16, (5, k), dtype=torch.uint8)
    assert torch.equal(int4.unpack(int4.pack(codes, group_size), k), codes)


@needs_kernels
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kernel", ["bf16", "fp32", "int4"])
def test_rows_do_not_see_their_neighbours(kernel: str):
    """An element's sum may depend neither on the batch nor on the threads, or a row's tokens would vary with its
    neighbours. Negative control: another order of summation does give other bits."""
    torch.manual_seed(0)
    n, k = 203, 2300
    dtype = FP32 if kernel == "fp32" else BF16
    x, w = torch.randn(70, k).to(dtype), torch.randn(n, k).to(dtype)
    packed, scale_shift = random_int4(n, k, 128, BF16)

    def linear(rows: Tensor) -> Tensor:
        return cpu.linear_int4(rows, packed, scale_shift) if kernel == "int4" else cpu.linear_dense(rows, w)

    together = linear(x)
    for count in (*range(1, 12), 17, 64):
        assert torch.equal(linear(x[:count]), together[:count])
        assert torch.equal(linear(x[-count:]), together[-count:])
    torch.set_num_threads(3)
    assert torch.equal(linear(x), together)
    if kernel != "int4":
        assert not torch.equal(cpu.linear_dense(x.flip(1), w.flip(1)), together)


@needs_kernels
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_stay_visible_in_their_row(value: float):
    """Rounding to int8 must not turn a NaN into an ordinary number."""
    x = torch.randn(3, 256)
    x[1, 100] = value
    packed, scale_shift = random_int4(16, 256, 128, FP32)
    w = torch.randn(16, 256).to(BF16)
    for y in (cpu.linear_int4(x, packed, scale_shift), cpu.linear_dense(x.to(BF16), w)):
        assert not y[1].isfinite().any()
        assert y[[0, 2]].isfinite().all()


@needs_kernels
def test_shapes_follow_the_input():
    """Leading dimensions, rows that are not contiguous, and no rows at all."""
    w = torch.randn(8, 64).to(BF16)
    x = torch.randn(3, 5, 128).to(BF16)[..., ::2]
    assert torch.equal(cpu.linear_dense(x, w), cpu.linear_dense(x.reshape(15, 64).clone(), w).view(3, 5, 8))
    assert cpu.linear_dense(x[:0], w).shape == (0, 5, 8)
    packed, scale_shift = random_int4(8, 64, 64, BF16)
    assert cpu.linear_int4(x[0], packed, scale_shift).shape == (5, 8)
    assert cpu.linear_int4(x[:0], packed, scale_shift).shape == (0, 5, 8)


@needs_kernels
def test_kernels_refuse_to_lose_a_gradient():
    w = torch.randn(8, 64, dtype=BF16, requires_grad=True)
    with torch.enable_grad(), pytest.raises(AssertionError, match="no backward"):
        cpu.linear_dense(torch.randn(1, 64, dtype=BF16), w)
    assert not cpu.linear_dense(torch.randn(1, 64, dtype=BF16), w).requires_grad


@needs_kernels
def test_kernels_use_torchs_thread_pool():
    """A second OpenMP runtime would spin against torch's and halve the speed of both."""
    torch.randn(300, 300) @ torch.randn(300, 300)
    maps = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    loaded = {path for path in maps if "libgomp" in path or "libiomp" in path or "libomp" in path}
    assert len(loaded) == 1


class Spy:
    """Counts the calls of a function and passes them on."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@needs_kernels
@pytest.mark.usefixtures("instruction_set")
def test_many_rows_are_torchs_where_it_is_faster(monkeypatch):
    """Proves that few rows take the fast path, and that more than the table says are left to torch."""
    spy = Spy(F.linear)
    monkeypatch.setattr(F, "linear", spy)
    for dtype in (BF16, FP32):
        w, bias = torch.randn(16, 64).to(dtype), torch.randn(16).to(dtype)
        limit = machine.max_rows(dtype)
        for rows, by_torch in ((1, 0), (5, 0), (min(limit, 100), 0), (limit + 1, 1)):
            if rows > 1000:  # no limit
                continue
            x, before = torch.randn(rows, 64).to(dtype), spy.calls
            y, prepared = kernels.linear(x, w, bias), kernels.prepare_linear(w, bias)(x)
            assert torch.equal(y, prepared) and spy.calls - before == 2 * by_torch
            torch.testing.assert_close(y, spy.function(x, w, bias), rtol=BF16_RELATIVE, atol=1e-2)
    before = spy.calls
    kernels.linear(x.double(), w.double())
    assert spy.calls == before + 1  # other dtypes


def test_the_table_knows_every_cpu():
    assert set(machine.MAX_ROWS) == set(itertools.product(machine.InstructionSet, cpu.DTYPES))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("avx2 fma", "avx2"),
        ("avx2 avx512f avx512vl avx512_vnni", "avx2"),
        ("avx2 avx512vl avx512_vnni avx512_bf16", "avx512_bf16"),
        ("avx2 avx512vl avx512_vnni avx512_bf16 amx_bf16 amx_tile", "amx"),
        (None, "avx2"),
    ],
)
def test_the_cpu_is_told_by_its_flags(flags: str | None, expected: str, monkeypatch):
    """What the kernel may execute on a CPU that lacks an instruction is an illegal one."""

    def read_text(path: Path) -> str:
        if flags is None:
            raise FileNotFoundError(path)
        return f"flags\t\t: {flags}\n"

    monkeypatch.setattr(machine.Path, "read_text", read_text)
    assert machine.detected.__wrapped__() is machine.InstructionSet(expected)


@needs_kernels
def test_pairs_of_bf16_are_multiplied_as_the_instruction_does(monkeypatch):
    """The emulation's and the CPU's own: each of the two sums rounded to nearest even, numbers below 2^-126 zero."""
    ones, tiny = torch.ones(1, 2, dtype=BF16), torch.full((1, 2), 2.0**-130, dtype=BF16)
    results = []
    for instructions in (machine.InstructionSet.AVX2, machine.InstructionSet.AVX512_BF16):
        monkeypatch.setattr(machine, "instruction_set", lambda instructions=instructions: instructions)
        results.append(cpu.linear_dense(2.0**20 * ones, tiny).item())
        large = torch.tensor([[2.0**24, 1.0]]).to(BF16)
        assert cpu.linear_dense(ones, large).float().item() == 2**24
    assert results == [2.0**-109, 0.0]


@pytest.mark.parametrize(
    "target", ["cooperlake", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sapphirerapids", "znver4"))]
)
def test_avx512_compiles(target: str, tmp_path):
    """The CPUs that run it, and whether they do, this compiler can tell without being one of them."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    flags = [flag.replace("native", target) for flag in build.FLAGS if flag != "-O3"]
    for narrow in ([], ["-DNARROW"]):
        optimized = "-O0" if narrow else "-O1"  # without, gcc warns of less
        command = [compiler, optimized, "-Wall", "-Werror", *flags, *narrow, "-S", str(build.SOURCE), "-o", "cpu.s"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        if "bad value" in done.stderr or "unknown target CPU" in done.stderr:
            pytest.skip(f"this compiler does not know {target}")
        assert done.returncode == 0, done.stderr
        code = (tmp_path / "cpu.s").read_text()
        assert all((name in code) != bool(narrow) for name in ("vdpbf16ps", "vpdpbusd"))


@pytest.mark.parametrize("missing", ["compiler", "avx2", "source"])
def test_without_kernels_there_is_one_warning_and_torch_is_used(
    missing: str, monkeypatch, caplog, fresh_library, tmp_path
):
    """A machine without a compiler must roll out all the same, and be told once why it is slower."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if missing == "compiler":
        monkeypatch.setattr(build.shutil, "which", lambda name: None)
    elif missing == "avx2":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    else:
        broken = tmp_path / "broken.c"
        broken.write_text("this is not C")
        monkeypatch.setattr(build, "SOURCE", broken)
    x, w = torch.randn(5, 64).to(BF16), torch.randn(16, 64).to(BF16)
    with caplog.at_level(logging.WARNING, logger=build.__name__):
        assert not kernels.available()
        assert torch.equal(kernels.linear(x, w), F.linear(x, w))
        assert torch.equal(kernels.linear(x, w), F.linear(x, w))
    assert len(caplog.records) == 1


@pytest.mark.slow
@needs_kernels
def test_processes_that_build_at_once_do_not_race(monkeypatch, tmp_path):
    """Every rank of a fresh machine compiles at the same moment: each must end with a whole library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build._build(machine.InstructionSet.AVX2), range(2))
    assert first == second and first.exists()
    assert list(first.parent.iterdir()) == [first]


@needs_kernels
@pytest.mark.parametrize("kernel", ["bf16", "int4"])
def test_a_prepared_layer_follows_what_it_was_given(kernel: str):
    """The replica re-points aliases and overwrites storages: a remembered address would read freed memory.
    Negative control: the result from before."""
    x, bias = torch.randn(3, 64).to(BF16), torch.nn.Parameter(torch.randn(8).to(BF16), requires_grad=False)
    if kernel == "bf16":
        weight = torch.nn.Parameter(torch.randn(8, 64).to(BF16), requires_grad=False)
        prepared = cpu.PreparedLinear(weight, bias=bias)
        before = prepared(x)
        weight.data = torch.randn(8, 64).to(BF16)
        again = cpu.linear_dense(x, weight, bias)
    else:
        packed, scale_shift = random_int4(8, 64, 64, BF16)
        prepared = cpu.PreparedLinear(packed, scale_shift, bias, 64)
        before = prepared(x)
        bias.data = torch.randn(8).to(BF16)
        again = cpu.linear_int4(x, packed, scale_shift, bias)
    assert torch.equal(prepared(x), again) and not torch.equal(before, again)
    for broken in (torch.randn(64, 16).to(BF16)[:, ::2].T, torch.randn(7).to(BF16)):
        (weight if kernel == "bf16" else bias).data = broken
        with pytest.raises(AssertionError):
            prepared(x)


@needs_kernels
@pytest.mark.parametrize("wrong", [torch.randn(3, 63).to(BF16), torch.randn(3, 64)])
def test_a_prepared_layer_refuses_other_inputs(wrong: Tensor):
    """Reading past a row, or bf16 as fp32, gives garbage or a segmentation fault."""
    with pytest.raises(AssertionError):
        cpu.PreparedLinear(torch.randn(8, 64).to(BF16))(wrong)


@pytest.mark.parametrize("without", [False, True])
def test_preparing_chooses_as_calling_does(monkeypatch, without: bool):
    if without:
        monkeypatch.setattr(build, "available", lambda: False)
    for dtype in (BF16, FP32):
        x, w, bias = (torch.randn(*shape).to(dtype) for shape in ((5, 64), (16, 64), (16,)))
        prepared = kernels.prepare_linear(w, bias)
        assert torch.equal(prepared(x), kernels.linear(x, w, bias))
        assert not (without and isinstance(prepared, cpu.PreparedLinear))
