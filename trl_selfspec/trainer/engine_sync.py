"""The engine of a policy in training: built when it is first needed, brought up to date before every rollout.

Each process has an engine of its own. All of them have it or none, and all follow a change of weights together, since
both gather sharded weights; what one process finds out alone is told to the others first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trl_selfspec.control.controller import Controller
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions


# The engine is compared with the policy again where the logged difference of log-probabilities exceeds this much.
DOUBT_IN_NOISES = 4.0
LEAST_DOUBT = 1e-3


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
        self.unsupported: str | None = None  # why there can't be an engine; set on every process or on none
        self._state: dict[str, Any] | None = None  # of a checkpoint, for an engine that is yet to be built
        self._step = -1
        self._drafter_interval = 0  # the last one in which the drafter was quantized
        self._unseen_change = False
        self._failure: str | None = None  # of the engine on this process, yet to be told to the others
        self._doubt: str | None = None  # why the engine is to be checked against the policy again
        self._doubt_above = 0.0  # mean difference of log-probabilities

    def follow(self, policy: nn.Module, step: int, accelerator: Any) -> None:
        """Builds the engine, or refreshes it, and checks it again where there is reason to. Collective."""
        if self.unsupported is not None:
            return
        interval = step // self.options.refresh_interval
        if self.engine is None:
            self._try(lambda: self._build(policy, accelerator), accelerator)
        else:
            # Versions and values see what no step does (`load_best_model_at_end`, an EMA), steps what DeepSpeed
            # writes. One process that saw a change is enough; copies are renewed in any case.
            changed = step != self._step or self._unseen_change or self.engine.stale
            changed = _number_of_processes_where(changed, accelerator) > 0
            self._try(lambda: self._refresh(changed and interval != self._drafter_interval), accelerator)
            if _number_of_processes_where(self._doubt is not None, accelerator):
                self._check_again(accelerator)
        self._step, self._drafter_interval, self._unseen_change = step, interval, False

    def weights_changed(self) -> None:
        """Makes the next `follow` refresh the drafter too, for a change that neither steps nor versions tell."""
        self._unseen_change = True

    def failed(self, error: Exception) -> str:
        """Takes note that the engine failed in a rollout: from the next `follow` on, no process uses one."""
        self._failure = _reason(error)
        return self._failure

    def observe_logprob_difference(self, mean: float, temperature: float) -> None:
        """Compares the logged difference of log-probabilities with what rounding explains on this policy.

        Args:
            mean: mean |engine's - trainer's| log-probability, the same on every process.
            temperature: at which tokens were drawn; a low one magnifies differences.
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
        Controller().load_state_dict(state)  # an engine that is yet to be built must not fail over it
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
            self._doubt_above = max(self._doubt_above, 2 * above)  # it passed: the doubt was no reason

    def _calibrate(self) -> None:
        assert self.engine is not None
        self._doubt_above = DOUBT_IN_NOISES * self.engine.calibration.logprob_noise + LEAST_DOUBT

    def _try(self, action: Callable[[], None], accelerator: Any, because: str | None = None) -> None:
        """Runs what may fail in the policy's own code; where it does on one process, no process keeps an engine.

        Whatever goes wrong here ends in TRL's own generation with a reason, never in the end of the run.
        """
        reason, self._failure = self._failure, None
        if reason is None:
            try:
                action()
            except Exception as error:  # noqa: BLE001  # any model's own code runs here, and devices run out of memory
                reason = _reason(error) + (f" (checked because {because})" if because else "")
        if failures := _number_of_processes_where(reason is not None, accelerator):
            self.engine = None
            self.unsupported = reason or f"the engine failed in {failures} of the other processes"


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


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"[:500]


def _number_of_processes_where(condition: bool, accelerator: Any) -> int:
    flag = torch.tensor(float(condition), device=accelerator.device)
    return round(accelerator.reduce(flag, reduction="sum").item())
