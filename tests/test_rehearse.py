"""Rehearsals: what each rank would hold, the run file they leave, and what is refused."""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import xarray as xr

from trinity_lib import footprint, recipes, rehearse, trace
from trinity_lib.config import BadValue, Missing, Taken, from_json, override, to_json
from trinity_lib.holdings import KINDS, Held, count_held
from trinity_lib.mesh import ParallelConfig
from trinity_lib.plan import Cluster
from trinity_lib.record import open_run, open_runs
from trinity_lib.run import RunConfig

LARGE = 398_635_272_192


def toy(parallel: ParallelConfig, **changes: Any) -> RunConfig:
    config = recipes.toy()
    batch = 4 * parallel.ranks
    phases = tuple(dataclasses.replace(phase, batch=batch) for phase in config.phases)
    given = {"parallel": parallel, "micro_batches": parallel.ranks, "phases": phases}
    return override(config, {**given, "model.num_layers": 2, **changes})


def held(config: RunConfig) -> Held:
    with trace.pretended(config.parallel) as layout:
        return count_held(trace.shard(config, layout), config.parallel)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one rehearsed run, which said what it did."""
    folder = tmp_path_factory.mktemp("runs")
    config = toy(ParallelConfig(shard=2, experts=2), name="try")
    said: list[str] = []
    rehearse.rehearse(config, Cluster(gpu="h200", count=2), runs=folder, say=said.append)
    (folder / "said").write_text("\n".join(said))
    return folder


@pytest.fixture
def run(runs: Path) -> xr.DataTree:
    return open_run(runs / "try.nc")


def test_the_run_file_says_that_nothing_was_trained(run: xr.DataTree) -> None:
    assert run.attrs["status"] == "rehearsed"
    assert run.attrs["reason"].startswith("REHEARSED, NOT TRAINED: it needs 2 H200 GPUs of 141")
    assert "balanced" in run.attrs["routing"]
    assert from_json(RunConfig, run.attrs["config"]).name == run.attrs["name"] == "try"
    assert "train" not in run
    assert run.attrs["layers_traced"] == 2
    assert run.attrs["dollars"] > 0
    for node in run.children.values():
        for variable in node.data_vars.values():
            assert {"long_name", "units"} <= set(variable.attrs)


def test_what_is_planned_stands_beside_what_is_traced(run: xr.DataTree) -> None:
    table = run["rehearsed_memory"].to_dataset()
    totals = table.sum("part", skipna=False)
    assert float(totals["traced"].max()) == run.attrs["traced_peak_bytes"]
    assert float(totals["planned"].max()) == run.attrs["planned_peak_bytes"]
    assert run.attrs["traced_peak_bytes"] == pytest.approx(
        run.attrs["planned_peak_bytes"], rel=0.15
    )
    assert np.isnan(table["planned"].sel(moment="forward")).all()
    operations = run["operations"].to_dataset().sel(operator=["products", "experts"])
    both = operations.sel(direction=["forward", "backward"])
    assert np.allclose(both["planned"], both["traced"])
    attention = run["operations"].to_dataset().sel(operator="attention")
    assert (attention["traced"] >= attention["planned"])[:2].all()  # masked keys count


def test_parameters_by_kind(run: xr.DataTree) -> None:
    table = run["parameters"].to_dataset()
    assert int(table["whole"].sum()) == run.attrs["parameters_total"]
    assert int(table["rank_0"].sum()) == run.attrs["parameters_a_rank"]
    assert int(table["whole"].sel(kind="experts")) == 32 * 3 * 32 * 64
    assert int(table["rank_0"].sel(kind="experts")) == 16 * 3 * 32 * 64


def test_rehearsals_are_left_out_unless_asked_for(runs: Path) -> None:
    pattern = str(runs / "*.nc")
    with pytest.raises(Missing):
        open_runs(pattern, "parameters")
    table = open_runs(pattern, "parameters", rehearsed=True)
    assert table["status"].item() == "rehearsed"


def test_it_says_what_it_does(runs: Path) -> None:
    said = (runs / "said").read_text()
    for part in ("rehearsing try", "sharding", "rank 0 holds", "tracing", "NOT TRAINED"):
        assert part in said


def test_a_name_is_taken_once(runs: Path) -> None:
    config = toy(ParallelConfig(shard=2), name="try")
    with pytest.raises(Taken, match="'try' is complete"):
        rehearse.rehearse(config, Cluster(gpu="H200", count=2), runs=runs)


def test_large_holds_what_is_published() -> None:
    found = held(recipes.large())
    assert found.whole.sum() == LARGE
    assert found.rank_0.sum() == 3_114_338_064
    assert (found.every == found.rank_0).all()
    assert dict(zip(KINDS, found.rank_0, strict=True))["experts"] == 54 * 2 * 3 * 3072**2


@pytest.mark.parametrize("scale", ["mini", "nano"])
def test_mini_and_nano_are_held_as_planned(scale: str) -> None:
    config = recipes.SCALES[scale]()
    assert held(config).every.sum(1).tolist() == list(
        footprint.held(config.model, config.parallel)
    )


@pytest.mark.parametrize("layout", [(1, 3, 3), (1, 3, 1), (2, 6, 3), (1, 64, 64)])
def test_uneven_layouts(layout: tuple[int, int, int]) -> None:
    """No row is lost or held twice in a shard group, wherever the ends are cut."""
    parallel = ParallelConfig(replicate=layout[0], shard=layout[1], experts=layout[2])
    config = toy(parallel)
    found = held(config)
    assert (found.every.sum(0) == found.whole).all()
    totals = found.every.sum(1)
    assert totals.tolist() == list(footprint.held(config.model, parallel))
    assert totals.max() == totals[0] > totals.min()


def test_rows_at_once_are_those_of_the_largest_batch() -> None:
    assert rehearse.micro_batch_rows(recipes.large()) == 16_384 // 4096


def test_a_bad_layout_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    config = toy(ParallelConfig(shard=2), name="bad")
    with pytest.raises(BadValue, match="replicate x shard is 2; it must be"):
        rehearse.rehearse(config, Cluster(gpu="H200", count=4), runs=tmp_path)
    assert not list(tmp_path.iterdir())
    assert not dist.is_initialized()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(trace, "step", fails)
    config = toy(ParallelConfig(shard=2), name="bad")
    with pytest.raises(RuntimeError):
        rehearse.rehearse(config, Cluster(gpu="H200", count=2), runs=tmp_path)
    assert not list(tmp_path.iterdir())
    assert not dist.is_initialized()


def command(config: RunConfig, folder: Path, *options: str) -> subprocess.CompletedProcess:
    file = folder / "config.json"
    file.write_text(to_json(config))
    line = [sys.executable, "-W", "error", "-m", "trinity_lib.rehearse"]
    line += ["--config", str(file), "--runs", str(folder), *options]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_command(tmp_path: Path) -> None:
    config = toy(ParallelConfig(replicate=2, shard=2), name="try")
    done = command(config, tmp_path, "--gpu", "B200", "--price", "2", "--efficiency", "0.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "try.nc")
    attributes = open_run(tmp_path / "try").attrs
    assert (attributes["gpu"], attributes["price"], attributes["efficiency"]) == (
        "B200",
        2,
        0.5,
    )


def test_the_command_refuses_in_one_sentence(tmp_path: Path) -> None:
    done = command(toy(ParallelConfig(shard=2)), tmp_path, "--gpu", "TPU")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("gpu is 'TPU'; it must be")


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["large", "mini", "nano"])
def test_the_published_models(scale: str, tmp_path: Path) -> None:
    config = dataclasses.replace(recipes.SCALES[scale](), name=scale, device="cuda")
    done = command(config, tmp_path)
    assert done.returncode == 0, done.stderr
    attributes = open_run(tmp_path / scale).attrs
    assert attributes["seconds"] < 100
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 * 2**20  # KiB
    assert attributes["traced_peak_bytes"] == pytest.approx(
        attributes["planned_peak_bytes"], rel=0.03
    )
    assert json.loads(attributes["config"])["scale"] == scale
