"""The cost model against measurements that it was not fitted to. docs/advise.md has the table."""

from dataclasses import replace
from pathlib import Path

import accuracy
import pytest
from accuracy import a100_ratios, cpu_ratios, cpu_run, error, h200_ratios, nvidia_ratios, same_side, worst


GAIN_BAR = 0.07  # of a round on an A100, engine fitted on two models, predicting the third
DOCS = Path(__file__).parents[2] / "docs" / "advise.md"


def test_the_gain_of_a_round_on_an_a100() -> None:
    """Prevents advice that is wrong on a device and engine that others measured."""
    assert error(a100_ratios("gain", fitted=True)) < GAIN_BAR
    assert error(a100_ratios("gain", fitted=False)) < 0.09  # nothing of theirs but the table of products
    assert same_side(fitted=True) > 0.92
    assert same_side(fitted=False) > 0.92


@pytest.mark.parametrize(("part", "bar"), [("plain", 0.05), ("draft", 0.07), ("verify", 0.08)])
def test_the_parts_of_a_round_on_an_a100(part: str, bar: float) -> None:
    """Prevents a gain that is right because two errors cancel."""
    assert error(a100_ratios(part, fitted=True)) < bar


@pytest.mark.parametrize("fitted", [True, False])
def test_a_hard_maximum_misses_the_bars(fitted: bool) -> None:
    """Negative control: the roofline that both papers use, in the place of the p-norm."""
    assert error(a100_ratios("gain", fitted, hard_maximum=True)) > GAIN_BAR
    assert error(a100_ratios("verify", fitted, hard_maximum=True)) > 0.09


def test_steps_of_our_engine_on_an_h200() -> None:
    """A number set to 7B at one row has to tell the other five."""
    assert worst(h200_ratios("Qwen2.5-7B")) < 0.06
    assert worst(h200_ratios("Qwen2.5-1.5B")) < 0.13


def test_rollouts_of_our_engine_on_a_cpu() -> None:
    """Whole rollouts, from the times of products and two numbers of a rollout of one row."""
    assert worst(cpu_ratios("gain")) < 0.05
    assert worst(cpu_ratios("seconds")) < 0.07


def test_without_its_longest_row_a_rollout_gains_much_less() -> None:
    """Negative control: lengths decide, so a simulation that takes their mean would be seen."""
    _, gain, _, measured = cpu_run("150m_bf16_longtail16")
    _, without, _, _ = cpu_run("150m_bf16_longtail16", keep_longest=False)
    assert abs(gain / measured - 1) < 0.05
    assert without < 0.9 * gain


def test_nvidias_projections_for_235b() -> None:
    """Prevents a model that holds on one GPU and not on thousands: experts, all-reduce, FP8."""
    assert worst(nvidia_ratios()) < 0.12
    assert worst(accuracy.step_ratios()) < 0.01


def test_projections_without_touched_experts_are_off() -> None:
    """Negative control: a dense model of the weights that a token uses, of which all tokens read the same."""
    shape = accuracy.SHAPES["Qwen3-235B-A22B"]
    dense = replace(shape, experts=0, inner=shape.experts_used * shape.expert_inner)
    assert worst(nvidia_ratios(shape=dense)) > 0.12


def test_the_table_in_the_docs_is_this_one() -> None:
    """A table that is not made again is wrong after the next change of the model."""
    assert accuracy.as_text() in DOCS.read_text()
