"""The fluid rollout against exact sums, drawn acceptances and what must hold on any machine."""

import random
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from accuracy import SHAPES
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_selfspec.control.rates import PLAIN, Choice
from trl_selfspec.simulate.costs import Costs, Draft
from trl_selfspec.simulate.engines import eagle, quantized, self_drafting, small_model, suffix, target
from trl_selfspec.simulate.hardware import find_device
from trl_selfspec.simulate.rollout import Work, read_lengths, rollout, slowest


A100 = find_device("a100")
COSTS = self_drafting(SHAPES["Qwen2.5-7B"], A100, 0.95)
LONGTAIL = Work.lognormal(32, 250, 1500, 4096)


def drawn_seconds(costs: Costs, work: Work, choice: Choice, seed: int) -> float:
    """A rollout whose drafts are accepted by chance, round by round."""
    generator, alpha = random.Random(seed), costs.by_name[choice.drafter].alpha
    left, grown, seconds = list(work.lengths), [0] * len(work.lengths), costs.target.prefill_s(work.prefilled)
    while left:
        seconds += costs.round_s(len(left), choice, work.prompt + mean(grown))
        kept = []
        for a, b in zip(left, grown, strict=True):
            accepted = next((k for k in range(choice.gamma) if generator.random() >= alpha), choice.gamma)
            if a > accepted + 1:
                kept.append((a - accepted - 1, b + accepted + 1))
        left, grown = [a for a, _ in kept], [b for _, b in kept]
    return seconds


@pytest.mark.parametrize("gamma", [2, 5, 8])
def test_the_fluid_is_within_1_percent_of_drawn_rollouts(gamma: int) -> None:
    """Prevents a gain that leaves out what chance and last rounds cost."""
    costs = replace(COSTS, drafts=(replace(COSTS.drafts[0], prepare_s=0.0),))
    choice = Choice(gamma, "qint4")
    drawn = mean(drawn_seconds(costs, LONGTAIL, choice, seed) for seed in range(4))
    assert rollout(costs, LONGTAIL, choice).seconds == pytest.approx(drawn, rel=0.01)


def test_a_fluid_that_counts_every_draft_as_accepted_is_noticed() -> None:
    """Negative control."""
    choice = Choice(5, "qint4")
    drawn = drawn_seconds(COSTS, LONGTAIL, choice, 0)
    wrong = replace(COSTS, drafts=(replace(COSTS.drafts[0], alpha=1.0),))
    assert rollout(wrong, LONGTAIL, choice).seconds < 0.95 * drawn


def test_a_plain_fluid_is_the_sum_of_its_rounds() -> None:
    """Strides over growing contexts must not lose seconds."""
    left, seconds, step = sorted(LONGTAIL.lengths), COSTS.target.prefill_s(LONGTAIL.prefilled), 0
    while left:
        seconds += COSTS.round_s(len(left), PLAIN, LONGTAIL.prompt + step + 0.5)
        step += 1
        left = [n for n in left if n > step]
    assert rollout(COSTS, LONGTAIL, PLAIN).seconds == pytest.approx(seconds, rel=1e-3)


def test_rows_that_do_not_fit_wait() -> None:
    """Fewer slots take longer, and the tokens are the same."""
    whole, half = (rollout(COSTS, replace(LONGTAIL, slots=n), PLAIN) for n in (None, 8))
    assert half.seconds > whole.seconds
    assert rollout(COSTS, replace(LONGTAIL, slots=1), PLAIN).rounds == pytest.approx(sum(LONGTAIL.lengths))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 96), alpha=st.floats(0.3, 0.99), context=st.integers(64, 8192), gamma=st.integers(1, 8))
def test_gains_move_the_way_they_must(rows: int, alpha: float, context: int, gamma: int) -> None:
    """Better drafts gain more, dearer ones less, and a draft as dear as a plain round nothing."""
    draft = COSTS.drafts[0]
    assert draft.network is not None
    choice = Choice(gamma, "qint4")

    def gain(draft: Draft, choice: Choice = choice) -> float:
        return replace(COSTS, drafts=(draft,)).gain(rows, choice, context)

    better, worse = replace(draft, alpha=min(1.0, alpha + 0.05)), replace(draft, alpha=alpha)
    assert gain(better) > gain(worse)
    over = draft.network.overheads
    dear = replace(draft.network, overheads=replace(over, layer_us=over.layer_us + 50))
    assert gain(replace(worse, network=dear)) < gain(worse)
    same = replace(COSTS, drafts=(replace(draft, network=COSTS.target),))
    assert same.best(rows, context) == PLAIN
    assert COSTS.best(4096, context) == PLAIN  # beyond the ridge


def test_every_kind_of_drafter_has_a_price() -> None:
    """A suffix draft costs the same at any length, a head less than a small model, and that less than the policy."""
    network = target(SHAPES["Qwen2.5-7B"], A100)
    head, small = eagle(network, 0.7), small_model(network, SHAPES["Qwen2.5-1.5B"], 0.8)
    own, copied = quantized(network, A100, 0.96), suffix(0.2)
    assert copied.seconds(8, 1, 1000) == copied.seconds(8, 8, 1000)
    assert copied.traits.per_round and not own.traits.per_round
    assert (
        head.seconds(8, 1, 1000) < small.seconds(8, 1, 1000) < own.seconds(8, 1, 1000) < network.forward_s(8, 1, 1000)
    )
    both = Costs(network, (copied, own))
    assert both.best(1, 1000).drafter == "qint4"
    assert Costs(network, (suffix(0.6), own)).best(1, 1000).drafter == "suffix"


def test_the_slowest_rank_decides() -> None:
    """A step waits for the rank with the longest row."""
    works = LONGTAIL.ranks(4)
    assert sorted(n for work in works for n in work.lengths) == sorted(LONGTAIL.lengths)
    seconds = [rollout(COSTS, work).seconds for work in works]
    assert slowest(COSTS, works).seconds == max(seconds) >= mean(seconds)


def test_lengths_are_read_from_numbers_ids_and_objects(tmp_path: Path) -> None:
    """What users have: a column of numbers, token ids, or a log of completions."""
    path = tmp_path / "lengths.jsonl"
    path.write_text('12\n[1, 2, 3]\n{"length": 40}\n\n{"completion_ids": [5, 6]}\n')
    assert read_lengths(path) == [12, 3, 40, 2]
    path.write_text('12\n{"completion": "It is 4."}\n')
    with pytest.raises(ValueError, match=r"Line 2 .* tokenized first"):
        read_lengths(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no lengths"):
        read_lengths(path)
