"""A real study, small: two waves in two processes, killed and gone on with, drawn."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from trinity_lib import findings, grid, outcome, plots_study, report, statements, study, trial
from trinity_lib.config import BadValue, override, to_json
from trinity_lib.record import open_run
from trinity_lib.run import RunConfig
from trinity_lib.schema import TABLES
from trinity_lib.study_config import StudyConfig

SMALL = {
    "scale": "toy",
    "methods": ("none", "smebu", "expert_choice"),
    "rates": (1e-2, 1e-1),
    "seeds": 2,
    "curve_seeds": 1,
    "axis_seeds": 1,
    "parts": ("balancers", "rescue"),
    "steps": 10,
    "workers": 2,
    "name": "small",
}


@pytest.fixture(scope="module")
def config() -> StudyConfig:
    return StudyConfig(**SMALL)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def done(config: StudyConfig, runs: Path, cache: Path) -> xr.DataTree:
    """Begun by a process that is killed when two trials are done, then gone on with."""
    file = runs / "config.json"
    file.write_text(to_json(config))
    code = (
        "import sys; from pathlib import Path; from trinity_lib import study; "
        "from trinity_lib.config import from_file; "
        "from trinity_lib.study_config import StudyConfig\n"
        "if __name__ == '__main__': study.study(from_file(StudyConfig, Path(sys.argv[1])), "
        "runs=Path(sys.argv[2]), cache=Path(sys.argv[3]))"
    )
    script = runs / "begin.py"
    script.write_text(code)
    begun = subprocess.Popen([sys.executable, script, file, runs, cache])
    trials = runs / "small" / "trials"
    deadline = time.monotonic() + 120
    while len(list(trials.glob("*.nc"))) < 2:
        assert begun.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = _children(begun.pid)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    deadline = time.monotonic() + 10
    while any(map(_alive, workers)):
        assert time.monotonic() < deadline, "workers outlived the study"
        time.sleep(0.05)
    (trials / "work" / f".half-removed.{begun.pid}").mkdir()
    (trials / "work" / "reduced-already.nc").touch()
    kept = {path: path.stat().st_mtime_ns for path in trials.glob("*.nc")}
    run = study.study(config, runs=runs, cache=cache)
    for path, written in kept.items():
        assert path.stat().st_mtime_ns == written, "a finished trial was run again"
    return run


def _children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # gone meanwhile
            if int(fields[1]) == parent:
                found.append(int(folder.name))
    return found


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_it_is_complete(done: xr.DataTree, config: StudyConfig) -> None:
    assert done.attrs["status"] == "complete"
    assert len(json.loads(done.attrs["resumed"])) == 1
    trials = done["trials"].to_dataset()
    assert set(trials["status"].values) == {"complete"}
    parts, counts = np.unique(trials["part"].values, return_counts=True)
    assert dict(zip(parts, counts, strict=True)) == {"grid": 4, "finals": 6, "rescue": 6}
    best = json.loads(done.attrs["best_rates"])
    assert best["smebu"] in config.rates and best["none"] == 0


def test_every_group_is_the_schemas(done: xr.DataTree) -> None:
    for name in ("trials", "results", "claims"):
        assert set(done[name].data_vars) == set(TABLES[name])
        for key, variable in TABLES[name].items():
            assert done[name][key].dims == variable.dims
            assert done[name][key].attrs["long_name"]
    results = done["results"].to_dataset()
    for name in TABLES["results"]:
        assert name == "rescue_time" or np.isfinite(results[name].values).any(), name


def test_measures_make_sense(done: xr.DataTree) -> None:
    rows = findings.of(done)
    ours = rows[rows["part"] == "finals"].groupby("method").mean(numeric_only=True)
    assert ours["leak"]["smebu"] == ours["leak"]["none"] == 0
    assert ours["leak"]["expert_choice"] > 0.005
    assert ours["loss_chosen"]["smebu"] == ours["loss_causal"]["smebu"]
    assert ours["loss_chosen"]["expert_choice"] != ours["loss_causal"]["expert_choice"]
    assert ours["max_vio"]["expert_choice"] == pytest.approx(0, abs=1e-9)
    assert ours["override"]["none"] == 0 < ours["override"]["smebu"]
    assert (rows["score_price"] <= 1 + 1e-6).all()
    load = done["results"]["load"].values
    assert np.nanmax(np.abs(np.nanmean(load, -1) - 1)) < 1e-5


def test_what_is_done_is_opened_and_another_study_refused(
    done: xr.DataTree, config: StudyConfig, runs: Path, cache: Path
) -> None:
    again = study.study(dataclasses.replace(config, workers=1), runs=runs, cache=cache)
    xr.testing.assert_identical(again["results"].to_dataset(), done["results"].to_dataset())
    other = dataclasses.replace(config, steps=11)
    with pytest.raises(BadValue, match="'small' is another one: steps is 11 and was 10"):
        study.study(other, runs=runs, cache=cache)


def test_a_base_of_another_version_is_not_gone_on_with(
    done: xr.DataTree, config: StudyConfig, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = override(grid.base(config), {"data.sequence_length": 96})
    monkeypatch.setattr(grid, "base", lambda _: longer)
    with pytest.raises(BadValue, match="another one: data.sequence_length is 96 and was 64"):
        study.study(config, runs=runs)


def test_it_can_be_drawn_from_its_file(done: xr.DataTree, runs: Path) -> None:
    source = dataclasses.replace(StudyConfig(**SMALL), source=str(runs / "small.nc"))  # type: ignore[arg-type]
    run = study.study(source)
    xr.testing.assert_identical(run["claims"].to_dataset(), done["claims"].to_dataset())
    with pytest.raises(BadValue, match="no collapse study's run file"):
        run.drop_nodes("trials").to_netcdf(runs / "other.nc", engine="h5netcdf")
        study.study(dataclasses.replace(source, source=str(runs / "other.nc")))


def test_only_outcomes_are_left_in_the_end(done: xr.DataTree, runs: Path) -> None:
    left = {path.stem for path in (runs / "small" / "trials").iterdir()}
    assert left == set(done["trials"]["key"].values)


@pytest.mark.parametrize(
    "name",
    ["verdicts", "pareto", "sensitivity", "curves", "load", "rescue", "leak"],
)
def test_figures_can_be_drawn(done: xr.DataTree, name: str) -> None:
    figure = getattr(plots_study, name)(done)
    titles = [axis.get_title() for axis in figure.axes] + [figure.get_suptitle()]
    assert any(titles)
    figure.canvas.draw()


def test_a_study_of_one_part_is_read_too(tmp_path: Path, cache: Path) -> None:
    config = StudyConfig(**{**SMALL, "parts": ("rescue",), "seeds": 1, "name": ""})  # type: ignore[arg-type]
    config = dataclasses.replace(config, methods=("smebu",), workers=1)
    run = study.study(config, runs=tmp_path, cache=cache)
    assert (tmp_path / f"{run.attrs['name']}.nc").is_file()
    assert run.attrs["name"].startswith("collapse-toy-")
    assert run.attrs["corpus_sha256"] and run.attrs["experts_backend"]
    assert report.balancers(run).empty and "statements" in report.reading(run)
    for draw in (plots_study.pareto, plots_study.curves, plots_study.load, plots_study.leak):
        assert "not part of this study" in draw(run).axes[0].texts[0].get_text()
    assert not plots_study.rescue(run).axes[0].texts


def test_other_text_is_not_mixed_in(
    done: xr.DataTree, config: StudyConfig, tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    kept = {**done.attrs, "corpus_sha256": "another", "status": "failed"}
    (folder / "run.json").write_text(json.dumps(kept, default=str))
    with pytest.raises(BadValue, match="its corpus_sha256 is .* here and was another"):
        study.study(config, runs=tmp_path, cache=cache)
    assert not (folder / "lock").exists()


@pytest.mark.parametrize("name", ["causes", "anatomy"])
def test_a_part_that_was_left_out_is_said_to_be(done: xr.DataTree, name: str) -> None:
    figure = getattr(plots_study, name)(done)
    assert "not part of this study" in figure.axes[0].texts[0].get_text()


@pytest.fixture(scope="module")
def reference() -> xr.DataTree:
    """The committed study: all balancers, axes and seeds."""
    return open_run(Path(__file__).parent.parent / "runs/reference/collapse.nc")


def _looks(axis) -> dict[str, tuple[str, str]]:
    """Colour and marker of what a panel's legend names, but for levels, which have none."""
    handles, labels = axis.get_legend_handles_labels()
    lines = [getattr(each, "lines", [each])[0] for each in handles]
    looks = {
        label.removesuffix(" (not causal)"): (to_hex(line.get_color()), line.get_marker())
        for line, label in zip(lines, labels, strict=True)
    }
    return {label: look for label, look in looks.items() if look[1] not in ("None", "", None)}


def test_a_balancer_looks_the_same_in_all_figures(reference: xr.DataTree) -> None:
    every = {
        report.NAMES[m]: (to_hex(plots_study.COLORS[m]), plots_study.MARKERS[m])
        for m in report.NAMES
    }
    assert len({color for color, _ in every.values()}) == len(every)
    assert len({marker for _, marker in every.values()}) == len(every)
    for plot, at, least in (
        (plots_study.pareto, 0, 15),
        (plots_study.curves, 1, 15),
        (plots_study.sensitivity, 2, 9),
        (plots_study.anatomy, 4, 2),
    ):
        looks = _looks(plot(reference).axes[at])
        assert len(looks) == least and looks.items() <= every.items(), plot.__name__
    levels = plots_study.sensitivity(reference).axes[0].lines
    assert to_hex(plots_study.COLORS["quantile"]) in {
        to_hex(each.get_color()) for each in levels
    }


def test_bars_end_at_seeds_and_labels_stay_in_their_panels(reference: xr.DataTree) -> None:
    figure = plots_study.causes(reference)
    figure.canvas.draw()
    assert "least and greatest of seeds" in figure.get_suptitle()
    rows = findings.of(reference)
    dead = 100 * rows[rows["part"] == "causes"].groupby(["axis", "level"])["dead"].agg(
        ["min", "max"]
    )  # fmt: skip
    axis = figure.axes[0]
    heights = {round(float(y), 6) for line in axis.lines for y in line.get_ydata()}
    for level in ("16", "64", "256"):
        assert set(dead.loc["experts", level].round(6)) <= heights
    assert min(heights) >= 0
    for axis in figure.axes:
        boxes = [each.get_window_extent() for each in axis.get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
        assert boxes[-1].x1 < axis.get_window_extent().x1


def test_tables_and_reading(done: xr.DataTree) -> None:
    table = report.balancers(done)
    assert set(table.index) == {"none", "SMEBU", "expert choice"}
    assert len(report.claims(done)) == len(statements.CLAIMS)
    text = report.reading(done)
    assert "32 experts" in text and "statements" in text


def test_a_run_that_diverges_has_an_outcome(tmp_path: Path, cache: Path) -> None:
    config = override(
        grid.base(StudyConfig(**{**SMALL, "steps": 30})),
        {"spike": 1e-6, "optim.adamw_rate": 10.0},
    )  # type: ignore[arg-type]
    given = trial.run("wild", config, tmp_path, cache)
    with xr.open_dataset(tmp_path / "wild.nc", engine="h5netcdf") as found:
        assert found.attrs == given.attrs and found.attrs["status"] == "failed"
        assert "the loss jumped" in found.attrs["reason"]
    assert not (tmp_path / "work" / "wild").exists()


def test_an_outcome_is_thinned_from_its_run(
    tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    from trinity_lib.train import train

    run = train(override(tiny, {"name": "one"}), runs=tmp_path, cache=cache)
    found = outcome.outcome(run)
    assert found["max_vio_curve"].shape == (outcome.TIMES, 3)
    np.testing.assert_allclose(found["loss_curve"][-1], run["train"]["loss"][-1])
    late = run["layers"]["max_vio"].isel(step=slice(-2, None)).mean("step")
    np.testing.assert_allclose(found["max_vio"], late)
    assert open_run(tmp_path / "one.nc").attrs["status"] == "complete"
    assert os.path.exists(tmp_path / "one" / trial.STAGE)
