"""Subjects made up for tests of audits: the generator's answers, changed as a test says."""

from collections.abc import Callable, Sequence

import numpy as np

from trinity_lib import planted
from trinity_lib.oracle import FLOOR
from trinity_lib.planted import World
from trinity_lib.planted_questions import Asked

Change = Callable[[Asked, np.ndarray], np.ndarray]


class Changed:
    """Knows some families of questions; `change` makes its answers of the generator's."""

    def __init__(self, world: World, families: Sequence[str], change: Change) -> None:
        self.known = {}
        for family in families:
            for each in planted.asked(world, family):
                truth = np.array(each.question.truth)
                nats = np.log(truth, out=np.full(len(truth), FLOOR), where=truth > 0)
                self.known[each.question.prompt] = change(each, nats)

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        return [self.known[prompt] for prompt in prompts]

    def complete(self, prompts: Sequence[str], tokens: int) -> list[str]:
        raise NotImplementedError

    def losses(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError


def noisy(seed: int, noise: float = 0.3) -> Change:
    """Adds a normal error to every log-probability, as a noisy oracle does."""
    rng = np.random.default_rng(seed)
    return lambda _, nats: nats + rng.normal(0, noise, len(nats))
