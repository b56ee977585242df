"""Ending what was launched, the processes that it launched included."""

import signal
import subprocess

import psutil


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and all its workers, which are in sessions of their own."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        if member.is_running():
            member.send_signal(signal.SIGKILL)
    process.wait()
