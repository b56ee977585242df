"""What the tests of Triton's kernels share. Importing this skips the module where they can't run."""

import pytest
import torch


pytest.importorskip("triton", reason="triton is not installed")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and tuple(map(int, pytest.importorskip("numpy").__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("Triton's interpreter needs numpy < 2.4", allow_module_level=True)

DEVICE = "cuda" if ON_GPU else "cpu"
FP16, FP32 = torch.float16, torch.float32
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)  # the interpreter truncates it, and multiplies its bits
