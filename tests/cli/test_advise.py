"""`trl-selfspec advise` as a new user tries it: a config and nothing else, wrong names, no network."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import SHAPES

from trl_selfspec.cli import here
from trl_selfspec.cli.main import main
from trl_selfspec.control.controller import Controller
from trl_selfspec.control.rates import PLAIN, Choice
from trl_selfspec.simulate.costs import Costs
from trl_selfspec.simulate.engines import self_drafting
from trl_selfspec.simulate.hardware import find_device
from trl_selfspec.simulate.measured import Measurements, calibrated, moved
from trl_selfspec.simulate.rollout import Work, rollout


QWEN7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("advise opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(QWEN7B))
    return str(tmp_path / "config.json")


def advise(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["advise", *argv]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    return json.loads(advise(capsys, *argv, "--json"))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["advise", *argv]) == 2
    return capsys.readouterr().err


def test_a_config_alone_gives_an_answer(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With what was assumed, and what would change it; readable on 80 columns."""
    text = advise(capsys, "--model", config, "--gpu", "a100", "--rows", "256", "--max-tokens", "8192")
    flat = " ".join(text.split())
    for part in (
        "speculation should pay",
        "instead of",
        "Lengths, which decide most, are assumed",
        "use_selfspec=True",
    ):
        assert part in flat
    assert "GB for the drafter" in flat and "NVIDIA A100 data sheet" in flat
    assert max(map(len, text.splitlines())) <= 80


def test_wrong_names_are_answered_with_right_ones(config: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A GPU, an architecture, a model, and no device at all."""
    assert "h200, b200" in refused(capsys, "--model", config, "--gpu", "h2000x")
    assert "Say which device" in refused(capsys, "--model", config)
    assert "the path of its config.json" in refused(capsys, "--model", "nobody/nothing", "--gpu", "h200")
    assert "the path of its config.json" in refused(capsys, "--model", "no such path/x/y", "--gpu", "h200")
    other = tmp_path / "other.json"
    other.write_text(json.dumps(QWEN7B | {"model_type": "mamba2"}))
    assert "'mamba2' is not known to the cost model" in refused(capsys, "--model", str(other), "--gpu", "h200")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rows", "0"], "--rows is 0"),
        (["--alpha", "1.5"], "--alpha is 1.5"),
        (["--median", "9000"], "--median is 9000"),
        (["--async", "1"], "needs --train-seconds or --step-share"),
        (["--dtype", "fp32"], "fp32 is not in the table for h200"),
    ],
)
def test_bad_values_say_what_to_use(
    argv: list[str], message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a traceback, or advice for a batch of nothing."""
    assert message in refused(capsys, "--model", config, "--gpu", "h200", *argv)


def test_weights_that_do_not_fit_are_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And several GPUs hold them."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN7B | {"num_hidden_layers": 80}))
    assert "use --tp" in refused(capsys, "--model", str(path), "--gpu", "rtx-4090")
    assert as_json(capsys, "--model", str(path), "--gpu", "rtx-4090", "--tp", "4")["rows_that_fit"] > 0


def test_a_model_in_the_cache_is_found(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name on the hub, without asking the hub."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(Path(config).read_text())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert as_json(capsys, "--model", "some/model", "--gpu", "h200")["verdict"] == "pays"


def test_small_policies_on_a_fast_gpu_are_told_to_leave_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A draft step costs what a plain one does; the engine without speculation is still recommended."""
    small = {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    }
    (tmp_path / "config.json").write_text(json.dumps(QWEN7B | small | {"num_key_value_heads": 2}))
    advice = as_json(capsys, "--model", str(tmp_path), "--gpu", "h200", "--rows", "256")
    assert advice["verdict"] in ("off", "toss-up") and advice["gain"] < 1.05
    assert advice["options"] == {"use_selfspec": True, "selfspec_num_speculative_tokens": 0}
    assert advice["over_stock"] > 5


def test_lengths_decide(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of lengths without a tail changes the verdict; the limit cuts what is longer."""
    path = tmp_path / "lengths.jsonl"
    path.write_text("\n".join(["500"] * 99 + ["20000"]))
    base = ("--model", config, "--gpu", "a100", "--rows", "256", "--max-tokens", "8192")
    tail = as_json(capsys, *base, "--lengths", str(path))
    path.write_text("500\n" * 100)
    flat = as_json(capsys, *base, "--lengths", str(path))
    assert tail["gain"] > 1.2 > 1.05 > flat["gain"]
    assert "longest 8192" in tail["lengths"]
    assert as_json(capsys, *base, "--median", "500", "--p99", "3000")["gain"] > 1.2


def test_seconds_of_several_gpus_are_not_predicted(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They were 30 % and more off in every engine but our own; ratios were not."""
    base = ("--model", config, "--gpu", "a100", "--rows", "256", "--max-tokens", "8192")
    for more in (("--dp", "8"), ("--tp", "2")):
        text = advise(capsys, *base, *more)
        assert "instead of" not in text and "are not predicted" in " ".join(text.split())
    one, eight = as_json(capsys, *base), as_json(capsys, *base, "--dp", "8")
    assert eight["seconds"] is None
    assert eight["gain"] > one["gain"]  # the rank with the longest row decides


def test_generation_behind_training_is_said_to_be_hidden(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents selling a gain that no step shows."""
    base = ("--model", config, "--gpu", "a100", "--rows", "64", "--max-tokens", "4096")
    hidden = advise(capsys, *base, "--train-seconds", "600", "--async", "1")
    assert "would not shorten a step" in " ".join(hidden.split())
    synchronous = as_json(capsys, *base, "--step-share", "0.65")
    assert 1.05 < synchronous["step_gain"] < synchronous["gain"]
    exposed = as_json(capsys, *base, "--train-seconds", "5", "--async", "1")
    assert exposed["step_gain"] == pytest.approx(exposed["gain"], rel=0.01) and not exposed["hidden"]


def measured_by(costs: Costs) -> Measurements:
    drafter = costs.drafts[0].network
    assert drafter is not None
    return Measurements(
        {n: costs.target.forward_s(n, 1, 256) for n in (1, 8, 32)},
        {n: drafter.forward_s(n, 1, 256) for n in (1, 8, 32)},
        {(n, t): costs.target.forward_s(n, t, 256) for n in (1, 8) for t in (3, 7)},
    )


def test_measurements_move_the_model_to_the_machine() -> None:
    """A machine 3 times as slow, with twice the overhead, is found from 10 rounds."""
    known = self_drafting(SHAPES["Qwen2.5-7B"], find_device("a100"), 0.96)
    drafter = known.drafts[0].network
    assert drafter is not None
    slow = replace(
        known,
        target=moved(known.target, 0.35, 2.0),
        drafts=(replace(known.drafts[0], network=moved(drafter, 0.3, 1.5)),),
    )
    work, found = Work.lognormal(64, 500, 3000, 8192), calibrated(known, measured_by(slow), 256)
    for gate in (PLAIN, None):
        assert rollout(found, work, gate).seconds == pytest.approx(rollout(slow, work, gate).seconds, rel=0.03)
    assert rollout(known, work).seconds < 0.7 * rollout(slow, work).seconds  # what the table says


def bench_result(measured: Measurements) -> dict[str, Any]:
    engine = {
        "plain_ms_by_rows": {str(n): 1e3 * s for n, s in measured.plain.items()},
        "draft_step_ms_by_rows": {"qint4": {str(n): 1e3 * s for n, s in measured.draft.items()}, "suffix": {"1": 0.1}},
        "verify_ms_by_tokens": {str(n * t): 1e3 * s for (n, t), s in measured.verify.items()},
        "acceptance": {"alpha": 0.97},
    }
    hardware = {"cpu": "a host", "gpu": {"name": "NVIDIA A100-SXM4-80GB"}}
    return {"engines": {"selfspec": engine}, "provenance": {"hardware": hardware}}


def test_a_benchmark_narrows_the_interval(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It knows the GPU, the acceptance and the price of a round by then."""
    path, base = tmp_path / "rollout.json", ("--model", config, "--rows", "64", "--max-tokens", "8192")
    result = bench_result(measured_by(self_drafting(SHAPES["Qwen2.5-7B"], find_device("a100"), 0.97)))
    path.write_text(json.dumps(result))
    table, bench = as_json(capsys, *base, "--gpu", "a100"), as_json(capsys, *base, "--bench", str(path))
    assert bench["device"] == "a100-80gb" and bench["evidence"] == "measured" and bench["alpha"] == 0.97
    assert bench["high"] / bench["low"] < table["high"] / table["low"]
    given = as_json(capsys, *base, "--gpu", "a100", "--alpha", "0.97")
    assert bench["gain"] == pytest.approx(given["gain"], rel=0.05)
    result["engines"]["selfspec"]["draft_step_ms_by_rows"] = {"suffix": {"1": 0.1}}
    path.write_text(json.dumps(result))
    assert "No draft was measured" in refused(capsys, *base, "--bench", str(path))
    path.write_text("no JSON")
    assert "is not JSON" in refused(capsys, *base, "--bench", str(path))
    assert "nowhere.json" in refused(capsys, *base, "--bench", "nowhere.json")
    path.write_text("{}")
    assert "no measured rounds" in refused(capsys, *base, "--bench", str(path))


def test_the_state_of_a_controller_is_a_benchmark(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run saves with its checkpoints; it does not say on what device."""
    costs = self_drafting(SHAPES["Qwen2.5-7B"], find_device("a100"), 0.97)
    controller = Controller([draft.traits for draft in costs.drafts])
    for _ in range(2):
        rollout(costs, Work.lognormal(16, 200, 800, 1024), controller)
    path, base = tmp_path / "state.json", ("--model", config, "--rows", "16", "--max-tokens", "1024")
    path.write_text(json.dumps(controller.state_dict()))
    assert "add --gpu NAME" in refused(capsys, *base, "--bench", str(path))
    saved = as_json(capsys, *base, "--bench", str(path), "--gpu", "a100")
    assert saved["alpha"] == pytest.approx(0.97, abs=0.01)
    assert saved["gain"] == pytest.approx(as_json(capsys, *base, "--gpu", "a100", "--alpha", "0.97")["gain"], rel=0.06)


def test_the_plot_is_drawn_or_says_what_it_needs(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """matplotlib is no dependency."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "gain.png"
    advise(capsys, "--model", config, "--gpu", "h200", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("trl_selfspec.cli.advice.find_spec", lambda name: None)
    assert "pip install matplotlib" in refused(capsys, "--model", config, "--gpu", "h200", "--plot", str(path))


def test_this_machine_is_measured_by_the_engines_own_rounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part is timed at each size, on a model of random weights."""
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny |= {"num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(QWEN7B | tiny))
    monkeypatch.setattr(here, "ROWS", {"cpu": (1, 2), "cuda": (1, 2)})
    monkeypatch.setattr(here, "ROUNDS", 3)
    measured, name, memory_bytes = here.measure(tmp_path, "fp32")
    assert (name is None) == (not torch.cuda.is_available()) and memory_bytes > 1e9
    assert measured.plain.keys() == measured.draft.keys() == {1, 2}
    assert measured.verify.keys() == {(1, 3), (1, 7), (2, 3), (2, 7)}
    assert min((*measured.plain.values(), *measured.draft.values(), *measured.verify.values())) > 0
    with pytest.raises(ValueError, match="--here runs in bf16 or fp32"):
        here.measure(tmp_path, "fp8")
    monkeypatch.setattr(here, "measure", lambda path, dtype: (measured, "AMD Instinct MI300X", 192e9))
    advice = as_json(capsys, "--model", str(tmp_path), "--here", "--rows", "2", "--max-tokens", "64")
    assert advice["evidence"] == "measured" and advice["device"] == "AMD Instinct MI300X"


def test_the_command_line_needs_no_torch() -> None:
    """It runs on a laptop at once, and next to a training run without touching its GPU."""
    program = (
        "import sys; from trl_selfspec.cli import main; assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_choices_of_another_name_are_no_drafts() -> None:
    """A drafter that the costs do not have is a mistake, not a free draft."""
    costs = self_drafting(SHAPES["Qwen2.5-7B"], find_device("a100"), 0.97)
    with pytest.raises(KeyError):
        costs.round_s(1, Choice(2, "eagle"), 100)
