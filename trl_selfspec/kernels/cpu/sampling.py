"""Gumbel-max draws from scores by `sampling.c`. The eager reference is `sampling.samplers._gumbel_max`."""

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu.build import available, functions


def is_supported(scores: Tensor) -> bool:
    return scores.is_cpu and scores.dtype is torch.float32 and available()


def draw(
    scores: Tensor,  # (..., V) fp32
    keys: Tensor | None,  # (...) int64, of the noise; None: no noise
) -> tuple[Tensor, Tensor]:  # (...) int64 tokens, (...) fp32 logarithms of the sum of exp
    """The token whose score plus noise is largest, the lowest where they tie; never one of score -inf.

    A row of -inf alone, or with NaN, gives some token in range and a logarithm that is not finite.
    """
    tokens = torch.empty(scores.shape[:-1], dtype=torch.int64, device=scores.device)
    return tokens, _sample(scores, keys, tokens)


def logsumexp(scores: Tensor) -> Tensor:  # (..., V) fp32 -> (...)
    return _sample(scores, None, None)


def _sample(scores: Tensor, keys: Tensor | None, tokens: Tensor | None) -> Tensor:
    if scores.requires_grad and torch.is_grad_enabled():
        raise AssertionError("the kernels have no backward: use torch.no_grad()")
    assert is_supported(scores)
    scores, logs = scores.contiguous(), torch.empty(scores.shape[:-1], dtype=torch.float32, device=scores.device)
    if keys is not None:
        assert keys.is_cpu and keys.dtype is torch.int64 and keys.shape == logs.shape
        keys = keys.contiguous()
    functions().sample(
        torch.get_num_threads(), logs.numel(), scores.shape[-1], scores.data_ptr(),
        None if keys is None else keys.data_ptr(), None if tokens is None else tokens.data_ptr(), logs.data_ptr(),
    )  # fmt: skip
    return logs
