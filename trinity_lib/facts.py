"""What subjects say of facts, and measures of it: recall, bits, agreement. No torch.

All probabilities are among an attribute's values; statistics are intervals over people.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

from trinity_lib import answers, intervals, planted
from trinity_lib.answers import HELD_OUT, TRAINED
from trinity_lib.intervals import Interval
from trinity_lib.planted import VALUES, World
from trinity_lib.planted_questions import Asked
from trinity_lib.subject import Subject

CHOICES = 4
"""Of a multiple-choice question: the value and others drawn at random."""
ALIKE = 6
"""Decimals of a probability; what differs by less is a tie in ranks."""


class Said(NamedTuple):
    """What is said of some facts, all arrays [fact, ...]."""

    nats: np.ndarray
    """Log-probabilities [fact, phrasing, answer]."""
    right: np.ndarray
    """Number of the value among the answers."""
    other: np.ndarray
    """Number of the value told less often; of the value where none is."""
    marginal: np.ndarray
    """Probabilities that values are drawn from, [fact, answer]."""
    exposures: np.ndarray
    attributes: np.ndarray
    people: np.ndarray

    @property
    def share(self) -> np.ndarray:
        """Mean probability over phrasings, [fact, answer]."""
        return np.exp(self.nats).mean(1)


class Views(NamedTuple):
    """The same facts as three subjects have them: Said, or what a statistic takes."""

    subject: Any
    generator: Any
    habit: Any
    """Says what values are drawn from, whoever is asked about."""


def ask(subject: Subject, world: World, family: str) -> dict[str, Views]:
    """A family's facts by kind of phrasing."""
    asked = planted.asked(world, family)
    said, true = answers.of_subject(subject, asked), answers.of_generator(asked)
    found = {}
    for name, held_out in ((TRAINED, False), (HELD_OUT, True)):
        mine = _said(world, asked, said, held_out)
        habit = np.broadcast_to(np.log(mine.marginal)[:, None], mine.nats.shape)
        found[name] = Views(
            mine, _said(world, asked, true, held_out), mine._replace(nats=habit)
        )
    return found


def _said(
    world: World, asked: Sequence[Asked], nats: Sequence[np.ndarray], held_out: bool
) -> Said:
    found: dict[Any, np.ndarray] = answers.by_thing(asked, nats, held_out)
    right = [VALUES[fact.attribute].index(fact.value) for fact in found]
    other = [VALUES[f.attribute].index(f.other or f.value) for f in found]
    return Said(
        np.stack(list(found.values())),
        np.array(right),
        np.array(other),
        np.array([world.value_probabilities(fact.attribute) for fact in found]),
        np.array([fact.exposures for fact in found]),
        np.array([fact.attribute for fact in found]),
        np.array([fact.person for fact in found]),
    )


def recalled(nats: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Recall@1: whether the right answer, [...], is the likeliest of [..., answer].

    A share where several are as likely.
    """
    above, alike = _rivals(nats, right)
    return (above == 0) / (1 + alike)


def multiple_choice(nats: np.ndarray, right: np.ndarray, choices: int = CHOICES) -> np.ndarray:
    """Probability that the right answer is the likeliest of itself and random others, [...].

    The expectation over all ways to choose `choices` - 1 others; ties are broken at random.
    By chance 1 / `choices`.
    """
    above, alike = _rivals(nats, right)
    others = nats.shape[-1] - 1
    ways = np.array([math.comb(beaten, choices - 1) for beaten in range(others + 1)])
    up_to = np.append(0, ways.cumsum())
    won = up_to[others - above + 1] - up_to[others - above - alike]
    return won / (1 + alike) / ways[-1]


def bits(nats: np.ndarray, right: np.ndarray, marginal: np.ndarray) -> np.ndarray:
    """Bits that the right answer costs less than by the marginal, [fact].

    log2 p(value) - log2 marginal(value), mean over phrasings; below 0 where a subject is
    confident of another value.
    """
    own = np.take_along_axis(nats, right[:, None, None], 2)[:, :, 0].mean(1)
    prior = np.take_along_axis(marginal, right[:, None], 1)[:, 0]
    return own / np.log(2) - np.log2(prior)


def beyond_others(
    share: np.ndarray, right: np.ndarray, marginal: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Probability of each fact's value less its mean for facts with another value, [fact].

    share and marginal [fact, answer]; weights [fact], in the mean for other facts and in the
    weighted mean of what is returned. Every fact is also a control for others: what it adds to
    the estimate as one is put to its own account (its influence, centred by the marginal),
    which leaves the weighted mean as it is and makes facts independent. NaN where a value is
    that of all facts.
    """
    has = np.zeros(share.shape)
    has[np.arange(len(right)), right] = 1.0
    own = (weights[:, None] * has).sum(0)
    rest = weights.sum() - own
    if (rest[right] <= 0).any():
        return np.full(len(right), np.nan)
    served = own / np.where(rest > 0, rest, 1.0)
    return ((has - (1 - has) * served) * (share - marginal)).sum(1)


def slope(x: np.ndarray, y: np.ndarray, people: np.ndarray) -> Interval:
    """Least-squares slope of y on x, a row a fact, with Student's interval over people.

    A person's part is the sum of its rows' influence (a sandwich estimate).
    """
    centred = x - x.mean()
    spread = float((centred**2).sum())
    if spread == 0:
        return Interval(float("nan"), -np.inf, np.inf, len(set(people)))
    estimate = float((centred * y).sum() / spread)
    influence = centred * (y - y.mean() - estimate * centred) / spread
    return _pooled(estimate, influence, people)


def spearman(x: np.ndarray, y: np.ndarray, people: np.ndarray) -> Interval:
    """Rank correlation, a row a fact, with Student's interval over people, ranks as given.

    y is a probability, rounded to `ALIKE` decimals. 0 where x or y is always the same.
    """
    ranks = [rankdata(x), rankdata(np.round(y, ALIKE))]
    a, b = (r - r.mean() for r in ranks)
    spread = float((a**2).sum() * (b**2).sum()) ** 0.5
    if spread == 0:
        return Interval(0.0, 0.0, 0.0, len(set(people)))
    a, b = a / (a**2).sum() ** 0.5, b / (b**2).sum() ** 0.5
    estimate = float((a * b).sum())
    return _pooled(estimate, a * b - estimate * (a**2 + b**2) / 2, people)


def _pooled(estimate: float, influence: np.ndarray, people: np.ndarray) -> Interval:
    """An estimate whose error is the sum of rows' influence, with Student's interval."""
    count = len(set(people.tolist()))
    found = intervals.mean(count * sizes(people) * influence, people.tolist())
    by = estimate - found.estimate
    return Interval(estimate, found.low + by, found.high + by, count)


def sizes(people: np.ndarray) -> np.ndarray:
    """How many rows each row's person has."""
    _, which, count = np.unique(people, return_inverse=True, return_counts=True)
    return count[which]


def _rivals(nats: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many other answers are likelier than the right one, and how many as likely."""
    own = np.take_along_axis(nats, right[..., None], -1)
    return (nats > own).sum(-1), (nats == own).sum(-1) - 1
