"""The launch folder: its scripts parse, run as printed, and refuse in one sentence."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trinity_lib import launch_folder
from trinity_lib.config import BadValue, from_file
from trinity_lib.record import open_run
from trinity_lib.run import RunConfig

SAYS = """
import os, sys
from pathlib import Path

rank = os.environ["RANK"]
words = [rank, os.environ["WORLD_SIZE"], os.environ["OMP_NUM_THREADS"], *sys.argv[1:]]
Path(__file__).with_name(f"rank-{rank}").write_text("\\n".join(words))
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$2" = hostnames ]; then printf 'localhost\\nanother\\n'; else
    printf 'JobId=%s\\n   Command=%s --resume\\n' "$3" "$SUBMITTED"
fi
"""
SRUN = """#!/usr/bin/env bash
echo "$@" >srun.txt
while [[ "$1" == --* ]]; do shift; done
"$@" & "$@" & wait
"""


def written(folder: Path, config: RunConfig, **changes: Any) -> launch_folder.Commands:
    given: dict[str, Any] = {"ranks": 2, "per_node": 8, "name": "a 'run'"} | changes
    return launch_folder.write(folder, config, **given)


def environment(**more: object) -> dict[str, str]:
    left_out = ("OMP_NUM_THREADS", "HEAD", "PORT", "RUN_ID")
    kept = {k: v for k, v in os.environ.items() if k not in left_out}
    return kept | {"PYTHON": sys.executable} | {k: str(v) for k, v in more.items()}


def with_dummy(folder: Path) -> Path:
    """Have the folder start a module that writes down what it was given."""
    script = folder / "torchrun.sh"
    script.write_text(script.read_text().replace("-m trinity_lib.train", "-m says"))
    (folder / "says.py").write_text(SAYS)
    return folder


@pytest.mark.parametrize("per_node", [1, 8])
@pytest.mark.parametrize("missing", [(), ("data", "tokenizer")])
def test_scripts_parse_and_leave_no_word_unfilled(
    tmp_path: Path, tiny: RunConfig, per_node: int, missing: tuple[str, ...]
) -> None:
    folder = tmp_path / "launch"
    written(folder, tiny, per_node=per_node, missing=missing, resume=True)
    names = {"config.json", "torchrun.sh", "slurm.sbatch", "README.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert from_file(RunConfig, folder / "config.json") == replace(tiny, name="a 'run'")
    for name in ("torchrun.sh", "slurm.sbatch"):
        checked = subprocess.run(["bash", "-n", folder / name], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, "")
    for name in names - {"config.json"}:
        text = (folder / name).read_text()
        assert "<" not in text.replace("<<<", ""), name
        assert max(map(len, text.splitlines())) <= 100, name
    assert "--resume" in (folder / "torchrun.sh").read_text().splitlines()[-1]
    assert ("lacks data and tokenizer" in (folder / "README.md").read_text()) == bool(missing)


def test_gpus_are_asked_for_where_the_run_needs_them(tmp_path: Path, tiny: RunConfig) -> None:
    for device, asked in (("cpu", False), ("cuda", True)):
        written(tmp_path / "launch", replace(tiny, device=device), ranks=32)
        text = (tmp_path / "launch" / "slurm.sbatch").read_text()
        assert ("#SBATCH --gpus-per-node=8\n" in text) == asked
        assert "#SBATCH --nodes=4\n" in text and "#SBATCH --job-name=a--run-\n" in text


def test_one_machine_runs_as_printed_wherever_the_folder_lies(
    tmp_path: Path, tiny: RunConfig
) -> None:
    before, folder = tmp_path / "launch", tmp_path / "of another place" / "launch"
    printed = written(before, replace(tiny, threads=3)).torchrun
    folder.parent.mkdir()
    with_dummy(before).rename(folder)
    printed = printed.replace(str(before / "torchrun.sh"), f"'{folder / 'torchrun.sh'}'")
    subprocess.run(
        ["bash", "-c", f"{printed} --runs 'a b'"],
        check=True,
        cwd=tmp_path,
        env=environment(PYTHONPATH=folder),
        capture_output=True,
    )
    given = ["--config", str(folder / "config.json"), "--runs", "a b"]
    for rank in "01":
        assert (folder / f"rank-{rank}").read_text().split("\n") == [rank, "2", "3", *given]


def test_the_real_command_trains(tmp_path: Path, tiny: RunConfig, cache: Path) -> None:
    printed = written(tmp_path / "runs" / "tiny" / "launch", tiny, ranks=1, name="tiny")
    subprocess.run(
        ["bash", "-c", f"{printed.torchrun} --runs runs --cache '{cache}'"],
        check=True,
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
    )
    assert open_run(tmp_path / "runs" / "tiny.nc").attrs["status"] == "complete"


def test_slurm_starts_torchrun_once_a_machine(tmp_path: Path, tiny: RunConfig) -> None:
    """With stand-ins for SLURM's commands: two machines, which are this one twice."""
    folder, spool, bin_ = tmp_path / "the launch", tmp_path / "spool", tmp_path / "bin"
    written(folder, tiny, per_node=1)
    with_dummy(folder)
    for place in (spool, bin_):
        place.mkdir()
    shutil.copy(folder / "slurm.sbatch", spool / "slurm_script")
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_JOB_ID": 17, "SLURM_JOB_NODELIST": "n[1-2]", "PORT": port}
    slurm |= {"SUBMITTED": folder / "slurm.sbatch", "PYTHONPATH": folder}
    subprocess.run(
        ["bash", spool / "slurm_script", "--resume"],
        check=True,
        cwd=tmp_path,
        env=environment(PATH=f"{bin_}:{os.environ['PATH']}", **slurm),
        capture_output=True,
    )
    asked = (tmp_path / "srun.txt").read_text()
    assert asked.startswith("--kill-on-bad-exit=1 --cpu-bind=none bash ")
    given = ["--config", str(folder / "config.json"), "--resume"]
    for rank in "01":
        assert (folder / f"rank-{rank}").read_text().split("\n") == [rank, "2", "1", *given]


def refusal(script: Path, **more: object) -> str:
    env = environment(**more)
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_scripts_refuse_in_one_sentence(tmp_path: Path, tiny: RunConfig) -> None:
    folder = tmp_path / "launch"
    script, slurm = folder / "torchrun.sh", folder / "slurm.sbatch"
    written(folder, tiny, per_node=1)
    assert "HEAD is not set; give it the first machine's name" in refusal(script)
    written(folder, tiny)
    assert "cannot import torch and trinity_lib" in refusal(script, PYTHON="no-such-python")
    script.unlink()
    assert "submit this script from its folder" in refusal(slurm)


def test_what_is_missing_is_refused_until_it_is_there(tmp_path: Path, tiny: RunConfig) -> None:
    folder = tmp_path / "launch"
    script, config = folder / "torchrun.sh", folder / "config.json"
    written(folder, tiny, missing=("data", "tokenizer"))
    assert "config.json has no data, which scale tiny needs" in refusal(script)
    config.write_text(config.read_text().replace('"sources": []', '"sources": [{}]'))
    assert "config.json has no tokenizer, which scale tiny needs" in refusal(script)
    config.write_text(config.read_text().replace('"scale": "tiny"', '"scale": "toy"'))
    assert "cannot import" in refusal(script, PYTHON="no-such-python")


def test_what_cannot_be_written(tmp_path: Path, tiny: RunConfig) -> None:
    with pytest.raises(BadValue, match=r"ranks is 12; it must be a multiple of per_node \(8\)"):
        written(tmp_path / "launch", tiny, ranks=12)
    with pytest.raises(BadValue, match="per_node is 0; it must be at least 1"):
        written(tmp_path / "launch", tiny, per_node=0)
    with pytest.raises(BadValue, match="missing is 'text'; it must be of data, tokenizer"):
        written(tmp_path / "launch", tiny, missing=("text",))
    assert not (tmp_path / "launch").exists()
