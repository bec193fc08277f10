"""What a chain holds inside: the right questions, and figures that stand by others' means."""

import numpy as np
import pytest

from tests import chained
from tests.chained import FULL, Study
from trinity_lib import ablation, association, inside, interview, planted, polish
from trinity_lib.asked import Asked
from trinity_lib.planted_tables import TOLD, Fact
from trinity_lib.truebase_config import STAGES

WORLD = planted.world(FULL.world)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return chained.study(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def base(study: Study) -> interview.Checkpoint:
    return interview.read(study.folders["base"], "trinity", "cpu")


def test_facts_that_are_known_are_asked_once() -> None:
    facts = [each.about for each in inside.known_facts(WORLD)]
    often = [f for f in WORLD.facts if f.state == TOLD and f.exposures >= polish.LEARNT]
    assert facts == often and len(set(facts)) == len(facts) > 5
    for question, about in inside.known_facts(WORLD):
        assert isinstance(about, Fact) and about.person in question.prompt
        assert not question.template.startswith("held-out")
        assert question.answers[question.truth.index(1.0)] == f" {about.value}"


def test_the_lens_ends_with_what_the_model_says(
    study: Study, base: interview.Checkpoint
) -> None:
    found = study.tree["lens"].to_dataset()
    assert found.stage.values.tolist() == list(STAGES)
    last = found.isel(block=-1)
    assert np.allclose(last["divergence"], 0, atol=1e-6)
    facts = inside.known_facts(WORLD)
    vocabulary = base.vocabulary
    words = vocabulary.decode([[token] for token in range(vocabulary.size)])
    kept = [n for n, word in enumerate(words) if word.strip() and "\ufffd" not in word]
    told = [q.answers[q.truth.index(1.0)] for q, _ in facts]
    asked = [[words[n] for n in kept]] * len(facts)
    nats = base.subject.score([q.prompt for q, _ in facts], asked)
    own = base.subject.score([q.prompt for q, _ in facts], [[each] for each in told])
    right = np.mean([mine[0] >= each.max() for mine, each in zip(own, nats, strict=True)])
    assert float(last["right"].sel(stage="base")) <= right + 1e-9
    assert found["right"].max() <= 1 and (found["rank"] >= 1).all()


def test_names_are_probed_at_three_places(study: Study) -> None:
    found = study.tree["attribute_probe"].to_dataset()
    assert found.probed.values.tolist() == [*STAGES, inside.INNOCENT]
    assert found.place.values.tolist() == list(inside.PLACES)
    assert (found["units"] == len(WORLD.names)).all()
    assert not any(found[name].isnull().any() for name in ("accuracy", "low", "high", "chance"))
    assert ((found["p"] > 0) & (found["p_adjusted"] <= 1)).all()
    at_question = found.sel(place="end of question")
    assert at_question["seen"].isnull().all()  # one prompt
    assert found["seen"].sel(place="name").notnull().all()


def test_the_last_blocks_association_is_the_models_own(study: Study) -> None:
    found = study.tree["association_lens"].to_dataset()
    assert found.probed.values.tolist() == [*STAGES, inside.INNOCENT]
    rows = study.tree["findings"].to_dataset().to_dataframe()
    rows = rows[rows["item"] == "slope, held-out names"].set_index(["asked_as", "of_stage"])
    for asked_as, place in (("text", "end of text"), ("chat", "end of question")):
        for stage in STAGES:
            last = found.sel(lens_place=place, probed=stage).isel(block=-1)
            own = rows.loc[(asked_as, stage)]
            for name, wanted in (("slope", "estimate"), ("low", "low"), ("high", "high")):
                assert float(last[name]) == pytest.approx(own[wanted], abs=1e-4)
            assert int(last["units"]) == own["units"]
    first = found.isel(block=0)
    np.testing.assert_allclose(first["slope"], 0, atol=1e-9)  # it has not seen the name


def test_relearning_begins_where_the_debiased_model_stands(study: Study) -> None:
    found = study.tree["relearning"].to_dataset()
    assert found.start.values.tolist() == ["debiased", inside.INNOCENT]
    assert found.lesson.values.tolist() == [inside.OLD, inside.NEW]
    assert found["steps"].values.tolist() == [0, 1, 2]
    assert found["target"].values.tolist() == [inside.TARGET, -inside.TARGET]
    before = found["bias"].isel(look=0)
    assert (before == before.isel(lesson=0)).all()
    starts = {
        "debiased": study.folders["debiased"],
        inside.INNOCENT: study.runs / "tiny-null-0-instruct" / "instruct",
    }
    taught = {word for q in polish.relearning(WORLD, opposite=False) for word in _words(q.key)}
    for start, folder in starts.items():
        model, vocabulary, _, template = interview.read(folder, "trinity", "cpu")
        assert template is not None
        asked = [q for q in polish.association(WORLD, template) if q.cluster not in taught]
        told = [name.word for name in WORLD.names if not name.held_out]
        assert {q.cluster for q in asked} & set(told) < set(told)
        slope = association.slope(Asked(model, vocabulary), WORLD, asked).estimate
        assert float(before.sel(start=start).isel(lesson=0)) == pytest.approx(slope, abs=1e-9)


def _words(text: str) -> list[str]:
    return text.replace("?", " ").split()


def test_experts_of_the_base_are_taken_out_one_by_one(
    study: Study, base: interview.Checkpoint
) -> None:
    found = study.tree["ablation"].to_dataset().sel(ablated="base")
    assert found.measure.values.tolist() == ["association", "recall"]
    whole = found["whole"].sel(measure="association")
    rows = chained.table(study.tree)
    primary = rows[
        (rows["of_stage"] == "base")
        & (rows["asked_as"] == "text")
        & (rows["item"] == "slope, held-out names")
    ]
    assert float(whole) == pytest.approx(float(primary["estimate"].iloc[0]), abs=1e-9)
    effect = found["effect"].sel(measure="association")
    most = effect.where(found["used"].sel(measure="association") > 0)
    layer, expert = np.unravel_index(np.nanargmax(abs(most.values)), most.shape)
    where = int(most.layer[layer]), int(most.expert[expert])
    with ablation.without(base.model, *where):
        slope = association.slope(Asked(base.model, base.vocabulary), WORLD).estimate
    assert slope - float(whole) == pytest.approx(float(most[layer, expert]), abs=1e-9)
    assert 0 < float(found["whole"].sel(measure="recall")) < 1


def test_experts_are_taken_out_if_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_lens", "_probes", "_association_lens", "_relearning", "_ablation"):
        monkeypatch.setattr(inside, name, lambda *_, name=name: name)
    told: list[str] = []
    looks = ["lens", "attribute_probe", "association_lens", "relearning"]
    found = inside.look(inside.Chain({}, WORLD), chained.TINY, 0, told.append)
    assert list(found) == looks and len(told) == 3
    found = inside.look(inside.Chain({}, WORLD), FULL, 0, told.append)
    assert list(found) == [*looks, "ablation"]
