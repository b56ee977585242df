"""The drafter's Linear layer: a quantized weight and the fastest way to multiply by it."""

import torch
from torch import Tensor, nn

from trl_selfspec.drafter.linear_backends import LinearBackend, choose_backend
from trl_selfspec.drafter.quantized_weight import make_quantized_weight
from trl_selfspec.kernels import OpaqueLinear, PreparedLinear


class QuantizedLinear(OpaqueLinear):
    """A Linear whose weight is held as quanto quantizes it; inference only.

    Args:
        in_features: Size of an input row.
        out_features: Size of an output row.
        bias: Kept as it is, usually the policy's own parameter.
        qtype: One of `QTYPES`.
        dtype: Of the weights before quantization and after dequantization, and of inputs and outputs.
        device: Where the weight lives.
        backend: What multiplies; `None` for what `choose_backend` finds.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        qtype: str,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: type[LinearBackend] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_parameter("bias", bias)
        self.quantized = make_quantized_weight(qtype, out_features, in_features, dtype, device)
        self.backend = (backend or choose_backend(self.quantized))(self.quantized, bias)
        for name, buffer in self.backend.buffers.items():
            self.register_buffer(f"{self.backend.name}_{name}", buffer, persistent=False)

    def multiply(self, x: Tensor) -> Tensor:
        return self.backend(x)

    def requantize_(self, weight: Tensor, first_row: int = 0, repack: bool = True) -> None:
        """Quantizes `weight` into output rows from `first_row` on, in place: addresses never change.

        Args:
            weight: `(rows, in_features)`, any floating dtype; fewer rows than `out_features` are one part of a layer
                that stands for several.
            repack: also bring up to date what the backend keeps. `False` leaves `repack_` to be called after the last
                part.
        """
        self.quantized.quantize_(weight, first_row)
        if repack:
            self.repack_()

    @torch.no_grad()
    def repack_(self) -> None:
        """Brings the backend's own format of the weight up to date."""
        self.backend.repack_()

    def dequantize(self, rows: slice = slice(None)) -> Tensor:  # (out_features, in_features)
        """The weight that the layer multiplies by, or some of its rows."""
        return self.quantized.dequantize(rows)

    @property
    def weight(self) -> Tensor:  # (out_features, in_features)
        """For models that read a Linear's weight themselves, such as some routers; dequantized at every access."""
        return self.dequantize()

    @property
    def kernel(self) -> PreparedLinear | None:
        """The kernel that is the whole layer, where one is."""
        return self.backend.kernel

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in all its formats; the bias is the policy's."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.quantized.qtype}, backend={self.backend.name}"
