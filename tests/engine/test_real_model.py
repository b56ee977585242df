"""A real checkpoint, SmolLM2-135M-Instruct: its text, the engine's distribution on it, its drafters, and GRPO.

Toys of a hundred tokens hide what 30 layers and 49 thousand tokens show.
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpo_math
import pytest
import smollm2
import torch
import word_problems
from datasets import Dataset
from tiny_models import Schedule
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM
from trl_runs import FP32_LOGP_TOLERANCE, make_trainer, train

from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions


pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(smollm2.missing() is not None, reason=str(smollm2.missing())),
]
EOS = 2
# Mean |difference| of a token's log-probability, over that between SDPA and eager attention: 0.8 to 1.3 where sound.
CALIBRATED_MARGIN = 2.5
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
}
# Measured on 180 to 200 examined tokens: 0.76, 0.91 to 0.93, 0.96 to 0.97. On half as many, four standard errors less.
LOWEST_ALPHA = {"qint4": 0.6, "qfloat8": 0.8, "qint8": 0.89}


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm2.smollm2_dir()


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def policy(path: Path) -> LlamaForCausalLM:
    """In fp32; a test that changes it takes a copy."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """32 beginnings of word problems, of 3 to 32 tokens."""
    problems = word_problems.make_dataset(32, seed=0)["prompt"]
    return [tokenizer(problem[0]["content"])["input_ids"][: 3 + row] for row, problem in enumerate(problems)]


@pytest.fixture(scope="module")
def engine_of(policy: LlamaForCausalLM) -> Callable[[str], tuple[SelfSpecEngine, Schedule]]:
    """An engine with the drafter of that type, and the controller that tells it when to draft. Made once."""

    @functools.cache
    def make(qtype: str) -> tuple[SelfSpecEngine, Schedule]:
        schedule = Schedule(3)
        return SelfSpecEngine(policy, always_drafting(qtype), controller=schedule), schedule

    return make


def always_drafting(qtype: str) -> SelfSpecOptions:
    return SelfSpecOptions(draft_qtype=qtype, num_speculative_tokens=3, max_active_sequences=64)


def test_the_tokenizer_splits_as_it_was_trained(tokenizer: Any) -> None:
    """Each digit is a token, spaces stay together before one, and decoding gives the text back."""
    assert tokenizer.tokenize("  12") == ["ĠĠ", "1", "2"]
    for text in (
        "Tom has  123 apples,\n\n  and 45.6 pears.",
        "He's naïve: 漢字 🙂",
        "<|im_start|>user\nhi<|im_end|>\n",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_ends_a_turn_with_the_eos_token(tokenizer: Any, policy: LlamaForCausalLM) -> None:
    """With another EOS token no completion would end."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_ids_to_tokens(EOS) == tokenizer.eos_token == "<|im_end|>"
    assert policy.generation_config.eos_token_id == policy.config.eos_token_id == EOS


@torch.no_grad()
def test_the_weights_speak_english(tokenizer: Any, policy: LlamaForCausalLM) -> None:
    """A wrong layout of the rotary heads, or a block scale mixed up, leaves a model that runs and says nothing."""
    words = [
        "The",
        "sun",
        "is",
        "a",
        "star",
        "at",
        "the",
        "center",
        "of",
        "the",
        "solar",
        "system.",
        "It",
        "is",
        "a",
        "massive",
        "ball",
        "of",
        "hot",
        "plasma.",
    ]
    losses = []
    for order in (words, words[::-1]):
        ids = torch.tensor([tokenizer(" ".join(order))["input_ids"]])
        losses.append(policy(ids, labels=ids).loss.item())
    assert losses[0] < 3 and losses[1] > 5
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    config = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=EOS)
    assert tokenizer.decode(policy.generate(ids, generation_config=config)[0]).endswith(" Paris")


@pytest.mark.parametrize("num_prompts", [10, pytest.param(32, marks=pytest.mark.slow)])
def test_greedy_tokens_are_those_of_generate(
    policy: LlamaForCausalLM,
    engine_of: Callable[[str], tuple[SelfSpecEngine, Schedule]],
    prompts: list[list[int]],
    num_prompts: int,
) -> None:
    """In fp32, over ragged prompts, in plain rounds until half of the rows are done and in speculative ones from
    then on. qint4 drafts are wrong in one of four places, so rejections are covered."""
    prompts = prompts[:num_prompts]
    assert len(prompts) == num_prompts
    budgets = [(12, 28)[row % 2] for row in range(len(prompts))]
    config = GenerationConfig(max_new_tokens=max(budgets), do_sample=False, eos_token_id=EOS, pad_token_id=EOS)
    engine, schedule = engine_of("qint4")
    schedule.draft_lengths = (0,) * min(budgets) + (3,) * max(budgets)
    output = engine.generate(prompts, config, seed=0, max_new_tokens=budgets)

    width = max(map(len, prompts))
    ids = torch.tensor([[EOS] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = policy.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    rows = [row[:budget] for row, budget in zip(rows, budgets, strict=True)]
    assert output.completion_ids == [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
    assert output.stats.plain_rounds >= 10
    assert output.stats.alpha is not None and 0.5 < output.stats.alpha < 0.95


@torch.no_grad()
def teacher_forced(
    model: LlamaForCausalLM, prompts: list[list[int]], completions: list[list[int]], autocast_dtype: torch.dtype | None
) -> Tensor:
    """Log-probability of each completion token, rows one after the other, in one right-padded forward."""
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [EOS] * (width - len(row)) for row in rows])
    context = contextlib.nullcontext() if autocast_dtype is None else torch.autocast("cpu", autocast_dtype)
    with context:
        logprobs = model(ids, use_cache=False).logits.float().log_softmax(-1)
    scored = logprobs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    spans = zip(scored, map(len, prompts), map(len, completions), strict=True)
    return torch.cat([row[start - 1 : start - 1 + length] for row, start, length in spans])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "autocast_dtype"), [pytest.param(*types, id=name) for name, types in DTYPES.items()]
)
def test_log_probabilities_are_the_policys_own(
    policy: LlamaForCausalLM, prompts: list[list[int]], dtype: torch.dtype, autocast_dtype: torch.dtype | None
) -> None:
    """In each dtype the engine takes the policy, and its log-probabilities differ from the policy's own forward by as
    much as two ways of computing that forward do. The negative control, rotary frequencies 20 % too high, differs by
    more."""
    model = copy.deepcopy(policy).to(dtype)
    short = prompts[8:24:5]
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=24, eos_token_id=EOS)
    output = SelfSpecEngine(model, always_drafting("qint8"), autocast_dtype).generate(short, config, seed=1)
    ours = torch.tensor([logprob for row in output.policy_logprobs for logprob in row])
    assert output.stats.num_accepted_tokens > 0

    reference = teacher_forced(model, short, output.completion_ids, autocast_dtype)
    model.set_attn_implementation("eager")
    other = teacher_forced(model, short, output.completion_ids, autocast_dtype)
    model.set_attn_implementation("sdpa")
    model.model.rotary_emb.inv_freq.mul_(1.2)
    wrong = teacher_forced(model, short, output.completion_ids, autocast_dtype)

    limit = max(FP32_LOGP_TOLERANCE, CALIBRATED_MARGIN * (other - reference).abs().mean().item())
    assert (ours - reference).abs().mean() < limit
    assert (wrong - reference).abs().mean() > limit


@pytest.mark.parametrize(
    "qtype", ["qint4", *(pytest.param(qtype, marks=pytest.mark.slow) for qtype in ("qfloat8", "qint8"))]
)
def test_drafters_are_accepted(
    engine_of: Callable[[str], tuple[SelfSpecEngine, Schedule]], prompts: list[list[int]], qtype: str
) -> None:
    """A drafter with a wrong scale, or one that is not the policy's, is accepted by chance only. That the bounds can
    fail shows in qint4, which fails those of the finer two."""
    engine, schedule = engine_of(qtype)
    schedule.draft_lengths = (3,)
    for temperature in (1.0, 0.7):
        config = GenerationConfig(
            do_sample=True, temperature=temperature, top_k=0, max_new_tokens=20, eos_token_id=EOS
        )
        stats = engine.generate(prompts[16:24], config, seed=1).stats
        assert sum(stats.examined_per_position) > 80
        assert stats.alpha is not None and stats.alpha > LOWEST_ALPHA[qtype]
        if qtype == "qint4":
            assert stats.alpha < LOWEST_ALPHA["qint8"]


@pytest.mark.slow
def test_two_steps_of_grpo(policy: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    """fp32 weights, under bf16 autocast where the recipe would: the engine serves every rollout and follows the
    weights. An engine that keeps the first step's is off by more in the second."""
    bf16 = grpo_math.has_native_bf16()
    sentences = ["The capital of France is", "In the morning, the"]
    trainer = make_trainer(
        tmp_path,
        model=copy.deepcopy(policy).requires_grad_(True),
        trainer_kwargs={"processing_class": tokenizer},
        train_dataset=Dataset.from_list([{"prompt": sentence} for sentence in sentences * 2]),
        bf16=bf16,
        per_device_train_batch_size=4,
        num_generations=2,
        learning_rate=1e-4,
        selfspec_num_speculative_tokens=3,
        selfspec_max_active_sequences=2,
        selfspec_draft_qtype="qint8",
    )
    log = train(trainer)
    assert len(log) == 2
    for entry in log:
        assert entry["selfspec/fallback"] == 0
        assert entry["sampling/sampling_logp_difference/mean"] < (0.15 if bf16 else FP32_LOGP_TOLERANCE)
        assert entry["selfspec/tokens_per_s"] > 0 and entry["grad_norm"] > 0
