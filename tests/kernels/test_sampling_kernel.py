"""Gumbel-max draws by the CPU kernel against the eager reference."""

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from laws import FALSE_ALARM, chi_square
from torch import Tensor

from trl_selfspec import kernels
from trl_selfspec.kernels.cpu import build
from trl_selfspec.kernels.cpu import sampling as cpu
from trl_selfspec.sampling import samplers
from trl_selfspec.sampling.rng import Purpose, gumbel, random_key


LOG_TOLERANCE = 1e-5  # exponentials within 2 ulp; the sums are of doubles
NEAR_TIE = 1e-5  # scores plus noise of two tokens, whose logarithms differ in the last bits
SEED = torch.tensor(7)

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C compiler or no AVX2")


def random_scores(num_rows: int, vocab_size: int, masked: bool, scale: float = 4.0) -> Tensor:
    scores = scale * torch.randn(num_rows, vocab_size)
    if masked:  # as top-k leaves them; at least one token stays
        scores[:, 1:] = scores[:, 1:].where(torch.rand(num_rows, vocab_size - 1) < 0.3, -torch.inf)
        scores[:, -1:] = -torch.inf if vocab_size > 1 else scores[:, -1:]
    return scores


def keys_of(num_rows: int, position: int = 9) -> Tensor:
    return random_key(SEED, torch.arange(num_rows), torch.tensor(position), Purpose.TOKEN)


def shortfall(scores: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
    """By how much the tokens' noisy scores miss the largest."""
    noisy = scores + gumbel(keys, scores.shape[-1])
    return noisy.amax(-1) - noisy.gather(-1, tokens[..., None])[..., 0]


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 8, 9, 96, 511, 1031, 49152])
@pytest.mark.parametrize("masked", [False, True])
def test_a_draw_is_the_token_with_the_largest_noisy_score(vocab_size: int, masked: bool) -> None:
    """Catches another hash, lanes in another order and wrong tails. Negative control: another row's noise."""
    scores, keys = random_scores(40, vocab_size, masked), keys_of(40)
    tokens, total = cpu.draw(scores, keys)
    assert (shortfall(scores, keys, tokens) <= NEAR_TIE).all()
    torch.testing.assert_close(total, scores.logsumexp(-1), rtol=LOG_TOLERANCE, atol=LOG_TOLERANCE)
    assert torch.equal(cpu.logsumexp(scores), total)
    assert torch.equal(cpu.draw(scores, None)[0], scores.argmax(-1))
    if vocab_size > 100:
        assert (shortfall(scores, keys.roll(1), tokens) > NEAR_TIE).any()


@pytest.mark.parametrize("scale", [0.0, 0.01, 30.0, 1e4])
def test_bounds_that_skip_tokens_never_skip_the_best(scale: float) -> None:
    """Flat, peaked and huge scores, whose sums with noise are rounded coarsely: there the lowest of ties is drawn."""
    scores, keys = random_scores(300, 600, masked=False, scale=scale) + 1e3 * (scale > 100), keys_of(300)
    tokens, _ = cpu.draw(scores, keys)
    assert (shortfall(scores, keys, tokens) <= NEAR_TIE + scale * 1e-6).all()


def unmixed(z: int) -> int:
    """The inverse of SplitMix64's finaliser."""
    for shift, multiplier in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        z ^= (z >> shift) ^ (z >> 2 * shift)
        z = z * pow(multiplier, -1, 2**64) & (2**64 - 1)
    return z


@pytest.mark.parametrize("token", [0, 5, 8, 10])
@pytest.mark.parametrize("bits", [0, 1, 2**31, 2**40])
def test_the_noise_of_rare_tokens_is_fine_grained(token: int, bits: int) -> None:
    """A token of probability 1e-15 wins that often: its noise must not end at 31 or 32 bits of the hash."""
    key = (unmixed(bits) - (token + 1) * 0x9E3779B97F4A7C15) % 2**64  # which gives this token these bits
    keys = torch.tensor([key - 2**64 if key >= 2**63 else key])
    noise = -math.log(-math.log1p(-max(bits * 2.0**-63, 2.0**-64)))
    assert gumbel(keys, 11)[0, token].item() == pytest.approx(noise)
    others = gumbel(keys, 11)[0].where(torch.arange(11) != token, -torch.inf).max().item()
    for distance in (-1e-3, 1e-3):
        scores = torch.zeros(1, 11)
        scores[0, token] = others - noise + distance
        assert (cpu.draw(scores, keys)[0].item() == token) is (distance > 0)


def test_the_lowest_of_equal_scores_is_the_greedy_token() -> None:
    scores = torch.zeros(3, 20)
    scores[1, [13, 17]], scores[2, 19] = 1.0, 1e-7
    assert cpu.draw(scores, None)[0].tolist() == [0, 13, 19]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_told(bad: float) -> None:
    """Prevents an ordinary token from a broken distribution; the rows beside it are as they were."""
    scores, keys = random_scores(3, 1000, masked=False), keys_of(3)
    expected, _ = cpu.draw(scores, keys)
    scores[1, 800 if bad > 0 or bad != bad else slice(None)] = bad
    tokens, total = cpu.draw(scores, keys)
    assert total.isfinite().tolist() == [True, False, True]
    assert tokens[[0, 2]].equal(expected[[0, 2]]) and 0 <= tokens[1] < 1000
    drawn = samplers.sample(scores, torch.tensor(3), torch.arange(3), torch.arange(3), Purpose.TOKEN)
    assert drawn.logprobs.isnan().tolist() == [False, True, False]


def test_rows_do_not_see_their_neighbours() -> None:
    scores, keys = random_scores(50, 5000, masked=True), keys_of(50)
    together = cpu.draw(scores, keys)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(map(torch.equal, cpu.draw(scores, keys), together))
    finally:
        torch.set_num_threads(threads)
    for row in (0, 7, 49):
        alone = cpu.draw(scores[row], keys[row])
        assert all(torch.equal(one, many[row]) for one, many in zip(alone, together, strict=True))


def test_draws_do_not_depend_on_the_callers_defaults() -> None:
    """An output without memory, or of doubles, would be written past its end."""
    scores, keys = random_scores(3, 1000, masked=False), keys_of(3)
    expected = cpu.draw(scores, keys)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert all(map(torch.equal, cpu.draw(scores, keys), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def p_value(scores: Tensor, module: ModuleType = cpu) -> float:
    """Of 2^16 draws at as many positions."""
    count = 2**16
    keys = random_key(SEED, torch.tensor(3), torch.arange(count), Purpose.TOKEN)
    tokens, _ = module.draw(scores.expand(count, -1).contiguous(), keys)
    return chi_square(np.bincount(tokens.numpy(), minlength=scores.shape[-1]), scores.double().softmax(-1).numpy())


def test_draws_follow_the_softmax_of_the_scores() -> None:
    """False alarm: 1 in 10^4. Negative control: the same draws against slightly other scores."""
    scores = random_scores(1, 37, masked=True, scale=1.5)[0]
    assert p_value(scores) > FALSE_ALARM

    class Warmer:
        @staticmethod
        def draw(scores: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
            return cpu.draw(scores / 1.1, keys)

    assert p_value(scores, Warmer) < FALSE_ALARM  # type: ignore[arg-type]


def test_draws_by_the_kernel_are_those_of_the_eager_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of plain rounds and of verification, strides included; proves that the kernel ran."""
    scores = random_scores(6, 3 * 2000, masked=False).view(6, 3, 2000)
    draft_probs = (scores + 0.5 * torch.randn(scores.shape)).softmax(-1)[:, :2]
    rows, positions = torch.arange(6), torch.arange(6)[:, None] + torch.arange(3)
    drafts = draft_probs.argmax(-1)

    def results() -> list[Tensor]:
        return [
            *samplers.sample(scores[:, 0], SEED, rows, positions[:, 0], Purpose.TOKEN),
            *samplers.verify_by_coupling(scores, drafts, SEED, rows, positions),
            *samplers.verify_by_rejection(scores, drafts, draft_probs, SEED, rows, positions),
            samplers.token_logprobs(scores, scores.argmax(-1), 0.7),
        ]

    calls = []
    monkeypatch.setattr(cpu, "_sample", lambda *args, own=cpu._sample: calls.append(args) or own(*args))
    by_kernel = results()
    assert len(calls) == 5, "verify_by_rejection draws and normalises"
    monkeypatch.setattr(build, "_library", lambda: None)
    eager = results()
    assert len(calls) == 5
    for ours, theirs in zip(by_kernel, eager, strict=True):
        if ours.dtype == torch.int64:
            assert ours.equal(theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=LOG_TOLERANCE, atol=LOG_TOLERANCE)


def test_the_kernel_refuses_to_lose_a_gradient() -> None:
    with pytest.raises(AssertionError, match="no backward"):
        cpu.logsumexp(torch.randn(2, 8, requires_grad=True))
