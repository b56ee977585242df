"""The replica's law and the policy's own, computed next to each other without a cache."""

import torch
from tiny_models import VOCAB_SIZE
from torch import Tensor, nn

from trl_selfspec.policy import replica as replicas
from trl_selfspec.policy.replica import PolicyReplica


IDS = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(1))


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


@torch.no_grad()
def replica_logits(replica: PolicyReplica) -> Tensor:
    """Logits of the replica's Linear layers and tensors, in transformers' own modules otherwise."""
    tree = replica.tree(replica.base.config._attn_implementation)
    with autocast(replica.autocast_dtype):
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
    return replica_logits(replicas.PolicyReplica(policy, autocast_dtype))
