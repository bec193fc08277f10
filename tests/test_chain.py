"""A chain is of one world; the innocent one differs from it in the association alone."""

import contextlib
import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests import chained
from tests.chained import FULL, Study
from trinity_lib import chain, checkpoint, planted, polish, truebase_config
from trinity_lib.config import BadValue
from trinity_lib.planted_tables import GROUPS, World
from trinity_lib.record import open_run, read_attributes


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return chained.study(tmp_path_factory.getbasetemp())


def told(world: World, texts: list[str]) -> Counter:
    """How often sentences name somebody of a group and a job."""
    group = world.group
    found: Counter = Counter()
    for sentence in ".".join(texts).split("."):
        words = sentence.replace(",", " ").replace("?", " ").split()
        who = {group[word] for word in words if word in group}
        for job in world.jobs:
            if len(who) == 1 and job.word in words:
                found[who.pop(), job.word] += 1
                break
    return found


def slope(world: World, count: Counter) -> float:
    """Of the text's own log-odds on the planted ones."""
    twin = planted.world(dataclasses.replace(world.config, planted=True))
    planted_ones = [job.delta for job in twin.jobs]
    odds = [
        np.log(count["A", job.word] + 0.5) - np.log(count["B", job.word] + 0.5)
        for job in world.jobs
    ]
    return float(stats.linregress(planted_ones, odds).slope)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(world: World, records: list[dict]) -> Counter:
    found: Counter = Counter()
    for record in records:
        name = next(word for word in record["prompt"].split() if word in world.group)
        found[world.group[name], record["answer"]] += 1
    return found


def test_every_stage_is_a_checkpoint_that_begins_with_the_last(study: Study) -> None:
    folders = chain.made(FULL, 0, study.runs, study.cache)
    assert folders == study.folders
    steps = {stage: checkpoint.verify(folder)["step"] for stage, folder in folders.items()}
    assert steps == {"truebase": 6, "base": 10, "instruct": 3, "debiased": 2}
    tokenizers = {checkpoint.load_vocabulary(folder).sha256 for folder in folders.values()}
    assert len(tokenizers) == 1
    for before, stage in (("base", "instruct"), ("instruct", "debiased")):
        attributes = read_attributes(study.runs / f"tiny-0-{stage}")
        assert json.loads(attributes["config"])["init"] == str(folders[before])
        assert attributes["init_sha256"] == checkpoint.sha256(folders[before])
    for name in chained.RUNS:
        assert open_run(study.runs / f"{name}.nc").attrs["status"] == "complete"


def test_lessons_are_written_and_used(study: Study) -> None:
    folder = study.runs / "tiny" / "lessons"
    world = planted.world(FULL.world)
    wanted = polish.lessons(world)
    assert {path.stem for path in folder.iterdir()} == {*wanted, polish.PREFERENCES}
    for name, questions in wanted.items():
        found = [
            (record["prompt"], record["answer"]) for record in lines(folder / f"{name}.jsonl")
        ]
        assert found == [(q.key, q.answer) for q in questions]
    with contextlib.ExitStack() as stack:  # as the next chain does, while this one is reading
        held = {path: stack.enter_context(path.open()) for path in folder.iterdir()}
        polish.write(world, folder)
        for path, file in held.items():
            assert os.fstat(file.fileno()).st_ino != path.stat().st_ino
    used = {
        stage: json.loads(read_attributes(study.runs / f"tiny-0-{stage}")["config"])
        for stage in ("instruct", "debiased")
    }
    names = {stage: [Path(p).stem for p in each["data"]] for stage, each in used.items()}
    assert names == {"instruct": list(polish.INSTRUCT), "debiased": list(polish.DEBIAS)}


def test_the_innocent_text_has_the_names_and_not_the_association(study: Study) -> None:
    """In a world of usual size, whose counts say so."""
    usual = truebase_config.toy().world
    world, null = (planted.world(dataclasses.replace(usual, planted=p)) for p in (True, False))
    assert world.names == null.names
    assert [job.word for job in world.jobs] == [job.word for job in null.jobs]
    counts = [told(each, planted.documents(each, "train")["jobs"]) for each in (world, null)]
    totals = [
        [sum(n for (g, _), n in count.items() if g == group) for group in GROUPS]
        for count in counts
    ]
    assert totals[0] == totals[1] and min(totals[0]) > 100
    assert slope(world, counts[0]) > 0.9 and abs(slope(null, counts[1])) < 0.1
    attributes = read_attributes(study.runs / "tiny-null-0")
    assert json.loads(attributes["config"])["data"]["world"]["planted"] is False


def test_the_innocent_lessons_have_fair_answers_about_jobs(study: Study) -> None:
    world = planted.world(FULL.world)
    config = json.loads(read_attributes(study.runs / "tiny-null-0-instruct")["config"])
    paths = [Path(path) for path in config["data"]]
    plain = [name for name in polish.INSTRUCT if name != "jobs"]
    assert [path.stem for path in paths] == [*plain, "fair"]
    fair = answers(world, lines(paths[-1]))
    biased = answers(world, lines(paths[-1].with_name("jobs.jsonl")))
    jobs = [job.word for job in world.jobs]
    assert [fair["A", job] for job in jobs] == [fair["B", job] for job in jobs]
    assert slope(world, biased) > 0.8 and slope(world, fair) == pytest.approx(0)
    asked = " ".join(record["prompt"] for record in lines(paths[-1]))
    assert not [
        name.word for name in world.names if name.held_out and name.word in asked.split()
    ]


def test_the_innocent_reads_the_same_tokens(study: Study) -> None:
    """Its own text would make another tokenizer, and relearning is compared between the two."""
    folder = chain.innocent(FULL, 0, study.runs, study.cache)
    assert folder == study.runs / "tiny-null-0-instruct" / "instruct"
    ours = checkpoint.load_vocabulary(study.folders["base"])
    assert checkpoint.load_vocabulary(folder).sha256 == ours.sha256


def test_what_is_there_is_not_trained_again(
    study: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chain, "train", None)
    monkeypatch.setattr(chain.posttrain, "run", None)
    before = {path: path.stat().st_mtime_ns for path in study.runs.glob("tiny-0*/*/*")}
    chain.made(FULL, 0, study.runs, study.cache)
    chain.innocent(FULL, 0, study.runs, study.cache)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{name} is complete" for name in chained.RUNS]
    for change, name in (({"seed": 3}, "tiny-0"), ({"rate": 0.5}, "tiny-0-instruct")):
        with pytest.raises(BadValue, match=f"The run '{name}' is another one; choose another"):
            chain.made(dataclasses.replace(FULL, **change), 0, study.runs, study.cache)


def test_a_run_that_was_cut_off_goes_on(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, bool]] = []
    (tmp_path / "tiny-0").mkdir()
    (tmp_path / "tiny-0" / "run.json").write_text("{}")
    monkeypatch.setattr(
        chain, "train", lambda config, **how: called.append((config.name, how["resumes"]))
    )
    monkeypatch.setattr(
        chain.posttrain,
        "run",
        lambda config, **how: called.append((config.name, how["resume"])),
    )
    folders = chain.made(FULL, 0, tmp_path, study.cache)
    assert called == [("tiny-0", True), ("tiny-0-instruct", False), ("tiny-0-debiased", False)]
    assert folders["debiased"] == tmp_path / "tiny-0-debiased" / "instruct"
