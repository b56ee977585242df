"""Tiny local stand-ins for the models and datasets that TRL's tests load from the Hub.

A folder in the working directory comes before a repository of that name, for models and datasets alike: tests that run
in `root` find `trl-internal-testing/...` there. Architectures are read off the names, weights are random, and chat
templates are those of the installed TRL. Token ids agree with Qwen's where tests write ids down: bytes, special tokens
and the words of their mocked tool calls.
"""

import codecs
import contextlib
import io
import re
import string
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast


ORGANIZATION = "trl-internal-testing"
MODEL_NAME = re.compile(ORGANIZATION + r"/((?:tiny|small)-(\w+?For(?:CausalLM|SequenceClassification))(?:-[\w.-]+)?)")
WEIGHT_STD = 0.2  # default initialisation is so flat that a step changes nothing

FIRST_SPECIAL_ID = 151643
VOCAB_SIZE = 151936
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION = "object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end vision_pad"
FILLERS = "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
LLAMA = "begin_of_text start_header_id end_header_id eot_id finetune_right_pad_id"
SPECIAL_TOKENS = [PAD, START, END, *(f"<|{name}|>" for name in f"{VISION} image_pad video_pad".split())]
# Not special to a decoder: their text is what parsers of tool calls and thoughts look for.
MARKERS = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in FILLERS.split())]
MARKERS += ["<tool_response>", "</tool_response>", "<think>", "</think>"]
OTHER_SPECIAL_TOKENS = [f"<|{name}|>" for name in LLAMA.split()]
OTHER_SPECIAL_TOKENS += ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>"]
WORDS = {
    330: ' "', 497: '",', 606: "name", 788: '":', 894: " any", 944: "'t", 1414: " know", 1513: " don", 2765: " won",
    4913: '{"', 5212: ' {"', 5392: " tool", 7692: "async", 9520: "step", 11248: "}}\n", 16252: " increment",
    16370: "arguments", 17453: "Done", 22785: "_tool", 35744: "increment", 64648: "multiply", 93054: "_multiply",
}  # fmt: skip

CHAT_TEMPLATES = {"Qwen2": "qwen2_5", "Llama": "llama3", "Gemma2": "gemma", "Gemma": "gemma"}  # all others: Qwen3's
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
PROMPT_WORDS = (4, 2, 3, 1, 4, 3, 1, 4, 3, 3, 2, 6, 5, 5, 3, 3, 5, 5, 4)  # of each line; the rest is its completion
NUM_TEST_LINES = 2


def build(root: Path, sources: list[Path]) -> list[str]:
    """Builds in `root` what the test files name; returns the names that have no stand-in, so that their tests fail."""
    text = "\n".join(path.read_text() for path in sources)
    names = dict(MODEL_NAME.findall(text))
    for name, class_name in names.items():
        if hasattr(transformers, class_name):
            _save_model(root / ORGANIZATION / name, class_name, words=re.findall(r" ?[A-Za-z]+", text))
    _save_datasets(root / ORGANIZATION / "zen")
    named = set(re.findall(ORGANIZATION + r"/[\w.-]+", text))
    return sorted(name for name in named if not (root / name).exists())


def _save_model(folder: Path, class_name: str, words: list[str]) -> None:
    model_class: type[PreTrainedModel] = getattr(transformers, class_name)
    defaults: PreTrainedConfig = model_class.config_class()  # type: ignore[misc]
    values: dict[str, Any] = {name: value for name, value in SHAPE.items() if hasattr(defaults, name)}
    ids: dict[str, Any] = {
        "bos_token_id": FIRST_SPECIAL_ID,
        "pad_token_id": FIRST_SPECIAL_ID,
        "eos_token_id": FIRST_SPECIAL_ID + 2,
    }
    labels: dict[str, Any] = {} if class_name.endswith("CausalLM") else {"num_labels": 1}
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = model_class(type(defaults)(**values, **ids, **labels)).bfloat16()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=WEIGHT_STD)
    torch.set_rng_state(generator_state)
    if not labels:
        stop_ids = [FIRST_SPECIAL_ID + 2, FIRST_SPECIAL_ID]
        model.generation_config = GenerationConfig(**ids | {"eos_token_id": stop_ids}, do_sample=True, top_k=20)
    model.save_pretrained(folder)
    template = CHAT_TEMPLATES.get(class_name.partition("For")[0], "qwen3")
    templates = Path(trl.__file__).parent / "chat_templates"
    chat_template = (templates / f"{template}.jinja").read_text(encoding="utf-8")
    make_tokenizer(chat_template, words).save_pretrained(folder)


def make_tokenizer(chat_template: str, words: list[str]) -> PreTrainedTokenizerFast:
    """One token per byte or known word, with Qwen's ids; ids left over stand for short texts of unequal length."""
    letters = _byte_letters()
    vocabulary = {letters[byte]: index for index, byte in enumerate(letters)}
    vocabulary |= {"".join(letters[byte] for byte in word.encode()): index for index, word in WORDS.items()}
    new_words = sorted({word.replace(" ", letters[32]) for word in words} - set(vocabulary))
    codes = map("".join, product(string.ascii_letters + string.digits, repeat=3))
    fillers = (code + "~" * (index % 3 + 1) for index, code in enumerate(codes))
    unused = sorted(set(range(FIRST_SPECIAL_ID)) - set(vocabulary.values()))
    vocabulary |= dict(zip(chain(new_words, fillers), unused, strict=False))
    assert len(vocabulary) == FIRST_SPECIAL_ID
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    tokenizer.add_special_tokens(OTHER_SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=PAD if "bos_token" in chat_template else None,  # Qwen has none
        eos_token=END,
        pad_token=PAD,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte, in the order of GPT-2's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(rest)}


def _save_datasets(folder: Path) -> None:
    """The Zen of Python, each line split into a prompt and its completion, in the formats that trainers take."""
    configs = []
    for name, rows in _formats().items():
        splits = {"train": rows[:-NUM_TEST_LINES], "test": rows[-NUM_TEST_LINES:]}
        files = "".join(f"  - split: {split}\n    path: {name}/{split}.parquet\n" for split in splits)
        configs.append(f"- config_name: {name}\n  data_files:\n{files}")
        for split, split_rows in splits.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(split_rows).to_parquet(folder / name / f"{split}.parquet")
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")


def _formats() -> dict[str, list[dict[str, Any]]]:
    formats: dict[str, list[dict[str, Any]]] = {}
    for line, count in zip(_zen_lines(), PROMPT_WORDS, strict=True):
        words = line.split(" ")
        prompt, completion = " ".join(words[:count]), " ".join(["", *words[count:]])
        question = [{"role": "user", "content": f"How does it go on after '{prompt}'?"}]
        answer = [{"role": "assistant", "content": line}]
        for style, first, second in (("standard", prompt, completion), ("conversational", question, answer)):
            formats.setdefault(f"{style}_prompt_only", []).append({"prompt": first})
            formats.setdefault(f"{style}_prompt_completion", []).append({"prompt": first, "completion": second})
    return formats


def _zen_lines() -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints itself
        import this
    return codecs.decode(this.s, "rot13").splitlines()[2:]
