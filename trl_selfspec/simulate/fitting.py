"""Numbers of a model that best explain some measurements."""

from collections.abc import Callable, Mapping
from math import exp


def fit(
    error: Callable[[Mapping[str, float]], float],
    start: Mapping[str, float],  # all positive
    reach: float = 4.0,
    steps: int = 40,
) -> dict[str, float]:
    """Minimises an error by one number at a time, each within a factor `reach` of its start.

    A step that helps is tried larger next, one that does not smaller.
    """
    values, best = dict(start), error(start)
    widths = dict.fromkeys(start, 0.3)
    for _ in range(steps):
        for name in values:
            for factor in (exp(widths[name]), exp(-widths[name])):
                moved = min(max(values[name] * factor, start[name] / reach), start[name] * reach)
                tried = error(values | {name: moved})
                if tried < best:
                    values[name], best = moved, tried
                    widths[name] *= 1.5
                    break
            else:
                widths[name] /= 2
    return values
