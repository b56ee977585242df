"""Tokens from scores, in Triton: one pass over the vocabulary, and a second look at the chunk that holds the token.

The vocabulary is cut into chunks of `CHUNK` words, at the same words in every row and batch. `_measure` leaves each
chunk's maximum and sum of exponentials; one program per row then joins them. Numbers are those of
`trl_selfspec.sampling.rng`, hashed where they are used.

Exactness: weights and sums of a chunk are fp32, what joins chunks and searches among words is float64, and a chunk's
words share exactly the mass that the chunk has. So a word, however rare, is drawn with its probability up to a
*relative* error of a few 2^-22 (exponentials, sums) and 2^-24 per unit of its distance from the row's maximum, and up
to 2^-52 for the resolution of `u`. Words 87 below the maximum underflow and are not drawn; words of mass 0 never.

This module imports triton; import it only inside functions.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl_selfspec.kernels.triton.launch import launch
from trl_selfspec.sampling.ops import Memory
from trl_selfspec.sampling.rng import Purpose


CHUNK = 2048  # words per program: 16 bytes four times per thread, 75 programs per row at 152k words
NUM_WARPS = 4
LOG2E = tl.constexpr(math.log2(math.e))  # exp2 is what the hardware has
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum of nothing that can be subtracted from -inf, and from itself

NO_WORD = tl.constexpr(0)  # what `_measure` looks for besides the statistics
BEST = tl.constexpr(1)
BEST_WITH_NOISE = tl.constexpr(2)

_PURPOSES = tl.constexpr(8)
_GUMBEL = tl.constexpr(int(Purpose.GUMBEL))
_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = tl.constexpr(0x94D049BB133111EB)
_SMALLEST_V = tl.constexpr(2.0**-64)
_LARGEST_V = tl.constexpr(1 - 2.0**-24)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * _MULTIPLIER_1
    z = (z ^ (z >> 27)) * _MULTIPLIER_2
    return z ^ (z >> 31)


@triton.jit
def _key(seed, row, position, purpose):
    row_key = _mix((row + 1).to(tl.uint64) * _GAMMA + seed.to(tl.uint64))
    return _mix((position * _PURPOSES + (purpose + 1)).to(tl.uint64) * _GAMMA + row_key)


@triton.jit
def uniform(seed, row, position, purpose):
    """In [0, 1), float64 with 53 random bits."""
    return (_key(seed, row, position, purpose) >> 11).to(tl.float64) * 2.0**-53


@triton.jit
def _gumbel(key, word):
    bits = _mix(key + (word + 1).to(tl.uint64) * _GAMMA)
    v = (bits & 0x7FFFFFFFFFFFFFFF).to(tl.int64).to(tl.float32) * 2.0**-63
    v = tl.minimum(tl.maximum(v, _SMALLEST_V), _LARGEST_V)
    # log1p: the error of log(1 - v), which is that of rounding 1 - v, is divided out.
    rest = 1.0 - v
    flat = rest == 1.0
    exponential = tl.where(flat, v, -tl.log(rest) * v / tl.where(flat, 1.0, 1.0 - rest))
    return -tl.log(exponential)


@triton.jit
def weight(scores, maximum):
    return tl.exp2((scores - maximum) * LOG2E)


@triton.jit
def probability(scores, maximum, total):
    """Draft and target both go through here, so that equal scores give equal bits."""
    return weight(scores, maximum) / total


@triton.jit
def load_chunk(scores, words, vocab):
    return tl.load(scores + words, mask=words < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def load_statistics(statistics, row, num_chunks, chunk, seen):
    place = statistics + row * 2 * num_chunks + chunk
    return tl.load(place, mask=seen, other=LOWEST), tl.load(place + num_chunks, mask=seen, other=0.0)


@triton.jit
def chunk_masses(maxima, totals, maximum):
    return (totals * weight(maxima, maximum)).to(tl.float64)


@triton.jit
def pick(masses, height):
    """The first index with mass whose cumulative mass exceeds `height`, else the last with mass; and how far into the
    picked mass `height` reaches. Parallel sums need not stay flat over mass 0, so that is asked separately.
    """
    index = tl.arange(0, masses.shape[0])
    cumulative = tl.cumsum(masses, 0)
    has_mass = masses > 0
    last = tl.max(tl.where(has_mass, index, 0), 0)
    picked = tl.min(tl.where(has_mass & (cumulative > height), index, last), 0)
    mass = tl.sum(tl.where(index == picked, masses, 0.0), 0)
    before = tl.sum(tl.where(index == picked, cumulative, 0.0), 0) - mass
    return picked, (height - before) / tl.where(mass > 0, mass, 1.0)


@triton.jit(do_not_specialize=["num_steps"])
def _measure(
    scores, statistics, keys, words, kept, step, seed, row_ids, positions,
    row_stride, vocab, num_steps, longest, scale,
    SEEKS: tl.constexpr, KEEPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of a chunk, and the best word: the first where scores, or noisy ones, tie.
    Keeps the scores in passing, as those of the row's draft `step`.
    """
    chunk, num_chunks, row = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    word = chunk * CHUNK + tl.arange(0, CHUNK)
    values = load_chunk(scores + row * row_stride, word, vocab)
    if KEEPS:
        tl.store(kept + (row * longest + tl.load(step)) * vocab + word, values, mask=word < vocab)
    values *= scale
    maximum = tl.maximum(tl.max(values, 0), LOWEST)
    place = statistics + row * 2 * num_chunks + chunk
    tl.store(place, maximum)
    tl.store(place + num_chunks, tl.sum(weight(values, maximum), 0))
    if SEEKS != NO_WORD:
        if SEEKS == BEST_WITH_NOISE:
            row_id, position = tl.load(row_ids + row // num_steps), tl.load(positions + row)
            values += _gumbel(_key(tl.load(seed), row_id, position, _GUMBEL), word)
        key = tl.max(values, 0)
        tl.store(keys + row * num_chunks + chunk, key)
        # Nothing equals NaN: then some word in range, whose log-probability is NaN.
        tl.store(words + row * num_chunks + chunk, tl.min(tl.where(values == key, word, vocab - 1), 0))


@triton.jit
def _sample(
    scores, statistics, tokens, remark, laws, step, seed, row_ids, positions,
    row_stride, vocab, num_chunks, longest,
    PURPOSE: tl.constexpr, KEEPS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The word whose slice of the cumulative mass contains the row's number; remarks its logprob or, where a draft is
    kept, whether that is NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    maxima, totals = load_statistics(statistics, row, num_chunks, chunk, chunk < num_chunks)
    maximum = tl.max(maxima, 0)
    masses = chunk_masses(maxima, totals, maximum)
    total = tl.sum(masses, 0)
    u = uniform(tl.load(seed), tl.load(row_ids + row), tl.load(positions + row), PURPOSE)
    picked, fraction = pick(masses, u * total)

    words = picked * CHUNK + tl.arange(0, CHUNK)
    values = load_chunk(scores + row * row_stride, words, vocab)
    masses = weight(values, tl.load(statistics + row * 2 * num_chunks + picked)).to(tl.float64)
    place, _ = pick(masses, fraction * tl.sum(masses, 0))
    token = tl.minimum(picked * CHUNK + place, vocab - 1)
    score = tl.load(scores + row * row_stride + token).to(tl.float32)
    total = total.to(tl.float32)
    logprob = score - maximum - tl.log(total)
    tl.store(tokens + row, token.to(tl.int64))
    if KEEPS:
        laws += (row * longest + tl.load(step)) * 3
        tl.store(laws, maximum)
        tl.store(laws + 1, total)
        tl.store(laws + 2, probability(score, maximum, total))
        tl.store(remark + row, logprob != logprob)
    else:
        tl.store(remark + row, logprob)


@triton.jit(do_not_specialize=["num_steps"])
def _best(
    scores, statistics, keys, words, tokens, logprobs, drafts, num_accepted, row_stride, num_chunks, num_steps,
    CHUNKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The best word of each step of a row, and how many drafts are the best words."""
    row = tl.program_id(0).to(tl.int64)
    step, chunk = tl.arange(0, STEPS), tl.arange(0, CHUNKS)[None, :]
    real = step < num_steps
    at = row * num_steps + step
    seen = real[:, None] & (chunk < num_chunks)
    maxima, totals = load_statistics(statistics, at[:, None], num_chunks, chunk, seen)
    maximum = tl.max(maxima, 1)
    total = tl.sum(chunk_masses(maxima, totals, maximum[:, None]), 1).to(tl.float32)
    key = tl.load(keys + at[:, None] * num_chunks + chunk, mask=seen, other=float("-inf"))
    first = tl.min(tl.where(seen & (key == tl.max(key, 1)[:, None]), chunk, num_chunks - 1), 1)
    token = tl.load(words + at * num_chunks + first, mask=real, other=0)
    score = tl.load(scores + at * row_stride + token, mask=real, other=0.0).to(tl.float32)
    tl.store(tokens + at, token.to(tl.int64), mask=real)
    tl.store(logprobs + at, score - maximum - tl.log(total), mask=real)
    gamma = num_steps - 1
    draft = tl.load(drafts + row * gamma + step, mask=step < gamma, other=0)
    count = tl.min(tl.where((step < gamma) & (draft != token), step, gamma), 0)
    tl.store(num_accepted + row, count.to(tl.int64))


@triton.jit(do_not_specialize=["scale"])
def _look_up(
    scores, statistics, tokens, logprobs, row_stride, num_chunks, scale, CHUNKS: tl.constexpr
):  # fmt: skip
    """The log-probability of one given word per row."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    maxima, totals = load_statistics(statistics, row, num_chunks, chunk, chunk < num_chunks)
    maximum = tl.max(maxima, 0)
    total = tl.sum(chunk_masses(maxima, totals, maximum), 0).to(tl.float32)
    score = tl.load(scores + row * row_stride + tl.load(tokens + row)).to(tl.float32) * scale
    tl.store(logprobs + row, score - maximum - tl.log(total))


def as_rows(scores: Tensor) -> Tensor:  # (..., V) -> (rows, V)
    rows = scores.reshape(-1, scores.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def padded(count: int) -> int:
    return triton.next_power_of_2(count)


def measure(
    rows: Tensor,  # (N, V)
    chunk: int,
    scale: float = 1.0,
    kept: Tensor | None = None,  # (N, longest, V), dtype of `rows`, contiguous
    step: Tensor | None = None,  # () int64: where in `kept` the rows are copied
) -> Tensor:  # (N, 2, chunks) fp32
    """Maximum and sum of exponentials, relative to it, of each chunk of `scale * rows`."""
    num_rows, vocab = rows.shape
    num_chunks = triton.cdiv(vocab, chunk)
    statistics = unused = rows.new_empty((num_rows, 2, num_chunks), dtype=torch.float32)
    longest = 1
    if kept is not None:
        assert kept.is_contiguous() and kept.dtype is rows.dtype and len(kept) == num_rows
        longest = kept.shape[1]
    launch(
        _measure, (num_chunks, num_rows),
        rows, statistics, unused, unused, kept if kept is not None else unused, step if step is not None else unused,
        unused, unused, unused, rows.stride(0), vocab, 1, longest, scale,
        NO_WORD, kept is not None, chunk, num_warps=NUM_WARPS,
    )  # fmt: skip
    return statistics


def sample(
    scores: Tensor,  # (B, V) fp32, bf16 or fp16
    seed: Tensor,  # () int64
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B,) int64
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Tokens (B,) by inverse CDF and their logprobs, which are NaN where the law is not finite."""
    logprobs = scores.new_empty((len(scores),), dtype=torch.float32)
    return _sample_rows(scores, Purpose.TOKEN, seed, row_ids, positions, logprobs, None, None, chunk), logprobs


def propose(
    scores: Tensor,  # (B, V), dtype of `memory.laws`
    seed: Tensor,  # () int64
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B,) int64
    step: Tensor,  # () int64: the place in the memory
    memory: Memory,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Draft tokens (B,) by inverse CDF, and whether their law was not finite; the memory is for `rejection.verify`."""
    broken = scores.new_empty((len(scores),), dtype=torch.bool)
    return _sample_rows(scores, Purpose.DRAFT, seed, row_ids, positions, broken, step, memory, chunk), broken


def _sample_rows(
    scores: Tensor, purpose: Purpose, seed: Tensor, row_ids: Tensor, positions: Tensor,
    remark: Tensor,  # (B,): logprobs, or whether the law is broken where there is a memory
    step: Tensor | None, memory: Memory | None, chunk: int,
) -> Tensor:  # fmt: skip
    rows, row_ids, positions = as_rows(scores), row_ids.contiguous(), positions.contiguous()
    num_rows, vocab = rows.shape
    tokens = torch.empty_like(row_ids)
    kept, laws = (None, remark[:, None]) if memory is None else (memory.laws, memory.summaries)
    statistics = measure(rows, chunk, 1.0, kept, step)
    num_chunks = statistics.shape[2]
    launch(
        _sample, (num_rows,),
        rows, statistics, tokens, remark, laws, seed if step is None else step, seed, row_ids, positions,
        rows.stride(0), vocab, num_chunks, laws.shape[1],
        int(purpose), memory is not None, chunk, padded(num_chunks), num_warps=8,
    )  # fmt: skip
    return tokens


def best(
    scores: Tensor,  # (B, T, V)
    seed: Tensor | None,  # () int64; None: no noise
    row_ids: Tensor,  # (B,) int64
    positions: Tensor,  # (B, T) int64
    drafts: Tensor | None = None,  # (B, T-1) int64; may be None where T is 1
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """How many drafts are the best words (B,), the best words (B, T), and their logprobs, which are NaN where the law
    is not finite. Best is the largest `scores + gumbel`; ties go to the lowest word.
    """
    num_rows, num_steps, vocab = scores.shape
    rows, row_ids, positions = as_rows(scores), row_ids.contiguous(), positions.contiguous()
    num_chunks = triton.cdiv(vocab, chunk)
    statistics = rows.new_empty((len(rows), 2, num_chunks), dtype=torch.float32)
    keys = rows.new_empty((len(rows), num_chunks), dtype=torch.float32)
    words = rows.new_empty((len(rows), num_chunks), dtype=torch.int32)
    num_accepted, tokens = row_ids.new_empty((num_rows,)), row_ids.new_empty((num_rows, num_steps))
    logprobs = rows.new_empty((num_rows, num_steps), dtype=torch.float32)
    drafts = tokens if drafts is None else drafts.contiguous()
    launch(
        _measure, (num_chunks, len(rows)),
        rows, statistics, keys, words, statistics, words, words if seed is None else seed, row_ids, positions,
        rows.stride(0), vocab, num_steps, 1, 1.0,
        BEST if seed is None else BEST_WITH_NOISE, False, chunk, num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        _best, (num_rows,),
        rows, statistics, keys, words, tokens, logprobs, drafts, num_accepted,
        rows.stride(0), num_chunks, num_steps, padded(num_chunks), padded(num_steps),
    )  # fmt: skip
    return num_accepted, tokens, logprobs


def token_logprobs(
    scores: Tensor,  # (..., V) fp32, bf16 or fp16
    tokens: Tensor,  # (...) int64
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> Tensor:  # (...) fp32
    """`log_softmax(scores / temperature)` at the tokens."""
    rows, tokens = as_rows(scores), tokens.contiguous()
    logprobs = torch.empty_like(tokens, dtype=torch.float32)
    statistics = measure(rows, chunk, 1 / temperature)
    num_chunks = statistics.shape[2]
    numbers = rows.stride(0), num_chunks, 1 / temperature, padded(num_chunks)
    launch(_look_up, (len(rows),), rows, statistics, tokens, logprobs, *numbers)
    return logprobs
