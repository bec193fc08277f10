"""The run file: shards, merging, status, locks, many runs as one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trinity_lib import record
from trinity_lib.config import BadValue
from trinity_lib.record import Writer, open_run, open_runs
from trinity_lib.schema import SCHEMA, TABLES

COORDINATES = {
    "layer": [1, 2],
    "expert": np.arange(4),
    "split": ["validation"],
    "domain": ["code", "prose"],
}
SIZES = {"layer": 2, "expert": 4, "split": 1, "domain": 2}
CONFIG = json.dumps({"balance": {"method": "smebu"}, "optim": {"optimizer": "muon"}})


def attributes(name: str) -> dict:
    return {"name": name, "seed": 3, "scale": "tiny", "config": CONFIG, "flag": True}


def values(group: str, step: int) -> dict:
    out = {}
    for name, variable in SCHEMA[group].items():
        shape = [SIZES[d] for d in variable.dims if d != "step"]
        out[name] = np.arange(np.prod(shape), dtype=float).reshape(shape) + 100 * step
    return out


def fill(writer: Writer, steps: range, flush: bool = True) -> None:
    for step in steps:
        writer.append("train", step, values("train", step))
        writer.append("routing", step, values("routing", step))
    if flush:
        writer.flush()


def test_shards_become_one_file_with_every_value(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", attributes("run"), COORDINATES)
    fill(writer, range(1, 4))
    fill(writer, range(4, 6))
    writer.append("evaluation", 5, values("evaluation", 5))
    file = writer.close("complete")
    assert file == tmp_path / "run.nc"
    assert not list((tmp_path / "run" / "log").glob("*.nc"))
    run = open_run(file)
    assert run["train"]["step"].values.tolist() == [1, 2, 3, 4, 5]
    assert run["train"]["loss"].sel(step=4).item() == 400.0
    assert run["routing"]["count"].dtype == np.int64
    expected = values("routing", 2)["count"]
    np.testing.assert_array_equal(run["routing"]["count"].sel(step=2), expected)
    assert run["evaluation"]["count"].dims[-2:] == ("layer", "expert")
    assert run["evaluation"].domain.values.tolist() == ["code", "prose"]
    assert run.attrs["status"] == "complete" and run.attrs["flag"] == 1
    for group, variables in SCHEMA.items():
        if group in run:
            for name, variable in variables.items():
                assert run[group][name].attrs["units"] == variable.units
                assert run[group][name].attrs["long_name"] == variable.long_name


def test_the_root_has_attributes_alone(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", attributes("run"), COORDINATES)
    fill(writer, range(1, 2))
    run = open_run(writer.close("complete"))
    assert not run.dataset.data_vars and not run.dataset.coords


def test_a_killed_run_reads_to_its_last_shard(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_record as t
writer = t.Writer(Path({str(tmp_path)!r}) / "run", t.attributes("run"), t.COORDINATES)
t.fill(writer, range(1, 4))
t.fill(writer, range(4, 6), flush=False)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    run = open_run(tmp_path / "run")
    assert run.attrs["status"] == "running"
    assert run["train"].step.values.tolist() == [1, 2, 3]
    assert open_run(tmp_path / "run.nc").attrs["status"] == "running"


def test_a_failed_run_keeps_its_reason(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", attributes("run"), COORDINATES)
    fill(writer, range(1, 3), flush=False)
    writer.close("failed", "the loss is nan")
    run = open_run(tmp_path / "run")
    assert (run.attrs["status"], run.attrs["reason"]) == ("failed", "the loss is nan")
    assert run["train"].sizes["step"] == 2


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", attributes("run"), COORDINATES)
    with pytest.raises(FileExistsError, match="'run' is being written by a live process"):
        Writer(tmp_path / "run", attributes("run"), COORDINATES)
    fill(writer, range(1, 2))
    writer.close("failed")
    with pytest.raises(FileExistsError, match="was begun before"):
        Writer(tmp_path / "run", attributes("run"), COORDINATES)


def test_a_complete_run_is_never_overwritten(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", attributes("run"), COORDINATES)
    fill(writer, range(1, 2))
    writer.close("complete")
    with pytest.raises(FileExistsError, match="'run' is complete"):
        Writer(tmp_path / "run", attributes("run"), COORDINATES)


def test_values_must_be_the_schemas(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", attributes("run"), COORDINATES)
    with pytest.raises(ValueError, match=r"'train'.*loss"):
        writer.append("train", 1, {"los": 1.0})
    writer.close("failed")


def test_nothing_and_rubbish_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run at"):
        open_run(tmp_path / "absent.nc")
    (tmp_path / "bad.nc").write_bytes(b"not a run file")
    with pytest.raises(ValueError, match="bad.nc is not a run file"):
        open_run(tmp_path / "bad.nc")
    with pytest.raises(FileNotFoundError, match="No run matches"):
        open_runs(str(tmp_path / "*.none"))


def test_a_group_that_no_run_has_is_told_from_those_there_are(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", attributes("run"), COORDINATES)
    fill(writer, range(1, 2))
    writer.close("complete")
    has = ", ".join(sorted(open_run(tmp_path / "run").children))
    sentence = f"with a group 'trian'; those that match have {has}\\.$"
    with pytest.raises(FileNotFoundError, match=sentence):
        open_runs(str(tmp_path / "*.nc"), "trian")


def test_many_runs_are_one_dataset(tmp_path: Path) -> None:
    for name, last in (("a", 3), ("b", 5)):
        writer = Writer(tmp_path / name, attributes(name), COORDINATES)
        fill(writer, range(1, last))
        writer.close("complete")
    rehearsal = Writer(tmp_path / "c", attributes("c"), COORDINATES)
    fill(rehearsal, range(1, 2))
    rehearsal.close("complete")
    run = open_run(tmp_path / "c.nc")
    run.attrs["status"] = "rehearsed"
    run.to_netcdf(tmp_path / "c.nc", engine=record.ENGINE)
    runs = open_runs(str(tmp_path / "*.nc"))
    assert runs.run.values.tolist() == ["a", "b"]
    assert runs.sizes["step"] == 4
    assert np.isnan(runs["loss"].sel(run="a", step=4))
    assert runs["loss"].sel(run="b", step=4) == 400
    assert runs.balance.values.tolist() == ["smebu", "smebu"]
    assert open_runs(str(tmp_path / "*.nc"), rehearsed=True).sizes["run"] == 3


def test_groups_without_a_step_are_whole(tmp_path: Path) -> None:
    """The last table set is the run's, whichever shard it is in, beside groups with steps."""
    labels = {"tokens": [8, 16], "routing": ["even"], "backend": ["a", "b"], "quantity": ["y"]}
    writer = Writer(tmp_path / "run", attributes("run"), COORDINATES | labels)
    for number in range(2):
        error, max_vio = np.full((2, 2, 1, 1), number + 0.5), np.zeros((2, 1))
        writer.table("agreement", {"error": error - 9, "max_vio": max_vio})
        writer.table("agreement", {"error": error, "max_vio": max_vio})
        fill(writer, range(1 + 10 * number, 11 + 10 * number), flush=False)
        writer.flush()
        writer.table("agreement", {"error": error + 0.25, "max_vio": max_vio})
        writer.flush()
        left = open_run(tmp_path / "run")
        assert (left["agreement"]["error"] == number + 0.75).all()
    with pytest.raises(ValueError, match=r"'agreement'.*max_vio"):
        writer.table("agreement", {"error": error})
    run = open_run(writer.close("complete"))
    assert run["train"].sizes["step"] == 20
    table = run["agreement"]
    assert "step" not in table.coords and table["tokens"].values.tolist() == [8, 16]
    assert (table["error"] == 1.75).all()
    for name, variable in TABLES["agreement"].items():
        assert table[name].attrs["units"] == variable.units
        assert table[name].attrs["long_name"] == variable.long_name


def test_provenance_names_code_and_packages() -> None:
    made_by = record.provenance()
    assert made_by["versions"]["xarray"] and made_by["python"].startswith("3.")
    assert len(made_by["git_commit"]) in (40, len("unknown"))


def test_a_run_that_cannot_be_completed_stays_its_writers(tmp_path: Path, monkeypatch) -> None:
    """Until it is closed as failed; a second release takes nothing from the next holder."""
    writer = Writer(tmp_path / "run", attributes("run"), COORDINATES)
    fill(writer, range(1, 3))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(record, "_save", full)
        with pytest.raises(OSError, match="No space left"):
            writer.close("complete")
        assert record.disk.locked(tmp_path / "run" / "lock")
    writer.close("failed", "the disk is full")
    held = record.Claim(tmp_path / "run", resume=True)
    writer.claim.release()
    assert record.disk.locked(tmp_path / "run" / "lock")
    held.release()
    assert open_run(tmp_path / "run").attrs["reason"] == "the disk is full"


def test_a_damaged_shard_is_said(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run", attributes("run"), COORDINATES)
    fill(writer, range(1, 3))
    writer.close("failed", "x")
    (shard,) = (tmp_path / "run" / "log").glob("*.nc")
    shard.write_bytes(shard.read_bytes()[:500])
    with pytest.raises(BadValue, match=f"{shard.name} is damaged: "):
        open_run(tmp_path / "run")
