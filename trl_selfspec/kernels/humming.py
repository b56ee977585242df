"""Linear layers of humming-kernels, which compiles one for each shape on first use and keeps it on disk.

Weights go in as quanto's codes and scales. An int4 zero point is a number of codes there, so a shift becomes
shift / scale. Everything here is by arguments of the package's functions below its `HummingLayer`, whose `transform`
waits for the GPU. This module imports humming and jinja2's other company only inside functions.
"""

import functools
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_selfspec.kernels import int4
from trl_selfspec.kernels.triton_support import AMPERE


DTYPES = (torch.bfloat16, torch.float16)
GROUP_SIZES = (32, 64, 128)
MULTIPLE = 64  # of both sizes of a layer
LOCKS = 2048  # by which parts of a sum are put in order; one set per layer
ROWS_AT_ONCE = 2**14  # whose codes are put in order at a time
WEIGHTS = {"qint4": "uint4", "qint8": "uint8", "qfloat8": "float8e4m3"}


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    n: int
    k: int
    qtype: str
    group_size: int  # 0: a scale per row
    dtype: torch.dtype
    device: torch.device


@functools.cache
def supports(shape: Shape) -> bool:
    """Whether the package is there and takes the shape."""
    if shape.device.type != "cuda" or shape.dtype not in DTYPES or find_spec("humming") is None:
        return False
    if shape.n % MULTIPLE or shape.k % MULTIPLE or not torch.cuda.is_available():
        return False
    whole = shape.qtype != "qint4" or (shape.group_size in GROUP_SIZES and shape.k % shape.group_size == 0)
    return whole and torch.cuda.get_device_capability(shape.device) >= AMPERE


@functools.cache
def _config(shape: Shape) -> Any:
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_layer_config

    schema = HummingWeightSchema(
        b_dtype=WEIGHTS[shape.qtype],  # type: ignore[arg-type]
        weight_scale_group_size=shape.group_size,
        has_zero_point=shape.qtype == "qint4",
        is_fp_zero_point=shape.qtype == "qint4",
    )
    return prepare_layer_config(shape.n, shape.k, schema, torch_dtype=shape.dtype, device=shape.device)


def int4_tensors(packed: Tensor, scale_shift: Tensor) -> dict[str, Tensor]:
    """The package's names and formats of int4 weights: words of eight codes, the first one lowest."""
    codes = torch.empty_like(packed)
    for start in range(0, len(packed), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        codes[rows] = int4.in_order(packed[rows])
    scale, shift = scale_shift.unbind(-1)
    return {
        "weight": codes.view(torch.int32),
        "weight_scale": scale.contiguous(),
        "zero_point": (shift.float() / scale.float()).to(scale.dtype),
    }


def tensors_8bit(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The package's names and formats of 8-bit weights: words of four codes; integers with 128 on top."""
    words = codes.view(torch.uint8) ^ 128 if codes.dtype is torch.int8 else codes
    return {"weight": words.view(torch.int32), "weight_scale": scale.contiguous()}


def int4_buffers(shape: Shape, packed: Tensor, scale_shift: Tensor) -> dict[str, Tensor]:
    """Buffers for `linear`."""
    return _buffers(shape, int4_tensors(packed, scale_shift))


def buffers_8bit(shape: Shape, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Buffers for `linear`."""
    return _buffers(shape, tensors_8bit(codes, scale))


def _buffers(shape: Shape, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from humming.transform import transform_humming_tensors

    transformed = transform_humming_tensors(_config(shape), tensors)
    transformed["locks"] = torch.zeros(LOCKS, dtype=torch.int32, device=shape.device)
    return {name: tensor.contiguous() for name, tensor in transformed.items()}


def linear(
    x: Tensor,  # (M, K)
    shape: Shape,
    buffers: dict[str, Tensor],  # from `int4_buffers` or `buffers_8bit`
) -> Tensor:  # (M, N)
    """x W^T, without a bias."""
    from humming.forward import humming_forward

    return humming_forward(_config(shape), x.contiguous(), **buffers)  # type: ignore[arg-type]
