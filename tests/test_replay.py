"""Routing held to another run's choices."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from tests.test_train import same
from trinity_lib.config import BadValue, Missing, override
from trinity_lib.record import open_run
from trinity_lib.run import RunConfig
from trinity_lib.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def recorded(tiny: RunConfig, runs: Path, cache: Path) -> xr.DataTree:
    config = override(tiny, {"name": "recorded", "record_choices": True, "micro_batches": 2})
    return train(config, runs=runs, cache=cache)


def held(tiny: RunConfig, runs: Path, cache: Path, name: str, **changes: object) -> xr.DataTree:
    replay = {"name": name, "replay": str(runs / "recorded.nc")}
    return train(override(tiny, {**replay, **changes}), runs=runs, cache=cache)


def test_recorded_choices_are_the_counts(recorded: xr.DataTree, tiny: RunConfig) -> None:
    choices = recorded["choices"]["expert"]
    router = tiny.model.router
    assert choices.dims == ("step", "layer", "token", "choice")
    assert choices.shape == (10, 3, 8 * 32, router.top_k) and choices.dtype == np.int16
    for step in (1, 10):
        for layer in recorded["routing"].layer.values:
            chosen = choices.sel(step=step, layer=layer).values
            assert all(len(set(token)) == router.top_k for token in chosen)
            count = np.bincount(chosen.flatten(), minlength=router.num_experts)
            np.testing.assert_array_equal(
                count, recorded["routing"]["count"].sel(step=step, layer=layer)
            )


def test_recording_changes_nothing(
    recorded: xr.DataTree, tiny: RunConfig, runs: Path, cache: Path
) -> None:
    plain = train(dataclasses.replace(tiny, name="plain"), runs=runs, cache=cache)
    assert "choices" not in plain
    same(plain, recorded)


def test_a_run_over_its_own_choices_is_itself(
    recorded: xr.DataTree, tiny: RunConfig, runs: Path, cache: Path
) -> None:
    again = held(tiny, runs, cache, "again", record_choices=True)
    same(recorded, again)
    xr.testing.assert_equal(recorded["choices"].to_dataset(), again["choices"].to_dataset())


@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_another_split_has_identical_counts_and_biases(
    recorded: xr.DataTree, tiny: RunConfig, runs: Path, cache: Path, micro_batches: int
) -> None:
    split = held(tiny, runs, cache, f"split{micro_batches}", micro_batches=micro_batches)
    for name in ("count", "bias"):
        np.testing.assert_array_equal(split["routing"][name], recorded["routing"][name])
    np.testing.assert_allclose(split["train"]["loss"], recorded["train"]["loss"], rtol=1e-4)


def test_another_balancer_sees_the_same_loads(
    recorded: xr.DataTree, tiny: RunConfig, runs: Path, cache: Path
) -> None:
    sign = held(tiny, runs, cache, "sign", **{"balance.method": "sign"})
    np.testing.assert_array_equal(sign["routing"]["count"], recorded["routing"]["count"])
    assert (sign["routing"]["bias"].values != recorded["routing"]["bias"].values).any()


def test_a_batch_that_grows_is_recorded_and_replayed(
    tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    phase = dataclasses.replace(tiny.phases[0], larger_batch=(2 * 8 * 32, 16))
    config = override(tiny, {"name": "recorded", "record_choices": True, "phases": (phase,)})
    first = train(config, runs=tmp_path, cache=cache)
    choices = first["choices"]["expert"]
    assert choices.sizes["token"] == 16 * 32
    assert (choices.sel(step=1)[:, 8 * 32 :] == -1).all() and (choices.sel(step=3) >= 0).all()
    again = held(tiny, tmp_path, cache, "again", phases=(phase,), micro_batches=4)
    np.testing.assert_array_equal(again["routing"]["bias"], first["routing"]["bias"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "whose seed is 0; this run's is 1, and both must read the same tokens"),
        ({"data.rsdb": 0}, "whose rsdb is 4; this run's is 0"),
        ({"data.sequence_length": 16}, "whose sequence_length is 32; this run's is 16"),
        ({"model.router.num_experts": 16}, "whose experts is 8; this run's is 16"),
        ({"model.router.top_k": 1}, "whose top_k is 2; this run's is 1"),
        (
            {"model.num_layers": 5},
            r"whose MoE layers is \[1, 2, 3\]; this run's is \[1, 2, 3, 4\]",
        ),
        ({"model.vocab_size": 400}, "whose tokenizer_sha256 is '"),
    ],
)
def test_choices_of_other_tokens_are_refused(
    recorded: xr.DataTree,
    tiny: RunConfig,
    runs: Path,
    cache: Path,
    changes: dict,
    sentence: str,
) -> None:
    before = sorted(path.name for path in runs.iterdir())
    with pytest.raises(BadValue, match=sentence) as error:
        held(tiny, runs, cache, "refused", **changes)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in runs.iterdir()) == before


def test_another_schedule_is_refused(
    recorded: xr.DataTree, tiny: RunConfig, runs: Path, cache: Path
) -> None:
    longer = (tiny.phases[0], dataclasses.replace(tiny.phases[1], tokens=5 * 8 * 32))
    with pytest.raises(BadValue, match="which recorded 10 steps; this run has 11"):
        held(tiny, runs, cache, "longer", phases=longer)
    moved = tuple(
        dataclasses.replace(phase, tokens=n * 8 * 32)
        for phase, n in zip(tiny.phases, (5, 5), strict=True)
    )
    with pytest.raises(BadValue, match="whose step 6 has another batch or mixture"):
        held(tiny, runs, cache, "moved", phases=moved)


def test_a_run_without_choices_and_no_run_are_refused(
    tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    train(dataclasses.replace(tiny, name="recorded"), runs=tmp_path, cache=cache)
    with pytest.raises(BadValue, match="must be a run that recorded its choices"):
        held(tiny, tmp_path, cache, "again")
    with pytest.raises(Missing, match="There is no run at"):
        held(tiny, tmp_path / "nowhere", cache, "again")
    assert open_run(tmp_path / "recorded.nc").attrs["status"] == "complete"
