"""The notebook's parameters: coerced or refused in one sentence; the notebook itself."""

import ast
import inspect
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest

from tests import conversing
from trinity_lib import posttrain_launch
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import Refusal, to_json
from trinity_lib.lora import LoraConfig
from trinity_lib.model import ModelConfig
from trinity_lib.optim import OptimConfig
from trinity_lib.posttrain_config import PosttrainConfig
from trinity_lib.record import open_run
from trinity_lib.train import RUNS

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "posttrain.ipynb"


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelConfig) -> Path:
    """A released checkpoint, and beside it what is wrong with others."""
    folder = conversing.base(tiny_model, tmp_path_factory.mktemp("init") / "base")
    bare = folder.with_name("bare")
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    own = folder.with_name("own")
    shutil.copytree(folder, own)
    mine = conversing.settings(own, balance=conversing.ON, sequence_length=48)
    (own / "run_config.json").write_text(to_json(mine))
    conversing.jsonl(folder.with_name("good.jsonl"), [{"prompt": "a", "answer": "b"}])
    return folder


def test_defaults_are_the_published_ones_of_a_released_checkpoint(init: Path) -> None:
    config = posttrain_launch.configure(init=str(init))
    assert [(s.kind, s.steps) for s in config.stages] == list(posttrain_launch.STEPS.items())
    assert config.optim == OptimConfig() and config.rate == 0.1
    assert config.balance == BalanceConfig() and config.lora is None
    plain = PosttrainConfig(init="x", stages=config.stages)
    assert (config.data, config.preferences) == (plain.data, plain.preferences)


def test_a_runs_own_settings_are_taken(init: Path) -> None:
    config = posttrain_launch.configure(init=str(init.with_name("own")))
    assert config.optim == conversing.OPTIM and config.balance == conversing.ON
    assert config.sequence_length == 48


def test_parameters_reach_their_settings(init: Path) -> None:
    good = str(init.with_name("good.jsonl"))
    config = posttrain_launch.configure(
        init=str(init.with_name("own")), stages="dpo, grpo", steps="7, 3", batch=5,
        data=good, preferences="facts", problems=f"digits, {good}", balance="frozen",
        learning_rate=1e-3, questions="9", seed=4, name="n", lora="true", lora_rank=2,
        lora_on="router", sequence_length=50,
    )  # type: ignore[arg-type]  # fmt: skip
    assert [(s.kind, s.steps, s.batch) for s in config.stages] == [
        ("dpo", 7, 5),
        ("grpo", 3, 5),
    ]
    assert config.data == (good,) and config.problems == ("digits", good)
    assert config.balance.method == "none" and config.lora == LoraConfig(
        on=("router",), rank=2, alpha=4.0
    )
    own = conversing.OPTIM.adamw_rate
    assert config.rate * config.lora.rate * own == pytest.approx(1e-3)
    assert (config.questions, config.seed, config.sequence_length) == (9, 4, 50)
    whole = posttrain_launch.configure(init=str(init), learning_rate=5e-4)
    assert whole.rate * whole.optim.muon_rate == pytest.approx(5e-4)


BAD: list[tuple[dict, str]] = [
    ({"init": None}, "init is None; it must be a checkpoint folder to begin with"),
    ({"init": ""}, "init is ''; it must be a checkpoint folder"),
    ({"init": 3}, "init is 3; it must be text"),
    ({"init": "nowhere"}, "init is 'nowhere'; nothing is there"),
    ({"init": "bare"}, "init is .*bare.*, which has no tokenizer.json"),
    ({"init": ".."}, "is no checkpoint: it has no config.json"),
    ({"stages": "sft, xyz"}, "stages is 'sft, xyz'; .* some of sft, dpo, grpo, not 'xyz'.$"),
    ({"stages": "sft,dpoo"}, r"stages is 'sft,dpoo'; .*, not 'dpoo' \(did you mean 'dpo'\?\)"),
    ({"stages": ""}, "stages is ''; it must be some of sft, dpo, grpo"),
    ({"stages": "sft, sft"}, "stages is 'sft, sft'; it must be stages named once each"),
    ({"steps": "1, 2"}, r"steps is \[1, 2\]; it must be one number, or one for each of the 3"),
    ({"steps": "many"}, "steps is 'many'; it must be a whole number"),
    ({"steps": 0}, "sft.steps is 0; it must be from 1 to 1,000,000"),
    ({"batch": -1}, "sft.batch is -1; it must be from 1"),
    ({"data": "facs"}, "data is 'facs'; it must be some of facts, .*, or .jsonl files"),
    ({"data": ""}, "data is ''; it must be some of facts"),
    ({"data": "none.jsonl"}, "data is 'none.jsonl'; nothing is there"),
    ({"preferences": "none.jsonl"}, "preferences is 'none.jsonl'; nothing is there"),
    ({"problems": 7}, "problems is 7; it must be text"),
    ({"sequence_length": 0}, "sequence_length is 0; it must be 8 or more"),
    ({"lora": "maybe"}, "lora is 'maybe'; it must be true or false"),
    ({"lora_rank": 0}, "lora.rank is 0; it must be at least 1"),
    ({"lora_on": "head"}, "lora_on is 'head'; it must be one of attention, experts, router"),
    ({"lora_on": ""}, "lora.on is .*; it must be at least one part"),
    ({"balance": "smebu"}, "balance is 'smebu'; it must be one of frozen, on"),
    ({"learning_rate": 0}, "learning_rate is 0.0; it must be above zero"),
    ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
    ({"questions": 0}, "questions is 0; it must be at least 1"),
    ({"seed": -1}, "seed is -1; it must be zero or more"),
    ({"threads": 0}, "threads is 0; it must be at least 1"),
    ({"device": "tpu"}, "device is 'tpu'; it must be one of cpu, cuda"),
    ({"name": "a/b"}, "name is 'a/b'; it must be a file name"),
    ({"resume": True}, "name is ''; it must be the run to go on with, where resume is true"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=range(len(BAD)))
def test_bad_input_is_refused_in_one_sentence(
    init: Path, changes: dict, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(init.parent)
    with pytest.raises(Refusal, match=sentence) as caught:
        posttrain_launch.configure(**{"init": str(init)} | changes)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_the_description_says_what_is_about_to_run(init: Path) -> None:
    config = posttrain_launch.configure(init=str(init), lora=True, balance="frozen")
    text = posttrain_launch.describe(config)
    assert "8 experts, top-2" in text and "sft 120 x 16, dpo 30 x 16" in text
    assert "adapters of rank 8 on attention, experts" in text and "balance frozen" in text


def test_the_notebooks_parameters_are_the_functions() -> None:
    inspected = papermill.inspect_notebook(str(NOTEBOOK))
    given = {name: ast.literal_eval(each["default"]) for name, each in inspected.items()}
    asked = inspect.signature(posttrain_launch.configure).parameters
    assert given == {name: each.default for name, each in asked.items()}


def test_the_notebook_runs_from_a_checkpoint(init: Path, tmp_path: Path) -> None:
    name = f"test-posttrain-{tmp_path.parent.name}-{time.time_ns()}"
    words = [sys.executable, "-m", "papermill", str(NOTEBOOK), str(tmp_path / "out.ipynb")]
    words += ["--no-progress-bar", "-p", "init", str(init.with_name("own")), "-p", "name", name]
    words += ["-p", "steps", "4", "-p", "batch", "2", "-p", "questions", "4"]
    words += ["-p", "sequence_length", "96", "-p", "lora", "true"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        run = open_run(RUNS / f"{name}.nc")
    finally:
        shutil.rmtree(RUNS / name, ignore_errors=True)
        (RUNS / f"{name}.nc").unlink(missing_ok=True)
    assert run.attrs["status"] == "complete"
    notebook = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    outputs = [o for c in notebook.cells for o in c.get("outputs", [])]
    images = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(images) == 3 and all(len(image) > 10_000 for image in images)
    text = json.dumps(outputs)
    for word in ("Right answers to held-out questions", "checkpoint: ", "GRPO", "complete"):
        assert word in text
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]
