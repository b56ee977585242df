"""RMSNorm of `norm.c`, put in place of modules that are shown to compute the same."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trl_selfspec.kernels.cpu.build import available, functions
from trl_selfspec.kernels.cpu.linear import DTYPES


LANES = 8
PROBE_ROWS = 16
# Sums in another order move few results across a bf16 rounding boundary; other orders of rounding, as in OLMo's norm,
# move tens of percent.
MAX_SHARE_OF_OTHER_ROUNDINGS = 1e-2


def eager_rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
) -> Tensor:  # (..., D), the dtype to which those of x and weight promote
    """Llama's norm in eager torch: fp32 statistics, a cast back to x's dtype, then the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(
    x: Tensor,  # (..., D) bf16 or fp32
    weight: Tensor,  # (D,) bf16 or fp32, contiguous
    eps: float,
) -> Tensor:  # (..., D), the dtype to which those of x and weight promote
    """The same by the kernel."""
    x_dtype, weight_dtype, n = x.dtype, weight.dtype, x.shape[-1]
    if (x.requires_grad or weight.requires_grad) and torch.is_grad_enabled():
        raise AssertionError("the kernels have no backward: use torch.no_grad()")
    assert x.is_cpu and weight.is_cpu and weight.numel() == n and n % LANES == 0
    if not x.is_contiguous():
        x = x.contiguous()
    y_dtype = x_dtype if x_dtype is weight_dtype else torch.float32
    y = torch.empty_like(x, dtype=y_dtype)
    functions().rms_norm(
        torch.get_num_threads(), x.numel() // n, n, eps, x.data_ptr(), DTYPES[x_dtype],
        weight.data_ptr(), DTYPES[weight_dtype], y.data_ptr(), DTYPES[y_dtype],
    )  # fmt: skip
    return y


class FastRMSNorm(nn.Module):
    """Llama's RMSNorm; `weight` may be re-pointed. Inputs of dtypes that the kernel does not know run eagerly."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        compute = rms_norm if x.dtype in DTYPES and not torch.compiler.is_compiling() else eager_rms_norm
        return compute(x, self.weight, self.eps)


@torch.no_grad()
def fast_norm(module: nn.Module) -> FastRMSNorm | None:
    """A replacement for a module that computes Llama's RMSNorm, which is tried out; `None` for any other."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or len(list(module.parameters())) != 1 or weight is None:
        return None
    if not isinstance(eps, float) or weight.dim() != 1 or not _takes(weight):
        return None
    generator = torch.Generator(weight.device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=weight.device)

    for dtype in DTYPES:
        x = (4 * noise(PROBE_ROWS, 1, len(weight))).to(dtype)
        x[0] *= 1e-3  # where eps matters
        trial = noise(len(weight)).to(weight.dtype)
        if not _same(rms_norm(x, trial, eps), functional_call(module, {"weight": trial}, (x,))):
            return None
    return FastRMSNorm(weight, eps)


def _takes(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype in DTYPES and len(weight) % LANES == 0 and available()


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of sums."""
    if actual.dtype != expected.dtype:
        return False
    if actual.dtype == torch.float32:
        return torch.allclose(actual, expected, rtol=1e-5, atol=1e-7)
    share = (actual != expected).float().mean().item()
    return share <= MAX_SHARE_OF_OTHER_ROUNDINGS and torch.allclose(actual, expected, rtol=2**-6, atol=1e-7)
