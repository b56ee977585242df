"""What the tests of Triton's kernels share. Importing this skips the module where they can't run."""

from types import ModuleType

import pytest
import torch

from trl_selfspec.kernels import triton_support as gpu


def version(module: ModuleType) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


triton = pytest.importorskip("triton", reason="triton is not installed")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and version(triton) < (3, 9) and version(pytest.importorskip("numpy")) >= (2, 4):
    pytest.skip("the interpreter of this Triton needs numpy < 2.4", allow_module_level=True)

DEVICE = "cuda" if ON_GPU else "cpu"
FP16, FP32 = torch.float16, torch.float32
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter truncates it, and multiplies its bits


def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets models on a CPU decode with the kernels, as they would on a GPU."""
    if not ON_GPU:
        monkeypatch.setattr(gpu, "runs_triton", lambda device: True)
        monkeypatch.setattr(gpu, "DTYPES", (FP16, FP32))  # what the interpreter computes
