"""The engine of a policy in training: built when it is first needed, brought up to date before a rollout.

Each process has an engine of its own. All of them have it or none, and all follow a change of weights together, since
both gather sharded weights; what one process finds out alone is told to the others first.
"""

from typing import Any

import torch
from torch import nn

from trl_selfspec.engine import SelfSpecEngine
from trl_selfspec.mirror import UnsupportedModelError
from trl_selfspec.options import SelfSpecOptions


class PolicyFollower:
    """
    Keeps one engine at the policy's current weights.

    Args:
        options ([`SelfSpecOptions`]):
            The engine's options.
    """

    def __init__(self, options: SelfSpecOptions) -> None:
        self.options = options
        self.engine: SelfSpecEngine | None = None
        self.unsupported: str | None = None  # why there can't be an engine; set on every process or on none
        self._state: dict[str, Any] | None = None  # of a checkpoint, for an engine that is yet to be built
        self._step = -1
        self._drafter_interval = 0  # the last one in which the drafter was quantized
        self._unseen_change = False

    def follow(self, policy: nn.Module, step: int, accelerator: Any) -> None:
        """Builds the engine, or refreshes it if weights changed since the last call. Collective."""
        if self.unsupported is not None:
            return
        interval = step // self.options.refresh_interval
        if self.engine is None:
            self._build(policy, accelerator)
        else:
            # Versions see what no step does (`load_best_model_at_end`, a script), steps what DeepSpeed writes past
            # versions. One process that saw a change is enough.
            changed = step != self._step or self._unseen_change or self.engine.stale
            if _number_of_processes_where(changed, accelerator):
                self.engine.refresh(draft=interval != self._drafter_interval)
        self._step, self._drafter_interval, self._unseen_change = step, interval, False

    def weights_changed(self) -> None:
        """Makes the next `follow` refresh, for a change that neither steps nor versions tell."""
        self._unseen_change = True

    def state_dict(self) -> dict[str, Any] | None:
        """What the engine learned; `None` if there never was one."""
        return self._state if self.engine is None else self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state
        if self.engine is not None:
            self.engine.load_state_dict(state)

    def _build(self, policy: nn.Module, accelerator: Any) -> None:
        engine, reason = None, None
        try:
            engine = SelfSpecEngine(policy, self.options, autocast_dtype(accelerator), fsdp_param_dtype(accelerator))  # type: ignore[arg-type]
        except UnsupportedModelError as error:
            reason = str(error)
        if failures := _number_of_processes_where(reason is not None, accelerator):
            self.unsupported = reason or f"the engine could not be built in {failures} of the other processes"
            return
        assert engine is not None
        if self._state is not None:
            engine.load_state_dict(self._state)
        self.engine = engine


def autocast_dtype(accelerator: Any) -> torch.dtype | None:
    """The autocast in which accelerate runs the policy's forward, which defines the law that samples follow."""
    if not accelerator.native_amp:  # DeepSpeed has its own mixed precision: 16-bit parameters, no autocast
        return None
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


def fsdp_param_dtype(accelerator: Any) -> torch.dtype | None:
    """The dtype to which FSDP casts parameters, norms and embeddings included, while it gathers them."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    return None if policy is None else policy.param_dtype


def _number_of_processes_where(condition: bool, accelerator: Any) -> int:
    flag = torch.tensor(float(condition), device=accelerator.device)
    return round(accelerator.reduce(flag, reduction="sum").item())
