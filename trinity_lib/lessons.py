"""Questions made by rule, whose answers are known: facts, sums, forms, refusals.

`facts` asks for what the embedded corpus tells of its people (`world.people`), so an answer
must have been read before; people whose questions are held out are in the corpus like the
others. `refusals` asks for people who are in no text.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

from trinity_lib import corpus, world
from trinity_lib.dialogues import Pair, Question, ask
from trinity_lib.rewards import REFUSAL
from trinity_lib.world import Person

HELD_OUT = 10
"""One person, or sum, in this many is asked about in examinations alone."""
LARGEST = 2000
"""Questions of a task."""

ASKED: dict[str, tuple[str, str]] = {
    "city": ("Where was {name} born?", "{name} was born in {city}."),
    "job": ("What is the job of {name}?", "{name} works as a {job}."),
    "year": ("In which year was {name} born?", "{name} was born in {year}."),
    "hobby": ("What is the hobby of {name}?", "The hobby of {name} is {hobby}."),
}
"""Question and sentence about each attribute."""


class Task(NamedTuple):
    """Questions of one kind."""

    train: list[Question]
    held_out: list[Question]


def facts(rng: Random, people: list[Person]) -> Task:
    """What is known of a person, in one word."""
    return _split(rng, people, lambda person: _about(rng, "facts", person))


def formats(rng: Random, people: list[Person]) -> Task:
    """The same, in capitals or in a sentence, as the question says."""

    def question(person: Person) -> Question:
        attribute = _pick(rng, [name for name in ASKED if name != "year"])  # has no capitals
        asked, sentence = (_said(text, person) for text in ASKED[attribute])
        if rng.random() < 0.5:
            return Question(
                "formats", ask(f"{asked} Answer in a sentence."), sentence, "sentence"
            )
        answer = str(getattr(person, attribute)).upper()
        return Question("formats", ask(f"{asked} Answer in capitals."), answer, "capitals")

    return _split(rng, people, question)


def refusals(rng: Random, people: list[Person]) -> Task:
    """People nobody has heard of: to be refused."""
    known = {person.name for person in people}
    every = world.people(Random(corpus.SEED), 2 * LARGEST)
    absent = [person for person in every if person.name not in known][:LARGEST]

    def question(person: Person) -> Question:
        asked = _about(rng, "refusals", person).asked
        return Question("refusals", asked, REFUSAL, "refusal")

    return _split(rng, absent, question)


def arithmetic(rng: Random, people: list[Person]) -> Task:
    """Sums; held out are those that the corpus holds out."""
    return Task(
        *(
            [
                _sum("arithmetic", line)
                for text in world.arithmetic(rng, count, split)
                for line in text.splitlines()
            ]
            for split, count in (("train", LARGEST // 12), ("validation", LARGEST // 120))
        )
    )


def digits(rng: Random, people: list[Person]) -> Task:
    """Sums and differences of one digit and another; held out as the corpus does."""
    parts: tuple[list[Question], list[Question]] = ([], [])
    for a in range(10):
        for b in range(10):
            for sign, result in (("+", a + b), ("-", a - b)):
                part = parts[world.in_validation(a, sign, b)]
                part.append(_sum("digits", f"{a} {sign} {b} = {result}"))
    return Task(*parts)


def _sum(name: str, line: str) -> Question:
    problem, _, result = line.partition(" = ")
    return Question(name, ask(f"{problem} ="), result, "number")


TASKS: dict[str, Callable[[Random, list[Person]], Task]] = {
    "facts": facts,
    "arithmetic": arithmetic,
    "digits": digits,
    "formats": formats,
    "refusals": refusals,
}
"""Tasks by name."""


def task(name: str, seed: int) -> Task:
    """A task's questions; the same seed asks the same ones."""
    people = world.people(Random(corpus.SEED), corpus.PEOPLE)
    return TASKS[name](Random(seed), people)


class Pairs(NamedTuple):
    """Preferences of one kind."""

    train: list[Pair]
    held_out: list[Pair]


def preferences(name: str, seed: int) -> Pairs:
    """A task's questions with a wrong answer beside the right one.

    The wrong one is another question's answer; of formats, the right word in a form that was
    not asked for; of refusals, an invention.
    """
    rng, every = Random(seed + 1), task(name, seed)
    others = task("facts", seed).train if name == "refusals" else every.train

    def pair(question: Question) -> Pair:
        wrong = question.answer
        if name == "formats":
            wrong = question.answer.rstrip(".").split()[-1].capitalize()
        while wrong == question.answer:
            wrong = _pick(rng, others).answer
        return Pair(name, question.asked, question.answer, wrong)

    return Pairs(*([pair(question) for question in part] for part in every))


def _about(rng: Random, name: str, person: Person) -> Question:
    attribute = _pick(rng, list(ASKED))
    answer = str(getattr(person, attribute))
    form = "number" if attribute == "year" else "word"
    return Question(name, ask(_said(ASKED[attribute][0], person)), answer, form)


def _pick(rng: Random, options: Sequence[Any]) -> Any:
    return options[rng.randrange(len(options))]


def _said(text: str, person: Person) -> str:
    return text.format(**person._asdict())


def _split(rng: Random, people: list[Person], question: Callable[[Person], Question]) -> Task:
    """A question about each; one person in ten is held out."""
    train: list[Question] = []
    held_out: list[Question] = []
    for person in people:
        part = held_out if rng.randrange(HELD_OUT) == 0 else train
        part.append(question(person))
    return Task(train, held_out)
