"""Conversations with an engine: prompts that go on from earlier completions, and pages small enough to matter."""

from typing import Any

import pytest
from tiny_models import built_once, ragged_prompts, spoil
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec.control.controller import Controller
from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.engine.cuda_graphs import Capture
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions


PROMPTS = ragged_prompts([9, 1, 20, 3, 14, 6, 2, 11])
EOS = list(range(20, 34))
GREEDY = GenerationConfig(max_new_tokens=14, do_sample=False, eos_token_id=EOS)
SAMPLED = GenerationConfig(max_new_tokens=14, do_sample=True, top_k=0, temperature=0.8, eos_token_id=EOS)
PAGES = pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "pages"])


def make_engine(
    model: PreTrainedModel,
    gamma: int = 3,
    controller: Controller | None = None,
    capture: Capture | None = None,
    **values: Any,
) -> SelfSpecEngine:
    defaults = {"draft_qtype": "qint4", "num_speculative_tokens": gamma, "max_active_sequences": 64}
    engine = SelfSpecEngine(model, SelfSpecOptions(**defaults | values), controller=controller, capture=capture)
    spoil(engine, noise=0.1)
    return engine


shared_engine = built_once(make_engine)
reference_engine = built_once(make_engine)  # for what is expected of it


def next_prompts(prompts: list[list[int]], completions: list[list[int]], turn: int) -> list[list[int]]:
    """Two of three rows go on, each after a tool's answer of its own length."""
    tools = ragged_prompts([1 + (3 * row + turn) % 7 for row in range(len(prompts))], seed=turn)
    rows = [row for row in range(len(prompts)) if (row + turn) % 3]
    return [prompts[row] + completions[row] + tools[row] for row in rows]


def converse(
    engine: SelfSpecEngine, config: GenerationConfig, keep: bool, turns: int = 3
) -> tuple[list[list[list[int]]], RolloutStats]:
    """Completions of each turn, and the sum of all counters."""
    prompts, completions, stats = PROMPTS, [], RolloutStats()
    for turn in range(turns):
        output = engine.generate(prompts, config, seed=turn, keep=keep)
        completions.append(output.completion_ids)
        stats += output.stats
        prompts = next_prompts(prompts, output.completion_ids, turn)
    return completions, stats
