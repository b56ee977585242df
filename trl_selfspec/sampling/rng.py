"""Random numbers and draws that depend on (seed, row, position, purpose) alone.

A value is a hash of its address, never the next number of a stream, so a row draws the same numbers whatever the
batch around it, the draft length or the order of the rounds. The hash is SplitMix64's finaliser (Steele, Lea, Flood
2014, with Stafford's constants) in wrapping int64 arithmetic: no generator state, no host sync, the same bits on
every device, capturable in a CUDA graph.
"""

from enum import IntEnum

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a number is for. Two uses of one address must differ in purpose, or their outcomes correlate."""

    TOKEN = 0
    DRAFT = 1
    ACCEPT = 2
    RECOVER = 3
    GUMBEL = 4


# Unsigned 64-bit constants, written as the signed integers that torch takes.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64
_PURPOSES = 8  # room for Purpose in the hashed word; changing it changes every sample

_SMALLEST_V = 2.0**-64
_LARGEST_V = 1 - 2.0**-24  # the fp32 number below 1


def uniform(
    seed: Tensor,  # () int64
    rows: Tensor,  # int64
    positions: Tensor,  # int64
    purpose: Purpose | Tensor,  # int64
) -> Tensor:
    """Uniform numbers in [0, 1), float64 with 53 random bits, of shape `broadcast(rows, positions, purpose)`.

    All tensors lie on one device.
    """
    return _logical_shift(_key(seed, rows, positions, purpose), 11).double().mul_(2.0**-53)


def gumbel(
    seed: Tensor,  # () int64
    rows: Tensor,  # int64
    positions: Tensor,  # int64
    vocab_size: int,
) -> Tensor:
    """Standard Gumbel noise per token, fp32 `(*broadcast(rows, positions), vocab_size)`, finite everywhere.

    `argmax(log p + gumbel)` is a draw from `p`. Two laws drawn with the same noise agree most of the time, which is
    what coupled verification lives on.
    """
    tokens = torch.arange(vocab_size, device=rows.device).add_(1).mul_(_GAMMA)
    bits = _key(seed, rows, positions, Purpose.GUMBEL).unsqueeze(-1) + tokens
    _mix_(bits)
    # A token wins by a *small* exponential E = -log(1 - v), so v needs its resolution near 0, not near 1: 63 bits
    # turned straight into a float keep full relative precision down to 2^-63, and a token of probability 1e-15 still
    # wins that often. Near 1, where v has 24 bits, E > 16.6 is cut off: only the size of a loss, not who wins.
    v = bits.bitwise_and_(2**63 - 1).float().mul_(2.0**-63).clamp_(_SMALLEST_V, _LARGEST_V)
    return v.neg_().log1p_().neg_().log_().neg_()


def sample_inverse_cdf(
    probs: Tensor,  # (..., V) non-negative masses; they need not sum to 1
    u: Tensor,  # (...) float64 in [0, 1)
) -> Tensor:  # (...) int64
    """Draws the token whose slice of the cumulative mass contains `u`; never one of mass 0.

    A row without mass, or with NaN, gives some token in range: the caller counts or raises.
    """
    cdf = probs.cumsum(-1, dtype=torch.float64).contiguous()
    total = cdf[..., -1]
    # u * total may round up to the total, where the search would run past the last token that has mass.
    height = torch.minimum(u * total, torch.nextafter(total, total - 1)).unsqueeze(-1).contiguous()
    token = torch.searchsorted(cdf, height, right=True).squeeze(-1).clamp_(max=probs.shape[-1] - 1)
    # Sequential sums stay flat over tokens of mass 0. CUDA's parallel sums may rise there by one rounding error.
    has_mass = probs.gather(-1, token.unsqueeze(-1)).squeeze(-1) > 0
    return torch.where(has_mass, token, probs.argmax(-1))


def _key(seed: Tensor, rows: Tensor, positions: Tensor, purpose: Purpose | Tensor) -> Tensor:
    """Hashes the address, one absorbed word at a time: equal keys need equal addresses, up to 2^-64 accidents."""
    row_key = _mix_((rows + 1).mul_(_GAMMA).add_(seed))
    return _mix_((positions * _PURPOSES + (purpose + 1)).mul_(_GAMMA) + row_key)


def _mix_(z: Tensor) -> Tensor:
    """SplitMix64's finaliser in place: a bijection whose every output bit depends on every input bit."""
    z.bitwise_xor_(_logical_shift(z, 30)).mul_(_MULTIPLIER_1)
    z.bitwise_xor_(_logical_shift(z, 27)).mul_(_MULTIPLIER_2)
    return z.bitwise_xor_(_logical_shift(z, 31))


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    """Torch's int64 shift copies the sign bit; the mask drops the copies."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
