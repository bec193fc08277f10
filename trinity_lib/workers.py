"""Processes that a run starts: they end with it, and what they say goes to files."""

import ctypes
import os
import signal
import sys
from pathlib import Path

from trinity_lib.config import Refusal


class WorkerDied(Refusal, RuntimeError):
    """A worker process was killed; what is finished stays, and running again goes on."""


def begin(folder: str, parent: int) -> None:
    """A worker's first act: to end with its parent, and write its progress to a file."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was quicker
            raise SystemExit(1)
    log = os.open(
        f"{folder}/worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644
    )
    os.dup2(log, 1)
    os.dup2(log, 2)


def latest(folder: Path) -> list[str]:
    """The last line that each worker of a run has said, in the order of their files."""
    found = []
    for log in sorted(folder.glob("worker-*.log")):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        found += lines[-1:]
    return found
