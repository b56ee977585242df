"""Linear layers that torch runs slowly on CPUs without native bf16, each with an eager twin.

`linear_bf16` picks the fastest way to multiply by bf16 weights; `linear_int4` runs the drafter's layers.
Measured times are in docs/LOG.md; the C source is `cpu.c`, compiled on first use by `cpu`.
"""

from trl_selfspec.kernels.cpu import available, linear_int4
from trl_selfspec.kernels.dispatch import linear_bf16, torch_has_native_bf16


__all__ = ["available", "linear_bf16", "linear_int4", "torch_has_native_bf16"]
