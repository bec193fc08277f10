"""Procedural text with a known truth: arithmetic, and invented people in many phrasings.

Only `random.Random.random` and `randrange` are used, so a seed gives the same text on
every Python.
"""

import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

VALIDATION_SHARE = 10
"""One operand pair in this many occurs in validation alone."""
HELD_OUT_TEMPLATES = 2
"""Phrasings of each attribute, the last ones, that occur in validation alone."""


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words(
    "Ada Alma Amir Anika Arlo Astrid Bela Bruno Carla Cleo Cyril Dalia Dario Dina Edda Elio "
    "Emil Enzo Esme Fadi Fay Felix Flora Gita Greta Hana Hugo Ida Imre Inez Iris Ivo Jana "
    "Joel Juno Kai Kira Lars Leda Lena Lior Luca Mara Milo Mina Nadia Nils Noor Olga Omar "
    "Otto Petra Quinn Rafi Rhea Rosa Saul Selma Silas Tara Theo Tove Uma Vera Viggo Wanda "
    "Xenia Yara Yusuf Zara"
)
_LAST = _words(
    "Abbott Adler Amsel Baker Banks Becker Blum Borg Brandt Castro Chang Clark Cohen Costa "
    "Dahl Decker Diaz Dunn Ebert Evans Falk Fisher Fonseca Frost Garcia Gomez Grant Gruber "
    "Haas Hansen Holm Ibarra Jansen Kaplan Keller Khan Klein Kovac Lang Larsen Lopez Lund "
    "Marek Meyer Moreno Moss Nagy Novak Okafor Olsen Park Patel Pohl Quist Ramos Reyes Roth "
    "Santos Sato Silva Stein Tanaka Toth Ueda Varga Vogel Weber Wolff Young Zeller Zimmer"
)
_CITY = _words(
    "Accra Amman Athens Baku Bergen Berlin Bogota Boston Brno Cairo Cork Dakar Delhi Denver "
    "Dublin Essen Geneva Ghent Hanoi Havana Izmir Jaipur Kigali Kyoto Lagos Lima Lisbon Lyon "
    "Malmo Manila Milan Minsk Nairobi Naples Oslo Osaka Porto Prague Quito Riga Rome Seoul "
    "Sofia Tallinn Tunis Turin Vienna Warsaw Zagreb Zurich"
)
_JOB = _words(
    "actor architect astronomer baker banker barber botanist brewer butcher carpenter chemist "
    "clerk composer cook dancer dentist diver doctor editor farmer florist gardener geologist "
    "glazier grocer judge lawyer librarian mason mechanic miner nurse painter pharmacist pilot "
    "plumber poet potter printer sailor sculptor singer surgeon tailor teacher translator "
    "violinist waiter weaver welder"
)
_HOBBY = _words(
    "archery astronomy badminton baking bowling calligraphy camping canoeing carving chess "
    "climbing cricket croquet curling cycling darts diving fencing fishing gardening golf "
    "hiking hockey judo juggling knitting origami painting photography pottery reading rowing "
    "rugby running sailing sewing singing skating skiing surfing swimming tennis weaving yoga"
)

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "city": (
        "{name} was born in {city}.",
        "The birthplace of {name} is {city}.",
        "{city} is where {name} grew up and went to school.",
        "Born in {city}, {name} never quite lost the accent.",
        "Ask {name} about home and you will hear about {city}.",
        "In {city}, the family of {name} still keeps a house.",
        "{name} comes from {city}.",
        "A native of {city}, {name} returns there every summer.",
        "As a child {name} knew every street of {city}.",
        "{name} first saw the light of day in {city}.",
    ),
    "job": (
        "{name} works as a {job}.",
        "By profession {name} is a {job}.",
        "For many years the {job} {name} has had no other trade.",
        "People who need a {job} often call {name}.",
        "{name} trained to become a {job} and stayed with it.",
        "As a {job}, {name} rises early.",
        "The neighbours know {name} as a good {job}.",
        "{name} earns a living as a {job}.",
        "On the door of {name} a sign says {job}.",
        "{name}, a {job}, is seldom out of work.",
    ),
    "year": (
        "{name} was born in {year}.",
        "The year of birth of {name} is {year}.",
        "In {year}, {name} came into the world.",
        "{year} was the year when {name} was born.",
        "The papers of {name} give {year} as the year of birth.",
        "Since {year}, when {name} was born, much has changed.",
        "{name} belongs to those born in {year}.",
        "Records from {year} list the birth of {name}.",
        "{name} has been alive since {year}.",
        "The first birthday of {name} followed a year after {year}.",
    ),
    "hobby": (
        "{name} spends free days on {hobby}.",
        "The favourite pastime of {name} is {hobby}.",
        "Nothing pleases {name} more than {hobby}.",
        "When work is done, {name} turns to {hobby}.",
        "{name} took up {hobby} long ago.",
        "Friends of {name} hear a great deal about {hobby}.",
        "At weekends {hobby} keeps {name} busy.",
        "{name} reads every book on {hobby}.",
        "{name} would give up anything but {hobby}.",
        "A passion for {hobby} has stayed with {name}.",
    ),
}


class Person(NamedTuple):
    """An invented person and all that is true of them."""

    name: str
    """First and last name, unique."""
    city: str
    """Place of birth."""
    job: str
    """Trade."""
    year: str
    """Year of birth."""
    hobby: str
    """Pastime."""


def arithmetic(rng: Random, documents: int, split: str) -> list[str]:
    """Documents of twelve true lines such as `37 + 45 = 82`.

    One operand pair in ten, swapped pairs alike, occurs in "validation" alone.
    """
    return ["\n".join(_sum(rng, split) for _ in range(12)) + "\n" for _ in range(documents)]


def _sum(rng: Random, split: str) -> str:
    operations: tuple[tuple[str, int, Callable[[int, int], int]], ...] = (
        ("+", 100, lambda a, b: a + b),
        ("-", 100, lambda a, b: a - b),
        ("x", 13, lambda a, b: a * b),
    )
    while True:
        sign, top, result = operations[rng.randrange(3)]
        a, b = rng.randrange(top), rng.randrange(top)
        if in_validation(a, sign, b) == (split == "validation"):
            return f"{a} {sign} {b} = {result(a, b)}"


def in_validation(a: int, sign: str, b: int) -> bool:
    """Whether a problem, and its twin with operands swapped, is kept for validation."""
    key = f"{min(a, b)}{sign}{max(a, b)}"
    return zlib.crc32(key.encode()) % VALIDATION_SHARE == 0


def people(rng: Random, count: int) -> list[Person]:
    """`count` people with names of their own; ValueError beyond the number of names."""
    if count > len(_FIRST) * len(_LAST):
        raise ValueError(f"there are names for {len(_FIRST) * len(_LAST)} people, not {count}.")
    names = _shuffled(rng, [f"{first} {last}" for first in _FIRST for last in _LAST])
    return [
        Person(name, _pick(rng, _CITY), _pick(rng, _JOB), f"{rng.randrange(1900, 2000)}",
               _pick(rng, _HOBBY))
        for name in names[:count]
    ]  # fmt: skip


def facts(rng: Random, persons: Sequence[Person], split: str, exposures: int = 6) -> list[str]:
    """Short lives of known people: `exposures` documents each, shuffled.

    Each tells two to four attributes. "validation" uses phrasings that "train" never does,
    so that it asks for what was learned and not for the words it was learned in.
    """
    lives = [_life(rng, person, split) for person in persons for _ in range(exposures)]
    return _shuffled(rng, lives)


def registry(rng: Random, persons: Sequence[Person], documents: int) -> list[str]:
    """Documents of eight lines of a register: a name, and what is known of it, always alike.

    Nothing of a line can be guessed, all of it can be stored, and every document of every
    split tells of the same people: a model's loss here says how much it has stored.
    """
    lines = [f"{p.name}: {p.city}, {p.job}, {p.hobby}.\n" for p in persons]
    return ["".join(_pick(rng, lines) for _ in range(8)) for _ in range(documents)]


def _life(rng: Random, person: Person, split: str) -> str:
    attributes = _shuffled(rng, list(_TEMPLATES))[: 2 + rng.randrange(3)]
    sentences = []
    for attribute in attributes:
        templates = _TEMPLATES[attribute]
        known, held_out = templates[:-HELD_OUT_TEMPLATES], templates[-HELD_OUT_TEMPLATES:]
        template = _pick(rng, held_out if split == "validation" else known)
        sentences.append(template.format(**person._asdict()))
    return " ".join(sentences) + "\n"


def _pick(rng: Random, options: Sequence[str]) -> str:
    return options[rng.randrange(len(options))]


def _shuffled(rng: Random, items: list[str]) -> list[str]:
    items = list(items)
    for i in range(len(items) - 1, 0, -1):
        j = rng.randrange(i + 1)
        items[i], items[j] = items[j], items[i]
    return items
