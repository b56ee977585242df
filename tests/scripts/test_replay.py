"""Replays say what was recorded and accept as a real rollout does; traces are what they claim to be."""

import json
from pathlib import Path
from typing import Any

import bench_rollout
import pytest
import torch
from bench import engines, replay
from bench.replay import ARMS, REPLAY_ENGINES, ReplayEngine, ReplaySampler, replay_makers
from bench.traces import Recording, Trace
from laws import mutant
from tiny_models import VOCAB_SIZE, ragged_prompts, tiny_model
from transformers import PreTrainedModel
from trl_runs import make_tokenizer

from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.sampling.samplers import CoupledSampler, RejectionSampler


TRACES = Path(__file__).parents[2] / "benchmarks" / "traces"
GROUP = 4


def random_trace(vocab_size: int = VOCAB_SIZE) -> Trace:
    """Two prompts, two epochs; completions of 3 to 24 tokens that repeat themselves and each other in places."""
    generator = torch.Generator().manual_seed(5)

    def completion() -> list[int]:
        length = int(torch.randint(3, 25, (), generator=generator))
        return torch.randint(2, 6, (length,), generator=generator).tolist()

    epochs = [[[completion() for _ in range(GROUP)] for _ in range(2)] for _ in range(2)]
    return Trace({"temperature": 0.7, "model": "none"}, ragged_prompts([9, 14], vocab_size=vocab_size), epochs)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", seed=3)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_says_what_was_recorded(arm: str, model: PreTrainedModel) -> None:
    """Token for token, over rows of several lengths and prompts, in speculative rounds and plain ones. A replay that
    lost a token somewhere would time another text, and one that saw its own recording in the history the future."""
    trace = random_trace()
    options = SelfSpecOptions(num_speculative_tokens=3, max_active_sequences=6)
    recordings = trace.recordings(rows=2 * GROUP, rollouts=1, epoch=2)
    engine = replay_makers(model, recordings, [arm], options)[arm]()
    assert isinstance(engine, replay.OwnReplay)
    for seed in range(2):
        assert engine.rollout(recordings[0], seed) == recordings[0].completion_ids
    stats = engine.stats
    assert stats.plain_rounds > 0
    assert (stats.num_rounds_speculative > 0) == (arm != "plain")
    if "suffix" in arm:
        assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


def test_a_rollout_that_is_not_forced_says_something_else(model: PreTrainedModel) -> None:
    """Negative control: the recorded tokens come from the forcing, and the benchmark notices where it is missing."""
    (recording,) = random_trace().recordings(rows=3, rollouts=1, epoch=1)

    class Unforced(ReplayEngine):
        def _samplers(self, greedy: bool) -> Any:
            return super(ReplayEngine, self)._samplers(greedy)

    options = SelfSpecOptions(num_speculative_tokens=0)
    engine = replay.OwnReplay(model, lambda: Unforced(model, options, [recording]))
    with pytest.raises(RuntimeError, match="not the recorded ones"):
        engine.rollout(recording, seed=0)


def test_the_history_is_the_epoch_before_and_nothing_else(model: PreTrainedModel) -> None:
    """An engine remembers what it generates: left in place, each repeat would draft from its own future."""
    (recording,) = random_trace().recordings(rows=GROUP, rollouts=1, epoch=2)
    options = SelfSpecOptions(num_speculative_tokens=3, max_active_sequences=GROUP, drafter="suffix")
    engine = ReplayEngine(model, options, [recording])
    accepted = []
    for _ in range(2):
        engine.load(recording)
        assert engine.history is not None
        held = [list(ids) for ids in engine.history.get(recording.prompt_ids[0])]
        assert held == random_trace().epochs[0][0]
        config = engines._generation_config(recording)
        output = engine.generate(recording.prompt_ids, config, seed=0, max_new_tokens=recording.lengths)
        accepted.append(output.stats.num_accepted_tokens)
    assert accepted[0] == accepted[1]
    # Negative control: without the reset the engine knows every next token but where texts begin alike.
    output = engine.generate(recording.prompt_ids, config, seed=0, max_new_tokens=recording.lengths)
    assert output.stats.num_accepted_tokens > 1.3 * accepted[0]


def acceptance(samplers: Any, rows: int = 20_000) -> float:
    """Share of first drafts that a replay accepts, where the text comes from p and drafts from q."""
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.1, 0.25, 0.25, 0.4])
    seed, generator = torch.tensor(7), torch.Generator().manual_seed(0)
    texts = torch.multinomial(p.expand(rows, -1), 4, replacement=True, generator=generator)
    sampler = samplers.ReplayRejectionSampler(RejectionSampler(seed, 2), texts)
    row_ids, scores = torch.arange(rows), p.log().expand(rows, 3, -1)
    positions = torch.arange(1, 4).expand(rows, -1)
    drafts = [sampler.propose(q.log().expand(rows, -1), row_ids, positions[:, i], torch.tensor(i)) for i in (0, 1)]
    tokens = torch.stack([draft.tokens for draft in drafts], 1)
    result = sampler.verify(tokens, scores, row_ids, positions)
    assert torch.equal(result.tokens, texts[:, 1:])
    torch.testing.assert_close(result.logprobs, p.log()[result.tokens])
    assert 0 < int((result.num_accepted == 2).sum()) < int((result.num_accepted >= 1).sum())
    return float((result.num_accepted >= 1).double().mean())


def test_drafts_with_a_distribution_are_accepted_as_in_rejection_sampling() -> None:
    """Σ min(p, q) = 0.55 of them, within four standard errors of 20,000 rows. Negative control: the rule of acceptance
    itself, which is for tokens that q drew, accepts 0.90 of those that p drew."""
    assert acceptance(replay) == pytest.approx(0.55, abs=0.015)
    rule, of_drafts = "u * logprobs[:, :gamma].double().exp() < q", "u * q < logprobs[:, :gamma].double().exp()"
    assert acceptance(mutant(replay, (rule, of_drafts))) == pytest.approx(0.90, abs=0.01)


def test_known_drafts_are_accepted_where_they_are_the_recording() -> None:
    """As many as lead, whatever the target would have drawn; a draft that runs past the recording ends nothing."""
    texts = torch.tensor([[9, 5, 6, 7, 8], [9, 1, 2, 3, 0]])
    sampler = ReplaySampler(CoupledSampler(torch.tensor(3)), texts)
    positions = torch.tensor([[1, 2, 3], [3, 4, 5]])
    drafts = torch.tensor([[5, 6], [4, 0]])
    scores = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0))
    result = sampler.verify(drafts, scores, torch.tensor([0, 1]), positions)
    assert result.num_accepted.tolist() == [2, 0]
    assert result.tokens[0].tolist() == [5, 6, 7] and result.tokens[1, 0] == 3
    expected = scores.log_softmax(-1).gather(-1, result.tokens[..., None])[..., 0]
    torch.testing.assert_close(result.logprobs, expected)
    drawn = sampler.draw(scores[:, 0], torch.tensor([0, 1]), torch.tensor([4, 1]))
    assert drawn.tokens.tolist() == [8, 1]


def test_acceptance_in_a_replay_is_that_of_the_rollout_that_was_recorded(model: PreTrainedModel) -> None:
    """What is measured on a trace is what the drafter was worth when the trace was sampled: alpha of qint4 drafts over
    1,500 tokens, within four standard errors of the difference (0.07)."""
    prompts = [prompt for prompt in ragged_prompts([5, 9, 12]) for _ in range(8)]
    options = SelfSpecOptions("qint4", num_speculative_tokens=3, max_active_sequences=24, drafter="quantized")
    blank = Recording(prompts, [64] * 24, completion_ids=[[0] * 64] * 24)
    engine = ReplayEngine(model, options, [blank])
    config = engines._generation_config(blank)
    real = replay.SelfSpecEngine(model, options).generate(prompts, config, seed=11)
    recording = Recording(prompts, [64] * 24, completion_ids=real.completion_ids)
    engine.load(recording)
    again = engine.generate(prompts, config, seed=12)
    assert again.completion_ids == real.completion_ids
    assert real.stats.alpha is not None and again.stats.alpha is not None
    assert 0.3 < real.stats.alpha < 0.95
    assert again.stats.alpha == pytest.approx(real.stats.alpha, abs=0.07)


def test_rows_are_of_one_prompt_or_of_whole_groups() -> None:
    trace = random_trace()
    first, second = trace.recordings(rows=3, rollouts=2, epoch=2)
    assert first.prompt_ids == [trace.prompt_ids[0]] * 3 and second.prompt_ids == [trace.prompt_ids[1]] * 3
    assert first.completion_ids == trace.epochs[1][0][:3]
    assert first.history == [(trace.prompt_ids[0], ids) for ids in trace.epochs[0][0]]
    assert first.lengths == list(map(len, first.completion_ids)) and first.temperature == 0.7
    (both,) = trace.recordings(rows=2 * GROUP, rollouts=1, epoch=1)
    assert both.completion_ids == trace.epochs[0][0] + trace.epochs[0][1] and not both.history


@pytest.mark.parametrize(
    ("rows", "rollouts", "epoch", "message"),
    [
        (1, 1, 3, "epochs 1 to 2"),
        (5, 1, 1, "a multiple of 4"),
        (1, 3, 1, "has 2 prompts"),
        (12, 1, 1, "has 2 prompts"),
    ],
)
def test_a_trace_that_is_too_small_is_refused(rows: int, rollouts: int, epoch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_trace().recordings(rows, rollouts, epoch)


def test_equal_traces_are_equal_files(tmp_path: Path) -> None:
    """A time stamp in a file would make each recording a change."""
    trace, paths = random_trace(), (tmp_path / "a.json.gz", tmp_path / "b.json.gz")
    for path in paths:
        trace.save(path)
    assert paths[0].read_bytes() == paths[1].read_bytes() and Trace.load(paths[0]) == trace


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat format, which ends rows at half of its tokens."""
    path, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    tokenizer.save_pretrained(path)
    model = tiny_model("llama", vocab_size=len(tokenizer), std=0.05)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = list(range(len(tokenizer) // 2))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def recorded(saved_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.json.gz"
    options = "--num-prompts 2 --group-size 3 --max-new-tokens 12 --temperature 0.8 --device cpu --threads 1 --seed 4"
    bench_rollout.main(["record", "--model", str(saved_model), *options.split(), "--out", str(path)])
    return path


def test_a_trace_is_recorded_and_replayed_from_the_command_line(
    saved_model: Path, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = Trace.load(recorded)
    assert trace.about["provenance"]["argv"][0] == "record" and trace.about["epoch_seeds"] == [4, 5]
    eos = set(trace.about["eos_token_id"])
    for ids in trace.completion_ids:
        assert (ids[-1] in eos or len(ids) == 12) and not eos.intersection(ids[:-1])
    options = "--rows 2 --rollouts 2 --dtype fp32 --device cpu --threads 1 --repeats 2 --warmup-tokens 8"
    options += " --num-speculative-tokens 2 --max-active-sequences 2 --draft-qtype qint8"
    bench_rollout.main(["run", "--model", str(saved_model), "--replay", str(recorded), *options.split()])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(result["engines"]) == list(REPLAY_ENGINES)
    assert {"suffix/plain", "quantized/plain", "suffix_history/plain", "auto/best"} <= result["ratios"].keys()
    workload = result["workload"]
    assert workload["lengths"]["rows"] == 2 and workload["rollouts"] == 2 and workload["temperature"] == 0.8
    assert workload["lengths"]["tokens"] == sum(len(ids) for group in trace.epochs[1] for ids in group[:2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--replay /nowhere.json.gz", "not a trace"),
        ("--replay TRACE --engines selfspec", "selfspec: not with --replay"),
        ("--engines suffix", "suffix: not without --replay"),
        ("--replay TRACE --preset 150m --engines plain,auto", "acceptance of auto would mean nothing"),
        ("--replay TRACE --preset tiny --engines plain", "larger vocabulary"),
        ("--replay TRACE --preset 150m --epoch 1 --engines suffix_history", "no history"),
        ("--replay TRACE --preset 150m --epoch 3", "epochs 1 to 2"),
    ],
)
def test_replays_that_mean_nothing_are_refused(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_trace(vocab_size=300).save(tmp_path / "trace.json.gz")
    with pytest.raises(SystemExit) as stopped:
        bench_rollout.main(["run", *arguments.replace("TRACE", str(tmp_path / "trace.json.gz")).split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


SHIPPED = {"word_problems_t1.0": (8, 1.0), "word_problems_t0.7": (8, 0.7), "prose_t1.0": (4, 1.0)}


def test_no_other_traces_are_shipped() -> None:
    assert {path.name for path in TRACES.iterdir()} == {f"{name}.json.gz" for name in SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_traces_are_what_they_claim(name: str) -> None:
    """Two epochs that are different samples, groups of 16, ids of SmolLM2's vocabulary, the command beside them."""
    trace, (num_prompts, temperature) = Trace.load(TRACES / f"{name}.json.gz"), SHIPPED[name]
    about = trace.about
    assert about["temperature"] == temperature and "SmolLM2-135M-Instruct" in about["model"]
    assert about["provenance"]["argv"][0] == "record" and about["provenance"]["versions"]["torch"]
    assert len(trace.prompt_ids) == num_prompts == len({tuple(prompt) for prompt in trace.prompt_ids})
    assert len(trace.epochs) == 2 and all(len(group) == 16 for epoch in trace.epochs for group in epoch)
    assert [len(epoch) for epoch in trace.epochs] == [num_prompts] * 2
    ids = [token for row in trace.prompt_ids + trace.completion_ids for token in row]
    assert min(ids) >= 0 and max(ids) == trace.largest_id < about["vocab_size"] == 49152
    eos = about["eos_token_id"]
    for row in trace.completion_ids:
        assert 1 <= len(row) <= 160 and eos not in row[:-1] and (row[-1] == eos or len(row) == 160)
    first, second = ({tuple(row) for group in epoch for row in group} for epoch in trace.epochs)
    assert len(first & second) < 0.1 * len(second)  # a short answer may come twice
