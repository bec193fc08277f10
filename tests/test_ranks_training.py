"""Whole runs on ranks: the same counts, biases and losses as in one process."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from tests import distributed
from tests.distributed import LAYOUTS
from trinity_lib import checkpoint, hub, shards
from trinity_lib.config import BadValue, override
from trinity_lib.mesh import ParallelConfig
from trinity_lib.record import open_run
from trinity_lib.run import RunConfig
from trinity_lib.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def twenty(tiny: RunConfig) -> RunConfig:
    """Twenty steps, each in four pieces that ranks can share."""
    first, second = tiny.phases
    phases = (
        dataclasses.replace(first, tokens=12 * 8 * 32),
        dataclasses.replace(second, tokens=8 * 8 * 32),
    )
    return dataclasses.replace(
        tiny, phases=phases, micro_batches=4, evaluate_every=10, checkpoint_every=7, keep=1
    )


@pytest.fixture(scope="module")
def alone(twenty: RunConfig, runs: Path, cache: Path) -> xr.DataTree:
    """One process, whose choices the others are held to."""
    return train(
        dataclasses.replace(twenty, name="alone", record_choices=True), runs=runs, cache=cache
    )


@pytest.fixture(scope="module")
def precise(twenty: RunConfig, runs: Path, cache: Path) -> xr.DataTree:
    """One process in float64."""
    config = dataclasses.replace(twenty, name="precise", dtype="float64")
    return train(config, runs=runs, cache=cache)


def trained(config: RunConfig, runs: Path, cache: Path, resumes: bool = False) -> str:
    return str(train(config, runs=runs, cache=cache, resumes=resumes).attrs.get("status"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in hub.load(folder).named_parameters()}


def momentum(folder: Path) -> torch.Tensor:
    """The balancer's, whoever wrote the checkpoint."""
    if not shards.are_in(folder):
        return checkpoint.load_state(folder).tensors["balancer.momentum"]
    held = {name: torch.empty_like(p) for name, p in weights(folder).items()}
    return shards.load(folder, held).tensors["balancer.momentum"]


@pytest.mark.parametrize(
    "layout",
    ["replicas", "shards", "four replicas", "replicas of experts", "sharded experts"],
)
def test_replayed_choices_give_the_same_counts_biases_and_weights(
    layout: str, twenty: RunConfig, alone: xr.DataTree, runs: Path, cache: Path
) -> None:
    parallel, name = LAYOUTS[layout], layout.replace(" ", "-")
    replay = str(runs / "alone.nc")
    config = dataclasses.replace(twenty, name=name, parallel=parallel, replay=replay)
    said = distributed.run(trained, parallel.ranks, config, runs, cache)
    assert said == ["complete"] + ["None"] * (parallel.ranks - 1)
    run = open_run(runs / name)
    for variable in ("count", "bias"):
        np.testing.assert_array_equal(run["routing"][variable], alone["routing"][variable])
    folder = runs / name / "base"
    checkpoint.verify(folder)
    assert torch.equal(momentum(folder), momentum(runs / "alone" / "base"))
    mine, theirs = weights(folder), weights(runs / "alone" / "base")
    for each, whole in theirs.items():
        assert (mine[each] - whole).norm() <= 1e-5 * whole.norm(), each
    np.testing.assert_allclose(run["train"]["loss"], alone["train"]["loss"], rtol=1e-5)
    np.testing.assert_allclose(
        run["evaluation"]["loss"], alone["evaluation"]["loss"], rtol=1e-5
    )
    assert run["train"].sizes["step"] == 20


@pytest.mark.parametrize("layout", ["replicas of experts", "four expert ranks"])
def test_free_running_losses_agree_in_float64(
    layout: str, twenty: RunConfig, precise: xr.DataTree, runs: Path, cache: Path
) -> None:
    parallel, name = LAYOUTS[layout], f"free-{layout.replace(' ', '-')}"
    config = dataclasses.replace(twenty, name=name, parallel=parallel, dtype="float64")
    distributed.run(trained, parallel.ranks, config, runs, cache)
    run = open_run(runs / name)
    np.testing.assert_allclose(
        run["train"]["loss"], precise["train"]["loss"], rtol=0, atol=1e-9
    )
    np.testing.assert_array_equal(run["routing"]["count"], precise["routing"]["count"])
    for each in ("batch_het", "grad_norm", "balance_loss", "z_loss", "batch_tokens"):
        np.testing.assert_allclose(run["train"][each], precise["train"][each], rtol=1e-8)


def test_four_ranks_are_killed_then_two_then_one_goes_on(
    twenty: RunConfig, alone: xr.DataTree, runs: Path, cache: Path
) -> None:
    config = dataclasses.replace(
        twenty, name="killed", checkpoint_every=3, keep=2, replay=str(runs / "alone.nc")
    )
    folder = runs / "killed"
    ways = (ParallelConfig(shard=4, experts=2), ParallelConfig(shard=2, experts=2))
    for parallel, step in zip(ways, (3, 9), strict=True):
        several = dataclasses.replace(config, parallel=parallel)
        given = (several, runs, cache, parallel.ranks == 2)
        with distributed.started(trained, parallel.ranks, *given) as running:
            running.until(lambda step=step: (folder / f"step-{step:08d}").exists())
            running.kill()
        latest = checkpoint.newest(folder)
        assert latest is not None and shards.are_in(latest)
        assert checkpoint.verify(latest)["step"] >= step
    run = train(config, runs=runs, cache=cache, resumes=True)
    assert run.attrs["status"] == "complete" and len(run.attrs["resumed"]) > 0
    assert run["train"].step.values.tolist() == list(range(1, 21))
    np.testing.assert_allclose(run["train"]["loss"], alone["train"]["loss"], rtol=1e-5)
    np.testing.assert_array_equal(run["routing"]["count"], alone["routing"]["count"])
    np.testing.assert_array_equal(run["routing"]["bias"], alone["routing"]["bias"])


def test_a_run_of_one_process_goes_on_on_two(
    twenty: RunConfig, alone: xr.DataTree, runs: Path, cache: Path
) -> None:
    config = dataclasses.replace(twenty, name="grown", replay=str(runs / "alone.nc"))
    with distributed.started(trained, 1, config, runs, cache) as running:
        running.until(lambda: (runs / "grown" / "step-00000007").exists())
        running.kill()
    two = dataclasses.replace(config, parallel=ParallelConfig(replicate=1, shard=2))
    assert distributed.run(trained, 2, two, runs, cache, True)[0] == "complete"
    run = open_run(runs / "grown")
    np.testing.assert_allclose(run["train"]["loss"], alone["train"]["loss"], rtol=1e-5)
    np.testing.assert_array_equal(run["routing"]["count"], alone["routing"]["count"])


@pytest.mark.parametrize("method", ["quantile", "dropout", "global"])
def test_what_other_balancers_add_up_is_summed_over_ranks(
    method: str, twenty: RunConfig, runs: Path, cache: Path
) -> None:
    """In float64, where rounding is small: as in one process."""
    phase = dataclasses.replace(twenty.phases[0], tokens=3 * 8 * 32)
    changes = {"balance.method": method, "balance.rate": 1e-2, "dtype": "float64"}
    changes |= {"phases": (phase,), "evaluate_every": 99, "name": f"{method}-alone"}
    one = override(twenty, changes)
    alone = train(one, runs=runs, cache=cache)
    parallel = ParallelConfig(shard=2, experts=2)
    two = dataclasses.replace(one, parallel=parallel, name=f"{method}-on-two")
    assert distributed.run(trained, 2, two, runs, cache)[0] == "complete"
    run = open_run(runs / two.name)
    if method == "global":  # whose buffer grows by two micro-batches at once
        assert (run["routing"]["count"].sum("expert") == 8 * 32 * 2).all()
        return
    np.testing.assert_array_equal(run["routing"]["count"], alone["routing"]["count"])
    np.testing.assert_allclose(run["routing"]["bias"], alone["routing"]["bias"], atol=1e-6)
    np.testing.assert_allclose(run["train"]["loss"], alone["train"]["loss"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"micro_batches": 2}, "micro_batches is 2; it must be a multiple of the 4 ranks"),
        ({"compile": True}, "compile is True; it must be false where a run has several ranks"),
    ],
)
def test_what_ranks_cannot_share_is_refused(
    changes: dict, sentence: str, twenty: RunConfig
) -> None:
    with pytest.raises(BadValue, match=sentence):
        dataclasses.replace(twenty, parallel=ParallelConfig(shard=4), **changes)


def test_ranks_that_were_not_started_are_said(twenty: RunConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(twenty, parallel=ParallelConfig(shard=2), name="x")
    with pytest.raises(BadValue, match="replicate x shard is 2; it must be 1, the processes"):
        train(config, runs=tmp_path, cache=tmp_path)
    assert not (tmp_path / "x").exists()
