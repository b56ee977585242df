"""Run every causal LM architecture of transformers, built small, through the engine.

    python scripts/sweep_families.py --table docs/models.md --json sweep.json

A family is `equal` if, in fp32, greedy tokens are those of `model.generate` on each row alone, and log-probabilities
of sampled tokens are those of the model's own forward; `refused` if the engine names a reason for not running it;
anything else is a fault. Then once in bf16. Each family runs in a process of its own, forked from one that has loaded
the libraries. Exit status: 1 if a family crashes or differs.
"""

import argparse
import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import transformers
from sweep.configs import VOCAB_SIZE, small_config
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES
from transformers.utils import logging

from trl_selfspec import SelfSpecEngine, SelfSpecOptions
from trl_selfspec.engine.engine import RolloutOutput, UnsupportedModelError


PROMPT_LENGTHS, NEW_TOKENS = (5, 11, 30), 12
WEIGHT_STD = 0.12  # six times the usual: greedy rows of default weights repeat one token
MAX_PARAMETERS = 12_000_000
FEWEST_TOKENS = 6  # different ones in all greedy rows; fewer prove little
# Rounding gives 1e-6 to 1e-4 with weights this large; a wrong mask or position gives 0.1 to 10.
LOGPROB_TOLERANCE = 2e-3
BF16_TOLERANCE = 0.3  # of the median: rounding gives 0.01 to 0.1 with weights this large
GREEDY = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
SAMPLED = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=True, eos_token_id=None, pad_token_id=0, top_k=0)
OPTIONS = SelfSpecOptions(num_speculative_tokens=3, max_active_sequences=64)
SECONDS = 180.0  # for one family
FAULTS = ("differs", "crashes")


@dataclass
class Outcome:
    """What became of one family.

    Attributes:
        verdict: `equal`, `refused`, `differs`, `crashes`, or `not built`: transformers itself can't run it here.
        reason: of any verdict but `equal`.
        bf16: the same for the run in bf16: `runs`, `refused`, `differs` or `crashes`.
        acceptance: accepted of examined drafts.
    """

    family: str
    architecture: str
    verdict: str
    reason: str = ""
    bf16: str = ""
    bf16_reason: str = ""
    acceptance: float | None = None
    seconds: float = 0.0


def small_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model whose greedy rows wander, and that ends rows at no token."""
    config = small_config(family)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).mul_(WEIGHT_STD)
            if not parameter.is_floating_point():
                continue
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.generation_config.eos_token_id = None
    return model


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Of each new token under the model's own forward over the whole row, without a cache."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


def logprob_errors(model: PreTrainedModel, rows: Sequence[Sequence[int]], output: RolloutOutput) -> Tensor:
    pairs = zip(rows, output.completion_ids, output.policy_logprobs, strict=True)
    return torch.cat([(own_logprobs(model, row, ids) - torch.tensor(logprobs)).abs() for row, ids, logprobs in pairs])


@torch.no_grad()
def own_greedy(model: PreTrainedModel, prompt: Sequence[int]) -> list[int]:
    """Without a cache, and without what a family's `generate` may do besides."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def check_fp32(model: PreTrainedModel, outcome: Outcome) -> None:
    rows = prompts()
    try:
        generate: Any = model.generate
        expected = [generate(torch.tensor([row]), generation_config=GREEDY)[0, len(row) :].tolist() for row in rows]
        if not own_logprobs(model, rows[0], expected[0]).isfinite().all():
            raise ValueError("logits that are not finite")
    except Exception as error:  # noqa: BLE001  foreign model code: whatever it raises, it is not the engine's
        outcome.verdict, outcome.reason = "not built", f"transformers' own generation fails: {_described(error)}"
        return
    engine = SelfSpecEngine(model, OPTIONS)
    output = engine.generate(rows, GREEDY, seed=0)
    outcome.acceptance = output.stats.alpha
    sampled = engine.generate(rows, SAMPLED, seed=0)
    error = float(logprob_errors(model, rows, sampled).max())
    wrong = [index for index, (a, b) in enumerate(zip(output.completion_ids, expected, strict=True)) if a != b]
    if wrong and output.completion_ids == [own_greedy(model, row) for row in rows] and error < LOGPROB_TOLERANCE:
        outcome.verdict, outcome.reason = "equal", "to its own forward; `generate` decodes otherwise"
    elif wrong:
        outcome.verdict, outcome.reason = "differs", f"greedy rows {wrong}; log-probabilities by {error:.2g}"
    elif not error < LOGPROB_TOLERANCE:
        outcome.verdict, outcome.reason = "differs", f"log-probabilities by {error:.2g}"
    else:
        outcome.verdict = "equal"
        if len({token for row in expected for token in row}) < FEWEST_TOKENS:
            outcome.reason = "rows too monotonous to prove much"


def check_bf16(model: PreTrainedModel, outcome: Outcome) -> None:
    try:
        engine = SelfSpecEngine(model.bfloat16(), OPTIONS)
        error = float(logprob_errors(model, prompts(), engine.generate(prompts(), SAMPLED, seed=0)).median())
        outcome.bf16 = "runs" if error < BF16_TOLERANCE else "differs"
        outcome.bf16_reason = "" if error < BF16_TOLERANCE else f"log-probabilities by {error:.2g} (median)"
    except UnsupportedModelError as error:
        outcome.bf16, outcome.bf16_reason = "refused", _described(error)
    except Exception as error:  # noqa: BLE001  what the sweep is there to find
        outcome.bf16, outcome.bf16_reason = "crashes", _described(error)


def run_family(family: str) -> Outcome:
    """Everything in this process."""
    outcome, start = Outcome(family, FAMILIES[family], "not built"), time.perf_counter()
    with warnings.catch_warnings(action="ignore"):
        try:
            model = small_model(family)
        except Exception as error:  # noqa: BLE001  foreign model code
            outcome.reason = _described(error)
            return outcome
        check(model, outcome)
    outcome.seconds = round(time.perf_counter() - start, 1)
    return outcome


def check(model: PreTrainedModel, outcome: Outcome) -> None:
    """Fills in what the engine makes of `model`, which is in bf16 afterwards."""
    try:
        check_fp32(model, outcome)
    except UnsupportedModelError as error:
        outcome.verdict, outcome.reason = "refused", _described(error)
    except Exception as error:  # noqa: BLE001  what the sweep is there to find
        outcome.verdict, outcome.reason = "crashes", _described(error)
    if outcome.verdict in ("equal", "refused"):
        check_bf16(model, outcome)


def _described(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UnsupportedModelError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" [{Path(frames[-1].filename).name}:{frames[-1].lineno}]" if frames else ""
    return f"{type(error).__name__}: {text[:300]}{where}"


def _work(family: str, results: connection.Connection) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        results.send(run_family(family))


def run_all(families: Sequence[str], jobs: int) -> list[Outcome]:
    """Each family in a forked process; one that dies or hangs is an outcome too."""
    context = multiprocessing.get_context("fork")
    waiting, outcomes = list(reversed(families)), []
    running: dict[connection.Connection, tuple[str, BaseProcess, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            family = waiting.pop()
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(family, send))
            process.start()
            send.close()
            running[receive] = family, process, time.monotonic()
        ready = connection.wait(list(running), timeout=1.0)
        for receive, (family, process, start) in list(running.items()):
            if receive not in ready and time.monotonic() - start < SECONDS:
                continue
            try:
                outcome = receive.recv() if receive in ready else None
            except EOFError:
                outcome = None
            if outcome is None:
                process.kill()
                process.join()
                outcome = Outcome(family, FAMILIES[family], "crashes", f"the process ended with {process.exitcode}")
            process.join()
            del running[receive]
            outcomes.append(outcome)
            print(f"{len(outcomes):4}/{len(families)} {_line(outcome)}", flush=True)
    return sorted(outcomes, key=lambda outcome: outcome.family)


def _line(outcome: Outcome) -> str:
    reason = outcome.reason[:160]
    bf16 = f"; bf16 {outcome.bf16} {outcome.bf16_reason[:80]}" if outcome.bf16 != outcome.verdict else ""
    return f"{outcome.family}: {outcome.verdict} {reason}{bf16} ({outcome.seconds:.1f} s)"


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: counts, then a row per family."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    lines = [
        "# Which models the engine runs",
        "",
        "Written by `python scripts/sweep_families.py --table docs/models.md`: every causal LM of transformers "
        f"{transformers.__version__}, built small with random weights.",
        "**equal**: in fp32, greedy tokens are `model.generate`'s and log-probabilities are the model's own. "
        "**refused**: the engine names a reason, and the trainer generates with TRL. "
        "**not built**: transformers' own code does not build it small here, or does not generate from token ids.",
        "",
        f"{len(outcomes)} model types: {summary}.",
        "",
        "| model type | fp32 | bf16 | reason |",
        "|---|---|---|---|",
    ]
    for outcome in outcomes:
        reason = outcome.reason or outcome.bf16_reason
        lines.append(f"| {outcome.family} | {outcome.verdict} | {outcome.bf16 or '-'} | {reason.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="TYPE", help="model types; all")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at once")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write a markdown table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes as JSON")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.families) - set(FAMILIES)):
        parser.error(f"not a causal LM of transformers: {', '.join(unknown)}")
    torch.set_num_threads(1)  # before anything runs: a pool of threads does not survive a fork
    logging.set_verbosity_error()
    importlib.import_module("optimum.quanto")  # seconds, which no child has to spend again
    gc.freeze()
    outcomes = run_all(args.families, args.jobs)
    print(Counter(outcome.verdict for outcome in outcomes))
    if args.table:
        args.table.write_text(table(outcomes))
    if args.json:
        args.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return int(any(outcome.verdict in FAULTS or outcome.bf16 in FAULTS for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
