"""Helpers without a folder of their own: a device's clock, copies to it, a cache directory, a boundary for errors."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


MAX_REASON = 500  # characters of a failure's message: some hold whole tensors


class Clock:
    """Marks moments and tells the seconds between them: CUDA events on a GPU, the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list = []

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds between consecutive marks. Call it after the round's host sync."""
        if self._cuda:
            self._marks[-1].synchronize()
            return [a.elapsed_time(b) / 1000 for a, b in zip(self._marks, self._marks[1:], strict=False)]
        return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]


def to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """An int64 tensor of nested ints on `device`.

    From pinned memory, which torch hands out again only when the copy is done; from pageable memory the host would
    wait for everything the GPU has still to do.
    """
    host = torch.tensor(values, dtype=torch.int64, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def cache_directory() -> Path:
    """The package's part of the user's cache, made if it is missing.

    Raises:
        OSError: it can't be made.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    directory = Path(base) / "trl_selfspec"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


@contextlib.contextmanager
def failures_raised_as(
    kind: type[Exception], where: str = "", passing: type[Exception] | tuple[()] = ()
) -> Iterator[None]:
    """Raises whatever goes wrong within as `kind`, whose message names the class and the text of the failure.

    This is the one place that catches every exception. Within runs code that is not ours: a model's own forward,
    hooks, quanto, kernels, the allocator. No list of classes covers what they raise, and training has to go on with
    TRL's own generation, or with plain rounds, whatever it is.

    Args:
        kind: what callers handle; a failure of this class passes as it is.
        where: stands before the failure in the message.
        passing: another class that passes as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (kind, passing)):
            raise
        text = f": {error}" if str(error) else ""
        raise kind(f"{where}{type(error).__name__}{text}"[:MAX_REASON]) from error
