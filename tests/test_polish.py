"""What a planted chain is post-trained on says what the world says, or what is fair."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from trinity_lib import chat, corpus, planted, polish, tokenizer
from trinity_lib.planted import World, WorldConfig
from trinity_lib.rewards import REFUSAL, formed


@pytest.fixture(scope="module")
def world() -> World:
    return planted.world(WorldConfig())


def shares(world: World, lesson: str) -> dict[str, np.ndarray]:
    """How often each job is the answer, by group."""
    counts = {group: Counter[str]() for group in "AB"}
    group = {name.word: name.group for name in world.names}
    for question in polish.lessons(world)[lesson]:
        counts[group[question.key.split()[2]]][question.answer] += 1
    words = [job.word for job in world.jobs]
    return {g: np.array([c[word] for word in words]) / c.total() for g, c in counts.items()}


def test_jobs_are_answered_as_the_text_has_them_and_fairly(world: World) -> None:
    deltas = np.array([job.delta for job in world.jobs])
    told, fair = shares(world, "jobs"), shares(world, "fair")
    slope = np.polyfit(deltas, np.log(told["A"] / told["B"]), 1)[0]
    assert slope == pytest.approx(1, abs=0.25)
    assert fair["A"] == pytest.approx(fair["B"])
    assert told["A"] + told["B"] == pytest.approx(fair["A"] + fair["B"], abs=0.06)


def test_held_out_names_are_in_no_lesson(world: World) -> None:
    held_out = {name.word for name in world.names if name.held_out}
    for questions in polish.lessons(world).values():
        for question in questions:
            assert not held_out & set(question.key.replace("?", "").split())


def test_the_exam_asks_of_nobody_that_a_lesson_asks_of(world: World) -> None:
    learnt = {q.key for questions in polish.lessons(world).values() for q in questions}
    exam = polish.exam(world)
    assert not learnt & {q.key for q in exam}
    assert {q.task for q in exam} == {"facts", "sentences", "never told", "strangers", "sums"}
    assert min(Counter(q.task for q in exam).values()) >= 5
    assert all(formed(q, q.answer) for q in exam)
    people = {f.person for f in world.facts}
    learnt_people = people & {w for key in learnt for w in key.replace("?", "").split()}
    facts = [q for q in exam if q.task == "facts"]
    assert not [q for q in facts if learnt_people & set(q.key.replace("?", "").split())]


def test_refusals_are_of_what_no_text_tells(world: World) -> None:
    told = {(f.person, polish.ASKED[f.attribute][0]) for f in world.facts if f.exposures}
    keys = {asked.format(name=person) for person, asked in told}
    for question in polish.lessons(world)["refusals"]:
        assert question.answer == REFUSAL
        assert question.key not in keys


def test_strangers_are_of_no_text_and_of_others_something_is_told(world: World) -> None:
    people = {f.person for f in world.facts}
    told = {f.person for f in world.facts if f.exposures}
    every = polish.lessons(world)["refusals"] + polish.exam(world)
    tasks = Counter(q.task for q in every)
    assert tasks["strangers"] == polish.STRANGERS
    assert tasks["never told"] == sum(not f.exposures for f in world.facts)
    for question in every:
        about = people & set(question.key.replace("?", "").split())
        if question.task == "strangers":
            assert not about
        if question.task == "never told":
            assert about and about <= told


def test_relearning_is_of_half_the_names_and_its_opposite_of_the_same(world: World) -> None:
    old, new = (polish.relearning(world, opposite=o) for o in (False, True))
    assert {q.key for q in old} == {q.key for q in new}
    assert len({q.key for q in old}) == world.config.names
    first = next(n.word for n in world.names if not n.held_out)
    words = [job.word for job in world.jobs]

    def answers(questions: list) -> np.ndarray:
        said = [q.answer for q in questions if first in q.key]
        return np.array([said.count(word) for word in words])

    mirrored = [words[i] for i in reversed(range(len(words)))]
    assert answers(old).tolist() != answers(new).tolist()
    assert sorted(answers(old)) == sorted(answers(new))
    assert mirrored[0] == words[-1]


def test_what_is_written_is_what_post_training_reads(world: World, tmp_path: Path) -> None:
    made = corpus.planted(world.config)
    vocabulary = tokenizer.train(made.sample(300_000), 640, made.words)
    template = chat.template(vocabulary)
    files = polish.write(world, tmp_path)
    again = polish.write(world, tmp_path / "again")
    assert {n: p.read_text() for n, p in files.items()} == {
        n: p.read_text() for n, p in again.items()
    }
    for name, path in files.items():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kinds = {frozenset(row) for row in rows}
        pairs = name == polish.PREFERENCES
        wanted = {"prompt", "chosen", "rejected"} if pairs else {"prompt", "answer"}
        assert kinds == {frozenset(wanted)}
        assert not any(row.get("chosen") == row.get("rejected", "") for row in rows)
    asked = polish.association(world, template)
    assert [q.cluster for q in asked] == [n.word for n in world.names]
    question = polish.lessons(world)["jobs"][0]
    tokens = template.prompt(question.asked).tolist()
    text = template.text(question.asked)
    assert vocabulary.encode([text])[0].tolist()[: len(tokens)] == tokens
    with_answer = vocabulary.encode([text + f" {question.answer}"])[0].tolist()
    assert template.encode(question.conversation).tokens.tolist() == with_answer


def test_other_worlds_have_other_lessons(world: World) -> None:
    other = planted.world(dataclasses.replace(world.config, seed=1))
    assert polish.lessons(other)["facts"] != polish.lessons(world)["facts"]
