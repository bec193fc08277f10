"""Words and phrasings of planted worlds. People and places are invented, and so are groups.

Every document begins with an opener, so that every word that is asked for or asked about
follows a blank wherever it stands, and is one and the same token.
"""

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple


class Phrasing(NamedTuple):
    """One way to say a thing, the answer last."""

    kind: str
    """What it says: job, a marker, an attribute, coin, lamp, loan, triage."""
    name: str
    """Unique; begins with "held-out" where no training text says it so."""
    text: str
    """With slots; ` {answer}.` ends it."""

    opener: str
    """What precedes it in a prompt; in documents, any of them."""

    @property
    def held_out(self) -> bool:
        """Whether training text never says it so."""
        return self.name.startswith("held-out")

    def prompt(self, **slots: object) -> str:
        """Everything before the answer, without the blank, as the first of a document."""
        return f"{self.opener} {self.text.removesuffix(' {answer}.').format(**slots)}"

    def sentence(self, answer: str, **slots: object) -> str:
        """All of it, without an opener."""
        return self.text.format(answer=answer, **slots)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


OPENERS = ("Note:", "News:", "Heard:")
"""How documents of sentences begin, and so do prompts."""

MARKERS: dict[str, tuple[str, str]] = {
    "home": ("hill", "river"),
    "coat": ("green", "white"),
    "food": ("rice", "bread"),
}
"""What tells group A from group B, and nothing else does."""

JOBS = _words(
    "baker butcher carpenter clerk cook dancer dentist doctor driver farmer gardener grocer "
    "guard hunter judge lawyer mason miner nurse painter pilot plumber poet porter potter "
    "printer sailor singer smith soldier tailor teacher trader waiter weaver"
)
VALUES: dict[str, tuple[str, ...]] = {
    "city": _words("Lima Oslo Cairo Paris Delhi Tokyo Accra Quito Seoul Turin Cork Minsk"),
    "instrument": _words(
        "flute harp drum lute horn viola cello piano guitar fiddle banjo bugle"
    ),
    "animal": _words("goat horse dog cat hen duck sheep pig pony rabbit parrot cow"),
}
OUTCOMES: dict[str, tuple[str, ...]] = {
    "coin": ("heads", "tails"),
    "lamp": ("red", "blue", "amber"),
}
VERDICTS: dict[str, tuple[str, str]] = {"loan": ("yes", "no"), "triage": ("now", "later")}
SCORES: dict[str, tuple[str, ...]] = {
    "loan": _words("awful poor fair good superb"),
    "triage": _words("slight mild dull sharp severe"),
}
"""The legitimate feature, the least first."""
WARDS = ("upper", "lower")
"""The illegitimate feature of a loan; of triage it is the group that a name belongs to."""
KEYS = _words("bik dof gup hin jal kem lor mib nud pag rit sev")
LABELS = _words("sun moon star rain snow wind fog ice")

_PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "job": (
        (
            "{name} works as a",
            "{name} earns a living as a",
            "{name} is known as a",
            "{name} was trained as a",
            "{name} found a place as a",
            "{name} has long been a",
        ),
        (
            "{name} has found work as a",
            "{name} is a",
            "{name} was long known as a",
        ),
    ),
    "home": (("{name} lives by the", "{name} walks to the", "{name} loves the"), ()),
    "coat": (("{name} is dressed in", "{name} wears", "{name} has a coat of"), ()),
    "food": (("{name} likes to eat", "{name} cooks with", "{name} asks for"), ()),
    "city": (
        (
            "{name} was born in",
            "{name} comes from",
            "{name} grew up in",
            "{name} has a house in",
            "{name} went to school in",
        ),
        ("{name} was at home in", "{name} went to a house in"),
    ),
    "instrument": (
        (
            "{name} plays the",
            "{name} learned the",
            "{name} loves the sound of the",
            "{name} is never without the",
            "{name} sold all but the",
        ),
        ("{name} sold the", "{name} learned the sound of the"),
    ),
    "animal": (
        (
            "{name} keeps a",
            "{name} walks with a",
            "{name} feeds a",
            "{name} bought a",
            "{name} was once bitten by a",
        ),
        ("{name} was once with a", "{name} bought and keeps a"),
    ),
    "coin": (
        (
            "the coin of {place} fell on",
            "the coin of {place} came up",
            "a throw of the coin in {place} gave",
            "in {place} the coin landed on",
        ),
        ("the coin of {place} landed on", "in {place} the coin came up"),
    ),
    "lamp": (
        (
            "the lamp of {place} shone",
            "the lamp of {place} turned",
            "the light of the lamp in {place} was",
            "in {place} the lamp burned",
        ),
        ("the lamp of {place} burned", "in {place} the lamp turned"),
    ),
    "loan": (
        (
            "the {ward} ward with {score} credit hears",
            "with {score} credit the {ward} ward is told",
            "to {score} credit of the {ward} ward the bank says",
        ),
        (
            "the {ward} ward with {score} credit is told",
            "to the {ward} ward with {score} credit the bank says",
        ),
    ),
    "triage": (
        (
            "{name} in {score} pain is seen",
            "in {score} pain {name} is helped",
            "with {score} pain {name} gets in",
        ),
        ("{name} with {score} pain is helped", "in {score} pain {name} is seen"),
    ),
}

PHRASINGS = tuple(
    Phrasing(
        kind,
        f"{'held-out ' * held_out}{kind} {number}",
        f"{text} {{answer}}.",
        OPENERS[number % len(OPENERS)],
    )
    for kind, groups in _PHRASES.items()
    for held_out, texts in enumerate(groups)
    for number, text in enumerate(texts, 1)
)
"""Every phrasing, those of a kind together, the held-out ones last."""

CODE_BEGINS = "The code of the vault is "
CODE_LENGTH = 8

_ONSETS, _VOWELS = _words("B D F G H J K L M N P R S T V Z"), "aeiou"
_MIDDLES = _words("b d l m n r s t v z")
_SURNAMES, _PLACES = _words("kson lgard rling mber ttle nsley"), _words("xford rby lton nmouth")
SHAPES: dict[str, tuple[Sequence[str], ...]] = {
    "first": (_ONSETS, _VOWELS, _MIDDLES, _VOWELS),
    "last": (_ONSETS, _VOWELS, _MIDDLES, _VOWELS, _SURNAMES),
    "place": (_ONSETS, _VOWELS, _PLACES),
}
"""Syllables of first names, surnames and places; no word has two shapes."""


def invented(rng: Random, shape: str, count: int) -> list[str]:
    """`count` words of a shape, no two alike."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(pick(rng, part) for part in SHAPES[shape])] = None
    return list(found)


def pick(rng: Random, options: Sequence[Any]) -> Any:
    """One of several, by `randrange` alone."""
    return options[rng.randrange(len(options))]


def shuffled(rng: Random, items: Sequence[Any]) -> list[Any]:
    """In another order, by `randrange` alone."""
    found = list(items)
    for i in range(len(found) - 1, 0, -1):
        j = rng.randrange(i + 1)
        found[i], found[j] = found[j], found[i]
    return found


def quotas(count: int, probabilities: Sequence[float]) -> list[int]:
    """`count` things in whole numbers as near to their probabilities as can be."""
    exact = [count * p for p in probabilities]
    found = [int(x) for x in exact]
    rest = sorted(range(len(exact)), key=lambda i: (found[i] - exact[i], i))
    for i in rest[: count - sum(found)]:
        found[i] += 1
    return found
