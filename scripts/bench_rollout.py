"""Time rollout engines side by side, on the same forced work, in one process.

    python scripts/bench_rollout.py run --preset 150m --rows 4 --synthetic-acceptance 0.95
    python scripts/bench_rollout.py run --model smollm2 --rows 4 --max-new-tokens 96
    python scripts/bench_rollout.py run --model smollm2 --replay benchmarks/traces/word_problems_t1.0.json.gz
    python scripts/bench_rollout.py record --prompts prose --temperature 1.0 --out trace.json.gz
    python scripts/bench_rollout.py compare before.json after.json
    python scripts/bench_rollout.py plot benchmarks/*.json --out ratios.png

Repeats are interleaved (A B A B ...). Before them, untimed, every engine does a short rollout; ours do a whole one,
and selfspec as many as make `--warmup-tokens`: its gate then knows its costs, as it does in training from the second
step on. vLLM runs in a process of its own beside the others. An engine that fails is left out, with its traceback in
the result; --out is written after every repeat. The last line on stdout is one JSON object; ratios above 1 mean
faster.

--replay forces the tokens of a trace, as `record` writes it, so that acceptance is that of real text. Its rows are the
first of the trace's first prompts; `stock` samples its own tokens, as many. `suffix_history` and `auto` know what the
prompts were answered in the epochs before --epoch; `suffix` does not.
"""

import argparse
import importlib.metadata
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import device as devices
from bench import report
from bench.engines import ENGINES, Engine, OwnEngine, engine_makers
from bench.figures import Traffic, own_figures, step_costs
from bench.plot import plot
from bench.replay import NEED_THE_MODEL, REPLAY_ENGINES, check_replay, replay_makers, replay_ratios
from bench.traces import PROMPTS, Trace, make_prompts, record
from bench.vllm_engine import VllmEngine, check_vllm
from bench.workload import LENGTH_PROFILES, PRESETS, Workload, load_model, make_workload, preset_config
from transformers import AutoConfig, PreTrainedModel

from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.utils import failures_raised_as


sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import smollm2


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WARMUP_FRACTION = 0.1  # of each row's length, for engines that learn nothing


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def probability(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{value} is not a probability between 0 and 1")
    return value


def draft_length(text: str) -> int | str:
    return text if text == "auto" else positive_int(text)


def engine_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = f"engines: {', '.join(ENGINES)}; with --replay: {', '.join(REPLAY_ENGINES)}"
    for name in names:
        if name not in ENGINES + REPLAY_ENGINES:
            raise argparse.ArgumentTypeError(f"unknown engine {name!r}; {known}")
    if not names:
        raise argparse.ArgumentTypeError(f"no engine named; {known}")
    return names


def available_device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; use cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text} is not there; {torch.cuda.device_count()} CUDA devices are")
    return device


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = argparse.ArgumentDefaultsHelpFormatter
    run = commands.add_parser("run", help="time engines", formatter_class=defaults)
    model = run.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="PATH", help="a saved model, or smollm2")
    model.add_argument("--preset", help=f"random weights of a known shape: {', '.join(PRESETS)}; 150m without --model")
    run.add_argument(
        "--engines",
        type=engine_names,
        help=f"of {', '.join(ENGINES)}, or with --replay of {', '.join(REPLAY_ENGINES)}; if not given, "
        "stock,plain,selfspec, or what the replay allows",
    )
    run.add_argument("--replay", type=Path, metavar="TRACE", help="force the tokens of this trace")
    run.add_argument("--epoch", type=positive_int, default=2, help="of the trace; earlier ones are the history")
    run.add_argument("--rollouts", type=positive_int, default=1, help="a repeat replays, each of other prompts")
    run.add_argument("--rows", type=positive_int, default=1, help="prompts, one completion each")
    run.add_argument("--length-profile", choices=LENGTH_PROFILES, default="uniform")
    run.add_argument("--max-new-tokens", type=positive_int, default=128, help="length of the longest row")
    run.add_argument("--prompt-length", type=positive_int, default=64, help="of the longest random prompt")
    run.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    run.add_argument("--device", type=available_device, default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--threads", type=positive_int, help="torch's CPU threads; torch's choice if not given")
    run.add_argument("--warmup-tokens", type=positive_int, default=512, help="of the longest row, for selfspec")
    run.add_argument("--repeats", type=positive_int, default=3)
    run.add_argument(
        "--synthetic-acceptance", type=probability, metavar="A", help="accept each draft with probability A"
    )
    run.add_argument("--num-speculative-tokens", type=draft_length, default="auto", help="a draft length, or auto")
    run.add_argument("--max-active-sequences", type=positive_int, help="draft up to this many rows, whatever it costs")
    run.add_argument("--draft-qtype", default="auto", help="quanto qtype of the drafter")
    run.add_argument("--vllm-python", default=sys.executable, help="interpreter of an environment that has vLLM")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--out", type=Path, help="also write the JSON here")
    traces = commands.add_parser("record", help="sample a trace", formatter_class=defaults)
    traces.add_argument("--model", type=Path, default="smollm2", metavar="PATH", help="a saved model, or smollm2")
    traces.add_argument("--prompts", choices=PROMPTS, default="word_problems")
    traces.add_argument("--num-prompts", type=positive_int, default=8)
    traces.add_argument("--group-size", type=positive_int, default=16, help="completions of a prompt in an epoch")
    traces.add_argument("--temperature", type=float, default=1.0)
    traces.add_argument("--max-new-tokens", type=positive_int, default=160)
    traces.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    traces.add_argument("--device", type=available_device, default="cuda" if torch.cuda.is_available() else "cpu")
    traces.add_argument("--threads", type=positive_int, help="torch's CPU threads; torch's choice if not given")
    traces.add_argument("--seed", type=int, default=0, help="of the problems and of the first epoch")
    traces.add_argument("--out", type=Path, required=True, help="a .json.gz")
    compare = commands.add_parser("compare", help="how ratios changed between two results")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    plot = commands.add_parser("plot", help="draw ratios over rows")
    plot.add_argument("results", type=Path, nargs="+")
    plot.add_argument("--out", type=Path, required=True)
    return parser


def rollouts(name: str, engine: Engine, workloads: Sequence[Workload], seed: int) -> None:
    """One after the other; `RuntimeError` if a row has not its length."""
    for workload in workloads:
        workload.check(engine.rollout(workload, seed), name)


def warm_up(
    name: str, engine: Engine, workloads: Sequence[Workload], tokens: int, seed: int, device: torch.device
) -> None:
    if not isinstance(engine, OwnEngine):
        rollouts(name, engine, [workload.shortened(WARMUP_FRACTION) for workload in workloads], seed)
        return
    longest = sum(max(workload.lengths) for workload in workloads)
    for _ in range(math.ceil(tokens / longest) if engine.learns else 1):
        with devices.Stopwatch(device) as watch:
            rollouts(name, engine, workloads, seed)
        engine.warmup_s.append(watch.seconds)
    engine.forget_warmup()


class Bench:
    """Engines at the same work, side by side.

    Attributes:
        engines: those that have not failed.
        seconds: of each timed rollout.
        peak_bytes: on a GPU.
        failures: tracebacks of the others.
    """

    def __init__(self, workloads: Sequence[Workload], device: torch.device, seed: int) -> None:
        self.workloads, self.device, self.seed = workloads, device, seed
        self.engines: dict[str, Engine] = {}
        self.seconds: dict[str, list[float]] = {}
        self.peak_bytes: dict[str, int] = {}
        self.failures: dict[str, str] = {}

    def add(self, name: str, make: Callable[[], Engine], warmup_tokens: int) -> None:
        """Builds an engine and warms it up."""
        try:
            with failures_raised_as(RuntimeError):
                engine = make()
                warm_up(name, engine, self.workloads, warmup_tokens, self.seed, self.device)
        except RuntimeError:
            self._drop(name)
        else:
            self.engines[name], self.seconds[name], self.peak_bytes[name] = engine, [], 0

    def repeat(self, number: int, of: int) -> None:
        """Times the rollouts of each engine and checks their lengths."""
        for name, engine in list(self.engines.items()):
            try:
                devices.reset_peak_memory(self.device)
                with failures_raised_as(RuntimeError), devices.Stopwatch(self.device) as watch:
                    rollouts(name, engine, self.workloads, self.seed + number)
            except RuntimeError:
                self._drop(name)
                continue
            self.seconds[name].append(watch.seconds)
            self.peak_bytes[name] = max(self.peak_bytes[name], devices.peak_memory_bytes(self.device))
            print(f"repeat {number}/{of}  {name:<15}{watch.seconds:8.3f} s", file=sys.stderr, flush=True)

    def _drop(self, name: str) -> None:
        self.failures[name] = traceback.format_exc()
        print(f"engine {name} failed\n{self.failures[name]}", file=sys.stderr, flush=True)
        for values in (self.engines, self.seconds, self.peak_bytes):
            values.pop(name, None)


def engine_report(
    engine: Engine, seconds: list[float], peak_bytes: int, num_tokens: int, traffic: Traffic
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "seconds": report.spread(seconds) | {"all": list(seconds)},
        "tokens_per_s": report.spread([num_tokens / s for s in seconds]),
    }
    if isinstance(engine, VllmEngine):
        return figures | {"version": engine.version}
    if peak_bytes:
        figures["peak_memory_bytes"] = peak_bytes
    if isinstance(engine, OwnEngine):
        figures |= own_figures(engine.stats, len(seconds), traffic)
        excess_s = sum(engine.warmup_s) - len(engine.warmup_s) * report.median(seconds)
        figures["startup_s"] = engine.build_s + max(0.0, excess_s)
        if engine.learns:
            figures["gate"] = engine.engine.controller.explain()
            figures |= step_costs(engine.engine.state_dict())
            figures["refresh_s"] = engine.refresh_s + engine.stats.refresh_s
    return figures


def run(args: argparse.Namespace, argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What is known after each repeat, then all of it."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    device: torch.device = args.device
    preset = None if args.model else args.preset or "150m"
    path = smollm2.resolve(args.model)
    model = load_model(preset, path, DTYPES[args.dtype], device, args.seed)
    workloads, makers = make_work(args, model, path)
    load_before = os.getloadavg()[0]
    bench = Bench(workloads, device, args.seed)
    for name, make in makers.items():
        bench.add(name, make, args.warmup_tokens)
    workload = Workload.joined(workloads)
    traffic = Traffic.of(model, workload)
    result: dict[str, Any] = {
        "complete": False,
        "failures": bench.failures,
        "workload": {
            "model": preset or str(args.model),
            "random_weights": preset is not None,
            "parameters": model.num_parameters(),
            "weight_bytes": traffic.weight_bytes,
            "kv_bytes_per_token": traffic.kv_token_bytes,
            "dtype": args.dtype,
            "device": device.type,
            "length_profile": f"{args.replay.name}, epoch {args.epoch}" if args.replay else args.length_profile,
            "lengths": workload.summary() | {"rows": args.rows},
            "temperature": workload.temperature,
            "rollouts": args.rollouts,
            "prompt_length": max(map(len, workload.prompt_ids)),
        },
        "provenance": report.provenance(argv, device)
        | {
            "seed": args.seed,
            "warmup_tokens": args.warmup_tokens,
            "synthetic_acceptance": args.synthetic_acceptance,
            "load_average_before": load_before,
        },
    }
    for number in range(1, args.repeats + 1):
        bench.repeat(number, args.repeats)
        result["ratios"] = report.ratios(bench.seconds) | ({} if args.replay is None else replay_ratios(bench.seconds))
        result["provenance"]["repeats"] = number
        result["engines"] = {
            name: engine_report(engine, bench.seconds[name], bench.peak_bytes[name], workload.num_tokens, traffic)
            for name, engine in bench.engines.items()
        }
        yield result
    for name, engine in bench.engines.items():
        if isinstance(engine, OwnEngine) and (requantize_s := engine.requantize_s()):
            result["engines"][name]["requantize_s"] = report.spread(requantize_s)
        elif isinstance(engine, VllmEngine):
            engine.close()
    result["complete"] = not bench.failures
    yield result


def make_work(
    args: argparse.Namespace, model: PreTrainedModel, path: Path | None
) -> tuple[Sequence[Workload], Mapping[str, Callable[[], Engine]]]:
    """The rollouts of a repeat, and what builds the engines that do them."""
    options = selfspec_options(args)
    if args.replay is not None:
        recordings = Trace.load(args.replay).recordings(args.rows, args.rollouts, args.epoch)
        return recordings, replay_makers(model, recordings, chosen_engines(args), options)
    workload = make_workload(
        model, path, args.length_profile, args.rows, args.max_new_tokens, args.prompt_length, args.seed
    )
    makers = engine_makers(
        model, workload, chosen_engines(args), options, args.synthetic_acceptance, args.vllm_python, path
    )
    return [workload], makers


def chosen_engines(args: argparse.Namespace) -> list[str]:
    """In the order of ratios."""
    if args.replay is None:
        known, default = ENGINES, {"stock", "plain", "selfspec"}
    else:
        known, default = REPLAY_ENGINES, set(REPLAY_ENGINES)
        if args.epoch == 1:
            default -= {"suffix_history"}
        if args.model is None:
            default -= set(NEED_THE_MODEL)
    return [name for name in known if name in (args.engines or default)]


def record_trace(args: argparse.Namespace, argv: Sequence[str]) -> Trace:
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    path = smollm2.resolve(args.model)
    assert path is not None
    prompt_ids = make_prompts(args.prompts, path, args.num_prompts, args.seed)
    model = load_model(None, path, DTYPES[args.dtype], args.device, args.seed)
    version = importlib.metadata.version(smollm2.PACKAGE) if str(args.model) == smollm2.NAME else None
    about = {
        "model": str(args.model) if version is None else f"SmolLM2-135M-Instruct of {smollm2.PACKAGE} {version}",
        "prompts": args.prompts,
        "dtype": args.dtype,
        "provenance": report.provenance(argv, args.device),
    }
    return record(model, path, prompt_ids, args.group_size, args.temperature, args.max_new_tokens, args.seed, about)


def selfspec_options(args: argparse.Namespace) -> SelfSpecOptions:
    return SelfSpecOptions(
        draft_qtype=args.draft_qtype,
        num_speculative_tokens=args.num_speculative_tokens,
        max_active_sequences=args.max_active_sequences,
    )


def check_arguments(args: argparse.Namespace) -> None:
    """What argparse cannot see; `ValueError` before any model is built."""
    if args.preset is not None and args.preset not in PRESETS:
        raise ValueError(f"unknown preset {args.preset!r}; presets: {', '.join(PRESETS)}")
    path = smollm2.resolve(args.model)
    if path is not None and not (path / "config.json").exists():
        raise ValueError(f"--model {path}: no config.json there; give the folder of a saved model, or --preset")
    if path is None and args.length_profile == "eos":
        raise ValueError("--length-profile eos needs --model: random weights don't know when an answer ends")
    engines = chosen_engines(args)
    if others := sorted(set(args.engines or []) - set(engines)):
        raise ValueError(f"--engines {', '.join(others)}: not {'without' if args.replay is None else 'with'} --replay")
    if args.synthetic_acceptance is not None and "selfspec" not in engines:
        raise ValueError("--synthetic-acceptance needs the engine selfspec: no other one drafts")
    selfspec_options(args)
    if "vllm" in engines:
        check_vllm(args.vllm_python)
    if args.replay is not None:
        trace = Trace.load(args.replay)
        config = preset_config(args.preset or "150m") if path is None else AutoConfig.from_pretrained(path)
        check_replay(trace, config.vocab_size, engines, args.epoch, random_weights=path is None)
        trace.recordings(args.rows, args.rollouts, args.epoch)
    elif args.rollouts > 1:
        raise ValueError("--rollouts needs --replay: more rows or more repeats do as well")


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        if args.command == "compare":
            print(report.compare(report.read_result(args.before), report.read_result(args.after)))
            return
        if args.command == "plot":
            plot([report.read_result(path) for path in args.results], args.out)
            print(args.out)
            return
        if args.out is not None and not args.out.parent.is_dir():
            raise ValueError(f"--out {args.out}: the folder {args.out.parent} does not exist")
        if args.command == "record":
            assert args.out is not None, "the parser requires it"
            trace = record_trace(args, argv)
            trace.save(args.out)
            print(f"{args.out}: {args.out.stat().st_size} bytes, {sum(map(len, trace.completion_ids))} tokens")
            return
        check_arguments(args)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    result: dict[str, Any] = {}
    for result in run(args, argv):
        if args.out is not None:
            report.write_result(result, args.out)
    print(report.table(result), file=sys.stderr, flush=True)
    print(json.dumps(result), flush=True)
    if failures := result["failures"]:
        sys.exit(f"Failed: {', '.join(f'{name}: {text.splitlines()[-1]}' for name, text in failures.items())}")


if __name__ == "__main__":
    main()
