"""A plan's parameters, its run file, and its notebook."""

import ast
import inspect
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import xarray as xr

from tests.test_notebooks import ROOT, command, printed_run_file, shows
from trinity_lib import gpus, plan, plan_config, planner, serving
from trinity_lib.config import BadValue, Taken, to_json
from trinity_lib.plan_config import PlanConfig, configure
from trinity_lib.record import open_run
from trinity_lib.schema import TABLES
from trinity_lib.train import RUNS

NOTEBOOK = ROOT / "notebooks" / "plan.ipynb"
GROUPS = (
    "gpus", "memory", "flops", "cost", "reckonings", "fits", "offload", "traffic",
    "published", "articles",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> xr.DataTree:
    folder = tmp_path_factory.mktemp("plans")
    planner.draw_up(configure(name="large"), runs=folder)
    return open_run(folder / "large.nc")


def test_defaults_are_the_published_run() -> None:
    config = configure()
    assert (config.scale, config.gpu, config.gpus, config.days) == ("large", "B300", 2048, 33)
    assert config.tokens == 17e12 and config.price == gpus.find("B300").price
    assert (config.parallel.replicate, config.parallel.expert_shard) == (16, 16)
    assert config.plan.cost.days == pytest.approx(33, rel=0.01)
    assert plan_config.active(config) == 13e9
    for words in ("large", "1.7e+13 tokens", "2,048 B300", "11.8%", "$6.03", "recomputed"):
        assert words in plan_config.describe(config)


@pytest.mark.parametrize(
    ("scale", "tokens", "active"), [("mini", 10e12, 3e9), ("toy", 286_720, 202_048)]
)
def test_other_scales_take_their_own_schedule(scale: str, tokens: float, active: float) -> None:
    config = configure(scale=scale)
    assert config.tokens == tokens
    assert plan_config.active(config) == active


def test_parameters_come_as_papermill_sends_them() -> None:
    config = configure(gpus="64", shard="64", price="2", recompute="false", tokens="1e12")
    assert (config.gpus, config.shard, config.price, config.tokens) == (64, 64, 2.0, 1e12)
    assert not config.recompute


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scale": "larg"}, "scale is 'larg'; it must be one of toy, small"),
        ({"gpu": "TPU"}, "gpu is 'TPU'; it must be one of A100 80GB"),
        ({"gpu": "H20"}, "gpu is 'H20'; it must be one of A100 80GB"),
        ({"gpu": 3}, "gpu is 3; it must be text"),
        ({"gpus": 0}, "gpus is 0; it must be at least 1"),
        ({"gpus": -4}, "gpus is -4; it must be at least 1"),
        ({"gpus": 2**20 + 1}, "gpus is 1048577; it must be at least 1, at most 1,048,576"),
        (
            {"gpus": 7},
            "gpus is 7; it must be a multiple of shard (128), or shard a divisor of it",
        ),
        ({"gpus": 2000, "shard": 64}, "shard is 64; it must be a divisor of gpus (2000)"),
        (
            {"gpus": 7, "shard": 7},
            "shard is 7; it must be a multiple of expert_parallel (8), or expert_parallel a",
        ),
        ({"expert_parallel": 3}, "expert_parallel is 3; it must be a divisor of shard (128)"),
        ({"expert_parallel": 0}, "expert_parallel is 0; it must be a divisor of shard (128)"),
        ({"shard": 0}, "shard is 0; it must be a divisor of gpus (2048)"),
        ({"price": "cheap"}, "price is 'cheap'; it must be a number"),
        ({"price": -2}, "price is -2.0; it must be zero or more dollars per GPU-hour"),
        ({"efficiency": 0}, "efficiency is 0.0; it must be above 0, at most 1"),
        ({"efficiency": 12}, "efficiency is 12.0; it must be above 0, at most 1"),
        ({"tokens": 0}, "tokens is 0.0; it must be above zero"),
        ({"days": -1}, "days is -1.0; it must be above zero"),
        ({"micro_tokens": 5000}, "micro_tokens is 5000; it must be a multiple of the 8,192"),
        ({"recompute": "falsch"}, "recompute is 'falsch'; it must be true or false"),
        ({"context": 0}, "context is 0; it must be at least 1"),
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"name": "a/b"}, "name is 'a/b'; it must be a file name without slashes"),
    ],
)
def test_bad_values_are_named(changes: dict, sentence: str) -> None:
    with pytest.raises(BadValue) as error:
        configure(**changes)
    assert sentence in str(error.value)


def test_the_run_holds_every_table(run: xr.DataTree) -> None:
    assert run.attrs["status"] == "complete" and set(run.children) == set(GROUPS)
    for name in GROUPS:
        assert set(run[name].data_vars) == set(TABLES[name])
        for key, variable in TABLES[name].items():
            assert run[name][key].dims == variable.dims
            assert run[name][key].attrs["units"] == variable.units
    assert json.loads(run.attrs["config"])["gpus"] == 2048
    assert run.attrs["parameters_total"] == 398_635_272_192
    assert run.attrs["parameters_held_most"] == 3_114_338_064
    assert "398,635,272,192" in run.attrs["summary"]


def test_what_is_published_agrees_within_a_percent(run: xr.DataTree) -> None:
    table = run["published"].to_dataset()
    assert table["published"].values.tolist() == [797.0, 240.0, 1.33, 227.0]
    np.testing.assert_allclose(table["computed"], table["published"], rtol=0.01)


def test_tables_are_the_plans(run: xr.DataTree) -> None:
    config = configure()
    planned = config.plan
    memory = run["memory"]["bytes"]
    for moment, name in plan.MOMENTS.items():
        assert memory.sel(moment=name).values.tolist() == list(planned.memory[moment])
    assert run["flops"]["forward"].values.tolist() == list(planned.flops)
    cost = run["cost"].to_dataset()
    at = {"efficiency": config.efficiency, "price": config.price}
    assert float(cost["dollars"].sel(at)) == planned.cost.dollars == run.attrs["dollars"]
    assert float(cost["days"].sel(efficiency=config.efficiency)) == planned.cost.days
    fits = run["fits"].to_dataset()
    stored = {
        (str(g), str(p)): int(n) for (g, p), n in fits["inference_gpus"].to_series().items()
    }
    assert stored["B300", "4-bit"] == 1 and stored["H100 SXM", "bf16"] == 12
    assert int(fits["training_gpus"].sel(gpu="RTX 4090")) == 0
    read = run["traffic"]["read"]
    assert float(read[0]) == planned.counts.active_with_head
    host = run["offload"]["host_bound"].sel(card="L40S", host="computed on a desktop")
    active = 4 * serving.expert(planned.model)
    np.testing.assert_allclose(host, 80e9 / (active * fits["bits"] / 8))


def test_reckonings_imply_rates(run: xr.DataTree) -> None:
    table = run["reckonings"].to_dataset()
    first = table.isel(reckoning=0)
    assert float(first["parameters"]) == 13e9
    assert float(first["operations"]) == pytest.approx(1.33e24, rel=0.01)
    assert float(first["rate"]) == pytest.approx(227e12, rel=0.01)
    np.testing.assert_allclose(table["efficiency"], table["rate"] / 2250e12)
    last = table.isel(reckoning=-1)
    assert np.isnan(last["parameters"])
    assert float(last["efficiency"]) == pytest.approx(0.118, abs=0.0005)


def test_the_planned_cell_stands_alone_in_its_grid() -> None:
    assert planner._with((1.0, 2.0, 4.0), 2.1) == [1.0, 2.1, 4.0]
    assert planner._with((1.0, 2.0, 4.0), 2.0) == [1.0, 2.0, 4.0]
    assert planner._with((1.0, 2.0), 0.5) == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"scale": "mini", "gpu": "H200", "gpus": 512, "expert_parallel": 1},
        {"scale": "toy", "gpu": "rtx4090", "gpus": 1, "shard": 1, "expert_parallel": 1},
        {"recompute": False, "price": 0.0, "efficiency": 1.0},
    ],
    ids=["mini", "toy", "free"],
)
def test_other_plans_are_drawn_up(changes: dict, tmp_path: Path) -> None:
    made = planner.draw_up(configure(name="x", **changes), runs=tmp_path)
    assert made.attrs["status"] == "complete"
    scale = changes.get("scale", "large")
    assert np.isnan(made.attrs["implied_price"]) == (scale != "large")
    kinds = len(made["reckonings"]["reckoning"])
    assert kinds == (4 if scale == "toy" else 5)


def test_a_name_is_taken_once_and_made_where_there_is_none(tmp_path: Path) -> None:
    config = configure(scale="toy", name="twice")
    planner.draw_up(config, runs=tmp_path)
    with pytest.raises(Taken, match="twice"):
        planner.draw_up(config, runs=tmp_path)
    made = planner.draw_up(configure(scale="toy"), runs=tmp_path)
    assert made.attrs["name"].startswith("plan-toy-")


def test_what_fails_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> dict:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(planner, "_fits", broken)
    with pytest.raises(ZeroDivisionError):
        planner.draw_up(configure(scale="toy", name="broken"), runs=tmp_path)
    run = open_run(tmp_path / "broken")
    assert run.attrs["status"] == "failed"
    assert run.attrs["reason"] == "ZeroDivisionError: by hand"


def test_the_command_prints_the_run(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(to_json(configure(scale="toy", name="command")))
    words = [sys.executable, "-m", "trinity_lib.planner", "--config", str(path)]
    done = subprocess.run([*words, "--runs", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert open_run(done.stdout.strip()).attrs["status"] == "complete"
    path.write_text("{}")
    done = subprocess.run([*words, "--runs", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "PlanConfig lacks scale, gpu" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_settings_read_back() -> None:
    config = configure()
    assert PlanConfig(**json.loads(to_json(config))) == config


def test_the_notebooks_parameters_are_the_functions() -> None:
    inspected = papermill.inspect_notebook(str(NOTEBOOK))
    given = {name: ast.literal_eval(each["default"]) for name, each in inspected.items()}
    asked = inspect.signature(configure).parameters
    assert given == {name: each.default for name, each in asked.items()}


@pytest.fixture
def executed(tmp_path: Path) -> Iterator[Path]:
    """Where a notebook may be executed to; its run, whose name is the folder's, goes after."""
    yield tmp_path / "plan.ipynb"
    name = f"test-plan-{tmp_path.parent.name}-{tmp_path.name}"
    shutil.rmtree(RUNS / name, ignore_errors=True)
    (RUNS / f"{name}.nc").unlink(missing_ok=True)


def execute(output: Path, **parameters: object) -> subprocess.CompletedProcess:
    folder = output.parent
    name = f"test-plan-{folder.parent.name}-{folder.name}"
    words = command(output, NOTEBOOK, name=name, **parameters)
    return subprocess.run(words, capture_output=True, text=True, cwd=folder)


def test_the_notebook_plans_large(executed: Path) -> None:
    begun = time.monotonic()
    done = execute(executed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - begun < 60  # 12 s where nothing else runs
    run = open_run(printed_run_file(executed))
    assert run.attrs["status"] == "complete"
    words = ("398,635,272,192", "3.35%", "0.96 bits", "442.7B", "790.1B", "33 days", "797.0")
    shows(executed, 6, words)


def test_a_misspelt_parameter_ends_in_one_sentence(executed: Path) -> None:
    done = execute(executed, gpuss=3)
    assert done.returncode == 1
    assert "there is no parameter 'gpuss'; this notebook has scale, gpu" in done.stderr
    cells = nbformat.read(executed, as_version=4).cells
    (red,) = [o for c in cells for o in c.get("outputs", []) if o.output_type == "error"]
    assert len(red.traceback) == 1
