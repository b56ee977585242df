"""Whole rollouts on a GPU: captured rounds, our kernels, bf16. Elsewhere recordings and references hold these laws."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import Schedule, ragged_prompts, scale_weights, spoil, tiny_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec import SelfSpecEngine, SelfSpecOptions
from trl_selfspec.engine.cuda_graphs import CudaCapture
from trl_selfspec.engine.engine import RolloutOutput
from trl_selfspec.sampling import samplers


pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "head_dim": 64}
PROMPTS = ragged_prompts([5, 70, 33, 5, 130, 64, 1, 12], vocab_size=4096)
GREEDY, SAMPLING = {"do_sample": False}, {"do_sample": True, "temperature": 1.1}
NEAR_TIE = 2.0  # times the largest gap that plain decoding itself shows: rounding in bf16, of other shapes


def make_model(dtype: torch.dtype) -> PreTrainedModel:
    model = tiny_model("qwen2", std=0.05, max_position_embeddings=4096, **SHAPE)
    return model.to(DEVICE, dtype)


def make_engine(model: PreTrainedModel, schedule: tuple[int, ...] = (4,), **options: Any) -> SelfSpecEngine:
    engine = SelfSpecEngine(
        model, SelfSpecOptions(num_speculative_tokens=4, **options), controller=Schedule(*schedule)
    )
    return engine


def generate(engine: SelfSpecEngine, law: dict[str, Any], seed: int = 0, length: int = 96) -> RolloutOutput:
    config = GenerationConfig(max_new_tokens=length, pad_token_id=0, eos_token_id=[7, 8], **law)
    return engine.generate(PROMPTS, config, seed=seed)


@pytest.mark.parametrize("law", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_captured_rounds_equal_eager_ones(law: dict[str, Any], verification: str):
    """In fp32, over steps of the policy: a graph that reads something old or somebody else's would show here."""
    model = make_model(torch.float32)
    options = {"schedule": (4, 0, 2), "verification": verification, "draft_qtype": "qint8"}
    captured, eager = make_engine(model, **options), make_engine(model, cuda_graphs=False, **options)
    for step in range(3):
        for engine in (captured, eager):
            engine.refresh()
            spoil(engine, noise=0.3)
        assert generate(captured, law, step).completion_ids == generate(eager, law, step).completion_ids
        scale_weights_in_place(model, step)
    assert DEVICE == "cpu" or len(captured.graphs) > 5


def scale_weights_in_place(model: PreTrainedModel, seed: int) -> None:
    cpu = tiny_model("qwen2", std=0.05, max_position_embeddings=4096, **SHAPE)
    scale_weights(cpu, seed + 10, std=0.05)
    with torch.no_grad():
        for parameter, source in zip(model.parameters(), cpu.parameters(), strict=True):
            parameter.copy_(source)


def test_coupled_samples_are_those_of_plain_sampling():
    """In fp32, token for token: the strongest law there is for drafts, verification and cache together."""
    model = make_model(torch.float32)
    speculative = make_engine(model, verification="coupled", draft_qtype="qint4")
    plain = make_engine(model, (0,), verification="coupled")
    for seed in range(3):
        drafted = generate(speculative, SAMPLING, seed)
        assert drafted.completion_ids == generate(plain, SAMPLING, seed).completion_ids
        assert sum(drafted.stats.accepted_per_position) > 0


@torch.no_grad()
def largest_gap(model: PreTrainedModel, output: RolloutOutput) -> float:
    """How far a greedy token's logit lies below the best one, when the model reads the completion at once."""
    gaps = []
    for prompt, completion in zip(PROMPTS, output.completion_ids, strict=True):
        ids = torch.tensor([prompt + completion], device=DEVICE)
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        gaps.append((logits.amax(1) - chosen).max().item())
    return max(gaps)


def test_in_bf16_only_near_ties_differ_from_greedy_decoding():
    """A wrong key, position or page shows as a token that is not nearly the best; rounding alone does not."""
    model = make_model(torch.bfloat16)
    plain = largest_gap(model, generate(make_engine(model, (0,)), GREEDY))
    speculative = largest_gap(model, generate(make_engine(model), GREEDY))
    assert speculative <= NEAR_TIE * plain + 1e-3


def test_drafts_taken_on_trust_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: an engine that accepts every draft is far from greedy."""

    def trust(real: Callable) -> Callable:
        def verify(self: Any, drafts: Tensor, *args: Tensor) -> Any:
            outcome = real(self, drafts, *args)
            tokens = torch.cat([drafts, outcome.tokens[:, -1:]], dim=1)
            return outcome._replace(num_accepted=torch.full_like(outcome.num_accepted, drafts.shape[1]), tokens=tokens)

        return verify

    model = make_model(torch.bfloat16)
    plain = largest_gap(model, generate(make_engine(model, (0,)), GREEDY))
    greedy = samplers.GreedySampler
    monkeypatch.setattr(greedy, "verify", trust(greedy.verify))
    engine = make_engine(model)
    spoil(engine, noise=1.0)
    assert largest_gap(model, generate(engine, GREEDY)) > NEAR_TIE * plain + 1e-3


def test_two_hundred_rollouts_take_no_more_memory_than_a_few():
    """A graph, page or staging buffer that is left behind each time ends a training run overnight."""
    model = make_model(torch.bfloat16)
    engine = make_engine(model, (4, 0, 2))

    def held() -> int:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    for seed in range(10):
        generate(engine, SAMPLING, seed % 5, length=24)
    before, graphs = held(), len(engine.graphs)
    for seed in range(200):
        generate(engine, SAMPLING, seed % 5, length=24)
    assert held() <= before and len(engine.graphs) == graphs


def test_the_key_value_memory_is_free_between_rollouts():
    """Training needs it; captured rounds must find the new pages all the same."""
    model = make_model(torch.bfloat16)
    engine = make_engine(model)
    first = generate(engine, SAMPLING)
    assert engine.prefix_cache is not None and engine.prefix_cache.cache.nbytes == 0 and first.stats.kv_bytes > 0
    filler = torch.full((first.stats.kv_bytes // 4,), float("nan"), device=DEVICE)  # takes the place that was freed
    again = [generate(engine, SAMPLING) for _ in range(2)]
    del filler
    assert all(output.completion_ids == first.completion_ids for output in again)


def test_a_capture_gets_what_torch_holds_unused():
    """After a step of training torch holds most of the GPU. It lets go of nothing during a capture, so that the first
    one failed for want of memory, and all rounds of the run went without graphs."""
    capture, x = CudaCapture(torch.device(DEVICE, torch.cuda.current_device())), torch.ones(2**26, device=DEVICE)
    unused = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    limit = torch.cuda.memory_reserved() + x.nbytes // 2
    del unused
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(x.device).total_memory)
    try:
        replay = capture(lambda: x + 1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    x += 1
    assert replay().eq(3).all()


def test_a_capture_that_fails_leaves_torch_as_it_was():
    """Training goes on after it: dropout, freeing memory, the user's own graphs, and ours."""
    capture, x = CudaCapture(torch.device(DEVICE, torch.cuda.current_device())), torch.ones(2**20, device=DEVICE)
    first = capture(lambda: x + 1)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            capture(lambda: x * (x + 1).sum().item())
        assert torch.nn.functional.dropout(x).std() > 0
        torch.cuda.empty_cache()
        other = torch.cuda.CUDAGraph()
        with torch.cuda.graph(other):
            noise = torch.rand_like(x)
        other.replay()
        assert noise.std() > 0
    x += 1
    assert first().eq(3).all() and capture(lambda: 2 * x)().eq(4).all()


def test_a_capture_that_is_interrupted_leaves_torch_as_it_was():
    """Ctrl+C in a notebook, then the cell again."""
    capture, x = CudaCapture(torch.device(DEVICE, torch.cuda.current_device())), torch.ones(2**20, device=DEVICE)

    def interrupted() -> Tensor:
        x.add(1)
        raise KeyboardInterrupt

    first = capture(lambda: x + 1)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            capture(interrupted)
    assert torch.nn.functional.dropout(x).std() > 0
    assert capture(lambda: 2 * x)().eq(2).all() and first().eq(2).all()
