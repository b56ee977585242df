"""Milliseconds of all Linear layers of a preset once, by rows: our CPU kernels, and torch's, in one process.

    python scripts/bench_kernels.py [--preset 150m] [--rows 1 2 4 8 16] [--repeats 9] [--out kernels.json]
    python scripts/bench_kernels.py --device cuda --preset 7b --rows 1 4 8 16 32 64

Weights are random and as many as the model's, so that they come from memory as in a decode step. On CUDA: each backend
of quantized layers by shape against cuBLAS in bf16 and the time of reading the weights once, and requantizing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from bench import gemms
from bench.report import provenance, write_result
from bench.workload import preset_config
from torch import Tensor

from trl_selfspec import kernels
from trl_selfspec.kernels import PreparedLinear


Layer = Callable[[Tensor], Tensor]
GROUP_SIZE = 128


def shapes(preset: str) -> list[tuple[int, int]]:
    """(out, in) of every Linear layer, the head included."""
    config: Any = preset_config(preset)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden // config.num_attention_heads * config.num_key_value_heads
    layer = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return layer * config.num_hidden_layers + [(config.vocab_size, hidden)]


def make_layers(kind: str, sizes: list[tuple[int, int]]) -> list[Layer]:
    if kind == "int4":
        packed = [(torch.randint(256, (n, k // 2), dtype=torch.uint8), k) for n, k in sizes]
        scales = [torch.rand(n, k // GROUP_SIZE, 2).bfloat16() for n, k in sizes]
        return [PreparedLinear(w, s, in_features=k) for (w, k), s in zip(packed, scales, strict=True)]
    weights = [torch.randn(size).to(torch.float32 if "fp32" in kind else torch.bfloat16) for size in sizes]
    if kind.startswith("torch"):
        return [lambda x, w=w: F.linear(x, w) for w in weights]
    return [PreparedLinear(w) for w in weights]


@torch.no_grad()
def milliseconds(
    kind: str, sizes: list[tuple[int, int]], rows: list[int], repeats: int
) -> dict[int, dict[str, float]]:
    layers, dtype = make_layers(kind, sizes), torch.float32 if "fp32" in kind else torch.bfloat16
    result = {}
    for num_rows in rows:
        inputs = {k: torch.randn(num_rows, k).to(dtype) for _, k in sizes}
        laps = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            for layer, (_, k) in zip(layers, sizes, strict=True):
                layer(inputs[k])
            laps.append(1e3 * (time.perf_counter() - start))
        result[num_rows] = {"median": median(laps[1:]), "min": min(laps[1:]), "max": max(laps[1:])}
    return result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", default="150m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 6, 8, 16])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--kinds", nargs="+", default=["bf16", "int4", "fp32", "torch fp32"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.device == "cpu" and not kernels.available():
        sys.exit("No CPU kernels here: they need AVX2 and a C compiler.")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("No CUDA device here.")
    where = provenance(["bench_kernels.py", *argv], torch.device(args.device))
    result: dict[str, Any] = {"provenance": where}
    if args.device == "cuda":
        for part in gemms.run(args.preset, args.rows, args.repeats):
            result |= part
            if args.out:  # what is known if it is stopped here
                write_result(result, args.out)
    else:
        sizes = shapes(args.preset)
        timed = {kind: milliseconds(kind, sizes, args.rows, args.repeats) for kind in args.kinds}
        result["milliseconds"] = timed
    if args.out:
        write_result(result, args.out)
    print(gemms.table(result) if args.device == "cuda" else json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
