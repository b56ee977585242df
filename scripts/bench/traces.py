"""Completions of a real model, recorded once: `bench_rollout.py run --replay` forces them on models of any size.

A trace has prompts and, for each of its epochs, a group of completions per prompt. Its epochs are independent samples
of one policy, as if a learning rate of 0 lay between them. A file is gzipped JSON of token ids.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from bench.workload import Workload, chat_prompts
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions


EPOCHS = "Two independent samples of one policy under two seeds; nothing was trained between them."
PROSE = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Describe a walk through a market in a city that you love.",
    "What makes a good friend? Answer in the manner of an essay.",
    "Write a speech for the opening of a small public library.",
)
PROMPTS = ("word_problems", "prose")


@dataclass(frozen=True)
class Recording(Workload):
    """A rollout of a trace: the rows, what each of them says, and what its prompts were answered an epoch before."""

    completion_ids: list[list[int]] = field(default_factory=list)
    history: list[tuple[list[int], list[int]]] = field(default_factory=list)  # prompts and completions


@dataclass(frozen=True)
class Trace:
    """What one policy said.

    Attributes:
        about: the model, its vocabulary's size, the temperature, and where the trace comes from.
        prompt_ids: of each prompt.
        epochs: of each epoch and prompt, the completions of its group.
    """

    about: dict[str, Any]
    prompt_ids: list[list[int]]
    epochs: list[list[list[list[int]]]]

    @property
    def group_size(self) -> int:
        return len(self.epochs[0][0])

    @property
    def completion_ids(self) -> list[list[int]]:
        """All of them."""
        return [ids for epoch in self.epochs for group in epoch for ids in group]

    @property
    def largest_id(self) -> int:
        return max(map(max, self.prompt_ids + self.completion_ids))

    def recordings(self, rows: int, rollouts: int, epoch: int) -> list[Recording]:
        """Rollouts of `rows` rows, each of the next prompts: one prompt, or whole groups of several.

        Args:
            epoch: counts from 1; what came before it is the history.

        Raises:
            ValueError: the trace is smaller, or the rows are no whole groups.
        """
        size = self.group_size
        if not 1 <= epoch <= len(self.epochs):
            raise ValueError(f"--epoch {epoch}: the trace has epochs 1 to {len(self.epochs)}")
        if rows > size and rows % size:
            raise ValueError(f"--rows {rows}: give up to {size} rows of one prompt, or a multiple of {size}")
        num_prompts = max(1, rows // size)
        if rollouts * num_prompts > len(self.prompt_ids):
            raise ValueError(
                f"--rollouts {rollouts} of {num_prompts} prompts: the trace has {len(self.prompt_ids)} prompts"
            )
        chosen = [range(num_prompts * i, num_prompts * (i + 1)) for i in range(rollouts)]
        return [self._recording(prompts, rows // num_prompts, epoch) for prompts in chosen]

    def _recording(self, prompts: Sequence[int], rows: int, epoch: int) -> Recording:
        said = [(self.prompt_ids[i], ids) for i in prompts for ids in self.epochs[epoch - 1][i][:rows]]
        before = [
            (self.prompt_ids[i], ids) for earlier in self.epochs[: epoch - 1] for i in prompts for ids in earlier[i]
        ]
        return Recording(
            prompt_ids=[prompt for prompt, _ in said],
            lengths=[len(ids) for _, ids in said],
            temperature=self.about["temperature"],
            completion_ids=[ids for _, ids in said],
            history=before,
        )

    def save(self, path: Path) -> None:
        """Equal traces are equal files."""
        content = {"about": self.about, "prompt_ids": self.prompt_ids, "epochs": self.epochs}
        text = json.dumps(content, separators=(",", ":"))
        path.write_bytes(gzip.compress(text.encode(), mtime=0))

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """A file written by `save`; `ValueError` if it is not one."""
        try:
            content = json.loads(gzip.decompress(path.read_bytes()))
            return cls(content["about"], content["prompt_ids"], content["epochs"])
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a trace of `bench_rollout.py record`: {error}") from error


def prose_prompts(path: Path, rows: int) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    chats = [[{"role": "user", "content": text}] for text in PROSE[:rows]]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def make_prompts(kind: str, path: Path, rows: int, seed: int) -> list[list[int]]:
    """Prompts in the chat format of the model at `path`; `ValueError` where it has none."""
    word_problems = chat_prompts(path, rows, seed)
    if word_problems is None:
        raise ValueError(f"--model {path} has no chat format, so it can't be asked for anything")
    return word_problems if kind == "word_problems" else prose_prompts(path, rows)


def record(
    model: PreTrainedModel,
    path: Path,  # of the model's files
    prompt_ids: list[list[int]],
    group_size: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,  # of the first of two epochs; the next one's is 1 more
    about: dict[str, Any],
) -> Trace:
    """Samples two epochs of a trace in plain rounds."""
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=GenerationConfig.from_pretrained(path).eos_token_id,
    )
    rows = [prompt for prompt in prompt_ids for _ in range(group_size)]
    engine = SelfSpecEngine(model, SelfSpecOptions(num_speculative_tokens=0))
    epochs = []
    for epoch_seed in (seed, seed + 1):
        completions = engine.generate(rows, config, seed=epoch_seed).completion_ids
        epochs.append([completions[at : at + group_size] for at in range(0, len(rows), group_size)])
    about |= {
        "vocab_size": model.config.vocab_size,
        "eos_token_id": config.eos_token_id,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "group_size": group_size,
        "epoch_seeds": [seed, seed + 1],
        "epochs": EPOCHS,
    }
    return Trace(about, prompt_ids, epochs)
