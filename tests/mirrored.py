"""The mirror's law and the policy's own, computed next to each other without a cache."""

import torch
from tiny_models import VOCAB_SIZE
from torch import Tensor, nn

from trl_selfspec.policy import replica as mirrors
from trl_selfspec.policy.replica import Mirror


IDS = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


@torch.no_grad()
def mirror_logits(mirror: Mirror) -> Tensor:
    """Logits of the mirror's Linear layers and tensors, in transformers' own modules otherwise."""
    tree = mirror.tree(mirror.base.config._attn_implementation)
    with autocast(mirror.autocast_dtype):
        return tree(input_ids=IDS, use_cache=False).logits.float()


@torch.no_grad()
def policy_logits(policy: nn.Module, autocast_dtype: torch.dtype | None = None) -> Tensor:
    """Logits of the training forward, its dropout off."""
    training = {module: module.training for module in policy.modules()}
    policy.eval()
    try:
        with autocast(autocast_dtype):
            return policy(input_ids=IDS, use_cache=False).logits.float()
    finally:
        for module, flag in training.items():
            module.training = flag


def logits_of(policy: nn.Module, autocast_dtype: torch.dtype | None = None) -> Tensor:
    return mirror_logits(mirrors.Mirror(policy, autocast_dtype))
