"""Runs programs in forks of one process that has imported torch and triton, which takes seconds each time.

python forking.py: a line of JSON on stdin, [file, arguments ...], for a line on stdout, [exit status, stdout, stderr].
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Forks:
    """The process that forks, seen from a test."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process = process

    def run(self, file: Path, *arguments: object) -> str:
        """What the program in `file` printed. Its failure fails the test with what it said on stderr."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(file), *map(str, arguments)]) + "\n")
        self._process.stdin.flush()
        status, output, errors = json.loads(self._process.stdout.readline())
        assert status == 0, errors
        return output


@contextmanager
def forks(**environment: str) -> Iterator[Forks]:
    """A process that forks; it ends with the context."""
    command, env = [sys.executable, __file__], os.environ | environment
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield Forks(process)
        finally:
            process.kill()


def _run(file: str, *arguments: str) -> None:
    """Runs the program and ends the process, a fork, before it comes to anything of its parent's."""
    sys.argv, status = [file, *arguments], 1
    try:
        runpy.run_path(file, run_name="__main__")
        status = 0
    finally:
        if status:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import torch  # noqa: F401
    import triton  # noqa: F401

    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            if (child := os.fork()) == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                _run(*json.loads(line))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            errors.seek(0)
            print(json.dumps([status, output.read(), errors.read()]), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
