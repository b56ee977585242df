"""Measures the rounds of this machine: the engine's own programs, on a model of the shape with random weights."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from trl_selfspec.control.controller import Controller
from trl_selfspec.control.drafters import DrafterTraits
from trl_selfspec.control.rates import PLAIN, Choice
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import DRAFT_QTYPES, SelfSpecOptions
from trl_selfspec.simulate.measured import Measurements


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS = {"cpu": (1, 2, 4), "cuda": (1, 8, 32)}
DRAFT_LENGTHS = (2, 6)
ROUNDS, PROMPT = 16, 64
REPEATS = 3  # after one that loads kernels or captures; the fastest counts


class Scripted(Controller):
    """Runs rounds of one kind."""

    script = PLAIN

    def choose(self, rows: int) -> Choice:
        return self.script


def measure(path: Path, dtype: str) -> tuple[Measurements, str | None, float]:
    """Seconds of rounds, the name of the GPU if there is one, and the bytes of the device's memory."""
    if dtype not in DTYPES:
        raise ValueError(f"--here runs in {' or '.join(DTYPES)}, not in {dtype}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = AutoConfig.from_pretrained(path if path.is_dir() else path.parent, local_files_only=True)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    model.eval().requires_grad_(False)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    control = Scripted([DrafterTraits(qtype) for qtype in DRAFT_QTYPES])
    engine = SelfSpecEngine(model, SelfSpecOptions(drafter="quantized"), controller=control)
    engine.refresh()
    (drafter,) = engine.drafters
    found = Measurements({}, {}, {})
    for rows in ROWS[device.type]:
        for choice in (PLAIN, *(Choice(gamma, drafter) for gamma in DRAFT_LENGTHS)):
            control.script = choice
            _measure(engine, rows, choice.gamma, found)
    if device.type == "cpu":
        return found, None, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    properties = torch.cuda.get_device_properties(device)
    return found, properties.name, float(properties.total_memory)


def _measure(engine: SelfSpecEngine, rows: int, gamma: int, found: Measurements) -> None:
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=ROUNDS * (1 if gamma == 0 else 2))
    for seed in range(REPEATS + 1):
        prompts = [[token % engine._vocab_size for token in range(row, row + PROMPT)] for row in range(rows)]
        stats = engine.generate(prompts, config, seed=seed).stats
        if seed == 0:
            continue
        if gamma == 0:
            _least(found.plain, rows, stats.plain_s / stats.plain_rounds)
        else:
            _least(found.draft, rows, stats.draft_s / stats.draft_steps)
            _least(found.verify, (rows, gamma + 1), stats.verify_s / stats.num_rounds_speculative)


def _least(seconds: dict[Any, float], key: object, value: float) -> None:
    seconds[key] = min(seconds.get(key, value), value)
