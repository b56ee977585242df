"""Train the embedded default's policy: a small causal LM that multiplies step by step, in 3 to 8 minutes on 2 cores.

    python scripts/make_tiny_policy.py [--size 3m] [--output DIR] [--force]

It is kept after the first time. Answers have a long tail and are right about half of the time, so that GRPO has
something to learn and its rollouts something to wait for. Trained in fp32 where the CPU has no native bf16,
saved in bf16.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, quantiles
from typing import Any, NamedTuple


# Read when torch loads. On a machine that is busy, training takes less than half the time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import arithmetic


MAX_STEPS, BATCH_SIZE, WARMUP_STEPS = 800, 16, 30
POOL_SIZE = 16 * BATCH_SIZE  # problems that are sorted into batches of similar length
BUDGET_S = 450.0  # of training, if the steps take longer: the learning rate is annealed all the same
NUM_SAMPLES, MAX_COMPLETION_LENGTH = 256, 320
MIN_CORRECT = 0.2  # of samples: below, a policy is not kept
SPECIAL_TOKENS = ("<pad>", "<eos>", "<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message.role + '>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Size(NamedTuple):
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    learning_rate: float


SIZES = {
    "3m": Size(256, 768, 4, 4, 2, 1e-3),
    "135m": Size(1024, 2816, 12, 16, 4, 3e-4),  # this and the next want a GPU
    "1b": Size(2048, 5632, 24, 16, 4, 1e-4),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *arithmetic.CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(size: Size = SIZES["3m"]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,  # a multiple of quanto's int4 group size
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
    )
    return LlamaForCausalLM(config)


def batched_by_length(dataset: Dataset) -> Dataset:
    """Batches of similar length, in random order: half the padding, and no run of long batches after short ones."""
    rng, order = random.Random(0), []
    for start in range(0, len(dataset), POOL_SIZE):
        pool = sorted(range(start, start + POOL_SIZE), key=lambda i: len(dataset[i]["completion"][0]["content"]))
        batches = [pool[i : i + BATCH_SIZE] for i in range(0, POOL_SIZE, BATCH_SIZE)]
        order += [index for batch in rng.sample(batches, len(batches)) for index in batch]
    return dataset.select(order)


class Deadline(TrainerCallback):
    """Stops at the budget. `progress` counts steps or seconds, whichever is further."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s, self.start, self.step = budget_s, time.monotonic(), 0

    @property
    def progress(self) -> float:
        return max(self.step / MAX_STEPS, (time.monotonic() - self.start) / self.budget_s)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay over `progress`."""
        self.step = step
        return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.0, 1 - self.progress)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        control.should_training_stop |= self.progress >= 1


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    budget_s: float,
    learning_rate: float,
) -> None:
    native_bf16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with tempfile.TemporaryDirectory() as scratch:
        args = SFTConfig(
            scratch,
            max_steps=MAX_STEPS,
            per_device_train_batch_size=BATCH_SIZE,
            train_sampling_strategy="sequential",
            shuffle_dataset=False,
            bf16=native_bf16,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            max_length=None,
            save_strategy="no",
            report_to="none",
            logging_steps=100,
            seed=0,
        )
        deadline = Deadline(budget_s)
        optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, deadline.learning_rate)
        trainer = SFTTrainer(
            model,
            args,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[deadline],
            optimizers=(optimizer, schedule),
        )
        trainer.train()


@torch.no_grad()
def sample(model: Any, tokenizer: Any) -> tuple[list[int], list[float]]:
    """Lengths in tokens and rewards of completions at temperature 1 on problems like those of the recipe."""
    problems = arithmetic.make_dataset(NUM_SAMPLES, seed=1)
    inputs = tokenizer.apply_chat_template(
        list(problems["prompt"]),
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=MAX_COMPLETION_LENGTH, use_cache=True)
    completions = model.eval().generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    rewards = arithmetic.product_reward([[{"content": text}] for text in texts], list(problems["solution"]))
    return (completions != tokenizer.pad_token_id).sum(1).tolist(), rewards


def report(model: Any, tokenizer: Any, train_s: float) -> float:
    """Prints how it turned out; returns the share of correct samples."""
    start = time.monotonic()
    lengths, rewards = sample(model, tokenizer)
    cuts = quantiles(lengths, n=100)
    print(f"parameters         {model.num_parameters() / 1e6:.1f} million")
    print(f"training           {train_s:.0f} s")
    print(f"sampled length     median {cuts[49]:.0f}, p90 {cuts[89]:.0f}, p99 {cuts[98]:.0f} tokens")
    print(f"share correct      {mean(rewards):.2f} of {NUM_SAMPLES} samples, {time.monotonic() - start:.0f} s")
    return mean(rewards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="3m", help="parameters; the others than 3m want a GPU")
    parser.add_argument("--output", type=Path, help="where it is kept")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="of training")
    parser.add_argument("--force", action="store_true", help="train anew")
    args = parser.parse_args()
    args.output = args.output or arithmetic.tiny_policy_dir(args.size)
    if args.output.exists() and not args.force:
        print(f"{args.output} is there already; --force trains anew")
        return
    start = time.monotonic()
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    size = SIZES[args.size]
    model = make_model(size)
    num_pools = -(-MAX_STEPS * BATCH_SIZE // POOL_SIZE)
    dataset = arithmetic.make_dataset(num_pools * POOL_SIZE, seed=0, with_completion=True)
    train(model, tokenizer, batched_by_length(dataset), args.budget, size.learning_rate)
    if report(model, tokenizer, time.monotonic() - start) < MIN_CORRECT:
        sys.exit(
            f"Not saved: GRPO learns nothing from a policy that is right less than {MIN_CORRECT:.0%} of the time. "
            f"This machine was too slow or too busy for {args.budget:.0f} s of training; give it more by --budget."
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=args.output.parent))
    model.bfloat16().save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    shutil.rmtree(args.output, ignore_errors=True)
    scratch.rename(args.output)  # only a complete policy ever has this name
    print(f"saved              {args.output}")


if __name__ == "__main__":
    main()
