"""How close the cost model comes to measurements it was not fitted to.

`python tests/accuracy.py` prints the table of docs/advise.md; simulate/test_accuracy.py has the bars. Each comparison
returns its predictions over its measurements.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import inf, log
from pathlib import Path
from statistics import mean

from trl_selfspec.control.constants import TOGGLE_MARGIN
from trl_selfspec.control.rates import PLAIN, Choice
from trl_selfspec.simulate.costs import Costs, Draft, Network, Overheads, Products
from trl_selfspec.simulate.engines import eagle, self_drafting, target
from trl_selfspec.simulate.fitting import fit
from trl_selfspec.simulate.hardware import find_device
from trl_selfspec.simulate.pipeline import step_gain
from trl_selfspec.simulate.rollout import Work, rollout
from trl_selfspec.simulate.shapes import Shape


DATA, BENCHMARKS = Path(__file__).parent / "simulate" / "data", Path(__file__).parents[1] / "benchmarks"
SHAPES = {
    "Qwen2.5-1.5B": Shape(28, 1536, 12, 2, 128, 8960, 151936, tied=True),
    "Qwen2.5-7B": Shape(28, 3584, 28, 4, 128, 18944, 152064),
    "Qwen2.5-14B": Shape(48, 5120, 40, 8, 128, 13824, 152064),
    "Llama-3.1-8B": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "Qwen3-235B-A22B": Shape(94, 4096, 64, 4, 128, 0, 151936, False, 128, 8, 1536),
    "150m": Shape(9, 896, 14, 2, 64, 4864, 16384, tied=True),
}
SWEPT = ("Qwen2.5-7B", "Qwen2.5-14B", "Llama-3.1-8B")
Ratios = dict[str, float]  # prediction over measurement


def rows_of(name: str) -> list[dict[str, str]]:
    lines = (line for line in (DATA / name).read_text().splitlines() if not line.startswith("#"))
    return list(csv.DictReader(lines))


def error(ratios: Mapping[str, float]) -> float:
    return mean(abs(ratio - 1) for ratio in ratios.values())


def worst(ratios: Mapping[str, float]) -> float:
    return max(abs(ratio - 1) for ratio in ratios.values())


# An A100 under vLLM: components of a round, by model, rows, context and draft length.


@dataclass(frozen=True)
class Point:
    model: str
    rows: int
    context: int
    gamma: int
    plain_ms: float
    draft_ms: float
    verify_ms: float

    def gain(self, plain: float, draft: float, verify: float) -> float:
        return Draft("w4", ALPHA).tokens(self.gamma) * plain / (self.gamma * draft + verify)

    @property
    def measured(self) -> tuple[float, float, float]:
        return self.plain_ms, self.draft_ms, self.verify_ms


ALPHA = 0.97
A100 = find_device("a100-80gb")
# What an engine may differ in, and where a fit starts: the table's products and some microseconds.
START = {
    "gb_per_s": A100.products["bf16"].bytes_per_s / 1e9,
    "tflops": A100.products["bf16"].flop_per_s / 1e12,
    "p": A100.products["bf16"].p,
    "draft_product_us": A100.products["int4"].product_us,
    "draft_tflops": A100.products["int4"].flop_per_s / 1e12,
    "kv_share": 1.0,
    **dict.fromkeys(("layer_us", "row_us", "verify_row_us", "context_us", "draft_layer_us", "draft_row_us"), 10.0),
}
TABLE_ONLY = START | dict.fromkeys(("row_us", "verify_row_us", "context_us", "draft_row_us"), 0.0)


@cache
def points() -> list[Point]:
    names = ("rows", "context", "gamma")
    return [
        Point(r["model"], *(int(r[n]) for n in names), *(float(r[f"{n}_ms"]) for n in ("plain", "draft", "verify")))
        for r in rows_of("a100_components.csv")
    ]


def a100(model: str, numbers: Mapping[str, float], hard_maximum: bool = False) -> Costs:
    v, bf16, int4 = numbers, A100.products["bf16"], A100.products["int4"]
    p, draft_p = (inf, inf) if hard_maximum else (v["p"], int4.p)
    products = Products(16, bf16.product_us, 1e9 * v["gb_per_s"], 1e12 * v["tflops"], p)
    drafting = Products(4.25, v["draft_product_us"], int4.bytes_per_s, 1e12 * v["draft_tflops"], draft_p)
    over = Overheads(
        v["layer_us"], 0, v["row_us"], v["verify_row_us"], context_us=v["context_us"], kv_share=v["kv_share"]
    )
    network = Network(SHAPES[model], products, A100.bytes_per_s, over, head=False)
    draft_over = Overheads(v["draft_layer_us"], 0, v["draft_row_us"], kv_share=v["kv_share"])
    return Costs(network, (Draft("w4", ALPHA, replace(network, products=drafting, overheads=draft_over)),))


def components(costs: Costs, point: Point) -> tuple[float, float, float]:
    """Milliseconds of a plain round, a draft step and a verification."""
    rows, context, draft = point.rows, point.context, costs.drafts[0].network
    assert draft is not None
    parts = (costs.target, 1), (draft, 1), (costs.target, point.gamma + 1)
    plain, drafting, verify = (1e3 * network.forward_s(rows, tokens, context) for network, tokens in parts)
    return plain, drafting, verify


@cache
def fitted_without(model: str) -> dict[str, float]:
    """The engine's numbers from every seventh point of the other two models."""
    train = [point for point in points() if point.model != model][::7]

    def loss(numbers: Mapping[str, float]) -> float:
        costs = {name: a100(name, START | dict(numbers)) for name in SWEPT}
        total = 0.0
        for point in train:
            found = components(costs[point.model], point)
            total += sum(log(a / b) ** 2 for a, b in zip(found, point.measured, strict=True))
            total += 2 * log(point.gain(*found) / point.gain(*point.measured)) ** 2
        return total

    return fit(loss, START, steps=12)


def a100_ratios(part: str, fitted: bool, hard_maximum: bool = False) -> Ratios:
    """Of `plain`, `draft`, `verify` or the `gain` of a round, of each model by what is known without it."""
    ratios = {}
    for model in SWEPT:
        costs = a100(model, fitted_without(model) if fitted else TABLE_ONLY, hard_maximum)
        for point in points():
            if point.model == model:
                found, real = components(costs, point), point.measured
                index = ("plain", "draft", "verify", "gain").index(part)
                found, real = (*found, point.gain(*found)), (*real, point.gain(*real))
                ratios[f"{model} {point.rows}x{point.context} γ={point.gamma}"] = found[index] / real[index]
    return ratios


def same_side(fitted: bool) -> float:
    """Share of points at which drafting gains more than the gate's margin in both worlds, or in neither."""
    found = a100_ratios("gain", fitted)
    real = {f"{p.model} {p.rows}x{p.context} γ={p.gamma}": p.gain(*p.measured) for p in points()}
    return mean((real[name] * ratio > TOGGLE_MARGIN) == (real[name] > TOGGLE_MARGIN) for name, ratio in found.items())


# Our own engine.


def h200_ratios(model: str) -> Ratios:
    """Captured forwards at a context of 1k, but the one that a number was set to."""
    costs = self_drafting(SHAPES[model], find_device("h200"), ALPHA)
    rows = [r for r in rows_of("h200.csv") if r["model"] == model and (model, r["rows"]) != ("Qwen2.5-7B", "1")]
    return {
        f"{r['rows']}x{r['tokens']}": 1e3
        * costs.target.forward_s(int(r["rows"]), int(r["tokens"]), 1024)
        / float(r["ms"])
        for r in rows
    }


CPU_RUNS = ("150m_bf16_rows1", "150m_bf16_rows2", "150m_bf16_rows4", "150m_bf16_longtail16", "150m_fp32_rows1")


def cpu_run(name: str, keep_longest: bool = True) -> tuple[float, float, float, float]:
    """Plain seconds and gain, predicted and measured."""
    result = json.loads((BENCHMARKS / f"cpu_{name}.json").read_text())
    rows, limit = result["workload"]["lengths"]["rows"], result["workload"]["lengths"]["max"]
    if result["workload"]["length_profile"] == "longtail":
        work = Work.lognormal(rows, 500 * limit / 8192, 3000 * limit / 8192, limit, samples=1)
    else:
        work = Work.of([limit] * rows, samples=1)
    work = work if keep_longest else work.without_longest()
    prompt = 64 if rows == 1 else 48  # half to all of 64 tokens
    work = replace(work, prompt=prompt, prefilled=prompt * rows)
    costs = self_drafting(SHAPES["150m"], find_device("cpu-2-cores"), 0.95, result["workload"]["dtype"])
    costs = replace(costs, drafts=tuple(replace(draft, prepare_s=0.0) for draft in costs.drafts))
    plain_s = rollout(costs, work, PLAIN).seconds
    gain = plain_s / rollout(costs, work, margin=TOGGLE_MARGIN).seconds
    return plain_s, gain, result["engines"]["plain"]["seconds"]["median"], result["ratios"]["selfspec/plain"]["median"]


def cpu_ratios(what: str) -> Ratios:
    runs = {name: cpu_run(name) for name in CPU_RUNS}
    return {name: (a / c if what == "seconds" else b / d) for name, (a, b, c, d) in runs.items()}


# NVIDIA's projections for GB200s, and their figures of whole steps.


def alpha_of(gamma: int, tokens: float) -> float:
    """The acceptance at which a round brings so many tokens."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if Draft("", middle).tokens(gamma) < tokens else (low, middle)
    return high


def nvidia_ratios(tp: int = 8, shape: Shape = SHAPES["Qwen3-235B-A22B"]) -> Ratios:
    """Rollout gains of the 235B model: FP8, 4096 rows of about 5,700 of 8,192 tokens, an EAGLE head."""
    network = target(shape, find_device("gb200"), "fp8", tp)
    ratios = {}
    for row in rows_of("nvidia_235b.csv"):
        gamma, rows = int(row["gamma"]), 4096 * tp // int(row["generation_gpus"])
        costs = Costs(network, (eagle(network, alpha_of(gamma, float(row["tokens_per_round"]))),))
        work = Work.lognormal(rows, 5500, 8192, 8192)
        gain = rollout(costs, work, PLAIN).seconds / rollout(costs, work, Choice(gamma, "eagle")).seconds
        ratios[f"{row['gpus']} GPUs, γ={gamma}, {row['tokens_per_round']} tokens"] = gain / float(row["rollout_gain"])
    return ratios


def step_ratios() -> Ratios:
    """Their gains of a synchronous step: one share of rollouts explains all three."""
    rows = [row for row in rows_of("nvidia_235b.csv") if row["gpus"] == "512"]
    return {r["rollout_gain"]: step_gain(0.65, float(r["rollout_gain"])) / float(r["step_gain"]) for r in rows}


def table() -> Iterator[tuple[str, str, int, str]]:
    """What is predicted, what was fitted, points, and the errors."""
    third = "an engine's 12 numbers, on the two other models"

    def line(name: str, known: str, ratios: Callable[[], Ratios]) -> tuple[str, str, int, str]:
        found = ratios()
        bias = mean(found.values()) - 1
        return name, known, len(found), f"{error(found):.1%} (bias {bias:+.1%}, worst {worst(found):.0%})"

    for part in ("plain", "draft", "verify", "gain"):
        name = "gain of a round" if part == "gain" else f"seconds of a {part} forward"
        yield line(f"A100, vLLM: {name}", "the table alone", lambda p=part: a100_ratios(p, False))
        yield line(f"A100, vLLM: {name}", third, lambda p=part: a100_ratios(p, True))
    yield "A100, vLLM: side of the gate", "the table alone", len(points()), f"{same_side(False):.1%} right"
    yield "A100, vLLM: side of the gate", third, len(points()), f"{same_side(True):.1%} right"
    yield line("H200, our steps, 7B", "one number, at one row of 7B", lambda: h200_ratios("Qwen2.5-7B"))
    yield line("H200, our steps, 1.5B", "the same", lambda: h200_ratios("Qwen2.5-1.5B"))
    yield line("2 CPU cores, plain rollouts", "kernels, two numbers at one row", lambda: cpu_ratios("seconds"))
    yield line("2 CPU cores, gains", "the same", lambda: cpu_ratios("gain"))
    yield line("GB200, 235B: NVIDIA's projections", "nothing", nvidia_ratios)
    yield line("GB200, 235B: gain of a step", "the share of rollouts, 0.65", step_ratios)


def as_text() -> str:
    lines = ["| predicted | known before | points | mean error |", "|-|-|-|-|"]
    return "\n".join(lines + [f"| {name} | {known} | {n} | {text} |" for name, known, n, text in table()])


if __name__ == "__main__":
    print(as_text())
