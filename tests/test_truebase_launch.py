"""What a notebook's parameters ask of a study of stages, and what is refused in a sentence."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from trinity_lib import findings, hub, stage_statements, truebase_config, truebase_launch
from trinity_lib.config import BadValue, Missing, Refusal
from trinity_lib.model import ModelConfig, Trinity


@pytest.fixture(scope="module")
def folder(tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Trinity(tiny_model)
    model.initialise(torch.Generator().manual_seed(0))
    made = tmp_path_factory.mktemp("given") / "base"
    hub.save(model, made)
    return made


def test_nothing_asked_for_is_the_scales_own() -> None:
    for scale, own in truebase_config.SCALES.items():
        found = truebase_launch.configure(scale=scale, workers=1, device="cpu")
        assert found == truebase_config.named(own())
        assert truebase_launch.describe(found).count("\n") == 0


def test_parameters_arrive_as_papermill_passes_them() -> None:
    found = truebase_launch.configure(
        scale="small", steps="30, 20", instruct_steps=[3, 2], seeds=2, debias_steps=4, draws=0,
        ablate="false", workers=1,
    )  # fmt: skip
    assert found.steps == (30, 20)
    assert [(s.kind, s.steps) for s in found.instruct] == [("sft", 3), ("dpo", 2)]
    assert (found.seeds, found.debias.steps, found.draws, found.ablate) == (2, 4, 0, False)


def test_a_name_is_of_the_settings_and_not_of_the_workers() -> None:
    one, two = (truebase_launch.configure(workers=n) for n in (1, 2))
    assert one.name == two.name
    assert one.name != truebase_launch.configure(seed=1).name


def test_checkpoints_have_the_names_given_or_their_folders(folder: Path) -> None:
    found = truebase_launch.configure(checkpoints=f"truebase={folder}, {folder}")
    assert found.checkpoints == (("truebase", str(folder)), ("base", str(folder)))
    assert truebase_launch.describe(found).count("8 experts, top-") == 2


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"scale": "huge"}, BadValue, "scale is 'huge'"),
        ({"steps": "30"}, BadValue, "steps is '30'; it must be two numbers"),
        ({"steps": "0, 3"}, BadValue, "steps"),
        ({"instruct_steps": "1, 2, 3"}, BadValue, "a number for each of sft"),
        ({"debias_steps": 0}, BadValue, "sft.steps is 0"),
        ({"seeds": 0}, BadValue, "seeds is 0"),
        ({"draws": -1}, BadValue, "draws is -1"),
        ({"reader": "vllm"}, BadValue, "reader is 'vllm'"),
        ({"ablate": "perhaps"}, BadValue, "ablate is 'perhaps'"),
        ({"device": "tpu"}, BadValue, "device is 'tpu'"),
        ({"items": "no-such.jsonl"}, Missing, "items is 'no-such.jsonl'"),
        ({"world": "no-such.json"}, Missing, "world is 'no-such.json'"),
        ({"source": "no-such.nc"}, Missing, "source is 'no-such.nc'"),
        ({"tasks": "trinity_facts"}, BadValue, "tasks"),
        ({"checkpoints": "base=no/such/folder"}, Missing, "no/such/folder"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    given: dict[str, Any], kind: type[Refusal], said: str
) -> None:
    with pytest.raises(kind) as caught:
        truebase_launch.configure(**given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=str(tmp_path)):
        truebase_launch.configure(checkpoints=f"base={tmp_path}")


REFERENCE = Path(__file__).parent.parent / "runs" / "reference" / "truebase.nc"


def test_the_committed_study_is_opened_and_says_what_the_readme_says() -> None:
    config = truebase_launch.configure(source=str(REFERENCE))
    run = truebase_launch.run(config)
    assert run.attrs["status"] == "complete"
    assert truebase_launch.describe(config) == "drawn from runs/reference/truebase.nc"
    claims, chains = run["claims"].to_dataset(), run["claim_values"].to_dataset()
    texts = [statement.text for statement in stage_statements.CLAIMS]
    assert claims["statement"].values.tolist() == texts
    for n, verdict in enumerate(claims["verdict"].values):
        judged = findings.judge(pd.Series(chains["estimate"].values[n]))
        assert judged.verdict == verdict
        assert judged.estimate == pytest.approx(float(claims["estimate"][n]))
        assert judged.seeds == len(chains["chain"]) == 4
    rows = run["findings"].to_dataset().to_dataframe()
    item = "Pearson correlation with planted levels, held-out names"
    found = rows[(rows["item"] == item) & rows["of_stage"].isin(["truebase", "base"])]
    assert len(found) == 8
    assert found["estimate"].min() >= 0.9
    assert run["audits"]["calibrated"].values.all()
    assert (run["audits"]["draws"].values >= 200).all()


def test_another_kind_of_run_is_no_source() -> None:
    config = truebase_launch.configure(source=str(REFERENCE.with_name("collapse.nc")))
    with pytest.raises(BadValue, match="no run file of a study of stages"):
        truebase_launch.run(config)


def test_cards_of_a_run_from_elsewhere_are_said_not_to_be_here() -> None:
    run = truebase_launch.run(truebase_launch.configure(source=str(REFERENCE)))
    run.attrs["name"] = "never-run-here"
    assert truebase_launch.cards(run).endswith("never-run-here are not on this machine")


def test_what_was_left_out_is_grouped_by_reason() -> None:
    run = truebase_launch.run(truebase_launch.configure(source=str(REFERENCE)))
    run.attrs["left_out"] = '{"a": "no items", "b": "no world", "c": "no items"}'
    assert truebase_launch.left_out(run) == "left out: a, c: no items\nleft out: b: no world"
