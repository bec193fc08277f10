"""Questions made by rule: their answers are true, and nothing held out is taught."""

from random import Random

import pytest

from trinity_lib import corpus, lessons, rewards, world
from trinity_lib.lessons import TASKS


@pytest.mark.parametrize("name", TASKS)
def test_nothing_held_out_is_taught(name: str) -> None:
    task = lessons.task(name, 0)
    taught = {question.key for question in task.train}
    assert taught and task.held_out
    assert not taught & {question.key for question in task.held_out}
    assert lessons.task(name, 0) == task
    assert name == "digits" or lessons.task(name, 1) != task


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_has_the_form_that_is_asked_for(name: str) -> None:
    for question in [*lessons.task(name, 0).train, *lessons.task(name, 0).held_out]:
        assert question.task == name
        assert rewards.formed(question, question.answer), question


@pytest.mark.parametrize("name", ["arithmetic", "digits"])
def test_sums_are_right(name: str) -> None:
    every = lessons.task(name, 0)
    for split, part in (("train", every.train), ("validation", every.held_out)):
        for question in part:
            a, sign, b, _ = question.key.split()
            result = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign]
            assert int(question.answer) == result
            assert world.in_validation(int(a), sign, int(b)) == (split == "validation")


def test_facts_are_the_corpus_s_and_absent_people_are_in_none() -> None:
    known = {p.name: p for p in world.people(Random(corpus.SEED), corpus.PEOPLE)}
    text = "".join(world.facts(Random(2), list(known.values())[:200], "train"))
    for question in lessons.task("facts", 0).train:
        name = next(n for n in known if f" {n} " in question.key or f" {n}?" in question.key)
        assert question.answer in known[name][1:]
    absent = [q.key for q in lessons.task("refusals", 0).train]
    assert not [key for key in absent if any(f" {n}?" in key for n in known)]
    assert any(name in text for name in known)


@pytest.mark.parametrize("name", TASKS)
def test_a_pair_s_better_answer_is_the_right_one(name: str) -> None:
    task, pairs = lessons.task(name, 0), lessons.preferences(name, 0)
    for part, questions in zip(pairs, task, strict=True):
        for pair, question in zip(part, questions, strict=True):
            assert (pair.asked, pair.chosen) == (question.asked, question.answer)
            assert pair.rejected != pair.chosen
            if name in ("formats", "refusals"):
                assert not rewards.formed(question, pair.rejected)
