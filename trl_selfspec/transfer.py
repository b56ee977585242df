"""How host values reach a device without the host waiting for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """An int64 tensor of nested ints on `device`.

    From pinned memory, which torch hands out again only when the copy is done; from pageable memory the host would
    wait for everything the GPU has still to do.
    """
    host = torch.tensor(values, dtype=torch.int64, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
