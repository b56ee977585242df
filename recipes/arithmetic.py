"""The embedded default's task: products by repeated addition, an exact reward, and where its small policy is kept.

`4*17=?` is answered by `1:17 2:34 3:51 4:68`. A completion's length follows the first factor, which has a long-tailed
law, so rollouts have the tail that answers to real problems have; one wrong sum makes all later ones wrong.
"""

import hashlib
import os
import random
from pathlib import Path
from typing import Any

from datasets import Dataset


SOURCES = (Path(__file__), Path(__file__).parents[1] / "scripts" / "make_tiny_policy.py")
CHARACTERS = "0123456789:*=? "
LARGEST_COUNT, LARGEST_SUMMAND = 40, 19


def tiny_policy_dir(size: str = "3m") -> Path:
    """Where the small policy is kept; another directory as soon as the task or its training changes."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "trl_selfspec" / f"tiny_policy-{size}-{digest[:12]}"


def sample_factors(rng: random.Random) -> tuple[int, int]:
    """How many times to add what. The count is log-normal: median 4, one in a hundred above 25."""
    count = round(rng.lognormvariate(1.39, 0.8))
    return min(max(count, 1), LARGEST_COUNT), rng.randint(2, LARGEST_SUMMAND)


def worked_steps(count: int, summand: int) -> str:
    """`worked_steps(3, 17)` is `1:17 2:34 3:51`."""
    return " ".join(f"{i}:{i * summand}" for i in range(1, count + 1))


def make_dataset(num_problems: int, seed: int, with_completion: bool = False) -> Dataset:
    """Conversational prompts with a column `solution`; with the worked `completion` for supervised training."""
    rng, rows = random.Random(seed), []
    for _ in range(num_problems):
        count, summand = sample_factors(rng)
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": f"{count}*{summand}=?"}]}
        if with_completion:
            row["completion"] = [{"role": "assistant", "content": worked_steps(count, summand)}]
        else:
            row["solution"] = f"{count}:{count * summand}"
        rows.append(row)
    return Dataset.from_list(rows)


def product_reward(completions: list[list[dict[str, str]]], solution: list[str], **kwargs: Any) -> list[float]:
    """1 where the last step is the right one, else 0."""
    last_steps = [completion[-1]["content"].rpartition(" ")[2] for completion in completions]
    return [float(step == right) for step, right in zip(last_steps, solution, strict=True)]
