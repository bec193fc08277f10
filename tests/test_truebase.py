"""A whole study: its run file, its cards, cut off and gone on with, in several processes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests import chained
from tests.chained import FULL, TINY, Study
from trinity_lib import card, planted, rows, stage_statements, truebase, workers
from trinity_lib.config import BadValue
from trinity_lib.record import open_run
from trinity_lib.schema import TABLES
from trinity_lib.stage_schema import STAGES as STAGE_GROUPS
from trinity_lib.truebase_config import STAGES


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return chained.study(tmp_path_factory.getbasetemp())


def test_a_run_has_all_groups_with_their_labels(study: Study) -> None:
    tree = open_run(study.runs / "tiny.nc")
    assert tree.attrs["status"] == "complete" and tree.identical(study.tree)
    assert set(tree.children) == {"claims", *STAGE_GROUPS}
    for name, node in tree.children.items():
        for variable, about in TABLES[name].items():
            assert node[variable].dims == about.dims
            assert node[variable].attrs["units"] == about.units
            assert set(about.dims) <= set(node.coords)
    assert tree["lens"].stage.values.tolist() == list(STAGES)
    changes = [
        "truebase -> base", "base -> instruct", "instruct -> debiased", "truebase -> debiased"
    ]  # fmt: skip
    for name in ("weight_drift", "expert_drift", "routing_change", "functional", "path"):
        assert tree[name].change.values.tolist() == changes
    assert tree["functional"].domain.values.tolist() == list(planted.DOMAINS)
    assert tree["relearning"].start.values.tolist() == ["debiased", "never had it"]
    assert tree["ablation"].measure.values.tolist() == ["association", "recall"]
    assert tree["audits"].draws.values.tolist() == [2] * tree["audits"].sizes["family"]
    assert not tree["ablation"]["whole"].isnull().any()


def test_every_stage_was_asked_in_text_and_in_conversations(study: Study) -> None:
    found = chained.table(study.tree)
    assert (found["model_seed"] == 0).all()
    count = found.groupby(["of_stage", "asked_as"]).size().unstack()
    assert set(count.index) == set(STAGES) and list(count.columns) == ["chat", "text"]
    assert (count.nunique() == 1).all() and (count["chat"] >= 10).all()
    in_text = set(found.loc[found["asked_as"] == "text", "family"])
    assert in_text == set(truebase.audit.FAMILIES)
    in_chat = set(found.loc[found["asked_as"] == "chat", "family"])
    assert in_chat == {"association", "instruction"}
    assert len(study.tree["claims"].claim) == len(stage_statements.CLAIMS)
    said = [statement.text for statement in stage_statements.CLAIMS]
    assert study.tree["claims"]["statement"].values.tolist() == said
    single = study.tree["claim_values"]["estimate"].sel(chain=0)
    np.testing.assert_array_equal(single, study.tree["claims"]["estimate"])
    assert single.notnull().all()


def test_the_world_lies_beside_the_run(study: Study) -> None:
    world = planted.read(study.runs / "tiny")
    assert world == planted.world(FULL.world)
    assert planted.sha256(world) == study.tree.attrs["world_sha256"]


def test_cards_are_of_their_folders_to_the_byte(study: Study) -> None:
    places = json.loads(study.tree.attrs["cards"])
    assert list(places) == list(STAGES)
    for stage, folder in study.folders.items():
        made = card.read(study.runs / "tiny" / places[stage] / card.JSON)
        assert made["stage"] == stage and card.verify(made, folder) == []
        assert {row["stage"] for row in made["findings"]} == set(STAGES)
        items = {row["item"] for row in made["findings"] if row["family"] == "association"}
        pair = {"slope, held-out names", "slope, held-out names, in conversation"}
        assert pair <= items
        assert made["data"]["planted world"] == study.tree.attrs["world_sha256"]
        assert "jobs.jsonl" in made["records"] and made["seeds"]["training"] == 0
        assert made["run"]["name"].startswith("tiny-0")


def test_a_card_refuses_a_folder_of_which_one_byte_is_another(
    study: Study, tmp_path: Path
) -> None:
    folder = tmp_path / "instruct"
    shutil.copytree(study.folders["instruct"], folder)
    path = study.runs / "tiny" / "cards" / "instruct" / card.JSON
    made, file = card.read(path), folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    begins = 8 + int.from_bytes(content[:8], "little")
    place = (begins + len(content)) // 2
    content[place] ^= 1
    file.write_bytes(content)
    assert card.verify(made, folder) == [
        "model.safetensors has changed: as many bytes, another SHA-256."
    ]
    content[place] ^= 1
    file.write_bytes(content)
    assert card.verify(made, folder) == []
    edited = json.loads(path.read_text())
    edited["findings"][0]["estimate"] = 0.0
    assert card.digest(edited) != made["digest"]
    (tmp_path / card.JSON).write_text(json.dumps(edited))
    with pytest.raises(BadValue, match="has been edited since it was written"):
        card.read(tmp_path / card.JSON)


def test_what_was_cut_off_goes_on_without_training_again(study: Study) -> None:
    assert study.failed["status"] == "failed"
    assert study.failed["reason"] == "CutOffError: the power failed"
    for name in chained.RUNS:
        assert f"{name} is complete\n" in study.told
    assert "step " not in study.told and "training a tokenizer" not in study.told


def test_a_complete_study_is_opened(
    study: Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truebase, "look", None)
    again = truebase.run(
        dataclasses.replace(FULL, workers=2), runs=study.runs, cache=study.cache
    )
    assert again.identical(study.tree)
    assert "tiny is complete: opened from" in capsys.readouterr().out
    with pytest.raises(BadValue, match="'tiny' is another one: relearn is 3 and was 2; choose"):
        truebase.run(dataclasses.replace(FULL, relearn=3), runs=study.runs, cache=study.cache)


def test_a_study_that_was_begun_is_not_taken_for_another(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    begun = json.dumps(study.failed)
    (folder / "run.json").write_text(begun)
    with pytest.raises(BadValue, match=r"another one: world.seed is 1 and was 0; choose"):
        other = dataclasses.replace(FULL.world, seed=1)
        truebase.run(dataclasses.replace(FULL, world=other), runs=tmp_path, cache=study.cache)
    assert (folder / "run.json").read_text() == begun


def test_chains_in_processes_of_their_own_find_the_same(study: Study, tmp_path: Path) -> None:
    two = dataclasses.replace(TINY, seeds=2, workers=2)
    tree = truebase.run(two, runs=tmp_path, cache=study.cache)
    found, alone = chained.table(tree), chained.table(study.tree)
    first, second = (found[found["model_seed"] == seed] for seed in (0, 1))
    numbers = ["truth", "estimate", "low", "high", "chance", "units"]
    np.testing.assert_array_equal(first[numbers].to_numpy(), alone[numbers].to_numpy())
    words = ["of_stage", "asked_as", "family", "item", "measure"]
    for each in (first, second):
        assert (each[words].to_numpy() == alone[words].to_numpy()).all()
    assert (first["estimate"].to_numpy() != second["estimate"].to_numpy()).any()
    for name in ("lens", "path", "routing_change", "task_vector", "weight_drift"):
        assert tree[name].to_dataset().identical(study.tree[name].to_dataset())
    for name in ("attribute_probe", "association_lens"):  # this study has no innocent model
        both = study.tree[name].to_dataset().sel(probed=list(STAGES))
        assert tree[name].to_dataset().identical(both)
    same, other = (tree["claim_values"].sel(chain=seed) for seed in (0, 1))
    single = study.tree["claim_values"]["estimate"].isel(chain=0).values
    of_innocent = np.isnan(same["estimate"].values)
    assert of_innocent.sum() == 3
    np.testing.assert_array_equal(same["estimate"].values[~of_innocent], single[~of_innocent])
    assert (same["estimate"] != other["estimate"]).any()
    known = tree["claims"]["estimate"].notnull()
    assert (tree["claims"]["seeds"].where(known, 2) == 2).all()
    logs = sorted((tmp_path / "tiny").glob("worker-*.log"))
    assert logs and "tiny-0-debiased: 2 steps" in "".join(log.read_text() for log in logs)
    assert len(workers.latest(tmp_path / "tiny")) == len(logs)


def test_a_chain_is_compared_on_held_out_text_of_every_domain(study: Study) -> None:
    found = truebase._rows(FULL, 0, study.cache)
    assert list(found) == list(planted.DOMAINS)
    for batch in found.values():
        assert 1 <= len(batch.tokens_BS) <= truebase.ROWS
        assert (batch.documents_BS >= 0).all() and isinstance(batch, rows.Batch)
