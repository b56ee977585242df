"""The acceptance measurement: refreshed drafters follow the policy, stale ones do not, and its sums are right."""

import json
from pathlib import Path

import make_tiny_policy
import measure_acceptance
import pytest
import torch
from measure_acceptance import KINDS, QTYPES, AcceptanceProbe, pooled
from transformers import GenerationConfig


pytestmark = pytest.mark.slow  # results of experiments stand in docs/LOG.md


# What the recipe's parser gets besides: small enough for a test.
SMALL_STEPS = "--max_steps 2 --measure_every 1 --num_prompts 4 --per_device_train_batch_size 8 --num_problems 16"
SMALL_STEPS += " --max_completion_length 16"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained: its law is nearly uniform, so drafts stand as long as the weights are about the same."""
    path = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    make_tiny_policy.make_model().save_pretrained(path)
    make_tiny_policy.make_tokenizer().save_pretrained(path)
    return path


def test_only_the_refreshed_drafter_follows_the_policy() -> None:
    """A stale drafter that is refreshed after all would show that refreshing is not worth its seconds.

    At step 0 both are the same drafter with the same noise. Then all Linear weights change by much: whoever drafts
    with the old ones loses. 24 rows of up to 16 tokens put alpha within 0.04.
    """
    torch.manual_seed(0)
    model = make_tiny_policy.make_model()
    linear = [module.weight for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    with torch.no_grad():
        for weight in linear:
            weight.mul_(5)  # default weights are so small that every law is the same
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=16)
    probe = AcceptanceProbe(model, make_tiny_policy.make_tokenizer(), 24, 1, None, config)
    probe.measure(0)
    with torch.no_grad():
        for weight in linear:
            weight.add_(weight.std() * torch.randn_like(weight))
    probe.measure(1)
    before, after = probe.points
    assert before["relative_weight_change"] == 0 and after["relative_weight_change"] > 0.1
    for qtype in QTYPES:
        refreshed, stale = (f"{qtype} {kind}" for kind in KINDS)
        assert before[refreshed] == before[stale]
        assert after[refreshed]["alpha"] > 0.9
        assert after[stale]["alpha"] < after[refreshed]["alpha"] - 0.05


def test_alpha_is_pooled_as_a_ratio_of_sums() -> None:
    """A mean over steps would count a step of few tokens as much as one of many; step 0 has no stale drafter."""
    names = [f"{qtype} {kind}" for qtype in QTYPES for kind in KINDS]
    shares = [(0.1, 1000), (1.0, 100), (0.5, 300)]
    points = [{name: {"alpha": alpha, "examined": n} for name in names} for alpha, n in shares]
    assert pooled(points)[names[0]]["alpha"] == pytest.approx(250 / 400)
    assert pooled(points)[names[0]]["examined"] == 400


def test_it_runs_from_the_command_line(policy: Path, tmp_path: Path) -> None:
    """Arguments that are not its own go to the recipe."""
    out = tmp_path / "alpha"
    measure_acceptance.main(
        ["--policy", str(policy), "--out", str(out), "--output_dir", str(tmp_path), *SMALL_STEPS.split()]
    )
    result = json.loads(out.with_suffix(".json").read_text())
    assert [point["step"] for point in result["points"]] == [0, 1, 2]
    assert len(result["rewards"]) == 2 and result["training"]["completions_per_step"] == 8
    assert result["pooled_after_step_0"].keys() == {f"{qtype} {kind}" for qtype in QTYPES for kind in KINDS}
    assert result["provenance"]["argv"][0] == "measure_acceptance.py"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
