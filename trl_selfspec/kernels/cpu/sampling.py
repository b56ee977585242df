"""Draws from scores by `sampling.c`. The eager twin is `sampling.sample_inverse_cdf` of their softmax."""

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu.build import available, functions


def takes(scores: Tensor) -> bool:
    return scores.is_cpu and scores.dtype is torch.float32 and available()


def draw(
    scores: Tensor,  # (..., V) fp32
    u: Tensor,  # (...) float64 in [0, 1)
) -> tuple[Tensor, Tensor]:  # (...) int64 tokens, (...) fp32 logarithms of the sum of exp
    """The token whose slice of the cumulative mass contains `u`; never one of mass 0.

    A row without mass, or with NaN, gives some token in range and a logarithm that is not finite.
    """
    tokens = torch.empty(scores.shape[:-1], dtype=torch.int64, device=scores.device)
    return tokens, _sample(scores, u.contiguous(), tokens)


def logsumexp(scores: Tensor) -> Tensor:  # (..., V) fp32 -> (...)
    return _sample(scores, None, None)


def _sample(scores: Tensor, u: Tensor | None, tokens: Tensor | None) -> Tensor:
    if scores.requires_grad and torch.is_grad_enabled():
        raise AssertionError("the kernels have no backward: use torch.no_grad()")
    assert takes(scores)
    scores, logs = scores.contiguous(), torch.empty(scores.shape[:-1], dtype=torch.float32, device=scores.device)
    assert u is None or (u.is_cpu and u.dtype is torch.float64 and u.shape == logs.shape)
    functions().sample(
        torch.get_num_threads(), logs.numel(), scores.shape[-1], scores.data_ptr(),
        None if u is None else u.data_ptr(), None if tokens is None else tokens.data_ptr(), logs.data_ptr(),
    )  # fmt: skip
    return logs
