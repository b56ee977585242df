"""Counters merge by addition, ratios are ratios of sums, and names mean what the literature says."""

import copy
import json
import math
from dataclasses import asdict, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_selfspec.control.counters import Counters
from trl_selfspec.control.stats import PlainComparison, RolloutStats
from trl_selfspec.options import MAX_DRAFT_LENGTH


COUNT = st.integers(0, 2**40)
SECONDS = st.integers(0, 2**30).map(lambda n: n / 1024)  # dyadic, so that sums are exact in any order


@st.composite
def counters(draw: st.DrawFn, kind: type[Counters]) -> Counters:
    values: dict[str, Any] = {}
    for f in fields(kind):  # type: ignore[arg-type]
        if f.name.endswith("_per_position"):
            values[f.name] = draw(st.lists(COUNT, min_size=MAX_DRAFT_LENGTH, max_size=MAX_DRAFT_LENGTH))
        elif "values" in f.metadata:
            values[f.name] = draw(st.dictionaries(st.sampled_from("ab"), counters(f.metadata["values"])))
        else:
            values[f.name] = draw(COUNT if f.type is int else SECONDS)
    return kind(**values)


def stats() -> st.SearchStrategy:
    return counters(RolloutStats)


def two_rounds() -> RolloutStats:
    """Two rows, γ = 3: row a accepts 3, row b accepts 1 and is rejected at its second position. Then a plain round."""
    total = RolloutStats(num_rows=2, completion_tokens=8, rollout_s=10.0, prefill_s=1.0)
    total.add_speculative_round("qint4", 2, 3, draft_s=1.0, verify_s=2.0, accepted=[2, 1, 1], examined=[2, 2, 1])
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
    before = copy.deepcopy((a, b))
    total = a.merge(b)
    total.add_speculative_round("qint4", 1, 1, 1.0, 1.0, [1], [1])
    total.add_segment(1.0, 1.0)
    assert (a, b) == before


@given(stats())
def test_stats_go_through_json(a: RolloutStats) -> None:
    """A checkpoint holds them; a field left out would vanish from a resumed run's figures."""
    assert RolloutStats.from_dict(json.loads(json.dumps(asdict(a)))) == a


def test_a_counter_that_a_file_lacks_is_zero() -> None:
    """Files of an earlier version have fewer counters."""
    values = asdict(two_rounds())
    del values["segments"]
    assert RolloutStats.from_dict(values) == two_rounds()


@pytest.mark.parametrize(
    "values", [[1.0], {"num_rows": "2"}, {"num_rows": -1}, {"examined_per_position": [1]}, {"by_drafter": 1}]
)
def test_what_is_no_stats_is_refused(values: Any) -> None:
    """A damaged file must not end a run with a TypeError hours later, when it is added up."""
    with pytest.raises(ValueError, match="it holds"):
        RolloutStats.from_dict(values)


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
    total.add_speculative_round("qint4", 2, 1, 1.0, 1.0, accepted=[2], examined=[2])
    assert total.acceptance_rate_per_position == pytest.approx([1.0, 0.5, 0.5])
    by_all_drafts = [a / total.num_drafts for a in total.accepted_per_position[:3]]
    assert by_all_drafts != pytest.approx([1.0, 0.5, 0.5])  # negative control


def test_ratios_are_ratios_of_sums() -> None:
    """A short rollout must not weigh as much as a long one."""
    good, bad = RolloutStats(), RolloutStats()
    good.add_speculative_round("qint4", 9, 1, 1.0, 1.0, [9], [9])
    bad.add_speculative_round("qint4", 1, 1, 1.0, 1.0, [0], [1])
    assert good.merge(bad).alpha == pytest.approx(0.9)
    assert (good.alpha + bad.alpha) / 2 == pytest.approx(0.5)  # negative control: the mean of ratios


def compared(*segments: tuple[float, float]) -> RolloutStats:
    """The rounds above, and as many segments: seconds of speculative rounds, and of plain ones for their tokens."""
    total = two_rounds()
    for seconds, plain_s in segments:
        total.add_segment(seconds, plain_s)
    return total


def test_speedup_compares_with_plain_rounds_for_the_same_tokens() -> None:
    """3 s of speculation that plain rounds would have taken twice as long for; all else is common."""
    total = compared((1.0, 2.0), (1.0, 2.0), (1.0, 2.0))
    assert total.estimated_speedup == pytest.approx((10 - 3 + 6) / 10)
    assert total.estimated_speedup_error == 0.0


def test_requantizing_counts_against_speculation() -> None:
    """A speed-up without the drafter's price would flatter every step; what plain rounds need too counts for both."""
    total = compared((1.0, 2.0), (1.0, 2.0), (1.0, 2.0))
    total.refresh_s, total.requantize_s = 2.5, 2.0  # on top of the 10 s
    assert total.estimated_speedup == pytest.approx((10.5 - 3 + 6) / 12.5)


def test_the_error_is_that_of_a_ratio_estimator() -> None:
    """Against the jackknife over segments, to first order; segments of one ratio have none, whatever their sizes."""
    segments = [(1.0, 1.9), (1.2, 2.5), (0.9, 1.8), (1.1, 2.1), (1.0, 2.05)] * 4
    total = compared(*segments)
    total.rollout_s = 1e-9 + total.draft_s + total.verify_s  # all of it: the ratio itself
    x, y = (sum(values) for values in zip(*segments, strict=True))
    left_out = [(y - b) / (x - a) for a, b in segments]
    mean, n = sum(left_out) / len(left_out), len(segments)
    jackknife = math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in left_out))
    assert total.estimated_speedup == pytest.approx(y / x)
    assert total.estimated_speedup_error == pytest.approx(jackknife, rel=0.02)
    assert compared((1.0, 2.0), (2.0, 4.0), (0.5, 1.0)).estimated_speedup_error == pytest.approx(0.0, abs=1e-9)


def test_without_speculation_the_speedup_is_one() -> None:
    total = RolloutStats(rollout_s=3.0, prefill_s=0.5, refresh_s=4.0)
    total.add_plain_round(4, 1.5)
    assert (total.estimated_speedup, total.estimated_speedup_error) == (1.0, 0.0)


@pytest.mark.parametrize("segments", [[], [(1.5, 9.0)] * 2, [(0.1, 0.9)] * 3])
def test_too_few_plain_rounds_claim_no_speedup(segments: list[tuple[float, float]]) -> None:
    """None, two segments, and three that cover a tenth of the speculative rounds."""
    total = compared(*segments)
    assert total.estimated_speedup is None and total.estimated_speedup_error is None
    assert not [name for name in total.metrics() if "speedup" in name]


def test_speculative_rounds_are_compared_with_the_nearest_plain_ones() -> None:
    """The machine becomes twice as slow in the middle: each half has its own price."""
    total = RolloutStats()
    comparison = PlainComparison(total)
    comparison.add_plain_round(seconds=1.0, usual_s=1.0)
    for seconds in (1.0, 2.0):
        comparison.add_speculative_round(seconds, tokens=2.0, usual_s=1.0)
    comparison.add_plain_round(seconds=2.0, usual_s=1.0)
    comparison.add_speculative_round(2.0, tokens=2.0, usual_s=1.0)
    comparison.end()
    assert (total.segments, total.segment_s, total.segment_plain_s) == (2, 1.0 + 4.0, 2.0 + 8.0)


def test_a_plain_round_of_another_size_is_scaled() -> None:
    """Rows end: of plain rounds only what sizes cost beside each other is taken from other minutes."""
    total = RolloutStats()
    comparison = PlainComparison(total)
    comparison.add_plain_round(seconds=4.0, usual_s=2.0)
    comparison.add_speculative_round(1.0, tokens=1.5, usual_s=1.0)
    comparison.end()
    assert total.segment_plain_s == 1.5 * 2.0


def test_a_long_run_of_plain_rounds_prices_only_what_is_near() -> None:
    """Its end may be minutes away from the rounds before it."""
    total = RolloutStats()
    comparison = PlainComparison(total)
    comparison.add_speculative_round(1.0, tokens=1.0, usual_s=1.0)
    for seconds in [1.0] * 4 + [3.0] * 40:
        comparison.add_plain_round(seconds, usual_s=1.0)
    comparison.end()
    assert total.segment_plain_s == 1.0


def test_metrics_leave_out_what_is_undefined() -> None:
    """A logger would plot a 0 or NaN acceptance for a rollout without drafts."""
    empty = RolloutStats().metrics()
    assert all(math.isfinite(value) for value in empty.values())
    assert not {"selfspec/acceptance_rate", "selfspec/alpha", "selfspec/estimated_speedup"} & empty.keys()


def test_metrics_carry_the_documented_names() -> None:
    total = compared((1.0, 2.0), (1.0, 2.0), (1.0, 2.5))
    total.toggle_active_sequences_sum, total.toggle_count = 2, 1
    metrics = total.metrics()
    names = "acceptance_rate alpha mean_acceptance_length num_speculative_tokens speculative_round_fraction "
    names += "toggle_active_sequences tokens_per_s rollout_s refresh_s estimated_speedup drafter_bytes kv_bytes "
    names += "estimated_speedup_error "
    names += "acceptance_rate_pos_0 acceptance_rate_pos_1 acceptance_rate_pos_2 "
    names += "qint4_round_fraction qint4_mean_acceptance_length qint4_draft_s qint4_acceptance_rate_pos_2"
    assert {f"selfspec/{name}" for name in names.split()} <= metrics.keys()
    assert "selfspec/acceptance_rate_pos_3" not in metrics
    assert all(isinstance(value, float) for value in json.loads(json.dumps(metrics)).values())


def test_ranks_share_seconds_and_add_throughput() -> None:
    """Two ranks that each take 10 s take 10 s, and give twice the tokens per second."""
    rank = compared((1.0, 2.0), (1.0, 2.0), (1.0, 2.5))
    one, two = rank.metrics(), rank.merge(rank).metrics(num_ranks=2)
    assert two["selfspec/rollout_s"] == one["selfspec/rollout_s"]
    assert two["selfspec/tokens_per_s"] == 2 * one["selfspec/tokens_per_s"]
    assert two["selfspec/estimated_speedup"] == one["selfspec/estimated_speedup"]
