"""The samplers' functions as torch.compile runs them on GPUs: here by Inductor on the CPU, with equal tokens."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trl_selfspec.kernels.cpu import build
from trl_selfspec.sampling import samplers
from trl_selfspec.sampling.rng import Purpose, gumbel, random_key
from trl_selfspec.sampling.samplers import CoupledSampler, GreedySampler, RejectionSampler, Sampler


SEED = torch.tensor(11)
LOGPROB = 1e-5  # fp32 sums in another order
inductor = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "rejection": lambda: RejectionSampler(SEED, longest_draft=5),
    "coupled": lambda: CoupledSampler(SEED),
    "greedy": GreedySampler,
}


@pytest.fixture(params=["traced", pytest.param("inductor", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """Lets `compiled_on_gpu` compile on the CPU; holds what was compiled. Traced: all but Inductor's seconds.

    The hash multiplies int64 and wraps, as torch does and GPUs do. In Inductor's C++ that is undefined, and gcc takes
    it to end the loop over the vocabulary, unless it is told to wrap.
    """
    graphs: list[Any] = []
    compile_ = torch.compile

    def counting(function: Callable, **options: Any) -> Callable:
        def backend(graph: Any, inputs: Any) -> Any:
            from torch._inductor.compile_fx import compile_fx

            graphs.append(graph)
            return compile_fx(graph, inputs) if request.param == "inductor" else graph

        return compile_(function, backend=backend, fullgraph=True, **options)

    from torch._inductor import config

    wrapping = tmp_path / "g++"
    wrapping.write_text('#!/bin/sh\nexec g++ "$@" -fwrapv\n')
    wrapping.chmod(0o755)
    monkeypatch.setattr(build, "_library", lambda: None)
    monkeypatch.setattr(samplers, "runs_triton", lambda device: True)
    monkeypatch.setattr(torch, "compile", counting)
    torch.compiler.reset()
    with config.patch({"cpp.cxx": (str(wrapping),), "cpp.simdlen": 1}):  # no vectors, as a GPU's threads compute
        yield graphs
    torch.compiler.reset()


def fresh(name: str) -> Callable:
    """A function of the module that has not been compiled yet."""
    return samplers.compiled_on_gpu(getattr(samplers, name).__wrapped__)


def a_round(sampler: Sampler, num_rows: int, gamma: int, vocab_size: int) -> list[Tensor]:
    """A plain draw, γ drafts and their verification: rows, positions and scores as the engine hands them over."""
    generator = torch.Generator().manual_seed(num_rows * 10 + gamma)
    scores = 3 * torch.randn(num_rows, gamma + 1, vocab_size, generator=generator)
    masked = torch.rand(scores.shape, generator=generator) < 0.3
    scores = scores.masked_fill(masked & (scores < scores.amax(-1, keepdim=True)), -torch.inf)
    draft_scores = scores + 0.7 * torch.randn(scores.shape, generator=generator)
    rows, positions = 3 * torch.arange(num_rows), 5 + torch.arange(num_rows)[:, None] + torch.arange(gamma + 1)
    results = [*sampler.draw(scores[:, 0].contiguous(), rows, positions[:, 0].contiguous())]
    drafts = []
    for k in range(gamma):
        draft = sampler.propose(draft_scores[:, k].contiguous(), rows, positions[:, k].contiguous(), torch.tensor(k))
        drafts.append(draft.tokens)
        results += draft
    result = sampler.verify(torch.stack(drafts, 1), scores, rows, positions)
    kept = torch.arange(gamma + 1) <= result.num_accepted[:, None]
    return [*results, result.num_accepted, result.tokens[kept], result.logprobs[kept]]


@pytest.mark.slow
@inductor
@torch.no_grad()
def test_compiled_functions_draw_the_eager_tokens(monkeypatch: pytest.MonkeyPatch, compiled: list[Any]) -> None:
    """Prevents a compiler that wraps, shifts or rounds the hash otherwise, and one variant per batch size."""
    sizes = [(4, 2), (7, 3), (16, 4), (5, 2), (9, 3)]
    names = ["rejection", "coupled"]
    monkeypatch.setattr(samplers, "runs_triton", lambda device: False)
    expected = [t for name in names for size in sizes for t in a_round(SAMPLERS[name](), *size, vocab_size=301)]
    monkeypatch.setattr(samplers, "runs_triton", lambda device: True)
    for function in ("sample", "verify_by_rejection"):
        monkeypatch.setattr(samplers, function, fresh(function))
    actual = [t for name in names for size in sizes for t in a_round(SAMPLERS[name](), *size, vocab_size=301)]
    for ours, eager in zip(actual, expected, strict=True):
        if ours.dtype == torch.int64:
            assert ours.equal(eager)
        else:
            torch.testing.assert_close(ours, eager, rtol=LOGPROB, atol=LOGPROB)
    assert len(compiled) <= 4, "drawing, drafting and verifying, not once for each size"


@inductor
@torch.no_grad()
def test_compiled_log_probabilities_are_the_eager_ones(compiled: list[Any]) -> None:
    function = fresh("token_logprobs")
    for rows, temperature in ((3, 1.0), (5, 0.7), (6, 1.3)):
        scores = 3 * torch.randn(rows, 2, 301)
        tokens = scores.argmax(-1)
        expected = (scores / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        torch.testing.assert_close(function(scores, tokens, temperature), expected, rtol=LOGPROB, atol=LOGPROB)
    assert 0 < len(compiled) <= 2


def test_cpus_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents minutes of C++ compilation where eager functions and the C kernel do."""
    monkeypatch.setattr(torch, "compile", None)
    a_round(RejectionSampler(SEED, 2), 3, 2, vocab_size=9)


def test_the_three_samplers_share_the_noise_that_they_should() -> None:
    """Plain draws and drafts of coupled mode use one noise, rejection's drafts another: its proof demands that."""
    rows, positions, step = torch.arange(50), torch.arange(50), torch.tensor(0)
    scores = torch.zeros(50, 64)
    rejection, coupled, greedy = (make() for make in SAMPLERS.values())
    noise = gumbel(random_key(SEED, rows, positions, Purpose.TOKEN), 64)
    assert rejection.draw(scores, rows, positions).tokens.equal(noise.argmax(-1))
    assert coupled.draw(scores, rows, positions).tokens.equal(noise.argmax(-1))
    assert coupled.propose(scores, rows, positions, step).tokens.equal(noise.argmax(-1))
    assert not rejection.propose(scores, rows, positions, step).tokens.equal(noise.argmax(-1))
    assert greedy.draw(noise, rows, positions).tokens.equal(noise.argmax(-1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SAMPLERS)
@torch.no_grad()
def test_a_gpu_draws_the_cpus_tokens_in_a_captured_graph(name: str) -> None:
    """Prevents seeds that mean one thing on a CPU and another on a GPU, and compiling within a capture."""
    seed = SEED.cuda()
    on_gpu = {"rejection": lambda: RejectionSampler(seed, 3), "coupled": lambda: CoupledSampler(seed)}
    sampler, reference = on_gpu.get(name, GreedySampler)(), SAMPLERS[name]()
    scores, rows, positions = 3 * torch.randn(8, 4, 1003), torch.arange(8), torch.arange(8)[:, None] + torch.arange(4)
    on_device = scores.cuda(), rows.cuda(), positions.cuda()
    step = torch.zeros((), dtype=torch.int64, device="cuda")

    def rounds(sampler: Sampler, scores: Tensor, rows: Tensor, positions: Tensor, step: Tensor) -> list[Tensor]:
        step.zero_()
        drafts = []
        for k in range(3):
            drafts.append(sampler.propose(scores[:, k] * 0.8, rows, positions[:, k], step).tokens)
            step += 1
        result = sampler.verify(torch.stack(drafts, 1), scores, rows, positions)
        kept = torch.arange(4, device=rows.device) <= result.num_accepted[:, None]
        return [*drafts, result.num_accepted, result.tokens.masked_fill(~kept, 0)]

    rounds(sampler, *on_device, step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rounds(sampler, *on_device, step)
    graph.replay()
    expected = rounds(reference, scores, rows, positions, torch.zeros((), dtype=torch.int64))
    assert all(actual.cpu().equal(eager) for actual, eager in zip(captured, expected, strict=True))
