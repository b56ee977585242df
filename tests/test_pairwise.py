"""`pairwise` leaves out combinations and no pair."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from pairwise import covering, pairwise


AXES = st.lists(st.integers(1, 7).map(lambda size: list(range(size))), min_size=1, max_size=5)


def pairs_left_out(cases: Sequence[tuple[Any, ...]], axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """By definition, and in another way than the helper counts them."""
    return [
        (first, x, second, y)
        for first, second in itertools.combinations(range(len(axes)), 2)
        for x in axes[first]
        for y in axes[second]
        if not any(case[first] == x and case[second] == y for case in cases)
    ]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(AXES)
def test_every_pair_of_values_occurs_in_cases_that_repeat(axes: list[list[int]]) -> None:
    """Prevents a fault of two values that no test meets, and test names that differ between xdist's workers."""
    cases = covering(axes)
    assert not pairs_left_out(cases, axes)
    assert cases == covering(axes) and len(cases) == len(set(cases)) <= math.prod(map(len, axes))
    assert {case[0] for case in cases} == set(axes[0])


def test_a_case_that_is_missing_is_noticed() -> None:
    """Negative control: the last case holds a pair that no other one holds."""
    axes = [range(4), range(3), range(3), range(2)]
    assert pairs_left_out(covering(axes)[:-1], axes)


def test_it_is_much_less_than_the_product() -> None:
    """17 x 5 x 3 x 2 x 2 = 1,020 cases of one kernel were half of a file's time; no fewer than 17 x 5 can do."""
    assert len(covering([range(17), range(5), range(3), range(2), range(2)])) <= 90


def test_values_that_are_skipped_cover_nothing_for_the_others() -> None:
    """A GPU's dtype among others: where it is skipped, its cases must not be the only ones with some pair."""
    dtypes = ["fp32", pytest.param("bf16", marks=pytest.mark.gpu), "fp16"]
    steps, windows = [1, 2, 5, pytest.param(17, marks=pytest.mark.slow)], [None, 20]
    names, cases = pairwise(dtype=dtypes, steps=steps, window=windows).args
    assert names == ("dtype", "steps", "window")

    def marked(*marks: str) -> list[tuple[Any, ...]]:
        return [case.values for case in cases if sorted(mark.name for mark in case.marks) == sorted(marks)]

    assert not pairs_left_out(marked(), [["fp32", "fp16"], [1, 2, 5], windows])
    assert not pairs_left_out(marked("gpu"), [["bf16"], [1, 2, 5], windows])
    assert not pairs_left_out(marked("slow"), [["fp32", "fp16"], [17], windows])
    assert [case[:2] for case in marked("gpu", "slow")] == [("bf16", 17)]


@pairwise(indirect=["doubled"], doubled=[1, 2], plain=["a"])
def test_fixtures_may_be_among_the_parameters(doubled: int, plain: str) -> None:
    assert (doubled, plain) in ((2, "a"), (4, "a"))


@pytest.fixture
def doubled(request: pytest.FixtureRequest) -> int:
    return 2 * request.param
