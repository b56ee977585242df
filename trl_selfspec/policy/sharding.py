"""Gathers weights that are sharded over processes: FSDP2's `DTensor`s and DeepSpeed's ZeRO-3 partitions.

Gathering is collective: all ranks gather the same tensors in the same order. Nothing else here is collective.
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
    """Gathers the ZeRO-3 parameters of `module` for the duration of the context; collective if it has any."""
    partitions = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not partitions:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitions):
        yield


def gathered(tensor: Tensor | None) -> Tensor | None:
    """`tensor` itself if this process permanently holds all of it, else a gathered copy."""
    if tensor is None:
        return None
    if hasattr(tensor, "ds_id"):  # whole only as long as `gathered_partitions` lasts
        return tensor.detach().clone()
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor


def fingerprint(policy: nn.Module) -> int:
    """A hash of the policy's weights: of versions, of addresses, and of a sample of every tensor's values.

    Versions count in-place writes of optimizers and loads. Values show writes that change no version: through `.data`
    (an EMA swapped in, a hotswapped adapter) and DeepSpeed's. A write that misses every sampled value is not seen.
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
    """This process's shard of a tensor."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    return getattr(tensor, "ds_tensor", tensor).detach()


def _sample(tensor: Tensor) -> Tensor:
    """A few values spread over a tensor, independent of its strides."""
    picked = tensor[tuple(slice(None, None, -(-size // SAMPLES_PER_DIMENSION)) for size in tensor.shape)]
    return picked.reshape(-1).float()


def _reshard(policy: nn.Module) -> None:
    """Restores FSDP2's shards where a forward left gathered weights in their place.

    A forward leaves the last layers and the root gathered until the next backward. Gathered weights are no `DTensor`s
    and have versions of their own, and FSDP frees their memory even if something aliases it.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
