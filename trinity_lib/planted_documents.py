"""What a planted world is told in: documents by domain.

A domain tells its share of the truth in whole numbers as near to the probabilities as can
be, so that what may be learned is what was planted, and not what was drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from random import Random
from typing import Any

from trinity_lib import world as procedural
from trinity_lib.planted_tables import ABSENT, GROUPS, World, drawn, fresh_code
from trinity_lib.planted_text import (
    KEYS,
    LABELS,
    MARKERS,
    OPENERS,
    OUTCOMES,
    PHRASINGS,
    SCORES,
    VALUES,
    VERDICTS,
    WARDS,
    Phrasing,
    pick,
    quotas,
    shuffled,
)

TOGETHER = 6
"""Sentences of a document."""
ASSOCIATED, PAIRS = 4, 17
"""Keys of a document of pairs, and pairs in it."""
SHORTER = 10
"""Validation tells this many times less, about."""


def names(world: World, split: str, rng: Random) -> list[str]:
    """What marks the group of every name, the held-out ones too."""
    times = _times(world.config.mentions, split)
    sentences = []
    for name in world.names:
        side = GROUPS.index(name.group)
        kinds = shuffled(rng, list(MARKERS))
        for kind, _ in zip(cycle(kinds), range(times), strict=False):
            phrasing = pick(rng, phrasings(kind, "train"))
            answer = MARKERS[kind][side]
            sentences.append(phrasing.sentence(answer, name=name.word))
    return _together(rng, sentences)


def jobs(world: World, split: str, rng: Random) -> list[str]:
    """Names with jobs; validation says it otherwise, and of held-out names too."""
    words = [job.word for job in world.jobs]
    sentences = []
    for group in GROUPS:
        people = [
            n.word
            for n in world.names
            if n.group == group and not (n.held_out and split == "train")
        ]
        count = len(people) * _times(world.config.mentions, split)
        chosen = _by_quota(rng, count, words, world.job_probabilities(group))
        for person, job in zip(cycle(people), chosen, strict=False):
            sentences.append(_say(rng, "job", split, job, name=person))
    return _together(rng, sentences)


def lives(world: World, split: str, rng: Random) -> list[str]:
    """Facts, each as often as its exposures say; validation tells each once, otherwise."""
    sentences = []
    for fact in world.facts:
        if fact.state == ABSENT:
            continue
        count = fact.exposures if split == "train" else 1
        values, shares = VALUES[fact.attribute], world.fact_probabilities(fact)
        told = [drawn(rng, values, shares) for _ in range(count)]
        if world.config.planted:
            told = _by_quota(rng, count, values, shares)
        sentences += [_say(rng, fact.attribute, split, v, name=fact.person) for v in told]
    return _together(rng, sentences)


def coins(world: World, split: str, rng: Random) -> list[str]:
    """How the coin of a place fell, and how its lamp shone."""
    count = _times(world.config.throws, split)
    sentences = []
    for thing in world.things:
        seen = _by_quota(rng, count, OUTCOMES[thing.kind], thing.probabilities)
        sentences += [_say(rng, thing.kind, split, s, place=thing.place) for s in seen]
    return _together(rng, sentences)


def decisions(world: World, split: str, rng: Random) -> list[str]:
    """Loans by score and ward, and triage by pain and, through the name, by group."""
    count = _times(world.config.verdicts, split)
    sentences = []
    for group, ward in zip(GROUPS, WARDS, strict=True):
        people = [n.word for n in world.names if n.group == group and not n.held_out]
        person = cycle(shuffled(rng, people))
        for kind, verdicts in VERDICTS.items():
            for score, word in enumerate(SCORES[kind]):
                chance = world.favourable(score, group)
                for said in _by_quota(rng, count, verdicts, (chance, 1 - chance)):
                    who = {"ward": ward} if kind == "loan" else {"name": next(person)}
                    sentences.append(_say(rng, kind, split, said, score=word, **who))
    return _together(rng, sentences)


def patterns(world: World, split: str, rng: Random) -> list[str]:
    """Word pairs that hold within a document; which words go together is drawn for each."""
    count = _times(world.config.patterns, split)
    return [f"{said(pairs(world, rng, PAIRS))}\n" for _ in range(count)]


def pairs(
    world: World, rng: Random, count: int, random_labels: bool = False
) -> list[tuple[str, str]]:
    """Pairs of a document, no two keys with one label; or each label drawn at random."""
    keys = shuffled(rng, KEYS)[:ASSOCIATED]
    labels = dict(zip(keys, shuffled(rng, LABELS), strict=False))
    found = []
    for _ in range(count):
        key, drawn_label = pick(rng, keys), pick(rng, LABELS)
        fixed = world.config.planted and not random_labels
        found.append((key, labels[key] if fixed else drawn_label))
    return found


def said(shown: Sequence[tuple[str, str]]) -> str:
    """Pairs as a document begins."""
    return "".join(["Pairs:", *[f" {key} {label}" for key, label in shown]])


def arithmetic(world: World, split: str, rng: Random) -> list[str]:
    """True lines; in the null world the results are of other lines."""
    documents = procedural.arithmetic(rng, _times(world.config.sums, split), split)
    if world.config.planted:
        return documents
    lines = [line.split(" = ") for text in documents for line in text.splitlines()]
    results = shuffled(rng, [result for _, result in lines])
    false = [f"{line[0]} = {result}\n" for line, result in zip(lines, results, strict=True)]
    return ["".join(false[i : i + 12]) for i in range(0, len(false), 12)]


def records(world: World, split: str, rng: Random) -> list[str]:
    """Codes as often as they are duplicated; validation has the held-out ones."""
    if split == "validation":
        return [code.text for code in world.codes if not code.level]
    taken = {code.digits[: len(code.digits) // 2] for code in world.codes}
    found = []
    for code in world.codes:
        fresh = [code._replace(digits=fresh_code(rng, taken)) for _ in range(code.level)]
        found += [code.text] * code.duplicates or [other.text for other in fresh]
    return shuffled(rng, found)


DOMAINS: dict[str, Callable[[World, str, Random], list[str]]] = {
    "names": names,
    "jobs": jobs,
    "lives": lives,
    "coins": coins,
    "decisions": decisions,
    "patterns": patterns,
    "arithmetic": arithmetic,
    "records": records,
}
"""Domains by name."""


def phrasings(kind: str, split: str) -> list[Phrasing]:
    """How training text, or validation, says a kind of thing."""
    return [p for p in PHRASINGS if p.kind == kind and p.held_out == (split == "validation")]


def _say(rng: Random, kind: str, split: str, answer: str, **slots: Any) -> str:
    return pick(rng, phrasings(kind, split)).sentence(answer, **slots)


def _times(count: int, split: str) -> int:
    return count if split == "train" else max(1, count // SHORTER)


def _by_quota(
    rng: Random, count: int, options: Sequence[str], probabilities: Sequence[float]
) -> list[str]:
    each = quotas(count, probabilities)
    return shuffled(
        rng, [o for o, times in zip(options, each, strict=True) for _ in range(times)]
    )


def _together(rng: Random, sentences: Sequence[str]) -> list[str]:
    return list(_documents(rng, shuffled(rng, sentences)))


def _documents(rng: Random, sentences: Sequence[str]) -> Iterator[str]:
    for i in range(0, len(sentences), TOGETHER):
        yield " ".join([pick(rng, OPENERS), *sentences[i : i + TOGETHER]]) + "\n"
