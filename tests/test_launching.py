"""The helper that tests launch commands with: what a command prints, its failure, its hanging."""

import subprocess
import sys
import time

import psutil
import pytest
from bench.processes import kill_tree
from launching import run_to_end


def test_output_and_failure() -> None:
    assert run_to_end(sys.executable, "-c", "print('hello')") == "hello\n"
    with pytest.raises(AssertionError, match="went wrong"):
        run_to_end(sys.executable, "-c", "raise SystemExit('went wrong')")


def test_a_hanging_worker_in_a_session_of_its_own_ends_with_the_test() -> None:
    """Prevents what kept a whole run: the worker outlives its launcher's process group and holds the pipe open."""
    worker = f"subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(120)'], start_new_session=True)"
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"no end within 2 s: .*\nstarted"):
        run_to_end(
            sys.executable,
            "-c",
            f"import subprocess; w = {worker}; print('started', flush=True); w.wait()",
            timeout_s=2,
        )
    assert time.monotonic() - start < 60


def test_workers_in_sessions_of_their_own_are_killed() -> None:
    """torchrun starts workers that its own process group does not hold: killed alone, they would train on."""
    child = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', 'input()'], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (workers := psutil.Process(process.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        kill_tree(process)
        _, alive = psutil.wait_procs(workers, timeout=60)
    assert process.returncode == -9
    assert not alive
