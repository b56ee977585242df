"""Keeps a trainer's engine in sync with its policy: builds it, refreshes it, checks it, or gives it up.

Each process has its own engine. Either all processes have one or none has, and all refresh together, because
refreshing gathers sharded weights. What one process alone notices is therefore reduced over all of them first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trl_selfspec.control.controller import Controller
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.utils import failures_raised_as


# The engine is checked against the policy again where the logged difference of log-probabilities exceeds this.
DOUBT_IN_NOISES = 4.0  # in multiples of the difference that the start-up check measured
LEAST_DOUBT = 1e-3


class EngineFailedError(RuntimeError):
    """The engine failed while it was built, refreshed or checked, or in a rollout; the message names the reason."""


class EngineSync:
    """
    Keeps one engine at the policy's current weights.

    Args:
        options ([`SelfSpecOptions`]):
            The engine's options.
    """

    def __init__(self, options: SelfSpecOptions) -> None:
        self.options = options
        self.engine: SelfSpecEngine | None = None
        self.unsupported: str | None = None  # the reason why there is no engine; set on every process or on none
        self._state: dict[str, Any] | None = None  # from a checkpoint, until the engine is built
        self._step = -1
        self._drafter_interval = 0  # the last one in which the drafter was quantized
        self._marked_changed = False
        self._failure: str | None = None  # of the engine on this process, not yet reported to the others
        self._doubt: str | None = None  # the reason to check the engine against the policy again
        self._doubt_above = 0.0  # mean difference of log-probabilities

    def sync(self, policy: nn.Module, step: int, accelerator: Any) -> None:
        """Builds the engine, or refreshes it, and checks it again where there is a reason to. Collective."""
        if self.unsupported is not None:
            return
        interval = step // self.options.refresh_interval
        if self.engine is None:
            self._try(lambda: self._build(policy, accelerator), accelerator)
        else:
            # `stale` sees changes outside of steps (`load_best_model_at_end`, an EMA); DeepSpeed's writes show in the
            # step alone. A change on one process counts for all; copies are renewed in any case.
            changed = step != self._step or self._marked_changed or self.engine.stale
            changed = _number_of_processes_where(changed, accelerator) > 0
            self._try(lambda: self._refresh(changed and interval != self._drafter_interval), accelerator)
            if _number_of_processes_where(self._doubt is not None, accelerator):
                self._check_again(accelerator)
        self._step, self._drafter_interval, self._marked_changed = step, interval, False

    def mark_changed(self) -> None:
        """Makes the next `sync` refresh the drafter too, after a change that neither steps nor `stale` show."""
        self._marked_changed = True

    def report_failure(self, reason: str) -> None:
        """Records that the engine failed in a rollout on this process; the next `sync` drops it on all processes."""
        self._failure = reason

    def observe_logprob_difference(self, mean: float, temperature: float) -> None:
        """Asks for another check if log-probabilities differ by more than rounding explains on this policy.

        Args:
            mean: mean |engine's - trainer's| log-probability, the same on every process.
            temperature: the temperature of sampling; a low one magnifies differences.
        """
        if self.engine is None or not mean * min(temperature, 1.0) > self._doubt_above:
            return
        self._doubt = (
            f"log-probabilities differ from the trainer's by {mean:.3g} on average, and rounding explains "
            f"{self._doubt_above / min(temperature, 1.0):.3g}"
        )

    def state_dict(self) -> dict[str, Any] | None:
        """What the engine learned; `None` if there never was one."""
        return self._state if self.engine is None else self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`.

        Raises:
            ValueError: it is not such a state; nothing is changed then.
        """
        Controller([]).load_state_dict(state)  # validates it before there is an engine
        self._state = state
        if self.engine is not None:
            self.engine.load_state_dict(state)
            self._doubt = "training was resumed"

    def _build(self, policy: nn.Module, accelerator: Any) -> None:
        engine = SelfSpecEngine(policy, self.options, autocast_dtype(accelerator), fsdp_param_dtype(accelerator))  # type: ignore[arg-type]
        if self._state is not None:
            engine.load_state_dict(self._state)
        self.engine = engine
        self._calibrate()

    def _refresh(self, draft: bool) -> None:
        assert self.engine is not None
        self.engine.refresh(draft)

    def _check_again(self, accelerator: Any) -> None:
        doubt, self._doubt = self._doubt, None
        assert self.engine is not None
        self._try(self.engine.check, accelerator, because=doubt)
        if self.engine is not None:
            above = self._doubt_above
            self._calibrate()
            self._doubt_above = max(self._doubt_above, 2 * above)  # it passed: so large a difference is no reason

    def _calibrate(self) -> None:
        assert self.engine is not None
        self._doubt_above = DOUBT_IN_NOISES * self.engine.calibration.logprob_noise + LEAST_DOUBT

    def _try(self, action: Callable[[], None], accelerator: Any, because: str | None = None) -> None:
        """Runs an action on the engine; if it fails on one process, no process keeps an engine.

        Training then goes on with TRL's own generation, whatever the failure was. It does not end the run.
        """
        reason, self._failure = self._failure, None
        if reason is None:
            try:
                with failures_raised_as(EngineFailedError, passing=ValueError):
                    action()
            except (EngineFailedError, ValueError) as error:
                reason = f"{error}" + (f" (checked because {because})" if because else "")
        if failures := _number_of_processes_where(reason is not None, accelerator):
            self.engine = None
            self.unsupported = reason or f"the engine failed in {failures} of the other processes"


def autocast_dtype(accelerator: Any) -> torch.dtype | None:
    """The dtype of the autocast in which accelerate runs the policy's forward; `None` without autocast."""
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
