"""Kill and resume, for real: whatever the moment, the run ends as if nothing had happened."""

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr

import trinity_lib.train
from tests.test_train import same
from trinity_lib import checkpoint, disk, experts, onednn, preflight, resume
from trinity_lib.config import BadValue, Missing, Taken, from_json, override, to_json
from trinity_lib.record import Claim, open_run
from trinity_lib.run import RunConfig
from trinity_lib.session import Session, start
from trinity_lib.train import train


@pytest.fixture(scope="module")
def config(tiny: RunConfig) -> RunConfig:
    """Sixteen steps in two phases, a checkpoint every three."""
    changes = {"checkpoint_every": 3, "evaluate_every": 6, "record_every": 2}
    return steps(override(tiny, changes), 9, 7, "")


def steps(config: RunConfig, first: int, second: int, name: str) -> RunConfig:
    """The same run under another name, with this many steps in its phases."""
    phases = (
        dataclasses.replace(config.phases[0], tokens=first * 8 * 32),
        dataclasses.replace(config.phases[1], tokens=second * 8 * 32),
    )
    return dataclasses.replace(config, phases=phases, name=name)


@pytest.fixture(scope="module")
def whole(config: RunConfig, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A folder with the uninterrupted run."""
    runs = tmp_path_factory.mktemp("whole")
    train(dataclasses.replace(config, name="whole"), runs=runs, cache=cache)
    return runs


def assert_same_to_the_bit(whole: Path, runs: Path, name: str) -> None:
    """Everything recorded, and both stages' weights and optimiser state."""
    same(open_run(whole / "whole.nc"), open_run(runs / f"{name}.nc"))
    for stage in ("truebase", "base"):
        first, second = whole / "whole" / stage, runs / name / stage
        for old, new in (
            (checkpoint.load(first).state_dict(), checkpoint.load(second).state_dict()),
            (checkpoint.load_state(first).tensors, checkpoint.load_state(second).tensors),
        ):
            assert set(old) == set(new)
            for key, tensor in old.items():
                assert torch.equal(tensor, new[key]), f"{stage}: {key}"


def begin(config: RunConfig, runs: Path, cache: Path) -> subprocess.Popen:
    """Start or go on with a run in a process of its own."""
    file = runs / f"{config.name}.json"
    file.write_text(to_json(config))
    command = [sys.executable, "-m", "trinity_lib.train", "--config", str(file)]
    command += ["--runs", str(runs), "--cache", str(cache)]
    if (runs / config.name).exists():
        command.append("--resume")
    with (runs / f"{config.name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def end(process: subprocess.Popen, config: RunConfig, runs: Path) -> None:
    """Wait for a run that is to succeed."""
    assert process.wait() == 0, (runs / f"{config.name}.log").read_text()


class Kills(NamedTuple):
    """How often a run was killed, and how often of that while a checkpoint was written."""

    all: int
    saving: int


def kill(
    process: subprocess.Popen, config: RunConfig, runs: Path, moment: random.Random, wait: bool
) -> Kills:
    """SIGKILL once this process trains: at a random moment, or at its next checkpoint."""
    log, folder = runs / f"{config.name}.log", runs / config.name
    while process.poll() is None and f"{config.name}: " not in log.read_text():
        time.sleep(0.002)
    deadline = time.monotonic() + moment.uniform(0.0, 1.5)
    saving = False
    while process.poll() is None:
        names = [path.name for path in folder.glob(f".*.{process.pid}")]
        saving = any(name.startswith((".step-", ".truebase", ".base")) for name in names)
        if saving if wait else time.monotonic() > deadline:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    killed = process.wait() == -signal.SIGKILL
    return Kills(int(killed), int(killed and saving))


def run_through_kills(
    config: RunConfig, runs: Path, cache: Path, moment: random.Random, kills: int
) -> Kills:
    """Kill a run up to `kills` times and let it end; how often it really was killed."""
    done = Kills(0, 0)
    folder = runs / config.name
    while not (runs / f"{config.name}.nc").exists():
        process = begin(config, runs, cache)
        if done.all == kills:
            end(process, config, runs)
            assert not list(folder.glob("step-*")) and not list(folder.glob(".*"))
            return done
        more = kill(process, config, runs, moment, bool(done.all % 2))
        done = Kills(done.all + more.all, done.saving + more.saving)
        if more.all and not (runs / f"{config.name}.nc").exists():
            tree = open_run(folder)
            assert tree.attrs["status"] == "running" and "killed" in tree.attrs["reason"]
            for group in ("train", "layers"):
                steps = tree[group].step.values if group in tree else []
                assert list(steps) == list(range(1, len(steps) + 1))
    return done


def test_a_killed_run_resumes_to_the_bit(
    config: RunConfig, whole: Path, tmp_path: Path, cache: Path
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"moments drawn with seed {seed}")
    moment, done = random.Random(seed), Kills(0, 0)
    for number in range(10):  # a run on a busy machine may end before it is killed
        killed = dataclasses.replace(config, name=f"killed-{number}")
        more = run_through_kills(killed, tmp_path, cache, moment, 3)
        assert_same_to_the_bit(whole, tmp_path, killed.name)
        done = Kills(done.all + more.all, done.saving + more.saving)
        if done.all >= 2 and done.saving >= 1:
            return
    raise AssertionError(f"ten runs were killed too seldom: {done}")


@pytest.mark.slow
def test_fifty_kills_at_random_moments(
    config: RunConfig, whole: Path, tmp_path: Path, cache: Path
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"moments drawn with seed {seed}")
    moment = random.Random(seed)
    done = saving = number = 0
    while done < 50:
        number += 1
        killed = dataclasses.replace(config, name=f"killed-{number}")
        kills = run_through_kills(killed, tmp_path, cache, moment, min(5, 50 - done))
        done, saving = done + kills.all, saving + kills.saving
        assert_same_to_the_bit(whole, tmp_path, killed.name)
    print(f"{done} kills, {saving} of them while a checkpoint was written")
    assert saving >= 15


class Stop(Exception):
    """Stands for whatever ends a process between two steps."""


def cut(
    config: RunConfig, runs: Path, cache: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train in this process until a step is due that is not to be taken."""
    from trinity_lib import train as loop

    step = loop.optimiser_step

    def until(session, batch):
        if session.step == at:
            raise Stop
        return step(session, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimiser_step", until)
        with pytest.raises(Stop):
            train(config, runs=runs, cache=cache)


@pytest.mark.parametrize("at", [0, 2, 3, 8, 9, 11, 15])
def test_any_step_is_a_place_to_go_on_from(
    config: RunConfig,
    whole: Path,
    tmp_path: Path,
    cache: Path,
    at: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first checkpoint, at one, behind one, and around a phase's end."""
    named = dataclasses.replace(config, name="cut")
    cut(named, tmp_path, cache, at, monkeypatch)
    partial = open_run(tmp_path / "cut")
    assert partial.attrs["status"] == "failed" and "Stop" in partial.attrs["reason"]
    run = train(named, runs=tmp_path, cache=cache, resumes=True)
    assert_same_to_the_bit(whole, tmp_path, "cut")
    (past,) = json.loads(run.attrs["resumed"])
    assert past["step"] == 3 * (at // 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.optimizer": "adamw"},
        {"balance.method": "sign"},
        {"data.rsdb": 0},
        {"dtype": "float64"},
        {"micro_batches": 4, "recompute": True},
        {"record_choices": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_kind_of_state_resumes(
    config: RunConfig,
    tmp_path: Path,
    cache: Path,
    changes: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = override(config, {**changes, "name": "whole"})
    train(changed, runs=tmp_path / "a", cache=cache)
    named = dataclasses.replace(changed, name="cut")
    cut(named, tmp_path / "b", cache, 10, monkeypatch)
    train(named, runs=tmp_path / "b", cache=cache, resumes=True)
    assert_same_to_the_bit(tmp_path / "a", tmp_path / "b", "cut")
    if "record_choices" in changes:
        trees = [open_run(tmp_path / f) for f in ("a/whole.nc", "b/cut.nc")]
        xr.testing.assert_equal(*(tree["choices"].to_dataset() for tree in trees))


def test_checkpoints_rotate_and_phase_ends_stay(
    config: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(dataclasses.replace(config, name="cut"), tmp_path, cache, 8, monkeypatch)
    kept = sorted(path.parent.name for path in (tmp_path / "cut").glob("*/manifest.json"))
    assert kept == ["step-00000003", "step-00000006"]
    cut(dataclasses.replace(config, name="far"), tmp_path, cache, 15, monkeypatch)
    kept = sorted(path.parent.name for path in (tmp_path / "far").glob("*/manifest.json"))
    assert kept == ["step-00000012", "step-00000015", "truebase"]
    for name in kept:
        checkpoint.verify(tmp_path / "far" / name)


@pytest.mark.parametrize("keep", [1, 3, 4])
def test_as_many_are_kept_as_asked_for(tmp_path: Path, keep: int) -> None:
    for step in range(1, 6):
        (tmp_path / f"step-{step:08d}").mkdir()
        checkpoint.rotate(tmp_path, keep)
        left = sorted(int(path.name[-1]) for path in tmp_path.iterdir())
        assert left == list(range(max(1, step - keep + 1), step + 1))


def test_a_configuration_from_json_is_the_same_run(
    config: RunConfig, whole: Path, tmp_path: Path, cache: Path, monkeypatch
) -> None:
    """JSON sorts a mixture's keys; the order of documents must not hang on theirs."""
    again = from_json(RunConfig, to_json(config))
    assert list(again.phases[0].mixture) != list(config.phases[0].mixture)
    train(dataclasses.replace(again, name="json"), runs=tmp_path, cache=cache)
    assert_same_to_the_bit(whole, tmp_path, "json")
    cut(dataclasses.replace(config, name="cut"), tmp_path, cache, 5, monkeypatch)
    train(dataclasses.replace(again, name="cut"), runs=tmp_path, cache=cache, resumes=True)
    assert_same_to_the_bit(whole, tmp_path, "cut")


def test_a_phase_is_not_another_on_resume(
    config: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dataclasses.replace(config, name="cut")
    cut(named, tmp_path, cache, 4, monkeypatch)
    later = dataclasses.replace(config.phases[1], mixture={"facts": 0.9, "arithmetic": 0.1})
    other = dataclasses.replace(named, phases=(config.phases[0], later))
    sentence = "phase 2: mixture is .*0.9.* and was .*0.5.*. Only steps and the"
    for own_steps in (False, True):
        with pytest.raises(BadValue, match=sentence):
            resume.find(other, tmp_path, own_steps=own_steps)
    with pytest.raises(Missing, match="no incomplete run of this configuration"):
        resume.find(dataclasses.replace(other, name=""), tmp_path)


def test_open_documents_are_kept_by_their_number(
    config: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by their tokens: a book that is open 64 times would be stored as often."""
    cut(dataclasses.replace(config, name="cut"), tmp_path, cache, 4, monkeypatch)
    state = checkpoint.load_state(tmp_path / "cut" / "step-00000003")
    assert state.tensors["rows.tokens"].numel() == 0
    assert 4 < len(state.facts["rows"]["open"]) <= 8


def test_more_steps_may_be_asked_for_as_long_as_the_past_stays(
    config: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(steps(config, 11, 3, "whole"), runs=tmp_path / "a", cache=cache)
    cut(steps(config, 9, 7, "cut"), tmp_path / "b", cache, 7, monkeypatch)
    run = train(steps(config, 11, 3, "cut"), runs=tmp_path / "b", cache=cache, resumes=True)
    assert run["train"].sizes["step"] == 14
    assert_same_to_the_bit(tmp_path / "a", tmp_path / "b", "cut")

    cut(steps(config, 9, 7, "far"), tmp_path / "b", cache, 13, monkeypatch)
    before = sorted(path.name for path in (tmp_path / "b" / "far").rglob("*"))
    for other, sentence in (
        (steps(config, 11, 7, "far"), "steps is 18; that would change step 9, which the run"),
        (steps(config, 9, 12, "far"), "steps is 21; that would change step 11"),
        (steps(config, 4, 5, "far"), "steps is 9; it must be at least 12, what the run 'far'"),
    ):
        with pytest.raises(BadValue, match=sentence):
            train(other, runs=tmp_path / "b", cache=cache, resumes=True)
    assert sorted(path.name for path in (tmp_path / "b" / "far").rglob("*")) == before


def test_the_newest_incomplete_run_of_the_configuration_is_found(
    config: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Missing, match="no incomplete run of this configuration to resume"):
        train(config, runs=tmp_path, cache=cache, resumes=True)
    for name in ("first", "second"):
        cut(dataclasses.replace(config, name=name), tmp_path, cache, 4, monkeypatch)
    file = tmp_path / "second" / "run.json"
    file.write_text(file.read_text().replace('"created_at": "2', '"created_at": "3'))
    other = override(config, {"name": "other", "seed": 1})
    cut(other, tmp_path, cache, 4, monkeypatch)
    assert resume.find(config, tmp_path).name == "second"
    assert resume.find(override(config, {"seed": 1}), tmp_path).name == "other"
    held = Claim(tmp_path / "second", resume=True)
    assert resume.find(config, tmp_path).name == "first"
    held.release()
    fewer = dataclasses.replace(config, phases=config.phases[:1])
    assert resume.find(fewer, tmp_path, own_steps=True).phases == config.phases
    assert resume.find(fewer, tmp_path).phases == fewer.phases
    run = train(config, runs=tmp_path, cache=cache, resumes=True)
    assert run.attrs["name"] == "second" and run.attrs["status"] == "complete"
    with pytest.raises(Taken, match="'second' is complete"):
        named = dataclasses.replace(config, name="second")
        train(named, runs=tmp_path, cache=cache, resumes=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "cannot be resumed so: seed is 1 and was 0. Only steps and the"),
        ({"optim.muon_rate": 0.5}, "optim.muon_rate is 0.5 and was 0.02"),
        ({"model.router.num_experts": 16}, "model.router.num_experts is 16 and was 8"),
        ({"balance.method": "none"}, "balance.method is 'none' and was 'smebu'"),
        ({"threads": 2}, "threads is 2 and was 1"),
        ({"data.rsdb": 7}, "data.rsdb is 7 and was 4"),
    ],
)
def test_nothing_else_may_change(
    config: RunConfig,
    whole: Path,
    tmp_path: Path,
    cache: Path,
    changes: dict,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = dataclasses.replace(config, name="cut")
    cut(named, tmp_path, cache, 4, monkeypatch)
    with pytest.raises(BadValue, match=sentence) as error:
        train(override(named, changes), runs=tmp_path, cache=cache, resumes=True)
    assert "\n" not in str(error.value)
    train(named, runs=tmp_path, cache=cache, resumes=True)  # nothing was damaged
    assert_same_to_the_bit(whole, tmp_path, "cut")


def truncate(folder: Path) -> None:
    file = folder / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-7] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def lose(folder: Path) -> None:
    (folder / "state.json").unlink()


def tear_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"step": 3, "fi')


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def tear_run(folder: Path) -> None:
    (folder.parent / "run.json").write_text('{"name"')


def age_run(folder: Path) -> None:
    file = folder.parent / "run.json"
    file.write_text(file.read_text().replace("z_loss", "zloss"))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "step-00000003 is damaged: state.safetensors has .* bytes and was written"),
        (flip, "step-00000003 is damaged: model.safetensors has changed"),
        (lose, "step-00000003 is damaged: state.json is missing"),
        (tear_manifest, "manifest.json is damaged"),
        (empty_manifest, "manifest.json is damaged"),
        (tear_run, "run.json is damaged"),
        (age_run, "'cut' is of another version of this program: .* no setting 'zloss'"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    config: RunConfig,
    tmp_path: Path,
    cache: Path,
    damage,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = dataclasses.replace(config, name="cut")
    cut(named, tmp_path, cache, 4, monkeypatch)
    damage(tmp_path / "cut" / "step-00000003")
    with pytest.raises(BadValue, match=sentence) as error:
        train(named, runs=tmp_path, cache=cache, resumes=True)
    assert "\n" not in str(error.value)
    assert not disk.locked(tmp_path / "cut" / "lock")


def test_changed_text_is_refused(
    config: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dataclasses.replace(config, name="cut")
    cut(named, tmp_path, cache, 4, monkeypatch)
    file = tmp_path / "cut" / "run.json"
    attributes = open_run(tmp_path / "cut").attrs
    file.write_text(file.read_text().replace(attributes["corpus_sha256"], "0" * 64))
    with pytest.raises(BadValue, match="its corpus has changed .* and was 000000000000"):
        train(named, runs=tmp_path, cache=cache, resumes=True)


def test_another_backend_is_refused(
    config: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` found the C++ operator when the run began, and does not on this machine."""
    named = dataclasses.replace(config, name="cut", dtype="float32")
    cut(named, tmp_path, cache, 4, monkeypatch)
    monkeypatch.setattr(experts, "_native", lambda: "no compiler")
    with pytest.raises(BadValue, match="its experts was 'native', and here it is 'torch'"):
        train(named, runs=tmp_path, cache=cache, resumes=True)


def test_another_library_is_refused_and_a_new_run_is_warned(
    config: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dataclasses.replace(config, name="cut", dtype="float32")
    assert not preflight.fallback(named)
    cut(named, tmp_path, cache, 4, monkeypatch)
    monkeypatch.setattr(onednn, "AVAILABLE", False)
    with pytest.raises(BadValue, match="its dense products was 'oneDNN .* it is 'torch's BLAS"):
        train(named, runs=tmp_path, cache=cache, resumes=True)
    (said,) = preflight.fallback(named)
    assert said.startswith("Large products take longer") and "does not offer oneDNN" in said


def test_two_writers_never_share_a_run(config: RunConfig, tmp_path: Path, cache: Path) -> None:
    named = dataclasses.replace(config, name="live")
    process = begin(named, tmp_path, cache)
    while process.poll() is None and not list(tmp_path.glob("live/step-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    try:
        assert disk.locked(tmp_path / "live" / "lock")
        for resumes in (False, True):
            begun = time.monotonic()
            with pytest.raises(Taken, match="'live' is being written by a live process"):
                train(named, runs=tmp_path, cache=cache, resumes=resumes)
            assert time.monotonic() - begun < 10
    finally:
        process.send_signal(signal.SIGCONT)
    end(process, named, tmp_path)
    assert open_run(tmp_path / "live.nc").attrs["status"] == "complete"


def test_nothing_to_resume_is_said(config: RunConfig, tmp_path: Path, cache: Path) -> None:
    named = dataclasses.replace(config, name="none")
    with pytest.raises(Missing, match="no run 'none' to resume"):
        train(named, runs=tmp_path, cache=cache, resumes=True)
    assert not list(tmp_path.iterdir())


def test_a_run_killed_before_its_record_begins_anew(
    config: RunConfig, whole: Path, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "lock").touch()
    named = dataclasses.replace(config, name="early")
    train(named, runs=tmp_path, cache=cache, resumes=True)
    assert_same_to_the_bit(whole, tmp_path, "early")


def test_counters_and_losses_come_back(
    config: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dataclasses.replace(config, name="cut")
    cut(named, tmp_path, cache, 8, monkeypatch)
    session = start(named, tmp_path, cache, resumes=True)
    assert (session.step, session.tokens) == (6, 6 * 8 * 32)
    recorded = open_run(tmp_path / "cut")["train"]
    assert recorded.step.values.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(session.losses, recorded["loss"])
    session.writer.close("failed", "a probe, not a run")


STATEFUL = ("quantile", "bip", "phi", "dropout", "expert_choice")


@pytest.mark.parametrize("method", STATEFUL)
def test_every_kind_of_balancer_goes_on_to_the_bit(
    method: str, config: RunConfig, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a method keeps beside the bias is saved, and recomputed blocks choose alike."""
    changes = {"balance.method": method, "balance.rate": 0.05, "checkpoint_every": 2}
    config = steps(override(config, {**changes, "recompute": True}), 4, 3, "whole")
    train(config, runs=tmp_path, cache=cache)
    cut = dataclasses.replace(config, name="cut")
    record = trinity_lib.train._record

    def stop(session: Session, *rest: Any) -> None:
        if session.step == 6:
            raise KeyboardInterrupt
        record(session, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trinity_lib.train, "_record", stop)
        train(cut, runs=tmp_path, cache=cache)
    train(cut, runs=tmp_path, cache=cache, resumes=True)
    assert json.loads(open_run(tmp_path / "cut.nc").attrs["resumed"])[0]["step"] == 4
    assert_same_to_the_bit(tmp_path, tmp_path, "cut")
