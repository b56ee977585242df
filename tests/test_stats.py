"""Counters merge by addition, ratios are ratios of sums, and names mean what the literature says."""

import json
import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_selfspec.options import MAX_DRAFT_LENGTH
from trl_selfspec.stats import RolloutStats


COUNT = st.integers(0, 2**40)
SECONDS = st.integers(0, 2**30).map(lambda n: n / 1024)  # dyadic, so that sums are exact in any order


@st.composite
def stats(draw: st.DrawFn) -> RolloutStats:
    values = {}
    for f in fields(RolloutStats):
        if f.name.endswith("_s"):
            values[f.name] = draw(SECONDS)
        elif f.name.endswith("_per_position"):
            values[f.name] = draw(st.lists(COUNT, min_size=MAX_DRAFT_LENGTH, max_size=MAX_DRAFT_LENGTH))
        else:
            values[f.name] = draw(COUNT)
    return RolloutStats(**values)


def two_rounds() -> RolloutStats:
    """Two rows, γ = 3: row a accepts 3, row b accepts 1 and is rejected at its second position. Then a plain round."""
    total = RolloutStats(num_rows=2, completion_tokens=8, rollout_s=10.0, prefill_s=1.0)
    total.add_speculative_round(
        2, 3, 6, draft_s=1.0, verify_s=2.0, accepted=[2, 1, 1], examined=[2, 2, 1], plain_round_s=2.0
    )
    total.add_plain_round(2, seconds=2.0)
    return total


@given(stats(), stats(), stats())
def test_merging_is_associative_and_commutative(a: RolloutStats, b: RolloutStats, c: RolloutStats) -> None:
    """Ranks and tool-loop calls arrive in any order."""
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(b) == b.merge(a)
    assert a.merge(RolloutStats()) == a


@given(stats(), stats())
def test_merging_leaves_its_operands_alone(a: RolloutStats, b: RolloutStats) -> None:
    """A list shared between two stats would count a rollout twice."""
    before = a.to_vector(), b.to_vector()
    total = a.merge(b)
    total.add_speculative_round(1, 1, 1, 1.0, 1.0, [1], [1], None)
    assert (a.to_vector(), b.to_vector()) == before


@given(stats(), stats())
def test_a_summed_vector_is_the_merge(a: RolloutStats, b: RolloutStats) -> None:
    """One all-reduce has to give what merging gives; a field left out of the vector would vanish on several ranks."""
    vector = [x + y for x, y in zip(a.to_vector(), b.to_vector(), strict=True)]
    maxima = [max(x, y) for x, y in zip(a.maxima(), b.maxima(), strict=True)]
    assert RolloutStats.from_vector(vector, maxima) == a.merge(b)


def test_a_vector_of_another_length_is_refused() -> None:
    """Ranks on different versions must not add seconds to counts."""
    vector = RolloutStats().to_vector()
    for wrong in (vector[:-1], [*vector, 0.0]):
        with pytest.raises(ValueError, match="RolloutStats"):
            RolloutStats.from_vector(wrong)


def test_bytes_are_not_added_up() -> None:
    """Eight ranks hold eight drafters, each of this size; turns of a conversation share one cache."""
    total = RolloutStats(drafter_bytes=5, kv_bytes=2).merge(RolloutStats(drafter_bytes=3, kv_bytes=7))
    assert (total.drafter_bytes, total.kv_bytes) == (5, 7)


def test_ratios_follow_the_papers() -> None:
    """Accepted / drafted and accepted / examined differ; speed formulas need the second."""
    total = two_rounds()
    assert (total.num_drafts, total.num_draft_tokens, total.num_accepted_tokens) == (2, 6, 4)
    assert total.acceptance_rate == pytest.approx(4 / 6)
    assert total.alpha == pytest.approx(4 / 5)
    assert total.mean_acceptance_length == pytest.approx(1 + 4 / 2)
    assert total.acceptance_rate_per_position == pytest.approx([1.0, 0.5, 0.5])
    assert total.mean_num_speculative_tokens == 3
    assert total.speculative_round_fraction == 0.5


def test_a_position_is_judged_by_the_drafts_that_reached_its_length() -> None:
    """Dividing by all drafts would make late positions look bad whenever short drafts were also used."""
    total = two_rounds()
    total.add_speculative_round(2, 1, 4, 1.0, 1.0, accepted=[2], examined=[2], plain_round_s=2.0)
    assert total.acceptance_rate_per_position == pytest.approx([1.0, 0.5, 0.5])
    by_all_drafts = [a / total.num_drafts for a in total.accepted_per_position[:3]]
    assert by_all_drafts != pytest.approx([1.0, 0.5, 0.5])  # negative control


def test_ratios_are_ratios_of_sums() -> None:
    """A short rollout must not weigh as much as a long one."""
    good, bad = RolloutStats(), RolloutStats()
    good.add_speculative_round(9, 1, 18, 1.0, 1.0, [9], [9], None)
    bad.add_speculative_round(1, 1, 1, 1.0, 1.0, [0], [1], None)
    assert good.merge(bad).alpha == pytest.approx(0.9)
    assert (good.alpha + bad.alpha) / 2 == pytest.approx(0.5)  # negative control: the mean of ratios


def test_speedup_compares_with_plain_rounds_for_the_same_tokens() -> None:
    """6 tokens over 2 rows are 3 plain rounds of 2 s in place of 3 s of speculation; all else is common."""
    assert two_rounds().estimated_speedup == pytest.approx((10 - 3 + 6) / 10)


def test_requantizing_counts_against_speculation() -> None:
    """A speed-up without the drafter's price would flatter every step."""
    total = two_rounds()
    total.requantize_s = 2.0  # on top of the 10 s
    assert total.estimated_speedup == pytest.approx((10 - 3 + 6) / (10 + 2))


def test_without_speculation_the_speedup_is_one() -> None:
    total = RolloutStats(rollout_s=3.0, prefill_s=0.5, refresh_s=4.0)
    total.add_plain_round(4, 1.5)
    assert total.estimated_speedup == 1.0


def test_an_unknown_plain_cost_claims_no_speedup() -> None:
    total = RolloutStats(rollout_s=2.0)
    total.add_speculative_round(1, 2, 3, 1.0, 1.0, [1, 1], [1, 1], plain_round_s=None)
    assert total.estimated_speedup == 1.0


def test_metrics_leave_out_what_is_undefined() -> None:
    """A logger would plot a 0 or NaN acceptance for a rollout without drafts."""
    empty = RolloutStats().metrics()
    assert all(math.isfinite(value) for value in empty.values())
    assert not {"selfspec/acceptance_rate", "selfspec/alpha", "selfspec/estimated_speedup"} & empty.keys()


def test_metrics_carry_the_documented_names() -> None:
    total = two_rounds()
    total.toggle_active_sequences_sum, total.toggle_count = 2, 1
    metrics = total.metrics()
    names = "acceptance_rate alpha mean_acceptance_length num_speculative_tokens speculative_round_fraction "
    names += "toggle_active_sequences tokens_per_s rollout_s refresh_s estimated_speedup drafter_bytes kv_bytes "
    names += "acceptance_rate_pos_0 acceptance_rate_pos_1 acceptance_rate_pos_2"
    assert {f"selfspec/{name}" for name in names.split()} <= metrics.keys()
    assert "selfspec/acceptance_rate_pos_3" not in metrics
    assert all(isinstance(value, float) for value in json.loads(json.dumps(metrics)).values())


def test_ranks_share_seconds_and_add_throughput() -> None:
    """Two ranks that each take 10 s take 10 s, and give twice the tokens per second."""
    one, two = two_rounds().metrics(), two_rounds().merge(two_rounds()).metrics(num_ranks=2)
    assert two["selfspec/rollout_s"] == one["selfspec/rollout_s"]
    assert two["selfspec/tokens_per_s"] == 2 * one["selfspec/tokens_per_s"]
    assert two["selfspec/estimated_speedup"] == one["selfspec/estimated_speedup"]
