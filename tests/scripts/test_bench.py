"""The benchmark does the same work for every engine, says where its numbers come from, and rejects bad input."""

import contextlib
import io
import json
from pathlib import Path

import bench_rollout
import pytest
import torch
from bench import device, engines
from bench.engines import ForcedLengths, SyntheticVerification
from bench.figures import Traffic, own_figures
from bench.plot import plot, series
from bench.workload import (
    LONGTAIL_LIMIT,
    PRESETS,
    Workload,
    chat_prompts,
    completion_lengths,
    load_model,
    make_workload,
    preset_config,
    random_prompts,
)
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.utils import logging
from trl_runs import make_tokenizer

from trl_selfspec.control.stats import RolloutStats


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        eos_token_id=list(range(1, 32)),  # were lengths not forced, rows would end after 2 tokens in the mean
    )
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def smoke_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    """Engines on a tiny model, in this process: (JSON of the last stdout line, stderr, the --out file)."""
    out = tmp_path_factory.mktemp("out") / "result.json"
    options = "--engines stock,plain,selfspec --rows 3 --length-profile longtail --max-new-tokens 12"
    options += " --prompt-length 6 --dtype fp32 --device cpu --threads 1 --repeats 2 --warmup-tokens 24"
    options += " --synthetic-acceptance 0.5 --num-speculative-tokens 2 --max-active-sequences 3 --draft-qtype qint8"
    stdout, stderr, verbosity = io.StringIO(), io.StringIO(), logging.get_verbosity()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        bench_rollout.main(["run", "--model", str(tiny_model), *options.split(), "--out", str(out)])
    logging.set_verbosity(verbosity)
    return json.loads(stdout.getvalue().splitlines()[-1]), stderr.getvalue(), out


def test_last_line_on_stdout_is_the_result(smoke_run: tuple[dict, str, Path]) -> None:
    """Scripts read this line; a stray print after it, or a ratio upside down, would go into a paper."""
    result, _, out = smoke_run
    assert json.loads(out.read_text()) == result
    assert list(result["engines"]) == ["stock", "plain", "selfspec"]
    assert result["ratios"].keys() == {"plain/stock", "selfspec/plain", "selfspec/stock"}
    for pair, values in result["ratios"].items():
        fast, slow = (result["engines"][name]["seconds"]["all"] for name in pair.split("/"))
        paired = [s / f for s, f in zip(slow, fast, strict=True)]
        assert values == {"median": pytest.approx(sum(paired) / 2), "min": min(paired), "max": max(paired)}


def test_provenance_says_where_the_numbers_come_from(smoke_run: tuple[dict, str, Path]) -> None:
    provenance = smoke_run[0]["provenance"]
    assert {"git_sha", "git_dirty", "argv", "date", "versions", "repeats", "seed"} <= provenance.keys()
    assert {"cpu", "threads", "cpu_capability"} <= provenance["hardware"].keys()
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["argv"][0] == "run" and provenance["repeats"] == 2


def test_synthetic_acceptance_is_labelled(smoke_run: tuple[dict, str, Path]) -> None:
    """A speedup at an acceptance that was made up must not pass for a measured one."""
    result, stderr, _ = smoke_run
    assert result["provenance"]["synthetic_acceptance"] == 0.5
    assert "SYNTHETIC acceptance 0.5" in stderr


def test_each_component_has_its_figures(smoke_run: tuple[dict, str, Path]) -> None:
    """On a rented GPU a figure that is missing costs another hour; all but the memory's exist on a CPU too."""
    result = smoke_run[0]
    plain, selfspec = result["engines"]["plain"], result["engines"]["selfspec"]
    assert {"plain_round_ms", "plain_bytes_per_s", "startup_s"} <= plain.keys()
    assert {"draft_step_ms", "verify_ms", "startup_s", "requantize_s", "drafter_bytes"} <= selfspec.keys()
    assert selfspec["draft_step_ms_by_rows"] and selfspec["verify_ms_by_tokens"]
    assert 1e9 < result["provenance"]["hardware"]["measured_copy_bytes_per_s"] < 1e13
    assert result["provenance"]["hardware"]["gpu"] is None
    assert result["workload"]["weight_bytes"] == 4 * result["workload"]["parameters"]


def test_bytes_read_by_plain_rounds_are_counted_exactly() -> None:
    """Two rows of 3 and 5 prompt tokens with 2 and 1 new ones read 3 + 4 and 5 keys. A tied embedding is the head."""
    work = Workload([[1] * 3, [1] * 5], [2, 1])
    assert work.keys_read == 12
    sizes: dict = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict = {"num_attention_heads": 2, "num_key_value_heads": 1}
    for tied in (True, False):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **heads, tie_word_embeddings=tied))
        traffic = Traffic.of(model, work)
        assert traffic.weight_bytes == 4 * model.num_parameters()
        assert traffic.weight_bytes - traffic.weights_read_bytes == (0 if tied else 4 * 64 * 32)
        assert traffic.kv_read_bytes == 12 * 2 * 2 * 16 * 4
    stats = RolloutStats(plain_rounds=4, plain_s=2.0, rollout_s=3.5, prefill_s=0.5)  # of two rollouts
    figures = own_figures(stats, 2, traffic)
    assert (figures["plain_round_ms"], figures["wall_ms_per_round"]) == (500, 750)
    assert figures["plain_bytes_per_s"] == (4 * traffic.weights_read_bytes + 2 * traffic.kv_read_bytes) / 2.0


def test_nvidia_smi_is_read_field_by_field() -> None:
    line = "570.86.15, 1980 MHz, 1980 MHz, 3201 MHz, 700.00 W, 31\n"
    assert device.parse_nvidia_smi(line)["clocks.max.sm"] == "1980 MHz"
    assert device.parse_nvidia_smi("No devices were found\n") == {}


def _normal_uniform_drafts(rows: int, gamma: int, vocab: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(rows, gamma + 1, vocab, generator=generator)
    positions = torch.arange(10, 10 + gamma + 1).expand(rows, gamma + 1)
    return scores, torch.arange(rows), positions


@pytest.mark.parametrize("acceptance", [0.0, 0.7, 1.0])
def test_synthetic_verification_accepts_at_the_given_rate(acceptance: float) -> None:
    """Per examined draft, whatever the drafter: 4,000 rows put 0.7 within 0.03 (4 sigma)."""
    rows, gamma = 4000, 3
    scores, row_ids, positions = _normal_uniform_drafts(rows, gamma, vocab=8)
    verification = SyntheticVerification(torch.tensor(1), gamma, acceptance)
    proposals = (
        verification.propose(-9 * scores[:, i], row_ids, positions[:, i], torch.tensor(i)) for i in range(gamma)
    )
    drafts = torch.stack([proposal.tokens for proposal in proposals], 1)
    verdict = verification.verify(drafts, scores, row_ids, positions)
    accepted = int(verdict.num_accepted.sum())
    examined = accepted + int((verdict.num_accepted < gamma).sum())
    assert accepted / examined == pytest.approx(acceptance, abs=0.03)
    kept = torch.arange(gamma) < verdict.num_accepted[:, None]
    assert torch.equal(verdict.tokens[:, :gamma][kept], drafts[kept])


@pytest.mark.parametrize("profile", ["uniform", "longtail"])
@pytest.mark.parametrize("rows", [1, 2, 16, 128])
def test_the_longest_row_has_the_length_asked_for(profile: str, rows: int) -> None:
    lengths = completion_lengths(profile, rows, 256, seed=3)
    assert len(lengths) == rows and max(lengths) == 256 and min(lengths) >= 1
    assert lengths == completion_lengths(profile, rows, 256, seed=3)


def test_longtail_has_the_quantiles_of_a_grpo_step() -> None:
    """128 rows: median about 500 tokens, p99 about 3,000, limit 8,192; the uniform profile fails this."""

    def is_long_tailed(profile: str) -> bool:
        summary = Workload([], completion_lengths(profile, 128, LONGTAIL_LIMIT, seed=0)).summary()
        return 450 < summary["median"] < 550 and 2500 < summary["p99"] < 3500 and summary["max"] == LONGTAIL_LIMIT

    assert is_long_tailed("longtail")
    assert not is_long_tailed("uniform")


def test_longtail_keeps_its_shape_when_scaled_down() -> None:
    """A CPU's 16 short rows must still leave one or two running alone for most of the rollout."""
    lengths = sorted(completion_lengths("longtail", 16, 256, seed=0))
    assert lengths[-1] > 3 * lengths[-2] and lengths[-2] > 2 * lengths[7]


def test_forced_lengths_stop_each_row_at_its_own_length() -> None:
    stop = ForcedLengths(prompt_width=4, lengths=[1, 3], device=torch.device("cpu"))
    done = [stop(torch.zeros(2, width, dtype=torch.long), torch.zeros(2, 8)).tolist() for width in (4, 5, 6, 7)]
    assert done == [[False, False], [True, False], [True, False], [True, True]]


def test_continuous_batching_does_the_forced_work(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request has its own length, as `generate_batch` cannot. TRL gives the cache half the RAM, the test less."""
    monkeypatch.setattr(engines, "TRL_CB_MEMORY_PERCENT", 0.05)
    model = load_model(None, tiny_model, torch.float32, torch.device("cpu"), seed=0)
    work = make_workload(model, tiny_model, "longtail", 3, 12, prompt_length=6, seed=0)
    work.check(engines.ContinuousEngine(model).rollout(work, seed=1), "continuous")


def test_an_engine_that_did_other_work_is_an_error() -> None:
    """A row that ended early would make its engine look fast."""
    work = Workload([[1], [2]], [2, 3])
    work.check([[5, 5], [5, 5, 5]], "stock")
    with pytest.raises(RuntimeError, match="stock"):
        work.check([[5, 5], [5, 5]], "stock")


def test_prompts_are_ragged_and_the_longest_is_as_asked() -> None:
    lengths = sorted(map(len, random_prompts(4, prompt_length=10, vocab_size=50, seed=0)))
    assert lengths[0] == 5 and lengths[-1] == 10 and len(set(lengths)) > 2


def test_a_model_with_a_chat_format_gets_word_problems(tiny_model: Path, tmp_path: Path) -> None:
    """Acceptance on random ids is not that of a rollout; without a chat format there is nothing else."""
    assert chat_prompts(tiny_model, rows=3, seed=0) is None
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    texts = [tokenizer.decode(ids) for ids in chat_prompts(tmp_path, rows=3, seed=0) or []]
    assert len(set(texts)) == 3
    assert all("u : " in text or "u:" in text for text in texts) and all("?" in text for text in texts)


def test_rows_have_the_length_at_which_the_model_ends_them(tiny_model: Path) -> None:
    """Half of the tiny model's tokens end a row, long before a budget of 400 tokens; every engine gets the same."""
    model = load_model(None, tiny_model, torch.float32, torch.device("cpu"), seed=0)
    work = make_workload(model, tiny_model, "eos", 16, 400, prompt_length=6, seed=0)
    assert len(work.lengths) == 16 and len(set(work.lengths)) > 1 and 1 <= max(work.lengths) < 40
    work.check(engines.StockEngine(model).rollout(work, seed=1), "stock")


# In billions: what the model cards of Qwen2.5 and Llama 3.1 say, without and with embeddings as far as they do.
PUBLISHED = {
    "0.5b": (0.36, 0.49),
    "1.5b": (1.31, 1.54),
    "3b": (2.77, 3.09),
    "7b": (6.53, 7.61),
    "14b": (13.1, 14.7),
    "32b": (31.0, 32.5),
    "llama-8b": (None, 8.03),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_sizes(preset: str) -> None:
    """A layer too few, or a vocabulary of another size, would make every ratio one of another model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(preset_config(preset))
    embeddings = {
        id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    total, (without, published) = model.num_parameters(), PUBLISHED[preset]
    assert total / 1e9 == pytest.approx(published, rel=0.01)
    assert without is None or (total - sum(embeddings.values())) / 1e9 == pytest.approx(without, rel=0.01)


def test_preset_150m_has_about_150_million_parameters() -> None:
    with torch.device("meta"):
        assert 145e6 < AutoModelForCausalLM.from_config(preset_config("150m")).num_parameters() < 155e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --preset 9000b", f"presets: {', '.join(PRESETS)}"),
        ("run --preset 150m --model x", "not allowed with"),
        ("run --model /nowhere", "no config.json"),
        ("run --engines stock,sglang", "unknown engine 'sglang'; engines: stock, continuous, vllm, plain, selfspec"),
        ("run --preset tiny --length-profile eos", "eos needs --model"),
        ("run --engines stock,vllm --device cpu --vllm-python /nowhere/python", "can't be started"),
        ("run --engines ,", "no engine named"),
        ("run --rows 0", "not a positive number"),
        ("run --rows many", "invalid"),
        ("run --synthetic-acceptance 95", "not a probability"),
        ("run --synthetic-acceptance 0.9 --engines stock", "needs the engine selfspec"),
        ("run --draft-qtype int3", "qint4"),
        ("run --device cuda:99", "cuda:99"),
        ("run --out /nowhere/x.json", "does not exist"),
        ("compare /nowhere/a.json /nowhere/b.json", "not a result"),
    ],
)
def test_bad_arguments_say_what_to_use(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_rollout.main(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_compare_shows_the_change_of_each_ratio(
    smoke_run: tuple[dict, str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = smoke_run[2]
    result = json.loads(before.read_text())
    for values in result["ratios"].values():
        values["median"] *= 2
    after = tmp_path / "after.json"
    after.write_text(json.dumps(result))
    bench_rollout.main(["compare", str(before), str(after)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("selfspec/plain") and "+100.0 %" in line for line in lines)


def test_plot_draws_a_panel_per_pair_and_a_line_per_model(smoke_run: tuple[dict, str, Path], tmp_path: Path) -> None:
    """Results of several models and row counts go into one figure; the same setting twice is the later one."""
    result, other = smoke_run[0], json.loads(json.dumps(smoke_run[0]))
    other["workload"]["model"], other["workload"]["lengths"]["rows"] = "7b", 8
    other["provenance"]["hardware"]["gpu"] = {"name": "a GPU"}
    panels = series([result, result, other])
    assert panels.keys() == {"plain/stock", "selfspec/plain", "selfspec/stock"}
    assert all(sorted(len(points) for points in lines.values()) == [1, 1] for lines in panels.values())
    figure = tmp_path / "ratios.png"
    plot([result, other], figure)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_a_gpu_is_named_and_its_memory_and_bandwidth_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers without the card, its clocks and its bandwidth can't be compared with anybody else's."""
    options = "--preset tiny --rows 4 --max-new-tokens 24 --prompt-length 16 --repeats 2 --warmup-tokens 48"
    options += " --synthetic-acceptance 0.9 --num-speculative-tokens 3 --max-active-sequences 4 --device cuda"
    bench_rollout.main(["run", *options.split()])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    gpu = result["provenance"]["hardware"]["gpu"]
    assert gpu["name"] == torch.cuda.get_device_name() and gpu["cuda"] == torch.version.cuda
    assert result["provenance"]["hardware"]["measured_copy_bytes_per_s"] > 1e11
    for name in ("stock", "plain", "selfspec"):
        assert result["engines"][name]["peak_memory_bytes"] >= result["workload"]["weight_bytes"]
    assert result["engines"]["selfspec"]["kv_bytes"] > 0
    assert result["engines"]["selfspec"]["requantize_s"]["median"] < 10
