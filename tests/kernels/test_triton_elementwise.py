"""Triton's kernels between matrix products against their eager twins: on a GPU, else interpreted."""

import pytest
import torch
from torch import Tensor, nn
from triton_cases import BF16, DEVICE, FP16, FP32

from trl_selfspec.kernels import elementwise
from trl_selfspec.kernels.norm import FastRMSNorm
from trl_selfspec.kv_cache.paged_cache import PagedCache


# fp32 sums in another order and other exponentials: a last bit here and there, which in 16 bits few results show.
FP32_TOLERANCE, MAX_SHARE, LAST_BIT = 1e-5, 0.01, {FP16: 2**-9, torch.bfloat16: 2**-6}


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture
def triton_elementwise():
    from trl_selfspec.kernels.triton import elementwise

    return elementwise


def randn(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def same(actual: Tensor, expected: Tensor) -> bool:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.dtype == FP32:
        return torch.allclose(actual, expected, rtol=FP32_TOLERANCE, atol=FP32_TOLERANCE)
    share = (actual != expected).float().mean().item()
    return share <= MAX_SHARE and torch.allclose(actual, expected, rtol=LAST_BIT[actual.dtype], atol=1e-6)


def eager_norm(size: int, dtype: torch.dtype, eps: float = 1e-6) -> FastRMSNorm:
    return FastRMSNorm(nn.Parameter(randn(size, dtype=dtype)), eps)


DTYPES = [(FP32, FP32, None), (FP16, FP16, None), (FP32, FP32, FP16), (FP16, FP32, FP16), (FP16, FP32, None)]
BF16_DTYPES = [
    pytest.param(torch.bfloat16, torch.bfloat16, None, marks=pytest.mark.gpu),
    pytest.param(torch.bfloat16, FP32, torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param(FP32, FP32, torch.bfloat16, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("x_dtype", "weight_dtype", "wanted"), [*DTYPES, *BF16_DTYPES])
@pytest.mark.parametrize("size", [16, 64, 96, 1000])
@pytest.mark.parametrize("residual", [None, "same", "wider"])
def test_sum_and_norm(triton_elementwise, x_dtype, weight_dtype, wanted, size: int, residual: str | None):
    """Rounded where transformers' norm rounds. Negative controls: another eps, a norm of the unrounded sum."""
    norm = eager_norm(size, weight_dtype)
    x = randn(3, 2, 2 * size, dtype=x_dtype)[..., :size]  # rows of a wider product
    x[0] *= 1e-3  # where eps matters
    other = None
    if residual:
        other = randn(3, 2, size, dtype=x_dtype if residual == "same" else FP32)
        other[0] *= 1e-3
    fast, expected = (kind.add_rms_norm(x, other, norm, wanted) for kind in (triton_elementwise, elementwise))
    assert torch.equal(fast[0], expected[0]) and same(fast[1], expected[1])
    norm.eps *= 3
    assert not same(fast[1], elementwise.add_rms_norm(x, other, norm, wanted)[1])


def test_a_sum_is_rounded_before_its_norm(triton_elementwise):
    """transformers' residual stream has a dtype: a norm of more bits than it has is another function."""
    norm, x, residual = eager_norm(64, FP16), randn(50, 64, dtype=FP16), randn(50, 64, dtype=FP16)
    _, normed = triton_elementwise.add_rms_norm(x, residual, norm)
    assert same(normed, norm(residual + x))
    assert not same(normed, norm(residual.float() + x.float()).half()), "negative control"


class Case:
    """Heads of two rows, in one product or three, and pages for them."""

    def __init__(self, dtype, heads=4, kv_heads=2, dim=16, steps=2, norm_dtype=None, angle_dtype=None, joined=True):
        self.dim, sizes = dim, [heads * dim, kv_heads * dim, kv_heads * dim]
        products = randn(2, steps, sum(sizes), dtype=dtype).split(sizes, dim=-1)
        if not joined:
            products = [product.contiguous() for product in products]
        self.heads = [product.unflatten(-1, (-1, dim)) for product in products]
        self.norms = (None, None) if norm_dtype is None else tuple(eager_norm(dim, norm_dtype) for _ in range(2))
        self.angles = None
        if angle_dtype is not None:
            self.angles = randn(2, steps, dim, dtype=angle_dtype), randn(2, steps, dim, dtype=angle_dtype)
        self.cache = PagedCache(1, 2, 32, page_size=16, dtype=dtype, device=DEVICE)
        for row in (1, 0):
            self.cache.reserve(row, 32)
        self.cache.begin(torch.tensor([[3], [14]], device=DEVICE) + torch.arange(steps, device=DEVICE), 32)
        self.cache.pages_of[0].lazy_initialization(*(randn(1, kv_heads, 1, dim) for _ in range(2)))

    def run(self, kind, **changes) -> list[Tensor]:
        """Queries, keys and values."""
        pages = self.cache.pages_of[0]
        pages.keys.zero_(), pages.values.zero_()
        values = {"angles": self.angles, "norms": self.norms, "heads": self.heads} | changes
        query = kind.rotate_and_write(*values["heads"], values["angles"], values["norms"], pages)
        return [query, pages.keys.clone(), pages.values.clone()]


HEAD_DTYPES = [(FP32, FP32, FP32), (FP16, FP16, FP16), (FP16, FP32, FP32), (FP16, None, FP32), (FP16, None, FP16)]
HEAD_DTYPES += [(FP32, None, None), (FP16, FP16, None)]
BF16_HEAD_DTYPES = [
    pytest.param(torch.bfloat16, norm_dtype, angle_dtype, marks=pytest.mark.gpu)
    for norm_dtype, angle_dtype in ((torch.bfloat16, torch.bfloat16), (FP32, FP32), (None, torch.bfloat16))
]


@pytest.mark.parametrize(("dtype", "norm_dtype", "angle_dtype"), [*HEAD_DTYPES, *BF16_HEAD_DTYPES])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 16), (6, 3, 24), (5, 1, 80), (14, 2, 64)])
@pytest.mark.parametrize("joined", [True, False])
def test_heads_are_normed_rotated_and_written(
    triton_elementwise, dtype, norm_dtype, angle_dtype, heads: int, kv_heads: int, dim: int, joined: bool
):
    """Heads that fill no block, halves that are no power of two, and slots that belong to others."""
    case = Case(dtype, heads, kv_heads, dim, 3, norm_dtype, angle_dtype, joined)
    fast, expected = case.run(triton_elementwise), case.run(elementwise)
    assert all(map(same, fast, expected))
    assert torch.equal(fast[1] != 0, expected[1] != 0) and torch.equal(fast[2], expected[2])
    if case.angles is not None:
        cos, sin = case.angles
        turned = case.run(elementwise, angles=(cos, -sin))
        assert not same(fast[0], turned[0]) and not same(fast[1], turned[1]), "negative control"
    if norm_dtype is not None:
        swapped = case.run(elementwise, norms=case.norms[::-1])
        assert not same(fast[0], swapped[0]) and not same(fast[1], swapped[1]), "negative control"


def test_all_rows_may_share_their_angles(triton_elementwise):
    """Rotary embeddings of a batch of equal positions come as one row."""
    case = Case(FP32, angle_dtype=FP32)
    one = tuple(angle[:1] for angle in case.angles)
    fast = case.run(triton_elementwise, angles=one)
    both = tuple(angle.expand(2, -1, -1) for angle in one)
    assert all(map(same, fast, case.run(elementwise, angles=both)))
    assert not same(fast[0], case.run(elementwise)[0]), "negative control"


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("size", [16, 1000, 1024, 2100])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # the interpreter's
def test_swiglu(triton_elementwise, dtype: torch.dtype, size: int):
    """Activation and product are rounded one by one; large inputs must not overflow."""
    gate, up = randn(3, 2, 2 * size, dtype=dtype).mul_(4).split(size, dim=-1)
    gate[0, 0, :4] = torch.tensor([-3e4, 300.0, -100.0, 0.0])
    fast = triton_elementwise.silu_mul(gate, up)
    assert same(fast, elementwise.silu_mul(gate, up))
    assert not same(fast, elementwise.silu_mul(up, gate)), "negative control"


def test_tokens_do_not_see_their_neighbours(triton_elementwise):
    """Bitwise: a program has one token, so no sum depends on the batch."""
    norm, x, residual = eager_norm(96, FP32), randn(40, 96), randn(40, 96)
    together = triton_elementwise.add_rms_norm(x, residual, norm)[1]
    activations = triton_elementwise.silu_mul(x, residual)
    for row in (0, 7, 39):
        one = slice(row, row + 1)
        assert torch.equal(triton_elementwise.add_rms_norm(x[one], residual[one], norm)[1], together[one])
        assert torch.equal(triton_elementwise.silu_mul(x[one], residual[one]), activations[one])
