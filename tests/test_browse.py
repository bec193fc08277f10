"""What a folder of runs holds, what can be drawn of it, and where settings differ."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests import synthetic
from trinity_lib import browse, record
from trinity_lib.config import BadValue, Missing, Taken


def saved(tree: xr.DataTree, path: Path, made: str = "2026-01-01T00:00:00+00:00") -> Path:
    tree.attrs |= {"name": path.stem, "created_at": made}
    path.parent.mkdir(exist_ok=True)
    tree.to_netcdf(path, engine=record.ENGINE)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    saved(synthetic.run(), root / "old.nc")
    new = synthetic.run(method="none", dead=2)
    new["evaluation"]["tokens"] += 3
    saved(new, root / "new.nc", "2026-02-01T00:00:00")
    saved(synthetic.kernels(), root / "reference" / "kernels.nc")
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "runs")


def test_the_table_has_a_row_a_run_newest_first(folder: Path) -> None:
    found = browse.scan(folder)
    assert found.problems == []
    assert found.table.run.tolist() == ["new", "old", "reference/kernels"]
    assert found.table.holds.tolist() == ["training", "training", "kernels"]
    assert found.table.balancer.tolist() == ["none", "smebu", "-"]
    new = found.table.iloc[0]
    run = browse.load(found.paths["new"])
    evaluation = run["evaluation"].to_dataset().isel(step=-1)
    tokens = evaluation["tokens"]
    assert new["loss, nat"] == pytest.approx(
        float((evaluation["loss"] * tokens).sum() / tokens.sum())
    )
    assert new["late MaxVio"] == pytest.approx(float(run["layers"]["max_vio"][-8:].mean()))
    assert new["dead, %"] == 25
    assert (new.steps, new.seed, new.scale, new.status) == (40, 0, "toy", "complete")
    assert np.isnan(found.table.iloc[2]["loss, nat"])


def test_too_small_an_evaluation_says_nothing_of_death(tmp_path: Path) -> None:
    run = synthetic.run(dead=2)
    run["evaluation"]["count"] = run["evaluation"]["count"] // 10
    saved(run, tmp_path / "few.nc")
    assert browse.scan(tmp_path).table["dead, %"].tolist() == [None]


def test_an_unfinished_run_is_found_and_read_again_once_it_goes_on(tmp_path: Path) -> None:
    attributes = {"name": "half", "seed": 0, "scale": "toy", "config": "{}"}
    writer = record.Writer(tmp_path / "half", attributes, {"layer": [1]})
    assert browse.scan(tmp_path).table.status.tolist() == ["running"]
    train = {name: 1 for name in record.SCHEMA["train"]}
    writer.append("train", 7, train)
    writer.flush()
    row = browse.scan(tmp_path).table.iloc[0]
    assert (row.steps, row.holds) == (7, "training")
    writer.claim._lock.close()  # as a kill does
    assert browse.scan(tmp_path).table.status.tolist() == ["killed"]


def test_a_finished_run_stands_for_its_folder(folder: Path) -> None:
    (folder / "old").mkdir()
    (folder / "old" / "run.json").write_text("{}")
    assert browse.scan(folder).table.run.tolist() == ["new", "old", "reference/kernels"]


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "no config"])
def test_a_damaged_file_is_listed_and_the_others_are_shown(folder: Path, damage: str) -> None:
    bad, good = folder / "bad.nc", (folder / "old.nc").read_bytes()
    if damage == "cut":
        bad.write_bytes(good[: len(good) // 2])
    elif damage == "text":
        bad.write_text("no run")
    elif damage == "foreign":
        xr.Dataset({"x": 1}).to_netcdf(bad, engine=record.ENGINE)
    else:
        run = synthetic.run()
        run.attrs["config"] = "{"
        saved(run, bad)
    found = browse.scan(folder)
    assert len(found.table) == 3
    (problem,) = found.problems
    assert str(bad) in problem and problem.endswith(".") and "\n" not in problem


@pytest.mark.parametrize("content", ["nothing", "no folder", "damage"])
def test_a_folder_without_runs_is_one_sentence(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "runs" if content == "no folder" else tmp_path
    if content == "damage":
        (folder / "bad.nc").write_text("no run")
    with pytest.raises(Missing, match=r"^(There is no folder|.* holds no run).*\.$"):
        browse.scan(folder)


def test_a_run_is_read_once_as_long_as_its_file_stays(folder: Path) -> None:
    path = folder / "old.nc"
    first = browse.load(path)
    assert browse.load(path) is first
    os.utime(path, ns=(1, 1))
    assert browse.load(path) is not first


def test_a_run_that_cannot_be_read_does_not_hide_the_others(folder: Path) -> None:
    paths = browse.scan(folder).paths
    paths["new"].unlink()
    paths["old"].write_text("torn")
    runs, problems = browse.load_all(paths)
    assert list(runs) == ["reference/kernels"]
    assert len(problems) == 2
    with pytest.raises(BadValue, match=r"old\.nc"):
        browse.load(paths["old"])


def test_a_series_is_the_mean_over_the_chosen_layers() -> None:
    run = synthetic.run(dead=2)
    layers = run["layers"].to_dataset()
    found = browse.series(run, "layers/max_vio", [2])
    np.testing.assert_allclose(found, layers["max_vio"].sel(layer=2))
    both = browse.series(run, "layers/max_vio", [1, 2, 99])
    np.testing.assert_allclose(both, layers["max_vio"].mean("layer"))
    assert float(browse.series(run, "routing/dead", [1, 2])[-1]) == 0.25
    assert browse.series(run, browse.LOSS, []).dims == ("step",)


def test_every_measure_is_drawn_or_said_to_be_missing() -> None:
    run = synthetic.run()
    for measure, words in browse.MEASURES.items():
        assert words
        if measure.startswith("probe/"):
            with pytest.raises(Missing, match=r"has no /probe; it holds /train"):
                browse.series(run, measure, [1])
        else:
            found = browse.series(run, measure, [1])
            assert found.dims == ("step",) and found.attrs["units"]


def test_layers_and_steps_of_runs_with_and_without_them() -> None:
    run, kernels = synthetic.run(layers=3), synthetic.kernels()
    assert browse.layers_of(kernels) == []
    assert browse.layers_of(kernels, synthetic.run(layers=1), run) == [1, 2, 3]
    assert browse.steps_of(run) == list(range(1, 41))
    with pytest.raises(Missing, match=r"made-up \(kernels\) has no /routing"):
        browse.steps_of(kernels)


def test_differences_are_the_settings_that_differ_under_dotted_paths() -> None:
    first, second = synthetic.run(), synthetic.run(method="none")
    config = json.loads(second.attrs["config"])
    config |= {"name": "other", "phases": [{"tokens": 5}], "data": {}}
    second.attrs["config"] = json.dumps(config)
    table = browse.differences({"a": first, "b": second}).set_index("setting")
    assert table.to_dict("index") == {
        "balance.method": {"a": "smebu", "b": "none"},
        "data": {"a": "-", "b": "{}"},
        "data.rsdb": {"a": "0", "b": "-"},
        "phases.0.tokens": {"a": "-", "b": "5"},
    }


def test_nothing_to_differ_is_one_sentence() -> None:
    run = synthetic.run()
    with pytest.raises(Missing, match="two runs or more"):
        browse.differences({"a": run})
    with pytest.raises(Missing, match="same settings"):
        browse.differences({"a": run, "b": run})


def test_a_study_is_a_run_without_steps(tmp_path: Path) -> None:
    trials = xr.Dataset({"key": ("trial", ["a", "b"]), "rate": ("trial", [0.1, 0.2])})
    study = xr.DataTree.from_dict({"trials": trials})
    study.attrs = {"status": "complete", "scale": "toy", "config": '{"balance": "smebu"}'}
    saved(study, tmp_path / "study.nc")
    found = browse.scan(tmp_path)
    assert found.table.holds.tolist() == ["study"]
    with pytest.raises(Missing, match=r"study \(study\) has no /routing; it holds /trials\."):
        browse.steps_of(browse.load(found.paths["study"]))


def test_a_run_that_is_written_is_only_looked_at(tmp_path: Path) -> None:
    attributes = {"name": "half", "config": "{}"}
    writer = record.Writer(tmp_path / "half", attributes, {"layer": [1]})
    browse.load(tmp_path / "half")
    with pytest.raises(Taken):
        record.Claim(tmp_path / "half")
    writer.close("failed", "a test")
