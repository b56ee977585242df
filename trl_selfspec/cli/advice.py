"""What there is to say, in plain words for a terminal of 80 columns, and as a plot."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import fill
from typing import Any


WIDTH = 78
VERDICTS = {
    "pays": "speculation should pay.",
    "probably": "speculation probably pays.",
    "off": "no difference: the gate will stay off, or off most of the time.",
    "toss-up": "a toss-up. Measure: the first steps of a training run tell.",
}
EVIDENCE = {
    "measured": "measured on this kind of machine",
    "known device": "a device on which we measured other models",
    "data sheet": "a device that we never measured",
}


@dataclass
class Advice:
    """What there is to say. Gains are over plain rounds of the same engine."""

    model: str
    device: str
    rows: int
    max_tokens: int
    verdict: str  # pays, probably, off, toss-up
    gain: float
    low: float
    high: float
    plain_s: float | None  # None where no stage of a distributed step was measured
    seconds: float | None
    starts_at: int | None  # unfinished rows on a rank
    prepare_s: float  # of the drafter, in each rollout that drafts
    by_rows: dict[int, float]
    what_if: dict[str, float]
    step_gain: float | None
    hidden: bool  # generation takes no longer than training, which runs beside it
    over_stock: float | None
    weight_bytes: float
    drafter_bytes: float
    kv_token_bytes: float
    rows_that_fit: int
    options: dict[str, Any]
    alpha: float
    alpha_given: bool
    lengths: str
    evidence: str
    sources: list[str]


def as_text(a: Advice) -> str:
    head = f"{a.model} on {a.device}, {a.rows} completions of up to {a.max_tokens} tokens: {VERDICTS[a.verdict]}"
    lines = [fill(head, WIDTH, subsequent_indent="  "), *_wrapped(_answer(a))]
    sections = {
        "What would change the answer": _doubts(a),
        "The engine without speculation": [_engine_alone(a)],
        "Memory of a rank": [
            f"{_bytes(a.weight_bytes)} of weights, {_bytes(a.drafter_bytes)} for the drafter, "
            f"{_bytes(a.kv_token_bytes)} of keys and values per token: {a.rows_that_fit} rows of mean length fit "
            "beside them, before what training itself holds."
        ],
        "Recommended options": [
            ", ".join(f"{name}={value!r}" for name, value in a.options.items()) + "; the defaults of the others."
        ],
        f"How this is known: {EVIDENCE[a.evidence]}": _sources(a),
    }
    for title, sentences in sections.items():
        lines += ["", title, *_wrapped(sentences)]
    return "\n".join(lines)


def _wrapped(sentences: Iterable[str]) -> Iterator[str]:
    return (fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ") for text in sentences)


def _answer(a: Advice) -> Iterator[str]:
    interval = f"{a.gain:.2f}x (from {a.low:.2f}x to {a.high:.2f}x)"
    if a.plain_s is not None and a.seconds is not None:
        yield f"A rollout takes {a.seconds:.3g} s instead of {a.plain_s:.3g} s: {interval}."
    else:
        yield f"A rollout gets faster by {interval}. Seconds of several GPUs, or of experts, are not predicted."
    if a.hidden:
        yield "Generation is hidden behind training: faster rollouts would not shorten a step."
    elif a.step_gain is not None:
        yield f"A whole training step gets faster by {a.step_gain:.2f}x."
    if a.starts_at:
        yield f"Drafting starts when a rank has about {a.starts_at} row{'s' * (a.starts_at > 1)} unfinished."
    elif max(a.by_rows.values()) > 1:
        yield f"Preparing a drafter takes {a.prepare_s:.2g} s, and these rollouts would not win that back."
    shown = (f"{n}: {gain:.2f}x" if gain > 1 else f"{n}: off" for n, gain in a.by_rows.items() if n <= max(8, a.rows))
    yield f"Gain of a round by unfinished rows: {', '.join(shown)}."


def _doubts(a: Advice) -> Iterator[str]:
    yield from (f"If {what}: {gain:.2f}x." for what, gain in a.what_if.items())
    advice = " Give yours with --lengths, or --median and --p99." if a.lengths.startswith("assumed") else ""
    yield f"Lengths, which decide most, are {a.lengths}.{advice}"
    usual = "as given" if a.alpha_given else "usual for a model of this size; a run logs its own as selfspec/alpha"
    yield f"Drafts are accepted with {a.alpha:.3g}, {usual}."
    yield "Text that comes again (siblings, the last epoch) is drafted for nothing, and is not counted here."


def _engine_alone(a: Advice) -> str:
    if a.over_stock:
        return (
            f"About {a.over_stock:.0f}x the speed of TRL's own generate, whose steps take 1.7 to 2.1 ms per layer on "
            "an H200's host whatever the model. Against transformers' continuous batching: not measured."
        )
    return (
        "Not known here. On 2 CPU cores a model of 150M parameters ran 1.9x (1 row) to 12.6x (a long tail of 16 rows) "
        "as fast as TRL's own generate."
    )


def _sources(a: Advice) -> Iterator[str]:
    yield from (f"{source[0].upper()}{source[1:]}." for source in a.sources)
    if a.evidence != "measured":
        yield "To narrow the interval, run `trl-selfspec advise --here` on the machine."


def _bytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"


def plot(advice: Advice, path: Path) -> None:
    """Gain of a round by unfinished rows, and the rollout's.

    Raises:
        ValueError: there is nothing to draw with.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: `pip install matplotlib`, or leave --plot away.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(advice.by_rows), list(advice.by_rows.values()), marker="o", label="a round")
    axes.axhspan(advice.low, advice.high, alpha=0.15, color="tab:orange")
    axes.axhline(advice.gain, color="tab:orange", label="the whole rollout, with its interval")
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(advice.by_rows), [str(n) for n in advice.by_rows])
    axes.set(
        xlabel="unfinished rows of a rank",
        ylabel="gain over plain rounds",
        title=f"{Path(advice.model).name} on {advice.device}",
    )
    axes.legend()
    figure.savefig(path, dpi=150)
