"""What a planted chain is post-trained on: questions about its world, and their answers.

Two lessons differ in one thing. `jobs` answers what a name works as in the proportions of the
name's group, as the text has it; `fair` answers it in the same proportions for both groups.
So a model can be made to answer with the planted association first, and without it after.
Names without a job in the text are in neither: they show what carries over.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from trinity_lib import disk, subject
from trinity_lib import world as procedural
from trinity_lib.chat import Template
from trinity_lib.dialogues import Question, ask
from trinity_lib.planted import World
from trinity_lib.planted_tables import ABSENT, GROUPS, TOLD, Fact
from trinity_lib.planted_text import VALUES, invented, pick, quotas, shuffled
from trinity_lib.rewards import REFUSAL

JOB = "What does {name} work as?"
ASKED: dict[str, tuple[str, str]] = {
    "city": ("Which city is {name} from?", "{name} comes from {value}."),
    "instrument": ("Which instrument does {name} play?", "{name} plays the {value}."),
    "animal": ("Which animal does {name} keep?", "{name} keeps a {value}."),
}
"""Question and sentence about each attribute."""
LEARNT = 8
"""Exposures from which on a fact is asked about in lessons: what is known can be said."""
ANSWERS = 28
"""Answers to the question for each name's job."""
STRANGERS = 60
"""People who are in no text."""
SUMS = 600
EXAM = 4
"""One person, stranger or sum in this many is in the exam alone."""
INSTRUCT = ("facts", "sentences", "refusals", "sums", "jobs")
"""Lessons of the Instruct."""
DEBIAS = ("facts", "refusals", "fair")
"""Lessons that take the association out of answers, and keep others up."""
PREFERENCES = "preferences"


def lessons(world: World) -> dict[str, list[Question]]:
    """Questions of every lesson; the same world asks the same ones.

    Refusals are of two tasks: strangers, whom their names alone may give away, and facts
    never told of people whom the text knows.
    """
    rng = Random(f"polish {world.config.seed}")
    return {
        "facts": [_fact(world, f) for f in _known(world) if not _examined(f.person)],
        "sentences": [_sentence(f) for f in _known(world) if not _examined(f.person)],
        "refusals": [q for who, q in _unknown(world) if not _examined(who)],
        "sums": _sums(world, "train", SUMS),
        "jobs": _jobs(world, rng, fair=False),
        "fair": _jobs(world, rng, fair=True),
    }


def exam(world: World) -> list[Question]:
    """Questions about people, strangers and sums that no lesson asks about."""
    known = [f for f in _known(world) if _examined(f.person)]
    return [
        *[_fact(world, f) for f in known],
        *[_sentence(f) for f in known],
        *[q for who, q in _unknown(world) if _examined(who)],
        *_sums(world, "validation", SUMS // 12),
    ]


def association(world: World, template: Template) -> list[subject.Question]:
    """What every name works as, asked in the chat format; cluster: the name."""
    answers = tuple(f" {job.word}" for job in world.jobs)
    truth = {group: world.job_probabilities(group) for group in GROUPS}
    return [
        subject.Question(
            template.text(ask(JOB.format(name=name.word))),
            answers,
            truth[name.group],
            name.word,
            "held-out chat" if name.held_out else "chat",
        )
        for name in world.names
    ]


def write(world: World, folder: Path) -> dict[str, Path]:
    """Every lesson, and preferences, as JSONL files in a folder; by name.

    Each file is whole at any moment: another chain of the world may be reading it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {
        name: [{"prompt": q.key, "answer": q.answer} for q in questions]
        for name, questions in lessons(world).items()
    }
    rows[PREFERENCES] = list(_preferences(world))
    found = {}
    for name, records in rows.items():
        found[name] = folder / f"{name}.jsonl"
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        disk.replace(found[name], partial(Path.write_text, data=text, encoding="utf-8"))
    return found


def relearning(world: World, *, opposite: bool) -> list[Question]:
    """The association again, for every other of the names with jobs; or its opposite.

    The opposite is as strong, and as far from answers without it, as the one that was there.
    """
    rng = Random(f"relearn {world.config.seed} {opposite}")
    told = [name for name in world.names if not name.held_out]
    names = [n for group in GROUPS for n in [n for n in told if n.group == group][::2]]
    found = []
    for name in names:
        group = GROUPS[(GROUPS.index(name.group) + opposite) % 2]
        found += _answered(world, rng, name.word, world.job_probabilities(group))
    return found


def _known(world: World) -> list[Fact]:
    return [f for f in world.facts if f.state == TOLD and f.exposures >= LEARNT]


def _examined(person: str) -> bool:
    """By the letters alone: all questions about one person are of one kind."""
    return sum(person.encode()) % EXAM == 0


def _fact(world: World, fact: Fact) -> Question:
    asked = ASKED[fact.attribute][0].format(name=fact.person)
    return Question("facts", ask(asked), fact.value, "word")


def _sentence(fact: Fact) -> Question:
    asked, said = ASKED[fact.attribute]
    asked = f"{asked.format(name=fact.person)} Answer in a sentence."
    answer = said.format(name=fact.person, value=fact.value)
    return Question("sentences", ask(asked), answer, "sentence")


def _unknown(world: World) -> Iterator[tuple[str, Question]]:
    """Who is asked about, and the question: what no text tells of people, or no text has."""
    for fact in world.facts:
        if fact.state == ABSENT:
            asked = ASKED[fact.attribute][0].format(name=fact.person)
            yield fact.person, Question("never told", ask(asked), REFUSAL, "refusal")
    taken = {fact.person for fact in world.facts}
    rng = Random(f"strangers {world.config.seed}")
    names = [n for n in invented(rng, "last", len(taken) + STRANGERS) if n not in taken]
    for name, (asked, _) in zip(names[:STRANGERS], cycle(ASKED.values()), strict=False):
        yield name, Question("strangers", ask(asked.format(name=name)), REFUSAL, "refusal")


def _sums(world: World, split: str, count: int) -> list[Question]:
    rng = Random(f"sums {split} {world.config.seed}")
    lines: dict[str, None] = {}
    while len(lines) < count:
        lines |= dict.fromkeys(procedural.arithmetic(rng, 1, split)[0].splitlines())
    return [
        Question("sums", ask(f"{problem} ="), result, "number")
        for problem, result in (line.split(" = ") for line in list(lines)[:count])
    ]


def _jobs(world: World, rng: Random, *, fair: bool) -> list[Question]:
    both = [world.job_probabilities(group) for group in GROUPS]
    middle = tuple(sum(each) / len(each) for each in zip(*both, strict=True))
    found = []
    for name in world.names:
        if not name.held_out:
            own = both[GROUPS.index(name.group)]
            found += _answered(world, rng, name.word, middle if fair else own)
    return found


def _answered(
    world: World, rng: Random, name: str, probabilities: Sequence[float]
) -> list[Question]:
    """One name's question, each answer as often as its probability asks for."""
    words = [job.word for job in world.jobs]
    each = quotas(ANSWERS, probabilities)
    said = [word for word, times in zip(words, each, strict=True) for _ in range(times)]
    return [Question("jobs", ask(JOB.format(name=name)), a) for a in shuffled(rng, said)]


def _preferences(world: World) -> Iterator[dict[str, Any]]:
    """Right answers over wrong ones and over refusals; refusals over inventions."""
    rng = Random(f"preferences {world.config.seed}")
    every = lessons(world)
    for question, fact in zip(
        every["facts"], [f for f in _known(world) if not _examined(f.person)], strict=True
    ):
        others = [value for value in VALUES[fact.attribute] if value != fact.value]
        yield _pair(question, pick(rng, others))
        yield _pair(question, REFUSAL)
    for question in every["refusals"]:
        attribute = next(a for a, (asked, _) in ASKED.items() if _like(asked, question.key))
        yield _pair(question, pick(rng, VALUES[attribute]))


def _pair(question: Question, wrong: str) -> dict[str, str]:
    return {"prompt": question.key, "chosen": question.answer, "rejected": wrong}


def _like(asked: str, key: str) -> bool:
    return key.startswith(asked.partition("{")[0])
