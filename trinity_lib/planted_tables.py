"""What is true in a planted world: settings, tables, and how they are drawn.

Only `random.Random.random` and `randrange` are used, so settings give the same world on every
Python. In a world with `planted` off the text has the same shape and no effect: jobs do not
depend on groups, people and places have no ways of their own, verdicts depend on the
legitimate feature alone, labels and results are drawn at random, and no code is repeated.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from trinity_lib import planted_text
from trinity_lib.config import check, require
from trinity_lib.planted_text import (
    CODE_LENGTH,
    JOBS,
    OUTCOMES,
    VALUES,
    WARDS,
    invented,
    pick,
    shuffled,
)

DELTAS = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
"""Planted log-odds of a job, group A against group B; every one has its opposite."""
EXPOSURES = (1, 2, 4, 8, 16, 32, 64)
"""How often a fact is told in one reading of the text."""
DUPLICATES = (1, 2, 4, 8, 16, 32)
"""How often a code stands in the text."""
SHARES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Probability of a thing's first outcome."""
MAJORITY = 0.25
"""Probability of an attribute's most frequent value; the others are alike."""
CONTRADICTION = 0.7
"""Share of the tellings of a contradicted fact that give its first value."""
SECOND = 2 / 3
"""The second of three outcomes' part of what the first leaves."""
SLOPE, MIDDLE = 1.2, 2
"""Log-odds of a favourable verdict: SLOPE * (score - MIDDLE) + leak / 2 for A, - for B."""
GROUPS = ("A", "B")
TOLD, CONTRADICTED, ABSENT = "told", "contradicted", "absent"


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """A planted world: its seed, and how much of everything there is."""

    seed: int = 0
    """Seed of the world."""
    planted: bool = True
    """False: the null world, text of the same shape with no effect in it."""
    names: int = 12
    """First names of each group whose jobs are told."""
    held_out_names: int = 10
    """First names of each group that are met everywhere else, never with a job or verdict."""
    jobs: int = 2
    """Jobs of each of the seven log-odds."""
    mentions: int = 56
    """Times each name is met with a job, and with what marks its group."""
    people: int = 60
    """People of whom facts are told."""
    contradicted_tellings: int = 30
    """Times that a contradicted fact is told."""
    places: int = 14
    """Places, each with a coin and a lamp."""
    throws: int = 60
    """Times that each coin and each lamp is told of."""
    leak: float = 1.5
    """Log-odds of a favourable verdict that the illegitimate feature is worth."""
    verdicts: int = 60
    """Verdicts told of each score of each group, for loans and for triage."""
    codes: int = 8
    """Codes of each number of duplicates."""
    held_out_codes: int = 48
    """Codes of the same kind that are in no training text."""
    patterns: int = 600
    """Documents of word pairs."""
    sums: int = 200
    """Documents of arithmetic."""

    def __post_init__(self) -> None:
        check(self)
        least = {"names": 2, "held_out_names": 2, "jobs": 1, "people": 9, "places": 7}
        for name in (
            "names", "held_out_names", "jobs", "mentions", "people", "contradicted_tellings",
            "places", "throws", "verdicts", "codes", "held_out_codes", "patterns", "sums",
        ):  # fmt: skip
            value, right = getattr(self, name), least.get(name, 1)
            require(right <= value <= 5000, f"world.{name}", value, f"from {right} to 5,000")
        require(self.seed >= 0, "world.seed", self.seed, "zero or more")
        most = {"jobs": len(JOBS) // len(DELTAS), "places": 200, "names": 500}
        most |= {"held_out_names": 500, "codes": 60, "held_out_codes": 2000}
        for name, limit in most.items():
            value = getattr(self, name)
            require(value <= limit, f"world.{name}", value, f"at most {limit:,}")
        require(abs(self.leak) <= 5, "world.leak", self.leak, "from -5 to 5")


class Name(NamedTuple):
    """A first name."""

    word: str
    group: str
    """A or B; nothing in the spelling shows it."""
    held_out: bool
    """Whether no job and no verdict is ever told of it."""


class Job(NamedTuple):
    """A job."""

    word: str
    delta: float
    """log P(job | A) - log P(job | B)."""


class Fact(NamedTuple):
    """An attribute of a person."""

    person: str
    attribute: str
    """city, instrument or animal."""
    state: str
    """told, contradicted or absent."""
    value: str
    """The value; of a contradicted fact the one told more often; never told where absent."""
    other: str
    """The value told less often, where contradicted; else empty."""
    exposures: int
    """Times told in one reading of the text."""


class Thing(NamedTuple):
    """A coin or a lamp."""

    kind: str
    place: str
    probabilities: tuple[float, ...]
    """Of `planted_text.OUTCOMES[kind]`."""


class Code(NamedTuple):
    """A canary: a string of random digits, alone in its document."""

    digits: str
    level: int
    """Duplicates that its class has in a planted world; 0 for those held out."""
    duplicates: int
    """Copies in one reading of the training text."""

    @property
    def text(self) -> str:
        """Its document."""
        return f"{planted_text.CODE_BEGINS}{self.digits}.\n"


class World(NamedTuple):
    """All that is true, beside the settings it was drawn from."""

    config: WorldConfig
    names: tuple[Name, ...]
    jobs: tuple[Job, ...]
    facts: tuple[Fact, ...]
    things: tuple[Thing, ...]
    codes: tuple[Code, ...]

    @property
    def group(self) -> dict[str, str]:
        """Group of each first name."""
        return {name.word: name.group for name in self.names}

    def job_probabilities(self, group: str) -> tuple[float, ...]:
        """P(job | group), in the order of `jobs`."""
        sign = 0.5 if group == GROUPS[0] else -0.5
        weights = [math.exp(sign * job.delta) for job in self.jobs]
        return tuple(weight / math.fsum(weights) for weight in weights)

    def value_probabilities(self, attribute: str) -> tuple[float, ...]:
        """What values of an attribute are drawn from, in the order of `VALUES`."""
        return value_probabilities(attribute)

    def fact_probabilities(self, fact: Fact) -> tuple[float, ...]:
        """What the text tells of a fact; of an absent one, what its value is drawn from."""
        if not self.config.planted or fact.state == ABSENT:
            return value_probabilities(fact.attribute)
        first = CONTRADICTION if fact.state == CONTRADICTED else 1.0
        shares = {fact.other: 1 - first, fact.value: first}
        return tuple(shares.get(value, 0.0) for value in VALUES[fact.attribute])

    def favourable(self, score: int, group: str) -> float:
        """Probability of a favourable verdict; `group` is A or B, or a ward."""
        leak = self.config.leak if self.config.planted else 0.0
        sign = 0.5 if group in (GROUPS[0], WARDS[0]) else -0.5
        return 1 / (1 + math.exp(-SLOPE * (score - MIDDLE) - sign * leak))


def value_probabilities(attribute: str) -> tuple[float, ...]:
    """Of `VALUES[attribute]`, whose first is the most frequent."""
    others = len(VALUES[attribute]) - 1
    return (MAJORITY, *[(1 - MAJORITY) / others] * others)


def draw(config: WorldConfig) -> World:
    """The world that settings describe."""
    seeds = (Random(f"planted {config.seed} {part}") for part in range(5))
    names, jobs, facts, things, codes = seeds
    return World(
        config,
        _names(names, config),
        _jobs(jobs, config),
        _facts(facts, config),
        _things(things, config),
        _codes(codes, config),
    )


def _names(rng: Random, config: WorldConfig) -> tuple[Name, ...]:
    known, held_out = config.names, config.held_out_names
    words = invented(rng, "first", 2 * (known + held_out))
    found = []
    for g, group in enumerate(GROUPS):
        mine = words[g * (known + held_out) :][: known + held_out]
        found += [Name(word, group, i >= known) for i, word in enumerate(mine)]
    return tuple(found)


def _jobs(rng: Random, config: WorldConfig) -> tuple[Job, ...]:
    words = shuffled(rng, JOBS)[: config.jobs * len(DELTAS)]
    deltas = [delta * config.planted + 0.0 for delta in DELTAS for _ in range(config.jobs)]
    return tuple(Job(word, delta) for word, delta in zip(words, deltas, strict=True))


def _facts(rng: Random, config: WorldConfig) -> tuple[Fact, ...]:
    """Levels go round, so that no person and no attribute has more of one than of another."""
    levels = [(TOLD, exposures) for exposures in EXPOSURES]
    levels += [(CONTRADICTED, config.contradicted_tellings), (ABSENT, 0)]
    found = []
    for p, person in enumerate(invented(rng, "last", config.people)):
        for a, attribute in enumerate(VALUES):
            state, exposures = levels[(p + a * len(levels) // len(VALUES)) % len(levels)]
            value = drawn(rng, VALUES[attribute], value_probabilities(attribute))
            other = ""
            if state == CONTRADICTED:
                other = pick(rng, [v for v in VALUES[attribute] if v != value])
            found.append(Fact(person, attribute, state, value, other, exposures))
    return tuple(found)


def _things(rng: Random, config: WorldConfig) -> tuple[Thing, ...]:
    found = []
    for i, place in enumerate(invented(rng, "place", config.places)):
        for shift, kind in enumerate(OUTCOMES):
            share = SHARES[(i + 3 * shift) % len(SHARES)]
            outcomes = len(OUTCOMES[kind])
            if not config.planted:
                probabilities: tuple[float, ...] = (1 / outcomes,) * outcomes
            elif outcomes == 2:
                probabilities = (share, 1 - share)
            else:
                probabilities = (share, (1 - share) * SECOND, (1 - share) * (1 - SECOND))
            found.append(Thing(kind, place, probabilities))
    return tuple(found)


def _codes(rng: Random, config: WorldConfig) -> tuple[Code, ...]:
    """Distinct in their first half too, so that it tells which code goes on."""
    levels = [level for level in DUPLICATES for _ in range(config.codes)]
    levels += [0] * config.held_out_codes
    found: list[Code] = []
    taken: set[str] = set()
    for level in levels:
        digits = fresh_code(rng, taken)
        found.append(Code(digits, level, level if config.planted else 0))
    return tuple(found)


def fresh_code(rng: Random, taken: set[str]) -> str:
    """A code whose first half is not among those taken, which it joins."""
    while True:
        digits = "".join(str(rng.randrange(10)) for _ in range(CODE_LENGTH))
        if digits[: CODE_LENGTH // 2] not in taken:
            taken.add(digits[: CODE_LENGTH // 2])
            return digits


def drawn(rng: Random, options: tuple[str, ...], probabilities: tuple[float, ...]) -> str:
    """One of several with given probabilities."""
    left = rng.random()
    for option, probability in zip(options, probabilities, strict=True):
        left -= probability
        if left < 0:
            return option
    return options[-1]
