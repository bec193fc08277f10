"""Procedural text is true, split as it says, and the same for the same seed."""

from random import Random

import pytest

from trinity_lib import world


def problems(documents: list[str]) -> list[tuple[int, str, int, int]]:
    lines = [line for text in documents for line in text.splitlines()]
    parts = [line.split() for line in lines]
    return [(int(a), sign, int(b), int(c)) for a, sign, b, _, c in parts]


def test_every_sum_is_true_and_splits_share_no_problem() -> None:
    train = problems(world.arithmetic(Random(1), 400, "train"))
    validation = problems(world.arithmetic(Random(1), 100, "validation"))
    results = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}
    for a, sign, b, c in train + validation:
        assert results[sign](a, b) == c
    seen = {(min(a, b), sign, max(a, b)) for a, sign, b, _ in train}
    assert not seen & {(min(a, b), sign, max(a, b)) for a, sign, b, _ in validation}
    assert {sign for _, sign, _, _ in train} == {"+", "-", "x"}


def test_facts_are_true_and_validation_is_phrased_anew() -> None:
    known = world.people(Random(2), 50)
    assert len({p.name for p in known}) == 50
    train = world.facts(Random(3), known, "train")
    validation = world.facts(Random(4), known, "validation", exposures=2)
    assert len(train) == 300 and len(validation) == 100
    by_name = {p.name: p for p in known}
    assert all(any(name in text for text in train) for name in by_name)
    for text in train + validation:
        (person,) = [p for n, p in by_name.items() if n in text]
        assert sum(v in text for v in person[1:]) >= 2
    skeletons = [
        {s.format(name="N", city="C", job="J", year="Y", hobby="H") for s in part}
        for part in (
            [t for ts in world._TEMPLATES.values() for t in ts[: -world.HELD_OUT_TEMPLATES]],
            [t for ts in world._TEMPLATES.values() for t in ts[-world.HELD_OUT_TEMPLATES :]],
        )
    ]

    def phrasings(texts: list[str]) -> set[str]:
        found = set()
        for text in texts:
            (person,) = [p for n, p in by_name.items() if n in text]
            for sentence in text.strip().split(". "):
                for field, letter in zip(person._fields, "NCJYH", strict=True):
                    sentence = sentence.replace(getattr(person, field), letter)
                found.add(sentence.rstrip(".") + ".")
        return found

    assert phrasings(train) <= skeletons[0]
    assert phrasings(validation) <= skeletons[1]


def test_there_is_enough_to_choose_from() -> None:
    assert min(len(set(world._FIRST)), len(set(world._LAST))) >= 60
    assert min(len(set(names)) for names in (world._CITY, world._JOB, world._HOBBY)) >= 40
    assert min(map(len, world._TEMPLATES.values())) >= 8 + world.HELD_OUT_TEMPLATES


def test_seeds_decide() -> None:
    assert world.arithmetic(Random(5), 3, "train") == world.arithmetic(Random(5), 3, "train")
    assert world.people(Random(5), 9) == world.people(Random(5), 9)
    assert world.people(Random(5), 9) != world.people(Random(6), 9)


def test_more_people_than_names_is_refused() -> None:
    with pytest.raises(ValueError, match="there are names for"):
        world.people(Random(0), 10**6)
