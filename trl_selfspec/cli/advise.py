"""`trl-selfspec advise`: whether speculation pays for a model, a device, a batch and its lengths."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trl_selfspec.cli.advice import Advice, as_text, plot
from trl_selfspec.control.constants import TOGGLE_MARGIN
from trl_selfspec.control.rates import PLAIN
from trl_selfspec.simulate.costs import Costs
from trl_selfspec.simulate.engines import LEVELS, self_drafting
from trl_selfspec.simulate.hardware import Device, devices, find_device, is_known
from trl_selfspec.simulate.measured import Measurements, calibrated
from trl_selfspec.simulate.pipeline import async_step_s
from trl_selfspec.simulate.rollout import Work, read_lengths, slowest
from trl_selfspec.simulate.shapes import Shape


EXPLORING = 0.01  # of the seconds of a rollout, for what the controller tries
WIDTHS = {"measured": 1.08, "known device": 1.15}  # factor of the gain in either direction
KV_SHARE = 0.5  # of free memory, as `kv_memory_fraction`
MAX_ROWS = 256  # decoded at once on a GPU
SHOWN_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STOCK_LAYER_S = 1.9e-3  # of `model.generate` per layer and step on an H200's host: 1.7 to 2.1 ms, whatever the model


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("advise", help="whether speculation pays", description=__doc__)
    parser.add_argument(
        "--model", required=True, help="a config.json, a folder with one, or a model in the local cache"
    )
    parser.add_argument("--gpu", metavar="NAME", help=f"one of {', '.join(devices())}")
    parser.add_argument(
        "--bench", type=Path, metavar="FILE", help="a result of bench_rollout.py, or a controller's state"
    )
    parser.add_argument("--here", action="store_true", help="measure this machine first, in about half a minute")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp8"), default="bf16")
    parser.add_argument("--rows", type=int, default=64, help="completions of a rollout, over all ranks")
    parser.add_argument("--max-tokens", type=int, default=4096, help="limit of a completion")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="lengths of completions, one a line")
    parser.add_argument("--median", type=float, help="of the lengths")
    parser.add_argument("--p99", type=float, help="of the lengths")
    parser.add_argument("--alpha", type=float, help="chance that a draft token is accepted")
    parser.add_argument("--dp", type=int, default=1, help="ranks that share the rows")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that share a model")
    parser.add_argument("--async", type=int, dest="lag", metavar="K", help="steps that weights may be old")
    parser.add_argument("--train-seconds", type=float, help="of a step beside its rollout")
    parser.add_argument("--step-share", type=float, help="share of a step that is rollout today")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="gain by unfinished rows")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    advice = advise(args)
    if args.plot:
        plot(advice, args.plot)
    print(json.dumps(asdict(advice), indent=1) if args.json else as_text(advice))
    return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("rows", "max_tokens", "prompt", "samples", "dp", "tp"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: use at least 1.")
    for name in ("alpha", "step_share"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: use a number between 0 and 1.")
    if args.median and not 0 < args.median <= (args.p99 or args.max_tokens):
        raise ValueError(f"--median is {args.median:g}: use a number up to --p99, or to --max-tokens without it.")
    if args.lag is not None and (args.lag < 0 or not (args.train_seconds or args.step_share)):
        raise ValueError("--async takes a number of steps, and needs --train-seconds or --step-share.")
    if not (args.gpu or args.bench or args.here):
        raise ValueError(f"Say which device: --gpu with one of {', '.join(devices())}; or --here, or --bench FILE.")


def find_config(model: str) -> Path:
    """The `config.json` of a path or of a model in the cache. Nothing is downloaded."""
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return Path(cached)
    raise ValueError(f"{model!r} is neither a path nor in the local cache: give the path of its config.json.")


def default_alpha(shape: Shape) -> tuple[float, float, float]:
    """Middle, low and high. arXiv 2606.18967 has 0.958 to 0.982 from 7B on; small policies accept less."""
    billions = shape.parameters / 1e9
    return (0.96, 0.93, 0.98) if billions >= 6 else (0.95, 0.90, 0.97) if billions >= 1 else (0.93, 0.88, 0.96)


def make_work(args: argparse.Namespace) -> tuple[Work, str]:
    """The rows of a rollout, and a sentence on where their lengths are from."""
    if args.lengths:
        known = sorted(min(n, args.max_tokens) for n in read_lengths(args.lengths))
        chosen = [known[int((i + 0.5) / args.rows * len(known))] for i in range(args.rows - 1)]
        work = Work.of([*chosen, known[-1]], args.prompt, args.samples)
        return work, f"lengths of {args.lengths.name}: median {known[len(known) // 2]:g}, longest {known[-1]:g}"
    scale = min(1.0, args.max_tokens / 8192)
    median = args.median or (args.p99 / 6 if args.p99 else 500 * scale)
    p99 = args.p99 or max(median, 6 * median if not args.median else min(6 * median, args.max_tokens))
    work = Work.lognormal(args.rows, median, p99, args.max_tokens, args.samples)
    assumed = "" if args.median and args.p99 else "assumed, as on competition math: "
    text = f"{assumed}median {median:.0f}, p99 {p99:.0f}, and one row runs to the limit of {args.max_tokens}"
    return replace(work, prompt=args.prompt, prefilled=-(-args.rows // args.samples) * args.prompt), text


@dataclass(frozen=True)
class Case:
    """A model on a device with its work, of which variants can be asked."""

    shape: Shape
    device: Device
    measured: Measurements | None
    args: argparse.Namespace
    works: tuple[Work, ...]  # of the ranks
    alpha: float

    def costs(self, level: str = "middle", alpha: float | None = None) -> Costs:
        made = self_drafting(self.shape, self.device, alpha or self.alpha, self.args.dtype, self.args.tp, level)
        return calibrated(made, self.measured, self.args.prompt) if self.measured else made

    def gain(self, costs: Costs, works: Sequence[Work] | None = None) -> float:
        works = works or self.works
        plain_s, best = slowest(costs, works, gate=PLAIN).seconds, slowest(costs, works, TOGGLE_MARGIN)
        drafts = best.speculative_rounds and best.seconds < plain_s  # else preparing would not pay
        return plain_s / (best.seconds * (1 + EXPLORING)) if drafts else 1.0

    @property
    def evidence(self) -> str:
        return "measured" if self.measured else "known device" if self.device.measured_by_us else "data sheet"

    def interval(self, centre: float, alphas: Sequence[float]) -> tuple[float, float]:
        """What the gain may be as well, from what is not known: the acceptance, and what drafting costs."""
        gains = [centre, *(self.gain(self.costs(alpha=alpha)) for alpha in alphas)]
        if width := WIDTHS.get(self.evidence):
            gains += [centre / width, centre * width]
        else:
            gains += [self.gain(self.costs(level)) for level in LEVELS]
        return max(1 - 2 * EXPLORING, min(gains)), max(gains)

    def what_if(self, alpha: float) -> dict[str, float]:
        costs = self.costs()
        return {
            "no row ran to the limit": self.gain(costs, [work.without_longest() for work in self.works]),
            "all rows were equally long": self.gain(costs, [work.all_equal() for work in self.works]),
            f"drafts were accepted with {alpha:.2f}": self.gain(self.costs(alpha=alpha)),
            "drafting cost what it does at worst": self.gain(self.costs("low")),
        }


def rows_that_fit(costs: Costs, device: Device, context: float) -> int:
    """Rows of a mean context whose keys and values find room.

    Raises:
        ValueError: the weights alone do not.
    """
    network = costs.drafts[0].network
    assert network is not None
    free = KV_SHARE * (device.memory_bytes - costs.target.num_bytes - network.draft_bytes)
    if free <= 0:
        raise ValueError(
            f"{costs.target.num_bytes / 1e9:.0f} GB of weights and {network.draft_bytes / 1e9:.0f} GB of a drafter do "
            f"not fit on a {device.name}: use --tp."
        )
    return int(free / (costs.target.kv_token_bytes * context))


def advise(args: argparse.Namespace) -> Advice:
    path = find_config(args.model)
    shape = Shape.load(path)
    device, measured = _evidence(args, path)
    if args.dtype not in device.products:
        known = ", ".join(device.products)
        raise ValueError(f"{args.dtype} is not in the table for {device.name}: use one of {known}.")
    given = args.alpha or (measured.alpha if measured else None)
    alpha, *alphas = (given,) if given else default_alpha(shape)
    work, lengths = make_work(args)
    context = args.prompt + sum(work.lengths) / len(work.lengths)
    case = Case(shape, device, measured, args, tuple(work.ranks(args.dp)), alpha)
    costs = case.costs()
    fit = rows_that_fit(costs, device, context)
    slots = max(1, fit if device.is_cpu else min(fit, MAX_ROWS))
    case = replace(case, works=tuple(replace(part, slots=slots) for part in case.works))
    gain, plain_s = case.gain(costs), slowest(costs, case.works, gate=PLAIN).seconds
    low, high = case.interval(gain, alphas)
    absolute = bool(measured) or (args.dp == args.tp == 1 and not shape.experts)
    step_gain, hidden = _step(args, plain_s, gain)
    drafter = costs.drafts[0].network
    assert drafter is not None
    return Advice(
        model=args.model,
        device=device.name,
        rows=args.rows,
        max_tokens=args.max_tokens,
        verdict="pays" if low > 1.05 else "off" if high < 1.05 else "probably" if gain > 1.05 else "toss-up",
        gain=gain,
        low=low,
        high=high,
        plain_s=plain_s if absolute else None,
        seconds=plain_s / gain if absolute else None,
        starts_at=slowest(costs, case.works, TOGGLE_MARGIN).starts_at if gain > 1 else None,
        prepare_s=costs.drafts[0].prepare_s,
        by_rows={n: costs.gain(n, costs.gated(n, context, TOGGLE_MARGIN), context) for n in SHOWN_ROWS},
        what_if=case.what_if(alphas[0] if alphas else alpha - 0.03),
        step_gain=step_gain,
        hidden=hidden,
        over_stock=_over_stock(case, plain_s),
        weight_bytes=costs.target.num_bytes,
        drafter_bytes=drafter.draft_bytes,
        kv_token_bytes=costs.target.kv_token_bytes,
        rows_that_fit=fit,
        options=_options(costs, context, gain),
        alpha=alpha,
        alpha_given=bool(given),
        lengths=lengths,
        evidence=case.evidence,
        sources=_sources(args, device),
    )


def _evidence(args: argparse.Namespace, path: Path) -> tuple[Device, Measurements | None]:
    """The device, and what was measured on it."""
    if args.here:
        from trl_selfspec.cli.here import measure  # imports torch

        measured, name, memory_bytes = measure(path, args.dtype)
        if name is not None and not is_known(name):  # a GPU to start from; the measurements decide
            return replace(find_device("h100"), name=name, measured_by_us="", memory_bytes=memory_bytes), measured
        return replace(find_device(name or "cpu-2-cores"), memory_bytes=memory_bytes), measured
    if args.bench:
        try:
            saved = json.loads(args.bench.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{args.bench} is not JSON ({error}): give a result of scripts/bench_rollout.py."
            ) from error
        measured, hardware = Measurements.from_json(saved), saved.get("provenance", {}).get("hardware", {})
        name = args.gpu or (hardware.get("gpu") or {}).get("name")
        if not name and "cpu" not in hardware:
            raise ValueError(f"{args.bench} does not say on which device it was measured: add --gpu NAME.")
        return find_device(name or "cpu-2-cores"), measured
    return find_device(args.gpu), None


def _step(args: argparse.Namespace, plain_s: float, gain: float) -> tuple[float | None, bool]:
    """How much faster a step gets, and whether training hides generation anyway."""
    if not (args.train_seconds or args.step_share):
        return None, False
    train_s = args.train_seconds or plain_s * (1 - args.step_share) / args.step_share
    before, after = (async_step_s(seconds, train_s, args.lag or 0) for seconds in (plain_s, plain_s / gain))
    return before / after, bool(args.lag) and plain_s <= train_s


def _over_stock(case: Case, plain_s: float) -> float | None:
    """Plain rounds of the engine over `model.generate`, where both are known."""
    if case.device.is_cpu or case.args.tp > 1 or case.shape.experts:
        return None
    return max(work.lengths[0] for work in case.works) * case.shape.layers * STOCK_LAYER_S / plain_s


def _options(costs: Costs, context: float, gain: float) -> dict[str, Any]:
    """Fields of `SelfSpecGRPOConfig`."""
    if gain <= 1.05:
        return {"use_selfspec": True, "selfspec_num_speculative_tokens": 0}
    longer = replace(costs, longest=16)
    much = longer.gain(1, longer.best(1, context), context) / costs.gain(1, costs.best(1, context), context)
    return {"use_selfspec": True} | ({"selfspec_max_speculative_tokens": 12} if much > 1.03 else {})


def _sources(args: argparse.Namespace, device: Device) -> list[str]:
    if args.bench or args.here:
        return [
            f"rounds measured {'on this machine' if args.here else f'in {args.bench.name}'}, and a model in between"
        ]
    ours = device.measured_by_us or "nothing; overheads of our engine are those on an H200"
    return [device.sources["memory"], f"products: {device.sources['products']}", f"measured by us: {ours}"]
