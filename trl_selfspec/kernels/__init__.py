"""What torch runs slowly, each with an eager reference: linear layers, decode attention, and on CPUs norms and layers.

`linear` picks the fastest way to multiply by a policy's weights; `linear_int4` runs the drafter's layers; a `Prepared`
layer has its checks behind it. Measured times are in docs/LOG.md; `cpu.c` is compiled on first use by `build`.
"""

from trl_selfspec.kernels.cpu.attention import can_attend, write_and_attend
from trl_selfspec.kernels.cpu.build import available
from trl_selfspec.kernels.cpu.linear import PreparedLinear, linear_int4
from trl_selfspec.kernels.cpu.norm import FastRMSNorm, fast_norm
from trl_selfspec.kernels.linear import OpaqueLinear, linear, prepare_linear


__all__ = [
    "FastRMSNorm",
    "OpaqueLinear",
    "PreparedLinear",
    "available",
    "can_attend",
    "fast_norm",
    "linear",
    "linear_int4",
    "prepare_linear",
    "write_and_attend",
]
