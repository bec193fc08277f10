"""The processes of one run: started by torchrun, watched, and ended together.

    caller -> python -m trinity_lib.ranks launch (torchrun) -> python -m MODULE, once a rank

On Linux each of the three ends with the one above it, however that one ended, so that a
killed notebook leaves nothing behind. What rank R says is in LOG_FOLDER/rank-R.log (its
warnings and tracebacks too, restarts one after another), what torchrun says in
LOG_FOLDER/torchrun.log; both are of the last start. Imports no torch before it has to.
"""

import contextlib
import ctypes
import faulthandler
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar

from trinity_lib import disk
from trinity_lib.config import Refusal, one_sentence, require
from trinity_lib.failure import (
    STUBBORN_SECONDS,
    Failure,
    RanksFailed,
    root_cause,
    sentence,
    unsaid,
)

POLL_SECONDS = 0.1
"""Between two looks at rank 0's log."""
HOLD_SECONDS = 3.0
"""What rank 0 says from a traceback on is kept back so long: it may be another's victim."""
GRACE_SECONDS = 1.0
"""For torchrun to end its ranks before it is killed, and they with it."""
LINGER_SECONDS = 10
"""For a rank that has failed to leave; a process group can hold it for ever."""
TRACEBACK = "Traceback (most recent call last)"
ERROR_FILE, RESTARTS = "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RESTART_COUNT"
FAILURES, REFUSED, ERRORS = "failures.json", "refused.json", "errors"
Given = ParamSpec("Given")
Result = TypeVar("Result")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def run(
    command: Sequence[str],
    *,
    processes: int,
    log_folder: Path,
    restarts: int = 0,
    threads: int = 1,
    environment: Mapping[str, str] | None = None,
    stream: Callable[[str], object] = say,
) -> None:
    """`python -m COMMAND...` on every rank of this machine, until all have ended.

    `stream` is given rank 0's lines as they come. After a failure torchrun begins all ranks
    again, `restarts` times at most, but not after a Refusal. `threads` is each rank's
    OMP_NUM_THREADS; `environment` comes on top of this process's. However this call is left,
    no rank is. Raises RanksFailed with the root cause, in one sentence.
    """
    require(processes >= 1, "processes", processes, "at least 1")
    require(restarts >= 0, "restarts", restarts, "zero or more")
    log_folder = log_folder.absolute()
    log_folder.mkdir(parents=True, exist_ok=True)
    for old in (*log_folder.glob("rank-*.log"), log_folder / FAILURES):
        old.unlink(missing_ok=True)
    ours = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    ours |= {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads), **(environment or {})}
    about = [str(os.getpid()), str(log_folder), str(processes), str(restarts)]
    launcher = [sys.executable, "-m", "trinity_lib.ranks", "launch", *about, *command]
    with (log_folder / "torchrun.log").open("wb") as log:  # no pipe: nobody need read it
        process = subprocess.Popen(
            launcher, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=ours
        )
    try:
        _follow(process, log_folder / "rank-0.log", stream)
    finally:
        _end(process)
        shutil.rmtree(log_folder / ERRORS, ignore_errors=True)
    if process.returncode != 0:
        raise RanksFailed(_sentence(log_folder, process.returncode))


def recorded(main: Callable[Given, Result]) -> Callable[Given, Result | None]:
    """A command's `main`, which may raise: a Refusal is printed as its sentence, exit code 1.

    Under torchrun what it raises is also written where torchrun looks for it, and the process
    is tethered. Anything but a Refusal keeps its traceback.
    """

    @functools.wraps(main)
    def wrapper(*args: Given.args, **kwargs: Given.kwargs) -> Result | None:
        with one_sentence():
            if not os.environ.get(ERROR_FILE):
                return main(*args, **kwargs)
            tether()
            _refuse_again()
            from torch.distributed.elastic.multiprocessing.errors import record

            return record(main, _handler())(*args, **kwargs)

    return wrapper


def tether() -> None:
    """A rank ends with its torchrun, however that ends. Nothing elsewhere, or off Linux."""
    if inside() == "torchrun":
        _end_with(os.getppid())


def restarted() -> bool:
    """Whether torchrun, or SLURM, has begun this run's processes again after a failure."""
    return any(int(os.environ.get(n) or 0) > 0 for n in (RESTARTS, "SLURM_RESTART_COUNT"))


def inside() -> Literal["torchrun", "SLURM"] | None:
    """What this process was started by, where that has placed it on a machine already."""
    there = os.environ.keys()
    if "TORCHELASTIC_RUN_ID" in there or {"RANK", "WORLD_SIZE"} <= there:
        return "torchrun"
    return "SLURM" if {"SLURM_JOB_ID", "SLURM_PROCID"} <= there else None


def _sentence(log_folder: Path, exitcode: int) -> str:
    try:
        found = json.loads((log_folder / FAILURES).read_text())
    except FileNotFoundError:
        return unsaid("torchrun", exitcode, log_folder / "torchrun.log")
    cause = root_cause([Failure(**each) for each in found])
    return sentence(cause, log_folder / f"rank-{cause.rank}.log")


def _follow(process: subprocess.Popen, log: Path, stream: Callable[[str], object]) -> None:
    """Stream a growing log until the process ends, but not the traceback it ends in."""
    at, held, since, over = 0, list[str](), 0.0, False
    while not over:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)
        over = process.returncode is not None
        lines, at = _new_lines(log, at, over)
        for line in lines:
            if held or line.removeprefix("[rank0]: ").startswith(TRACEBACK):
                since = since if held else time.monotonic()
                held.append(line)
            else:
                stream(line)
        if process.returncode == 0 or time.monotonic() - since > HOLD_SECONDS:
            for line in held:
                stream(line)
            held.clear()


def _new_lines(log: Path, at: int, over: bool) -> tuple[list[str], int]:
    """Whole lines of a file from a byte on, and where they end; the last may be torn."""
    try:
        with log.open("rb") as file:
            file.seek(at)
            found = file.read()
    except FileNotFoundError:
        return [], at
    whole = found if over else found[: found.rfind(b"\n") + 1]
    text = whole.decode(errors="replace").removesuffix("\n")
    return text.split("\n") if whole else [], at + len(whole)


def _end(process: subprocess.Popen) -> None:
    """End torchrun, which ends its ranks; where it does not, they are tethered to it."""
    try:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
    finally:
        process.kill()
        process.wait()


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`'s thread that began it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it was quicker
        os._exit(1)


def _handler() -> Any:
    """Writes what a rank raised for torchrun, with the time to more than a second."""
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

    class Handler(ErrorHandler):
        def record_exception(self, e: BaseException) -> None:
            file, now = Path(os.environ[ERROR_FILE]), time.time()
            refusal = str(e) if isinstance(e, Refusal) else ""
            extra = {"py_callstack": traceback.format_exc(), "timestamp": str(int(now))}
            said = f"{type(e).__name__}: {e}"
            message = {"message": said, "extraInfo": extra, "refusal": refusal, "at": now}
            for path in (file, _refused(file)) if refusal else (file,):
                disk.replace(path, lambda p: p.write_text(json.dumps({"message": message})))
            faulthandler.dump_traceback_later(LINGER_SECONDS, exit=True)

    return Handler()


def _refused(error_file: Path) -> Path:
    """Where a refusal is kept for later attempts; a rank has RUN/attempt_N/R/error.json."""
    return error_file.parents[2] / REFUSED


def _refuse_again() -> None:
    """End with the refusal of an attempt before this one: it would only come again."""
    error_file = Path(os.environ[ERROR_FILE])
    if int(os.environ.get(RESTARTS, 0)) > 0 and _refused(error_file).is_file():
        shutil.copyfile(_refused(error_file), error_file)
        raise SystemExit(1)


def _launch(parent: str, log_folder: str, processes: str, restarts: str, *command: str) -> None:
    """Be torchrun, and write down how its ranks failed."""
    _end_with(int(parent))
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", processes]
    options += ["--max-restarts", restarts, "--log-dir", f"{log_folder}/{ERRORS}"]
    options += ["--shutdown-timeout", str(STUBBORN_SECONDS), "-m", "trinity_lib.ranks"]
    try:
        torchrun.main([*options, "rank", str(os.getpid()), log_folder, *command])
    except ChildFailedError as error:
        failures = [_failure(rank, each)._asdict() for rank, each in error.failures.items()]
        text = json.dumps(failures, indent=1)
        disk.replace(Path(log_folder) / FAILURES, lambda path: path.write_text(text))
        raise SystemExit(1) from None


def _failure(rank: int, found: Any) -> Failure:
    """torchrun's ProcessFailure with what `_handler` wrote into its file."""
    wrote = found.error_file_data.get("message")
    wrote = wrote if isinstance(wrote, dict) else {}
    said, refusal = wrote.get("message", ""), wrote.get("refusal", "")
    at = wrote.get("at", found.timestamp + 1.0)  # torchrun's own is cut to whole seconds
    return Failure(rank, found.exitcode, said, refusal, at)


def _rank(launcher: str, log_folder: str, *command: str) -> NoReturn:
    """Become a rank: tethered, its output in its log, before anything else is imported."""
    _end_with(int(launcher))
    path = f"{log_folder}/rank-{os.environ['RANK']}.log"
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _refuse_again()
    if (count := int(os.environ[RESTARTS])) > 0:
        most = os.environ["TORCHELASTIC_MAX_RESTARTS"]
        print(f"all ranks begin again after a failure (restart {count} of {most})", flush=True)
    os.execv(sys.executable, [sys.executable, "-u", "-m", *command])


if __name__ == "__main__":
    stages: dict[str, Callable[..., None]] = {"launch": _launch, "rank": _rank}
    stages[sys.argv[1]](*sys.argv[2:])
