"""Draws by the CPU kernel against the eager ones."""

import pytest
import torch
from torch import Tensor

from trl_selfspec import kernels
from trl_selfspec.kernels.cpu import build
from trl_selfspec.kernels.cpu import sampling as cpu
from trl_selfspec.sampling import ops as draws


# Exponentials within 2 ulp; the sums are of doubles.
MASS_TOLERANCE, LOG_TOLERANCE = 1e-6, 1e-5
LARGEST_U = 1 - 2.0**-53

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C compiler or no AVX2")


def random_scores(num_rows: int, vocab_size: int, masked: bool, scale: float = 4.0) -> Tensor:
    scores = scale * torch.randn(num_rows, vocab_size)
    if masked:  # as top-k leaves them; at least one word stays
        scores[:, 1:] = scores[:, 1:].where(torch.rand(num_rows, vocab_size - 1) < 0.3, -torch.inf)
        scores[:, -1:] = -torch.inf if vocab_size > 1 else scores[:, -1:]
    return scores


def contained(u: Tensor, tokens: Tensor, scores: Tensor) -> Tensor:
    """Whether the tokens' slices of the cumulative mass hold u."""
    probs = scores.double().softmax(-1)
    above = probs.cumsum(-1).gather(-1, tokens[..., None])[..., 0]
    below = above - probs.gather(-1, tokens[..., None])[..., 0]
    return (below - MASS_TOLERANCE <= u) & (u <= above + MASS_TOLERANCE)


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 8, 9, 96, 511, 512, 513, 1031, 49152])
@pytest.mark.parametrize("masked", [False, True])
def test_a_draw_is_the_token_whose_slice_contains_u(vocab_size: int, masked: bool) -> None:
    """Catches wrong blocks and tails. Negative control: the slices of scores in another order."""
    scores = random_scores(40, vocab_size, masked)
    u = torch.rand(40, dtype=torch.float64)
    u[:2] = torch.tensor([0.0, LARGEST_U])
    tokens, total = cpu.draw(scores, u)
    assert contained(u, tokens, scores).all()
    assert scores.gather(1, tokens[:, None]).isfinite().all()  # none without mass
    torch.testing.assert_close(total, scores.logsumexp(-1), rtol=LOG_TOLERANCE, atol=LOG_TOLERANCE)
    assert torch.equal(cpu.logsumexp(scores), total)
    if vocab_size > 100:
        assert not contained(u, tokens, scores.roll(vocab_size // 3, 1)).all()


def test_the_ends_of_the_mass_are_words_that_have_some() -> None:
    """At u = 0 and near 1 the search must not run into words without mass, in this block or another."""
    scores = torch.full((2, 3000), -torch.inf)
    scores[:, 700], scores[:, 1900] = 0.0, -80.0
    tokens, _ = cpu.draw(scores, torch.tensor([0.0, LARGEST_U], dtype=torch.float64))
    assert tokens.tolist() in ([700, 700], [700, 1900])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_are_told(bad: float) -> None:
    """Prevents an ordinary token from a broken law; the rows beside it are as they were."""
    scores = random_scores(3, 1000, masked=False)
    expected, _ = cpu.draw(scores, u := torch.full((3,), 0.5, dtype=torch.float64))
    scores[1, 800 if bad > 0 or bad != bad else slice(None)] = bad
    tokens, total = cpu.draw(scores, u)
    assert total.isfinite().tolist() == [True, False, True]
    assert tokens[[0, 2]].equal(expected[[0, 2]]) and 0 <= tokens[1] < 1000
    outcome = draws.sample(scores, torch.tensor(3), torch.arange(3), torch.arange(3))
    assert outcome.logprobs.isnan().tolist() == [False, True, False]


def test_rows_do_not_see_their_neighbours() -> None:
    scores, u = random_scores(50, 5000, masked=True), torch.rand(50, dtype=torch.float64)
    together = cpu.draw(scores, u)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(map(torch.equal, cpu.draw(scores, u), together))
    finally:
        torch.set_num_threads(threads)
    for row in (0, 7, 49):
        alone = cpu.draw(scores[row], u[row])
        assert all(torch.equal(one, many[row]) for one, many in zip(alone, together, strict=True))


def test_draws_do_not_depend_on_the_callers_defaults() -> None:
    """An output without memory, or of doubles, would be written past its end."""
    scores, u = random_scores(3, 1000, masked=False), torch.rand(3, dtype=torch.float64)
    expected = cpu.draw(scores, u)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert all(map(torch.equal, cpu.draw(scores, u), expected))
    finally:
        torch.set_default_dtype(torch.float32)


def test_draws_by_the_kernel_are_those_of_the_eager_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of plain rounds and of verification, strides included; proves that the kernel ran."""
    scores = random_scores(6, 3 * 2000, masked=False).view(6, 3, 2000)
    arguments = torch.tensor(5), torch.arange(6), torch.arange(6) + 9

    def outcomes() -> list[Tensor]:
        drawn = draws.sample(scores[:, 0], *arguments)
        return [*drawn, draws.token_logprobs(scores, scores.argmax(-1), 0.7)]

    calls = []
    monkeypatch.setattr(cpu, "_sample", lambda *args, own=cpu._sample: calls.append(args) or own(*args))
    by_kernel = outcomes()
    assert len(calls) == 2
    monkeypatch.setattr(build, "_library", lambda: None)
    eager = outcomes()
    assert len(calls) == 2 and by_kernel[0].equal(eager[0])
    for ours, theirs in zip(by_kernel[1:], eager[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=LOG_TOLERANCE, atol=LOG_TOLERANCE)


def test_the_kernel_refuses_to_lose_a_gradient() -> None:
    with pytest.raises(AssertionError, match="no backward"):
        cpu.logsumexp(torch.randn(2, 8, requires_grad=True))
