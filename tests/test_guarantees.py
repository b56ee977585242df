"""docs/guarantees.md names tests that exist, for every law and every control."""

import ast
import functools
import re
from pathlib import Path


TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "guarantees.md").read_text()
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows(text: str) -> list[list[str]]:
    """The cells of each guarantee: what holds, its tests, its controls."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| guarantee |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def missing(text: str) -> list[str]:
    """What is named and not defined, at the top of its file or by an assignment there."""
    return [f"{file}::{name}" for file, name in NAMED.findall(text) if name not in _defined(TESTS / file)]


@functools.cache
def _defined(file: Path) -> set[str]:
    if not file.exists():
        return set()
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_every_named_test_exists() -> None:
    """Prevents a guarantee whose test was renamed, or deleted with nobody asking what held it."""
    assert len(NAMED.findall(TEXT)) > 100
    assert missing(TEXT) == []


def test_a_name_that_is_gone_is_noticed() -> None:
    """Negative control, for a file and for a test in it."""
    gone = ["test_gone.py::test_a_name_that_is_gone_is_noticed", "test_guarantees.py::test_gone"]
    assert missing(" ".join(f"`{name}`" for name in gone)) == gone


def test_every_guarantee_has_a_test_and_says_what_its_control_is() -> None:
    """A law without a control has to say so."""
    for guarantee, tests, controls in rows(TEXT):
        assert guarantee.endswith("."), guarantee
        assert NAMED.search(tests), guarantee
        assert NAMED.search(controls) or controls in ("none", "in the test"), guarantee
