"""RMSNorm in one call, put in place of modules that are shown to compute the same."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.kernels.cpu import norm as cpu


PROBE_ROWS = 16
MAX_GPU_SIZE = 2**14  # a row in the registers of one program
# Sums in another order move few results across a bf16 rounding boundary; other orders of rounding, as in OLMo's norm,
# move tens of percent.
MAX_SHARE_OF_OTHER_ROUNDINGS = 1e-2

Compute = Callable[[Tensor, Tensor, float], Tensor]


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
) -> Tensor:  # (..., D), the dtype to which those of x and weight promote
    """Llama's norm in eager torch: fp32 statistics, a cast back to x's dtype, then the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class FastRMSNorm(nn.Module):
    """Llama's RMSNorm; `weight` may be re-pointed.

    Who computes the input may have computed the norm along with it (`foresee`): the next call with that very tensor,
    unchanged, then takes what is there.
    """

    def __init__(
        self, weight: nn.Parameter, eps: float, compute: Compute = rms_norm, dtypes: tuple[torch.dtype, ...] = ()
    ) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        self._compute, self._dtypes = compute, dtypes  # of inputs; eager torch computes others
        self._foreseen: tuple[Tensor, int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        normed = self.foreseen(x)
        if normed is not None:
            return normed
        compute = self._compute if x.dtype in self._dtypes else rms_norm
        return compute(x, self.weight, self.eps)

    def foresee(self, x: Tensor, normed: Tensor) -> None:
        if not x.is_inference():  # which do not tell whether they were changed
            self._foreseen = x, x._version, normed

    def foreseen(self, x: Tensor) -> Tensor | None:
        """The norm of `x` if it was foreseen; once, so that nothing is held for longer."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is None or foreseen[0] is not x or foreseen[1] != x._version:
            return None
        return foreseen[2]


@torch.no_grad()
def fast_norm(module: nn.Module) -> FastRMSNorm | None:
    """A replacement for a module that computes Llama's RMSNorm, which is tried out; `None` for any other."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or len(list(module.parameters())) != 1 or weight is None:
        return None
    if not isinstance(eps, float) or weight.dim() != 1 or (kernel := _kernel(weight)) is None:
        return None
    compute, dtypes = kernel
    generator = torch.Generator(weight.device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=weight.device)

    for dtype in dtypes:
        x = (4 * noise(PROBE_ROWS, 1, len(weight))).to(dtype)
        x[0] *= 1e-3  # where eps matters
        trial = noise(len(weight)).to(weight.dtype)
        if not _same(compute(x, trial, eps), functional_call(module, {"weight": trial}, (x,))):
            return None
    return FastRMSNorm(weight, eps, compute, dtypes)


def _kernel(weight: Tensor) -> tuple[Compute, tuple[torch.dtype, ...]] | None:
    """What computes the norm on this device, and of which inputs."""
    if gpu.runs_triton(weight.device):
        from trl_selfspec.kernels.triton import elementwise

        return (
            (elementwise.rms_norm, gpu.DTYPES) if len(weight) <= MAX_GPU_SIZE and weight.dtype in gpu.DTYPES else None
        )
    return (cpu.rms_norm, tuple(cpu.DTYPES)) if cpu.takes(weight) else None


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of sums."""
    if actual.dtype != expected.dtype:
        return False
    if actual.dtype == torch.float32:
        return torch.allclose(actual, expected, rtol=1e-5, atol=1e-7)
    share = (actual != expected).float().mean().item()
    return share <= MAX_SHARE_OF_OTHER_ROUNDINGS and torch.allclose(actual, expected, rtol=2**-6, atol=1e-7)
