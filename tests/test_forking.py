"""The helper that runs many programs after one import: what they print, that they fail, and that they are apart."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from forking import Forks, forks


pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(scope="module")
def forked() -> Iterator[Forks]:
    with forks(SAID="hello") as forked:
        yield forked


def test_a_program_is_run_in_a_process_of_its_own(forked: Forks, tmp_path: Path) -> None:
    """Prevents a program that changes modules for the next one, as negative controls do."""
    file = tmp_path / "program.py"
    file.write_text("import os, sys, json\nprint(os.environ['SAID'], sys.argv[1], json.dumps)\njson.dumps = None\n")
    outputs = [forked.run(file, number) for number in (1, 2)]
    assert [output.split()[:2] for output in outputs] == [["hello", "1"], ["hello", "2"]]
    assert "None" not in outputs[1]


@pytest.mark.parametrize("program", ["raise ValueError('went wrong')", "import sys; sys.exit('went wrong')"])
def test_a_failure_is_told_and_the_next_program_runs(forked: Forks, tmp_path: Path, program: str) -> None:
    """Negative control: a kernel that does not compile must not pass as one that printed nothing."""
    file = tmp_path / "program.py"
    file.write_text(program)
    with pytest.raises(AssertionError, match="went wrong"):
        forked.run(file)
    file.write_text("print('fine')")
    assert forked.run(file) == "fine\n"


def test_the_process_ends_with_its_context() -> None:
    """Prevents a process that outlives the tests and holds their output open."""
    with forks() as forked:
        pid = forked._process.pid
    assert not os.path.exists(f"/proc/{pid}")
