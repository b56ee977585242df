"""Rejection sampling's verdict in Triton: the rule of `trl_selfspec.sampling.rejection.verify_rejection` from scores.

Four launches. `_measure` passes once over the target's scores; a draft's are kept, with their statistics, from its own
draw. `_judge` looks at the drafted words only. `_leftover` passes over draft and target once more, at the one position
per row that needs a new token, and only where a draft was rejected. `_recover` picks the token.

This module imports triton; import it only inside functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl_selfspec.kernels.triton.launch import launch
from trl_selfspec.kernels.triton.sampling import (
    CHUNK,
    NUM_WARPS,
    as_rows,
    chunk_masses,
    load_chunk,
    load_statistics,
    measure,
    padded,
    pick,
    probability,
    uniform,
    weight,
)
from trl_selfspec.sampling.ops import Memory
from trl_selfspec.sampling.rng import Purpose


TOKEN = tl.constexpr(int(Purpose.TOKEN))
ACCEPT = tl.constexpr(int(Purpose.ACCEPT))
RECOVER = tl.constexpr(int(Purpose.RECOVER))


@triton.jit(do_not_specialize=["gamma"])
def _judge(
    scores, statistics, drafts, draft_laws, num_accepted, tokens, logprobs, laws, seed, row_ids, positions,
    row_stride, num_chunks, longest, gamma,
    CHUNKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Counts the leading drafts that stand; leaves the target's law, (maximum, total), at the position behind them."""
    row = tl.program_id(0).to(tl.int64)
    step, chunk = tl.arange(0, STEPS), tl.arange(0, CHUNKS)[None, :]
    real, drafted = step <= gamma, step < gamma
    at = row * (gamma + 1) + step
    maxima, totals = load_statistics(statistics, at[:, None], num_chunks, chunk, real[:, None] & (chunk < num_chunks))
    maximum = tl.max(maxima, 1)
    total = tl.sum(chunk_masses(maxima, totals, maximum[:, None]), 1).to(tl.float32)

    token = tl.load(drafts + row * gamma + step, mask=drafted, other=0)
    score = tl.load(scores + at * row_stride + token, mask=real, other=0.0).to(tl.float32)
    q = tl.load(draft_laws + (row * longest + step) * 3 + 2, mask=drafted, other=0.0)
    position = tl.load(positions + at, mask=real, other=0)
    u = uniform(tl.load(seed), tl.load(row_ids + row), position, ACCEPT)
    accepted = u * q.to(tl.float64) < probability(score, maximum, total).to(tl.float64)
    count = tl.min(tl.where(drafted & (accepted == 0), step, gamma), 0)

    tl.store(num_accepted + row, count.to(tl.int64))
    tl.store(tokens + at, token, mask=real)
    tl.store(logprobs + at, score - maximum - tl.log(total), mask=real)
    tl.store(laws + 2 * row, tl.sum(tl.where(step == count, maximum, 0.0), 0))
    tl.store(laws + 2 * row + 1, tl.sum(tl.where(step == count, total, 0.0), 0))


@triton.jit
def _excess(target, law, draft, draft_law):
    """The positive part of p - q. Two divisions: a multiplication would be fused into the difference."""
    p = probability(target, tl.load(law), tl.load(law + 1))
    q = probability(draft, tl.load(draft_law), tl.load(draft_law + 1))
    return tl.maximum(p - q, 0.0)


@triton.jit(do_not_specialize=["gamma"])
def _leftover(
    scores, draft_scores, draft_laws, num_accepted, laws, masses, row_stride, vocab, longest, gamma,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The mass of a chunk under the residual of the first rejected position."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(num_accepted + row)
    if count == gamma:
        return
    words = chunk * CHUNK + tl.arange(0, CHUNK)
    target = load_chunk(scores + (row * (gamma + 1) + count) * row_stride, words, vocab)
    draft = load_chunk(draft_scores + (row * longest + count) * vocab, words, vocab)
    excess = _excess(target, laws + 2 * row, draft, draft_laws + (row * longest + count) * 3)
    tl.store(masses + row * tl.num_programs(0) + chunk, tl.sum(excess, 0))


@triton.jit(do_not_specialize=["gamma"])
def _recover(
    scores, statistics, draft_scores, draft_laws, num_accepted, laws, masses, tokens, logprobs,
    seed, row_ids, positions, row_stride, vocab, num_chunks, longest, gamma,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Draws from the residual; from the target itself where every draft stands or the residual has no mass."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(num_accepted + row)
    at = row * (gamma + 1) + count
    scores += at * row_stride
    maximum, total = tl.load(laws + 2 * row), tl.load(laws + 2 * row + 1)
    chunk = tl.arange(0, CHUNKS)
    seen = chunk < num_chunks
    rejected = chunk < tl.where(count < gamma, num_chunks, 0)
    left = tl.load(masses + row * num_chunks + chunk, mask=rejected, other=0.0).to(tl.float64)
    is_residual = tl.sum(left, 0) > 0  # not where it is NaN
    maxima, totals = load_statistics(statistics, at, num_chunks, chunk, seen)
    chosen = tl.where(is_residual, left, chunk_masses(maxima, totals, maximum))
    purpose = tl.where(count == gamma, TOKEN, RECOVER)
    u = uniform(tl.load(seed), tl.load(row_ids + row), tl.load(positions + at), purpose)
    picked, fraction = pick(chosen, u * tl.sum(chosen, 0))

    words = picked * CHUNK + tl.arange(0, CHUNK)
    target = load_chunk(scores, words, vocab)
    drafted = row * longest + tl.minimum(count, gamma - 1)
    draft = load_chunk(draft_scores + drafted * vocab, words, tl.where(is_residual, vocab, 0))
    excess = _excess(target, laws + 2 * row, draft, draft_laws + drafted * 3)
    plain = weight(target, tl.load(statistics + at * 2 * num_chunks + picked))
    inside = tl.where(is_residual, excess, plain).to(tl.float64)
    place, _ = pick(inside, fraction * tl.sum(inside, 0))
    token = tl.minimum(picked * CHUNK + place, vocab - 1)
    tl.store(tokens + at, token.to(tl.int64))
    tl.store(logprobs + at, tl.load(scores + token).to(tl.float32) - maximum - tl.log(total))


def verify(
    drafts: Tensor,  # (B, γ) int64, γ >= 1, as `sampling.propose` drew them
    memory: Memory,  # of those calls, at steps 0..γ-1
    scores: Tensor,  # (B, γ+1, V), the target's
    seed: Tensor,  # () int64
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B, γ+1) int64
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """How many drafts stand (B,), tokens (B, γ+1), and their logprobs under the target's law, which are NaN where that
    is not finite.
    """
    draft_scores, draft_laws, (num_rows, gamma) = memory.laws, memory.summaries, drafts.shape
    rows, longest, vocab = as_rows(scores), *draft_scores.shape[1:]
    assert draft_scores.is_contiguous() and draft_laws.is_contiguous() and 0 < gamma <= longest
    assert len(draft_scores) == len(draft_laws) == num_rows and scores.shape == (num_rows, gamma + 1, vocab)
    drafts, row_ids, positions = drafts.contiguous(), row_ids.contiguous(), positions.contiguous()
    num_accepted, tokens = drafts.new_empty((num_rows,)), drafts.new_empty((num_rows, gamma + 1))
    logprobs, laws = (rows.new_empty((num_rows, width), dtype=torch.float32) for width in (gamma + 1, 2))
    statistics = measure(rows, chunk)
    num_chunks = statistics.shape[2]
    masses = rows.new_empty((num_rows, num_chunks), dtype=torch.float32)
    launch(
        _judge, (num_rows,),
        rows, statistics, drafts, draft_laws, num_accepted, tokens, logprobs, laws, seed, row_ids, positions,
        rows.stride(0), num_chunks, longest, gamma, padded(num_chunks), padded(gamma + 1),
    )  # fmt: skip
    launch(
        _leftover, (num_chunks, num_rows),
        rows, draft_scores, draft_laws, num_accepted, laws, masses, rows.stride(0), vocab, longest, gamma,
        chunk, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        _recover, (num_rows,),
        rows, statistics, draft_scores, draft_laws, num_accepted, laws, masses, tokens, logprobs,
        seed, row_ids, positions, rows.stride(0), vocab, num_chunks, longest, gamma,
        chunk, padded(num_chunks), num_warps=8,
    )  # fmt: skip
    return num_accepted, tokens, logprobs
