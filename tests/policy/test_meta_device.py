"""Rounds on torch's meta device: nothing is computed, but what mixes devices or waits for one fails.

So does whatever works only where the device's memory is the host's: here it fails without a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from pairwise import pairwise
from tiny_models import tiny_model
from torch import Tensor
from transformers import GenerationConfig

from trl_selfspec import SelfSpecEngine, SelfSpecOptions, kernels
from trl_selfspec.engine import engine
from trl_selfspec.engine import kv_budget as memory
from trl_selfspec.engine.model_runner import Program
from trl_selfspec.engine.request import make_requests
from trl_selfspec.engine.rollout import Rollout
from trl_selfspec.policy.replica import PolicyReplica
from trl_selfspec.sampling import samplers
from trl_selfspec.sampling.logits_processing import BatchedLogitsProcessor, effective_generation_config


LAWS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "processed": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    | {"repetition_penalty": 1.1},
}


@pytest.fixture(autouse=True)
def _without_numbers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves out what reads numbers before a rollout begins."""
    monkeypatch.setattr(engine, "self_check", lambda *args: None)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(PolicyReplica, "refresh", lambda self: False)
    monkeypatch.setattr(PolicyReplica, "_policy_state", lambda self: ())
    monkeypatch.setattr(SelfSpecEngine, "_forward_context", lambda self: contextlib.nullcontext())
    with torch.no_grad():
        yield


def rollout(family: str, law: str, verification: str) -> Rollout:
    with torch.device("meta"):
        model = tiny_model(family)
    options = SelfSpecOptions(draft_qtype="qint8", num_speculative_tokens=3, verification=verification)  # type: ignore[arg-type]
    tested = SelfSpecEngine(model, options)
    config = effective_generation_config(model, GenerationConfig(max_new_tokens=8, **LAWS[law]))  # type: ignore[arg-type]
    requests = make_requests([[5, 6, 7], [8, 9], [5, 6, 7]], config, None, 96, 128)
    made = tested._rollout(
        requests, BatchedLogitsProcessor.from_generation_config(model, config, "cpu"), 0, None, False
    )
    made._admit()
    made._prepare(made.drafters["qint8"])
    return made


def run(made: Rollout) -> list[Tensor]:
    runner, sizes = made.runner, (3, 64)
    quantized, suffix = (made.drafters[name] for name in ("qint8", "suffix"))
    step, match, verify = (
        Program("draft", *sizes),
        Program("match", *sizes, gamma=2),
        Program("verify", *sizes, gamma=2),
    )
    return [
        runner._plain(Program("plain", *sizes)),
        *(runner._draft(quantized, step) for _ in range(2)),
        runner._verify(runner.sampler, verify),
        runner._draft(suffix, match),
        runner._verify(runner.token_sampler, verify),
    ]


@pairwise(verification=["rejection", "coupled"], law=list(LAWS), family=["qwen2", "gemma2"])
def test_a_round_stays_on_its_device(family: str, law: str, verification: str):
    """Prevents a tensor that is made on the host, which a GPU refuses or waits for."""
    assert all(report.is_meta for report in run(rollout(family, law, verification)))


def a_host_tensor(scores: Tensor, *args: Tensor) -> Tensor:
    return scores.argmax(-1) + torch.ones(len(scores), dtype=torch.int64)


def a_host_sync(scores: Tensor, *args: Tensor) -> Tensor:
    return scores.argmax(-1) + int(scores.argmax())


@pytest.mark.parametrize("mistake", [a_host_tensor, a_host_sync])
def test_a_round_that_leaves_its_device_is_noticed(monkeypatch: pytest.MonkeyPatch, mistake: Callable):
    """Negative control: meta tensors put up with some mixtures."""
    monkeypatch.setattr(samplers.RejectionSampler, "draw", lambda self, *args: mistake(*args))
    with pytest.raises(RuntimeError, match=r"device|meta"):
        run(rollout("qwen2", "sampling", "rejection"))
