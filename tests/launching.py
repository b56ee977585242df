"""Commands that tests run as a user would, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench.processes import kill_tree


TESTS = Path(__file__).parent
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TIMEOUT_S = 240


def run_to_end(*command: object, timeout_s: float = TIMEOUT_S, **environment: str) -> str:
    """What `command` printed. Its failure fails the test; so does a hang, once it and all its children are killed."""
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"} | environment
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # Launchers give workers sessions of their own: one that lives on would hold the pipe open for good.
        kill_tree(process)
        pytest.fail(f"no end within {timeout_s} s: {' '.join(words)}\n{process.communicate()[0][-4000:]}")
    except BaseException:  # Ctrl+C, or the limit that pytest sets
        kill_tree(process)
        raise
    assert process.returncode == 0, output[-4000:]
    return output
