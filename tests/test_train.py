"""The loop: same seed same bits, any split, guards, checkpoints, the golden run."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from trinity_lib import checkpoint, corpus, evaluate
from trinity_lib.config import from_json, override, to_json
from trinity_lib.record import open_run
from trinity_lib.run import RunConfig
from trinity_lib.session import start
from trinity_lib.step import TrainingFailed
from trinity_lib.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tiny_run(tiny: RunConfig, runs: Path, cache: Path) -> xr.DataTree:
    return train(dataclasses.replace(tiny, name="tiny"), runs=runs, cache=cache)


def same(first: xr.DataTree, second: xr.DataTree) -> None:
    """Losses, counts and biases are equal to the bit; only times and names may differ."""
    for group in ("train", "layers", "routing", "evaluation"):
        for name, array in first[group].data_vars.items():
            if name != "seconds":
                np.testing.assert_array_equal(array, second[group][name], f"{group}/{name}")


def test_a_run_is_complete_and_learns(
    tiny_run: xr.DataTree, runs: Path, tiny: RunConfig
) -> None:
    assert tiny_run.attrs["status"] == "complete"
    assert open_run(runs / "tiny.nc")["train"]["loss"].dims == ("step",)
    loss = tiny_run["train"]["loss"].values
    assert loss[-1] < loss[0] - 0.5
    assert abs(loss[0] - np.log(tiny.model.vocab_size)) < 0.5
    assert tiny_run["evaluation"].step.values.tolist() == [0, 4, 6, 8, 10]
    assert tiny_run["train"].phase.values.tolist() == [0] * 6 + [1] * 4
    assert from_json(RunConfig, tiny_run.attrs["config"]).model == tiny.model


def test_counts_are_every_token_once_per_choice(tiny_run: xr.DataTree, tiny: RunConfig) -> None:
    counts = tiny_run["routing"]["count"].sum("expert")
    per_step = 8 * tiny.data.sequence_length * tiny.model.router.top_k
    assert (counts == per_step).all()
    validation = tiny_run["evaluation"]
    counted = validation["count"].sum("expert")
    rows = 4 * tiny.data.sequence_length * tiny.model.router.top_k
    assert (counted == rows).all()


def test_the_same_run_twice_is_the_same_to_the_bit(
    tiny_run: xr.DataTree, tiny: RunConfig, runs: Path, cache: Path
) -> None:
    again = train(dataclasses.replace(tiny, name="again"), runs=runs, cache=cache)
    same(tiny_run, again)
    other = train(dataclasses.replace(tiny, name="other", seed=1), runs=runs, cache=cache)
    assert (other["train"]["loss"].values != tiny_run["train"]["loss"].values).any()


def test_training_leaves_the_global_state_alone(
    tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    before = torch.get_rng_state()
    threads = torch.get_num_threads()
    train(dataclasses.replace(tiny, name="x"), runs=tmp_path, cache=cache)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_free_running_split_agrees_in_float64(
    tiny: RunConfig, tmp_path: Path, cache: Path, optimizer: str
) -> None:
    base = override(tiny, {"dtype": "float64", "optim.optimizer": optimizer})
    phase = dataclasses.replace(tiny.phases[0], tokens=20 * 8 * 32)
    base = dataclasses.replace(base, phases=(phase,), evaluate_every=100)
    runs = [
        train(
            dataclasses.replace(base, name=f"m{m}", micro_batches=m), runs=tmp_path, cache=cache
        )
        for m in (1, 2, 4)
    ]
    for run in runs[1:]:
        np.testing.assert_allclose(
            run["train"]["loss"], runs[0]["train"]["loss"], atol=1e-9, rtol=0
        )
        np.testing.assert_array_equal(run["routing"]["count"], runs[0]["routing"]["count"])


def test_recomputing_activations_counts_nothing_twice(
    tiny_run: xr.DataTree, tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    config = dataclasses.replace(tiny, name="recomputed", recompute=True)
    recomputed = train(config, runs=tmp_path, cache=cache)
    same(tiny_run, recomputed)


def test_both_stages_are_kept_and_reproduce_the_evaluation(
    tiny_run: xr.DataTree, tiny: RunConfig, runs: Path, tmp_path: Path, cache: Path
) -> None:
    probe = start(dataclasses.replace(tiny, name="probe"), tmp_path, cache)
    probe.writer.close("failed", "a probe, not a run")
    held_out = probe.held_out
    for stage, step in (("truebase", 6), ("base", 10)):
        assert tiny_run.attrs[f"{stage}_step"] == step
        model = checkpoint.load(runs / "tiny" / stage)
        results = evaluate.domains(model, held_out)
        recorded = tiny_run["evaluation"].sel(step=step)
        np.testing.assert_allclose(results["loss"], recorded["loss"], rtol=1e-6)
        np.testing.assert_array_equal(results["count"], recorded["count"])
        biases = torch.stack([router.bias_E for router in model.routers()])
        np.testing.assert_array_equal(biases, tiny_run["routing"]["bias"].sel(step=step))


def test_balancing_moves_the_bias_and_none_does_not(
    tiny_run: xr.DataTree, tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    assert float(abs(tiny_run["routing"]["bias"]).max()) > 0
    assert float(tiny_run["train"]["balance_loss"].min()) > 0
    config = override(tiny, {"balance.method": "none", "name": "none"})
    none = train(config, runs=tmp_path, cache=cache)
    assert float(abs(none["routing"]["bias"]).max()) == 0
    assert float(abs(none["train"]["balance_loss"]).max()) == 0


def test_batch_het_is_measured_and_zero_for_one_micro_batch(
    tiny_run: xr.DataTree, tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    assert float(tiny_run["train"]["batch_het"].min()) > 0
    config = dataclasses.replace(tiny, name="one", micro_batches=1)
    one = train(config, runs=tmp_path, cache=cache)
    assert float(abs(one["train"]["batch_het"]).max()) == 0


def test_a_loss_that_is_no_number_stops_the_run(
    tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    config = override(tiny, {"optim.muon_rate": 1e30, "optim.adamw_rate": 1e30, "name": "nan"})
    with pytest.raises(TrainingFailed, match=r"the loss (is|jumped)"):
        train(config, runs=tmp_path, cache=cache)
    run = open_run(tmp_path / "nan")
    assert run.attrs["status"] == "failed"
    assert run.attrs["reason"].startswith("the loss")
    assert not (tmp_path / "nan.nc").exists()


def test_a_loss_that_jumps_stops_the_run(tiny: RunConfig, tmp_path: Path, cache: Path) -> None:
    phases = (
        dataclasses.replace(tiny.phases[0], tokens=12 * 256, mixture={"arithmetic": 1.0}),
        dataclasses.replace(tiny.phases[0], tokens=4 * 256, mixture={"facts": 1.0}),
    )
    config = override(tiny, {"name": "spike", "spike": 0.2, "data.rsdb": 0, "phases": phases})
    with pytest.raises(TrainingFailed, match="the loss jumped to .* from a median of"):
        train(config, runs=tmp_path, cache=cache)


def test_a_taken_name_is_refused_before_training(
    tiny_run: xr.DataTree, tiny: RunConfig, runs: Path, cache: Path
) -> None:
    with pytest.raises(FileExistsError, match="'tiny' is complete"):
        train(dataclasses.replace(tiny, name="tiny"), runs=runs, cache=cache)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"micro_batches": 3},
            "micro_batches is 3; it must be a divisor of the batch's 8 rows",
        ),
        ({"threads": 0}, "threads is 0; it must be at least 1"),
        ({"name": "a/b"}, "name is 'a/b'; it must be a file name"),
        ({"device": "tpu"}, "device is 'tpu'; it must be one of cpu, cuda"),
        ({"spike": -1}, "spike is -1.0; it must be above zero"),
        ({"seed": -1}, "seed is -1; it must be zero or more"),
    ],
)
def test_settings_out_of_range_are_one_sentence(
    tiny: RunConfig, changes: dict, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        override(tiny, changes)


def test_the_golden_run(tiny: RunConfig, tmp_path: Path, cache: Path) -> None:
    """A change that should not alter results leaves this curve where it was."""
    run = train(dataclasses.replace(tiny, name="golden"), runs=tmp_path, cache=cache)
    golden = json.loads((Path(__file__).parent / "golden.json").read_text())
    np.testing.assert_allclose(run["train"]["loss"], golden["loss"], rtol=1e-5)
    last = run["routing"]["count"].isel(step=-1).values
    assert abs(last - np.array(golden["count"])).sum() <= 0.01 * last.sum()


def test_the_command_trains_from_a_configuration_file(tiny: RunConfig, tmp_path: Path) -> None:
    phase = dataclasses.replace(tiny.phases[0], tokens=256)
    config = dataclasses.replace(tiny, phases=(phase,), name=f"command-{tmp_path.name}")
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    command = [sys.executable, "-m", "trinity_lib.train", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip().splitlines()[-1])
    try:
        assert open_run(path).attrs["status"] == "complete"
    finally:
        path.unlink(missing_ok=True)
        import shutil

        shutil.rmtree(path.with_suffix(""), ignore_errors=True)


def test_what_the_corpus_warns_of_is_in_the_run(
    tiny: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dataclasses.replace(corpus.procedural(0), warnings=("the files changed.",))
    monkeypatch.setattr(corpus, "embedded", lambda cache: made)
    config = override(tiny, {"data.corpus": "embedded", "name": "warned"})
    config = dataclasses.replace(config, phases=tiny.phases[:1])
    with pytest.warns(UserWarning, match="the files changed"):
        run = train(config, runs=tmp_path, cache=cache)
    assert json.loads(run.attrs["warnings"]) == ["the files changed."]
    assert run.attrs["corpus_sha256"] == made.sha256


@pytest.mark.gpu
def test_a_run_on_cuda_is_the_same_twice(tiny: RunConfig, tmp_path: Path, cache: Path) -> None:
    config = dataclasses.replace(tiny, device="cuda")
    first, second = (
        train(dataclasses.replace(config, name=name), runs=tmp_path, cache=cache)
        for name in "ab"
    )
    same(first, second)
    assert first["train"]["loss"][-1] < first["train"]["loss"][0]
