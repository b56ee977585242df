"""The conformance script finds what stock TRL passes and ours fails, says who generated, and needs no Hub."""

import json
from pathlib import Path
from typing import Any

import conformance
import pytest
from conform import standins
from transformers import AutoTokenizer


FAKE_TESTS = """
from unittest.mock import patch

import pytest
import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer


@pytest.fixture
def trainer(tmp_path):
    args = GRPOConfig(
        str(tmp_path), per_device_train_batch_size=3, num_generations=3, max_completion_length=4, report_to="none"
    )
    return GRPOTrainer(
        model="trl-internal-testing/tiny-Qwen2ForCausalLM-2.5",
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=args,
        train_dataset=load_dataset("trl-internal-testing/zen", "standard_prompt_only", split="train"),
    )


def test_trains(trainer):
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None


def test_mocks_generation(trainer):
    completion = torch.tensor([[9, 10, 151645]] * 3)
    generate = lambda input_ids, **kwargs: torch.cat([input_ids, completion], dim=1)
    with patch.object(trainer.model, "generate", side_effect=generate) as mock:
        trainer.train()
    assert mock.called


def test_knows_only_stock():
    assert GRPOTrainer.__mro__[0].__module__ == "trl.trainer.grpo_trainer"


def test_fails_on_both():
    raise AssertionError


@pytest.mark.slow
def test_slow():
    raise AssertionError
"""
NAME = "tests/test_grpo_trainer.py::"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trl")
    (root / "tests").mkdir()
    (root / "tests" / "__init__.py").touch()
    (root / "tests" / "test_grpo_trainer.py").write_text(FAKE_TESTS)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["slow"]\n')
    (root / "VERSION").write_text("1.16.0\n")
    return root


@pytest.mark.slow
def test_a_test_that_only_stock_passes_is_listed_and_fails_the_run(
    checkout: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The negative control in the fake checkout fails with ours by design: a run that ends in 0 would see nothing."""
    out = tmp_path / "result.json"
    status = conformance.main(["--trl", str(checkout), "--step-cap", "1", "--fp32", "--out", str(out)])
    printed, result = capfd.readouterr().out, json.loads(out.read_text())
    assert status == 1
    assert result["counts"]["stock"] == {"passed": 3, "failed": 1, "skipped": 0}, printed
    assert result["counts"]["ours"] == {"passed": 2, "failed": 2, "skipped": 0}
    assert list(result["regressions"]) == [NAME + "test_knows_only_stock"]
    assert list(result["generated_by_trl"]) == [NAME + "test_mocks_generation"]
    assert result["tests"]["ours"][NAME + "test_trains"]["rollouts"]["speculative_rounds"] > 0
    assert result["tests"]["stock"][NAME + "test_trains"]["rollouts"]["by_engine"] == 0
    assert result["provenance"]["argv"][:2] == ["--trl", str(checkout)]
    assert result["checkout"]["version"] == "1.16.0"
    for line in ("stock           3        1        0", "passed by stock and not by ours: 1", "`generate` is not"):
        assert line in printed


def _line(outcome: str) -> dict[str, Any]:
    return {"outcome": outcome, "rollouts": {"fallbacks": []}}


@pytest.mark.parametrize("outcome", ["failed", "skipped", None])
def test_what_stock_passes_must_pass(outcome: str | None) -> None:
    """A crash of the process, or a skip, hides a test as well as a failure does."""
    stock = {"a": _line("passed"), "b": _line("failed")}
    lost = {"b": _line("failed")} | ({} if outcome is None else {"a": _line(outcome)})
    result = conformance.compare(stock, lost)
    assert list(result["regressions"]) == ["a"]
    assert conformance.exit_status(result) == 1


def test_the_exit_status_of_a_run_without_regressions() -> None:
    """A failure that stock shares is no reason to fail; a selection that is empty is no reason to pass."""
    stock = {"a": _line("passed"), "b": _line("failed")}
    assert conformance.exit_status(conformance.compare(stock, stock)) == 0
    assert conformance.exit_status(conformance.compare({}, {})) == 2
    assert conformance.exit_status(conformance.compare({"b": _line("failed")}, {"b": _line("passed")})) == 2


def test_a_checkout_without_the_test_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TRL's wheel has no tests: a path into it must not end in an empty table."""
    with pytest.raises(SystemExit):
        conformance.main(["--trl", str(tmp_path)])
    assert "test_grpo_trainer.py" in capsys.readouterr().err


def test_standins_follow_the_names_in_the_tests(tmp_path: Path) -> None:
    """Ids that tests write down must read as tool calls, and what can't be built must be named."""
    source = tmp_path / "test_it.py"
    names = ["tiny-LlamaForSequenceClassification-3.2", "tiny-Qwen2_5_VLForConditionalGeneration", "zen-image"]
    source.write_text("\n".join(f'"trl-internal-testing/{name}"' for name in names))
    assert standins.build(tmp_path, [source]) == [f"trl-internal-testing/{name}" for name in names[1:]]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trl-internal-testing" / names[0])
    call = [
        151657,
        198,
        4913,
        606,
        788,
        330,
        64648,
        22785,
        497,
        330,
        16370,
        788,
        5212,
        64,
        788,
        220,
        18,
        11248,
        151658,
    ]
    assert tokenizer.decode(call) == '<tool_call>\n{"name": "multiply_tool", "arguments": {"a": 3}}\n</tool_call>'
    text = "naïve <think>\n tokens"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == 151645
