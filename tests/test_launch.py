"""A notebook's parameters: coerced or refused in one sentence, before any work."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell

from tests.test_resume import cut
from tests.test_tokenizer import foreign
from trinity_lib import destination, disk, launch, metrics, plots, recipes, record
from trinity_lib.config import Refusal
from trinity_lib.record import Claim
from trinity_lib.train import CACHE, train

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "train.ipynb"


def test_none_takes_the_scales_own_values() -> None:
    assert launch.configure() == recipes.toy()
    assert launch.configure(scale="small", seed=0) == recipes.small()


def test_parameters_reach_their_settings() -> None:
    config = launch.configure(
        steps=60, seed=3, balance="sign", balance_rate=2e-2, num_experts=256, top_k=2, rsdb=0
    )
    assert sum(config.steps) == 60 and config.seed == 3
    assert (config.balance.method, config.balance.rate) == ("sign", 2e-2)
    assert (config.model.router.num_experts, config.model.router.top_k) == (256, 2)
    assert config.data.rsdb == 0


def test_the_learning_rate_keeps_the_ratio() -> None:
    toy = recipes.toy().optim
    half = launch.configure(learning_rate=toy.muon_rate / 2).optim
    assert half.muon_rate == toy.muon_rate / 2
    assert half.adamw_rate == pytest.approx(toy.adamw_rate / 2)
    adamw = launch.configure(optimizer="adamw", learning_rate=1e-3).optim
    assert adamw.adamw_rate == pytest.approx(1e-3)


def test_text_that_spells_a_value_is_taken() -> None:
    """papermill hands over `true` as text."""
    assert launch.configure(recompute="true", steps="12").recompute is True  # type: ignore[arg-type]
    assert launch.configure(recompute="false").recompute is False  # type: ignore[arg-type]


def test_every_single_setting_exists_and_is_reached() -> None:
    values = {"seed": 5, "balance": "none", "optimizer": "adamw", "device": "cpu", "name": "n"}
    values |= {"balance_rate": 0.5, "recompute": True, "record_choices": True, "compile": True}
    values |= {"experts": "torch"}
    for name, path in launch.SETTINGS.items():
        value = values.get(name, 8)
        found = launch.configure(**{name: value})
        for part in path.split("."):
            found = getattr(found, part)
        assert found == value, name


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the user's, with something wrong in most of its files."""
    top = tmp_path_factory.mktemp("here")
    text = "".join(f"Sentence {i} says that the cat sat on mat {i * 7}.\n" for i in range(900))
    write = {
        "good.txt": text.encode(),
        "short.txt": b"too short\n",
        "other.txt": b"nothing known " * 2000,
        "latin.txt": "café".encode("latin-1"),
        "zero.txt": b"a\0b",
        "empty.txt": b"",
        "image.png": b"\x89PNG",
        "broken.jsonl": b'{"text": "fine"}\n{"text": \n',
        "list.jsonl": b"[1, 2]\n",
        "body.jsonl": b'{"body": "fine"}\n',
        "seven.jsonl": b'{"text": 7}\n',
        "fake.parquet": b"PAR1",
        "words.json": b"{}",
        "good.nc": b"no run",
    }
    for name, content in write.items():
        (top / name).write_bytes(content)
    for folder in ("nothing", "runs"):
        (top / folder).mkdir()
    pd.DataFrame({"body": ["x"]}).to_parquet(top / "body.parquet")
    foreign(("</s>",)).save(str(top / "tokenizer.json"))
    foreign(("</s>",)).save(str(top / "five.json"))
    unknown = foreign(("[UNK]", "</s>"))
    unknown.save(str(top / "unknown.json"))
    return top


@pytest.fixture(scope="module")
def runs(here: Path) -> Path:
    """Three runs of four steps: complete, cut off after two, and then damaged."""
    folder = here / "runs"
    for name in ("complete", "begun", "damaged"):
        config = launch.configure(**DATA | {"data": str(here / "good.txt"), "name": name})
        if name == "complete":
            train(config, runs=folder)
        else:
            cut(config, folder, CACHE, 2, pytest.MonkeyPatch())
    weights = folder / "damaged" / "truebase" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


DATA = {"data": "good.txt", "vocab_size": 270, "steps": 4}
BAD: list[tuple[dict, str]] = [
    ({"scale": "larg"}, "scale is 'larg'; it must be one of toy, small, nano, mini, large"),
    ({"scale": ""}, "scale is ''; it must be one of toy"),
    ({"scale": 3}, "scale is 3; it must be text"),
    ({"scale": "nano", "mode": "train"}, "scale 'nano' needs 512 GPUs, and this machine has"),
    ({"scale": "mini", "mode": "train"}, "scale 'mini' needs 512 GPUs, and this machine has"),
    ({"scale": "large", "mode": "train"}, "scale 'large' needs 2,048 GPUs, and this machine"),
    ({"mode": "rehears"}, "mode is 'rehears'; it must be one of auto, train, rehearse"),
    ({"processes": 0}, "processes is 0; it must be at least 1"),
    ({"processes": 3}, "processes is 3; it must be such that every batch .16 rows. is a"),
    ({"processes": 4, "shard": 3}, "shard is 3; it must be a divisor of processes .4."),
    ({"processes": 4, "expert_parallel": 3}, "expert_parallel is 3; it must be a divisor of"),
    ({"processes": 2, "micro_batches": 1}, "micro_batches is 1; it must be a multiple of"),
    ({"processes": 2, "compile": True}, "compile is True; it must be false where a run has"),
    ({"processes": 1024, "batch": 1024}, "scale 'toy' needs 1,024 processes, and this machine"),
    ({"batch": 0}, "batch is 0; it must be at least 1"),
    ({"restarts": -1}, "restarts is -1; it must be zero or more"),
    ({"gpu": "B3000"}, "gpu is 'B3000'; it must be one of A100"),
    (
        {"scale": "nano", "data": "good.txt", "tokenizer": "five.json"},
        "five.json'; it must be a tokenizer of the model's vocabulary, 200,192 entries, not 6",
    ),
    ({"steps": 0}, "steps is 0; it must be at least 1"),
    ({"steps": -5}, "steps is -5; it must be at least 1"),
    ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
    ({"steps": "many"}, "steps is 'many'; it must be a whole number"),
    ({"steps": "false"}, "steps is 'false'; it must be a whole number"),
    ({"steps": True}, "steps is True; it must be a whole number"),
    ({"steps": "[1, 2]"}, r"steps is '\[1, 2\]'; it must be a whole number"),
    ({"steps": float("inf")}, "steps is inf; it must be a whole number"),
    ({"steps": 10**12}, "steps is 1000000000000; it must be at least 1, at most 1,000,000"),
    ({"seed": -1}, "seed is -1; it must be zero or more"),
    ({"seed": 0.5}, "seed is 0.5; it must be a whole number"),
    ({"seed": None}, "seed is None; it must be a whole number"),
    ({"seed": 2**63}, r"seed is 9223372036854775808; it must be below 2\*\*63"),
    (
        {"balance": "sing"},
        "balance is 'sing'; it must be one of none, switch, sequence, global, "
        "loss_free, sign, proportional, smebu, quantile, bip, phi, sinkhorn, expert_choice, "
        "dropout, hash",
    ),
    ({"balance_rate": -0.1}, "balance.rate is -0.1; it must be zero or more"),
    ({"balance_rate": "fast"}, "balance_rate is 'fast'; it must be a number"),
    ({"balance_rate": float("inf")}, "balance_rate is inf; it must be a finite number"),
    ({"num_experts": 0}, "num_experts is 0; it must be at least 1"),
    ({"num_experts": 3}, r"top_k is 4; it must be from 1 to num_experts \(3\)"),
    ({"num_experts": 10**6}, "scale 'toy' needs .* GB for weights, gradients and momentum"),
    ({"top_k": 0}, r"top_k is 0; it must be from 1 to num_experts \(32\)"),
    ({"top_k": 33}, r"top_k is 33; it must be from 1 to num_experts \(32\)"),
    ({"optimizer": "adam"}, "optimizer is 'adam'; it must be one of muon, adamw"),
    ({"learning_rate": 0}, "learning_rate is 0.0; it must be above zero"),
    ({"learning_rate": -1e-3}, "learning_rate is -0.001; it must be above zero"),
    ({"learning_rate": "nan"}, "learning_rate is nan; it must be a finite number"),
    ({"rsdb": -1}, "data.rsdb is -1; it must be 0"),
    ({"rsdb": 10**9}, "data.rsdb is 1000000000; it must be 0 .* up to 10,000,000"),
    ({"micro_batches": 0}, "micro_batches is 0; it must be at least 1"),
    ({"micro_batches": 5}, "micro_batches is 5; it must be a divisor of the batch's 16 rows"),
    ({"recompute": "maybe"}, "recompute is 'maybe'; it must be true or false"),
    ({"record_choices": 1}, "record_choices is 1; it must be true or false"),
    ({"checkpoint_every": 0}, "checkpoint_every is 0; it must be at least 1"),
    ({"experts": "fast"}, "experts is 'fast'; it must be one of auto, torch, native"),
    ({"compile": "maybe"}, "compile is 'maybe'"),
    ({"threads": 0}, "threads is 0; it must be at least 1"),
    ({"threads": 10**6}, "threads is 1000000; it must be at most 1024"),
    ({"device": "tpu"}, "device is 'tpu'; it must be one of cpu, cuda"),
    ({"name": "a/b"}, "name is 'a/b'; it must be a file name without slashes"),
    ({"name": ".hidden"}, "name is '.hidden'; it must be a file name without .* leading dot"),
    ({"name": "complete"}, "The run 'complete' is complete .*; choose another name"),
    ({"name": "begun"}, "The run 'begun' was begun before .*; choose another name, or resume"),
    ({"name": "live"}, "The run 'live' is being written by a live process; choose another"),
    ({"vocab_size": 100}, "vocab_size is 100; it must be at least 258, for single bytes"),
    (
        {**DATA, "vocab_size": 9999},
        "vocab_size is 9999; it must be at most .* this text yields",
    ),
    ({**DATA, "vocab_size": 2**24}, "needs .* GB for weights|at most .* what this text"),
    ({"vocab_size": 9, "tokenizer": "five.json"}, "vocab_size is 9; it must be the .* own 6"),
    ({"data": "none.txt"}, r"data is 'none.txt'; nothing is there \(looked in .* or .*\)"),
    ({"data": "none/*.jsonl"}, r"data is 'none/\*.jsonl'; nothing is there"),
    ({"data": ""}, "data is ''; it must be a path, or left out"),
    ({"data": 7}, "data is 7; it must be text"),
    ({"data": "nothing"}, "nothing'; it holds no .txt, .jsonl, .parquet file"),
    ({"data": "image.png"}, "image.png'; it must be a .txt, .jsonl, .parquet file or a folder"),
    ({"data": "empty.txt"}, "empty.txt'; it holds no text"),
    ({"data": "latin.txt"}, "latin.txt is not UTF-8 text: byte 3 is 0xe9"),
    ({"data": "zero.txt"}, "zero.txt is not text: it holds a zero byte"),
    ({"data": "broken.jsonl"}, "broken.jsonl, line 2, is not JSON"),
    ({"data": "list.jsonl"}, "list.jsonl, line 1, is not a JSON object with a field 'text'"),
    (
        {"data": "body.jsonl"},
        "line 1, has no field 'text'; its fields are body: set text_field",
    ),
    ({"data": "seven.jsonl"}, "seven.jsonl, line 1, holds no text in 'text' but 7"),
    ({"data": "fake.parquet"}, "fake.parquet is not a Parquet file that can be read"),
    ({"data": "body.parquet"}, "body.parquet has no field 'text'; its fields are body"),
    (
        {"data": "good.txt=1:2"},
        r"weight of good is \(1.0, 2.0\); it must be one number, or one",
    ),
    ({"data": "good.txt=0"}, "phase.mixture is {'good': 0.0}; it must be shares of 0 or more"),
    ({"data": "hf://nothing/../nothing"}, "it cannot be streamed: "),
    (
        {"text_field": "body"},
        "text_field is 'body'; it must be left out where there is no data",
    ),
    (
        {**DATA, "data": "short.txt"},
        "vocab_size is 270; it must be at most 26., what this text",
    ),
    (
        {"data": "short.txt", "tokenizer": "five.json"},
        "the validation text of 'short' is . tokens; it needs at least one row of 128",
    ),
    ({"tokenizer": "none.json"}, "tokenizer is 'none.json'; nothing is there"),
    ({"tokenizer": "nothing"}, "tokenizer is '.*nothing'; there is no such file"),
    ({"tokenizer": "words.json"}, "words.json is not a tokenizer.json"),
    ({"tokenizer": "image.png"}, "image.png is not a tokenizer.json"),
    (
        {"data": "other.txt", "tokenizer": "unknown.json"},
        "the tokenizer spells nothing of the validation text of 'other'; it must be one that",
    ),
    (
        {"num_experts": 10**30},
        "num_experts is 1000.*; it must be at least 1, at most 1,000,000",
    ),
    ({"vocab_size": 2**62}, "vocab_size is .*; it must be at least 1, at most 16,777,216"),
    ({"init": "runs/complete/base", "vocab_size": 0}, "vocab_size is 0; it must be the check"),
    ({"replay": "runs/complete/base"}, "it must be a run that recorded its choices|no run at"),
    ({"replay": "/"}, "replay is '/'|There is no run at"),
    ({"init": "x" * 5000}, "it is no path: "),
    ({"init": "none"}, "init is 'none'; nothing is there"),
    ({"init": "nothing"}, "nothing is no checkpoint: it has no config.json"),
    (
        {"init": "runs/damaged/truebase"},
        "truebase is damaged: model.safetensors has 1,000 bytes and",
    ),
    (
        {"init": "runs/complete/base", "num_experts": 64},
        "a checkpoint of another model: router.num_experts is 64 and was 32",
    ),
    ({"replay": "none.nc"}, "replay is 'none.nc'; nothing is there"),
    ({"replay": "good.nc"}, "good.nc is not a run file that can be read"),
    ({**DATA, "replay": "runs/complete.nc"}, "it must be a run that recorded its choices"),
    ({"resume": "maybe"}, "resume is 'maybe'; it must be true or false"),
    ({"resume": True}, "no incomplete run of this configuration to resume; leave resume out"),
    ({"resume": True, "name": "never"}, "There is no run 'never' to resume in"),
    ({"resume": True, "name": "complete", **DATA}, "The run 'complete' is complete"),
    (
        {"resume": True, "name": "begun", **DATA, "seed": 4},
        "seed is 4 and was 0. Only steps and the ranks may",
    ),
    ({"resume": True, "name": "damaged", **DATA}, "damaged: model.safetensors has 1,000 bytes"),
    ({"resume": True, "name": "live"}, "The run 'live' is being written by a live process"),
]


@pytest.fixture
def live(runs: Path):
    """A run that this process is writing."""
    claim = Claim(runs / "live")
    yield claim
    claim.release()


def test_the_table_is_long_enough() -> None:
    assert len(BAD) >= 60 and len({str(p) for p, _ in BAD}) == len(BAD)


@pytest.mark.parametrize(("parameters", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence_and_damages_nothing(
    here: Path,
    runs: Path,
    live: Claim,
    parameters: dict,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "RUNS", runs)
    monkeypatch.chdir(here)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    with pytest.raises(Refusal, match=sentence) as error:
        how = {name: parameters[name] for name in ("resume", "mode") if name in parameters}
        launch.run(launch.configure(**parameters), **how)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
    assert error.value._render_traceback_() == [str(error.value)]
    after = {path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file()}
    assert after == before


def test_a_cuda_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destination.torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refusal, match="device is 'cuda'; it must be cpu: this machine has no"):
        launch.configure(device="cuda")


def test_a_disk_that_is_too_small_is_said(
    here: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = disk.shutil.disk_usage
    monkeypatch.setattr(
        disk.shutil, "disk_usage", lambda path: usage(path)._replace(free=10**6)
    )
    monkeypatch.setattr(launch, "RUNS", runs)
    config = launch.configure(data=str(here / "good.txt"), vocab_size=270, name="big")
    with pytest.raises(disk.NoSpace, match=r"big has 1.0 MB free; 6 checkpoints of .* MB need"):
        launch.run(config)
    assert not (runs / "big").exists()


def test_sources_and_weights_reach_the_phases(here: Path) -> None:
    found = launch.configure(
        data=f"{here}/good.txt=3, {here}/body.jsonl=1:0:2", text_field="body"
    )
    assert [s.name for s in found.data.sources] == ["good", "body"]
    assert all(s.field == "body" for s in found.data.sources)
    assert [p.mixture for p in found.phases] == [
        {"good": 3.0, "body": 1.0},
        {"good": 3.0, "body": 0.0},
        {"good": 3.0, "body": 2.0},
    ]


def test_a_foreign_tokenizer_sets_the_models_vocabulary(here: Path) -> None:
    config = launch.configure(data=str(here / "good.txt"), tokenizer=str(here / "five.json"))
    assert config.model.vocab_size == 6
    assert config.data.tokenizer == str(here / "five.json")


def test_a_published_scale_takes_a_tokenizer_of_its_vocabulary(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sized:
        size = 200_005

    monkeypatch.setattr(launch.tokenizer, "load", lambda path: Sized())
    config = launch.configure(
        scale="large", data=str(here / "good.txt"), tokenizer=str(here / "five.json")
    )
    assert config.model == recipes.large().model
    assert [p.mixture for p in config.phases] == [{"good": 1.0}] * 3
    with pytest.raises(Refusal, match="scale 'large' needs 2,048 GPUs"):
        launch.run(config, mode="train")


@pytest.mark.parametrize("given", [{}, {"data": "good.txt"}])
def test_a_published_scale_needs_text_where_it_can_be_trained(
    here: Path, monkeypatch: pytest.MonkeyPatch, given: dict
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setattr(destination, "shortfall", lambda config: "")
    with pytest.raises(Refusal, match="scale 'nano' needs data and a tokenizer of 200,192"):
        launch.configure(scale="nano", mode="train", **given)


def test_first_weights_bring_their_tokenizer_and_vocabulary(runs: Path) -> None:
    folder = str(runs / "complete" / "base")
    config = launch.configure(init=folder)
    assert (config.init, config.data.tokenizer, config.model.vocab_size) == (
        folder,
        folder,
        270,
    )


def test_resuming_takes_the_runs_own_steps(
    here: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "RUNS", runs)
    own = {"data": str(here / "good.txt"), "vocab_size": 270}
    found = launch.configure(resume=True, name="begun", **own)
    assert sum(found.steps) == 4
    run = launch.run(found, resume="true")  # type: ignore[arg-type]
    assert run.attrs["status"] == "complete" and run["train"].sizes["step"] == 4


def test_a_misspelt_parameter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = InteractiveShell()
    shell.user_ns["In"] = ["", "steps = None", "# Parameters\nsteps = 3\nstpes = 3\n"]
    monkeypatch.setattr(launch, "get_ipython", lambda: shell)
    assert launch.injected() == ["steps", "stpes"]
    with pytest.raises(
        ValueError, match="no parameter 'stpes'; this notebook has scale, steps"
    ):
        launch.configure(steps=3)


def test_the_notebook_has_exactly_these_parameters() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    (tagged,) = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    names = [line.split(":")[0] for line in "".join(tagged["source"]).splitlines()]
    assert names == list(inspect.signature(launch.configure).parameters)


def test_a_rehearsals_folder_trains_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy's, on two ranks: only the scale is another than in a rehearsal of Large."""
    monkeypatch.setattr(launch, "RUNS", tmp_path)
    config = launch.configure(scale="toy", mode="rehearse", processes=2, steps=2, name="r")
    run = launch.run(config, mode="rehearse")
    assert run.attrs["status"] == "rehearsed" and run.attrs["ranks"] == 2
    assert run.attrs["reason"].startswith("REHEARSED, NOT TRAINED: it needs 2 ")
    for draw in (plots.loss, plots.expert_load):
        figure = draw(run)
        words = [axis.get_title() for axis in figure.axes]
        words += [text.get_text() for text in figure.texts]
        assert any("REHEARSED, NOT TRAINED" in each for each in words)
    assert "NOT TRAINED" in metrics.reading(run) and len(metrics.losses_table(run))
    script = tmp_path / "r" / "launch" / "torchrun.sh"
    done = subprocess.run(
        ["bash", str(script), "--runs", str(tmp_path)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert record.open_run(tmp_path / "r-run.nc").attrs["status"] == "complete"
