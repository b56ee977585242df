"""Policies whose weights are split over processes: FSDP2's `DTensor`s and DeepSpeed's ZeRO-3 partitions.

Gathering is collective: every rank has to ask for the same tensors in the same order. Nothing else here is.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


SAMPLES_PER_DIMENSION = 5


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
    """Differs once the policy has other weights: by versions, by addresses, and by a sample of every tensor's values.

    Versions count what optimizers and loads write in place. Values see what moves no version: writes through `.data`
    (an EMA swapped in, a hotswapped adapter) and DeepSpeed's. A write that spares every sampled value is not seen.
    Costs one small gather per tensor and one host sync (docs/LOG.md 2026-11-30).
    """
    _reshard(policy)
    tensors = [_local(tensor) for tensor in (*policy.parameters(), *policy.buffers())]
    samples = dict[torch.device, list[Tensor]]()
    for tensor in tensors:
        if tensor.numel() and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta:
            samples.setdefault(tensor.device, []).append(_sample(tensor))
    values = tuple(torch.cat(parts).cpu().numpy().tobytes() for parts in samples.values())
    return hash(
        (values, tuple((id(p), p._version) for p in policy.parameters()), tuple(t.data_ptr() for t in tensors))
    )


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    return getattr(tensor, "ds_tensor", tensor).detach()


def _sample(tensor: Tensor) -> Tensor:
    """A few values from all over a tensor, whatever its strides."""
    picked = tensor[tuple(slice(None, None, -(-size // SAMPLES_PER_DIMENSION)) for size in tensor.shape)]
    return picked.reshape(-1).float()


def _reshard(policy: nn.Module) -> None:
    """Puts FSDP2's shards back where a forward left whole weights in their place.

    It does so for the last layers and the root until the next backward. Whole weights are no `DTensor`s, have versions
    of their own, and their memory is freed under whoever aliases them.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
