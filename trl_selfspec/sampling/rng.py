"""Random numbers that depend on (seed, row, position, purpose) alone.

A value is a hash of its address, never the next number of a stream, so a row draws the same numbers whatever the
batch around it, the draft length or the order of the rounds. The hash is SplitMix64's finaliser (Steele, Lea, Flood
2014, with Stafford's constants) in wrapping int64 arithmetic: no generator state, no host sync, the same bits on
every device, capturable in a CUDA graph. `kernels/cpu/sampling.c` computes the same noise.
"""

from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a number is for. Two uses of one address must differ in purpose, or their outcomes correlate."""

    TOKEN = 0  # noise of plain draws and bonus tokens; of every draw in coupled mode, whose point is to share it
    DRAFT = 1  # noise of drafts that rejection sampling verifies
    ACCEPT = 2  # uniform of its accept test
    RECOVER = 3  # noise of its recovered tokens


# Unsigned 64-bit constants, written as the signed integers that torch takes.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64
_PURPOSES = 8  # room for Purpose in the hashed integer; changing it changes every sample

_SMALLEST_V = 2.0**-64
_LARGEST_V = 1 - 2.0**-24  # the fp32 number below 1


def random_key(
    seed: Tensor,  # () int64
    rows: Tensor,  # int64
    positions: Tensor,  # int64
    purpose: Purpose | Tensor,  # int64
) -> Tensor:
    """Hashes an address, int64 of shape `broadcast(rows, positions, purpose)`. All tensors lie on one device.

    One absorbed integer at a time: equal keys need equal addresses, up to 2^-64 accidents.
    """
    row_key = _mix_((rows + 1).mul_(_GAMMA).add_(seed))
    return _mix_((positions * _PURPOSES + (purpose + 1)).mul_(_GAMMA) + row_key)


def uniform(
    keys: Tensor,  # (...) int64, of `random_key`
) -> Tensor:  # (...) float64
    """Uniform numbers in [0, 1) with 53 random bits."""
    return _logical_shift(keys, 11).double().mul_(2.0**-53)


def gumbel(
    keys: Tensor,  # (...) int64, of `random_key`
    vocab_size: int,
) -> Tensor:  # (..., V) fp32
    """Standard Gumbel noise per token, finite everywhere.

    `argmax(log p + gumbel)` is a draw from `p`. Two distributions drawn with the same noise agree most of the time,
    which is what coupled verification lives on.
    """
    tokens = torch.arange(vocab_size, device=keys.device).add_(1).mul_(_GAMMA)
    bits = _mix_(keys.unsqueeze(-1) + tokens)
    # A token wins by a *small* exponential E = -log(1 - v), so v needs its resolution near 0, not near 1: 63 bits
    # turned straight into a float keep full relative precision down to 2^-63, and a token of probability 1e-15 still
    # wins that often. Near 1, where v has 24 bits, E > 16.6 is cut off: only the size of a loss, not who wins.
    v = bits.bitwise_and_(2**63 - 1).float().mul_(2.0**-63).clamp_(_SMALLEST_V, _LARGEST_V)
    return v.neg_().log1p_().neg_().log_().neg_()


def _mix_(z: Tensor) -> Tensor:
    """SplitMix64's finaliser in place: a bijection whose every output bit depends on every input bit."""
    z.bitwise_xor_(_logical_shift(z, 30)).mul_(_MULTIPLIER_1)
    z.bitwise_xor_(_logical_shift(z, 27)).mul_(_MULTIPLIER_2)
    return z.bitwise_xor_(_logical_shift(z, 31))


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    """Torch's int64 shift copies the sign bit; the mask drops the copies."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
