"""Stages side by side: all groups of real folders, and predictions against plain numpy."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from tests.test_paths import model_of
from tests.test_stage_routing import rows_of
from trinity_lib import compare, hub, paths
from trinity_lib.config import BadValue
from trinity_lib.data import IGNORE
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.stage_schema import STAGES

ROWS = {"code": rows_of(0, count=3), "prose": rows_of(1, count=4, length=16)}
GROUPS = {
    "weight_drift", "expert_drift", "stage_routing", "routing_change", "functional", "path",
}  # fmt: skip


def as_listed(found: dict[str, xr.Dataset]) -> None:
    for name, group in found.items():
        assert set(group.data_vars) == set(STAGES[name])
        for key, variable in STAGES[name].items():
            assert group[key].dims == variable.dims, (name, key)
            assert group[key].attrs["units"] == variable.units
            assert group[key].dtype.kind == np.dtype(variable.dtype).kind


@pytest.fixture(scope="module")
def folders(tiny_model: ModelConfig, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stages")
    for seed, name in enumerate(("TrueBase", "Base", "Instruct")):
        hub.save(model_of(tiny_model, seed), root / name)
    return {name: root / name for name in ("TrueBase", "Base", "Instruct")}


def test_all_groups_of_three_stages(folders: dict[str, Path]) -> None:
    told: list[str] = []
    found = compare.compare(
        folders, ROWS, arithmetic=[("TrueBase", "Instruct", "Base")], progress=told.append
    )
    assert set(found) == GROUPS | {"task_vector"}
    as_listed(found)
    changes = ["TrueBase -> Base", "Base -> Instruct", "TrueBase -> Instruct"]
    for name in GROUPS - {"stage_routing"}:
        assert found[name]["change"].values.tolist() == changes, name
    one = found["path"]["loss"].sel(alpha=0).values  # of one model on the same rows
    assert one[0] == one[2]
    batch = compare.joined(ROWS).batch
    assert one[0] == pytest.approx(paths.loss(hub.load(folders["TrueBase"]), batch))
    load = found["stage_routing"]["load"].sel(stage=["TrueBase", "Base"]).mean("stage")
    drift = found["expert_drift"]["load"].sel(change="TrueBase -> Base")
    np.testing.assert_allclose(drift, load)
    assert np.isfinite(found["stage_routing"]["label_information"]).all()
    third = found["task_vector"]["loss"].sel(scale=0, domain="code").item()
    assert third == pytest.approx(paths.loss(hub.load(folders["Base"]), ROWS["code"]))
    assert told[0] == "routing: TrueBase" and any("predictions" in text for text in told)
    assert xr.DataTree.from_dict(found)["path"].sizes["change"] == 3


def test_a_stage_beside_itself_does_not_differ(folders: dict[str, Path]) -> None:
    same = {"one": folders["Base"], "two": folders["Base"]}
    found = compare.compare(same, ROWS)
    assert found["weight_drift"]["change"].values.tolist() == ["one -> two"]
    assert (found["weight_drift"]["moved"] == 0).all()
    assert (found["routing_change"]["saturation"] == 1).all()
    for group, name in (("routing_change", "divergence"), ("functional", "divergence")):
        assert (found[group][name] == 0).all()
    assert (found["functional"]["same_first"] == 1).all()
    np.testing.assert_allclose(found["path"]["barrier"], 0, atol=1e-6)


def test_predictions_against_numpy(tiny_model: ModelConfig, monkeypatch) -> None:
    models = {"a": model_of(tiny_model, 0), "b": model_of(tiny_model, 1)}
    monkeypatch.setattr(compare, "LOGITS", 384 * 24 * 2)  # two rows at a time
    found = compare.functional(models, [("a", "b")], ROWS)
    as_listed({"functional": found})
    for domain, rows in ROWS.items():
        shares = []
        for model in models.values():
            with torch.no_grad():
                output = model(
                    *(torch.from_numpy(p) for p in (rows.tokens_BS, rows.documents_BS))
                )
            logits = output.logits.double().numpy()
            shares.append(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
        kl = (shares[0] * np.log(shares[0] / shares[1])).sum(-1)
        asked = rows.targets_BS != IGNORE
        means = np.array([kl[i, asked[i]].mean() for i in range(len(kl))])
        here = found.isel(change=0).sel(domain=domain)
        assert float(here["divergence"]) == pytest.approx(means.mean(), rel=1e-6)
        half = {3: 4.302653, 4: 3.182446}[len(means)] * means.std(ddof=1) / len(means) ** 0.5
        assert float(here["high"] - here["low"]) == pytest.approx(2 * half, rel=1e-4)
        same = (shares[0].argmax(-1) == shares[1].argmax(-1))[asked].mean()
        assert float(here["same_first"]) == pytest.approx(same)
        assert int(here["rows"]) == len(rows.tokens_BS)


def test_a_domain_is_moved_alone(tiny_model: ModelConfig) -> None:
    """A head that is changed for prose's tokens after prose's own moves prose more."""
    first = model_of(tiny_model, 0)
    second = copy.deepcopy(first)
    prose = torch.from_numpy(np.unique(ROWS["prose"].tokens_BS))
    code = torch.from_numpy(np.unique(ROWS["code"].tokens_BS))
    only = prose[~torch.isin(prose, code)]
    with torch.no_grad():
        second.embedding.weight[only] *= -1
    found = compare.functional({"a": first, "b": second}, [("a", "b")], ROWS)
    moved = found["divergence"].isel(change=0)
    assert float(moved.sel(domain="code")) == 0 < float(moved.sel(domain="prose"))


def test_rows_of_unlike_lengths_are_joined() -> None:
    batch, labels = compare.joined(ROWS)
    assert batch.tokens_BS.shape == (7, 24) and labels.tolist() == [0] * 3 + [1] * 4
    np.testing.assert_array_equal(batch.documents_BS[3:, :16], ROWS["prose"].documents_BS)
    assert (batch.documents_BS[3:, 16:] == IGNORE).all()
    assert (batch.targets_BS[3:, 16:] == IGNORE).all()
    with pytest.raises(BadValue, match="of one domain or more"):
        compare.joined({})


def test_pairs_of_stages() -> None:
    assert compare.chain(["a", "b"]) == [("a", "b")]
    assert compare.chain(["a", "b", "c"]) == [("a", "b"), ("b", "c"), ("a", "c")]
    with pytest.raises(BadValue, match="stages is .'a'.; it must be two or more"):
        compare.chain(["a"])


def test_a_stage_there_is_not_is_refused_before_any_work(folders: dict[str, Path]) -> None:
    with pytest.raises(BadValue, match="it must be of stages TrueBase, Base, Instruct"):
        compare.compare(folders, ROWS, changes=[("TrueBase", "SFT")], progress=pytest.fail)


def test_checkpoints_of_transformers(tmp_path: Path, tiny_model: ModelConfig) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    from trinity_lib import afmoe

    values = afmoe.config_json(tiny_model, torch.float32) | {"eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in ("base", "instruct"):
            config = transformers.AfmoeConfig(**values)
            transformers.AfmoeForCausalLM(config).save_pretrained(tmp_path / name)
    both = {name: tmp_path / name for name in ("base", "instruct")}
    found = compare.compare(both, ROWS, alphas=(0, 0.5, 1), extend=())
    assert set(found) == GROUPS
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(both[n]) for n in both]
    tokens = torch.from_numpy(ROWS["code"].tokens_BS)[:, :8]  # one document, no padding
    with torch.no_grad():
        one, two = (m(tokens).logits.double().log_softmax(-1) for m in theirs)
    kl = (one.exp() * (one - two)).sum(-1)[:, :7].mean()
    rows = compare.Batch(*(part[:, :8] for part in ROWS["code"]))
    models: dict[str, Trinity] = {name: hub.load(folder) for name, folder in both.items()}
    here = compare.functional(models, [("base", "instruct")], {"code": rows})
    assert float(here["divergence"].squeeze()) == pytest.approx(float(kl), rel=1e-4)
