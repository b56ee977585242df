"""Random numbers depend on their address alone, look independent over every axis of it, and drive exact draws."""

import math
from functools import partial
from itertools import combinations
from types import ModuleType

import numpy as np
import pytest
import torch
from laws import FALSE_ALARM, chi_square, joint_counts, mutant, rejected
from scipy import stats
from torch import Tensor

from trl_selfspec.sampling import rng
from trl_selfspec.sampling.rng import Purpose, gumbel, random_key, uniform


COUNT = 2**19
SEED = torch.tensor(7)
ZERO = torch.tensor(0)
SECOND_ROUND = "z.bitwise_xor_(_logical_shift(z, 27)).mul_(_MULTIPLIER_2)"
LAST_SHIFT = "z.bitwise_xor_(_logical_shift(z, 31))"
WEAK_HASHES = {
    "no xor-shift": [("z.bitwise_xor_(_logical_shift(z, 30))", "z"), (SECOND_ROUND, "z"), (LAST_SHIFT, "z")],
    "one multiply": [(SECOND_ROUND, "z"), (LAST_SHIFT, "z")],
    "purpose forgotten": [("+ (purpose + 1)", "+ 1")],
    "row plus position": [("_mix_((rows + 1)", "((rows + 1)"), ("positions * _PURPOSES", "positions")],
}


def numbers(module: ModuleType, *address: Tensor | Purpose) -> Tensor:
    return module.uniform(module.random_key(*address))


def axes(module: ModuleType) -> dict[str, np.ndarray]:
    """Numbers along each axis of the address, and along axes at once, as a rollout takes them: (COUNT,) float64."""
    count, few = torch.arange(COUNT), len(Purpose)
    row, position = count[: COUNT // 256, None], count[:256]
    of = partial(numbers, module)
    walks = {
        "rows": of(SEED, count, ZERO, Purpose.DRAFT),
        "positions": of(SEED, ZERO, count, Purpose.DRAFT),
        # A seed enters next to the row; one 0-d seed per call is too slow for a walk, a tensor of them is the same.
        "seeds": of(count, ZERO.expand(COUNT), ZERO, Purpose.DRAFT),
        "rows, then positions": of(SEED, row, position, Purpose.ACCEPT),
        "positions, then rows": of(SEED, row, position, Purpose.RECOVER).T,
        "purposes": torch.stack([of(SEED, ZERO, count, p) for p in Purpose], -1).ravel()[: COUNT // few * few],
        "far addresses": of(SEED * 2**55, count * 2**20, count * 2**12 + 2**40, Purpose.TOKEN),
    }
    return {name: walk.ravel().numpy() for name, walk in walks.items()}


def neighbours(module: ModuleType) -> dict[str, tuple[Tensor, Tensor]]:
    """Numbers at one address and at one next to it."""
    row, position = torch.arange(COUNT // 256)[:, None], torch.arange(256)

    def of(rows: int = 0, positions: int = 0, purpose: Purpose = Purpose.ACCEPT, seed: int = 0) -> Tensor:
        return numbers(module, SEED + seed, row + rows, position + positions, purpose)

    pairs = {
        "next row": (of(), of(rows=1)),
        "next position": (of(), of(positions=1)),
        "next row, last position": (of(), of(rows=1, positions=-1)),
        "next seed": (of(), of(seed=1)),
        "next seed, last row": (of(), of(rows=-1, seed=1)),
        "high bit of the seed": (of(), numbers(module, SEED ^ -(2**63), row, position, Purpose.ACCEPT)),
    }
    for one, other in combinations(Purpose, 2):
        pairs[f"{one.name} and {other.name}"] = (of(purpose=one), of(purpose=other))
    return pairs


def cells(u: np.ndarray, bits: int, skip: int = 0) -> np.ndarray:
    """The `bits` bits of a number that follow the first `skip`."""
    return (u * 2.0 ** (bits + skip)).astype(np.int64) & (2**bits - 1)


def flatness(counts: np.ndarray) -> float:
    """Chi-square against the uniform law, two-sided: too even is not random either."""
    p = chi_square(counts, np.full(counts.shape, 1 / counts.size))
    return 2 * min(p, 1 - p)


def correlation_p_value(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * stats.norm.sf(abs(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a))))


def hash_p_values(module: ModuleType) -> dict[str, float]:
    p_values: dict[str, float] = {}
    for name, u in axes(module).items():
        for skip in (0, 24, 45):
            bins = cells(u, 8, skip)
            p_values[f"{name}: bits from {skip}"] = flatness(np.bincount(bins, minlength=256))
            pairs = np.stack([bins[:-1:2], bins[1::2]], -1) >> 3
            p_values[f"{name}: serial pairs from {skip}"] = flatness(joint_counts(pairs, 32))
        p_values[f"{name}: serial correlation"] = correlation_p_value(u[:-1], u[1:])
    for name, (one, other) in neighbours(module).items():
        a, b = one.ravel().numpy(), other.ravel().numpy()
        p_values[f"{name}: cells"] = flatness(joint_counts(np.stack([cells(a, 5), cells(b, 5)], -1), 32))
        p_values[f"{name}: correlation"] = correlation_p_value(a, b)
    return p_values


def test_numbers_are_uniform_and_independent_along_every_axis() -> None:
    """Prevents rows, positions, seeds or purposes that echo each other. False alarm: 1 in 10^4."""
    p_values = hash_p_values(rng)
    assert len(p_values) > 70
    assert not rejected(p_values)


@pytest.mark.parametrize("weakness", ["no xor-shift", "purpose forgotten", "row plus position"])
def test_control_weak_hashes_are_caught(weakness: str) -> None:
    assert rejected(hash_p_values(mutant(rng, *WEAK_HASHES[weakness])))


def avalanche_p_values(module: ModuleType) -> dict[str, float]:
    """Flip one input bit: every output bit should flip half the time. 4,096 addresses a bit.

    Sharper than counting cells: it alone catches a hash with one multiplication less.
    """
    generator = torch.Generator().manual_seed(3)
    rows, positions = (torch.randint(0, 2**14, (4096,), generator=generator) for _ in range(2))
    seeds = torch.randint(-(2**62), 2**62, (4096,), generator=generator)

    def bits(seed: Tensor, row: Tensor, position: Tensor) -> Tensor:
        return (numbers(module, seed, row, position, Purpose.TOKEN) * 2.0**53).long()

    base, p_values = bits(seeds, rows, positions), {}
    flips = {"seed": range(64), "row": range(20), "position": range(20)}
    for word, places in flips.items():
        for place in places:
            flip = {name: (1 << place) - (2**64 if place == 63 else 0) if name == word else 0 for name in flips}
            changed = base ^ bits(seeds ^ flip["seed"], rows ^ flip["row"], positions ^ flip["position"])
            flipped = ((changed[:, None] >> torch.arange(53)) & 1).sum(0).double()
            z = (flipped - 2048) / 32
            p_values[f"{word} bit {place}"] = float(stats.chi2.sf(float((z**2).sum()), 53))
    return p_values


def test_every_bit_of_the_address_reaches_every_bit_of_the_number() -> None:
    """Prevents a seed whose high half is ignored, or rows that agree in their low bits. False alarm: 1 in 10^4."""
    assert not rejected(avalanche_p_values(rng))


@pytest.mark.parametrize("weakness", ["no xor-shift", "one multiply"])
def test_control_weak_hashes_have_no_avalanche(weakness: str) -> None:
    assert rejected(avalanche_p_values(mutant(rng, *WEAK_HASHES[weakness])))


def test_uniform_is_the_published_hash() -> None:
    """The first numbers of SplitMix64 at seed 0, then the chain over words: samples must not change by accident."""

    def finalise(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    assert finalise(golden) == 0xE220A8397B1DCDAF  # published: SplitMix64, seed 0, first output
    for seed, row, position, purpose in [(0, 0, 0, 0), (-5, 3, 1000, 2), (2**63 - 1, 2**31, 2**40, 3)]:
        row_key = finalise((seed + (row + 1) * golden) % 2**64)
        expected = finalise((row_key + (8 * position + purpose + 1) * golden) % 2**64) >> 11
        u = numbers(rng, torch.tensor(seed), torch.tensor(row), torch.tensor(position), Purpose(purpose))
        assert u.dtype == torch.float64
        assert u.item() == expected / 2**53


def test_numbers_do_not_depend_on_their_batch() -> None:
    """Prevents rollouts that change when rows are permuted, compacted, padded or drafted further ahead."""
    rows, positions = torch.tensor([5, 0, 11, 3, 8]), torch.tensor([0, 7, 2, 900, 1, 6, 4])
    keys = random_key(SEED, rows[:, None], positions, Purpose.DRAFT)
    u, g = uniform(keys), gumbel(keys, 1003)
    assert u.shape == (5, 7)
    assert g.shape == (5, 7, 1003)
    assert g.dtype == torch.float32
    for i, row in enumerate(rows):
        for j, position in enumerate(positions):
            alone = random_key(SEED, row, position, Purpose.DRAFT)
            assert uniform(alone).equal(u[i, j])
            assert gumbel(alone, 1003).equal(g[i, j])
    assert gumbel(keys[:, 3:6].flip(0), 1003).equal(g.flip(0)[:, 3:6])
    assert gumbel(keys, 517).equal(g[..., :517])
    purposes = torch.tensor([Purpose.RECOVER, Purpose.DRAFT, Purpose.TOKEN, Purpose.RECOVER, Purpose.DRAFT])
    assert random_key(SEED, rows, positions[:5], purposes)[[1, 4]].equal(keys[[1, 4], [1, 4]])


def test_global_generator_is_untouched() -> None:
    """Prevents rollouts that shift the user's own random numbers."""
    before = torch.get_rng_state()
    key = random_key(SEED, ZERO, ZERO, Purpose.TOKEN)
    uniform(key)
    gumbel(key, 100)
    assert torch.get_rng_state().equal(before)


def test_no_host_sync() -> None:
    """On meta tensors any read of a value raises; on CUDA it would stall every round and break graph capture."""
    seed, rows = torch.empty((), dtype=torch.int64, device="meta"), torch.empty(4, 1, dtype=torch.int64, device="meta")
    positions = torch.empty(1, 3, dtype=torch.int64, device="meta")
    keys = random_key(seed, rows, positions, Purpose.TOKEN)
    u = uniform(keys)
    assert u.shape == gumbel(keys, 10).argmax(-1).shape == (4, 3)
    with pytest.raises(RuntimeError):
        u.sum().item()


def gumbel_p_values(module: ModuleType) -> dict[str, float]:
    """Moments, the whole distribution, and its upper tail by halves of probability, on 2^21 values."""
    addresses = SEED, torch.arange(32)[:, None], ZERO
    of = [module.random_key(*addresses, purpose) for purpose in (Purpose.TOKEN, Purpose.DRAFT)]
    g, other = (module.gumbel(keys, 2**16).ravel().double().numpy() for keys in of)
    n, deviation = len(g), math.pi / math.sqrt(6)
    octave = np.minimum(np.floor(-np.log2(-np.expm1(-np.exp(-g)))).astype(int), 16)
    return {
        "mean": float(2 * stats.norm.sf(abs(g.mean() - np.euler_gamma) / deviation * math.sqrt(n))),
        "variance": float(2 * stats.norm.sf(abs(g.var() / deviation**2 - 1) / math.sqrt(4.4 / n))),  # kurtosis 5.4
        "distribution": float(stats.kstest(g[::8], "gumbel_r").pvalue),
        "tail": chi_square(np.bincount(octave, minlength=17), np.append(0.5 ** np.arange(1, 17), 0.5**16)),
        "next token": correlation_p_value(g[:-1], g[1:]),
        "other purpose": correlation_p_value(g, other),
    }


def test_gumbel_noise_has_its_distribution() -> None:
    """False alarm: 1 in 10^4."""
    assert not rejected(gumbel_p_values(rng))


def test_control_gumbel_noise_of_the_wrong_sign_is_caught() -> None:
    wrong = mutant(rng, ("v.neg_().log1p_().neg_().log_().neg_()", "v.neg_().log1p_().neg_().log_()"))
    assert {"mean", "distribution", "tail"} <= rejected(gumbel_p_values(wrong)).keys()


def test_control_noise_shared_by_purposes_is_caught() -> None:
    """A recovered token drawn with its draft's noise would not follow the residual distribution."""
    shared = mutant(rng, *WEAK_HASHES["purpose forgotten"])
    assert rejected(gumbel_p_values(shared)).keys() == {"other purpose"}


def argmax_p_value(module: ModuleType, positions: Tensor) -> float:
    """Two tokens drawn by argmax(log p + gumbel) at two positions, the second given the first."""
    laws = torch.softmax(1.5 * torch.randn(9, 8, generator=torch.Generator().manual_seed(2)), -1)
    laws[:, 3] = 0
    laws = laws / laws.sum(-1, keepdim=True)
    noise = module.gumbel(module.random_key(SEED, torch.arange(COUNT)[:, None], positions, Purpose.TOKEN), 8)
    first = (laws[8].log() + noise[:, 0]).argmax(-1)
    second = (laws[first].log() + noise[:, 1]).argmax(-1)
    joint = (laws[8, :, None] * laws[:8]).double().numpy()
    return chi_square(joint_counts(torch.stack([first, second], -1).numpy(), 8), joint / joint.sum())


def test_gumbel_argmax_draws_from_the_joint_distribution() -> None:
    """False alarm: 1 in 10^4."""
    assert argmax_p_value(rng, torch.tensor([4, 5])) > FALSE_ALARM


def test_control_gumbel_noise_shared_by_positions_is_caught() -> None:
    assert argmax_p_value(rng, torch.tensor([4, 4])) < FALSE_ALARM


def extreme_noise(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Gumbel noise where the hash comes out as 0, 1, 2^20, 2^62, 2^63 - 1, and with the sign bit set."""
    bits = torch.tensor([0, 1, 2**20, 2**62, 2**63 - 1, -1, -(2**63)])
    monkeypatch.setattr(module, "_mix_", lambda z: bits.clone())
    return module.gumbel(ZERO, len(bits))


def test_gumbel_noise_is_finite_and_fine_in_its_upper_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of probability 1e-12 beats the rest only with noise above 27; infinite noise would make NaN of -inf."""
    g = extreme_noise(rng, monkeypatch)
    assert g.isfinite().all()
    expected = [64 * math.log(2), 63 * math.log(2), 43 * math.log(2), -math.log(math.log(2))]
    torch.testing.assert_close(g[:4], torch.tensor(expected))
    assert g[4] == g[5] == g.min()
    assert g[6] == g.max()


def test_control_24_bit_noise_is_coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = mutant(rng, ("bits.bitwise_and_(2**63 - 1)", "bits.bitwise_and_((2**24 - 1) << 39)"))
    g = extreme_noise(coarse, monkeypatch)
    assert g[0] == g[1] == g[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_numbers_in_a_graph() -> None:
    """Prevents seeds that mean one thing on a CPU and another on a GPU, and syncs that break capture."""
    seed, rows, positions = SEED.cuda(), torch.arange(6).cuda()[:, None], torch.arange(4).cuda()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gumbel(random_key(seed, rows, positions, Purpose.DRAFT), 1000)
    stream.synchronize()
    with torch.cuda.graph(graph):
        keys = random_key(seed, rows, positions, Purpose.DRAFT)
        u, g = uniform(keys), gumbel(keys, 1000)
    seed.fill_(123)
    graph.replay()
    expected = random_key(torch.tensor(123), rows.cpu(), positions.cpu(), Purpose.DRAFT)
    assert keys.cpu().equal(expected) and u.cpu().equal(uniform(expected))
    torch.testing.assert_close(g.cpu(), gumbel(expected, 1000))  # log1p and log differ by an ulp
