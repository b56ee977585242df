"""Architectures that keep, share, rotate and route in their own ways: equal to transformers, or refused by name.

A part of `scripts/sweep_families.py`, which runs all of them; its table is docs/models.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import sweep_families
import torch
from sweep.configs import small_config
from sweep_families import FAMILIES, Outcome, check, run_family, small_model, table
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_selfspec.engine.engine import SelfSpecEngine, UnsupportedModelError
from trl_selfspec.engine.kv_budget import kv_bytes_per_token
from trl_selfspec.kv_cache.attention import IMPLEMENTATION, selfspec_attention
from trl_selfspec.policy.replica import PolicyReplica


ROOT = Path(__file__).parents[2]
DOCUMENTED = ROOT / "docs" / "models.md"
EQUAL = [
    "afmoe",  # takes views of what attention returns
    "cohere2",  # sliding and global layers, one norm for both branches
    "bamba",  # Mamba-2
    "deepseek_v3",  # latent attention
    "falcon_h1",  # Mamba-2 and attention in one layer
    "gemma4_text",  # head sizes by layer; layers that share keys and values
    "glm4_moe",  # half of a head is rotated, in layers that have Llama's parts
    "gpt2",  # learned positions, Conv1D
    "gpt_oss",  # attention sinks
    "hunyuan_v1_moe",  # reads the dtype of a weight that the drafter quantizes
    "granitemoehybrid",  # Mamba-2
    "jetmoe",  # repeats its keys
    "kimi_linear",  # a delta rule whose decay differs by channel
    "lfm2",  # short convolutions
    "lfm2_moe",
    "llama",
    "llama4_text",  # chunks of the context, queries scaled by position
    "minimax_m2",  # norms over all heads
    "nemotron_h",  # Mamba-2; layers that keep nothing
    "olmo_hybrid",  # gated delta rule
    "opt",  # positions with an offset
    "qwen2_moe",  # leaves its window to the mask
    "qwen3_5_text",  # gated delta rule
    "qwen3_next",  # gated delta rule
    "stablelm",  # part of a head is rotated
]
# Left to `make test-all`
MORE_EXPERTS = {"afmoe", "glm4_moe", "hunyuan_v1_moe", "jetmoe", "minimax_m2", "qwen2_moe"}
RECURRENT = {"bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "lfm2", "lfm2_moe", "nemotron_h"}
RECURRENT |= {"olmo_hybrid", "qwen3_5_text", "qwen3_next"}  # engine/test_recurrent.py has some of them in `make test`
REFUSED = {
    "bart": "",  # positions from the cache's length
    "bloom": "",  # ALiBi in a mask
    "deepseek_v32": "`indexed_attention`",
    "falcon": "",  # no registry
    "falcon_mamba": "recurrent state",
    "jamba": "computed by JambaMambaMixer",
    "mamba": "recurrent state",
}


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow) if name in MORE_EXPERTS | RECURRENT else name for name in EQUAL],
)
def test_a_family_gives_what_transformers_gives(family: str) -> None:
    """Prevents samples from another distribution, and a crash after the start-up check has passed."""
    outcome = run_family(family)
    assert (outcome.verdict, outcome.bf16) == ("equal", "runs"), outcome
    assert outcome.acceptance is not None
    # Suffix drafts find little to copy in random text.
    assert (0 if family in RECURRENT else 0.1) <= outcome.acceptance < 1, "drafts must be accepted and rejected"


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_the_engine_cannot_run_is_refused_by_name(family: str) -> None:
    """Prevents the end of a run where TRL trains, and a reason that tells nobody what to change."""
    outcome = run_family(family)
    assert (outcome.verdict, outcome.bf16) == ("refused", "refused"), outcome
    assert REFUSED[family] in outcome.reason
    assert FAMILIES[family] in outcome.reason


def outcome_of(model: PreTrainedModel) -> Outcome:
    outcome = Outcome("llama", FAMILIES["llama"], "")
    check(model, outcome)
    return outcome


def test_a_policy_that_is_not_what_its_config_says_is_noticed() -> None:
    """Negative control: nothing in the class, the config or the weights tells of this."""
    model = small_model("llama")
    assert outcome_of(small_model("llama")).verdict == "equal"
    model.model.layers[1].self_attn.scaling *= 2
    assert outcome_of(model).verdict in ("differs", "refused")


def no_window(*args: object, sliding_window: int | None = None, **kwargs: object) -> object:
    return selfspec_attention(*args, sliding_window=None, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("checked", [True, False])
def test_attention_that_ignores_the_window_is_noticed(monkeypatch: pytest.MonkeyPatch, checked: bool) -> None:
    """Negative control: the start-up check sees it, and without it the sweep's own comparison does."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION, no_window)
    if not checked:
        monkeypatch.setattr("trl_selfspec.engine.engine.self_check", lambda *args: None)
    assert run_family("cohere2").verdict == ("refused" if checked else "differs")


def test_attention_to_all_of_the_prompt_is_refused() -> None:
    """Prevents causal samples from a policy that is trained to look ahead."""
    config = small_config("gemma3_text")
    config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedModelError):
        SelfSpecEngine(AutoModelForCausalLM.from_config(config).eval(), sweep_families.OPTIONS)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_scaling_by_the_longest_row_is_refused_in_any_layer_type(rope_type: str) -> None:
    """Prevents a row from seeing its neighbours where each layer type has parameters of its own."""
    model = small_model("gemma3_text")
    nested = model.config.rope_parameters["full_attention"]
    nested |= {"rope_type": rope_type, "factor": 4.0}
    with pytest.raises(UnsupportedModelError, match=f"`{rope_type}` depends on the longest row"):
        SelfSpecEngine(model, sweep_families.OPTIONS)


@pytest.mark.parametrize(
    ("family", "values_per_token"),
    [
        ("llama", 4 * 2 * (32 + 32)),  # layers, heads, sizes of a key and a value
        ("gemma4_text", 2 * (32 + 32) + 2 * (16 + 16)),  # the last two of four layers keep none
        ("deepseek_v3", 4 * (24 + 8)),  # a latent and a rotated key, for all heads
    ],
)
@pytest.mark.parametrize("kv_dtype", [None, torch.bfloat16])
def test_memory_per_token_is_what_the_layers_keep(
    family: str, values_per_token: int, kv_dtype: torch.dtype | None
) -> None:
    """Prevents a budget from config fields that differ by layer, or mean something else than what is stored."""
    replica = PolicyReplica(small_model(family))
    size = (kv_dtype or torch.float32).itemsize
    measured = kv_bytes_per_token(replica.model, replica.num_layers, kv_dtype, torch.device("cpu"))
    assert measured == values_per_token * size
    assert not any(getattr(module, "paged_cache", None) for module in replica.model.modules())


@pytest.mark.slow
def test_the_script_writes_what_it_found(tmp_path: Path) -> None:
    """Prevents a table from a run in which a process died without a word."""
    arguments = ["--families", "llama", "mamba", "--table", "models.md", "--json", "sweep.json"]
    program = str(ROOT / "scripts" / "sweep_families.py")
    done = subprocess.run([sys.executable, program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = [Outcome(**values) for values in json.loads((tmp_path / "sweep.json").read_text())]
    assert [(outcome.family, outcome.verdict) for outcome in outcomes] == [("llama", "equal"), ("mamba", "refused")]
    assert (tmp_path / "models.md").read_text() == table(outcomes)


def test_the_documented_table_has_no_fault_and_agrees() -> None:
    """Prevents documentation of another version of the engine."""
    lines = DOCUMENTED.read_text().splitlines()
    rows = dict(line.strip("| ").split(" | ")[:2] for line in lines if line.startswith("| "))
    assert not set(sweep_families.FAULTS) & set(rows.values())
    assert all(rows[family] == "equal" for family in EQUAL)
    assert all(rows[family] == "refused" for family in REFUSED)
