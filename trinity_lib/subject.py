"""Who is audited, what it is asked, and what is found: the seam between models and audits.

A trained model, a checkpoint read by transformers, and the generator of the text itself (the
oracle, whose answers are the truth) are asked through the same three questions.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, final

import numpy as np


class Subject(Protocol):
    """What an audit may ask of a model."""

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """Log-probability, in nats, of each answer as the continuation of its prompt.

        Not normalised over the answers; one array per prompt.
        """

    def complete(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """The greedy continuation of each prompt, at most `tokens` tokens long."""

    def losses(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Nats of every token of each text after its first, given those before it."""


@final
class Remembered:
    """A subject that is asked the same but once: audits share many of their questions."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._known: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """As the subject's own."""
        keys = [(p, tuple(mine)) for p, mine in zip(prompts, answers, strict=True)]
        new = list(dict.fromkeys(key for key in keys if key not in self._known))
        if new:
            found = self.subject.score([p for p, _ in new], [mine for _, mine in new])
            self._known |= dict(zip(new, found, strict=True))
        return [self._known[key].copy() for key in keys]

    def complete(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """As the subject's own."""
        return self.subject.complete(prompts, tokens)

    def losses(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As the subject's own."""
        return self.subject.losses(texts)


class Question(NamedTuple):
    """A prompt with its possible answers."""

    prompt: str
    answers: tuple[str, ...]
    """Continuations, each with its leading space."""
    truth: tuple[float, ...]
    """The generator's own probability of each, given that it is one of them."""
    cluster: str
    """What an interval resamples as one: the person, the place."""
    template: str
    """Name of the phrasing; those that were never trained on begin with "held-out"."""


class Finding(NamedTuple):
    """One figure of an audit beside the truth it should recover."""

    family: str
    """association, recall, knowledge, calibration, memorisation, decision, ..."""
    item: str
    """What the figure is of: a job, a number of exposures, an overall slope."""
    measure: str
    """Its name and unit, e.g. "log-odds, nat"."""
    truth: float
    """By the generator; NaN where there is none."""
    estimate: float
    """Of the subject."""
    low: float
    """Lower end of the 95% interval."""
    high: float
    """Upper end."""
    chance: float
    """What a subject that knows nothing would show; NaN where that has no meaning."""
    units: int
    """Independent clusters that the interval rests on."""

    @property
    def at_chance(self) -> bool:
        """Whether the interval covers chance."""
        return bool(self.low <= self.chance <= self.high)

    @property
    def recovered(self) -> bool:
        """Whether the interval covers the truth."""
        return bool(self.low <= self.truth <= self.high)
