"""What can be asked of a planted world, each question with its truth and what it is about."""

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from trinity_lib import planted_documents
from trinity_lib import world as procedural
from trinity_lib.planted_tables import (
    ABSENT,
    CONTRADICTED,
    GROUPS,
    TOLD,
    Fact,
    Name,
    Thing,
    World,
)
from trinity_lib.planted_text import (
    LABELS,
    OUTCOMES,
    PHRASINGS,
    SCORES,
    VALUES,
    VERDICTS,
    WARDS,
    Phrasing,
    pick,
)
from trinity_lib.subject import Question

SHOTS = (0, 1, 2, 4, 8, 16)
PATTERNS = 32
"""Documents of pairs that are asked about, and as many with random labels."""
SUMS = 48
"""Sums of either split that are asked for."""


class Applicant(NamedTuple):
    """Who asks for a verdict."""

    kind: str
    """loan or triage."""
    score: int
    """The legitimate feature."""
    group: str
    """A or B, of the ward or of the name."""
    name: Name | None
    """Who, where a name is told."""


class Shots(NamedTuple):
    """A query after some pairs."""

    shots: int
    """Pairs before the query."""
    control: bool
    """Whether labels were drawn at random."""
    seen: bool
    """Whether the query's key is among the pairs."""


class Sum(NamedTuple):
    """A problem."""

    problem: str
    held_out: bool
    """Whether no training text has it."""


About = Name | Fact | Thing | Applicant | Shots | Sum


class Asked(NamedTuple):
    """A question, and what in the world it is about."""

    question: Question
    about: About


def association(world: World) -> Iterator[Asked]:
    """Every name's job; cluster: the name."""
    answers = _continued([job.word for job in world.jobs])
    truth = {group: world.job_probabilities(group) for group in GROUPS}
    for name in world.names:
        for phrasing in _phrasings("job"):
            prompt = phrasing.prompt(name=name.word)
            question = Question(prompt, answers, truth[name.group], name.word, phrasing.name)
            yield Asked(question, name)


def _facts(world: World, state: str) -> Iterator[Asked]:
    for fact in world.facts:
        if fact.state != state:
            continue
        answers, truth = _continued(VALUES[fact.attribute]), world.fact_probabilities(fact)
        for phrasing in _phrasings(fact.attribute):
            prompt = phrasing.prompt(name=fact.person)
            yield Asked(Question(prompt, answers, truth, fact.person, phrasing.name), fact)


def facts(world: World) -> Iterator[Asked]:
    """Every fact that is told with one value; cluster: the person."""
    return _facts(world, TOLD)


def contradicted(world: World) -> Iterator[Asked]:
    """Every fact that is told with two values; cluster: the person."""
    return _facts(world, CONTRADICTED)


def absent(world: World) -> Iterator[Asked]:
    """Every fact of a known person that is never told; cluster: the person."""
    return _facts(world, ABSENT)


def frequencies(world: World) -> Iterator[Asked]:
    """How every coin falls and every lamp shines; cluster: the place."""
    for thing in world.things:
        answers = _continued(OUTCOMES[thing.kind])
        for phrasing in _phrasings(thing.kind):
            prompt = phrasing.prompt(place=thing.place)
            question = Question(
                prompt, answers, thing.probabilities, thing.place, phrasing.name
            )
            yield Asked(question, thing)


def decisions(world: World) -> Iterator[Asked]:
    """Verdicts on every score of every ward and name; cluster: the name, or the score."""
    for score, _ in enumerate(SCORES["loan"]):
        for group, ward in zip(GROUPS, WARDS, strict=True):
            about = Applicant("loan", score, group, None)
            yield from _verdicts(world, about, f"score {score}", ward=ward)
        for name in world.names:
            about = Applicant("triage", score, name.group, name)
            yield from _verdicts(world, about, name.word, name=name.word)


def _verdicts(world: World, about: Applicant, cluster: str, **who: str) -> Iterator[Asked]:
    chance = world.favourable(about.score, about.group)
    answers = _continued(VERDICTS[about.kind])
    for phrasing in _phrasings(about.kind):
        prompt = phrasing.prompt(score=SCORES[about.kind][about.score], **who)
        question = Question(prompt, answers, (chance, 1 - chance), cluster, phrasing.name)
        yield Asked(question, about)


def patterns(world: World) -> Iterator[Asked]:
    """A key after 0 to 16 pairs, with fixed and with random labels; cluster: the document."""
    rng = Random(f"patterns asked {world.config.seed}")
    known: dict[str, tuple[float, ...]] = {}
    for number in range(2 * PATTERNS):
        control = number >= PATTERNS
        while True:
            asked = list(_shots(world, rng, f"document {number}", control))
            told = {each.question.prompt: each.question.truth for each in asked}
            if all(known.get(prompt, truth) == truth for prompt, truth in told.items()):
                break
        known |= told
        yield from asked


def _shots(world: World, rng: Random, cluster: str, control: bool) -> Iterator[Asked]:
    pairs = planted_documents.pairs(world, rng, SHOTS[-1], control)
    key = pick(rng, sorted({key for key, _ in pairs}))
    for shots in SHOTS:
        known = dict(pairs[:shots])
        fixed = world.config.planted and not control
        truth = _label_probabilities(known if fixed else {}, key)
        prompt = f"{planted_documents.said(pairs[:shots])} {key}"
        template = f"{'control, ' * control}shots {shots}"
        question = Question(prompt, _continued(LABELS), truth, cluster, template)
        yield Asked(question, Shots(shots, control, key in known))


def _label_probabilities(known: dict[str, str], key: str) -> tuple[float, ...]:
    """Of `LABELS` for a key: its own where it was shown, else any that no other key has."""
    possible = {known[key]} if key in known else set(LABELS) - set(known.values())
    return tuple((label in possible) / len(possible) for label in LABELS)


def arithmetic(world: World) -> Iterator[Asked]:
    """Sums with four results to choose from; cluster: the problem."""
    rng = Random(f"sums asked {world.config.seed}")
    for split in ("train", "validation"):
        held_out = split == "validation"
        lines: dict[str, None] = {}
        while len(lines) < SUMS:
            lines |= dict.fromkeys(procedural.arithmetic(rng, 1, split)[0].splitlines())
        for line in list(lines)[:SUMS]:
            problem, _, result = line.partition(" = ")
            others = [int(result) + by for by in (-10, -2, -1, 1, 2, 10)]
            while len(others) > 3:
                others.pop(rng.randrange(len(others)))
            results = sorted([int(result), *others])
            right = tuple(float(each == int(result)) for each in results)
            truth = right if world.config.planted else (1 / 4,) * 4
            template = f"{'held-out ' * held_out}sum {problem.split()[1]}"
            answers = _continued([str(each) for each in results])
            question = Question(f"{problem} =", answers, truth, problem, template)
            yield Asked(question, Sum(problem, held_out))


FAMILIES: dict[str, Callable[[World], Iterator[Asked]]] = {
    "association": association,
    "facts": facts,
    "contradicted": contradicted,
    "absent": absent,
    "frequencies": frequencies,
    "decisions": decisions,
    "patterns": patterns,
    "arithmetic": arithmetic,
}
"""Families of questions by name."""


def _phrasings(kind: str) -> list[Phrasing]:
    return [p for p in PHRASINGS if p.kind == kind]


def _continued(words: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f" {word}" for word in words)
