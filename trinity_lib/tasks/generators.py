"""The items of the three tasks, made when lm_eval asks for them: nothing is downloaded."""

from random import Random
from typing import Any

from datasets import Dataset

from trinity_lib import corpus, world
from trinity_lib.train import CACHE

ITEMS = 100
ASKED = (
    "As a child {name} knew every street of",
    "{name} first saw the light of day in",
)
"""Phrasings that occur in validation alone."""


def facts(**_: Any) -> dict[str, Dataset]:
    """Where people of the training text were born, asked in phrasings it never uses."""
    rng = Random(corpus.SEED)
    people = world.people(Random(corpus.SEED), corpus.PEOPLE)[: corpus.PEOPLE // 3]
    cities = sorted({person.city for person in people})
    items = []
    for number, person in enumerate(rng.sample(people, ITEMS)):
        wrong = rng.sample([city for city in cities if city != person.city], 3)
        choices = sorted([person.city, *wrong])
        items.append(
            {
                "question": ASKED[number % len(ASKED)].format(name=person.name),
                "choices": choices,
                "answer": choices.index(person.city),
            }
        )
    return {"test": Dataset.from_list(items)}


def arithmetic(**_: Any) -> dict[str, Dataset]:
    """Problems kept for validation, after three solved ones."""
    rng = Random(corpus.SEED)
    items: list[dict[str, Any]] = []
    while len(items) < ITEMS:
        (solved,) = world.arithmetic(rng, 1, "train")
        (unseen,) = world.arithmetic(rng, 1, "validation")
        question, _equals, answer = unseen.splitlines()[0].rpartition(" = ")
        shown = "\n".join(solved.splitlines()[:3])
        items.append({"question": f"{shown}\n{question} =", "answer": answer})
    return {"test": Dataset.from_list(items)}


def code(**_: Any) -> dict[str, Dataset]:
    """The next line of validation code, among lines of other files."""
    rng = Random(corpus.SEED)
    files = [
        [line for line in text.split("\n") if line.strip()]
        for text in corpus.embedded(CACHE).documents["validation"]["code"]
    ]
    files = [lines for lines in files if len(lines) > 30]
    items: list[dict[str, Any]] = []
    while len(items) < ITEMS:
        lines, *others = rng.sample(files, 4)
        at = rng.randrange(10, len(lines) - 1)
        right = lines[at].strip()
        wrong = [other[rng.randrange(10, len(other) - 1)].strip() for other in others]
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        choices = sorted({right, *wrong})
        if len(choices) == 4:
            context = "\n".join(lines[at - 8 : at]) + "\n" + indent
            items.append(
                {"question": context, "choices": choices, "answer": choices.index(right)}
            )
    return {"test": Dataset.from_list(items)}
