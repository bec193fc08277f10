"""Ranks started, watched and ended: with real processes, of a module that trains nothing."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from trinity_lib import ranks
from trinity_lib.config import BadValue
from trinity_lib.failure import Failure, RanksFailed, root_cause, sentence

WORKER = """
import os
import signal
import sys
import time
from pathlib import Path

from trinity_lib import ranks
from trinity_lib.config import BadValue

RANK, FOLDER = int(os.environ.get("RANK", 0)), Path(__file__).parent


def streams():
    print(f"first of {RANK}")
    while not (FOLDER / "seen").exists():
        time.sleep(0.01)
    print("warned", file=sys.stderr)
    print(f"{os.environ['WORLD_SIZE']} ranks, {os.environ['OMP_NUM_THREADS']} threads")


def raises():
    import torch.distributed as dist
    from torch import ones

    dist.init_process_group("gloo")
    if RANK == 1:
        raise ValueError("what rank 1 has to say\\nin two lines")
    dist.all_reduce(ones(1))


def refuses():
    with (FOLDER / f"attempts-{RANK}").open("a") as file:
        file.write("one\\n")
    if RANK == 1:
        raise BadValue("steps is 0; it must be at least 1.")
    time.sleep(60)


def dies():
    (FOLDER / f"pid-{RANK}").touch()
    while RANK == 1 and not (FOLDER / "pid-0").exists():
        time.sleep(0.01)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def resumes():
    if ranks.restarted():
        print("from", (FOLDER / "checkpoint").read_text())
    elif RANK == 1:
        (FOLDER / "checkpoint").write_text("step 7")
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        time.sleep(60)


def waits():
    print("waiting", flush=True)
    time.sleep(60)


@ranks.recorded
def recorded():
    globals()[sys.argv[2]]()


globals()[sys.argv[1]]()  # an import of torch faster where it is not `recorded`
"""

CALLER = """
import signal
import sys
from pathlib import Path
from trinity_lib import ranks

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
ranks.run(["worker", "waits", sys.argv[1]], processes=2, log_folder=Path("log"))
"""

Start = Callable[..., list[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "with a space"
    place.mkdir()
    (place / "worker.py").write_text(WORKER)
    return place


@pytest.fixture
def start(folder: Path) -> Start:
    """Run the worker on two ranks; what was streamed."""

    def begin(mode: str, lines: list[str], restarts: int = 0, module: str = "worker") -> None:
        ranks.run(
            [module, *mode.split()],
            processes=2,
            log_folder=folder / "log",
            restarts=restarts,
            environment={"PYTHONPATH": str(folder)},
            stream=lines.append,
        )

    return begin


def living(marker: str) -> list[str]:
    """Command lines of the processes that have `marker` in theirs; a zombie has none."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found += [command] if marker in command else []
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until the condition held; fails after `seconds`."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.01)
    return time.monotonic() - begun


def text_of(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_rank_0_is_streamed_as_it_speaks_and_every_rank_is_logged(folder: Path) -> None:
    lines = []

    def stream(line: str) -> None:
        lines.append(line)
        (folder / "seen").touch()  # the ranks wait for it

    place = {"PYTHONPATH": str(folder)}
    log = folder / "log"
    (log / "rank-7.log").parent.mkdir()
    (log / "rank-7.log").touch()  # of an earlier start
    ranks.run(
        ["worker", "streams"],
        processes=2,
        log_folder=log,
        threads=3,
        environment=place,
        stream=stream,
    )
    assert lines == ["first of 0", "warned", "2 ranks, 3 threads"]
    assert text_of(log / "rank-1.log") == "first of 1\nwarned\n2 ranks, 3 threads\n"
    assert {p.name for p in log.iterdir()} == {"rank-0.log", "rank-1.log", "torchrun.log"}
    assert "OMP_NUM_THREADS" not in text_of(log / "torchrun.log")


def test_the_rank_that_raised_is_named_not_its_victim(folder: Path, start: Start) -> None:
    lines: list[str] = []
    with pytest.raises(RanksFailed) as raised:
        start("recorded raises", lines)
    log = folder / "log" / "rank-1.log"
    said = f"rank 1 failed: ValueError: what rank 1 has to say; its log is {log}."
    assert str(raised.value) == said
    assert "in two lines" in text_of(log)
    assert text_of(log).count("Traceback (most recent call last)") == 1
    assert lines == []  # nor rank 0's traceback, which is in its log


def test_a_refusal_is_its_sentence_alone_and_is_not_tried_again(
    folder: Path, start: Start
) -> None:
    with pytest.raises(RanksFailed, match=r"^steps is 0; it must be at least 1\.$"):
        start("recorded refuses", [], restarts=2)
    assert text_of(folder / "attempts-1") == "one\n"
    assert "Traceback" not in text_of(folder / "log" / "rank-1.log")
    assert "it must be at least 1" in text_of(folder / "log" / "rank-1.log")


def test_a_killed_rank_was_probably_out_of_memory(folder: Path, start: Start) -> None:
    with pytest.raises(RanksFailed) as raised:
        start("dies", [])
    log = folder / "log" / "rank-1.log"
    said = f"rank 1 was killed (SIGKILL), probably out of memory; its log is {log}."
    assert str(raised.value) == said


def test_ranks_begin_again_and_know_it(start: Start) -> None:
    lines: list[str] = []
    start("resumes", lines, restarts=1)
    again = "all ranks begin again after a failure (restart 1 of 1)"
    assert lines == [again, "from step 7"]


def test_a_module_that_cannot_be_imported(folder: Path, start: Start) -> None:
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(RanksFailed, match="No module named 'nothing_of_that_name'") as raised:
        start("", [], module="broken")
    assert "ended with exit code 1; its log is " in str(raised.value)


def test_whatever_ends_the_call_ends_the_ranks(folder: Path) -> None:
    marker = str(uuid.uuid4())

    def interrupted(line: str) -> None:
        assert len(living(marker)) == 3
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ranks.run(
            ["worker", "waits", marker],
            processes=2,
            log_folder=folder / "log",
            environment={"PYTHONPATH": str(folder)},
            stream=interrupted,
        )
    wait_for(lambda: not living(marker), 2)


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
@pytest.mark.parametrize("killed_by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["running", "starting"])
def test_a_killed_caller_leaves_no_process(
    folder: Path, killed_by: signal.Signals, when: str
) -> None:
    marker = str(uuid.uuid4())
    with subprocess.Popen(
        [sys.executable, "-c", CALLER, marker],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
    ) as caller:
        try:
            if when == "running":
                assert caller.stdout is not None
                assert caller.stdout.readline() == b"waiting\n"
                assert len(living(marker)) == 4
            else:
                wait_for(lambda: len(living(marker)) >= 2, 20)
            caller.send_signal(killed_by)
            wait_for(lambda: not living(marker), 2)
        finally:
            caller.kill()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--local-addr", "localhost"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_ranks_of_a_plain_torchrun_are_tethered_too(folder: Path) -> None:
    marker = str(uuid.uuid4())
    command = [*TORCHRUN, "-m", "worker", "recorded", "waits", marker]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=folder) as torchrun:
        try:
            assert torchrun.stdout is not None
            assert torchrun.stdout.readline() == b"waiting\n"
            torchrun.kill()
            wait_for(lambda: not living(marker), 2)
        finally:
            torchrun.kill()


def test_a_plain_torchrun_does_not_try_a_refusal_again(folder: Path) -> None:
    options = ["--nproc-per-node", "2", "--max-restarts", "2", "-m", "worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*TORCHRUN, *options, "recorded", "refuses"],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 1
    assert "BadValue: steps is 0; it must be at least 1." in done.stderr
    assert text_of(folder / "attempts-1") == "one\n"


def test_a_refusal_elsewhere_is_one_sentence_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)

    @ranks.recorded
    def main() -> None:
        raise BadValue("steps is 0.")

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "steps is 0.\n"
    with pytest.raises(ZeroDivisionError):
        ranks.recorded(lambda: 1 // 0)()
    assert ranks.recorded(lambda: 7)() == 7


def test_what_this_process_was_started_by(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    assert ranks.inside() is None and not ranks.restarted()
    ranks.tether()
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert ranks.inside() is None  # an allocation alone starts nothing
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert ranks.inside() == "SLURM"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert ranks.restarted()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.inside() == "torchrun"


def test_processes_and_restarts_are_checked(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="processes is 0; it must be at least 1"):
        ranks.run(["worker"], processes=0, log_folder=tmp_path)
    with pytest.raises(BadValue, match="restarts is -1; it must be zero or more"):
        ranks.run(["worker"], processes=1, log_folder=tmp_path, restarts=-1)


def failure(rank: int, exitcode: int = 1, said: str = "", at: float = 0.0) -> Failure:
    refusal = said if said.endswith(".") else ""
    return Failure(rank, exitcode, said, refusal, at)


LOST = "RuntimeError: [gloo/transport/tcp/pair.cc:534] Connection closed by peer"


@pytest.mark.parametrize(
    ("cause", "others"),
    [
        (failure(1, said="ValueError: x", at=2), [failure(0, said=LOST, at=1)]),
        (failure(1, said="ValueError: x", at=1), [failure(0, said="ValueError: x", at=2)]),
        (failure(1, -9, at=3), [failure(0, said="KeyError: x", at=2), failure(2, -15)]),
        (failure(1, said="steps is 0.", at=3), [failure(0, said="KeyError: x", at=2)]),
        (failure(1, -11, at=3), [failure(0, said="steps is 0.", at=2)]),
        (failure(1, said="KeyError: x", at=2), [failure(0, -6, at=3)]),
        (failure(1, -6, at=3), [failure(0, said=LOST, at=2)]),
        (failure(1, said="KeyError: x", at=2), [failure(0, -9, at=13)]),
        (failure(1, -15, said="KeyError: x", at=2), [failure(0, said=LOST, at=3)]),
        (failure(1, 2, at=2), [failure(0, -15, at=1)]),
        (failure(1, said=LOST, at=2), [failure(0, -15, at=1), failure(2, said=LOST, at=3)]),
    ],
)
def test_the_root_cause(cause: Failure, others: list[Failure]) -> None:
    assert root_cause([*others, cause]) == root_cause([cause, *others]) == cause


def test_sentences(tmp_path: Path) -> None:
    log = tmp_path / "rank-1.log"
    assert sentence(failure(1, said="steps is 0."), log) == "steps is 0."
    assert sentence(failure(1, -11), log) == f"rank 1 was ended by SIGSEGV; its log is {log}."
    assert "ended by signal 63;" in sentence(failure(1, -63), log)
    assert "its log is" in sentence(failure(1, 2), log) and "ends: without a word." in sentence(
        failure(1, 2), log
    )
    log.write_text("one\n\ntwo\n  three\nfour.\n")
    assert sentence(failure(1, 2), log).endswith("which ends: two / three / four.")
