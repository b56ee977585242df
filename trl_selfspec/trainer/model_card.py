"""Completes TRL's model card: how completions were generated, the figures measured in training, the citation."""

import os
import re
from importlib.metadata import PackageNotFoundError, version

from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.trainer.metrics import GenerationStats


PAPER_ID = "2606.18967"
CITATION = """\
@article{kim2026efficientrollout,
    title        = {{EfficientRollout: System-Aware Self-Speculative Decoding for RL Rollouts}},
    author       = {Minseo Kim and Minjae Lee and Seunghyuk Oh and Kevin Galim and Donghoon Kim and Coleman Hooper and Harman Singh and Amir Gholami and Hyung Il Koo and Wonjun Kang},
    year         = 2026,
    eprint       = {arXiv:2606.18967},
}"""  # noqa: E501

# Row of the table, attribute of the counters, format.
FIGURES = (
    ("Acceptance rate (accepted ÷ drafted)", "acceptance_rate", "{:.3f}"),
    ("Alpha (accepted ÷ examined)", "alpha", "{:.3f}"),
    ("Mean acceptance length (tokens per speculative round)", "mean_acceptance_length", "{:.2f}"),
    ("Tokens per second and process", "tokens_per_s", "{:.0f}"),
    ("Estimated speed-up over the same engine without speculation", "estimated_speedup", "{:.2f}"),
)


DRAFTS = {  # by option
    "quantized": "drafts of the current policy itself, quantized by optimum-quanto",
    "suffix": "drafts copied from the row, its siblings of the same prompt and earlier completions of it",
    "auto": "drafts of the current policy itself, quantized by optimum-quanto, and copies of earlier text",
}


def complete_model_card(
    path: str,
    trainer_name: str,
    options: SelfSpecOptions,
    run: GenerationStats,
    base_model_path: str | None,
) -> None:
    """Rewrites TRL's card at `path`; text whose anchor TRL's template no longer has goes to the end."""
    with open(path, encoding="utf-8") as file:
        card = file.read()
    card = _name_local_base(card, base_model_path, os.path.dirname(path))
    card = _insert(card, "### Framework versions", rollout_section(trainer_name, options, run) + "\n")
    card = _insert(card, "- Transformers:", f"- trl-selfspec: {_library_version()}\n")
    card = _insert(card, "Cite TRL as:", f"Cite the rollout method as:\n\n```bibtex\n{CITATION}\n```\n\n")
    with open(path, "w", encoding="utf-8") as file:
        file.write(card)


def rollout_section(trainer_name: str, options: SelfSpecOptions, run: GenerationStats) -> str:
    """A Markdown section on how completions were generated; figures without a measurement are left out."""
    length = options.num_speculative_tokens
    drafter = (
        "without speculation"
        if length == 0
        else f"with speculative decoding ({DRAFTS[options.drafter]}; draft length `{length}`, verification "
        f"`{options.verification}`)"
    )
    lines = [
        "### Rollouts",
        "",
        f"`{trainer_name}` of trl-selfspec generated the completions with its own engine, {drafter}, following "
        f"[EfficientRollout](https://huggingface.co/papers/{PAPER_ID}). Samples follow the policy's own "
        "distribution.",
        "",
    ]
    figures = [(label, getattr(run.stats, name), form) for label, name, form in FIGURES]
    if not (run.stats.plain_rounds and run.stats.num_rounds_speculative):  # nothing to compare
        figures = [figure for figure in figures if "speed-up" not in figure[0]]
    figures += [
        (f"Tokens per row and round with `{name}` drafts", drafter.mean_acceptance_length, "{:.2f}")
        for name, drafter in run.stats.by_drafter.items()
    ]
    rows = [f"| {label} | {form.format(value)} |" for label, value, form in figures if value is not None]
    if rows and run.used_engine:
        lines += ["| Measured during training | |", "|-|-|", *rows, ""]
    return "\n".join(lines)


def _name_local_base(card: str, base_model_path: str | None, output_dir: str) -> str:
    """TRL's template links to `None` where the base is a local path, and loads `None` where nothing was pushed."""
    base = f"`{os.path.basename(os.path.normpath(base_model_path))}`" if base_model_path else "a local model"
    card = re.sub(r"\[None\]\(https://huggingface\.co/None\)", base, card)
    return card.replace('model="None"', f'model="{output_dir}"')


def _insert(card: str, anchor: str, text: str) -> str:
    before, found, after = card.partition(anchor)
    return f"{before}{text}{found}{after}" if found else f"{card}\n{text}"


def _library_version() -> str:
    try:
        return version("trl-selfspec")
    except PackageNotFoundError:
        return "not installed, run from its source tree"
