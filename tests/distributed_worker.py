"""Runs in each of several processes: training runs whose outcome tests read from one file per rank.

torchrun --nproc_per_node 2 tests/distributed_worker.py ddp|fsdp|history|zero2|zero3 OUTPUT_DIR
"""

import gc
import hashlib
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from fsdp_on_cpu import allow_fsdp_on_cpu
from peft import LoraConfig
from tool_runs import MAX_COMPLETION, double, make_tool_tokenizer, tool_dataset, tool_policy
from torch.distributed.tensor import DTensor
from trl_runs import ALWAYS_SPECULATE, PROMPTS, Recorder, make_dataset, make_model, make_trainer, train

from trl_selfspec import SelfSpecEngine, SelfSpecGRPOTrainer
from trl_selfspec.policy.refusals import UnsupportedModelError
from trl_selfspec.policy.replica import PolicyReplica
from trl_selfspec.policy.sharding import fingerprint, gathered, gathered_partitions
from trl_selfspec.trainer import engine_sync, mixin
from trl_selfspec.trainer.engine_sync import autocast_dtype, fsdp_param_dtype


# Groups of 4 over ranks of 6 rows: the second group of each generation lies on both.
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 6,
    "num_generations": 4,
    "gradient_checkpointing": False,
    "max_steps": 3,
    "selfspec_draft_qtype": "qint4",
}
LAUNCH: dict[str, Any] = {}  # what a backend needs in the training arguments


def rank() -> int:
    return PartialState().process_index


class _Counting(SelfSpecGRPOTrainer):
    """Keeps this rank's own counters, and whether a rollout left the policy's parameters as they were."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generations: list[dict[str, Any]] = []

    def _generate(self, prompts: list) -> Any:
        before = self._policy_state()
        output = super()._generate(prompts)
        self.generations.append(
            {
                "rows": self._rollout.stats.num_rows,
                "turns": self._rollout.turns,
                "rounds": self._rollout.stats.num_rounds_speculative,
                "drafted": self._rollout.stats.num_draft_tokens,
                "accepted": self._rollout.stats.num_accepted_tokens,
                "reused": self._rollout.stats.reused_prompt_tokens,
                "untouched": self._policy_state() == before,
            }
        )
        return output

    def _policy_state(self) -> list[Any]:
        fingerprint(self._policy)  # puts back what the last forward left gathered
        return [(id(p), p._version, p.shape, p.requires_grad, p.grad is None) for p in self._policy.parameters()]


class _Trainer(_Counting):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generation_config.max_new_tokens = 4 + 8 * rank()  # ranks take different numbers of rounds


def digest(model: torch.nn.Module) -> str:
    """Of all weights, whole; collective where they are sharded."""
    fingerprint(model)
    sha = hashlib.sha256()
    with gathered_partitions(model):
        for parameter in model.parameters():
            sha.update(gathered(parameter).detach().float().contiguous().numpy().tobytes())  # type: ignore[union-attr]
    return sha.hexdigest()


def run(
    folder: Path, resume: str | None = None, trainer_class: type[_Counting] = _Trainer, **overrides: Any
) -> dict[str, Any]:
    reward = Recorder()
    trainer = make_trainer(folder, trainer_class, reward=reward, **(ALWAYS_SPECULATE | OPTIONS | LAUNCH | overrides))
    log = train(trainer, resume_from_checkpoint=resume)
    return {
        "log": log,
        "eval_log": [entry for entry in trainer.state.log_history if "eval_loss" in entry],
        "completions": reward.completion_ids,
        "generations": trainer.generations,
        "weights": digest(trainer.model),
        "warnings": sorted(trainer._warned),
        "backend": str(trainer.accelerator.distributed_type).rpartition(".")[2],
        "parameters_held": sum(local_size(parameter) for parameter in trainer.model.parameters()),
    }


def local_size(parameter: torch.Tensor) -> int:
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.data.numel()


def stopped_and_resumed(folder: Path) -> dict[str, Any]:
    whole = run(folder / "whole", save_strategy="steps", save_steps=2)
    resumed = run(folder / "resumed", str(folder / "whole" / "checkpoint-2"))
    return {"whole": whole, "resumed": resumed, "repeated": run(folder / "repeated")}


def uneven_turns(folder: Path) -> dict[str, Any]:
    """Rank 1 generates more often and more rows than rank 0, as in a tool loop."""
    samples: list[list[list[int]]] = []

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenize = trainer.processing_class
        samples.append(trainer.generate_ids(tokenize(text=PROMPTS)["input_ids"]))
        for _ in range(2 * rank()):
            trainer.generate_ids(tokenize(text=PROMPTS[: 1 + rank()])["input_ids"])
        prompt_ids = tokenize(text=prompts)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": trainer.generate_ids(prompt_ids), "logprobs": None}

    return run(folder, max_steps=2, trainer_kwargs={"rollout_func": rollout}) | {"samples": samples}


def tools_on_one_rank(folder: Path) -> dict[str, Any]:
    """TRL's tool loop, with rows that call a tool on rank 1 alone."""
    kwargs = {"processing_class": make_tool_tokenizer(), "tools": [double]}
    options = {"max_completion_length": MAX_COMPLETION, "generation_kwargs": {"do_sample": False}, "max_steps": 1}
    dataset = tool_dataset(["1", "3", "5"] if rank() else ["hi"] * 3)
    return run(folder, None, _Counting, model=tool_policy(), train_dataset=dataset, trainer_kwargs=kwargs, **options)


def outside_a_rollout(folder: Path) -> dict[str, Any]:
    """All ranks generate without training; before the second call, weights change on rank 1 alone."""
    trainer = make_trainer(folder, _Trainer, **(ALWAYS_SPECULATE | OPTIONS))
    prompt_ids = trainer.processing_class(text=PROMPTS)["input_ids"]
    trainer.generate_ids(prompt_ids)
    refreshes: list[bool] = []
    refresh = SelfSpecEngine.refresh
    SelfSpecEngine.refresh = lambda engine, draft=True: (refreshes.append(draft), refresh(engine, draft))[0]  # type: ignore[method-assign,assignment]
    try:
        if rank() == 1:
            with torch.no_grad():
                trainer.model.lm_head.weight.mul_(1.1)
        trainer.generate_ids(prompt_ids)
    finally:
        SelfSpecEngine.refresh = refresh  # type: ignore[method-assign]
    return {"refreshes": len(refreshes)}


def unsupported_on_one_rank(folder: Path) -> dict[str, Any]:
    def build(*args: Any) -> SelfSpecEngine:
        engine = SelfSpecEngine(*args)
        if rank() == 1:
            raise UnsupportedModelError("this rank alone can't")
        return engine

    engine_sync.SelfSpecEngine = build  # type: ignore[misc,assignment]
    try:
        return run(folder, max_steps=1)
    finally:
        engine_sync.SelfSpecEngine = SelfSpecEngine  # type: ignore[misc]


def without_refresh(folder: Path) -> dict[str, Any]:
    """Negative control: an engine that stays at the first weights."""
    refresh, stale = SelfSpecEngine.refresh, PolicyReplica.stale
    SelfSpecEngine.refresh, PolicyReplica.stale = lambda engine, draft=True: None, False  # type: ignore[method-assign,assignment]
    try:
        return run(folder, max_steps=2)
    finally:
        SelfSpecEngine.refresh, PolicyReplica.stale = refresh, stale  # type: ignore[method-assign]


class _Recurring(_Counting):
    """Keeps each generation's rows, and what the history held of their prompts before."""

    def _generate(self, prompts: list) -> Any:
        output = super()._generate(prompts)
        self.generations[-1] |= {"known": self.known, "rows": list(zip(*output[:2], strict=True))}
        return output

    def _engine_rollout(self, prompt_ids: list[list[int]]) -> Any:
        history: Any = getattr(self._engine, "history", None)
        distinct = {tuple(prompt): prompt for prompt in prompt_ids}.values()
        self.known = [[prompt, [list(ids) for ids in history.get(prompt)] if history else []] for prompt in distinct]
        return super()._engine_rollout(prompt_ids)


def two_epochs(folder: Path, **overrides: Any) -> dict[str, Any]:
    """12 prompts, 3 a generation. They are shuffled anew in each epoch."""
    dataset = Dataset.from_list([{"prompt": f"{number}+{number % 5}="} for number in range(12)])
    return run(folder, None, _Recurring, train_dataset=dataset, **{"max_steps": 8} | overrides)


def each_rank_remembers_its_own(folder: Path) -> dict[str, Any]:
    """Negative control."""
    gathered_rows = mixin.gathered_rows
    mixin.gathered_rows = lambda *rows: rows  # type: ignore[assignment]
    try:
        return two_epochs(folder)
    finally:
        mixin.gathered_rows = gathered_rows


def without_history(folder: Path) -> dict[str, Any]:
    return two_epochs(folder, selfspec_history=False)


def a_rollout_fails_on_one_rank(folder: Path) -> dict[str, Any]:
    generate, calls = SelfSpecEngine.generate, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 2 and rank() == 1:
            raise RuntimeError("this rank alone failed")
        return generate(*args, **kwargs)

    SelfSpecEngine.generate = failing  # type: ignore[method-assign]
    try:
        return two_epochs(folder, max_steps=3)
    finally:
        SelfSpecEngine.generate = generate  # type: ignore[method-assign]


def with_lora(folder: Path) -> dict[str, Any]:
    peft_config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return run(folder, trainer_kwargs={"peft_config": peft_config})


def with_evaluation(folder: Path) -> dict[str, Any]:
    """Ranks of 5 evaluation rows and groups of 2; evaluation leaves FSDP's last layers gathered."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2, "per_device_eval_batch_size": 5}
    return run(folder, trainer_kwargs={"eval_dataset": make_dataset().select(range(5))}, **options)


def ended(folder: Path) -> dict[str, Any]:
    """The last scenario: it takes the process group away. What DDP wraps stays with the trainer."""
    trainer = make_trainer(folder, SelfSpecGRPOTrainer, **(ALWAYS_SPECULATE | OPTIONS | {"max_steps": 1}))
    trainer.train()
    wrapped = weakref.ref(trainer.model_wrapped)
    before = type(wrapped()).__name__
    trainer.end()
    return {"before": before, "is_freed": wrapped() is None, "has_group": torch.distributed.is_initialized()}


@torch.no_grad()
def bf16_logits(folder: Path) -> dict[str, Any]:
    """Largest distance of the replica's logits from the sharded policy's, with and without FSDP's cast."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = make_model()
    policy, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    tokens = torch.arange(3, 99).view(4, 24)
    expected = policy.eval()(input_ids=tokens).logits.float()
    distance = {}
    for name, param_dtype in {"cast": fsdp_param_dtype(accelerator), "uncast": None}.items():
        replica = PolicyReplica(policy, autocast_dtype(accelerator), param_dtype)
        own = type(model)(model.config).eval()  # transformers' own modules with the replica's tensors
        for target, source in zip(own.parameters(), replica.model.parameters(), strict=True):
            target.data = source
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            distance[name] = (own(input_ids=tokens).logits.float() - expected).abs().max().item()
    return distance


def allow_deepspeed_on_cpu(stage: int, folder: Path) -> None:
    """As `accelerate launch` asks for it. Without `ddp_backend`, ranks on CPUs would not find each other."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    config = {"zero_optimization": zero, "train_batch_size": "auto", "gradient_accumulation_steps": "auto"}
    path = folder / f"deepspeed_rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(config))
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    LAUNCH.update({"ddp_backend": "gloo", "use_cpu": False})


SUITES = {
    "ddp": [
        stopped_and_resumed,
        uneven_turns,
        tools_on_one_rank,
        outside_a_rollout,
        unsupported_on_one_rank,
        with_evaluation,
        ended,
    ],
    "fsdp": [
        stopped_and_resumed,
        tools_on_one_rank,
        with_evaluation,
        with_lora,
        without_refresh,
        unsupported_on_one_rank,
        bf16_logits,
    ],
    "history": [two_epochs, each_rank_remembers_its_own, without_history, a_rollout_fails_on_one_rank],
    "zero2": [stopped_and_resumed, with_lora],
    "zero3": [stopped_and_resumed, with_evaluation, with_lora, without_refresh],
}


def main(suite: str, output_dir: Path) -> None:
    torch.set_num_threads(1)
    if suite.startswith("zero"):
        allow_deepspeed_on_cpu(int(suite[-1]), output_dir)
    else:
        PartialState(cpu=True)
    if suite == "fsdp":
        allow_fsdp_on_cpu()
    results = {}
    for scenario in SUITES[suite]:
        results[scenario.__name__] = scenario(output_dir / scenario.__name__)
        GradientState._reset_state()
    (output_dir / f"rank{rank()}.json").write_text(json.dumps(results))
    gc.collect()  # a DDP that outlives the group can deadlock: see `SelfSpecMixin.end`
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
