"""The drafter's Linear: weights that quanto quantizes, storages that stay where they are, the fastest kernel.

Codes, scales and shifts are quanto's own for `quantize(model, weights=...)`, bit for bit. They are kept in buffers
that `requantize_` overwrites, so that captured graphs and pointers survive optimizer steps.
quanto is imported on the first quantization: importing it takes seconds.
"""

import torch
from torch import Tensor, nn

from trl_selfspec import kernels
from trl_selfspec.drafter.linear_backends import Backend, choose_backend, has_fast_int4, own_int4
from trl_selfspec.kernels import int4, quantized
from trl_selfspec.kernels.triton_support import runs_triton


QTYPES = ("qint4", "qint8", "qfloat8")
QUANTIZE_AT_ONCE = {"cpu": 2**18, "cuda": 2**26}  # weights; temporaries stay in the cache, or fill the device


def resolve_qtype(qtype: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The quanto qtype that `qtype` stands for on a device.

    `"auto"` is `"qint4"` where int4 layers are faster than the policy's own: on CPUs, with our kernel (bf16 and fp32)
    or torch's (bf16), a third of the time of a plain layer or less (measured, docs/LOG.md 2026-11-21); on CUDA, with a
    kernel for bf16 and fp16. Elsewhere it is `"qint8"`, which is nearer to the policy and cheaper to dequantize.

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
        fast = has_fast_int4(device, dtype)
    return "qint4" if fast else "qint8"


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
        backend: What runs it; `None` for what `choose_backend` finds.
    """

    bias: nn.Parameter | None
    packed: Tensor  # qint4
    scale_shift: Tensor
    torch_packed: Tensor  # qint4 through torch's kernel, which has a format of its own
    torch_scales: Tensor
    triton_counters: Tensor  # our kernels' on CUDA
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
        backend: Backend | None = None,
    ):
        super().__init__()
        if qtype not in QTYPES:
            raise ValueError(f"unknown qtype {qtype!r}: use one of {', '.join(map(repr, QTYPES))}")
        self.in_features, self.out_features = in_features, out_features
        self.qtype, self.dtype, self.device = qtype, dtype, torch.device(device)
        self.register_parameter("bias", bias)
        storages = self._storages()
        self.storage_names = tuple(storages)
        for name, (shape, storage_dtype) in storages.items():
            buffer = torch.zeros(shape, dtype=storage_dtype, device=device)
            self.register_buffer(name, buffer, persistent=False)
        self.device = self.get_buffer(self.storage_names[0]).device  # with its index: "cuda" is no tensor's device
        self.backend = choose_backend(self) if backend is None else backend
        for name, buffer in self.backend.derive(self).items():
            self.register_buffer(name, buffer, persistent=False)
        self.prepared: kernels.PreparedLinear | None = None
        if self.backend.linear is own_int4:
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
        derive: bool = True,
    ) -> None:
        """Quantizes `weight` into the storages from output row `first_row` on, in place: addresses never change.

        Fewer rows than `out_features` are one part of a layer that stands for several; with `derive=False`, `derive_`
        is due after the last of them.
        """
        assert weight.shape[1] == self.in_features and 0 <= first_row <= self.out_features - len(weight)
        rows = slice(first_row, first_row + len(weight))
        if self._quantizes_on_gpu(weight):
            self._quantize_on_gpu(weight.detach(), rows)
        else:
            self._quantize(weight.detach(), rows)
        if derive:
            self.derive_()

    @torch.no_grad()
    def derive_(self) -> None:
        """Brings what the backend reads up to date with the storages."""
        for name, buffer in self.backend.derive(self).items():
            getattr(self, name).copy_(buffer)

    def _quantizes_on_gpu(self, weight: Tensor) -> bool:
        if weight.device != self.device or weight.stride(1) != 1 or not runs_triton(self.device):
            return False
        return self.qtype != "qint4" or quantized.quantizes_4bit_on_gpu(self.in_features, self.group_size)

    def _quantize_on_gpu(self, weight: Tensor, rows: slice) -> None:
        if self.qtype == "qint4":
            quantized.quantize_4bit_on_gpu(weight, self.packed[rows], self.scale_shift[rows])
        else:
            quantized.quantize_8bit_on_gpu(weight, self.codes[rows], self.scale[rows])

    def _quantize(self, weight: Tensor, rows: slice) -> None:
        """By quanto's own functions, a part at a time."""
        chunk = QUANTIZE_AT_ONCE.get(self.device.type, QUANTIZE_AT_ONCE["cuda"]) // self.in_features + 1
        for start in range(rows.start, rows.stop, chunk):
            part = slice(start, min(start + chunk, rows.stop))
            source = weight[start - rows.start : part.stop - rows.start]
            source = source.to(self.device, self.dtype).contiguous()
            if self.qtype == "qint4":
                codes, scale, shift = _quantize_4bit(source, self.quanto_group_size)
                self.packed[part] = int4.pack(codes, self.group_size)
                self.scale_shift[part, :, 0] = scale
                self.scale_shift[part, :, 1] = shift
            else:
                self.codes[part], self.scale[part] = _quantize_8bit(source, self.qtype)

    def dequantize(self, rows: slice = slice(None)) -> Tensor:  # (out_features, in_features)
        """The weight that quanto's own quantized tensor stands for, or some of its rows, bit for bit."""
        if self.qtype != "qint4":
            return self.scale[rows] * self.codes[rows].to(self.dtype)
        return int4.dequantize(self.packed[rows], self.scale_shift[rows], self.in_features)

    @property
    def weight(self) -> Tensor:  # (out_features, in_features)
        """For models that read a Linear's weight themselves, such as some routers; dequantized at every access."""
        return self.dequantize()

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
