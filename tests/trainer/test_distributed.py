"""Two processes (gloo, CPU) under DDP, FSDP2 and DeepSpeed: no deadlock, one run, weights gathered for the replica.

Each backend is launched once; `distributed_worker.py` runs its scenarios and the tests read what every rank wrote.
"""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from launching import ACCELERATE, TESTS, TORCHRUN, run_to_end
from trl_runs import FP32_LOGP_TOLERANCE, make_model, make_tokenizer


pytestmark = pytest.mark.slow

RECIPES = TESTS.parent / "recipes"
LOGP = "sampling/sampling_logp_difference/max"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`outcome(suite)`: what both ranks reported, by scenario."""

    launched: set[str] = set()

    @functools.cache
    def launch(suite: str) -> dict[str, list[Any]]:
        assert suite not in launched, "its launch failed in an earlier test"
        launched.add(suite)
        folder = tmp_path_factory.mktemp(suite)
        deepspeed = {"DS_ACCELERATOR": "cpu"} if suite.startswith("zero") else {}
        run_to_end(*TORCHRUN, TESTS / "distributed_worker.py", suite, folder, **deepspeed)
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
        return {name: [rank[name] for rank in ranks] for name in ranks[0]}

    return launch


def assert_sampled_from_the_policy(log: list[dict[str, float]]) -> None:
    """The trainer's own forward of each step gives the sampled tokens the probabilities the engine drew them with."""
    assert log
    for entry in log:
        assert entry[LOGP] < FP32_LOGP_TOLERANCE
        assert entry["selfspec/fallback"] == 0


def repeatable(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without seconds, and without what counts the history, which no checkpoint holds: it changes no sample."""
    others = ("time", "_s", "speedup", "step_fraction", "per_second", "history_hit_fraction", "history_tokens")
    return [{name: value for name, value in entry.items() if not name.endswith(others)} for entry in log]


@pytest.mark.parametrize("suite", ["ddp", "fsdp"])
def test_ranks_that_take_different_numbers_of_rounds_train_one_policy(outcome: Any, suite: str) -> None:
    """A collective inside the loop would hang here; engines that drift apart would show in the log-probabilities."""
    first, second = (rank["whole"] for rank in outcome(suite)["stopped_and_resumed"])
    assert [g["rounds"] for g in first["generations"]] != [g["rounds"] for g in second["generations"]]
    assert first["weights"] == second["weights"]
    assert_sampled_from_the_policy(first["log"])
    assert all(generation["untouched"] for rank in (first, second) for generation in rank["generations"])


def test_the_backends_are_the_ones_they_are_meant_to_be(outcome: Any) -> None:
    """A launch that quietly starts two single processes, or shards nothing, passes every other test."""
    (ddp, _), (fsdp, other) = outcome("ddp")["stopped_and_resumed"], outcome("fsdp")["stopped_and_resumed"]
    assert (ddp["whole"]["backend"], fsdp["whole"]["backend"]) == ("MULTI_CPU", "FSDP")
    assert fsdp["whole"]["parameters_held"] + other["whole"]["parameters_held"] == ddp["whole"]["parameters_held"]


@pytest.mark.parametrize(
    "suite",
    ["ddp", "fsdp", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_a_resumed_run_continues_the_interrupted_one_bit_for_bit(outcome: Any, suite: str) -> None:
    """Weights, samples and metrics: whatever differs was not in the checkpoint."""
    for runs in outcome(suite)["stopped_and_resumed"]:
        assert runs["resumed"]["weights"] == runs["whole"]["weights"]
        assert runs["resumed"]["completions"] == runs["whole"]["completions"][2:]
        assert repeatable(runs["resumed"]["log"][2:]) == repeatable(runs["whole"]["log"][2:])


def test_a_seed_repeats_and_ranks_differ(outcome: Any) -> None:
    """Ranks with equal seeds draw the same completions twice, and half of every straddling group is no news."""
    for runs in outcome("ddp")["stopped_and_resumed"]:
        assert runs["repeated"]["completions"] == runs["whole"]["completions"]
    first, second = outcome("ddp")["uneven_turns"]
    for mine, theirs in zip(first["samples"][0], second["samples"][0], strict=True):  # the same prompts
        assert mine[:4] != theirs[:4]


def test_sharding_does_not_change_the_samples(outcome: Any) -> None:
    """The replica holds gathered weights: one wrong shard, and tokens differ from those of a policy that is whole."""
    for ddp, fsdp in zip(outcome("ddp")["stopped_and_resumed"], outcome("fsdp")["stopped_and_resumed"], strict=True):
        assert fsdp["whole"]["completions"] == ddp["whole"]["completions"]


def test_metrics_are_ratios_of_sums_over_all_ranks(outcome: Any) -> None:
    """Rank 1 drafts three times as much as rank 0: a mean of the ranks' ratios is another number."""
    first, second = (rank["whole"] for rank in outcome("ddp")["stopped_and_resumed"])
    means_of_ratios = []
    for entry, *ranks in zip(first["log"], first["generations"], second["generations"], strict=True):
        drafted, accepted = ([rank[name] for rank in ranks] for name in ("drafted", "accepted"))
        assert entry["selfspec/acceptance_rate"] == pytest.approx(sum(accepted) / sum(drafted))
        means_of_ratios.append(sum(a / d for a, d in zip(accepted, drafted, strict=True)) / 2)
    assert [entry["selfspec/acceptance_rate"] for entry in first["log"]] != pytest.approx(means_of_ratios)


def test_ranks_may_take_different_numbers_of_turns(outcome: Any) -> None:
    """The tool loop and `rollout_func` call the engine as often as a rank's rows need it."""
    first, second = outcome("ddp")["uneven_turns"]
    assert [g["turns"] for g in first["generations"]] == [2, 2]
    assert [g["turns"] for g in second["generations"]] == [4, 4]
    assert [g["rows"] for g in second["generations"]] == [14, 14]
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("suite", ["ddp", "fsdp"])
def test_tools_that_one_ranks_rows_alone_call(outcome: Any, suite: str) -> None:
    """A collective in a turn would hang: one rank is at its rewards while the other still calls its tools."""
    first, second = outcome(suite)["tools_on_one_rank"]
    assert [g["turns"] for g in first["generations"]] == [1]
    assert [g["turns"] for g in second["generations"]] > [2]
    reused = [rank["generations"][0]["reused"] for rank in (first, second)]
    assert reused[0] == 0 < reused[1] == first["log"][0]["selfspec/reused_prompt_tokens"]
    assert first["log"][0]["tools/call_frequency"] > 0
    assert_sampled_from_the_policy(first["log"])
    assert first["weights"] == second["weights"]
    assert all(generation["untouched"] for rank in (first, second) for generation in rank["generations"])


def test_a_change_that_one_rank_sees_refreshes_all(outcome: Any) -> None:
    """Refreshing gathers sharded weights: a rank that goes alone waits for ever."""
    assert [rank["refreshes"] for rank in outcome("ddp")["outside_a_rollout"]] == [1, 1]


@pytest.mark.parametrize("suite", ["ddp", "fsdp"])
def test_a_rank_without_an_engine_takes_the_others_along(outcome: Any, suite: str) -> None:
    """One rank in TRL's collective generation and one in the engine would wait for each other."""
    for rank, reason in zip(outcome(suite)["unsupported_on_one_rank"], ("1 of the other", "alone can't"), strict=True):
        assert [entry["selfspec/fallback"] for entry in rank["log"]] == [1]
        (warning,) = rank["warnings"]
        assert reason in warning


@pytest.mark.parametrize("suite", ["ddp", "fsdp"])
def test_evaluation_between_steps_with_groups_on_two_ranks(outcome: Any, suite: str) -> None:
    """A forward without a backward leaves FSDP's last layers gathered: aliased, they are freed under the replica."""
    first, second = outcome(suite)["with_evaluation"]
    assert_sampled_from_the_policy(first["log"])
    assert len(first["eval_log"]) == 3
    for entry in first["eval_log"]:
        assert entry[f"eval_{LOGP}"] < FP32_LOGP_TOLERANCE
    assert [g["rows"] for g in second["generations"]] == [6, 5] * 3


def test_lora_merges_into_gathered_weights(outcome: Any) -> None:
    """The adapter is sharded like its base: half a delta, or a delta on half a weight, gives another distribution."""
    first, second = outcome("fsdp")["with_lora"]
    assert_sampled_from_the_policy(first["log"])
    assert first["weights"] == second["weights"]


def test_fsdps_mixed_precision_is_the_replicas(outcome: Any) -> None:
    """FSDP casts norms and embeddings too; without that cast, the negative control, logits are visibly others."""
    for rank in outcome("fsdp")["bf16_logits"]:
        assert rank["cast"] == 0
        assert rank["uncast"] > 0.01


def test_the_end_frees_the_wrapped_model_before_the_group(outcome: Any) -> None:
    """Prevents a deadlock of DDP's reducer with gloo's threads, in which a launch sometimes never ended."""
    for rank in outcome("ddp")["ended"]:
        assert rank == {"before": "DistributedDataParallel", "is_freed": True, "has_group": False}


def test_an_engine_that_is_not_refreshed_shows(outcome: Any) -> None:
    """Negative control of every comparison of log-probabilities above."""
    log = outcome("fsdp")["without_refresh"][0]["log"]
    assert log[0][LOGP] < FP32_LOGP_TOLERANCE
    assert log[1][LOGP] > 0.1


@needs_deepspeed
@pytest.mark.parametrize("suite", ["zero2", "zero3"])
def test_deepspeed_trains_with_the_engine(outcome: Any, suite: str) -> None:
    """DeepSpeed writes weights past their version counters, and ZeRO-3 leaves empty parameters between forwards."""
    results = outcome(suite)
    resumed = [rank["resumed"] for rank in results["stopped_and_resumed"]]
    for first, second in (resumed, results["with_lora"]):
        assert first["backend"] == "DEEPSPEED"
        assert_sampled_from_the_policy(first["log"])
        assert first["weights"] == second["weights"]
        assert (first["parameters_held"] == 0) == (suite == "zero3")
    if suite == "zero3":
        assert_sampled_from_the_policy(results["with_evaluation"][0]["log"])
        assert results["without_refresh"][0]["log"][1][LOGP] > 0.1


@pytest.mark.parametrize("launcher", ["accelerate", "fsdp"])
def test_the_recipe_trains_in_two_processes(tmp_path: Path, launcher: str) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process; the config has to start two."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    arguments = {
        "model_name_or_path": tmp_path / "model",
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "max_completion_length": 16,
        "per_device_train_batch_size": 4,
        "num_generations": 8,  # more than the 4 rows of one process: it alone would refuse
        "gradient_accumulation_steps": 1,
        "num_problems": 16,
        "logging_steps": 1,
        "report_to": "none",
    }
    command = [RECIPES / "grpo_math.py", "--config", RECIPES / "tiny" / "grpo_arithmetic.yaml"]
    for name, value in arguments.items():
        command += [f"--{name}", value]
    if launcher == "fsdp":
        run_to_end(*TORCHRUN, TESTS / "fsdp_on_cpu.py", *command)
    else:
        config = RECIPES / "accelerate_configs" / "cpu.yaml"
        run_to_end(*ACCELERATE, "--config_file", config, "--main_process_port", "0", *command)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    log = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["selfspec/fallback"] for entry in log] == [0, 0]
