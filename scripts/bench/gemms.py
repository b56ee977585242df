"""Times of a model's quantized linear layers on a GPU, by shape, backend and rows, in captured graphs."""

import math
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import Stopwatch, copy_bytes_per_s
from bench.report import spread
from bench.workload import preset_config
from trl_selfspec.drafter import linear_backends as backends
from trl_selfspec.drafter.linear_backends import DequantizedPerCall, LinearBackend
from trl_selfspec.drafter.quantized_linear import QuantizedLinear
from trl_selfspec.drafter.quantized_weight import QTYPES
from trl_selfspec.utils import failures_raised_as


DTYPE = torch.bfloat16
COLD_BYTES = 2**29  # of weights that a graph reads, several times what a GPU's caches hold


def fused_shapes(preset: str) -> Counter[tuple[int, int]]:
    """How many Linear layers of each (out, in) a drafter has, with q, k, v and gate, up side by side."""
    config: Any = preset_config(preset)
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    each = [(hidden + 2 * keys, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner)]
    shapes = Counter({(config.vocab_size, hidden): 1})
    for shape in each:
        shapes[shape] += layers
    return shapes


def graph_seconds(calls: list[Callable[[], Tensor]], repeats: int) -> list[float]:
    """Seconds per call of a graph that makes all calls, once per replay."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    laps = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        laps.append(start.elapsed_time(end) / 1e3 / len(calls))
    return laps[2:]


def microseconds(linears: list[Callable[[Tensor], Tensor]], k: int, rows: list[int], repeats: int) -> dict[str, Any]:
    result = {}
    for num_rows in rows:
        x = torch.randn(num_rows, k, dtype=DTYPE, device="cuda")
        laps = graph_seconds([lambda linear=linear, x=x: linear(x) for linear in linears], repeats)
        result[str(num_rows)] = spread([1e6 * lap for lap in laps])
    return result


def make_layers(n: int, k: int, qtype: str, backend: type[LinearBackend], count: int) -> list[QuantizedLinear]:
    """Layers that have a backend alone."""
    layers = []
    weight = torch.randn(n, k, dtype=DTYPE, device="cuda")
    for _ in range(count):
        layer = QuantizedLinear(k, n, None, qtype, DTYPE, "cuda", backend)
        layer.requantize_(weight)
        layers.append(layer)
    return layers


@torch.no_grad()
def time_shape(n: int, k: int, rows: list[int], repeats: int, bytes_per_s: float) -> dict[str, Any]:
    """Each backend's microseconds, cuBLAS's on bf16 weights, and those of reading the weights once; a text is the
    traceback of what failed.
    """
    result: dict[str, Any] = {}
    count = max(1, math.ceil(COLD_BYTES / (2 * n * k)))
    weights = [torch.randn(n, k, dtype=DTYPE, device="cuda") for _ in range(count)]
    linears = [lambda x, w=w: F.linear(x, w) for w in weights]
    result["cublas bf16"] = {"floor": 1e6 * 2 * n * k / bytes_per_s, **microseconds(linears, k, rows, repeats)}
    del weights, linears
    for qtype in QTYPES:
        probe = QuantizedLinear(k, n, None, qtype, DTYPE, "cuda")
        num_bytes = sum(buffer.nbytes for buffer in probe.quantized.buffers())
        floor = 1e6 * num_bytes / bytes_per_s
        for backend in backends.BACKENDS:
            if backend is not DequantizedPerCall and backend.supports(probe.quantized):
                name = f"{qtype} {backend.name}"
                try:
                    with failures_raised_as(RuntimeError):
                        layers = make_layers(n, k, qtype, backend, max(1, math.ceil(COLD_BYTES / num_bytes)))
                        timed = microseconds([layer.forward for layer in layers], k, rows, repeats)
                    result[name] = {"floor": floor, **timed}
                except RuntimeError:
                    result[name] = _failed(f"{name} {n} x {k}")
                layers = None  # before the next ones are made
        result[f"{qtype} chosen"] = probe.backend.name
        torch.cuda.empty_cache()
    return result


def _failed(what: str) -> str:
    print(f"{what} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return traceback.format_exc()


@torch.no_grad()
def requantize_seconds(shapes: Counter[tuple[int, int]], qtype: str, repeats: int) -> dict[str, float]:
    """Of all layers, one by one."""
    totals = [0.0] * repeats
    for (n, k), count in shapes.items():
        weight = torch.randn(n, k, dtype=DTYPE, device="cuda")
        layer = QuantizedLinear(k, n, None, qtype, DTYPE, "cuda")
        layer.requantize_(weight)
        for repeat in range(repeats):
            with Stopwatch(torch.device("cuda")) as watch:
                layer.requantize_(weight)
            totals[repeat] += count * watch.seconds
    return spread(totals)


def run(preset: str, rows: list[int], repeats: int) -> Iterator[dict[str, Any]]:
    """What is known of a preset after each shape, then all of it."""
    shapes, bandwidth = fused_shapes(preset), copy_bytes_per_s(torch.device("cuda"))
    result: dict[str, Any] = {"preset": preset, "microseconds": {}, "requantize_s": {}}
    for (n, k), count in shapes.items():
        result["microseconds"][f"{n}x{k}"] = {"layers": count, **time_shape(n, k, rows, repeats, bandwidth)}
        print(f"{n} x {k} done", file=sys.stderr, flush=True)
        yield result
    for qtype in QTYPES:
        result["requantize_s"][qtype] = requantize_seconds(shapes, qtype, repeats)
    yield result


def table(result: dict[str, Any]) -> str:
    """Milliseconds of all layers once, by backend and rows, for people."""
    sums: dict[str, Counter[str]] = {}
    shapes: Counter[str] = Counter()
    for figures in result["microseconds"].values():
        for kind, times in figures.items():
            if isinstance(times, dict):
                shapes[kind] += 1
                for rows, time in times.items():
                    value = time if rows == "floor" else time["median"]
                    sums.setdefault(kind, Counter())[rows] += figures["layers"] * value / 1e3
    columns = list(sums["cublas bf16"])
    lines = [f"{result['preset']}, ms" + " " * 20 + "".join(f"{column:>9}" for column in columns)]
    for kind, values in sums.items():
        cells = (f"{values[column]:9.2f}" if column in values else " " * 9 for column in columns)
        missing = shapes["cublas bf16"] - shapes[kind]
        lines.append(f"{kind:<28}" + "".join(cells) + (f"   without {missing} shapes" if missing else ""))
    lines += [f"requantize {qtype}: {1e3 * s['median']:.1f} ms" for qtype, s in result["requantize_s"].items()]
    return "\n".join(lines)
