"""Triton's draws against their eager twins."""

from pathlib import Path
from typing import Any

import pytest
import torch
from chosen_numbers import (
    DEVICE,
    GAMMA,
    INF,
    INTERPRETER_WARNINGS,
    LARGEST_U,
    MASK,
    NAN,
    NEAR_TIE,
    SEED,
    addresses,
    assert_logprobs,
    broken,
    log_law,
    one_hot,
    random,
    row_with,
    rows_with,
    unmixed,
)  # fmt: skip

from trl_selfspec.kernels.triton import sampling as triton_sampling
from trl_selfspec.kernels.triton.launch import launch
from trl_selfspec.sampling import rng as numbers
from trl_selfspec.sampling.rejection import verify_coupled
from trl_selfspec.sampling.rng import Purpose, gumbel, sample_inverse_cdf, uniform


pytestmark = INTERPRETER_WARNINGS
BORDER = 1e-5  # of slices of the cumulative mass: fp32 exponentials of scores within 20 of the maximum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "chunk", "masked"), [(7, 8, 0.3), (33, 4, 0.5), (33, 16, 0.0), (1000, 128, 0.9)])
def test_a_draw_is_the_twins(vocab: int, chunk: int, masked: float, dtype: torch.dtype) -> None:
    """Chunks that the vocabulary does not fill, chunks without mass, and every dtype."""
    scores = random(12, vocab, masked=masked).to(dtype)
    rows, positions = addresses(12)
    tokens, logprobs = triton_sampling.sample(scores, SEED, rows, positions[:, 0], chunk=chunk)
    u = uniform(SEED, rows, positions[:, 0], Purpose.TOKEN)
    assert torch.equal(tokens, sample_inverse_cdf(scores.float().softmax(-1), u))
    assert_logprobs(logprobs, scores, tokens)


GRID = 105  # numbers, evenly spaced
LAW = torch.tensor([0.02, 0.0, 0.35, 0.03, 0.0, 0.4, 0.2])


def misses_on_a_grid(sample: Any) -> float:
    """By how many draws, at most, the counts of a word differ from its share of evenly spaced numbers."""
    u = [int((i + 0.5) / GRID * 2**53) * 2.0**-53 for i in range(GRID)]
    scores = (LAW.log() + 50).expand(GRID, -1).to(DEVICE)
    positions = torch.full((GRID,), 9, device=DEVICE)
    tokens, _ = sample(scores, SEED, rows_with(u, 9, Purpose.TOKEN), positions, chunk=4)
    return float((tokens.bincount(minlength=7).cpu() - GRID * LAW).abs().max())


def test_evenly_spaced_numbers_draw_each_word_in_proportion() -> None:
    """The law itself, without chance: a count is off by less than one at each end of a word's slice."""
    assert misses_on_a_grid(triton_sampling.sample) <= 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("(totals * weight(maxima, maximum)).to", "totals.to", id="chunks not rescaled"),
        pytest.param("fraction * tl.sum(masses, 0)", "u * tl.sum(masses, 0)", id="the row's number within a chunk"),
        pytest.param("pick(masses, u * total)", "pick(masses, u)", id="law not normalised"),
        pytest.param("cumulative > height), index, last", "cumulative > height), index + 1, last", id="next word"),
        pytest.param("0x94D049BB133111EB", "0x94D049BB133111EC", id="other numbers"),
    ],
)
def test_control_broken_draws_are_noticed(old: str, new: str, tmp_path: Path) -> None:
    assert misses_on_a_grid(broken(triton_sampling, tmp_path, (old, new)).sample) > 3


@pytest.mark.parametrize(
    ("scores", "lowest", "highest"),
    [
        ([-INF, -INF, -INF, -INF, -INF, 1.0, 2.0, -INF, -INF], 5, 6),
        ([-INF, 0.0, -200.0, -INF, -300.0], 1, 1),  # words whose mass is below what fp32 holds
        (one_hot(9, 0), 0, 0),
        (one_hot(9, 8), 8, 8),
        ([3e38, -3e38, 3e38], 0, 2),
        ([-3.4028234663852886e38] * 5, 0, 4),  # what some processors write instead of -inf
    ],
)
def test_the_ends_of_the_unit_interval_draw_words_with_mass(scores: list[float], lowest: int, highest: int) -> None:
    """Prevents a masked word at u = 0, and a search that runs past the last word at the largest u."""
    law = torch.tensor([scores, scores], device=DEVICE)
    rows, positions = rows_with([0.0, LARGEST_U], 3, Purpose.TOKEN), torch.full((2,), 3, device=DEVICE)
    tokens, logprobs = triton_sampling.sample(law, SEED, rows, positions, chunk=2)
    assert tokens.tolist() == [lowest, highest]
    assert_logprobs(logprobs, law, tokens)


def test_rare_words_are_drawn_as_often_as_they_should() -> None:
    """A word of probability 1e-12 next to a sure one: fp32 cumulative sums would give it to a neighbour."""
    scores = torch.tensor([[0.0, -27.631, 0.0, -27.631, -27.631]], device=DEVICE)
    mass = scores[0].double().exp().tolist()
    total = sum(mass)
    for word in (1, 3, 4):
        inside = [(sum(mass[:word]) + part * mass[word]) / total for part in (0.1, 0.9)]
        u = [int(x * 2**53) * 2.0**-53 for x in inside]
        rows, positions = rows_with(u, 3, Purpose.TOKEN), torch.full((2,), 3, device=DEVICE)
        for chunk in (2, 8):
            tokens, _ = triton_sampling.sample(scores.expand(2, -1), SEED, rows, positions, chunk=chunk)
            assert tokens.tolist() == [word, word]


def test_a_row_does_not_see_its_neighbours() -> None:
    """Bitwise: chunks lie at the same words in every batch."""
    scores, (rows, positions) = random(5, 3, 33), addresses(5, 3)
    drafts = torch.full((5, 2), 3, device=DEVICE)
    together = triton_sampling.best(scores, SEED, rows, positions, drafts, chunk=8)
    for row in range(5):
        one = slice(row, row + 1)
        alone = triton_sampling.best(scores[one], SEED, rows[one], positions[one], drafts[one], chunk=8)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))
        single = triton_sampling.best(scores[one, 1:2], SEED, rows[one], positions[one, 1:2], chunk=8)
        assert torch.equal(single[1], together[1][one, 1:2]) and torch.equal(single[2], together[2][one, 1:2])


def test_the_noise_has_the_bits_of_the_twins() -> None:
    """Plain sampling and drafts share it. With chunks of one word, a chunk's best is its noise."""
    bits = [0, 1, 2**63 - 1, 2**62, 2**40, 2**63 - 2**38, 2**63 - 2**39]
    chosen = [row_with(unmixed(b) - (word + 1) * GAMMA & MASK, 4, Purpose.GUMBEL) for word, b in enumerate(bits)]
    rows, vocab = torch.tensor([*chosen, 0, 1, 2], device=DEVICE), len(bits)
    positions = torch.full_like(rows, 4)
    keys = torch.empty(len(rows), vocab, device=DEVICE)
    words, zeros = torch.empty_like(keys, dtype=torch.int32), torch.zeros_like(keys)
    statistics = torch.empty(len(rows), 2, vocab, device=DEVICE)
    launch(
        triton_sampling._measure, (vocab, len(rows)),
        zeros, statistics, keys, words, zeros, SEED, SEED, rows, positions, vocab, vocab, 1, 1, 1.0,
        triton_sampling.BEST_WITH_NOISE.value, False, 1,
    )  # fmt: skip
    noise = gumbel(SEED, rows, positions, vocab)
    assert float(noise.max()) > 44 and float(noise.min()) < -2.8, "the ends of the noise must be among the words"
    torch.testing.assert_close(keys, noise, rtol=4e-7, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("vocab", "chunk", "masked"), [(7, 8, 0.3), (33, 4, 0.5), (1000, 256, 0.9)])
@pytest.mark.parametrize("noisy", [True, False])
def test_the_best_words_are_the_twins(noisy: bool, vocab: int, chunk: int, masked: float, steps: int) -> None:
    scores, (rows, positions) = random(4, steps, vocab, masked=masked), addresses(4, steps)
    seed = SEED if noisy else None
    keys = scores + gumbel(SEED, rows[:, None], positions, vocab) if noisy else scores
    top = keys.topk(2).values
    assert ((top[..., 0] - top[..., 1]) > NEAR_TIE).all()
    drafts = keys.argmax(-1)[:, :-1]
    for wrong in range(min(steps - 1, 3)):
        drafts[wrong, wrong] += 1
    accepted, tokens, logprobs = triton_sampling.best(scores, seed, rows, positions, drafts, chunk=chunk)
    expected = verify_coupled(drafts, keys.argmax(-1))
    assert torch.equal(tokens, expected.tokens) and torch.equal(accepted, expected.num_accepted)
    assert_logprobs(logprobs, scores, tokens)


@pytest.mark.parametrize("chunk", [2, 8])
def test_ties_go_to_the_lowest_word(chunk: int) -> None:
    """As `argmax` does: otherwise greedy decoding would leave transformers' path at every tie of bf16 logits."""
    scores = torch.tensor([[1, 5, 2, 5, 5], [0, 0, 0, 0, 0], [-INF, -INF, 3, 3, -INF], [1, 2, 3, 4, 4]], device=DEVICE)
    rows, positions = addresses(4)
    tokens = triton_sampling.best(scores[:, None].float(), None, rows, positions, chunk=chunk)[1]
    assert tokens[:, 0].tolist() == [1, 0, 2, 3]


def test_log_probabilities_of_given_tokens() -> None:
    scores, tokens = random(3, 2, 33, masked=0.3).half(), torch.tensor([[2, 0], [32, 8], [7, 2]], device=DEVICE)
    for temperature in (1.0, 0.7):
        actual = triton_sampling.token_logprobs(scores, tokens, temperature, chunk=8)
        assert_logprobs(actual, scores.float() / temperature, tokens)
        assert not torch.allclose(actual, log_law(scores.float() / 0.9, tokens), atol=1e-3)  # negative control


BAD_ROWS = {
    "NaN": [0.0, NAN, 1.0, 2.0, 3.0],
    "only NaN": [NAN] * 5,
    "infinity": [0.0, 1.0, 2.0, INF, 3.0],
    "nothing allowed": [-INF] * 5,
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_law_that_is_not_finite_is_noticed(name: str) -> None:
    """Tokens stay in range, since they are embedded before the host is told; the sound row is not disturbed."""
    scores = torch.tensor([BAD_ROWS[name], one_hot(5, 4)], device=DEVICE)
    rows, positions = addresses(2)
    results = [triton_sampling.sample(scores, SEED, rows, positions[:, 0], chunk=2)]
    for seed in (None, SEED):
        _, tokens, logprobs = triton_sampling.best(scores[:, None], seed, rows, positions, chunk=2)
        results.append((tokens[:, 0], logprobs[:, 0]))
    for tokens, logprobs in results:
        assert logprobs.isnan().tolist() == [True, False]
        assert 0 <= int(tokens[0]) < 5 and int(tokens[1]) == 4
        assert triton_sampling.token_logprobs(scores, tokens, chunk=2).isnan().tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 64])
def test_draws_from_a_large_vocabulary(dtype: torch.dtype, num_rows: int) -> None:
    """151,936 words: the real chunks. Tokens may differ from the twin's next to a slice's border, or at near-ties."""
    vocab, steps = 151_936, 4
    scores = random(num_rows, steps, vocab, scale=2.0, masked=0.2).to(dtype)
    rows, positions = addresses(num_rows, steps)
    tokens, logprobs = triton_sampling.sample(scores[:, 0], SEED, rows, positions[:, 0])
    u = uniform(SEED, rows, positions[:, 0], Purpose.TOKEN)
    law = scores[:, 0].double().softmax(-1)
    mass, upper = (x.gather(-1, tokens[:, None])[:, 0] for x in (law, law.cumsum(-1)))
    assert ((mass > 0) & (u < upper + BORDER) & (u > upper - mass - BORDER)).all()
    assert_logprobs(logprobs, scores[:, 0], tokens, 1e-5)

    keys = scores.float() + gumbel(SEED, rows[:, None], positions, vocab)
    results = triton_sampling.best(scores, SEED, rows, positions)
    _, tokens, logprobs = results
    assert (keys.amax(-1) - keys.gather(-1, tokens[..., None])[..., 0] < NEAR_TIE).all()
    assert_logprobs(logprobs, scores, tokens, 1e-5)
    assert_logprobs(triton_sampling.token_logprobs(scores, tokens), scores, tokens, 1e-5)
    again = triton_sampling.best(scores, SEED, rows, positions)
    assert all(torch.equal(a, b) for a, b in zip(results[1:], again[1:], strict=True)), "depends on the schedule"
    assert torch.equal(triton_sampling.best(scores, None, rows, positions)[1], scores.argmax(-1))


def test_the_address_of_a_number_can_be_chosen() -> None:
    """The tests above stand on it."""
    for key in (0, 1, 2**64 - 1, 12345 << 40):
        row = torch.tensor(row_with(key, 6, Purpose.RECOVER))
        assert int(numbers._key(SEED.cpu(), row, torch.tensor(6), Purpose.RECOVER)) & MASK == key


def test_a_control_needs_the_text_it_replaces(tmp_path: Path) -> None:
    """One that failed for want of it would prove nothing."""
    with pytest.raises(AssertionError, match="occurs 0 times"):
        broken(triton_sampling, tmp_path, ("no such text", ""))
