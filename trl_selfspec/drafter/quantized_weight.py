"""A quantized weight, as data: codes, scales and shifts in tensors whose addresses never change.

They are quanto's own for `quantize(model, weights=...)`, bit for bit. `quantize_` overwrites them in place, so that
captured graphs and pointers survive optimizer steps. How a layer multiplies by them is in `linear_backends`.
quanto is the only quantizer, on every device. It is imported on the first quantization: importing it takes seconds.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from trl_selfspec.kernels import int4


QTYPES = ("qint4", "qint8", "qfloat8")
QUANTIZE_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}  # weights; temporaries stay in the cache, or fill the device


def make_quantized_weight(
    qtype: str, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device | str
) -> "QuantizedWeight":
    """A weight of zeros, to be filled by `quantize_`.

    Args:
        qtype: One of `QTYPES`.
        dtype: Of the weights before quantization and after dequantization; also of scales and shifts.

    Raises:
        ValueError: if `qtype` is not one of `QTYPES`.
    """
    if qtype not in QTYPES:
        raise ValueError(f"unknown qtype {qtype!r}: use one of {', '.join(map(repr, QTYPES))}")
    kind = Int4Weight if qtype == "qint4" else Int8Weight
    return kind(qtype, out_features, in_features, dtype, device)


class QuantizedWeight(nn.Module, ABC):
    """What the formats share. A module for its buffers only: they are found, counted and moved as any others."""

    def __init__(
        self, qtype: str, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.qtype, self.dtype = qtype, dtype
        self.out_features, self.in_features = out_features, in_features
        for name, (shape, buffer_dtype) in self._layout().items():
            self.register_buffer(name, torch.zeros(shape, dtype=buffer_dtype, device=device), persistent=False)
        self.device = next(self.buffers()).device  # with its index: "cuda" is no tensor's device

    @torch.no_grad()
    def quantize_(self, weight: Tensor, first_row: int = 0) -> None:
        """Quantizes `weight` into output rows from `first_row` on.

        Args:
            weight: `(rows, in_features)`, any floating dtype; fewer rows than `out_features` are one part of several.
        """
        assert weight.shape[1] == self.in_features and 0 <= first_row <= self.out_features - len(weight)
        at_once = QUANTIZE_AT_ONCE.get(self.device.type, QUANTIZE_AT_ONCE["cuda"]) // self.in_features + 1
        for start in range(0, len(weight), at_once):
            part = weight[start : start + at_once].detach().to(self.device, self.dtype).contiguous()
            self._quantize_rows(part, slice(first_row + start, first_row + start + len(part)))

    @abstractmethod
    def dequantize(self, rows: slice = slice(None)) -> Tensor:  # (rows, in_features), dtype
        """What quanto's own quantized tensor stands for, or some of its rows, bit for bit."""

    @abstractmethod
    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each buffer."""

    @abstractmethod
    def _quantize_rows(self, weight: Tensor, rows: slice) -> None:
        """Fills these rows of all buffers."""


class Int4Weight(QuantizedWeight):
    """qint4: `weight = scale * code - shift`, in groups along a row.

    N = out_features, K = in_features, G = ceil(K / group_size).

    Attributes:
        packed: `(N, G * group_size / 2)` uint8: two codes of 0..15 a byte, in the order of `int4.pack`.
        scale_shift: `(N, G, 2)`, dtype of the weights: quanto's scale and shift of each group.
        quanto_group_size: quanto's; `None` is one group per row.
        group_size: of the buffers: where quanto has one group per row, it is held as groups of at most 128 with the
            same scale and shift, the last one padded.
    """

    packed: Tensor
    scale_shift: Tensor

    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        self.quanto_group_size = quanto_group_size(self.in_features)
        self.group_size = self.quanto_group_size or min(128, -(-self.in_features // 32) * 32)
        groups = -(-self.in_features // self.group_size)
        return {
            "packed": ((self.out_features, groups * self.group_size // 2), torch.uint8),
            "scale_shift": ((self.out_features, groups, 2), self.dtype),
        }

    def _quantize_rows(self, weight: Tensor, rows: slice) -> None:
        codes, scale, shift = quantize_int4(weight, self.quanto_group_size)
        self.packed[rows] = int4.pack(codes, self.group_size)
        self.scale_shift[rows, :, 0] = scale
        self.scale_shift[rows, :, 1] = shift

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        return int4.dequantize(self.packed[rows], self.scale_shift[rows], self.in_features)


class Int8Weight(QuantizedWeight):
    """qint8 and qfloat8: `weight = scale * code`, with a scale per row.

    Attributes:
        codes: `(N, K)` int8 or float8_e4m3fn.
        scale: `(N, 1)`, dtype of the weights.
    """

    codes: Tensor
    scale: Tensor

    def _layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        code_dtype = torch.int8 if self.qtype == "qint8" else torch.float8_e4m3fn
        return {
            "codes": ((self.out_features, self.in_features), code_dtype),
            "scale": ((self.out_features, 1), self.dtype),
        }

    def _quantize_rows(self, weight: Tensor, rows: slice) -> None:
        self.codes[rows], self.scale[rows] = quantize_8bit(weight, self.qtype)

    def dequantize(self, rows: slice = slice(None)) -> Tensor:
        return self.scale[rows] * self.codes[rows].to(self.dtype)


def quanto_group_size(in_features: int) -> int | None:
    """quanto's group size for 4-bit weights: None is one group per row, also when no size divides the row."""
    if in_features <= 128:
        return None
    return next((size for size in (128, 96, 64, 32) if in_features % size == 0), None)


def quantize_int4(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K) and quanto's scale and shift (N, groups).

    The steps of quanto's `quantize_weight` without its packing, which no kernel here reads.
    """
    from optimum.quanto import MaxOptimizer, qint4

    rows = weight.view(-1, group_size or weight.shape[1])
    scale, shift = MaxOptimizer().optimize(rows, qint4, 0)  # the optimizer itself is wrong for a single group
    scale = _nonzero(scale)
    codes = torch.ops.quanto.quantize_affine(rows, bits=4, axis=0, group_size=None, scale=scale, shift=shift)
    return codes.view(weight.shape), scale.view(len(weight), -1), shift.view(len(weight), -1)


def quantize_8bit(weight: Tensor, qtype: str) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and quanto's scale (N, 1)."""
    from optimum.quanto import AbsmaxOptimizer, qtypes

    quanto_qtype = qtypes["qfloat8_e4m3fn" if qtype == "qfloat8" else qtype]
    scale = _nonzero(AbsmaxOptimizer().optimize(weight, quanto_qtype, 0))  # type: ignore[arg-type]
    data, axis = (weight, 0) if len(weight) > 1 else (weight, None)
    codes = torch.ops.quanto.quantize_symmetric(
        data, dtype=quanto_qtype.dtype, axis=axis, scale=scale if axis == 0 else scale.view(())
    )
    return codes, scale


def _nonzero(scale: Tensor) -> Tensor:
    """A constant group has scale 0 and codes 0 / 0, which quanto's qfloat8 keeps as NaN; any scale represents it."""
    return torch.where(scale == 0, 1, scale)
