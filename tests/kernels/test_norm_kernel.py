"""The fast norm against the modules it stands in for."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from trl_selfspec import kernels
from trl_selfspec.kernels.cpu import norm as cpu_norm
from trl_selfspec.kernels.cpu.norm import rms_norm


BF16, FP32 = torch.bfloat16, torch.float32
# Another order of summation; see MAX_SHARE_OF_OTHER_ROUNDINGS for bf16.
FP32_RELATIVE = 1e-6

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C compiler or no AVX2")


@pytest.fixture(autouse=True)
def _inference():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def same(actual: Tensor, expected: Tensor) -> bool:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.dtype == FP32:
        return torch.allclose(actual, expected, rtol=FP32_RELATIVE, atol=1e-9)
    return (actual != expected).float().mean().item() <= cpu_norm.MAX_SHARE_OF_OTHER_ROUNDINGS


@pytest.mark.parametrize("norm", [LlamaRMSNorm, Qwen2RMSNorm])
@pytest.mark.parametrize("x_dtype", [BF16, FP32])
@pytest.mark.parametrize("weight_dtype", [BF16, FP32])
@pytest.mark.parametrize("size", [8, 64, 896, 2056])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_fast_norm_equals_the_module(
    norm: type[nn.Module], x_dtype: torch.dtype, weight_dtype: torch.dtype, size: int, scale: float
):
    """Small inputs show a wrong eps, mixed dtypes a wrong promotion. Negative control: another eps."""
    module = norm(size, 1e-6)
    module.weight.data = torch.randn(size).to(weight_dtype)
    fast = kernels.fast_norm(module)
    assert fast is not None and fast.weight is module.weight
    x = (torch.randn(3, 5, size) * scale).to(x_dtype)
    assert same(fast(x), module(x))
    module.variance_epsilon *= 2
    assert scale > 1e-4 or not same(fast(x), module(x))


def test_other_dtypes_take_torchs_way():
    """Heads of a policy in fp32 under fp16 autocast come in fp16, which the kernel does not know."""
    module = LlamaRMSNorm(64, 1e-6)
    fast, x = kernels.fast_norm(module), torch.randn(3, 64).half()
    assert fast is not None and torch.equal(fast(x), module(x))


@pytest.mark.parametrize(
    "module",
    [
        Gemma2RMSNorm(64),  # 1 + weight
        Olmo2RMSNorm(64),  # the weight before the cast
        nn.LayerNorm(64),
        LlamaRMSNorm(63),  # not whole vectors
        LlamaRMSNorm(64).to(torch.float16),
        nn.Linear(4, 4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_norms_stay_as_they_are(module: nn.Module):
    """A look-alike must be told by its numbers: its name says RMSNorm all the same."""
    assert kernels.fast_norm(module) is None


def test_rows_of_a_norm_do_not_see_their_neighbours():
    x, weight = torch.randn(300, 896).to(BF16), torch.randn(896).to(BF16)
    together = rms_norm(x, weight, 1e-6)
    torch.set_num_threads(3)
    assert torch.equal(rms_norm(x, weight, 1e-6), together)
    for row in (0, 7, 299):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], together[row])
    assert torch.equal(
        rms_norm(x.view(300, 2, 448).transpose(0, 1)[0], weight[:448], 1e-6),
        rms_norm(x[:, :448].clone(), weight[:448], 1e-6),
    )


def test_a_norm_keeps_what_the_kernel_would_lose(monkeypatch):
    """Gradients are refused loudly; without a compiler the module stays."""
    with torch.enable_grad(), pytest.raises(AssertionError, match="no backward"):
        rms_norm(torch.randn(8, requires_grad=True), torch.ones(8), 1e-6)
    monkeypatch.setattr(cpu_norm, "available", lambda: False)
    assert kernels.fast_norm(LlamaRMSNorm(64)) is None
