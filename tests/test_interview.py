"""One checkpoint, asked: the same twice, whoever reads it, and what needs conversations."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests import chained
from tests.chained import FULL, Study
from trinity_lib import (
    audit,
    chat,
    examination,
    interview,
    items,
    planted,
    polish,
    rewards,
    tokenizer,
)
from trinity_lib.asked import Asked
from trinity_lib.config import BadValue, Missing
from trinity_lib.interview import Said
from trinity_lib.items import Item
from trinity_lib.oracle import Oracle
from trinity_lib.planted import WorldConfig
from trinity_lib.planted_tables import GROUPS
from trinity_lib.tokenizer import Vocabulary
from trinity_lib.train import reproducible

os.environ["HF_HUB_OFFLINE"] = "1"
WORLD = planted.world(FULL.world)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return chained.study(tmp_path_factory.getbasetemp())


def test_the_same_folder_says_the_same(study: Study) -> None:
    read = interview.read(study.folders["instruct"], "trinity", "cpu")
    with reproducible(FULL.threads, "cpu"):  # as the study did: threads decide last bits
        again = interview.of_world(read, WORLD, FULL.seed)
    assert chained.alike(chained.of_stage(study.tree, "instruct"), again)
    other = chained.of_stage(study.tree, "truebase")
    assert not chained.alike(other, again, within=1e-3)


def test_transformers_says_the_same(study: Study) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    read = interview.read(study.folders["debiased"], "transformers", "cpu")
    found = interview.of_world(read, WORLD, FULL.seed)
    assert not isinstance(read.subject, Asked)
    assert chained.alike(chained.of_stage(study.tree, "debiased"), found, within=1e-4)


def test_without_an_end_mark_there_are_no_conversations(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "run", lambda *_, **__: ["asked"])
    folder = tmp_path / "instruct"
    shutil.copytree(study.folders["instruct"], folder)
    (folder / "manifest.json").unlink()
    own = tokenizer.load(folder)
    Vocabulary(own.tokenizer, own.begin, None).save(folder)
    read = interview.read(folder, "trinity", "cpu")
    assert read.template is None and "no end mark" in interview.not_conversed(read)
    assert interview.of_world(read, WORLD, 0) == [Said("text", "asked")]  # type: ignore[arg-type]
    whole = interview.read(study.folders["instruct"], "trinity", "cpu")
    assert whole.template is not None and interview.not_conversed(whole) == ""


def test_a_damaged_folder_is_refused(study: Study, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(study.folders["base"], folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(BadValue, match=r"damaged: config.json has"):
        interview.read(folder, "trinity", "cpu")
    with pytest.raises(Missing, match="nowhere"):
        interview.read(tmp_path / "nowhere", "trinity", "cpu")


class Saying:
    """Says what it is told to."""

    def __init__(self, said: Sequence[str]) -> None:
        self.said = said

    def complete(self, prompts: Sequence[str], tokens: int) -> list[str]:
        assert len(prompts) == len(self.said)
        return list(self.said)


@pytest.mark.parametrize("reader", ["trinity", "transformers"])
def test_the_reader_itself_sits_the_exam(study: Study, reader: interview.Reader) -> None:
    """It is asked the tokens that lessons are of, and says what our own model says to them."""
    if reader == "transformers":
        pytest.importorskip("transformers").logging.set_verbosity_error()
    asked = polish.exam(WORLD)
    read = interview.read(study.folders["instruct"], reader, "cpu")
    assert read.template is not None
    for q in asked:
        mine = read.vocabulary.encode([read.template.text(q.asked)])[0]
        assert mine[:-1].tolist() == read.template.prompt(q.asked).tolist()  # but the end mark
    said = interview._answers(read.subject, read.template, asked)
    assert said == examination.answers(read.model, read.template, asked)
    assert any(said) and len(set(said)) > 1


def test_who_is_read_is_who_sits_the_exam(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "run", lambda *_, **__: [])
    monkeypatch.setattr(interview, "conversed", lambda *_: [])
    read = interview.read(study.folders["instruct"], "trinity", "cpu")
    subject = Saying([q.answer for q in polish.exam(WORLD)])
    found = interview.of_world(read._replace(subject=subject), WORLD, 0)  # type: ignore[arg-type]
    assert found and {f.estimate for _, f in found} == {1.0}


def test_where_a_text_cannot_spell_turns_no_conversation_is_had(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "run", lambda *_, **__: ["asked"])
    read = interview.read(study.folders["instruct"], "trinity", "cpu")
    assert read.template is not None
    marked = read._replace(template=read.template._replace(end=chat.CHATML[1]))
    assert "marks of the tokenizer" in interview.not_conversed(marked)
    assert interview.of_world(marked, WORLD, 0) == [Said("text", "asked")]  # type: ignore[arg-type]


class Told:
    """Answers a question in a conversation by the group's own proportions, or by none."""

    def __init__(self, biased: bool) -> None:
        self.biased = biased

    def score(self, prompts, answers):  # type: ignore[no-untyped-def]
        names = {name.word: name.group for name in WORLD.names}
        found = []
        for prompt in prompts:
            group = next(names[w] for w in prompt.replace("?", " ").split() if w in names)
            shares = WORLD.job_probabilities(group if self.biased else GROUPS[0])
            found.append(np.log(shares))
        return found


@pytest.mark.parametrize("biased", [True, False])
def test_the_association_in_conversations_is_the_slope(study: Study, biased: bool) -> None:
    template = interview.read(study.folders["base"], "trinity", "cpu").template
    assert template is not None
    found = list(interview.conversed(Told(biased), template, WORLD))  # type: ignore[arg-type]
    assert [f.item for f in found] == ["slope, told names", "slope, held-out names"]
    assert [f.estimate for f in found] == pytest.approx([float(biased)] * 2)
    assert [f.units for f in found] == [2 * FULL.world.names, 2 * FULL.world.held_out_names]
    assert all(np.isnan(f.truth) and f.chance == 0 for f in found)


def test_the_exam_is_marked_by_task(study: Study) -> None:
    """Of a model that knows every answer but to sums, and one that refuses everything."""
    world = planted.world(WorldConfig())
    asked = polish.exam(world)
    tasks = list(dict.fromkeys(q.task for q in asked))
    refused = ("strangers", "never told")
    assert tasks == ["facts", "sentences", "never told", "strangers", "sums"]
    template = interview.read(study.folders["base"], "trinity", "cpu").template

    def marks(said: list[str]) -> dict[tuple[str, str], float]:
        subject = Saying(said)
        found = list(interview._examined(subject, template, world))  # type: ignore[arg-type]
        assert {f.family for f in found} == {"instruction"}
        return {(f.item, f.measure): f.estimate for f in found}

    knows = marks([q.answer if q.task != "sums" else "no number" for q in asked])
    refuses = marks([rewards.REFUSAL for _ in asked])
    for task in tasks:
        assert knows[task, "right answers, share"] == float(task != "sums")
        assert refuses[task, "right answers, share"] == float(task in refused)
        assert knows[task, "answers of the form asked for, share"] == float(task != "sums")
    apart = [
        found["refusals", "of what is in no text less known, share"]
        for found in (knows, refuses)
    ]
    assert apart == [1, 0]
    assert refuses["refusals", "of what is known, share"] == 1
    assert knows["refusals", "of what is known, share"] == 0
    by_name = marks([rewards.REFUSAL if q.task == "strangers" else "no" for q in asked])
    assert by_name["strangers", "right answers, share"] == 1
    assert by_name["refusals", "of what is in no text, share"] == 0  # strangers are not in it


def test_a_person_is_one_unit_of_the_exam(monkeypatch: pytest.MonkeyPatch) -> None:
    world = planted.world(WorldConfig())
    asked = polish.exam(world)
    monkeypatch.setattr(interview, "_answers", lambda *_: ["" for _ in asked])
    found = list(interview._examined(None, None, world))  # type: ignore[arg-type]
    units = {f.item: f.units for f in found if f.measure.startswith("right")}
    apart = next(f.units for f in found if "less known" in f.measure)
    facts = [q.key for q in asked if q.task == "facts"]
    who = {f.person for f in world.facts if any(f.person in key for key in facts)}
    assert units["facts"] == units["sentences"] == len(who) < len(facts)
    never = {interview._whom(world, q) for q in asked if q.task == "never told"}
    assert units["never told"] == len(never) and apart == len(who | never) < len(who) + len(
        never
    )
    assert units["strangers"] == sum(q.task == "strangers" for q in asked)
    assert units["sums"] == sum(q.task == "sums" for q in asked)


def test_an_exam_without_known_people_has_no_refusals_to_compare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = [q for q in polish.exam(WORLD) if q.task not in ("facts", "sentences")]
    monkeypatch.setattr(polish, "exam", lambda _: asked)
    monkeypatch.setattr(interview, "_answers", lambda *_: ["" for _ in asked])
    found = list(interview._examined(None, None, WORLD))  # type: ignore[arg-type]
    assert {f.item for f in found} == {"sums", "strangers"}
    assert not [f for f in found if "less known" in f.measure]


def test_items_are_asked_of_any_model() -> None:
    subject = Oracle(WORLD)
    assert interview.of_any(subject, []) == []
    questions = planted.questions(WORLD, "facts")[:6]
    asked = [Item(q.prompt, q.answers, q.truth.index(1.0)) for q in questions]
    found = interview.of_any(subject, asked)
    assert [how for how, _ in found] == ["text"] * len(found)
    again = [Said("text", f) for f in items.audit(subject, asked)]
    assert chained.alike(found, again)
    assert found[0].finding.estimate == 1 and found[0].finding.units == 6
