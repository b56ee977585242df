"""The trainers that ship: TRL's own, with [`SelfSpecMixin`] in front."""

from typing import Any, ClassVar

import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import get_config_model_id

from trl_selfspec.trainer.config import SelfSpecGRPOConfig, SelfSpecRLOOConfig
from trl_selfspec.trainer.metrics import gathered_difference
from trl_selfspec.trainer.mixin import SelfSpecMixin


class SelfSpecGRPOTrainer(SelfSpecMixin, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] whose rollouts are drawn by self-speculative decoding.

    Before a rollout the current policy is quantized into a drafter; the drafter proposes tokens and the policy
    verifies them, so that samples follow the policy's own distribution. The only change w.r.t. [`~trl.GRPOTrainer`] is
    the source of the completions; [`SelfSpecMixin`] lists what falls back to TRL's own generation.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`~trl.GRPOTrainer`].
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Reward functions, as for [`~trl.GRPOTrainer`].
        args ([`SelfSpecGRPOConfig`] or [`~trl.GRPOConfig`], *optional*):
            Configuration for this trainer. A plain [`~trl.GRPOConfig`] runs with the default speculation options.
        **kwargs:
            Everything else that [`~trl.GRPOTrainer`] takes.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "grpo", "selfspec"]
    _last_logps: torch.Tensor | None = None

    def __init__(self, model: Any, reward_funcs: Any = None, args: GRPOConfig | None = None, **kwargs: Any) -> None:
        args = args or SelfSpecGRPOConfig(f"{_short_name(model)}-SelfSpecGRPO")
        super().__init__(model, reward_funcs, args=args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._last_logps = result[0].detach()
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        logps, self._last_logps = self._last_logps, None
        generate_every = self.args.steps_per_generation * self.num_iterations
        # Until the first optimizer step after a generation the loss sees the weights that the engine sampled from.
        fresh = not self.model.training or self._step % generate_every == 0
        if fresh and self._engine_sync is not None:
            self._log_logp_difference(logps, inputs)
        return loss

    def _log_logp_difference(self, logps: torch.Tensor | None, inputs: dict[str, Any]) -> None:
        """Logs |engine's - trainer's| log-probability, from the loss's own forward; dropout, if any, is part of it."""
        sampled, mask = inputs.get("sampling_per_token_logps"), inputs["completion_mask"] * inputs.get("tool_mask", 1)
        if difference := gathered_difference(logps, sampled, mask, self.accelerator):
            for name, value in difference.items():
                self._metrics[self._mode][f"sampling/sampling_logp_difference/{name}"].append(value)
            assert self._engine_sync is not None
            self._engine_sync.observe_logprob_difference(difference["mean"], self.temperature)


class SelfSpecRLOOTrainer(SelfSpecMixin, RLOOTrainer):
    """
    [`~trl.RLOOTrainer`] whose rollouts are drawn by self-speculative decoding.

    The only change w.r.t. [`~trl.RLOOTrainer`] is the source of the completions; see [`SelfSpecGRPOTrainer`].

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, as for [`~trl.RLOOTrainer`].
        reward_funcs (`RewardFunc` or `list[RewardFunc]`):
            Reward functions, as for [`~trl.RLOOTrainer`].
        args ([`SelfSpecRLOOConfig`] or [`~trl.RLOOConfig`], *optional*):
            Configuration for this trainer. A plain [`~trl.RLOOConfig`] runs with the default speculation options.
        **kwargs:
            Everything else that [`~trl.RLOOTrainer`] takes.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "rloo", "selfspec"]

    def __init__(self, model: Any, reward_funcs: Any, args: RLOOConfig | None = None, **kwargs: Any) -> None:
        args = args or SelfSpecRLOOConfig(f"{_short_name(model)}-SelfSpecRLOO")
        super().__init__(model, reward_funcs, args=args, **kwargs)

    def _pack_rollout(self, completion_ids: list[list[int]], logprobs: list[list[float]]) -> list[list[int]]:
        return completion_ids


def _short_name(model: Any) -> str:
    return (model if isinstance(model, str) else get_config_model_id(model.config)).split("/")[-1]
