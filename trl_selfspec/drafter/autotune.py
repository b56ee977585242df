"""Which backend multiplies fastest by a quantized layer's weights on a GPU, by the number of rows.

A layer of a shape not yet seen is filled with noise and tried: what raises, gives other numbers than dequantized
weights, or not the same ones twice, is left out with a warning. The rest is timed with cold caches, as in a decode
step. The answer is kept in the user's cache, by GPU, versions and shape.
"""

import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_selfspec.kernels.triton_support import errors
from trl_selfspec.utils import cache_directory


if TYPE_CHECKING:
    from trl_selfspec.drafter.linear_backends import Backend
    from trl_selfspec.drafter.quantized_linear import QuantizedLinear


logger = logging.getLogger(__name__)

BUCKETS = (1, 4, 8, 16, 32, 64, 256)  # rows
BETWEEN = (2, 24, 48, 96, 128, 192)  # rows of other graphs: backends switch kernels at numbers of their own
TOLERANCE = 0.02  # of the result: dequantized bf16 weights are off by 0.003, another zero point by 0.06 and more
CHECKED_OUTPUTS = 256  # at each end of a layer
REPEATS = 5
CACHE_BYTES = 2**28  # larger than any GPU's
FILLS = 8  # of them, half a millisecond at 4 TB/s: what Python launches meanwhile waits, so that no gap is timed
WORTH_A_COPY = 0.9  # of the time: a second copy of the weights must save a tenth
PACKAGES = ("trl-selfspec", "torch", "triton", "humming-kernels")
OWN_KERNELS = Path(__file__).parent / "kernels"

Timer = Callable[[Callable[[], object]], float]

_known: "dict[str, dict[int, str]]" = {}


def measured(
    layer: "QuantizedLinear", backends: "Sequence[Backend]", timer: Timer | None = None
) -> "dict[int, Backend]":
    """The fastest of the backends for up to so many rows; empty if none works.

    Args:
        layer: one that holds no weights yet: measuring fills it with noise.
        backends: candidates, those that need no copies of the weights first among equals.
        timer: device seconds of a call; by default the GPU's own clock. Where there is no GPU to time, backends are
            taken in their order.
    """
    if timer is None and not torch.cuda.is_available():
        return {bucket: backend for bucket in BUCKETS for backend in reversed(backends) if _takes(backend, bucket)}
    key = _key(layer, backends)
    if key not in _known:
        with torch.cuda.device_of(getattr(layer, layer.storage_names[0])):
            devices = [layer.device] if layer.device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # or a run would draw other samples the first time
                _known[key] = _read().get(key) or _measured_anew(layer, backends, timer or _cold_seconds, key)
    by_name = {backend.name: backend for backend in backends}
    return {bucket: by_name[name] for bucket, name in _known[key].items()}


def _takes(backend: "Backend", rows: int) -> bool:
    return backend.max_rows is None or rows <= backend.max_rows


def _measured_anew(layer: "QuantizedLinear", backends: "Sequence[Backend]", timer: Timer, key: str) -> dict[int, str]:
    """The fastest by bucket; kept if all backends took part."""
    seconds: dict[int, dict[str, float]] = {bucket: {} for bucket in BUCKETS}
    dropped = False
    _fill_with_noise(layer)
    for backend in backends:
        try:
            with _derived(layer, backend), torch.no_grad():
                for rows in filter(functools.partial(_takes, backend), (*BUCKETS, *BETWEEN)):
                    x = torch.randn(rows, layer.in_features, dtype=layer.dtype, device=layer.device)
                    _try(layer, backend, x)
                    if rows in BUCKETS:
                        cost = timer(functools.partial(backend.linear, layer, x))
                        seconds[rows][backend.name] = cost / (WORTH_A_COPY if backend.holds_weights else 1)
        except errors() as error:
            dropped = True
            fault = backend.holds_weights or not isinstance(error, torch.OutOfMemoryError)
            for bucket, costs in seconds.items():
                costs.pop(backend.name, None)
                if not fault and _takes(backend, bucket):  # what is left where nothing could be timed
                    costs[backend.name] = math.inf
            verdict = "is not used" if fault else "could not be timed"
            _warn(backend.name, verdict, layer.qtype, f"{type(error).__name__}: {error}"[:500])
    for name in layer.storage_names:
        getattr(layer, name).zero_()
    fastest = _fastest(seconds, [backend.name for backend in backends if backend.holds_weights])
    logger.info("trl_selfspec: %s of %d x %d: %s", layer.qtype, layer.out_features, layer.in_features, fastest)
    if backends and not dropped:
        _write(key, fastest)
    return fastest


def _fastest(seconds: dict[int, dict[str, float]], holders: Sequence[str]) -> dict[int, str]:
    """By bucket; at most one of those that hold the weights once more takes part."""

    def table(holder: str | None) -> dict[int, str]:
        taken = {bucket: [n for n in costs if n == holder or n not in holders] for bucket, costs in seconds.items()}
        return {bucket: min(names, key=seconds[bucket].__getitem__) for bucket, names in taken.items() if names}

    def cost(names: dict[int, str]) -> tuple[int, float]:
        return -len(names), math.prod(seconds[bucket][name] for bucket, name in names.items())

    return min(map(table, holders or [None]), key=cost)


def _fill_with_noise(layer: "QuantizedLinear") -> None:
    """Random codes; scales, and shifts around the codes' middle, in place."""
    if layer.qtype == "qint4":
        layer.packed.random_(0, 256)
        layer.scale_shift.uniform_(0.01, 0.02)
        layer.scale_shift[..., 1] *= 7.5
        return
    layer.scale.uniform_(0.01, 0.02)
    if layer.qtype == "qint8":
        layer.codes.random_(-127, 128)
    else:
        layer.codes.view(torch.uint8).random_(0, 256).bitwise_and_(0xB7)  # below 1, and no NaN


@contextmanager
def _derived(layer: "QuantizedLinear", backend: "Backend") -> Iterator[None]:
    """Lends the layer the backend's buffers."""
    buffers = backend.derive(layer)
    try:
        for name, buffer in buffers.items():
            layer.register_buffer(name, buffer, persistent=False)
        yield
    finally:
        for name in buffers:
            delattr(layer, name)


def _try(layer: "QuantizedLinear", backend: "Backend", x: Tensor) -> None:
    """Raises `ValueError` if the backend's result is not the dequantized layer's, or not the same twice."""
    y = backend.linear(layer, x)
    again = backend.linear(layer, x)
    if not y.equal(again):
        raise ValueError(f"results for {len(x)} rows differ from call to call")
    for outputs in (slice(0, CHECKED_OUTPUTS), slice(-CHECKED_OUTPUTS, None)):
        bias = None if layer.bias is None else layer.bias[outputs].to(layer.dtype).float()
        expected = F.linear(x.float(), layer.dequantize(outputs).float(), bias)
        error = float((y[:, outputs].float() - expected).norm() / expected.norm())
        if not error < TOLERANCE:
            raise ValueError(f"results for {len(x)} rows are off by {error:.1%}")


def _cold_seconds(call: Callable[[], object]) -> float:
    """Median device seconds of a call that finds nothing of its weights in the GPU's caches."""
    other = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    laps = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for value in range(FILLS):
            other.fill_(value)
        start.record()
        call()
        end.record()
        end.synchronize()
        laps.append(start.elapsed_time(end) / 1e3)
    return median(laps)


def _key(layer: "QuantizedLinear", backends: "Sequence[Backend]") -> str:
    gpu = torch.cuda.get_device_name(layer.device) if layer.device.type == "cuda" else str(layer.device)
    shape = layer.out_features, layer.in_features, layer.bias is not None
    names = [backend.name for backend in backends]
    return json.dumps((gpu, _versions(), BUCKETS, shape, layer.qtype, str(layer.dtype), names))


@functools.cache
def _versions() -> list[str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return [*map(version, PACKAGES), _digest(OWN_KERNELS)]


def _digest(directory: Path) -> str:
    """Of the modules in it: a checkout keeps its version while its kernels change."""
    digest = hashlib.sha256()
    for file in sorted(directory.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _file() -> Path:
    return cache_directory() / "backends.json"


def _read() -> dict[str, dict[int, str]]:
    """What earlier processes measured; nothing if there is no such file, or another one."""
    try:
        content = json.loads(_file().read_text())
        return {key: {int(rows): str(name) for rows, name in names.items()} for key, names in content.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write(key: str, names: dict[int, str]) -> None:
    """Adds to the file, atomically: several processes of a job measure at a time, the last one's answer stays."""
    content = {**_read(), key: names}
    try:
        with tempfile.NamedTemporaryFile("w", dir=cache_directory(), delete=False) as file:
            json.dump(content, file)
        os.replace(file.name, _file())
    except OSError as error:
        logger.info("trl_selfspec: measured kernels are not kept: %s", error)


@functools.cache
def _warn(name: str, verdict: str, qtype: str, reason: str) -> None:
    logger.warning("trl_selfspec: %s %s for %s layers: %s", name, verdict, qtype, reason)
