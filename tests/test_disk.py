"""Writing that a crash cannot tear, locks, and full disks."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trinity_lib import disk


def fail(path: Path) -> None:
    path.write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    disk.replace(file, lambda path: path.write_text("old"))
    with pytest.raises(OSError, match="No space left"):
        disk.replace(file, fail)
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    disk.replace_folder(folder, lambda path: (path / "x").write_text("old"))
    with pytest.raises(OSError, match="No space left"):
        disk.replace_folder(folder, lambda path: fail(path / "x"))
    assert (folder / "x").read_text() == "old"
    disk.replace_folder(folder, lambda path: (path / "y").write_text("new"))
    assert [p.name for p in folder.iterdir()] == ["y"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("writes", ["one file", "a folder"])
def test_a_writer_that_is_killed_leaves_the_old_content(tmp_path: Path, writes: str) -> None:
    code = f"""
import os, signal
from pathlib import Path
from trinity_lib import disk
top = Path({str(tmp_path)!r})
def die(path):
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
disk.replace(top / "file", lambda p: p.write_text("old"))
disk.replace_folder(top / "folder", lambda p: (p / "x").write_text("old"))
if {writes == "one file"}:
    disk.replace(top / "file", die)
else:
    disk.replace_folder(top / "folder", lambda p: die(p / "x"))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 3
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "x").read_text() == "old"
    disk.tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / ".truebase.old").mkdir()
    (tmp_path / ".truebase.77").mkdir()
    (tmp_path / ".keep").touch()
    disk.tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".keep", "truebase"]


def test_what_dead_processes_left_of_a_cache_goes(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True).stdout.strip()  # fmt: skip
    live = disk.of_this_process(tmp_path / "tokens")
    gone = tmp_path / live.name.replace(f".{os.getpid()}.", f".{dead}.")
    elsewhere = tmp_path / f"tokens.another-machine.{dead}.123"
    for folder in (live, gone, elsewhere):
        folder.mkdir()
        (folder / "half").touch()
    disk.remove_dead(tmp_path / "tokens")
    assert {path.name for path in tmp_path.iterdir()} == {live.name, elsewhere.name}


def test_a_lock_is_one_processs_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not disk.locked(path)
    held = disk.lock(path)
    assert held is not None and disk.locked(path)
    code = f"from pathlib import Path; from trinity_lib import disk; \
print(disk.lock(Path({str(path)!r})))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "None"
    held.close()
    assert not disk.locked(path)
    dead = f"import os; from pathlib import Path; from trinity_lib import disk; \
kept = disk.lock(Path({str(path)!r})); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", dead]).returncode == -9
    again = disk.lock(path)
    assert again is not None
    again.close()


def test_a_lock_on_a_removed_file_is_no_lock(tmp_path: Path, monkeypatch) -> None:
    """Its last holder removes the file between our opening and our locking it."""
    path = tmp_path / "lock"
    flock, removed = disk.fcntl.flock, []

    def remove_first(file, how):
        if not removed:
            removed.append(path.unlink())
        return flock(file, how)

    monkeypatch.setattr(disk.fcntl, "flock", remove_first)
    held = disk.lock(path)
    assert held is not None and path.stat().st_ino == os.fstat(held.fileno()).st_ino
    held.close()


def test_too_little_space_is_said_with_both_figures(tmp_path: Path) -> None:
    disk.require_space(tmp_path / "deep" / "not there yet", 1000, "checkpoints")
    with pytest.raises(disk.NoSpace, match=r"has .* MB free; checkpoints need 1,000,000,0"):
        disk.require_space(tmp_path, 10**18, "checkpoints")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EFBIG, "x"), True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.ENOENT, "x"), False),
        (ValueError("x"), False),
    ],
)
def test_a_full_disk_is_known_by_any_package_s_error(error: Exception, full: bool) -> None:
    assert disk.is_full(error) is full
