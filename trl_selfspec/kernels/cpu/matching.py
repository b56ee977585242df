"""Suffix drafts by `matching.c`. The eager reference is `drafter.matching.eager_suffix_match`."""

import torch
from torch import Tensor

from trl_selfspec.kernels.cpu.build import available, functions


def is_supported(texts: Tensor) -> bool:
    return texts.is_cpu and available()


def suffix_match(
    texts: Tensor,  # (S, W) int32, contiguous within a text
    lengths: Tensor,  # (S,) int64, those of rows at least 1
    starts: Tensor,  # (S,) int64
    slots: Tensor,  # (B,) int64
    first: Tensor,  # (B,) int64
    end: Tensor,  # (B,) int64
    gamma: int,
    max_match: int,
    recent: Tensor | None = None,  # (B, max_match) int32, -1 for no token
) -> Tensor:  # (B, γ) int64
    assert is_supported(texts) and texts.dtype is torch.int32 and texts.stride(1) == 1
    integers = [values.contiguous() for values in (lengths, starts, slots, first, end)]
    assert all(values.is_cpu and values.dtype is torch.int64 for values in integers)
    if recent is not None:
        assert recent.is_cpu and recent.dtype is torch.int32 and recent.shape == (len(slots), max_match)
        recent = recent.flip(1).contiguous()
    drafts = torch.empty(len(slots), gamma, dtype=torch.int64, device=texts.device)
    functions().suffix_match(
        torch.get_num_threads(), len(slots), gamma, max_match, texts.data_ptr(), texts.stride(0),
        *(values.data_ptr() for values in integers), None if recent is None else recent.data_ptr(),
        drafts.data_ptr(),
    )  # fmt: skip
    return drafts
