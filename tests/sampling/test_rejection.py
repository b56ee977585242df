"""Rejection keeps the target's law; coupling keeps its samples. Unit level: tables of laws, no model."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import FALSE_ALARM, chi_square, joint_counts, joint_law, mutant, rejected
from torch import Tensor

from trl_selfspec.sampling import rejection
from trl_selfspec.sampling.rejection import residual, verify_coupled, verify_rejection
from trl_selfspec.sampling.rng import Purpose, gumbel, random_key, uniform


VOCAB = 8
ROWS = 250_000
CONTROL_ROWS = 60_000  # what is broken shows in fewer
SEED = torch.tensor(20240817)
Draw = Callable[[Tensor, Tensor], Tensor]
exactly = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def laws(draw: st.DrawFn, size: int) -> Tensor:
    """Laws in float64 with zeros, one-hot and nearly one-hot ones among them."""
    weight = st.sampled_from([0.0, 0.0, 1.0, 1e-9]) | st.floats(1e-6, 1.0)
    weights = draw(st.lists(weight, min_size=size, max_size=size).filter(any))
    law = torch.tensor(weights, dtype=torch.float64)
    return law / law.sum()


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Target and draft: unrelated, equal, equal up to rounding, or disjoint."""
    size = draw(st.integers(2, 8))
    target, draft = draw(laws(size)), draw(laws(size))
    kind = draw(st.sampled_from(["unrelated", "equal", "rounded", "disjoint"]))
    if kind == "equal":
        draft = target.clone()
    elif kind == "rounded":
        draft = target.float().double()
        draft = draft / draft.sum()
    elif kind == "disjoint":
        target, draft = torch.cat([target, target * 0]), torch.cat([draft * 0, draft])
    return target, draft


def output_law(target: Tensor, draft: Tensor, rest: Tensor) -> Tensor:
    accepted = torch.minimum(target, draft)
    return accepted + (1 - accepted.sum()) * rest


@exactly
@given(pairs())
def test_accepted_and_recovered_mass_add_up_to_the_target(pair: tuple[Tensor, Tensor]) -> None:
    """The identity that makes rejection lossless, to rounding: a wrong residual shows on the first pair."""
    rest = residual(*pair)
    torch.testing.assert_close(output_law(*pair, rest), pair[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(rest.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12)
    assert (rest >= 0).all()
    assert not rest[pair[0] == 0].any()


def test_control_the_identity_fails_with_the_target_as_residual() -> None:
    target, draft = torch.tensor([0.7, 0.3]).double(), torch.tensor([0.4, 0.6]).double()
    assert (output_law(target, draft, target) - target).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_residual_of_laws_equal_up_to_rounding_is_a_law(dtype: torch.dtype) -> None:
    """Prevents 0/0 where drafter and target agree: a NaN law would stop the rollout."""
    target = torch.softmax(torch.linspace(-40, 4, 50_000, dtype=dtype).view(50, 1000), -1)
    rounded = target * (1 + torch.finfo(dtype).eps * torch.tensor([-1, 0, 1, 0, 0], dtype=dtype).repeat(200))
    for draft in (target, rounded):
        rest = residual(target, draft)
        assert rest.isfinite().all()
        torch.testing.assert_close(rest.sum(-1), torch.ones(50, dtype=dtype))
    assert torch.equal(residual(target, target), target)


def test_residual_leaves_its_arguments_alone() -> None:
    """The engine reads target_probs again for log-probabilities; in-place arithmetic must not reach them."""
    target, draft = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    residual(target, draft)
    assert target.tolist() == [[0.75, 0.25]]
    assert draft.tolist() == [[0.5, 0.5]]


def scalar_rule(
    drafts: list[int], q: list[list[float]], p: list[list[float]], accept: list[float], noise: list[list[float]]
) -> list[int]:
    """Leviathan et al.'s algorithm 1 for one row, with lists and loops."""
    for k, x in enumerate(drafts):
        if accept[k] * q[k][x] >= p[k][x]:
            weights = [max(a - b, 0.0) for a, b in zip(p[k], q[k], strict=True)]
            weights = weights if sum(weights) > 0 else p[k]
            return [*drafts[:k], best(weights, noise[k])]
    return [*drafts, best(p[-1], noise[-1])]


def best(weights: list[float], noise: list[float]) -> int:
    """Gumbel-max, as an exponential race: the largest weight per waiting time."""
    return max(range(len(weights)), key=lambda token: weights[token] * math.exp(noise[token]))


def drawing_with(noise: Tensor) -> Draw:
    """Draws with the noise (B, γ+1, V) of the place where a round's last token goes."""
    row = torch.arange(len(noise))
    return lambda probs, num_accepted: (probs.log() + noise[row, num_accepted]).argmax(-1)


@exactly
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**31))
def test_vectorised_rule_equals_the_scalar_one(batch: int, gamma: int, vocab: int, seed: int) -> None:
    """Prevents off-by-one gathers: residual, uniform and output slot must all be those of the first rejection."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def some_laws(length: int) -> Tensor:
        weights = draw(batch, length, vocab) ** 4 + 1e-3
        return weights / weights.sum(-1, keepdim=True)

    def some_noise(length: int) -> Tensor:
        return -(-draw(batch, length, vocab).log()).log()

    q, p, accept, noise = some_laws(gamma), some_laws(gamma + 1), draw(batch, gamma), some_noise(gamma + 1)
    drafts = (q.log() + some_noise(gamma)).argmax(-1)
    num_accepted, tokens = verify_rejection(drafts, q, p, accept, drawing_with(noise))
    for b in range(batch):
        expected = scalar_rule(*(t[b].tolist() for t in (drafts, q, p, accept, noise)))
        assert tokens[b, : num_accepted[b] + 1].tolist() == expected
    assert tokens.shape == (batch, gamma + 1)
    assert tokens.dtype == torch.int64


def impossible_draft(module: ModuleType) -> int:
    """Token 0 is drafted, the target forbids it, and u is exactly 0."""
    q, p = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    draw = drawing_with(torch.zeros(1, 2, 2))
    return int(module.verify_rejection(torch.tensor([[0]]), q, p, torch.zeros(1, 1).double(), draw)[1][0, 0])


def test_forbidden_token_is_not_accepted_at_u_zero() -> None:
    """Prevents a token outside top-k or top-p, whose log-probability is -inf, once in 2^53 draws."""
    assert impossible_draft(rejection) == 1


def test_control_a_weak_inequality_accepts_the_forbidden_token() -> None:
    assert impossible_draft(mutant(rejection, ("uniforms * q < p", "uniforms * q <= p"))) == 0


def test_equal_laws_accept_everything() -> None:
    """A drafter equal to the policy loses nothing, at the largest uniform too."""
    law = torch.softmax(torch.randn(64, 3, VOCAB, generator=torch.Generator().manual_seed(0)), -1)
    drafts = drawn(law[:, :2], random_key(SEED, torch.arange(64)[:, None], torch.arange(2), Purpose.DRAFT))
    largest = torch.full((64, 2), 1 - 2.0**-53, dtype=torch.float64)
    num_accepted, tokens = verify_rejection(drafts, law[:, :2], law, largest, drawing_with(torch.zeros(64, 3, VOCAB)))
    assert (num_accepted == 2).all()
    assert torch.equal(tokens[:, :2], drafts)


def test_nan_draft_law_gives_the_target() -> None:
    """A broken drafter costs speed, never a wrong sample."""
    q, p = torch.full((1, 1, 3), torch.nan), torch.tensor([[[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]]])
    accept, draw = torch.zeros(1, 1, dtype=torch.float64), drawing_with(torch.zeros(1, 2, 3))
    num_accepted, tokens = verify_rejection(torch.tensor([[1]]), q, p, accept, draw)
    assert num_accepted.tolist() == [0]
    assert tokens[0, 0] == 2


def test_rows_do_not_see_their_neighbours() -> None:
    """Prevents indexing across rows."""
    generator = torch.Generator().manual_seed(1)
    q = torch.softmax(2 * torch.randn(32, 3, VOCAB, generator=generator), -1)
    p = torch.softmax(2 * torch.randn(32, 4, VOCAB, generator=generator), -1)
    row, position = torch.arange(32)[:, None], torch.arange(4)
    accept = uniform(random_key(SEED, row, position[:3], Purpose.ACCEPT))
    noise = gumbel(random_key(SEED, row, position, Purpose.RECOVER), VOCAB)
    drafts = drawn(q, random_key(SEED, row, position[:3], Purpose.DRAFT))
    together = verify_rejection(drafts, q, p, accept, drawing_with(noise))
    for b in range(32):
        one = slice(b, b + 1)
        alone = verify_rejection(drafts[one], q[one], p[one], accept[one], drawing_with(noise[one]))
        assert all(torch.equal(single, many[one]) for single, many in zip(alone, together, strict=True))


def test_coupled_accepts_while_equal() -> None:
    """An equal token after the first difference followed a false prefix and must not count."""
    drafts = torch.tensor([[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 9]])
    target = torch.tensor([[1, 2, 3, 4]]).expand(4, 4)
    num_accepted, tokens = verify_coupled(drafts, target)
    assert num_accepted.tolist() == [3, 1, 0, 2]
    assert torch.equal(tokens, target)


def test_no_host_sync() -> None:
    """On meta tensors any read of a value raises; on CUDA it would stall every round and break graph capture."""
    q, u = torch.empty(2, 3, VOCAB, device="meta"), torch.empty(2, 4, device="meta", dtype=torch.float64)
    p, tokens = torch.empty(2, 4, VOCAB, device="meta"), torch.empty(2, 4, device="meta", dtype=torch.int64)
    assert verify_rejection(tokens[:, :3], q, p, u[:, :3], lambda probs, at: probs.argmax(-1))[1].shape == (2, 4)
    assert verify_coupled(tokens[:, :3], tokens)[0].shape == (2,)
    with pytest.raises(RuntimeError):
        q.sum().item()


def softmax(*shape: int, seed: int, scale: float = 1.5) -> Tensor:
    return torch.softmax(scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), -1)


def keep(law: Tensor, *tokens: int) -> Tensor:
    masked = torch.zeros_like(law)
    masked[list(tokens)] = law[list(tokens)]
    return masked / masked.sum()


TARGET, DRAFT = softmax(VOCAB, seed=1), softmax(VOCAB, seed=2)
PAIRS = {
    "unrelated": (TARGET, DRAFT),
    "equal": (TARGET, TARGET),
    "close": (TARGET, 0.9 * TARGET + 0.1 * DRAFT),
    "nested": (keep(TARGET, 1, 2, 5), DRAFT),
    "target wider": (TARGET, keep(DRAFT, 0, 3)),
    "overlapping": (keep(TARGET, 0, 1, 2, 3), keep(DRAFT, 2, 3, 4, 5)),
    "disjoint": (keep(TARGET, 0, 1, 2), keep(DRAFT, 5, 6)),
    "one-hot target": (keep(TARGET, 4), DRAFT),
    "one-hot draft": (TARGET, keep(DRAFT, 4)),
    "rare token": (torch.tensor([1 - 7e-4, *[1e-4] * 7]), DRAFT),
}


def keys(positions: Tensor, purpose: Purpose, seed: int = 0) -> Tensor:
    return random_key(SEED + seed, torch.arange(ROWS)[:, None], positions, purpose)


def drawn(probs: Tensor, its_keys: Tensor) -> Tensor:
    return (probs.log() + gumbel(its_keys, VOCAB)).argmax(-1)


def test_every_token_of_a_round_has_the_target_law() -> None:
    """One draft: the token in its place, and the bonus token where it was accepted. False alarm: 1 in 10^4."""
    p_values = {}
    for index, (name, (target, draft)) in enumerate(PAIRS.items()):
        at = torch.arange(2)
        drafts = drawn(draft.expand(ROWS, 1, -1), keys(at[:1], Purpose.DRAFT, index))
        num_accepted, tokens = verify_rejection(
            drafts,
            draft.expand(ROWS, 1, -1),
            target.expand(ROWS, 2, -1),
            uniform(keys(at[:1], Purpose.ACCEPT, index)),
            drawing_with(gumbel(keys(at, Purpose.RECOVER, index), VOCAB)),
        )
        bonus = tokens[num_accepted == 1, 1:]
        p_values[name] = chi_square(joint_counts(tokens[:, :1].numpy(), VOCAB), target.numpy())
        if len(bonus):
            p_values[f"{name}, bonus"] = chi_square(joint_counts(bonus.numpy(), VOCAB), target.numpy())
        accepted, expected = int((num_accepted == 1).sum()), float(torch.minimum(target, draft).sum())
        rate = np.array([expected, max(1 - expected, 0)])
        p_values[f"{name}, acceptance"] = chi_square(np.array([accepted, ROWS - accepted]), rate / rate.sum())
    assert not rejected(p_values)


LENGTH, GAMMA = 3, 2
_masked = torch.rand(LENGTH + GAMMA, VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(5)) < 0.2
_masked[..., 0] = False
TARGETS = softmax(LENGTH + GAMMA, VOCAB, VOCAB, VOCAB, seed=3).masked_fill(_masked, 0)
TARGETS = TARGETS / TARGETS.sum(-1, keepdim=True)  # [position, token before last, last token]: law of the next
DRAFTS = 0.5 * TARGETS + 0.5 * softmax(LENGTH + GAMMA, VOCAB, VOCAB, VOCAB, seed=4)
JOINT = joint_law([t.double().numpy() for t in (TARGETS[0, 0, 0], TARGETS[1, 0], TARGETS[2])])
JOINT = JOINT / JOINT.sum()


class Randomness:
    """The numbers of a rollout; tests replace some of them."""

    def noise(self, positions: Tensor, purpose: Purpose) -> Tensor:
        return gumbel(self.keys(positions, purpose), VOCAB)

    def accept_uniforms(self, positions: Tensor, drafts: Tensor) -> Tensor:
        return uniform(self.keys(positions, Purpose.ACCEPT))

    @staticmethod
    def keys(positions: Tensor, purpose: Purpose) -> Tensor:
        return random_key(SEED, torch.arange(len(positions))[:, None], positions, purpose)


def simulate(
    verify: Callable = verify_rejection, random: Randomness | None = None, rows: int = ROWS
) -> np.ndarray:  # (rows, LENGTH)
    """Ragged rounds of GAMMA drafts, with numbers keyed by position as in rollouts.

    Two zeros precede each row's tokens, so that its first laws have a prefix to look up. Every round yields a token or
    more, so LENGTH rounds do.
    """
    random = random or Randomness()
    tokens = torch.zeros(rows, 2 + LENGTH * (GAMMA + 1), dtype=torch.int64)
    lengths = torch.zeros(rows, 1, dtype=torch.int64)

    def law(tables: Tensor, at: Tensor) -> Tensor:
        return tables[at.clamp(max=len(tables) - 1), tokens.gather(1, at), tokens.gather(1, at + 1)]

    for _ in range(LENGTH):
        at = lengths + torch.arange(GAMMA + 1)
        draft_probs = []
        for k in range(GAMMA):
            here = at[:, k : k + 1]
            draft_probs.append(law(DRAFTS, here))
            noisy = draft_probs[-1].log() + random.noise(here, Purpose.DRAFT)
            tokens.scatter_(1, here + 2, noisy.argmax(-1))
        drafts = tokens.gather(1, at[:, :GAMMA] + 2)

        def draw(probs: Tensor, num_accepted: Tensor, at: Tensor = at) -> Tensor:
            here = at.gather(1, num_accepted[:, None])
            return (probs.log() + random.noise(here, Purpose.RECOVER)[:, 0]).argmax(-1)

        u = random.accept_uniforms(at[:, :GAMMA], drafts)
        num_accepted, yielded = verify(drafts, torch.cat(draft_probs, 1), law(TARGETS, at), u, draw)
        tokens.scatter_(1, at + 2, yielded)
        lengths += num_accepted.unsqueeze(1) + 1
    return tokens[:, 2 : 2 + LENGTH].numpy()


def p_value(samples: np.ndarray) -> float:
    return chi_square(joint_counts(samples, VOCAB), JOINT)


def test_joint_law_of_three_tokens_is_the_targets() -> None:
    """Laws with holes that depend on the prefix, ragged rounds, reused positions. False alarm: 1 in 10^4."""
    assert p_value(simulate()) > FALSE_ALARM


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("uniforms * q < p", "uniforms * p < q", id="ratio inverted"),
        pytest.param("draw(residual(target_probs[row, num_accepted], rejected_probs),",
                     "draw(target_probs[row, num_accepted],", id="recovered from the target"),
        pytest.param("residual(target_probs[row, num_accepted],", "residual(target_probs[row, 0],",
                     id="residual of the first position"),
        pytest.param("num_accepted == gamma", "num_accepted > gamma", id="bonus from the residual"),
        pytest.param("cumprod(1)", "clone()", id="accepted after a rejection"),
    ],
)  # fmt: skip
def test_control_broken_rules_miss_the_law(old: str, new: str) -> None:
    assert p_value(simulate(mutant(rejection, (old, new)).verify_rejection, rows=CONTROL_ROWS)) < FALSE_ALARM


class RecoveringWithTheDraftsNoise(Randomness):
    def noise(self, positions: Tensor, purpose: Purpose) -> Tensor:
        return super().noise(positions, Purpose.DRAFT)


class AcceptingByTheDraftsNoise(Randomness):
    """Each drafted token's noise as a uniform number. That it was the winner's makes it a large one."""

    def accept_uniforms(self, positions: Tensor, drafts: Tensor) -> Tensor:
        noise = self.noise(positions, Purpose.DRAFT).gather(2, drafts.unsqueeze(-1)).squeeze(-1)
        return torch.exp(-torch.exp(-noise.double()))


class AcceptingByTheRecoveredTokensNoise(Randomness):
    """The noise of one token that may be recovered. A rejection makes it a large one."""

    def accept_uniforms(self, positions: Tensor, drafts: Tensor) -> Tensor:
        return torch.exp(-torch.exp(-self.noise(positions, Purpose.RECOVER)[..., 0].double()))


class NumbersWithoutPosition(Randomness):
    """Each token has nearly its law, the tokens are not independent."""

    def noise(self, positions: Tensor, purpose: Purpose) -> Tensor:
        return super().noise(positions * 0, purpose)

    def accept_uniforms(self, positions: Tensor, drafts: Tensor) -> Tensor:
        return super().accept_uniforms(positions * 0, drafts)


@pytest.mark.parametrize(
    "random",
    [
        RecoveringWithTheDraftsNoise,
        AcceptingByTheDraftsNoise,
        AcceptingByTheRecoveredTokensNoise,
        NumbersWithoutPosition,
    ],
)
def test_control_numbers_used_twice_miss_the_law(random: type[Randomness]) -> None:
    """Given a rejection, neither the draft's nor the accept test's number has its distribution any more."""
    assert p_value(simulate(random=random(), rows=CONTROL_ROWS)) < FALSE_ALARM
