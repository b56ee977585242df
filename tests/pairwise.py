"""Pairs of values instead of all combinations: where two parameters can break a law together, some test has both.

Most faults need one value or a pair of values (a tail of rows in a dtype, a window over grouped heads). So a product
of many axes repeats itself; `pairwise` keeps as few cases as hold each value of each axis together with each value of
every other. It is a decorator in the place of `pytest.mark.parametrize`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from _pytest.mark.structures import ParameterSet


Pair = tuple[int, int, int, int]  # an axis and the index of a value there, a later axis and the index of a value there


def pairwise(indirect: Sequence[str] = (), **axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by name and values; `indirect` names the fixtures among them.

    Values in `pytest.param` keep their marks, and other values never need them to be covered: a run that leaves a mark
    out still has all pairs of the others.
    """
    unmarked = [[value for value in values if not _is_marked(value)] for values in axes.values()]
    marked = [[value for value in values if _is_marked(value)] for values in axes.values()]
    cases = []
    for picked in itertools.product(*([None, *values] for values in marked)):
        count = sum(value is not None for value in picked)
        found = covering([rest if value is None else [value] for value, rest in zip(picked, unmarked, strict=True)])
        cases += found if count < 2 else found[:1] if count == 2 else []  # two marked values are a pair by themselves
    parameters = [pytest.param(*map(_plain, case), marks=_marks(case)) for case in cases]
    return pytest.mark.parametrize(tuple(axes), parameters, indirect=list(indirect))


def covering(axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Cases that hold every pair of values of any two axes, the same ones each time.

    Greedy: a case starts with the first pair that is missing, and each other axis takes the value that adds the most
    pairs which are missing, of those the one that was taken least.
    """
    if len(axes) == 1:
        return [(value,) for value in axes[0]]
    cases, missing = [], dict.fromkeys(_pairs([range(len(axis)) for axis in axes]))  # a set in the order of its making
    taken = [[0] * len(axis) for axis in axes]
    while missing:
        first, i, second, j = next(iter(missing))
        case = {first: i, second: j}
        for axis in range(len(axes)):
            if axis not in case:
                case[axis] = max(
                    range(len(axes[axis])),
                    key=lambda value: (_gain(axis, value, case, missing), -taken[axis][value]),
                )
        indices = [case[axis] for axis in range(len(axes))]
        for axis, index in enumerate(indices):
            taken[axis][index] += 1
        for pair in _pairs([[index] for index in indices]):
            missing.pop(pair, None)
        cases.append(tuple(axis[index] for axis, index in zip(axes, indices, strict=True)))
    return cases


def _pairs(indices: Sequence[Sequence[int]]) -> list[Pair]:
    axes = itertools.combinations(range(len(indices)), 2)
    return [(a, i, b, j) for a, b in axes for i in indices[a] for j in indices[b]]


def _gain(axis: int, value: int, case: dict[int, int], missing: dict[Pair, None]) -> int:
    pairs = (
        (axis, value, other, index) if axis < other else (other, index, axis, value) for other, index in case.items()
    )
    return sum(pair in missing for pair in pairs)


def _is_marked(value: Any) -> bool:
    return isinstance(value, ParameterSet)


def _plain(value: Any) -> Any:
    return value.values[0] if _is_marked(value) else value


def _marks(case: tuple[Any, ...]) -> list[Any]:
    return [mark for value in case if _is_marked(value) for mark in value.marks]
