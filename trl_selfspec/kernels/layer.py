"""A decoder layer of Llama's family for the few tokens of a decode step: on CPUs one call, on GPUs a few launches."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.kernels.cpu.layer import CpuDecoderLayer
from trl_selfspec.kernels.gpu_layer import GpuDecoderLayer
from trl_selfspec.kernels.layer_interface import DecoderParts, Pages
from trl_selfspec.kernels.norm import FastRMSNorm


class DecoderLayer(Protocol):
    """What takes the place of a layer's forward in decode steps."""

    parts: DecoderParts

    def takes(self, x: Tensor, cos: Tensor, pages: Pages) -> bool:
        """Whether it computes this forward."""
        ...

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, pages: Pages) -> Tensor:
        """Writes this step's keys and values, and gives the layer's output."""
        ...

    def precede(self, norm: FastRMSNorm, dtype: torch.dtype | None) -> None:
        """Told through which norm, wanted in which dtype, the output is seen next: it may be computed in passing."""
        ...

    @property
    def twin(self) -> Callable[[Tensor, Tensor, Tensor, Pages], Tensor] | None:
        """The same steps, each rounded as eager torch does."""
        ...


def prepare_decoder_layer(parts: DecoderParts) -> DecoderLayer | None:
    """The layer on the device of its parts; `None` where no kernel takes it."""
    kind = GpuDecoderLayer if gpu.runs_triton(parts.norms[0].weight.device) else CpuDecoderLayer
    return kind(parts) if parts.match and kind.fits(parts) else None
