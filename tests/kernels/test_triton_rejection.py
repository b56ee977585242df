"""Triton's verdicts on drafts against their eager twins, and verification on either."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chosen_numbers import (
    DEVICE,
    INF,
    INTERPRETER_WARNINGS,
    LARGEST_U,
    LOGPROB,
    NAN,
    SEED,
    addresses,
    assert_logprobs,
    broken,
    one_hot,
    random,
    rows_with,
)  # fmt: skip
from laws import FALSE_ALARM, chi_square, joint_counts
from tiny_models import Schedule, ragged_prompts, spoil, tiny_model
from torch import Tensor
from transformers import GenerationConfig
from triton_cases import ON_GPU

from trl_selfspec import SelfSpecEngine, SelfSpecOptions
from trl_selfspec.kernels.triton import rejection as triton_rejection
from trl_selfspec.kernels.triton import sampling as triton_sampling
from trl_selfspec.sampling import ops as draws
from trl_selfspec.sampling.ops import Memory, Outcome
from trl_selfspec.sampling.rng import Purpose
from trl_selfspec.sampling.samplers import CoupledSampler, GreedySampler, RejectionSampler


pytestmark = INTERPRETER_WARNINGS


class Round:
    """Drafts of a rejection round, drawn by the kernel, and what a verdict needs."""

    def __init__(self, draft: Tensor, target: Tensor, chunk: int, longest: int = 4, first_row: int = 0) -> None:
        self.draft, self.target, self.chunk = draft, target, chunk
        self.gamma = draft.shape[1]
        self.rows, self.positions = addresses(len(draft), self.gamma + 1)
        self.rows += first_row
        self.memory = Memory.like(draft[:, 0], longest)
        for tensor in self.memory[:2]:
            tensor.fill_(NAN)
        steps = torch.arange(self.gamma, device=DEVICE)
        proposals = [
            triton_sampling.propose(draft[:, i], SEED, self.rows, self.positions[:, i], steps[i], self.memory, chunk)
            for i in range(self.gamma)
        ]
        self.drafts = torch.stack([tokens for tokens, _ in proposals], 1)
        self.broken = torch.stack([flag for _, flag in proposals], 1)

    def kernel(self, module: Any = triton_rejection) -> Outcome:
        arguments = self.drafts, self.memory, self.target, SEED, self.rows, self.positions
        return Outcome(*module.verify(*arguments, chunk=self.chunk))

    def twin(self) -> Outcome:
        memory = self.memory._replace(laws=self.draft.softmax(-1))
        return draws.judge(self.drafts, memory, self.target, SEED, self.rows, self.positions)


def assert_same(actual: Outcome, expected: Outcome) -> None:
    assert torch.equal(actual.num_accepted, expected.num_accepted)
    kept = torch.arange(actual.tokens.shape[1], device=DEVICE) <= actual.num_accepted[:, None]
    assert torch.equal(actual.tokens[kept], expected.tokens[kept])
    torch.testing.assert_close(actual.logprobs[kept], expected.logprobs[kept], rtol=LOGPROB, atol=LOGPROB)


@pytest.fixture
def eager_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """`draws` computes its twins, on a GPU too."""
    monkeypatch.setattr(draws, "runs_triton", lambda device: False)


@pytest.mark.usefixtures("eager_twin")
@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize(("vocab", "chunk", "masked"), [(7, 8, 0.3), (33, 8, 0.5)])
def test_a_verdict_is_the_twins(gamma: int, vocab: int, chunk: int, masked: float) -> None:
    """Drafts that stand and fall at every place, bonus tokens, supports that differ."""
    target = random(14, gamma + 1, vocab, masked=masked)
    draft = (target[:, :gamma] + random(14, gamma, vocab, scale=0.8, seed=1)).clone()
    draft[:, :, 0] = 0.5  # what the target may forbid
    judged = Round(draft, target, chunk)
    actual = judged.kernel()
    assert_same(actual, judged.twin())
    assert set(actual.num_accepted.tolist()) >= {0, gamma}, "drafts must be accepted and rejected"
    assert not judged.broken.any()


@pytest.mark.usefixtures("eager_twin")
@pytest.mark.parametrize("distance", ["equal", "disjoint", "one-hot target", "one-hot draft"])
def test_extreme_pairs_of_laws(distance: str) -> None:
    """No mass is left where the laws are equal, all of it where they are disjoint."""
    target, draft = random(6, 3, 33), random(6, 2, 33, seed=1)
    if distance == "equal":
        draft = target[:, :2].clone()
    elif distance == "disjoint":
        target[..., 16:], draft[..., :16] = -INF, -INF
    elif distance == "one-hot target":
        target[..., 1:] = -INF
    else:
        draft[..., 1:] = -INF
    judged = Round(draft, target, chunk=8)
    actual = judged.kernel()
    assert_same(actual, judged.twin())
    if distance in ("equal", "disjoint"):
        assert actual.num_accepted.tolist() == [2 if distance == "equal" else 0] * 6
    largest = rows_with([LARGEST_U], 5, Purpose.ACCEPT)
    judged.rows, judged.drafts, judged.target = largest, judged.drafts[:1], judged.target[:1]
    judged.memory = judged.memory.of_first(1)
    if distance == "equal":
        judged.positions = torch.tensor([[5, 6, 7]], device=DEVICE)
        assert judged.kernel().num_accepted.tolist() == [2], "an equal law must not reject at the largest number"


def test_a_forbidden_draft_is_not_accepted_at_u_zero(tmp_path: Path) -> None:
    """The strict inequality, and a control with the weak one."""
    judged = Round(torch.tensor([[one_hot(5, 0)]], device=DEVICE), torch.zeros(1, 2, 5, device=DEVICE), chunk=4)
    judged.target[:, :, 0] = -INF
    judged.rows, judged.positions = rows_with([0.0], 8, Purpose.ACCEPT), torch.tensor([[8, 9]], device=DEVICE)
    outcome = judged.kernel()
    assert outcome.num_accepted.tolist() == [0] and int(outcome.tokens[0, 0]) > 0
    weak = broken(triton_rejection, tmp_path, ("q.to(tl.float64) < prob", "q.to(tl.float64) <= prob"))
    assert judged.kernel(weak).num_accepted.tolist() == [1]


P, Q = torch.tensor([0.45, 0.45, 0.0, 0.1]), torch.tensor([0.9, 0.05, 0.05, 0.0])
ROWS = 200_000 if ON_GPU else 250


@pytest.fixture(scope="module")
def drafted() -> Round:
    scores = P.log().expand(ROWS, 2, -1).to(DEVICE).contiguous()
    return Round(Q.log().expand(ROWS, 1, -1).to(DEVICE).contiguous(), scores, chunk=4, first_row=1000)


def p_value(outcome: Outcome) -> float:
    return chi_square(joint_counts(outcome.tokens[:, :1].cpu().numpy(), 4), P.numpy())


def test_tokens_of_rejection_rounds_have_the_targets_law(drafted: Round) -> None:
    """And as many drafts stand as the laws have in common. False alarm: 2 in 10^4."""
    outcome = drafted.kernel()
    assert p_value(outcome) > FALSE_ALARM
    counts = joint_counts(outcome.num_accepted[:, None].cpu().numpy(), 2)
    common = float(torch.minimum(P, Q).sum())
    assert chi_square(counts, np.array([1 - common, common])) > FALSE_ALARM


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("tl.maximum(p - q, 0.0)", "p", id="recovered from the target"),
        pytest.param("tl.where(count == gamma, TOKEN, RECOVER)", "ACCEPT", id="one number for both"),
    ],
)
def test_control_broken_verdicts_miss_the_law(drafted: Round, old: str, new: str, tmp_path: Path) -> None:
    assert p_value(drafted.kernel(broken(triton_rejection, tmp_path, (old, new)))) < FALSE_ALARM


@pytest.mark.parametrize("law", [[0.0, NAN, 1.0, 2.0, 3.0], [NAN] * 5, [0.0, 1.0, 2.0, INF, 3.0], [-INF] * 5], ids=str)
def test_a_law_that_is_not_finite_is_noticed(law: list[float]) -> None:
    """A drafter's costs speed, never a sample; the target's shows in every log-probability. Tokens stay in range."""
    scores = torch.tensor([law, one_hot(5, 4)], device=DEVICE)
    judged = Round(scores[:, None], random(2, 2, 5), chunk=2)
    assert judged.broken[:, 0].tolist() == [True, False]
    assert ((judged.drafts >= 0) & (judged.drafts < 5)).all()
    assert judged.kernel().logprobs.isfinite().all()

    outcome = Round(random(2, 1, 5), scores[:, None].expand(2, 2, 5).contiguous(), chunk=2).kernel()
    assert outcome.logprobs[0].isnan().all()
    kept = torch.arange(2, device=DEVICE) == outcome.num_accepted[1]
    assert outcome.logprobs[1][kept].isfinite().all()
    assert ((outcome.tokens >= 0) & (outcome.tokens < 5)).all()


@pytest.mark.usefixtures("eager_twin")
def test_a_broken_drafter_leaves_the_target() -> None:
    """As the twin does: its residual is the target's own law."""
    target = random(6, 2, 33)
    judged = Round(torch.full((6, 1, 33), NAN, device=DEVICE), target, chunk=8)
    assert_same(judged.kernel(), judged.twin())


@pytest.mark.parametrize("kind", ["rejection", "coupled", "greedy"])
def test_verification_runs_on_the_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain draws, drafts and verdicts of each mode give the same either way, logprobs and flags included."""
    gamma, vocab = 2, 33
    target = random(3, gamma + 1, vocab)
    draft = target[:, :gamma] + random(3, gamma, vocab, scale=0.5, seed=2)
    draft[1, 1, 3] = NAN
    rows, positions = addresses(3, gamma + 1)

    def run(on_kernels: bool) -> list[Tensor]:
        monkeypatch.setattr(draws, "runs_triton", lambda device: on_kernels)
        modes = {
            "rejection": lambda: RejectionSampler(SEED, 4),
            "coupled": lambda: CoupledSampler(SEED, 4),
            "greedy": GreedySampler,
        }
        tested = modes[kind]()
        proposals = [
            tested.propose(draft[:, i], rows, positions[:, i], torch.tensor(i, device=DEVICE)) for i in range(gamma)
        ]
        drafts = torch.stack([proposal.tokens for proposal in proposals], 1)
        flags = torch.stack([proposal.broken for proposal in proposals], 1)
        drafts[1, 1] = 0  # the token of a broken law is anything
        outcome = tested.verify(drafts, target, rows, positions)
        return [*tested.draw(target[:, 0], rows, positions[:, 0]), drafts, flags, *outcome]

    for actual, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(actual, expected, rtol=LOGPROB, atol=LOGPROB)


@pytest.mark.parametrize("do_sample", [True, False])
def test_coupled_rounds_on_the_kernels_give_plain_tokens(do_sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coupled drafts, the target's draws and plain rounds must all find the same word best."""
    monkeypatch.setattr(draws, "runs_triton", lambda device: True)
    model = tiny_model("qwen3").to(DEVICE)
    launched = []
    best = triton_sampling.best
    monkeypatch.setattr(triton_sampling, "best", lambda *args: launched.append(args) or best(*args))

    def generate(*draft_lengths: int) -> tuple[list[list[int]], list[float]]:
        engine = SelfSpecEngine(
            model, SelfSpecOptions(draft_qtype="qint8", verification="coupled"), controller=Schedule(*draft_lengths)
        )
        spoil(engine, noise=0.1)
        config = GenerationConfig(max_new_tokens=8, do_sample=do_sample, top_k=20, eos_token_id=20)
        output = engine.generate(ragged_prompts([2, 5, 3]), config, seed=4)
        assert not draft_lengths[0] or 0 < output.stats.num_accepted_tokens < output.stats.num_draft_tokens
        return output.completion_ids, [value for row in output.logprobs for value in row]

    (speculative, logprobs), (plain, expected) = generate(3, 0), generate(0)
    assert speculative == plain and launched
    assert logprobs == pytest.approx(expected, abs=1e-4)


class Launches:
    """In place of a kernel: notes what it is launched with."""

    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.seen.extend(arg for arg in args if isinstance(arg, Tensor))


@pytest.mark.parametrize("mistake", [False, True])
def test_the_gpus_path_neither_waits_nor_mixes_devices(mistake: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors, whose numbers can't be read; a seed that is read is the control."""
    seen: list[Tensor] = []
    kernels = {triton_sampling: ["_measure", "_sample", "_best", "_look_up"]}
    kernels[triton_rejection] = ["_judge", "_leftover", "_recover"]
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, Launches(seen))
    monkeypatch.setattr(draws, "runs_triton", lambda device: True)
    with torch.device("meta"):
        rows, positions = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64)
        scores, seed = torch.zeros(3, 3, 151936), torch.zeros((), dtype=torch.int64)
        modes = [RejectionSampler(seed, 4), CoupledSampler(seed, 4), GreedySampler()]
        for tested in modes:
            drafts = [tested.propose(scores[:, i], rows, positions[:, i], seed).tokens for i in range(2)]
            results = [*tested.verify(torch.stack(drafts, 1), scores, rows, positions)]
            results += tested.draw(scores[:, 0], rows, positions[:, 0])
            results.append(draws.token_logprobs(scores.bfloat16(), positions, 0.7))
            assert all(tensor.is_meta for tensor in results)
        assert len(seen) > 50 and all(tensor.is_meta for tensor in seen)
        if mistake:
            with pytest.raises(RuntimeError):
                modes[0].draw(scores[:, int(seed)], rows, positions[:, 0])


@pytest.mark.gpu
@pytest.mark.usefixtures("eager_twin")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 64])
def test_verdicts_over_a_large_vocabulary(dtype: torch.dtype, num_rows: int) -> None:
    """151,936 words: the real chunks. A verdict differs from the twin's where a number lies next to a border."""
    gamma, vocab = 3, 151_936
    target = random(num_rows, gamma + 1, vocab, scale=2.0, masked=0.2).to(dtype)
    draft = target[:, :gamma] + random(num_rows, gamma, vocab, scale=0.3, seed=1).to(dtype)
    judged = Round(draft, target, triton_sampling.CHUNK)
    assert torch.equal(judged.memory.laws[:, :gamma], draft)
    actual, again = judged.kernel(), judged.kernel()
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), "depends on the schedule"
    judged.draft, judged.target = draft.float(), target.float()
    assert (actual.num_accepted == judged.twin().num_accepted).double().mean() > 0.98
    assert_logprobs(actual.logprobs, target, actual.tokens, 1e-5)
    assert (target.float().gather(-1, actual.tokens[..., None])[..., 0] > -INF)[:, 0].all()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [RejectionSampler, CoupledSampler])
def test_a_cuda_graph_replays_a_round(kind: Any) -> None:
    """A host sync would fail the capture; a number baked in, the replay."""
    tested = kind(SEED.clone(), 4)
    target, (rows, positions) = random(4, 3, 2000), addresses(4, 3)
    step = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def run() -> tuple[Tensor, ...]:
        step.zero_()
        drafts = []
        for i in range(2):
            drafts.append(tested.propose(target[:, i] * 0.9, rows, positions[:, i], step).tokens)
            step.add_(1)
        return tuple(tested.verify(torch.stack(drafts, 1), target, rows, positions))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    tested.seed.fill_(99)
    positions += 17
    target.copy_(target.flip(0))
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, run(), strict=True))
