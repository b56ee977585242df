"""The engines that `bench_rollout.py` times. Each takes a workload and a seed and returns one list of ids per row."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from bench.device import Stopwatch
from bench.vllm_engine import VllmEngine
from bench.workload import Workload
from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.drafter.quantized_drafter import QuantizedDrafter, requantize
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.sampling.samplers import RejectionSampler, VerifyResult


ENGINES = ("stock", "continuous", "vllm", "plain", "selfspec")  # slowest first, roughly: the order of ratios
NUM_LOTS, LOTS_PER_ROW, LOTS_PER_SEED = 2**16, 7919, 1009  # primes: rows and rollouts begin at places of their own
TRL_CB_MEMORY_PERCENT = 0.5  # TRL's default for its continuous batching, which leaves room for training


class Engine(Protocol):
    def rollout(self, workload: Workload, seed: int) -> list[list[int]]: ...


def _generation_config(workload: Workload, **kwargs: Any) -> GenerationConfig:
    """What TRL builds from GRPOConfig's defaults, without end-of-sequence tokens."""
    return GenerationConfig(
        max_new_tokens=max(workload.lengths),
        do_sample=True,
        pad_token_id=0,
        temperature=workload.temperature,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        disable_compile=True,
        **kwargs,
    )


class ForcedLengths(StoppingCriteria):
    """Marks each row done at its own length, as an end-of-sequence token would."""

    eos_token_id = None  # its presence makes `generate` pad rows that are done

    def __init__(self, prompt_width: int, lengths: Sequence[int], device: torch.device) -> None:
        self.ends = torch.tensor([prompt_width + length for length in lengths], device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return input_ids.shape[1] >= self.ends  # type: ignore[return-value]


class StockEngine:
    """`model.generate` as TRL calls it: a left-padded batch that decodes until its slowest row is done."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def rollout(self, workload: Workload, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        device = self.model.device
        width = max(map(len, workload.prompt_ids))
        padded = [[0] * (width - len(ids)) + ids for ids in workload.prompt_ids]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in workload.prompt_ids]
        output = self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=torch.tensor(padded, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=_generation_config(workload),
            stopping_criteria=StoppingCriteriaList([ForcedLengths(width, workload.lengths, device)]),
        )
        completions = output[:, width:].tolist()
        if any(any(row[length:]) for row, length in zip(completions, workload.lengths, strict=True)):
            raise RuntimeError("engine 'stock' went on after a row's forced length")
        return [row[:length] for row, length in zip(completions, workload.lengths, strict=True)]


class ContinuousEngine:
    """transformers' `generate_batch` as TRL calls it: its own loop, with a length for each request."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def rollout(self, workload: Workload, seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        hints = WorkloadHints(
            max_prompt_length=max(map(len, workload.prompt_ids)),
            max_generated_length=max(workload.lengths),
            num_requests=len(workload.prompt_ids),
        )
        with self.model.continuous_batching_context_manager(  # pyright: ignore[reportCallIssue]
            generation_config=_generation_config(workload, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(max_memory_percent=TRL_CB_MEMORY_PERCENT),
            block=True,
            timeout=5,
            workload_hints=hints,
        ) as manager:
            names = [
                manager.add_request(ids, max_new_tokens=length, eos_token_id=-1)
                for ids, length in zip(workload.prompt_ids, workload.lengths, strict=True)
            ]
            results: dict[str, list[int]] = {}
            while len(results) < len(names):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    results[result.request_id] = list(result.generated_tokens)
                elif result is None and not manager.is_running():
                    raise RuntimeError("engine 'continuous': transformers' generation thread ended early")
        return [results[name] for name in names]


class SyntheticVerification(RejectionSampler):
    """Does the real verification's work, then accepts each draft with one fixed probability instead of its verdict.

    Lots are drawn ahead: on a GPU, each small operation within a round would add to what verifying seems to cost.
    """

    def __init__(self, seed: Tensor, longest_draft: int, acceptance: float) -> None:
        super().__init__(seed, longest_draft)
        lots = torch.rand(NUM_LOTS, generator=torch.Generator().manual_seed(0))
        self.accepts = (lots < acceptance).long().to(seed.device)

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> VerifyResult:
        real = super().verify(drafts, scores, row_ids, positions)
        start = row_ids.add(self.seed, alpha=LOTS_PER_SEED) * LOTS_PER_ROW
        places = (positions[:, : drafts.shape[1]] + start[:, None]).remainder_(NUM_LOTS)
        num_accepted = self.accepts[places].cumprod(dim=1).sum(dim=1)
        last = real.tokens.gather(1, real.num_accepted[:, None])
        tokens = torch.cat([drafts, last], dim=1).scatter(1, num_accepted[:, None], last)
        return VerifyResult(num_accepted, tokens, real.logprobs)  # of other tokens: they mean nothing here


class SyntheticEngine(SelfSpecEngine):
    """Random weights say nothing about acceptance: here it is given. Its samples are meaningless."""

    def __init__(self, model: PreTrainedModel, options: SelfSpecOptions, acceptance: float) -> None:
        super().__init__(model, options)
        self._sampler = SyntheticVerification(self._seed, options.longest_draft, acceptance)


class OwnEngine:
    """Ours: `plain` with 0 drafted tokens, `selfspec` otherwise; each rollout ends as a trainer's does."""

    def __init__(self, model: PreTrainedModel, build: Callable[[], SelfSpecEngine]) -> None:
        self.model = model
        with Stopwatch(model.device) as watch:
            self.engine = build()
        self.build_s = watch.seconds
        self.warmup_s: list[float] = []  # of whole rollouts before the timed ones
        self.stats = RolloutStats()  # of the timed rollouts
        self.refresh_s = 0.0  # quantizing the drafter, which these constant weights need only once, at the first draft

    def rollout(self, workload: Workload, seed: int) -> list[list[int]]:
        config = _generation_config(workload)
        output = self.engine.generate(workload.prompt_ids, config, seed=seed, max_new_tokens=workload.lengths)
        self.engine.release()
        self.stats += output.stats
        return output.completion_ids

    @property
    def learns(self) -> bool:
        """Whether a gate has costs to learn."""
        return self.engine.options.num_speculative_tokens != 0

    def forget_warmup(self) -> None:
        self.refresh_s, self.stats = self.stats.refresh_s, RolloutStats()

    def requantize_s(self, repeats: int = 3) -> list[float]:
        """Seconds of quantizing all weights into the drafters that are there; empty where there is none."""
        drafters = [drafter for drafter in self.engine.drafters.values() if isinstance(drafter, QuantizedDrafter)]
        modules = [drafter.module for drafter in drafters if drafter.module is not None]
        if not modules:
            return []
        self.model.requires_grad_(True)  # frozen weights are not quantized again
        seconds = []
        for _ in range(repeats):
            with Stopwatch(self.model.device) as watch:
                for module in modules:
                    requantize(module, self.engine._replica)
            seconds.append(watch.seconds)
        self.model.requires_grad_(False)
        return seconds


def engine_makers(
    model: PreTrainedModel,
    workload: Workload,
    names: Sequence[str],
    options: SelfSpecOptions,
    synthetic_acceptance: float | None,
    vllm_python: str = sys.executable,
    path: Path | None = None,
) -> dict[str, Callable[[], Engine]]:
    """What builds the named engines on one model, in the order given.

    Args:
        options: those of `selfspec`.
        path: where the model's weights are, for vLLM; `None` for random ones.
    """

    def selfspec() -> SelfSpecEngine:
        if synthetic_acceptance is None:
            return SelfSpecEngine(model, options)
        return SyntheticEngine(model, replace(options, drafter="quantized"), synthetic_acceptance)

    makers: dict[str, Callable[[], Engine]] = {
        "stock": lambda: StockEngine(model),
        "continuous": lambda: ContinuousEngine(model),
        "vllm": lambda: VllmEngine(model, workload, vllm_python, path),
        "plain": lambda: OwnEngine(model, lambda: SelfSpecEngine(model, SelfSpecOptions(num_speculative_tokens=0))),
        "selfspec": lambda: OwnEngine(model, selfspec),
    }
    return {name: makers[name] for name in names}
