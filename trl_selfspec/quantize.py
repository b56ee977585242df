"""The drafter's Linear: weights that quanto quantizes, storages that stay where they are, the fastest kernel.

Codes, scales and shifts are quanto's own for `quantize(model, weights=...)`, bit for bit. They are kept in buffers
that `requantize_` overwrites, so that captured graphs and pointers survive optimizer steps.
quanto is imported on the first quantization: importing it takes seconds.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trl_selfspec import kernels
from trl_selfspec.kernels import int4


QTYPES = ("qint4", "qint8", "qfloat8")
TORCH_INT4_GROUPS = (32, 64, 128)
TORCH_INT4_ROWS = 16
QUANTIZE_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}  # weights; temporaries stay in the cache, or fill the device
TORCH_INT8_COLUMNS = 32  # torch 2.13 reads past rows of, say, 100: garbage, or a segmentation fault


def resolve_qtype(qtype: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The quanto qtype that `qtype` stands for on a device.

    `"auto"` is `"qint4"` where int4 layers are faster than the policy's own: on CPUs, with our kernel (bf16 and fp32)
    or torch's (bf16), a third of the time of a plain layer or less (measured, docs/LOG.md 2026-11-21). Elsewhere it is
    `"qint8"`, which is nearer to the policy and cheaper to dequantize.

    Raises:
        ValueError: if `qtype` is neither `"auto"` nor one of `QTYPES`.
    """
    if qtype in QTYPES:
        return qtype
    if qtype != "auto":
        raise ValueError(f"unknown qtype {qtype!r}: use 'auto' or one of {', '.join(map(repr, QTYPES))}")
    on_cpu = torch.device(device).type == "cpu"
    fast = dtype == torch.bfloat16 or (dtype == torch.float32 and on_cpu and kernels.available())
    return "qint4" if on_cpu and fast else "qint8"


def quanto_group_size(in_features: int) -> int | None:
    """quanto's group size for 4-bit weights: None is one group per row, also when no size divides the row."""
    if in_features <= 128:
        return None
    return next((size for size in (128, 96, 64, 32) if in_features % size == 0), None)


class QuantizedLinear(nn.Module):
    """A Linear whose weight is held as quanto quantizes it; inference only.

    Args:
        in_features: Size of an input row.
        out_features: Size of an output row.
        bias: Kept as it is, usually the policy's own parameter.
        qtype: One of `QTYPES`.
        dtype: Of the weights before quantization and after dequantization; also of scales and shifts.
        device: Where the storages live.
    """

    bias: nn.Parameter | None
    packed: Tensor  # qint4
    scale_shift: Tensor
    torch_packed: Tensor  # qint4 through torch's kernel, which has a format of its own
    torch_scales: Tensor
    dequantized: Tensor  # where torch has no kernel at all
    codes: Tensor  # qint8, qfloat8
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        qtype: str,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__()
        if qtype not in QTYPES:
            raise ValueError(f"unknown qtype {qtype!r}: use one of {', '.join(map(repr, QTYPES))}")
        self.in_features, self.out_features = in_features, out_features
        self.qtype, self.dtype, self.device = qtype, dtype, torch.device(device)
        self.register_parameter("bias", bias)
        for name, (shape, storage_dtype) in self._storages().items():
            buffer = torch.zeros(shape, dtype=storage_dtype, device=device)
            self.register_buffer(name, buffer, persistent=False)
        self.backend = _choose_backend(self)
        for name, buffer in self.backend.derive(self).items():
            self.register_buffer(name, buffer, persistent=False)
        self.prepared: kernels.PreparedLinear | None = None
        if self.backend.linear is _own_int4:
            self.prepared = kernels.PreparedLinear(self.packed, self.scale_shift, bias, in_features, dtype)

    def _storages(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = self.out_features, self.in_features
        if self.qtype == "qint4":
            self.quanto_group_size = quanto_group_size(columns)
            # One group per row, for the kernel: a group of up to 128, or several with the same scale and shift.
            self.group_size = self.quanto_group_size or min(128, -(-columns // 32) * 32)
            self.num_groups = -(-columns // self.group_size)
            return {
                "packed": ((rows, self.num_groups * self.group_size // 2), torch.uint8),
                "scale_shift": ((rows, self.num_groups, 2), self.dtype),
            }
        code_dtype = torch.int8 if self.qtype == "qint8" else torch.float8_e4m3fn
        return {"codes": ((rows, columns), code_dtype), "scale": ((rows, 1), self.dtype)}

    @torch.no_grad()
    def requantize_(
        self,
        weight: Tensor,  # (rows, in_features), any floating dtype
        first_row: int = 0,
    ) -> None:
        """Quantizes `weight` into the storages from output row `first_row` on, in place: addresses never change.

        Fewer rows than `out_features` are one part of a layer that stands for several.
        """
        assert weight.shape[1] == self.in_features and 0 <= first_row <= self.out_features - len(weight)
        chunk = QUANTIZE_AT_ONCE.get(self.device.type, QUANTIZE_AT_ONCE["cuda"]) // self.in_features + 1
        for start in range(0, len(weight), chunk):
            part = weight.detach()[start : start + chunk].to(self.device, self.dtype).contiguous()
            rows = slice(first_row + start, first_row + start + len(part))
            if self.qtype == "qint4":
                codes, scale, shift = _quantize_4bit(part, self.quanto_group_size)
                self.packed[rows] = int4.pack(codes, self.group_size)
                self.scale_shift[rows, :, 0] = scale
                self.scale_shift[rows, :, 1] = shift
            else:
                self.codes[rows], self.scale[rows] = _quantize_8bit(part, self.qtype)
        for name, buffer in self.backend.derive(self).items():
            getattr(self, name).copy_(buffer)

    def dequantize(self) -> Tensor:  # (out_features, in_features)
        """The weight that quanto's own quantized tensor stands for, bit for bit."""
        if self.qtype != "qint4":
            return self.scale * self.codes.to(self.dtype)
        scale, shift = self.scale_shift.unbind(-1)
        padded = self.num_groups * self.group_size
        weight = scale[..., None] * int4.unpack(self.packed, padded).view(self.out_features, -1, self.group_size)
        weight -= shift[..., None]
        return weight.view(self.out_features, padded)[:, : self.in_features].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype is self.dtype else x.to(self.dtype)  # as autocast would
        return self.backend.linear(self, x)

    @property
    def kernel(self) -> kernels.PreparedLinear | None:
        """The kernel that is the whole layer, where one is."""
        return self.prepared

    @property
    def nbytes(self) -> int:
        """Bytes of the storages; the bias is the policy's."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.qtype}, backend={self.backend.name}"


def _quantize_4bit(weight: Tensor, group_size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K) and quanto's scale and shift (N, groups).

    The steps of quanto's `quantize_weight` without its packing, which no kernel here reads.
    """
    from optimum.quanto import MaxOptimizer, qint4

    rows = weight.view(-1, group_size or weight.shape[1])
    scale, shift = MaxOptimizer().optimize(rows, qint4, 0)  # the optimizer itself is wrong for a single group
    scale = _nonzero(scale)
    codes = torch.ops.quanto.quantize_affine(rows, bits=4, axis=0, group_size=None, scale=scale, shift=shift)
    return codes.view(weight.shape), scale.view(len(weight), -1), shift.view(len(weight), -1)


def _quantize_8bit(weight: Tensor, qtype: str) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and quanto's scale (N, 1)."""
    from optimum.quanto import AbsmaxOptimizer, qtypes

    quanto_qtype = qtypes["qfloat8_e4m3fn" if qtype == "qfloat8" else qtype]
    scale = _nonzero(AbsmaxOptimizer().optimize(weight, quanto_qtype, 0))
    data, axis = (weight, 0) if len(weight) > 1 else (weight, None)
    codes = torch.ops.quanto.quantize_symmetric(
        data, dtype=quanto_qtype.dtype, axis=axis, scale=scale if axis == 0 else scale.view(())
    )
    return codes, scale


def _nonzero(scale) -> Tensor:
    """A constant group has scale 0 and codes 0 / 0, which quanto's qfloat8 keeps as NaN; any scale represents it."""
    return torch.where(scale == 0, 1, scale)


class Backend(NamedTuple):
    """One way to multiply by quantized weights."""

    name: str
    supports: Callable[[QuantizedLinear], bool]
    linear: Callable[[QuantizedLinear, Tensor], Tensor]
    derive: Callable[[QuantizedLinear], dict[str, Tensor]] = lambda layer: {}
    """Further buffers that it reads, from quanto's storages."""


def _own_int4(layer: QuantizedLinear, x: Tensor) -> Tensor:
    assert layer.prepared is not None
    return layer.prepared(x)


def _torch_int4(layer: QuantizedLinear, x: Tensor) -> Tensor:
    rows = x.reshape(-1, layer.in_features)
    y = torch._weight_int4pack_mm_for_cpu(rows, layer.torch_packed, layer.group_size, layer.torch_scales)
    return _with_bias(y, layer, x)


def _torch_int4_storages(layer: QuantizedLinear) -> dict[str, Tensor]:
    scale, shift = layer.scale_shift.transpose(0, 1).unbind(-1)
    codes = int4.unpack(layer.packed, layer.in_features).int()
    return {
        "torch_packed": torch._convert_weight_to_int4pack_for_cpu(codes, 2),
        "torch_scales": torch.stack((scale, 8 * scale - shift), -1),  # torch's codes are -8..7
    }


def _torch_int8(layer: QuantizedLinear, x: Tensor) -> Tensor:
    rows = x.reshape(-1, layer.in_features)
    return _with_bias(torch._weight_int8pack_mm(rows, layer.codes, layer.scale.view(-1)), layer, x)


def _with_bias(y: Tensor, layer: QuantizedLinear, x: Tensor) -> Tensor:
    y = y.view(*x.shape[:-1], layer.out_features)
    return y if layer.bias is None else y + layer.bias


def _is(layer: QuantizedLinear, device: str, qtype: str, *dtypes: torch.dtype) -> bool:
    return layer.device.type == device and layer.qtype == qtype and layer.dtype in dtypes


def _supports_own_int4(layer: QuantizedLinear) -> bool:
    return _is(layer, "cpu", "qint4", torch.bfloat16, torch.float32) and kernels.available()


def _supports_torch_int4(layer: QuantizedLinear) -> bool:
    if not _is(layer, "cpu", "qint4", torch.bfloat16):
        return False
    whole_groups = layer.in_features % layer.group_size == 0 and layer.group_size in TORCH_INT4_GROUPS
    return whole_groups and layer.out_features % TORCH_INT4_ROWS == 0


def _supports_torch_int8(layer: QuantizedLinear) -> bool:
    return _is(layer, "cpu", "qint8", torch.bfloat16) and layer.in_features % TORCH_INT8_COLUMNS == 0


BACKENDS = (
    Backend("own_int4", _supports_own_int4, _own_int4),
    Backend("torch_int4", _supports_torch_int4, _torch_int4, _torch_int4_storages),
    Backend("torch_int8", _supports_torch_int8, _torch_int8),
    Backend(  # no faster than the policy, but dequantizing per call takes 10 to 100 times as long
        "dequantized_once",
        lambda layer: layer.device.type == "cpu",
        lambda layer, x: kernels.linear(x, layer.dequantized, layer.bias),
        lambda layer: {"dequantized": layer.dequantize()},
    ),
    Backend(  # elsewhere a second copy of the weights would cost more than the time
        "dequantized_per_call",
        lambda layer: True,
        lambda layer, x: kernels.linear(x, layer.dequantize(), layer.bias),
    ),
)


def _choose_backend(layer: QuantizedLinear) -> Backend:
    """The first that supports the layer: they are ordered by speed."""
    return next(backend for backend in BACKENDS if backend.supports(layer))
