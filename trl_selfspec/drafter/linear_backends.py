"""The ways to multiply by a quantized weight, and which of them a layer takes.

The order is fixed, by device; a layer takes the first that supports its weight (times: docs/LOG.md, 2026-11-21).

* CPU: our C kernel (int4, bf16 and fp32), torch's int4 and int8 kernels (bf16), else weights that are dequantized once
  per refresh, which is no faster than the policy.
* CUDA: our Triton kernel (int4), humming-kernels (int4 and 8 bits, if installed), else weights that are dequantized in
  every call, after a warning: slower than the policy.
* Any other device: dequantized in every call.

Results of different ways differ in rounding; in each of them a row does not see its neighbours.
"""

import functools
import logging
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_selfspec import kernels
from trl_selfspec.drafter.quantized_weight import (
    QTYPES,
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
    make_quantized_weight,
)
from trl_selfspec.kernels import humming, int4
from trl_selfspec.kernels.triton_support import runs_triton


logger = logging.getLogger(__name__)

GPU_DTYPES = (torch.bfloat16, torch.float16)
TORCH_INT4_GROUPS = (32, 64, 128)
TORCH_INT4_ROWS = 16
PROBED_SHAPE = 256, 256  # out and in features that every kernel takes
TORCH_INT8_COLUMNS = 32  # torch 2.13 reads past rows of, say, 100: garbage, or a segmentation fault

Weight = TypeVar("Weight", bound=QuantizedWeight)


class LinearBackend(ABC, Generic[Weight]):
    """`x W^T + bias` for one layer.

    The tensors of `weight` and `bias` may be re-pointed or overwritten, not replaced.

    Attributes:
        buffers: what it reads besides the weight's own: the weight in another format, scratch memory.
        kernel: a kernel that is the whole layer, for callers that run several layers in one call.
    """

    name: ClassVar[str]
    kernel: kernels.PreparedLinear | None = None

    def __init__(self, weight: Weight, bias: nn.Parameter | None) -> None:
        self.weight, self.bias = weight, bias
        self.buffers = self.repacked()

    @staticmethod
    @abstractmethod
    def supports(weight: QuantizedWeight) -> bool:
        """Whether it multiplies by such a weight here."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """`(M, K)` to `(M, N)`, both of the weight's dtype; adds the bias."""

    def repacked(self) -> dict[str, Tensor]:
        """The weight in the format that this backend reads, if it is not the weight's own."""
        return {}

    def repack_(self) -> None:
        """Brings `buffers` up to date with the weight, in place."""
        for name, buffer in self.repacked().items():
            self.buffers[name].copy_(buffer)

    def __call__(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        y = self.multiply(x.reshape(-1, self.weight.in_features))
        return y.view(*x.shape[:-1], self.weight.out_features)

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


class CpuInt4(LinearBackend[Int4Weight]):
    """Our C kernel, W4A8."""

    name = "cpu_int4"

    def __init__(self, weight: Int4Weight, bias: nn.Parameter | None) -> None:
        super().__init__(weight, bias)
        self.kernel = kernels.PreparedLinear(weight.packed, weight.scale_shift, bias, weight.in_features, weight.dtype)

    @staticmethod
    def supports(weight: QuantizedWeight) -> bool:
        return _is(weight, "cpu", "qint4", torch.bfloat16, torch.float32) and kernels.available()

    def multiply(self, x: Tensor) -> Tensor:
        assert self.kernel is not None
        return self.kernel(x)

    __call__ = multiply  # it takes any number of leading dimensions


class TorchInt4(LinearBackend[Int4Weight]):
    """torch's CPU kernel, which has a format of its own."""

    name = "torch_int4"

    @staticmethod
    def supports(weight: QuantizedWeight) -> bool:
        if not isinstance(weight, Int4Weight) or not _is(weight, "cpu", "qint4", torch.bfloat16):
            return False
        whole_groups = weight.in_features % weight.group_size == 0 and weight.group_size in TORCH_INT4_GROUPS
        return whole_groups and weight.out_features % TORCH_INT4_ROWS == 0

    def repacked(self) -> dict[str, Tensor]:
        codes = int4.unpack(self.weight.packed, self.weight.in_features).int()
        scale, shift = self.weight.scale_shift.transpose(0, 1).unbind(-1)
        return {
            "packed": torch._convert_weight_to_int4pack_for_cpu(codes, 2),
            "scales": torch.stack((scale, 8 * scale - shift), -1),  # torch's codes are -8..7
        }

    def multiply(self, x: Tensor) -> Tensor:
        packed, scales = self.buffers["packed"], self.buffers["scales"]
        return self._with_bias(torch._weight_int4pack_mm_for_cpu(x, packed, self.weight.group_size, scales))


class TorchInt8(LinearBackend[Int8Weight]):
    """torch's CPU kernel."""

    name = "torch_int8"

    @staticmethod
    def supports(weight: QuantizedWeight) -> bool:
        return _is(weight, "cpu", "qint8", torch.bfloat16) and weight.in_features % TORCH_INT8_COLUMNS == 0

    def multiply(self, x: Tensor) -> Tensor:
        return self._with_bias(torch._weight_int8pack_mm(x, self.weight.codes, self.weight.scale.view(-1)))


class DequantizedOnce(LinearBackend[QuantizedWeight]):
    """A second copy of the weights. Dequantizing in every call takes 10 to 100 times as long on a CPU."""

    name = "dequantized_once"

    @staticmethod
    def supports(weight: QuantizedWeight) -> bool:
        return weight.device.type == "cpu"

    def repacked(self) -> dict[str, Tensor]:
        return {"weight": self.weight.dequantize()}

    def multiply(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.buffers["weight"], self.bias)


class TritonInt4(LinearBackend[Int4Weight]):
    """Our Triton kernel; rows beyond those it is made for go to cuBLAS, by the dequantized weight."""

    name = "triton_int4"

    def __init__(self, weight: Int4Weight, bias: nn.Parameter | None) -> None:
        from trl_selfspec.kernels.triton import int4_linear

        super().__init__(weight, bias)
        self._linear, self._most_rows = int4_linear.linear_int4, int4_linear.MAX_ROWS
        self.buffers["counters"] = int4_linear.make_counters(weight.out_features, weight.device)

    @staticmethod
    def supports(weight: QuantizedWeight) -> bool:
        return _is(weight, "cuda", "qint4", *GPU_DTYPES) and runs_triton(weight.device)

    def multiply(self, x: Tensor) -> Tensor:
        weight = self.weight
        if len(x) > self._most_rows:
            return F.linear(x, weight.dequantize(), self.bias)
        counters = self.buffers["counters"]
        return self._linear(x.contiguous(), weight.packed, weight.scale_shift, self.bias, counters)


class Humming(LinearBackend[QuantizedWeight]):
    """humming-kernels, an optional package, which compiles a kernel for each shape on first use."""

    name = "humming"

    @staticmethod
    def supports(weight: QuantizedWeight) -> bool:
        return humming.supports(_humming_shape(weight))

    def repacked(self) -> dict[str, Tensor]:
        weight, shape = self.weight, _humming_shape(self.weight)
        if isinstance(weight, Int4Weight):
            return humming.int4_buffers(shape, weight.packed, weight.scale_shift)
        assert isinstance(weight, Int8Weight)
        return humming.buffers_8bit(shape, weight.codes, weight.scale)

    def multiply(self, x: Tensor) -> Tensor:
        y = humming.linear(x, _humming_shape(self.weight), self.buffers)
        return self._with_bias(y)  # its own bias is a copy, which a step of the optimizer would leave behind


class DequantizedPerCall(LinearBackend[QuantizedWeight]):
    """Where a second copy of the weights would cost more than the time."""

    name = "dequantized_per_call"

    @staticmethod
    def supports(weight: QuantizedWeight) -> bool:
        return True

    def multiply(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight.dequantize(), self.bias)


BACKENDS: tuple[type[LinearBackend], ...] = (
    CpuInt4,
    TorchInt4,
    TorchInt8,
    DequantizedOnce,
    TritonInt4,
    Humming,
    DequantizedPerCall,
)


def choose_backend(weight: QuantizedWeight) -> type[LinearBackend]:
    """The first that supports the weight."""
    backend = next(backend for backend in BACKENDS if backend.supports(weight))
    if backend is DequantizedPerCall and weight.device.type == "cuda" and weight.dtype in GPU_DTYPES:
        _warn_of_dequantizing(weight.qtype)
    return backend


def resolve_qtype(qtype: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The quanto qtype that `qtype` stands for on a device.

    `"auto"` is `"qint4"` where int4 layers are faster than the policy's own: on CPUs, with our kernel (bf16 and fp32)
    or torch's (bf16), a third of the time of a plain layer or less (measured, docs/LOG.md 2026-11-21); on CUDA, with
    our kernel (bf16 and fp16). Elsewhere it is `"qint8"`, which is nearer to the policy and cheaper to dequantize.

    Raises:
        ValueError: if `qtype` is neither `"auto"` nor one of `QTYPES`.
    """
    if qtype in QTYPES:
        return qtype
    if qtype != "auto":
        raise ValueError(f"unknown qtype {qtype!r}: use 'auto' or one of {', '.join(map(repr, QTYPES))}")
    device = torch.device(device)
    if device.type == "cpu":
        fast = dtype == torch.bfloat16 or (dtype == torch.float32 and kernels.available())
    else:
        fast = dtype in GPU_DTYPES and runs_triton(device)
    return "qint4" if fast else "qint8"


def fast_qtypes(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Those that a kernel multiplies by here, without dequantizing a whole weight."""
    slow = (DequantizedOnce, DequantizedPerCall)
    weights = (make_quantized_weight(qtype, *PROBED_SHAPE, dtype, device) for qtype in QTYPES)
    fast = (weight for weight in weights if next(b for b in BACKENDS if b.supports(weight)) not in slow)
    return [weight.qtype for weight in fast]


def _humming_shape(weight: QuantizedWeight) -> humming.Shape:
    group_size = weight.group_size if isinstance(weight, Int4Weight) else 0
    return humming.Shape(
        weight.out_features, weight.in_features, weight.qtype, group_size, weight.dtype, weight.device
    )


def _is(weight: QuantizedWeight, device: str, qtype: str, *dtypes: torch.dtype) -> bool:
    return weight.device.type == device and weight.qtype == qtype and weight.dtype in dtypes


@functools.cache
def _warn_of_dequantizing(qtype: str) -> None:
    if qtype == "qint4":
        advice = "install triton (it comes with torch for CUDA on Linux) or trl-selfspec[cuda]"
    else:
        advice = 'install trl-selfspec[cuda], or use draft_qtype="qint4"'
    logger.warning(
        "trl_selfspec: no fast kernel multiplies by %s weights here, drafts will be slower than the policy: %s. GPUs "
        "older than Ampere have no kernel.",
        qtype,
        advice,
    )
