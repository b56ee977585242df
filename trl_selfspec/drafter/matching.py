"""Suffix drafts: a row's last tokens are looked up in texts of the same prompt, and what followed there is drafted.

A candidate is a position j of a text: the tokens before j are compared with the row's last ones, the tokens from j on
would be the draft. The longest match wins, then the row's own text, then the later slot, then the later position.

The search is one program of static shapes that never waits for the device, so it can be captured in a CUDA graph: it
runs compiled by torch.compile on GPUs, in `kernels/cpu/matching.c` on CPUs, and eagerly elsewhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_selfspec.kernels.cpu import matching as cpu
from trl_selfspec.sampling.samplers import compiled_on_gpu


MAX_MATCH = 16  # tokens that count; on replayed samples 8 gave up to 0.7 % fewer tokens a round, 32 under 0.1 % more


def longest_suffix_match(
    texts: Tensor,  # (S, W) int32
    lengths: Tensor,  # (S,) int64, tokens of each text; what lies behind means nothing
    starts: Tensor,  # (S,) int64, other rows copy from here on
    slots: Tensor,  # (B,) int64, each row's own text, of length 1 or more
    first: Tensor,  # (B,) int64, the slots of its prompt are first .. end - 1, its own among them
    end: Tensor,  # (B,) int64
    gamma: int,
    group_size: int,
    width: int,
    recent: Tensor | None = None,  # (B, MAX_MATCH) int32, each row's last tokens; None: those of its text
) -> Tensor:  # (B, γ) int64
    """Drafts of γ tokens for every row. A draft that runs past its text goes on periodically.

    A row whose last token was said nowhere else drafts that token again. The host must know bounds of what only the
    device holds exactly:

    Args:
        group_size: the largest `end - first`, or more.
        width: the longest text, or more; up to W.

    `recent`, the last token first, is for rows that have said more than their texts hold. -1 stands for none.
    """
    if cpu.is_supported(texts):
        return cpu.suffix_match(texts, lengths, starts, slots, first, end, gamma, MAX_MATCH, recent)
    # A size of 1 is compiled apart from all others, and torch gives a function up after eight programs.
    sizes = max(gamma, 2), max(group_size, 2), width
    return eager_suffix_match(texts, lengths, starts, slots, first, end, *sizes, recent)[:, :gamma]


@compiled_on_gpu
def eager_suffix_match(
    texts: Tensor,
    lengths: Tensor,
    starts: Tensor,
    slots: Tensor,
    first: Tensor,
    end: Tensor,
    gamma: int,
    group_size: int,
    width: int,
    recent: Tensor | None = None,
) -> Tensor:
    """The same in torch, step by step over (B, G, W) tensors; compiled, these are no more than registers."""
    offset = torch.arange(group_size, device=texts.device)
    group = first[:, None] + offset  # (B, G)
    absent = group >= end[:, None]
    group = group.clamp(max=texts.shape[0] - 1)
    is_own, length = group == slots[:, None], lengths[slots]
    if recent is None:
        back = torch.arange(MAX_MATCH, device=texts.device)
        recent = texts[slots[:, None], (length[:, None] - 1 - back).clamp(min=0)]
        recent = recent.masked_fill(back >= length[:, None], -1)

    # Before its beginning a text is padded. Matches that go on there are cut below.
    position = torch.arange(width, dtype=torch.int32, device=texts.device)
    text = texts[group[:, :, None], position]  # (B, G, W); a slice would compile anew where `width` is all of it
    earlier = F.pad(text, (MAX_MATCH, 0))  # [j + MAX_MATCH] is token j
    match = torch.zeros((), dtype=torch.int8, device=texts.device)
    for n in reversed(range(MAX_MATCH)):
        equal = earlier[:, :, MAX_MATCH - 1 - n : MAX_MATCH - 1 - n + width] == recent[:, n, None, None]
        match = (match + 1) * equal  # (B, G, W): how many tokens agree from the one n before the last on
    most = position.clamp(max=MAX_MATCH)  # (W,)

    # (match, position) and (match, own, slot, position) as digits of one number: the best candidate's is the largest.
    low = torch.where(is_own, 0, starts[group])[:, :, None]
    high = torch.where(absent, 0, lengths[group])[:, :, None]
    key = match.minimum(most.to(torch.int8)).int() * width + position
    best = torch.where((position >= low) & (position < high), key, 0).amax(-1).long()  # (B, G)
    rank = (best // width * 2 + is_own) * group_size + offset
    best = (rank * width + best % width).amax(-1)  # (B,)
    found = best >= 2 * group_size * width  # by one token or more
    slot = torch.where(found, first + best // width % group_size, slots)
    start = torch.where(found, best % width, length - 1)
    period = lengths[slot] - start  # 1 where none was found: the last token over and over
    step = torch.arange(gamma, device=texts.device)
    return texts[slot[:, None], start[:, None] + step % period[:, None]].long()
