"""Weight drift: planted changes, numpy by brute force, both layouts, and what is held."""

import gc
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file, save_file
from scipy import stats

from trinity_lib import drift, hub, stage_schema, stored
from trinity_lib.config import BadValue
from trinity_lib.model import ModelConfig, Trinity

CHANGE = [("before", "after")]
NAME = "before -> after"


def model_of(config: ModelConfig, seed: int) -> Trinity:
    """Random weights, selection biases too."""
    generator = torch.Generator().manual_seed(seed)
    model = hub.empty(config, "cpu", torch.float32)
    model.initialise(generator)
    for router in model.routers():
        router.bias_E.normal_(std=0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def before(tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift") / "before"
    hub.save(model_of(tiny_model, 0), folder, shard_bytes=50_000)
    return folder


def changed(before: Path, folder: Path, change) -> dict[str, Path]:
    """Both folders: a checkpoint, and a copy of its model after `change`, in one file."""
    model = hub.load(before)
    with torch.no_grad():
        change(model)
    hub.save(model, folder)
    return {"before": before, "after": folder}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return {name: tensor.double().numpy() for name, tensor in found.items()}


def rank_of(change: np.ndarray) -> float:
    values = np.linalg.svd(change, compute_uv=False)
    share = values / values.sum()
    return float(np.exp(-sum(p * np.log(p) for p in share if p > 0)))


def test_one_expert_scaled_is_found_and_nothing_else(before: Path, tmp_path: Path) -> None:
    def scale(model: Trinity) -> None:
        experts = model.blocks[2].experts
        for weight in (experts.gate_EFD, experts.up_EFD, experts.down_EFD):
            weight[5] *= 1.1

    folders = changed(before, tmp_path / "after", scale)
    tensors, experts = drift.weights(folders, CHANGE)
    one = experts.sel(change=NAME, layer=2, expert=5)
    assert float(one["relative"]) == pytest.approx(0.1, abs=1e-6)
    assert float(one["cosine"]) == pytest.approx(1, abs=1e-12)
    held = tensors_of(before)
    prefix = "model.layers.2.mlp.experts.5"
    parts = [f"{prefix}.{part}_proj.weight" for part in ("gate", "up", "down")]
    assert float(one["effective_rank"]) == pytest.approx(
        np.mean([rank_of(held[name]) for name in parts]), rel=1e-4
    )
    others = experts["relative"].sum() - one["relative"]
    assert float(others.squeeze()) == 0 and np.isnan(experts["effective_rank"]).sum() == 23
    moved = tensors["tensor"].values[tensors["moved"].sel(change=NAME).values > 0]
    assert sorted(moved) == sorted(parts)
    there = tensors.sel(tensor=parts[0])
    assert (int(there["tensor_layer"]), int(there["tensor_expert"])) == (2, 5)
    assert int(there["full_rank"]) == 16 and str(there["module"].values) == "experts"
    assert np.isnan(experts["load"]).all()
    assert experts["layer"].values.tolist() == [1, 2, 3]


def test_a_rank_one_update_has_effective_rank_one(before: Path, tmp_path: Path) -> None:
    def update(model: Trinity) -> None:
        weight = model.blocks[0].attention.query.weight
        generator = torch.Generator().manual_seed(1)
        left, right = (torch.randn(n, generator=generator) for n in weight.shape)
        weight.zero_().add_(torch.outer(left, right))

    def clear(model: Trinity) -> None:
        model.blocks[0].attention.query.weight.zero_()

    zero = changed(before, tmp_path / "zero", clear)["after"]
    folders = {"before": zero, "after": changed(before, tmp_path / "one", update)["after"]}
    found = drift.weights(folders, CHANGE)[0].sel(
        change=NAME, tensor="model.layers.0.self_attn.q_proj.weight"
    )
    # fp32 rounds the outer product, which alone lifts the rank above 1
    assert float(found["effective_rank"]) == pytest.approx(1, abs=1e-4)
    assert np.isnan(found["relative"]) and np.isnan(found["cosine"])
    assert float(found["norm"]) == 0 and float(found["norm_after"]) == float(found["moved"])


def test_against_numpy(tiny_model: ModelConfig, before: Path, tmp_path: Path) -> None:
    hub.save(model_of(tiny_model, 1), tmp_path / "after")
    folders = {"before": before, "after": tmp_path / "after"}
    told: list[str] = []
    tensors, experts = drift.weights(folders, CHANGE, progress=told.append)
    one, two = tensors_of(before), tensors_of(tmp_path / "after")
    assert sorted(tensors["tensor"].values) == sorted(one)
    for name, a in one.items():
        b, found = two[name], tensors.sel(change=NAME, tensor=name)
        norm = np.sqrt((a**2).sum())
        expected = {
            "norm": norm,
            "norm_after": np.sqrt((b**2).sum()),
            "moved": np.sqrt(((b - a) ** 2).sum()),
            "relative": np.sqrt(((b - a) ** 2).sum()) / norm,
            "cosine": (a * b).sum() / norm / np.sqrt((b**2).sum()),
            "effective_rank": rank_of(b - a) if a.ndim == 2 and (a != b).any() else np.nan,
        }
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-9, err_msg=f"{name} {key}")
    names = [f"model.layers.3.mlp.experts.6.{p}_proj.weight" for p in ("gate", "up", "down")]
    a, b = (np.concatenate([each[n].ravel() for n in names]) for each in (one, two))
    found = experts.sel(change=NAME, layer=3, expert=6)
    assert float(found["relative"]) == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    assert float(found["cosine"]) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=0.01)
    assert told[0] == "weight drift: model.embed_tokens.weight"
    assert told.count("weight drift: layer 2") == 1
    modules = set(tensors["module"].values)
    assert modules == {
        "embedding", "attention", "norm", "dense", "router", "selection bias", "shared",
        "experts", "head",
    }  # fmt: skip
    assert (tensors["full_rank"] == 0).values.tolist() == [
        one[name].ndim == 1 for name in tensors["tensor"].values
    ]


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_a_large_matrix_has_the_rank_of_a_small_one(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], rank: int
) -> None:
    rng = np.random.default_rng(rank)
    change = rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1]))
    before = rng.normal(size=shape)
    pair = torch.from_numpy(before), torch.from_numpy(before + change)
    exact = drift.move(*pair)
    monkeypatch.setattr(drift, "EXACT", 100)
    monkeypatch.setattr(drift, "CHUNK", 400)
    chunked = drift.move(*pair)
    np.testing.assert_allclose(chunked, exact, rtol=1e-3 if rank < 40 else 1e-9)
    assert exact.effective_rank == pytest.approx(rank_of(change), rel=1e-6)
    if rank == 1:
        assert chunked.effective_rank == pytest.approx(1, abs=1e-5)


def test_effective_rank_is_that_of_roy_and_vetterli() -> None:
    assert drift.effective_rank(np.ones(5)) == pytest.approx(5)
    assert drift.effective_rank(np.array([3.0, 0, 0])) == 1
    assert np.isnan(drift.effective_rank(np.zeros(3)))
    two = drift.effective_rank(np.array([3.0, 1.0]))
    assert two == pytest.approx(4 / 3**0.75)  # exp of -(3/4 ln 3/4 + 1/4 ln 1/4)


def test_equal_stages_do_not_move(before: Path) -> None:
    tensors, experts = drift.weights({"before": before, "after": before}, CHANGE)
    assert (tensors["moved"] == 0).all() and (experts["relative"] == 0).all()
    assert np.isnan(tensors["effective_rank"]).all()
    np.testing.assert_allclose(tensors["cosine"], 1)


def test_load_is_the_mean_of_both_stages(before: Path) -> None:
    load = xr.DataArray(
        np.arange(1.0, 49).reshape(2, 3, 8),
        {"stage": ["before", "after"], "layer": [1, 2, 3], "expert": np.arange(8)},
    )
    load = load / load.mean("expert")
    folders = {"before": before, "after": before}
    experts = drift.weights(folders, CHANGE, load=load)[1]
    np.testing.assert_allclose(experts["load"].sel(change=NAME), load.mean("stage"))
    np.testing.assert_allclose(experts["load"].mean("expert"), 1)


def drifts(relative: np.ndarray, load: np.ndarray) -> xr.Dataset:
    values = {"relative": relative, "load": load}
    values |= {"cosine": relative, "effective_rank": relative}
    labels = {"change": ["a -> b"], "layer": range(2), "expert": range(relative.shape[1])}
    data = {name: each[None] for name, each in values.items()}
    return stage_schema.dataset("expert_drift", data, labels)


def test_rank_correlation_of_drift_and_load() -> None:
    rng = np.random.default_rng(0)
    load = rng.random((2, 60))
    up = drift.load_correlation(drifts(np.exp(load), load), "a -> b")
    assert up == (pytest.approx(1), pytest.approx(1), pytest.approx(1), 120)
    by_layer = load + [[0], [100]]  # layers that differ in both make no correlation
    down = drift.load_correlation(drifts(by_layer - 2 * load, by_layer), "a -> b")
    assert down.estimate == pytest.approx(-1)
    noise = load + rng.normal(size=load.shape)
    some = drift.load_correlation(drifts(noise, load), "a -> b")
    expected = np.mean([stats.spearmanr(a, b)[0] for a, b in zip(noise, load, strict=True)])
    assert some.estimate == pytest.approx(expected)  # the mean, for layers of equal size
    assert some.low < some.estimate < some.high
    unknown = drift.load_correlation(drifts(noise, np.full_like(load, np.nan)), "a -> b")
    assert np.isnan(unknown.estimate) and unknown.units == 0
    alike = drift.load_correlation(drifts(noise, np.ones_like(load)), "a -> b")
    assert np.isnan(alike.estimate) and alike.low == -np.inf


def test_its_interval_covers() -> None:
    """Independent drift and load: 95% of intervals hold 0, give or take chance (p < 0.01)."""
    held = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        data = drifts(rng.random((2, 24)), rng.random((2, 24)))
        found = drift.load_correlation(data, "a -> b", seed)
        held += found.low <= 0 <= found.high
    assert held >= 25


def test_unlike_shapes_are_refused(tiny_model: ModelConfig, before: Path, tmp_path) -> None:
    other = tmp_path / "other"
    hub.save(model_of(replace(tiny_model, vocab_size=400), 0), other)
    with pytest.raises(BadValue) as error:
        drift.weights({"before": before, "after": other}, CHANGE)
    assert str(error.value) == (
        f"model.embed_tokens.weight has shape [384, 32] in {before} and [400, 32] in {other}; "
        "stages of one model have equal shapes."
    )
    hub.save(model_of(replace(tiny_model, num_layers=3), 0), tmp_path / "short")
    with pytest.raises(
        BadValue, match="layers.3.input_layernorm.weight is in .*before and not"
    ):
        drift.weights({"before": tmp_path / "short", "after": before}, CHANGE)
    with pytest.raises(BadValue, match="it must be of stages before, after"):
        drift.weights({"before": before, "after": before}, [("before", "later")])


def test_both_layouts_of_transformers_are_read(tmp_path: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    config = transformers.AfmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16,
        num_hidden_layers=3, num_dense_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = transformers.AfmoeForCausalLM(config)
        theirs.save_pretrained(tmp_path / "plain")
        with torch.no_grad():
            theirs.model.layers[1].mlp.experts.gate_up_proj[2, 16:] *= 1.5  # up, of 2
            theirs.model.layers[2].mlp.experts.down_proj[3] *= 0.5
    theirs.save_pretrained(tmp_path / "split")
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    names = load_file(tmp_path / "fused" / hub.WEIGHTS)
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    folders = {name: tmp_path / name for name in ("plain", "split", "fused")}
    changes = [("plain", "split"), ("plain", "fused"), ("fused", "split")]
    tensors, experts = drift.weights(folders, changes)
    split, fused, none = (tensors.isel(change=i) for i in range(3))
    xr.testing.assert_equal(split.drop_vars("change"), fused.drop_vars("change"))
    assert (none["moved"] == 0).all()
    moved = split["relative"].values > 0
    found = dict(
        zip(split["tensor"].values[moved], split["relative"].values[moved], strict=True)
    )
    assert found == pytest.approx(
        {
            "model.layers.1.mlp.experts.2.up_proj.weight": 0.5,
            "model.layers.2.mlp.experts.3.down_proj.weight": 0.5,
        }
    )
    assert (experts["relative"].isel(change=1) > 0).sum() == 2
    del names["model.layers.2.mlp.experts.down_proj"]
    save_file(names, tmp_path / "fused" / hub.WEIGHTS)
    with pytest.raises(
        BadValue, match="fused lacks the tensor model.layers.2.mlp.experts.down"
    ):
        drift.weights(folders, changes)


def test_a_damaged_checkpoint_is_one_sentence(before: Path, tmp_path: Path) -> None:
    shutil.copytree(before, tmp_path / "cut")
    file = sorted((tmp_path / "cut").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadValue, match="cannot be read"):
        drift.weights({"before": before, "after": tmp_path / "cut"}, CHANGE)


def test_one_tensor_of_each_stage_is_held(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tensors that live at one time, and files that are open, are counted."""
    held, most, opened = [0], [0], []
    read = stored._read

    def counting(part, files, stack):
        tensor = read(part, files, stack)
        size = tensor.numel() * tensor.element_size()
        held[0] += size
        most.append(held[0])
        opened.append(len(files))

        def freed() -> None:
            held[0] -= size

        weakref.finalize(tensor, freed)
        return tensor

    hub.save(hub.load(before), tmp_path / "after", shard_bytes=30_000)
    monkeypatch.setattr(stored, "_read", counting)
    monkeypatch.setattr(hub, "AT_ONCE", 40_000)
    gc.disable()
    try:
        drift.weights({"before": before, "after": tmp_path / "after"}, CHANGE)
    finally:
        gc.enable()
    largest = 4 * 384 * 32  # the embedding
    assert held[0] == 0 and max(most) == 2 * largest
    assert 2 <= max(opened) < len(list((tmp_path / "after").glob("*.safetensors")))
