"""Which of the drafter's two forms a LoRA policy gets: the one that costs less, by measured seconds.

Merged weights are quantized at every refresh; live adapters cost two small products per layer and draft step. So what
counts is how many draft steps follow on a refresh. That is known after the first rollouts, and until then nothing is
lost: a new drafter is quantized as a whole in either form.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from trl_selfspec import kernels
from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.drafter.linear_backends import DEQUANTIZING
from trl_selfspec.drafter.quantized_linear import QuantizedLinear
from trl_selfspec.policy.peft_weights import find_module, lora_factors
from trl_selfspec.policy.replica import PolicyReplica, ReplicaLinear
from trl_selfspec.utils import Clock


logger = logging.get_logger(__name__)

TIMED_CALLS = 3


class FormCosts(NamedTuple):
    """Seconds that one form takes and the other does not."""

    live_s: float  # per draft step
    merged_s: float  # per refresh


class FormChoice:
    """Starts with merged adapters and chooses at the 2nd, 4th, 8th, ... refresh.

    Becoming live costs what a refresh of merged weights would have. Going back has to save its quantization within as
    many refreshes as there were. Samples follow the policy's law in either form.

    Args:
        costs: measures both forms at a number of rows; `None` where no layer has LoRA adapters that may stay live.
        by_cost: `False` keeps the form that is there: with rejection, other drafts lead to other samples, so a run
            that is to repeat must not depend on a clock.
    """

    def __init__(self, costs: Callable[[int], FormCosts | None], by_cost: bool = True) -> None:
        self._costs, self._by_cost = costs, by_cost
        self._refreshes = 0
        self._since = RolloutStats()  # the last choice
        self._step_s: dict[bool, float] = {}  # what draft steps took, live or not

    def add(self, stats: RolloutStats) -> None:
        """Counts the draft steps of a rollout."""
        self._since += stats

    def live(self, current: bool) -> bool:
        """Whether the refresh that is due should have live adapters, as the drafter has them now or not."""
        self._refreshes += 1
        steps = self._since.draft_steps
        if not self._by_cost or not steps or self._refreshes.bit_count() != 1:
            return current
        rows = round(self._since.num_draft_tokens / steps)
        if (costs := self._costs(rows)) is None:
            return current
        self._step_s[current] = self._since.draft_s / steps
        steps /= self._refreshes // 2  # since the last choice
        self._since = RolloutStats()
        live_s = costs.live_s
        if len(self._step_s) == 2:  # layers that run in one call without adapters are slower by more than the products
            live_s = max(live_s, self._step_s[True] - self._step_s[False])
        saved_s = costs.merged_s - live_s * steps
        chosen = -saved_s * self._refreshes <= costs.merged_s if current else saved_s > 0
        if chosen != current:
            logger.info(
                f"The drafter's LoRA adapters are {'live' if chosen else 'merged'} now: per refresh, quantizing "
                f"merged weights takes {1e3 * costs.merged_s:.3g} ms, and live adapters add {1e3 * live_s:.3g} ms to "
                f"each of {steps:.0f} draft steps of {rows} rows."
            )
        return chosen


def measured_choice(replica: PolicyReplica, qtype: str, by_cost: bool) -> FormChoice:
    """The choice between the forms of this replica's drafter."""
    return FormChoice(functools.partial(form_costs, replica, qtype), by_cost)


@torch.no_grad()
def form_costs(replica: PolicyReplica, qtype: str, num_rows: int) -> FormCosts | None:
    """Measured on one layer of each shape; `None` where there are no LoRA layers."""
    shapes = Counter((layer.weight.shape[0], layer.weight.shape[1], rank) for layer, rank in _lora_layers(replica))
    if not shapes:
        return None
    like = next(_lora_layers(replica))[0].weight
    live = sum(count * _live_seconds(like, num_rows, *shape) for shape, count in shapes.items())
    merged = sum(count * _merged_seconds(like, qtype, n, k) for (n, k, _), count in shapes.items())
    return FormCosts(live, merged)


@torch.no_grad()
def requantize_seconds(replica: PolicyReplica, qtype: str) -> float:
    """What quantizing the whole replica should take, from one layer of middle size."""
    weights = [module.weight for module in replica.model.modules() if isinstance(module, ReplicaLinear)]
    if not weights:
        return 0.0
    sample = sorted(weights, key=torch.numel)[len(weights) // 2]
    out_features, in_features = sample.shape
    return _merged_seconds(sample, qtype, out_features, in_features) * sum(map(torch.numel, weights)) / sample.numel()


def _lora_layers(replica: PolicyReplica) -> Iterator[tuple[ReplicaLinear, int]]:
    """Layers whose adapters may stay live, with the rank of all active ones together."""
    for name, module in replica.model.named_modules():
        if (
            isinstance(module, ReplicaLinear)
            and (factors := lora_factors(find_module(replica.base, name))) is not None
        ):
            yield module, len(factors[0])


def _live_seconds(like: Tensor, num_rows: int, out_features: int, in_features: int, rank: int) -> float:
    x, down = like.new_zeros(num_rows, in_features), like.new_zeros(rank, in_features)
    up, y = like.new_zeros(out_features, rank), like.new_zeros(num_rows, out_features)
    return _least_seconds(like, lambda: y + kernels.linear(kernels.linear(x, down), up))


def _merged_seconds(like: Tensor, qtype: str, out_features: int, in_features: int) -> float:
    weight = like.new_zeros(out_features, in_features)
    # On a GPU, choosing would compile and time every kernel; the price then leaves out what the chosen one derives.
    backend = DEQUANTIZING if like.is_cuda else None
    layer = QuantizedLinear(in_features, out_features, None, qtype, like.dtype, like.device, backend)
    return _least_seconds(like, lambda: layer.requantize_(weight))


def _least_seconds(like: Tensor, call: Callable[[], object]) -> float:
    clock = Clock(like.device)
    clock.mark()
    for _ in range(TIMED_CALLS):
        call()
        clock.mark()
    return min(clock.laps())
