"""What a test of a law needs: goodness of fit, family correction, and mutants as negative controls.

P-values come from seeds that are fixed in the tests, so a test passes or fails the same way every time. The odds of a
false alarm that docstrings give are those of a new seed.
"""

import inspect
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
from scipy import stats


FALSE_ALARM = 1e-4  # odds that a family of true laws fails
_SMALLEST_EXPECTED = 5  # below it a cell's count is too skewed for the chi-square approximation


def chi_square(
    counts: np.ndarray,
    law: np.ndarray,  # probabilities, same shape as counts
) -> float:
    """P-value of `counts` under `law`; 0 where something impossible was seen. Rare cells are pooled."""
    observed, expected = counts.ravel().astype(float), counts.sum() * law.ravel().astype(float)
    assert observed.shape == expected.shape
    assert abs(law.sum() - 1) < 1e-6
    if observed[expected == 0].any():
        return 0.0
    order = np.argsort(expected)
    observed, expected = observed[order], expected[order]
    pooled = int((expected < _SMALLEST_EXPECTED).sum())
    while 0 < pooled < len(expected) and expected[:pooled].sum() < _SMALLEST_EXPECTED:
        pooled += 1
    if pooled > 1:
        starts = np.r_[0, np.arange(pooled, len(expected))]
        observed, expected = np.add.reduceat(observed, starts), np.add.reduceat(expected, starts)
    if len(expected) < 2:
        return 1.0
    return float(stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue)


def joint_counts(
    samples: np.ndarray,  # (N, k) ints in [0, size)
    size: int,
) -> np.ndarray:  # (size,) * k
    """How often each k-tuple occurs."""
    shape = (size,) * samples.shape[1]
    return np.bincount(np.ravel_multi_index(tuple(samples.T), shape), minlength=size ** len(shape)).reshape(shape)


def joint_law(conditionals: Sequence[np.ndarray]) -> np.ndarray:
    """The law of a tuple from `conditionals[k]` of shape `(V,) * (k + 1)`: token k given the tokens before it."""
    joint = np.ones(())
    for conditional in conditionals:
        joint = joint[..., None] * conditional
    return joint


def rejected(p_values: Mapping[str, float], false_alarm: float = FALSE_ALARM) -> dict[str, float]:
    """Holm's step-down test: the hypotheses that fail. Odds that a true one is among them: at most `false_alarm`."""
    failed: dict[str, float] = {}
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if p > false_alarm / (len(p_values) - rank):
            break
        failed[name] = p
    return failed


def mutant(module: ModuleType, *replacements: tuple[str, str]) -> ModuleType:
    """A copy of `module` with fragments of its source replaced: the code under test, broken in one known way."""
    source = inspect.getsource(module)
    for old, new in replacements:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
        source = source.replace(old, new)
    broken = ModuleType(f"mutant_of_{module.__name__}")
    exec(compile(source, broken.__name__, "exec"), broken.__dict__)
    return broken
