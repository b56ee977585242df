"""What the tests of Triton's draws and verdicts share: scores, addresses, numbers of choice, and broken kernels.

Importing this skips the module where Triton's kernels can't run.
"""

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE

from trl_selfspec.sampling.rng import Purpose, uniform


INTERPRETER_WARNINGS = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),  # numpy's, of NaN and infinity
]
SEED = torch.tensor(7, device=DEVICE)
INF, NAN = float("inf"), float("nan")
LOGPROB = 3e-6  # fp32 sums in another order, and the distance from the maximum rounded twice
NEAR_TIE = 1e-5  # scores plus noise of two words, whose logarithms differ in the last bits
LARGEST_U = 1 - 2.0**-53
MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def random(*shape: int, scale: float = 3.0, seed: int = 0, masked: float = 0.0) -> Tensor:
    """Scores of which a part is -inf, but not word 2."""
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(*shape, generator=generator)
    hidden = torch.rand(*shape, generator=generator) < masked
    hidden[..., 2] = False
    return scores.masked_fill(hidden, -INF).to(DEVICE)


def addresses(num_rows: int, steps: int = 1) -> tuple[Tensor, Tensor]:
    rows = torch.arange(num_rows, device=DEVICE)
    return rows * 3, 5 + rows[:, None] * 2 + torch.arange(steps, device=DEVICE)


def unmixed(z: int) -> int:
    """The inverse of SplitMix64's finaliser."""
    for shift, multiplier in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        z ^= (z >> shift) ^ (z >> 2 * shift)
        z = z * pow(multiplier, -1, 2**64) & MASK
    return z


def row_with(key: int, position: int, purpose: Purpose) -> int:
    """The row whose number for this address is hashed to `key`, so that a test can choose what is drawn."""
    row_key = unmixed(key) - (position * 8 + purpose + 1) * GAMMA & MASK
    row = ((unmixed(row_key) - int(SEED)) * pow(GAMMA, -1, 2**64) - 1) & MASK
    return row - 2**64 if row >= 2**63 else row


def rows_with(u: list[float], position: int, purpose: Purpose) -> Tensor:
    rows = torch.tensor([row_with(int(x * 2**53) << 11, position, purpose) for x in u], device=DEVICE)
    assert torch.equal(
        uniform(SEED, rows, torch.tensor(position, device=DEVICE), purpose).cpu(), torch.tensor(u, dtype=torch.float64)
    )
    return rows


def broken(module: ModuleType, tmp_path: Path, *replacements: tuple[str, str]) -> Any:
    """A copy of `module` with fragments of its source replaced; Triton wants it in a file."""
    source = inspect.getsource(module)
    for old, new in replacements:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
        source = source.replace(old, new)
    path = tmp_path / "broken.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("broken", path)
    assert spec is not None and spec.loader is not None
    result = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(result)
    return result


def log_law(scores: Tensor, tokens: Tensor) -> Tensor:
    return scores.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0].float()


def assert_logprobs(actual: Tensor, scores: Tensor, tokens: Tensor, tolerance: float = LOGPROB) -> None:
    torch.testing.assert_close(actual, log_law(scores, tokens), rtol=LOGPROB, atol=tolerance)


def one_hot(vocab: int, word: int) -> list[float]:
    return [0.0 if i == word else -INF for i in range(vocab)]
