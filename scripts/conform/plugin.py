"""pytest plugin: TRL's tests with TRL's GRPO classes, or with ours under the same names; one JSON line per test.

It is loaded before any conftest, so that whatever a test module imports is already the class under test. Without an
accelerator both run on the CPU. Each line also says who generated: the engine, or TRL in its place and why.
"""

import json
import logging
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from functools import wraps
from typing import Any

import pytest
import torch
import trl
from transformers import TrainingArguments
from trl.trainer import grpo_config, grpo_trainer

from trl_selfspec import SelfSpecEngine, SelfSpecGRPOConfig, SelfSpecGRPOTrainer, SelfSpecMixin
from trl_selfspec.trainer.mixin import FALLBACK_WARNING


CLASSES = ("stock", "ours")


@dataclass
class SpeculatingConfig(SelfSpecGRPOConfig):
    """Speculates in every round: on models this small the gate ends at "off", and tests would see plain rounds."""

    selfspec_num_speculative_tokens: int | str | None = 3
    selfspec_max_active_sequences: int | None = 1024


@dataclass
class Rollouts:
    """Who generated during a test."""

    by_engine: int = 0
    speculative_rounds: int = 0
    fallbacks: list[str] = field(default_factory=list)


class _Watch(logging.Handler):
    """Counts the engine's rollouts and collects the trainer's warnings that TRL generates instead."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts = Rollouts()

    def emit(self, record: logging.LogRecord) -> None:
        _, warned, reason = record.getMessage().partition(FALLBACK_WARNING)
        if warned and reason not in self.rollouts.fallbacks:
            self.rollouts.fallbacks.append(reason)

    def install(self) -> None:
        logging.getLogger(SelfSpecMixin.__module__).addHandler(self)
        generate = SelfSpecEngine.generate

        @wraps(generate)
        def counted(*args: Any, **kwargs: Any) -> Any:
            output = generate(*args, **kwargs)
            self.rollouts.by_engine += 1
            self.rollouts.speculative_rounds += output.stats.num_rounds_speculative
            return output

        SelfSpecEngine.generate = counted


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--grpo-class", choices=CLASSES, default="stock", help="what `trl.GRPOTrainer` is in the tests")
    group.addoption("--gate", action="store_true", help="leave speculation to the gate")
    group.addoption("--step-cap", type=int, help="`max_steps` of every run that sets none")
    group.addoption("--fp32", action="store_true", help="no bf16 autocast")
    group.addoption("--results", help="file for one JSON line per test")


_watch = _Watch()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    options = early_config.known_args_namespace
    _adapt_runs(options.step_cap, options.fp32)
    if options.grpo_class == "ours":
        _substitute(SelfSpecGRPOTrainer, SelfSpecGRPOConfig if options.gate else SpeculatingConfig)
        _watch.install()


def _substitute(trainer_class: type, config_class: type) -> None:
    for name, substitute, home in (
        ("GRPOTrainer", trainer_class, grpo_trainer),
        ("GRPOConfig", config_class, grpo_config),
    ):
        for module in (trl, trl.trainer, home):
            setattr(module, name, substitute)


def _adapt_runs(step_cap: int | None, fp32: bool) -> None:
    check = TrainingArguments.__post_init__

    @wraps(check)
    def adapted(self: TrainingArguments) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if fp32:
            self.bf16 = False
        if step_cap is not None and self.max_steps < 0:
            self.max_steps = step_cap
        check(self)

    TrainingArguments.__post_init__ = adapted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    _watch.rollouts = Rollouts()
    try:
        return (yield)
    finally:
        item.user_properties.append(("rollouts", asdict(_watch.rollouts)))


class _Results:
    """Writes one line per test: its worst phase decides."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        line = self.lines.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0})
        line["seconds"] += report.duration
        line |= dict(report.user_properties)
        if report.outcome != "passed" and line["outcome"] != "failed":
            line["outcome"] = report.outcome
            crash = getattr(report.longrepr, "reprcrash", None)
            line["reason"] = crash.message if crash else str(report.longrepr)
        if report.when == "teardown":
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--results")
    if path and not hasattr(config, "workerinput"):  # workers report to the process that started them
        config.pluginmanager.register(_Results(path))
