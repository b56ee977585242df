"""A policy that calls tools: a tiny model taught a chat of its own, with a template and a parser that TRL accepts.

Its user names a digit; it asks for the double of it, and again of the answer, until that has two digits; then it says
what it was asked and what came out. So rows take one to five turns, and the last one needs the first one's keys.
"""

import copy
import functools
import re
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from trl_runs import SPECIAL_TOKENS, make_config


CALL, END_CALL = "<call>", "</call>"
PIECES = [CALL, END_CALL, '{"name": "', "double", '", "arguments": {"', '": ', "}}"]
CHAT_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool.function.name + ' ' }}{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ 'a:' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    '{{ \'<call>{"name": "\' + call.function.name + \'", "arguments": \' + call.function.arguments | tojson }}'
    "{{ '}</call>' }}{% endfor %}{{ '<eos>' }}"
    "{% else %}{{ message.role[0] + ':' + message.content + ';' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "a:",
    "fields": {
        "tool_calls": {
            "open": CALL,
            "close": END_CALL,
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<eos>", "content": "text"},
    },
}
QUESTIONS = ["1", "3", "hi", "5", "2", "7"]  # 4, 2, 0, 1, 3 and 1 calls
NUM_CALLS = [4, 2, 0, 1, 3, 1]
MAX_COMPLETION = 100
TEACHING_STEPS = 200
CALL_PATTERN = r"<call>\{\"name\": \"double\", \"arguments\": \{\"value\": (\d+)\}\}</call><eos>"


def double(value: int) -> int:
    """
    Doubles a number.

    Args:
        value: The number.

    Returns:
        Twice the number.
    """
    return 2 * value


class Doubler:
    """The same tool as an environment's, which counts the calls of its rollout."""

    def reset(self, **_: Any) -> None:
        self.calls = 0

    def double(self, value: int) -> int:
        """
        Doubles a number.

        Args:
            value: The number.

        Returns:
            Twice the number.
        """
        self.calls += 1
        return double(value)


def make_tool_tokenizer() -> PreTrainedTokenizerFast:
    pieces = [*SPECIAL_TOKENS, *PIECES, *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(pieces)}, unk_token="<unk>"))
    pattern = "|".join([*(piece.replace("{", r"\{").replace("}", r"\}") for piece in PIECES), "."])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )
    fast.response_template = RESPONSE_TEMPLATE  # type: ignore[attr-defined]
    return fast


def conversation(question: str) -> list[dict[str, Any]]:
    """What the policy is taught."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if not question.isdigit():
        return [*messages, {"role": "assistant", "content": "ok"}]
    value = int(question)
    while value < 10:
        call = {"type": "function", "function": {"name": "double", "arguments": {"value": value}}}
        messages += [{"role": "assistant", "content": "", "tool_calls": [call]}]
        value = double(value)
        messages += [{"role": "tool", "name": "double", "content": str(value)}]
    return [*messages, {"role": "assistant", "content": f"{question}>{value}"}]


@functools.cache
def _taught() -> Qwen3ForCausalLM:
    tokenizer = make_tool_tokenizer()
    config = make_config(vocab_size=len(tokenizer), max_position_embeddings=160)
    chats = [conversation(question) for question in ["hi", *map(str, range(1, 10))]]
    batch = tokenizer.apply_chat_template(
        chats, tools=[double], padding=True, return_dict=True, return_tensors="pt", padding_side="right"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(TEACHING_STEPS):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def tool_rollout(prompts: list[list[dict[str, str]]], trainer: Any) -> dict[str, Any]:
    """A `rollout_func` that runs the tool itself: with our trainer by `generate_ids`, with TRL's by its own method."""

    def generate(prompt_ids: list[list[int]]) -> list[list[int]]:
        if hasattr(trainer, "generate_ids"):
            return trainer.generate_ids(prompt_ids)
        return trainer._generate_single_turn(prompt_ids, None, {}, 1)[0]

    tokenizer = trainer.processing_class
    chat = tokenizer.apply_chat_template(prompts, tools=[double], add_generation_prompt=True, return_dict=False)
    completions: list[list[int]] = [[] for _ in chat]
    masks: list[list[int]] = [[] for _ in chat]
    unfinished = list(range(len(chat)))
    while unfinished:
        outputs = generate([chat[row] + completions[row] for row in unfinished])
        calling = []
        for row, ids in zip(unfinished, outputs, strict=True):
            completions[row] += ids
            masks[row] += [1] * len(ids)
            call = re.fullmatch(CALL_PATTERN, tokenizer.decode(ids))
            if call and len(completions[row]) < MAX_COMPLETION:
                answer = tokenizer(f"t:{double(int(call[1]))};a:")["input_ids"]
                completions[row] += answer
                masks[row] += [0] * len(answer)
                calling.append(row)
        unfinished = calling
    return {"prompt_ids": chat, "completion_ids": completions, "logprobs": None, "env_mask": masks}


def tool_policy() -> Qwen3ForCausalLM:
    return copy.deepcopy(_taught())


def tool_dataset(questions: list[str] = QUESTIONS) -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in questions * 2])
