"""The work every engine of a benchmark does: a model, prompts, and a forced completion length for each row.

Prompts are word problems in the model's own chat format where it has one, else random ids. Lengths come from a profile
and are the same for all engines: end-of-sequence tokens never end a row. `longtail` has the shape of a GRPO step on
competition math (median about 500 tokens, p99 about 3,000, limit 8,192): most rows end early and the longest one runs
to the limit. It is scaled to any limit, so that a CPU can run it. With `eos`, each row has the length of one sample
that the model itself ended.
"""

import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions


sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import word_problems


LENGTH_PROFILES = ("uniform", "longtail", "eos")
LONGTAIL_MEDIAN, LONGTAIL_P99, LONGTAIL_LIMIT = 500, 3000, 8192


def _qwen2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


# Shapes of Qwen2.5 and Llama 3.1; 150m is Qwen2.5-0.5B with 9 layers and a 16k vocabulary, tiny is for trying out.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _qwen2(64, 128, 2, 4, 2, 256, True),
    "150m": _qwen2(896, 4864, 9, 14, 2, 16384, True),
    "0.5b": _qwen2(896, 4864, 24, 14, 2, 151936, True),
    "1.5b": _qwen2(1536, 8960, 28, 12, 2, 151936, True),
    "3b": _qwen2(2048, 11008, 36, 16, 2, 151936, True),
    "7b": _qwen2(3584, 18944, 28, 28, 4, 152064, False),
    "14b": _qwen2(5120, 13824, 48, 40, 8, 152064, False),
    "32b": _qwen2(5120, 27648, 64, 40, 8, 152064, False),
    "llama-8b": _qwen2(4096, 14336, 32, 32, 8, 128256, False) | {"model_type": "llama"},
}


def preset_config(name: str) -> PretrainedConfig:
    """The Hugging Face configuration of a preset; `ValueError` for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; presets: {', '.join(PRESETS)}")
    shape = {"max_position_embeddings": 32768, **PRESETS[name]}
    return AutoConfig.for_model(shape.pop("model_type"), **shape)


def load_model(
    preset: str | None, path: Path | None, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    """A preset with random weights, or a saved model, without end-of-sequence tokens: lengths are forced."""
    if preset is not None:
        torch.manual_seed(seed)
        with device:
            model = AutoModelForCausalLM.from_config(preset_config(preset), dtype=dtype)
    else:
        assert path is not None
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device)
    model.config.eos_token_id = None
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def chat_prompts(path: Path, rows: int, seed: int) -> list[list[int]] | None:
    """Word problems in the chat format of a saved model, as ids; `None` where it has no chat format."""
    if not (path / "tokenizer_config.json").exists():
        return None
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        return None
    prompts = word_problems.make_dataset(rows, seed)["prompt"]
    return [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]


def sampled_lengths(
    model: PreTrainedModel, path: Path, prompt_ids: list[list[int]], max_new_tokens: int, seed: int
) -> list[int]:
    """Length of each row when the model ends it itself, at temperature 1."""
    eos_token_id = GenerationConfig.from_pretrained(path).eos_token_id
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
    engine = SelfSpecEngine(model, SelfSpecOptions(num_speculative_tokens=0))
    return [len(ids) for ids in engine.generate(prompt_ids, config, seed=seed).completion_ids]


def completion_lengths(profile: str, rows: int, max_new_tokens: int, seed: int) -> list[int]:
    """Forced completion length of each row; the longest has exactly `max_new_tokens`.

    `longtail` gives rank i of n the (i + 1/2)/n quantile of a lognormal law through the median and the p99 above,
    scaled by `max_new_tokens` / 8192, and the last rank the limit; rows are shuffled by `seed`.
    """
    if profile == "uniform":
        return [max_new_tokens] * rows
    normal = NormalDist()
    sigma = math.log(LONGTAIL_P99 / LONGTAIL_MEDIAN) / normal.inv_cdf(0.99)
    scale = max_new_tokens / LONGTAIL_LIMIT * LONGTAIL_MEDIAN
    ranks = [scale * math.exp(sigma * normal.inv_cdf((i + 0.5) / rows)) for i in range(rows - 1)]
    lengths = [min(max_new_tokens, max(1, round(length))) for length in ranks] + [max_new_tokens]
    random.Random(seed).shuffle(lengths)
    return lengths


@dataclass(frozen=True)
class Workload:
    """Prompts and forced lengths of one rollout."""

    prompt_ids: list[list[int]]
    lengths: list[int]
    temperature: float = 1.0

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def keys_read(self) -> int:
        """Tokens whose keys plain decoding reads, over all rows and steps: a step reads all that the row has."""
        pairs = zip(self.prompt_ids, self.lengths, strict=True)
        return sum(n * len(prompt) + n * (n - 1) // 2 for prompt, n in pairs)

    def shortened(self, fraction: float) -> "Workload":
        """The same rows with every length scaled down: the warm-up."""
        lengths = [max(1, math.ceil(fraction * length)) for length in self.lengths]
        return Workload(self.prompt_ids, lengths, self.temperature)

    @classmethod
    def joined(cls, workloads: "Sequence[Workload]") -> "Workload":
        """All rows of several rollouts, to be counted."""
        prompt_ids = [prompt for workload in workloads for prompt in workload.prompt_ids]
        lengths = [length for workload in workloads for length in workload.lengths]
        return cls(prompt_ids, lengths, workloads[0].temperature)

    def check(self, completion_ids: list[list[int]], engine: str) -> None:
        """Raise `RuntimeError` unless each row has exactly its forced length."""
        got = [len(ids) for ids in completion_ids]
        if got != self.lengths:
            raise RuntimeError(f"engine {engine!r} did other work than asked: lengths {got}, forced {self.lengths}")

    def summary(self) -> dict[str, float]:
        ordered = sorted(self.lengths)
        return {
            "rows": len(ordered),
            "tokens": sum(ordered),
            "median": ordered[(len(ordered) - 1) // 2],
            "p90": ordered[math.ceil(0.90 * len(ordered)) - 1],
            "p99": ordered[math.ceil(0.99 * len(ordered)) - 1],
            "max": ordered[-1],
        }


def random_prompts(rows: int, prompt_length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Ragged prompts of half to all of `prompt_length` tokens, each its own."""
    rng = random.Random(seed)
    shortest = (prompt_length + 1) // 2
    prompt_lengths = [prompt_length - (prompt_length - shortest) * i // max(1, rows - 1) for i in range(rows)]
    rng.shuffle(prompt_lengths)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in prompt_lengths]


def make_workload(
    model: PreTrainedModel,
    path: Path | None,  # of the model's files; None for random weights
    profile: str,
    rows: int,
    max_new_tokens: int,
    prompt_length: int,  # of random prompts
    seed: int,
) -> Workload:
    prompts = None if path is None else chat_prompts(path, rows, seed)
    if prompts is None:
        prompts = random_prompts(rows, prompt_length, model.config.vocab_size, seed)
    if profile == "eos":
        assert path is not None
        return Workload(prompts, sampled_lengths(model, path, prompts, max_new_tokens, seed))
    return Workload(prompts, completion_lengths(profile, rows, max_new_tokens, seed))
