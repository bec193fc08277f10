"""What is built before a step: first weights, and what is refused before any work."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from tests.test_resume import cut
from tests.test_train import same
from trinity_lib import checkpoint, disk, experts
from trinity_lib.config import BadValue, Missing, override, to_json
from trinity_lib.record import open_run
from trinity_lib.run import RunConfig
from trinity_lib.session import start
from trinity_lib.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(tiny: RunConfig, runs: Path, cache: Path) -> xr.DataTree:
    return train(dataclasses.replace(tiny, name="first"), runs=runs, cache=cache)


def begun_from(tiny: RunConfig, runs: Path, stage: str, **changes: object) -> RunConfig:
    folder = str(runs / "first" / stage)
    name = f"from-{stage}-{len(changes)}"
    return override(tiny, {"name": name, "init": folder, "data.tokenizer": folder, **changes})


@pytest.mark.parametrize("method", ["smebu", "none"])
def test_a_run_begins_with_a_checkpoints_weights_and_biases(
    first: xr.DataTree, tiny: RunConfig, runs: Path, cache: Path, tmp_path: Path, method: str
) -> None:
    config = begun_from(tiny, runs, "truebase", **{"balance.method": method})
    run = train(config, runs=tmp_path, cache=cache)
    at_start = run["evaluation"].sel(step=0)
    at_end = first["evaluation"].sel(step=6)
    np.testing.assert_array_equal(at_start["loss"], at_end["loss"])
    np.testing.assert_array_equal(at_start["count"], at_end["count"])
    assert run.attrs["init_sha256"] == checkpoint.sha256(Path(config.init))
    bias = run["routing"]["bias"]
    before = first["routing"]["bias"].sel(step=6)
    step = abs(bias.sel(step=1) - before).max()
    assert 0 < step < 0.02 if method == "smebu" else (bias == before).all()
    assert float(run["train"]["loss"][0]) < float(first["train"]["loss"][0]) - 0.5


def test_a_resumed_run_needs_its_first_weights_no_more(
    first: xr.DataTree,
    tiny: RunConfig,
    runs: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(runs / "first" / "truebase", folder)
    settings = {"init": str(folder), "checkpoint_every": 2, "name": "cut"}
    settings |= {"data.tokenizer": str(runs / "first" / "truebase")}
    config = override(tiny, settings)
    cut(config, tmp_path, cache, 5, monkeypatch)
    shutil.rmtree(folder)
    run = train(config, runs=tmp_path, cache=cache, resumes=True)
    assert run.attrs["status"] == "complete" and run["train"].sizes["step"] == 10
    assert run.attrs["init_sha256"] == checkpoint.sha256(runs / "first" / "truebase")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.router.num_experts": 16}, "another model: router.num_experts is 16 and was 8"),
        ({"model.width": 64}, "a checkpoint of another model: width is 64 and was 32"),
        (
            {"data.tokenizer": "", "seed": 0, "model.vocab_size": 300},
            "vocab_size is 300 and was",
        ),
        ({"init": "/nowhere"}, "/nowhere is no checkpoint: it has no config.json"),
    ],
)
def test_weights_of_another_model_are_refused(
    first: xr.DataTree,
    tiny: RunConfig,
    runs: Path,
    cache: Path,
    tmp_path: Path,
    changes: dict,
    sentence: str,
) -> None:
    with pytest.raises((BadValue, Missing), match=sentence) as error:
        train(begun_from(tiny, runs, "base", **changes), runs=tmp_path, cache=cache)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_weights_of_another_tokenizer_are_refused(
    first: xr.DataTree, tiny: RunConfig, runs: Path, cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "tokenizer.json"
    text = (runs / "first" / "base" / "tokenizer.json").read_text()
    other.write_text(text.replace("<|end|>", "<|fin|>"))
    config = begun_from(tiny, runs, "base", **{"data.tokenizer": str(other)})
    with pytest.raises(BadValue, match="whose tokenizer is another than this run's: give tok"):
        train(config, runs=tmp_path / "runs", cache=cache)


def test_too_little_space_is_refused_before_a_folder_is_made(
    tiny: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    usage = disk.shutil.disk_usage
    monkeypatch.setattr(
        disk.shutil,
        "disk_usage",
        lambda path: asked.append(path) or usage(path)._replace(free=99),
    )
    config = dataclasses.replace(tiny, name="big")
    with pytest.raises(disk.NoSpace, match="big has 0.0 MB free; 5 checkpoints of .* MB need"):
        train(config, runs=tmp_path / "runs", cache=cache)
    assert asked and not list(tmp_path.glob("runs/*"))


def test_the_space_asked_for_is_what_checkpoints_take(
    first: xr.DataTree, tiny: RunConfig, runs: Path, tmp_path: Path, cache: Path, monkeypatch
) -> None:
    asked = []
    monkeypatch.setattr(
        disk, "require_space", lambda folder, needed, what: asked.append(needed)
    )
    probe = start(dataclasses.replace(tiny, name="probe"), tmp_path, cache)
    probe.writer.close("failed", "a probe, not a run")
    folder = runs / "first" / "base"
    real = sum((folder / f"{f}.safetensors").stat().st_size for f in ("model", "state"))
    copies = len(tiny.phases) + tiny.keep + 1
    assert asked[0] == pytest.approx(copies * real, rel=0.15)


FULL = """
import resource, sys
from pathlib import Path
from trinity_lib import train as loop
keep = loop._keep
def then_full(session, name):
    keep(session, name)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
loop._keep = then_full
loop.main()
"""


def test_a_disk_that_fills_later_stops_at_the_last_good_checkpoint(
    first: xr.DataTree, tiny: RunConfig, runs: Path, tmp_path: Path, cache: Path
) -> None:
    """The kernel itself refuses larger files, from the first checkpoint on."""
    config = override(tiny, {"name": "full", "checkpoint_every": 2})
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    where = ["--config", str(file), "--runs", str(tmp_path), "--cache", str(cache)]
    done = subprocess.run(
        [sys.executable, "-c", FULL, *where], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"The disk of {tmp_path / 'full'} is full at step 4; its last checkpoint is "
        "step-00000002: free some space and resume."
    )
    partial = open_run(tmp_path / "full")
    assert partial.attrs["status"] == "failed" and "is full" in partial.attrs["reason"]
    assert not list((tmp_path / "full").rglob(".*"))
    checkpoint.verify(tmp_path / "full" / "step-00000002")
    same(first, train(config, runs=tmp_path, cache=cache, resumes=True))


def test_a_model_beyond_this_machines_memory_is_refused(
    tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    config = override(tiny, {"model.router.num_experts": 10**6})
    with pytest.raises(
        BadValue, match="needs .* GB for weights, .* this machine has .* GB of m"
    ):
        train(config, runs=tmp_path, cache=cache)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said(tiny: RunConfig, cache: Path) -> None:
    with pytest.raises(BadValue, match="/proc/runs cannot be written: No such file"):
        train(tiny, runs=Path("/proc/runs"), cache=cache)


def test_a_refused_run_leaves_nothing_behind(
    tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    config = override(tiny, {"name": "x", "data.sources": [{"name": "a", "path": "/none.txt"}]})
    with pytest.raises(Missing, match="data is '/none.txt'"):
        train(config, runs=tmp_path / "runs", cache=cache)
    assert not list(tmp_path.glob("runs/*"))


def test_state_has_every_optimiser_tensor(
    first: xr.DataTree, tiny: RunConfig, runs: Path
) -> None:
    state = checkpoint.load_state(runs / "first" / "base")
    model = checkpoint.load(runs / "first" / "base")
    for name, parameter in model.named_parameters():
        keys = {k for k in state.tensors if k.endswith(f".{name}")}
        assert len(keys) in (1, 3), name  # Muon's momentum, or AdamW's step and two moments
        largest = max(state.tensors[k].numel() for k in keys)
        assert largest == parameter.numel()
    assert state.facts["step"] == 10 and len(state.facts["losses"]) == 10
    assert torch.equal(
        state.tensors["balancer.bias"], torch.stack([r.bias_E for r in model.routers()])
    )


def test_a_slower_backend_is_told(
    tiny: RunConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_native", lambda: "no C++ compiler")
    config = dataclasses.replace(tiny, name="slower", dtype="float32")
    sentence = "torch computes the experts, not native: no C\\+\\+ compiler."
    with pytest.warns(UserWarning, match=sentence):
        session = start(config, tmp_path, cache)
    session.writer.close("failed", "a test")
    assert "not native" in open_run(tmp_path / "slower").attrs["warnings"]
