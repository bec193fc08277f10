"""What is answered to a planted world's questions, and by whom, as arrays that audits share.

The generator's own answers take the same form as a subject's, so a truth is the very function
that gives the estimate, of other answers.
"""

from collections.abc import Sequence

import numpy as np

from trinity_lib import intervals
from trinity_lib.intervals import Interval
from trinity_lib.oracle import FLOOR
from trinity_lib.planted_questions import About, Asked
from trinity_lib.subject import Finding, Subject

TRAINED, HELD_OUT = "trained phrasings", "held-out phrasings"
SLACK = 1e-7
"""By how much an interval is widened: rounding, and what the floor of log-probabilities is
worth, e^-20 for each of some answers that cannot be."""


def of_subject(subject: Subject, asked: Sequence[Asked]) -> list[np.ndarray]:
    """Log-probabilities, in nats, normalised over each question's possible answers."""
    questions = [each.question for each in asked]
    found = subject.score([q.prompt for q in questions], [q.answers for q in questions])
    return [_normalised(nats) for nats in found]


def of_generator(asked: Sequence[Asked]) -> list[np.ndarray]:
    """The same of the generator; what cannot be is at the oracle's floor."""
    return [
        _normalised(np.log(truth, out=np.full(len(truth), FLOOR), where=truth > 0))
        for truth in (np.array(each.question.truth) for each in asked)
    ]


def by_thing(
    asked: Sequence[Asked], nats: Sequence[np.ndarray], held_out: bool
) -> dict[About, np.ndarray]:
    """[phrasing, answer] of everything asked about, in phrasings held out or trained on."""
    found: dict[About, list[np.ndarray]] = {}
    for each, mine in zip(asked, nats, strict=True):
        if each.question.template.startswith("held-out") == held_out:
            found.setdefault(each.about, []).append(mine)
    return {about: np.stack(rows) for about, rows in found.items()}


def halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over every other phrasing and over the rest; [thing, phrasing, answer]."""
    return values[:, ::2].mean(1), values[:, 1::2].mean(1)


def shared(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What two halves say alike of each thing, beyond what they say of all: [thing].

    Products over answers of what each half, [thing, answer], has beyond its mean over things,
    summed; the mean over things is an unbiased covariance, 0 where the halves' errors are
    independent and things do not differ. Centring ties the products to each other, so they
    are spread by (n - 1) / (n - 2) in variance: Student's interval is right then. NaN for
    fewer than three things, of which that cannot be said.
    """
    count = len(first)
    if count < 3:
        return np.full(count, np.nan)
    rows = ((first - first.mean(0)) * (second - second.mean(0))).sum(-1) * count / (count - 1)
    return rows.mean() + (rows - rows.mean()) * ((count - 1) / (count - 2)) ** 0.5


def mean(rows: np.ndarray, clusters: Sequence[str] | np.ndarray) -> Interval:
    """`intervals.mean` of the rows that are numbers; NaN, and no bounds, where none is."""
    known = ~np.isnan(rows)
    if not known.any():
        return Interval(float("nan"), -np.inf, np.inf, 0)
    return intervals.mean(rows[known], np.asarray(clusters)[known].tolist())


def finding(
    family: str, item: str, measure: str, found: Interval, truth: float, chance: float
) -> Finding:
    """A finding whose interval is wider by `SLACK`."""
    low, high = found.low - SLACK, found.high + SLACK
    return Finding(family, item, measure, truth, found.estimate, low, high, chance, found.units)


def _normalised(nats: np.ndarray) -> np.ndarray:
    return nats - np.logaddexp.reduce(nats)
