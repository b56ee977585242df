"""What torch runs slowly, each with an eager twin: linear layers, decode attention, norms, and decoder layers of them.

`linear` picks the fastest way to multiply by a policy's weights; `linear_int4` runs the drafter's layers; a `Prepared`
layer has its checks behind it. Measured times are in docs/LOG.md; `cpu.c` is compiled on first use by `build`.
"""

from trl_selfspec.kernels.attention import can_attend_on_gpu, write_and_attend_on_gpu
from trl_selfspec.kernels.cpu.attention import can_attend, write_and_attend
from trl_selfspec.kernels.cpu.build import available
from trl_selfspec.kernels.cpu.linear import PreparedLinear, linear_int4
from trl_selfspec.kernels.layer import DecoderLayer, prepare_decoder_layer
from trl_selfspec.kernels.layer_interface import DecoderParts
from trl_selfspec.kernels.linear import linear, prepare_linear
from trl_selfspec.kernels.norm import FastRMSNorm, fast_norm


__all__ = [
    "DecoderLayer",
    "DecoderParts",
    "FastRMSNorm",
    "PreparedLinear",
    "available",
    "can_attend",
    "can_attend_on_gpu",
    "fast_norm",
    "linear",
    "linear_int4",
    "prepare_decoder_layer",
    "prepare_linear",
    "write_and_attend",
    "write_and_attend_on_gpu",
]
