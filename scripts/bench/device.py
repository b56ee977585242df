"""What a benchmark says about the device it ran on, and how it tells the time there."""

import shutil
import subprocess
import time
from typing import Any

import torch


NVIDIA_SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far beyond every cache; long against the microseconds a timer costs


class Stopwatch:
    """Wall-clock seconds of a block, device work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __enter__(self) -> "Stopwatch":
        self.seconds = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = self._now() - self.seconds


def copy_bytes_per_s(device: torch.device, repeats: int = 5) -> float:
    """Bytes read plus written per second by a large copy: the bandwidth to hold rounds against."""
    num_bytes = COPY_BYTES[device.type]
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        with Stopwatch(device) as watch:
            target.copy_(source)
        seconds.append(watch.seconds)
    return 2 * num_bytes / min(seconds)


def gpu_provenance(device: torch.device) -> dict[str, Any] | None:
    """Name, CUDA version and what `nvidia-smi` knows of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    } | _nvidia_smi(str(properties.uuid))


def _nvidia_smi(uuid: str) -> dict[str, str]:
    """`NVIDIA_SMI_FIELDS` with units, as they are at this moment; empty where there is no `nvidia-smi`."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return parse_nvidia_smi(done.stdout) if done.returncode == 0 else {}


def parse_nvidia_smi(line: str) -> dict[str, str]:
    values = [value.strip() for value in line.strip().split(",")]
    return dict(zip(NVIDIA_SMI_FIELDS, values, strict=True)) if len(values) == len(NVIDIA_SMI_FIELDS) else {}


def peak_memory_bytes(device: torch.device) -> int:
    """The most that torch's allocator has handed out since `reset_peak_memory`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
