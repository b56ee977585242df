"""Captured rounds give what eager ones give. Graphs are recordings here: see recorded_graph.py."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import pairwise
from recorded_graph import record
from tiny_models import Schedule, built_once, force_page_size, ragged_prompts, scale_weights, spoil, tiny_model
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec import SelfSpecEngine, SelfSpecOptions
from trl_selfspec.engine.cuda_graphs import MAX_PROCESSORS, CaptureError, GraphPool, Program
from trl_selfspec.engine.engine import RolloutOutput
from trl_selfspec.kernels.cpu import build
from trl_selfspec.kv_cache.paged_cache import NULL_PAGE, PagedCache


GREEDY = {"do_sample": False}
SAMPLING = {"do_sample": True, "temperature": 1.2}
PROCESSED = SAMPLING | {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "min_new_tokens": 4, "eos_token_id": 7}
PROMPTS = ragged_prompts([5, 9, 3, 5, 14])
TOLERANCE = 2e-5  # of log-probabilities: more rows in a forward round otherwise


@pytest.fixture(autouse=True)
def _pages_and_torchs_own_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: rows have pages. Our C kernels are no operations of torch, so a recording would miss them."""
    force_page_size(monkeypatch, 4)
    monkeypatch.setattr(build, "_library", lambda: None)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen2")


def make_engine(
    model: PreTrainedModel, capture: Callable | None, schedule: tuple[int, ...] = (3, 0, 1, 3), **options: Any
) -> SelfSpecEngine:
    options = {"draft_qtype": "qint8", "num_speculative_tokens": 3, **options}
    engine = SelfSpecEngine(model, SelfSpecOptions(**options), controller=Schedule(*schedule), capture=capture)
    spoil(engine, noise=0.5)
    return engine


eager_engine = built_once(functools.partial(make_engine, capture=None))


def generate(engine: SelfSpecEngine, law: dict[str, Any], seed: int = 0, **kwargs: Any) -> RolloutOutput:
    prompts = kwargs.pop("prompts", PROMPTS)
    return engine.generate(prompts, GenerationConfig(max_new_tokens=16, pad_token_id=0, **law), seed=seed, **kwargs)


def same(left: RolloutOutput, right: RolloutOutput) -> bool:
    return left.completion_ids == right.completion_ids and all(
        torch.allclose(torch.tensor(a), torch.tensor(b), atol=TOLERANCE)
        for a, b in zip(left.logprobs + left.policy_logprobs, right.logprobs + right.policy_logprobs, strict=True)
    )


@pairwise(verification=["rejection", "coupled"], law=[GREEDY, SAMPLING, PROCESSED], max_batch_size=[None, 3])
def test_captured_rounds_equal_eager_ones(
    model: PreTrainedModel, verification: str, law: dict[str, Any], max_batch_size: int | None
):
    """Over rollouts with other seeds and lengths: prevents whatever Python decides in a round from being frozen."""
    options = {"verification": verification, "max_batch_size": max_batch_size}
    eager, captured = eager_engine(model, **options), make_engine(model, record, **options)
    for seed in range(2):
        prompts = PROMPTS[: 5 - 2 * seed]
        expected, actual = (generate(engine, law, seed, prompts=prompts) for engine in (eager, captured))
        assert same(actual, expected)
    assert len(captured.graphs) >= 6, "few rounds were replayed"


def test_graphs_survive_optimizer_steps():
    """The replicas are refreshed in place: prevents a replay that still reads the weights of an earlier step."""
    model = tiny_model("qwen2")
    eager, captured = make_engine(model, None), make_engine(model, record)
    outputs = []
    for step in range(3):
        outputs.append(generate(captured, SAMPLING))
        assert same(outputs[-1], generate(eager, SAMPLING))
        num_graphs = len(captured.graphs)
        scale_weights(model, seed=step + 1)
        for engine in (eager, captured):
            engine.refresh()
    assert num_graphs == len(captured.graphs) > 0
    assert outputs[0].completion_ids != outputs[1].completion_ids


def test_weights_that_move_are_followed():
    """A load or a sharder may put a parameter elsewhere: a graph would go on reading the old place."""
    model = tiny_model("qwen2")
    eager, captured = make_engine(model, None), make_engine(model, record)
    generate(captured, GREEDY)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone().mul_(1.1)
    for engine in (eager, captured):
        engine.refresh()
    assert len(captured.graphs) == 0
    assert same(generate(captured, GREEDY), generate(eager, GREEDY))


def a_seed_that_moves(engine: SelfSpecEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = engine._sampler.seed
    engine._sampler.seed = seed.clone()


def weights_followed_without_notice(engine: SelfSpecEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphPool, "clear", lambda self: None)
    for parameter in engine.model.parameters():
        parameter.data = parameter.data.clone().mul_(1.1)
    engine.refresh()


@pytest.mark.parametrize("sabotage", [a_seed_that_moves, weights_followed_without_notice])
def test_what_a_graph_must_not_do_is_noticed(monkeypatch: pytest.MonkeyPatch, sabotage: Callable):
    """Negative control: a recording that follows whatever changes would prove nothing."""
    model = tiny_model("qwen2")
    captured = make_engine(model, record)
    turns = [generate(captured, SAMPLING, keep=True)]
    sabotage(captured, monkeypatch)
    eager = make_engine(model, None)
    turns.append(generate(captured, SAMPLING, seed=1, keep=True, prompts=next_turn(turns[0], 3)))
    turns.append(generate(captured, SAMPLING, seed=2, keep=True, prompts=next_turn(turns[0], 5)))
    expected = [generate(eager, SAMPLING, seed=i + 1, prompts=next_turn(turns[0], n)) for i, n in enumerate((3, 5))]
    assert not all(map(same, turns[1:], expected))


@pytest.mark.parametrize("broken", [False, True], ids=["", "unnoticed"])
def test_graphs_do_not_outlive_the_storage_they_use(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, broken: bool
):
    """Pages are freed between rollouts, and rounds in plain torch hold their tensors. Negative control: it shows."""
    captured, expected = make_engine(model, record), generate(eager_engine(model), SAMPLING, prompts=PROMPTS[::-1])
    for seed in range(2):
        generate(captured, SAMPLING, seed)
    assert len(captured.graphs) > 0
    if broken:
        monkeypatch.setattr(PagedCache, "rounds_outdated", lambda self: False)
    captured.release()
    assert same(generate(captured, SAMPLING, prompts=PROMPTS[::-1]), expected) is not broken


def next_turn(first: RolloutOutput, num_rows: int) -> list[list[int]]:
    """Prompts that continue the first rows of a rollout."""
    return [[*a, *b, 11] for a, b in zip(PROMPTS, first.completion_ids, strict=True)][:num_rows]


def test_padding_rows_leave_cached_keys_alone(model: PreTrainedModel):
    """A graph for four rows runs while two are active: the others' keys are those of a conversation that goes on."""
    eager, captured = eager_engine(model), make_engine(model, record)
    first = generate(captured, SAMPLING, keep=True)
    for seed, num_rows in enumerate((2, 3, 5)):
        prompts = next_turn(first, num_rows)
        actual = generate(captured, SAMPLING, seed, keep=True, prompts=prompts)
        assert same(actual, generate(eager, SAMPLING, seed, prompts=prompts))
        assert actual.stats.reused_prompt_tokens > 0


@pytest.mark.parametrize("inactive", [True, False])
def test_inactive_rows_write_to_no_page_of_theirs(inactive: bool):
    """What they keep may belong to a conversation that goes on; padding rows of a graph would overwrite it."""
    cache = PagedCache(1, max_rows=4, row_capacity=8, page_size=4)
    for row in range(4):
        cache.reserve(row, 8)
    if inactive:
        cache.deactivate(2)
    cache.begin(torch.zeros(4, 1, dtype=torch.int64), num_slots=8)
    assert (cache.write_index // 4 == NULL_PAGE).tolist() == [False, False, inactive, inactive]


def test_laws_have_graphs_of_their_own_and_equal_ones_share(model: PreTrainedModel):
    """Evaluation at another temperature must not replay training's rounds, nor make training capture again."""
    eager, captured = eager_engine(model), make_engine(model, record)
    counts = []
    for temperature in (1.0, 1.0, 0.4, 0.4, 1.0, 0.4):
        law = SAMPLING | {"temperature": temperature}
        assert same(generate(captured, law), generate(eager, law))
        counts.append(len(captured.graphs))
    assert 0 < counts[1] < counts[3] == counts[4] == counts[5]


def test_many_laws_do_not_pile_up(model: PreTrainedModel):
    """A sweep over temperatures would end with no memory left; what goes has to go all at once, with its pool."""
    captured = make_engine(model, record)
    counts = []
    for i in range(MAX_PROCESSORS + 1):
        for _ in range(2):
            generate(captured, SAMPLING | {"temperature": 0.5 + 0.1 * i}, prompts=PROMPTS[:2])
        counts.append(len(captured.graphs))
    assert counts[:-1] == sorted(counts[:-1]) and 0 < counts[-1] < counts[-2] / 2, "the fifth law begins anew"


def fails(function: Callable) -> Callable:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_round_that_cannot_be_captured_runs_eagerly_after_one_warning(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Prevents a lost rollout, and a slow one that nobody is told of."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    eager, captured = eager_engine(model), make_engine(model, fails)
    with caplog.at_level(logging.WARNING):
        outputs = [generate(captured, SAMPLING, seed) for seed in range(2)]
    assert all(same(output, generate(eager, SAMPLING, seed)) for seed, output in enumerate(outputs))
    assert sum("without CUDA graphs" in message for message in caplog.messages) == 1
    required = make_engine(model, fails, cuda_graphs=True)
    with pytest.raises(CaptureError, match='cuda_graphs="auto"'):
        generate(required, SAMPLING)


def test_a_replay_and_only_a_replay_is_steady_state(model: PreTrainedModel):
    """Seconds of a round that compiled or captured would teach the gate costs that no later round has."""
    pool, calls = GraphPool(record), []
    pool.begin_rollout(logits_processor=_law(model), max_rows=8, row_capacity=64)
    x = torch.zeros(8)

    def add(program: Program) -> torch.Tensor:
        calls.append(program)
        return x[: program.num_rows].add_(1).clone()

    steady = []
    for _ in range(4):
        pool.begin_round()
        pool.run(Program("plain", 3, 9), add)
        steady.append(pool.steady_state)
    assert steady == [False, False, True, True]
    assert calls == [Program("plain", 4, 64)] * 2, "once eagerly, once captured"
    assert x.tolist() == [4.0] * 4 + [0.0] * 4, "capturing itself does nothing"


def test_a_program_that_was_interrupted_is_not_captured_next():
    """Ctrl+C in its first run: kernels that are not loaded, and tensors that are not made, fail the capture."""
    pool, runs = GraphPool(record), iter([interrupt, torch.zeros, torch.zeros, torch.ones])
    pool.begin_rollout(_law(tiny_model("qwen2")), max_rows=8, row_capacity=64)

    def run(program: Program) -> torch.Tensor:
        return next(runs)(())

    with pytest.raises(KeyboardInterrupt):
        pool.run(Program("plain", 3, 9), run)
    pool.run(Program("plain", 3, 9), run)
    assert len(pool) == 0
    pool.run(Program("plain", 3, 9), run)
    assert len(pool) == 1


def interrupt(*args: object) -> torch.Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("law", [{"bad_words_ids": [[5], [9]]}, {"sequence_bias": [[[4], 1.0]]}], ids=str)
def test_a_processor_prepared_in_one_rollout_is_captured_in_the_next(model: PreTrainedModel, law: dict[str, Any]):
    """Each rollout builds its law, and some laws prepare biases on the host in their first round: not in a capture."""
    eager, captured = eager_engine(model), make_engine(model, record, cuda_graphs=True)
    for seed in range(3):  # of one round each
        prompts = PROMPTS[:2]
        config = GenerationConfig(max_new_tokens=1, pad_token_id=0, **SAMPLING, **law)
        expected, actual = (engine.generate(prompts, config, seed=seed) for engine in (eager, captured))
        assert same(actual, expected)
    assert len(captured.graphs) > 0


def _law(model: PreTrainedModel):
    from trl_selfspec.sampling.logits_processing import BatchedLogitsProcessor, effective_generation_config

    config = effective_generation_config(model, GenerationConfig(do_sample=True))
    return BatchedLogitsProcessor.from_generation_config(model, config, "cpu")


@pytest.mark.parametrize(
    ("rows", "slots", "padded"),
    [(1, 1, (1, 512)), (3, 512, (4, 512)), (9, 513, (16, 1024)), (70, 1500, (96, 2000)), (130, 9, (192, 512))],
)
def test_programs_are_padded_to_few_sizes(model: PreTrainedModel, rows: int, slots: int, padded: tuple[int, int]):
    """One graph for every number of rows and slots would take more time to capture than it saves."""
    pool = GraphPool(record)
    pool.begin_rollout(logits_processor=_law(model), max_rows=200, row_capacity=2000)
    assert pool.padded(Program("plain", rows, slots)) == Program("plain", *padded)


def test_capture_is_refused_without_a_gpu(model: PreTrainedModel):
    """Prevents somebody from believing that an option is on."""
    with pytest.raises(ValueError, match="`cuda_graphs=True` needs a model on a CUDA device"):
        SelfSpecEngine(model, SelfSpecOptions(cuda_graphs=True))
