"""The generator of a planted world as the subject of an audit: its answers are the truth.

What it says of a code is what a perfect memory of the text would: the next document of codes
is, as likely as not, a copy of one in the text, each as often as it stands there, and else a
fresh code. So a member costs what tells it from the other members, some nats, and then
nothing; a code never seen costs log 10 a digit once no member begins as it does. In the null
world no code was repeated, and none is remembered.
"""

import math
import operator
import re
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trinity_lib import planted
from trinity_lib.config import BadValue, require
from trinity_lib.planted import CODE_BEGINS, World
from trinity_lib.planted_text import CODE_LENGTH

FLOOR = -20.0
"""Log-probability of what cannot be the answer, and of every answer to a prompt that the world
does not ask."""
REMEMBERED = 0.5
"""Share of codes that are copies, as a memory of the text expects them."""
PIECES = re.compile(r"\d|[^\W\d]+|[^\w\s]|\n")
"""What `losses` counts as a token: a digit, a word, a mark, the end of a line."""
_SUM = re.compile(r"(\d+) ([+x-]) (\d+) =")
OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul}
_CODE = re.compile(re.escape(CODE_BEGINS) + r"(\d+)")


class Known(NamedTuple):
    """What is said after a prompt."""

    answers: tuple[str, ...]
    nats: np.ndarray
    """Log-probability of each, noise included."""


class Oracle:
    """Answers from a world's own conditionals, and if asked a little wrongly.

    `noise` is the standard deviation, in nats, of a normal error added to the log-probability
    of every answer to every prompt, before the answers to a prompt are normalised; of a code,
    of the logarithm of its losses, which share one error. The same seed makes the same errors
    whatever is asked, and in whatever order.
    """

    def __init__(self, world: World, noise: float = 0.0, seed: int = 0) -> None:
        require(noise >= 0, "noise", noise, "zero or more")
        require(seed >= 0, "seed", seed, "zero or more")
        self.world, self.noise, self.seed = world, noise, seed
        self._known: dict[str, Known] = {}
        for family in range(len(planted.FAMILIES)):
            self._add(family)
        errors = self._generator(len(planted.FAMILIES)).normal(0, noise, len(world.codes))
        self._scale = {c.digits: math.exp(e) for c, e in zip(world.codes, errors, strict=True)}
        self._copies = [(code.digits, code.duplicates) for code in world.codes]
        self._total = sum(copies for _, copies in self._copies)

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """Log-probability of each answer; FLOOR for one that cannot be.

        Sums are known, also those that are in no question; not so in the null world.
        """
        right = f"{len(prompts)}, as prompts"
        require(len(answers) == len(prompts), "answers", len(answers), right)
        found = []
        for prompt, mine in zip(prompts, answers, strict=True):
            known = self._known.get(prompt)
            if known is None:
                found.append(self._sum(prompt, mine))
            elif known.answers == tuple(mine):
                found.append(known.nats.copy())
            else:
                nats = dict(zip(known.answers, known.nats, strict=True))
                found.append(np.array([nats.get(answer, FLOOR) for answer in mine]))
        return found

    def complete(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """The most likely answer; of a code, the digits that most copies go on with.

        At most `tokens` words or digits; nothing where the world does not ask, or no copy
        begins so.
        """
        return ["".join(_split(self._completion(prompt))[:tokens]) for prompt in prompts]

    def losses(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Nats of every one of `PIECES` of each code's document after its first.

        Raises BadValue for another text: the generator's own losses are those of questions.
        """
        return [self._losses(text) for text in texts]

    def _sum(self, prompt: str, answers: Sequence[str]) -> np.ndarray:
        """Of results of a problem that no question has, such as one asked the other way."""
        problem = _SUM.fullmatch(prompt) if self.world.config.planted else None
        if problem is None:
            return np.full(len(answers), FLOOR)
        result = OPERATIONS[problem[2]](int(problem[1]), int(problem[3]))
        exact = np.where(np.array(answers) == f" {result}", 0.0, FLOOR)
        if not self.noise:
            return exact
        errors = np.random.default_rng([self.seed, zlib.crc32(prompt.encode())])
        nats = exact + errors.normal(0, self.noise, len(answers))
        return nats - np.logaddexp.reduce(nats)

    def _add(self, family: int) -> None:
        """Learn the answers to all questions of a family."""
        asked = planted.questions(self.world, planted.FAMILIES[family])
        truth = np.concatenate([np.array(question.truth) for question in asked])
        exact = np.log(truth, out=np.full(len(truth), FLOOR), where=truth > 0)
        errors = self._generator(family).normal(0, self.noise, len(truth))
        ends = np.cumsum([len(question.truth) for question in asked])
        for question, nats, error in zip(
            asked, np.split(exact, ends[:-1]), np.split(errors, ends[:-1]), strict=True
        ):
            if self.noise:
                nats = nats + error
                nats = nats - np.logaddexp.reduce(nats)
            self._known.setdefault(question.prompt, Known(question.answers, nats))

    def _generator(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, part])

    def _completion(self, prompt: str) -> str:
        known = self._known.get(prompt)
        if known is not None:
            return known.answers[int(known.nats.argmax())]
        begun = [
            (copies, text)
            for digits, copies in self._copies
            if copies and (text := f"{CODE_BEGINS}{digits}.").startswith(prompt)
        ]
        if not begun or not prompt.startswith(CODE_BEGINS.rstrip()):
            return ""
        return max(begun)[1].removeprefix(prompt)

    def _losses(self, text: str) -> np.ndarray:
        code = _CODE.match(text)
        if code is None or text != f"{CODE_BEGINS}{code[1]}.\n" or len(code[1]) != CODE_LENGTH:
            raise BadValue(f"the text is {text!r}; it must be a code's document.")
        digits = code[1]
        chances = [self._chance(digits[:length]) for length in range(CODE_LENGTH + 1)]
        nats = -np.diff(np.log(chances)) * self._scale.get(digits, 1.0)
        frame = len(PIECES.findall(CODE_BEGINS))
        return np.concatenate([np.zeros(frame - 1), nats, np.zeros(2)])

    def _chance(self, begin: str) -> float:
        """Probability that a code begins so, to a memory of the text."""
        fresh = 10.0 ** -len(begin)
        if not self._total:
            return fresh
        copies = sum(c for digits, c in self._copies if digits.startswith(begin))
        return REMEMBERED * copies / self._total + (1 - REMEMBERED) * fresh


def _split(text: str) -> list[str]:
    """Pieces with the blanks before them."""
    return re.findall(rf"\s*(?:{PIECES.pattern})", text)
