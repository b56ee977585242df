"""Policies whose weights are split over processes: FSDP2's `DTensor`s and DeepSpeed's ZeRO-3 partitions.

Gathering is collective: every rank has to ask for the same tensors in the same order. Nothing else here is.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextlib.contextmanager
def gathered_partitions(module: nn.Module) -> Iterator[None]:
    """Within it the ZeRO-3 parameters of `module` are whole; collective if it has any."""
    partitions = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not partitions:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitions):
        yield


def gathered(tensor: Tensor | None) -> Tensor | None:
    """`tensor` itself if this process holds all of it for good, else a whole copy."""
    if tensor is None:
        return None
    if hasattr(tensor, "ds_id"):  # whole only as long as `gathered_partitions` lasts
        return tensor.detach().clone()
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def fingerprint(policy: nn.Module) -> int:
    """Differs once an in-place operation (an optimizer step, a load) or a new parameter changed the policy.

    Versions count on FSDP2's shards as on plain parameters. DeepSpeed writes past them: there, only the step tells.
    """
    _reshard(policy)
    return hash(tuple((id(parameter), parameter._version) for parameter in policy.parameters()))


def _reshard(policy: nn.Module) -> None:
    """Puts FSDP2's shards back where a forward left whole weights in their place.

    It does so for the last layers and the root until the next backward. Whole weights are no `DTensor`s, have versions
    of their own, and their memory is freed under whoever aliases them.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
