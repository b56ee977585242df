"""Requests: prompts and budgets, checked before any work."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import GenerationConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Request:
    """One completion to generate: `prompt` plus tokens until EOS or until the row holds `limit` tokens."""

    row_id: int
    prompt: tuple[int, ...]
    limit: int
    done: tuple[int, ...] = ()  # tokens generated before the row was preempted

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.done


def make_requests(
    prompt_ids: Sequence[Sequence[int]],
    generation_config: GenerationConfig,
    max_new_tokens: Sequence[int] | None,
    vocab_size: int,
    context_length: int | None,
) -> list[Request]:
    """Checks prompts and budgets and turns them into requests, in prompt order.

    Args:
        prompt_ids: one non-empty list of token ids per completion.
        generation_config: the effective config; `max_new_tokens` or `max_length` bounds each row.
        max_new_tokens: a budget per row that replaces the config's.
        vocab_size: ids must lie below it.
        context_length: positions the model was built for, or `None`. A row ends there at the latest.

    Raises:
        ValueError: an empty prompt, an id out of range, a prompt that fills the context, a budget below 1.
    """
    if max_new_tokens is not None and len(max_new_tokens) != len(prompt_ids):
        raise ValueError(
            f"`max_new_tokens` has {len(max_new_tokens)} entries for {len(prompt_ids)} prompts; give one per prompt."
        )
    requests = []
    for row_id, prompt in enumerate(prompt_ids):
        prompt = _checked_prompt(prompt, row_id, vocab_size, context_length)
        budget = _budget(generation_config, len(prompt), None if max_new_tokens is None else max_new_tokens[row_id])
        if type(budget) is not int or budget < 1:
            raise ValueError(f"Prompt {row_id} may generate {budget} tokens; every row needs an int of at least 1.")
        limit = len(prompt) + budget
        if context_length is not None and limit > context_length:
            logger.warning_once(
                f"A prompt of {len(prompt)} tokens with {budget} new ones exceeds the model's context of "
                f"{context_length} positions: such rows end there."
            )
            limit = context_length
        requests.append(Request(row_id, prompt, limit))
    return requests


def _checked_prompt(
    prompt: Sequence[int], row_id: int, vocab_size: int, context_length: int | None
) -> tuple[int, ...]:
    if isinstance(prompt, str) or not isinstance(prompt, Iterable):
        raise ValueError(f"Prompt {row_id} is {prompt!r}; give a list of lists of token ids, one list per completion.")
    ids = tuple(prompt)
    if not ids:
        raise ValueError(f"Prompt {row_id} is empty; give it at least one token (for example the BOS token).")
    if not all(type(token) is int for token in ids):
        kinds = sorted({type(token).__name__ for token in ids if type(token) is not int})
        raise ValueError(f"Prompt {row_id} holds {', '.join(kinds)}; prompts are lists of Python ints (`tolist()`).")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(
            f"Prompt {row_id} holds the token id {wrong}, but the model's vocabulary has {vocab_size} entries; use "
            "the model's own tokenizer."
        )
    if context_length is not None and len(ids) >= context_length:
        raise ValueError(
            f"Prompt {row_id} has {len(ids)} tokens and the model's context has {context_length} positions, which "
            "leaves no room for a completion; shorten or drop the prompt."
        )
    return ids


def _budget(config: GenerationConfig, prompt_length: int, override: int | None) -> int:
    if override is not None:
        return override
    if config.max_new_tokens is not None:
        return config.max_new_tokens
    assert config.max_length is not None, "the effective config always sets a length"
    return config.max_length - prompt_length
