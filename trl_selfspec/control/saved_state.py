"""Checks of values that were read from a checkpoint."""

from math import isfinite
from typing import Any


def positive(value: Any, or_zero: bool = False) -> float:
    """Returns `value`.

    Raises:
        ValueError: it is not a finite positive number.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    return checked(number and (value > 0 or (or_zero and value == 0)), value)


def checked(valid: bool, value: Any) -> Any:
    if not valid:
        raise ValueError(f"it holds {value!r}")
    return value
