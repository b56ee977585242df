"""Arithmetic word problems in the manner of GSM8K, generated: real text for a real model, and an exact reward."""

import random
import re
from typing import Any

from datasets import Dataset


NAMES = ("Ada", "Ben", "Clara", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lin", "Maya")
THINGS = ("apples", "stickers", "marbles", "pencils", "books", "cookies", "shells", "stamps", "oranges", "cards")
# Each with its answer, of numbers a > b and c from 2 to 9.
PROBLEMS = (
    ("{x} has {a} {t}. {x} gives {b} of them to {y}. How many {t} does {x} have left?", lambda a, b, c: a - b),
    ("{x} has {a} {t} and {y} has {b} more than {x}. How many {t} do they have together?", lambda a, b, c: 2 * a + b),
    ("A box holds {a} {t}. How many {t} are there in {c} boxes?", lambda a, b, c: a * c),
    (
        "{x} buys {c} packs of {a} {t} each, and then loses {b} {t} on the way home. How many {t} are left?",
        lambda a, b, c: a * c - b,
    ),
    (
        "{x} reads {b} pages in the morning and {a} pages in the evening. At this pace, how many pages does {x} read "
        "in {c} days?",
        lambda a, b, c: (a + b) * c,
    ),
    (
        "A shop had {a} {t} on Monday. It sold {b} of them on Tuesday, and on Wednesday {c} crates arrived with {b} "
        "{t} in each. How many {t} does the shop have now?",
        lambda a, b, c: a - b + c * b,
    ),
    (
        "{x} saves {b} dollars a week for {c} weeks. A bicycle costs {a} dollars more than what {x} has saved by "
        "then. How much does the bicycle cost?",
        lambda a, b, c: b * c + a,
    ),
    (
        "{x}, {y} and their {c} cousins each bring {b} {t} to a party, where {a} {t} are on the table already. How "
        "many {t} are there in all?",
        lambda a, b, c: (c + 2) * b + a,
    ),
)


def make_dataset(num_problems: int, seed: int) -> Dataset:
    """Conversational prompts with a column `solution`."""
    rng, rows = random.Random(seed), []
    for _ in range(num_problems):
        text, solve = rng.choice(PROBLEMS)
        b = rng.randint(3, 20)
        a, c = b + rng.randint(1, 60), rng.randint(2, 9)
        x, y = rng.sample(NAMES, 2)
        question = text.format(a=a, b=b, c=c, x=x, y=y, t=rng.choice(THINGS))
        rows.append({"prompt": [{"role": "user", "content": question}], "solution": str(solve(a, b, c))})
    return Dataset.from_list(rows)


def answer_reward(completions: list[list[dict[str, str]]], solution: list[str], **kwargs: Any) -> list[float]:
    """1 where the last number is the right one, 0.1 where there is another one, else 0."""
    rewards = []
    for completion, right in zip(completions, solution, strict=True):
        numbers = re.findall(r"\d+", completion[-1]["content"].replace(",", ""))
        rewards.append((1.0 if numbers[-1] == right else 0.1) if numbers else 0.0)
    return rewards
