"""The ways to multiply by quantized weights, and which of them a layer takes.

On CPUs it is the first that supports the layer: they are ordered by speed. On CUDA the fastest depends on the shape,
the number of rows and the GPU, so that it is measured once (`choosing`): a layer then goes by its rows. Results of
different ways differ in rounding; in each of them a row does not see its neighbours.
"""

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trl_selfspec import kernels
from trl_selfspec.drafter.autotune import measured
from trl_selfspec.kernels import humming, int4, quantized
from trl_selfspec.kernels.triton_support import runs_triton


if TYPE_CHECKING:
    from trl_selfspec.drafter.quantized_linear import QuantizedLinear


logger = logging.getLogger(__name__)

TORCH_INT4_GROUPS = (32, 64, 128)
TORCH_INT4_ROWS = 16
TORCH_INT8_COLUMNS = 32  # torch 2.13 reads past rows of, say, 100: garbage, or a segmentation fault
TINYGEMM_ROWS = 4  # of activations; with more it falls behind bf16 (measured, h200)
TINYGEMM_TILES = 8  # of 16 along K, that one thread reads at once
TINYGEMM_OUTPUTS = 8


class Backend(NamedTuple):
    """One way to multiply by quantized weights."""

    name: str
    supports: "Callable[[QuantizedLinear], bool]"
    linear: "Callable[[QuantizedLinear, Tensor], Tensor]"
    derive: "Callable[[QuantizedLinear], dict[str, Tensor]]" = lambda layer: {}
    """Further buffers that it reads, from quanto's storages."""
    max_rows: int | None = None
    holds_weights: bool = False
    """Whether those buffers are the weights once more."""


def own_int4(layer: "QuantizedLinear", x: Tensor) -> Tensor:
    assert layer.prepared is not None
    return layer.prepared(x)


def _torch_int4(layer: "QuantizedLinear", x: Tensor) -> Tensor:
    rows = x.reshape(-1, layer.in_features)
    y = torch._weight_int4pack_mm_for_cpu(rows, layer.torch_packed, layer.group_size, layer.torch_scales)
    return _with_bias(y, layer, x)


def _torch_int4_storages(layer: "QuantizedLinear") -> dict[str, Tensor]:
    codes = int4.unpack(layer.packed, layer.in_features).int()
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    return {"torch_packed": packed, "torch_scales": _torch_scales(layer)}


def _torch_scales(layer: "QuantizedLinear") -> Tensor:
    scale, shift = layer.scale_shift.transpose(0, 1).unbind(-1)
    return torch.stack((scale, 8 * scale - shift), -1)  # torch's codes are -8..7


def _torch_int8(layer: "QuantizedLinear", x: Tensor) -> Tensor:
    rows = x.reshape(-1, layer.in_features)
    return _with_bias(torch._weight_int8pack_mm(rows, layer.codes, layer.scale.view(-1)), layer, x)


def _triton_int4(layer: "QuantizedLinear", x: Tensor) -> Tensor:
    rows = x.reshape(-1, layer.in_features).contiguous()
    y = quantized.linear_int4_on_gpu(rows, layer.packed, layer.scale_shift, layer.bias, layer.triton_counters)
    return y.view(*x.shape[:-1], layer.out_features)


def _triton_8bit(layer: "QuantizedLinear", x: Tensor) -> Tensor:
    rows = x.reshape(-1, layer.in_features).contiguous()
    y = quantized.linear_8bit_on_gpu(rows, layer.codes, layer.scale, layer.bias, layer.triton_counters)
    return y.view(*x.shape[:-1], layer.out_features)


def _triton_counters(layer: "QuantizedLinear") -> dict[str, Tensor]:
    return {"triton_counters": quantized.counters_on_gpu(layer.out_features, layer.device)}


def _tinygemm(layer: "QuantizedLinear", x: Tensor) -> Tensor:
    rows = x.reshape(-1, layer.in_features)
    y = torch._weight_int4pack_mm(rows, layer.torch_packed, layer.group_size, layer.torch_scales)
    return _with_bias(y, layer, x)


def _tinygemm_storages(layer: "QuantizedLinear") -> dict[str, Tensor]:
    codes = int4.in_order(layer.packed)
    codes = (codes << 4) | (codes >> 4)  # torch's first code is the high nibble
    packed = torch._convert_weight_to_int4pack(codes, TINYGEMM_TILES)
    return {"torch_packed": packed, "torch_scales": _torch_scales(layer).contiguous()}


def _humming(layer: "QuantizedLinear", x: Tensor) -> Tensor:
    y = humming.linear(x.reshape(-1, layer.in_features), _humming_shape(layer), dict(layer.named_buffers()))
    return _with_bias(y, layer, x)  # its own bias is a copy, which a step of the optimizer would leave behind


def _humming_storages(layer: "QuantizedLinear") -> dict[str, Tensor]:
    if layer.qtype == "qint4":
        return humming.int4_storages(_humming_shape(layer), layer.packed, layer.scale_shift)
    return humming.storages_8bit(_humming_shape(layer), layer.codes, layer.scale)


def _humming_shape(layer: "QuantizedLinear") -> humming.Shape:
    group_size = layer.group_size if layer.qtype == "qint4" else 0
    return humming.Shape(layer.out_features, layer.in_features, layer.qtype, group_size, layer.dtype, layer.device)


def _with_bias(y: Tensor, layer: "QuantizedLinear", x: Tensor) -> Tensor:
    y = y.view(*x.shape[:-1], layer.out_features)
    return y if layer.bias is None else y + layer.bias


def _is(layer: "QuantizedLinear", device: str, qtype: str, *dtypes: torch.dtype) -> bool:
    return layer.device.type == device and layer.qtype == qtype and layer.dtype in dtypes


def _supports_own_int4(layer: "QuantizedLinear") -> bool:
    return _is(layer, "cpu", "qint4", torch.bfloat16, torch.float32) and kernels.available()


def _supports_torch_int4(layer: "QuantizedLinear") -> bool:
    if not _is(layer, "cpu", "qint4", torch.bfloat16):
        return False
    return _has_whole_groups(layer) and layer.out_features % TORCH_INT4_ROWS == 0


def _has_whole_groups(layer: "QuantizedLinear") -> bool:
    return layer.in_features % layer.group_size == 0 and layer.group_size in TORCH_INT4_GROUPS


def _supports_torch_int8(layer: "QuantizedLinear") -> bool:
    return _is(layer, "cpu", "qint8", torch.bfloat16) and layer.in_features % TORCH_INT8_COLUMNS == 0


def _supports_triton(layer: "QuantizedLinear") -> bool:
    return layer.dtype in quantized.DTYPES and runs_triton(layer.device)


def _supports_tinygemm(layer: "QuantizedLinear") -> bool:
    if not _is(layer, "cuda", "qint4", torch.bfloat16) or not _has_whole_groups(layer):
        return False
    return layer.in_features % (16 * TINYGEMM_TILES) == 0 and layer.out_features % TINYGEMM_OUTPUTS == 0


DEQUANTIZING = Backend(  # where a second copy of the weights would cost more than the time
    "dequantized_per_call", lambda layer: True, lambda layer, x: kernels.linear(x, layer.dequantize(), layer.bias)
)
BACKENDS = (
    Backend("own_int4", _supports_own_int4, own_int4),
    Backend("torch_int4", _supports_torch_int4, _torch_int4, _torch_int4_storages),
    Backend("torch_int8", _supports_torch_int8, _torch_int8),
    Backend(  # no faster than the policy, but dequantizing per call takes 10 to 100 times as long
        "dequantized_once",
        lambda layer: layer.device.type == "cpu",
        lambda layer, x: kernels.linear(x, layer.dequantized, layer.bias),
        lambda layer: {"dequantized": layer.dequantize()},
    ),
    Backend(
        "triton_int4",
        lambda layer: layer.qtype == "qint4" and _supports_triton(layer),
        _triton_int4,
        _triton_counters,
        quantized.MAX_ROWS,
    ),
    Backend(
        "triton_8bit",
        lambda layer: layer.qtype != "qint4" and _supports_triton(layer),
        _triton_8bit,
        _triton_counters,
        quantized.MAX_ROWS,
    ),
    Backend(
        "humming",
        lambda layer: humming.supports(_humming_shape(layer)),
        _humming,
        _humming_storages,
        holds_weights=True,
    ),
    Backend("tinygemm", _supports_tinygemm, _tinygemm, _tinygemm_storages, TINYGEMM_ROWS, holds_weights=True),
    DEQUANTIZING,
)


def choose_backend(layer: "QuantizedLinear") -> Backend:
    """The first that supports the layer; on CUDA the fastest, by the number of rows."""
    supporting = [backend for backend in BACKENDS if backend.supports(layer)]
    if layer.device.type != "cuda":
        return supporting[0]
    *fast, fallback = supporting
    chosen = measured(layer, fast)
    if not chosen and layer.dtype in quantized.DTYPES:
        _warn_of_dequantizing(layer.qtype)
    return by_rows(chosen, fallback) if chosen else fallback


def has_fast_int4(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether int4 layers of some shape run on a CUDA device without being dequantized."""
    return dtype in quantized.DTYPES and runs_triton(device)


def by_rows(table: dict[int, Backend], fallback: Backend) -> Backend:
    """Goes by the number of rows: the backend of the first bucket that holds them, the last one's for more."""
    buckets = sorted(table)

    def linear(layer: "QuantizedLinear", x: Tensor) -> Tensor:
        rows = x.numel() // layer.in_features
        backend = table[next((bucket for bucket in buckets if rows <= bucket), buckets[-1])]
        fits = backend.max_rows is None or rows <= backend.max_rows
        return (backend if fits else fallback).linear(layer, x)

    def derive(layer: "QuantizedLinear") -> dict[str, Tensor]:
        return {
            name: buffer for backend in dict.fromkeys(table.values()) for name, buffer in backend.derive(layer).items()
        }

    names = dict.fromkeys(table[bucket].name for bucket in buckets)
    return Backend("/".join(names), lambda layer: True, linear, derive)


@functools.cache
def _warn_of_dequantizing(qtype: str) -> None:
    logger.warning(
        "trl_selfspec: no fast kernel multiplies by %s weights here, drafts will be slower than the policy: install "
        "triton (it comes with torch for CUDA on Linux) or trl-selfspec[cuda]; GPUs older than Ampere have none.",
        qtype,
    )
