"""Whole runs: deterministic, resumable, read by transformers; and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file

from tests import conversing
from trinity_lib import checkpoint, hub, posttrain, stages, tokenizer
from trinity_lib.config import Refusal, to_json
from trinity_lib.lora import LoraConfig
from trinity_lib.model import ModelConfig
from trinity_lib.posttrain_config import PolicyConfig, PosttrainConfig, Stage, from_checkpoint
from trinity_lib.record import open_run, read_attributes
from trinity_lib.run import RunConfig
from trinity_lib.step import TrainingFailed
from trinity_lib.train import train

os.environ["HF_HUB_OFFLINE"] = "1"
CHAIN = (
    Stage(kind="sft", steps=6, batch=4),
    Stage(kind="dpo", steps=3, batch=4, rate=0.5),
    Stage(kind="grpo", steps=2, batch=3),
)
POLICY = PolicyConfig(group=4, max_new_tokens=6)


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelConfig) -> Path:
    return conversing.base(tiny_model, tmp_path_factory.mktemp("init") / "base")


def chain(init: Path, **changes: object) -> PosttrainConfig:
    values = {"balance": conversing.ON, "grpo": POLICY, "name": "chain", "sequence_length": 96}
    return conversing.settings(init, *CHAIN, **values | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(init: Path, runs: Path) -> xr.DataTree:
    return posttrain.run(chain(init), runs=runs)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def alike(one: xr.DataTree, other: xr.DataTree) -> bool:
    """Every number and word, but for times."""
    for name in ("posttrain", "layers", "routing", "answers", "transcripts"):
        a, b = (
            tree[name].to_dataset().drop_vars("seconds", errors="ignore")
            for tree in (one, other)
        )
        if not a.identical(b):
            return False
    return True


def test_a_run_records_every_step_and_every_moment(whole: xr.DataTree, runs: Path) -> None:
    assert whole.attrs["status"] == "complete"
    assert alike(whole, open_run(runs / "chain.nc"))
    table = whole["posttrain"].to_dataset()
    assert table["stage"].values.tolist() == [0] * 6 + [1] * 3 + [2] * 2
    for number, has in enumerate(("loss", "margin", "reward")):
        own = table.isel(step=table["stage"].values == number)
        assert own[has].notnull().all() and (own["grad_norm"] > 0).all()
    assert table["reward"].isel(step=slice(0, 9)).isnull().all()
    assert whole["answers"].moment.values.tolist() == ["start", "sft", "dpo", "grpo"]
    assert whole["answers"]["accuracy"].notnull().all()
    count = whole["routing"]["count"].sum("expert").isel(layer=0)
    assert (count == 2 * table["batch_tokens"]).all()  # two experts a token


def test_the_same_run_gives_the_same_bits(whole: xr.DataTree, init: Path, runs: Path) -> None:
    again = posttrain.run(chain(init, name="again"), runs=runs)
    assert alike(whole, again)
    one, other = (weights(runs / name / "instruct") for name in ("chain", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    other_seed = posttrain.run(chain(init, name="other", seed=1), runs=runs)
    assert not alike(whole, other_seed)


def test_a_run_that_was_cut_off_goes_on_from_its_last_whole_stage(
    whole: xr.DataTree, init: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second stage, and killed in the third."""
    for method, done in ((stages.Preferences, 1), (stages.Rewards, 2)):
        config = chain(init, name=f"cut-{done}")
        with monkeypatch.context() as patch:
            patch.setattr(method, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                posttrain.run(config, runs=runs)
        attributes = read_attributes(runs / config.name)
        assert attributes["status"] == "failed" and "KeyboardInterrupt" in attributes["reason"]
        with pytest.raises(Refusal, match="was begun before"):
            posttrain.run(config, runs=runs)
        with pytest.raises(
            Refusal, match="cannot be resumed: it was begun with other settings"
        ):
            posttrain.run(dataclasses.replace(config, seed=5), runs=runs, resume=True)
        resumed = posttrain.run(config, runs=runs, resume=True)
        assert resumed.attrs["status"] == "complete" and alike(whole, resumed)
        one, other = (weights(runs / name / "instruct") for name in ("chain", config.name))
        assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(Refusal, match="is complete"):
        posttrain.run(config, runs=runs)


def test_every_stage_is_a_checkpoint_that_can_be_begun_with(
    whole: xr.DataTree, runs: Path
) -> None:
    for name, step in (("sft", 6), ("dpo", 9), ("instruct", 11)):
        folder = runs / "chain" / name
        assert checkpoint.verify(folder)["step"] == step
        own = from_checkpoint(folder)
        assert own["optim"] == conversing.OPTIM and own["sequence_length"] == 96
        assert own["balance"] == conversing.ON
    further = conversing.settings(runs / "chain" / "sft", name="further", data=("digits",))
    assert posttrain.run(further, runs=runs).attrs["status"] == "complete"


def test_a_chain_is_its_stages_one_by_one(whole: xr.DataTree, runs: Path, init: Path) -> None:
    """SFT alone ends where the chain's first stage did."""
    alone = chain(init, name="alone", stages=CHAIN[:1])
    posttrain.run(alone, runs=runs)
    one, other = weights(runs / "chain" / "sft"), weights(runs / "alone" / "instruct")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_transformers_reads_the_result(whole: xr.DataTree, runs: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder = runs / "chain" / "instruct"
    theirs = transformers.AfmoeForCausalLM.from_pretrained(folder).eval()
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "37 + 45 ="}]
    tokens = reader.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    ids = tokens["input_ids"]
    with torch.no_grad():
        logits, ours = theirs(ids).logits, hub.load(folder)(ids).logits
    assert ((logits - ours).abs() / logits.abs().clamp(min=1)).max() <= 1e-5
    new = theirs.generate(**tokens, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    text = reader.decode(new, skip_special_tokens=True).strip()
    from trinity_lib import chat, dialogues, examination

    template = chat.template(tokenizer.load(folder))
    row = examination.sample(
        hub.load(folder), template, [template.prompt(dialogues.ask("37 + 45 ="))], 6
    )
    assert template.said(row[0].tolist()) == text


def test_adapters_leave_all_but_their_parts_alone(init: Path, runs: Path) -> None:
    pytest.importorskip("peft")
    adapters = LoraConfig(on=("attention", "experts"), rank=2)
    config = chain(init, name="lora", stages=CHAIN[:2], lora=adapters)
    config = dataclasses.replace(
        config, balance=dataclasses.replace(config.balance, method="none")
    )
    run = posttrain.run(config, runs=runs)
    assert run.attrs["parameters_trained"] < run.attrs["parameters_total"]
    before, after = weights(init), weights(runs / "lora" / "instruct")
    assert before.keys() == after.keys()
    for name, value in before.items():
        adapted = ".self_attn." in name and "norm" not in name or ".experts." in name
        adapted = adapted and "shared" not in name
        assert torch.equal(value, after[name]) != adapted, name


def test_frozen_biases_leave_the_run_as_they_came(init: Path, runs: Path) -> None:
    config = conversing.settings(init, *CHAIN[:2], name="frozen", sequence_length=96)
    run = posttrain.run(config, runs=runs)
    before, after = weights(init), weights(runs / "frozen" / "instruct")
    biases = [name for name in before if "expert_bias" in name]
    assert biases and all(torch.equal(before[name], after[name]) for name in biases)
    assert np.ptp(run["routing"]["bias"].values, axis=0).max() == 0
    moved = posttrain.run(chain(init, name="moved", stages=CHAIN[:1]), runs=runs)
    assert np.ptp(moved["routing"]["bias"].values, axis=0).max() > 0


def test_a_run_s_own_checkpoint_gives_its_settings(
    tiny: RunConfig, runs: Path, cache: Path
) -> None:
    train(dataclasses.replace(tiny, name="pre"), runs=runs, cache=cache)
    own = from_checkpoint(runs / "pre" / "base")
    assert own["optim"] == tiny.optim and own["balance"] == tiny.balance
    assert own["sequence_length"] == tiny.data.sequence_length
    (runs / "pre" / "base" / "run_config.json").write_text("{}")
    with pytest.raises(Refusal, match="is of another version of this program"):
        from_checkpoint(runs / "pre" / "base")


def test_a_loss_that_is_no_number_fails_the_run(
    init: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise TrainingFailed("the loss is nan; lower the learning rate.")

    monkeypatch.setattr(stages.Supervised, "step", broken)
    with pytest.raises(TrainingFailed):
        posttrain.run(chain(init, name="nan"), runs=runs)
    attributes = read_attributes(runs / "nan")
    assert attributes["status"] == "failed"
    assert attributes["reason"] == "the loss is nan; lower the learning rate."


def without(init: Path, tmp_path: Path, name: str) -> str:
    """The checkpoint without one of its files."""
    import shutil

    folder = tmp_path / f"without-{name}"
    shutil.copytree(init, folder)
    (folder / name).unlink()
    return str(folder)


def test_what_is_refused_leaves_nothing(init: Path, tmp_path: Path) -> None:
    plain = chain(init, name="bad")
    bad = [
        (dataclasses.replace(plain, init=str(tmp_path / "no")), "is no checkpoint"),
        (
            dataclasses.replace(plain, init=without(init, tmp_path, "tokenizer.json")),
            "has no tokenizer.json",
        ),
        (
            dataclasses.replace(plain, init=without(init, tmp_path, "model.safetensors")),
            "has neither model.safetensors nor",
        ),
        (
            dataclasses.replace(plain, data=(str(tmp_path / "x.jsonl"),)),
            "there is no such file",
        ),
        (dataclasses.replace(plain, sequence_length=8), "no answer of .* fits in"),
        (
            dataclasses.replace(plain, lora=LoraConfig(on=("router",)), init=dense(tmp_path)),
            "init is .*; it must be of a model with experts",
        ),
    ]
    for config, sentence in bad:
        with pytest.raises(Refusal, match=sentence):
            posttrain.run(config, runs=tmp_path / "runs")
        assert not [*(tmp_path / "runs").glob("*")]


def dense(tmp_path: Path) -> str:
    from trinity_lib.attention import AttentionConfig
    from trinity_lib.routing import RouterConfig

    shape = ModelConfig(
        vocab_size=384,
        width=16,
        num_layers=1,
        num_dense_layers=1,
        dense_width=16,
        expert_width=16,
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=16, window=8),
        router=RouterConfig(num_experts=2, top_k=1),
    )
    return str(conversing.base(shape, tmp_path / "dense"))


def test_from_a_shell_as_from_python(whole: xr.DataTree, init: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(to_json(chain(init, stages=CHAIN[:1], name="shell")))
    words = [sys.executable, "-m", "trinity_lib.posttrain", "--config", str(file)]
    words += ["--runs", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "shell.nc")
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr.startswith("The run 'shell' is complete")
    assert "Traceback" not in again.stderr
    steps = whole["posttrain"]["loss"].isel(step=slice(0, 6))
    assert (open_run(tmp_path / "shell.nc")["posttrain"]["loss"] == steps).all()


def test_settings_survive_json() -> None:
    config = conversing.settings("x", *CHAIN, lora=LoraConfig(), grpo=POLICY)
    assert posttrain.PosttrainConfig(**json.loads(to_json(config))) == config
