"""Workers end with who started them, and what they say is kept in files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trinity_lib import workers

BEGIN = "from trinity_lib import workers; workers.begin({folder!r}, {parent})"
STARTER = """
import subprocess, sys, time
code = {code!r}
child = subprocess.Popen([sys.executable, "-c", code])
print(child.pid, flush=True)
time.sleep(60)
"""
SAY = """
import os, sys, time
from trinity_lib import workers
workers.begin({folder!r}, os.getppid())
print("step 1 of 2", flush=True)
print("a warning", file=sys.stderr, flush=True)
time.sleep(60)
"""


def until(true, seconds: float = 30.0) -> bool:  # type: ignore[no-untyped-def]
    """Whether it becomes true in time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_worker_writes_to_its_file_and_ends_with_its_parent(tmp_path: Path) -> None:
    code = STARTER.format(code=SAY.format(folder=str(tmp_path)))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        worker = int(starter.stdout.readline())
        log = tmp_path / f"worker-{worker}.log"
        assert until(lambda: log.is_file() and "a warning" in log.read_text())
        assert log.read_text().splitlines() == ["step 1 of 2", "a warning"]
        assert alive(worker)
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    assert until(lambda: not alive(worker))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_worker_whose_parent_is_gone_already_ends(tmp_path: Path) -> None:
    code = BEGIN.format(folder=str(tmp_path), parent=os.getpid() + 1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 1 and list(tmp_path.iterdir()) == []


def test_the_latest_of_every_worker_is_its_last_line(tmp_path: Path) -> None:
    assert workers.latest(tmp_path) == []
    (tmp_path / "worker-2.log").write_bytes(b"begun\nstep 3\n\n  \n")
    (tmp_path / "worker-1.log").write_bytes(b"step 1\nbroken \xff")
    (tmp_path / "worker-3.log").write_bytes(b"")
    (tmp_path / "other.log").write_text("not one\n")
    assert workers.latest(tmp_path) == ["broken \N{REPLACEMENT CHARACTER}", "step 3"]
