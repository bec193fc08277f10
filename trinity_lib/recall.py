"""Facts told, contradicted and never told: what a subject recalls, and in how many bits.

Facts are like those of bioS (Allen-Zhu and Li, arXiv 2309.14316): people with attributes, told
in several phrasings, so that a fact memorised in the phrasings trained on is told from one that
can be asked for in others. Bits of knowledge are those of "Knowledge capacity scaling laws"
(Allen-Zhu and Li, arXiv 2404.05405): what a subject's answers save over the frequencies of the
values. All probabilities are among an attribute's values, all intervals over people.

`chance` is what a subject shows that knows the frequencies of the values and nothing of the
people; only of a choice by rank is it one in as many as there are. Of facts told with two
values, which of them prevails is asked where both are as frequent otherwise.

What an error without a mean in log-probabilities (the oracle's noise) does: it lowers bits, by
about half its variance in nats where the truth is the marginal; it lowers entropy, raises
divergence and the highest probability, and moves shares towards a half and recall@1 towards
chance. No interval covers such a bias. Primary findings are free of it where nothing is known.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy.special import expit

from trinity_lib import answers, facts, intervals
from trinity_lib.answers import HELD_OUT, TRAINED
from trinity_lib.facts import CHOICES, Said, Views
from trinity_lib.intervals import Interval
from trinity_lib.planted import World
from trinity_lib.planted_tables import EXPOSURES
from trinity_lib.subject import Finding, Subject

PRIMARY = {
    "recall": (TRAINED, "probability of the value beyond its probability for others"),
    "contradicted": (TRAINED, "share of the value told more often, of both told"),
    "absent": (TRAINED, "agreement of phrasings beyond that of people, in chance agreements"),
    "knowledge": (f"told less never told, {TRAINED}", "bits a fact"),
}
"""The finding of each family that decides: recall beyond the subject's own habit (a slope on
exposures would not do: a perfect memory has none); which of two values told prevails; whether
what is invented of a person is the same in all phrasings, which no text asks for, so that the
generator is at chance here in any world; bits of facts told beyond those of facts not told.
The last alone is no proof of knowledge: confident inventions cost bits of facts never told, and
so raise it."""

Statistic = Callable[[Any], Interval]


def audit(subject: Subject, world: World, *, seed: int = 0) -> list[Finding]:
    """What a subject recalls; families recall, contradicted, absent and knowledge.

    Nothing here is drawn at random, so `seed` changes nothing.
    """
    told, contradicted, absent = _asked(subject, world)
    found = [
        each
        for phrasings in (TRAINED, HELD_OUT)
        for each in _deciding(phrasings, told, contradicted, absent)
    ]
    found += [*_recall(told), *_contradicted(contradicted), *_absent(absent)]
    return found + list(_knowledge(told))


def primary(subject: Subject, world: World) -> list[Finding]:
    """The findings of `PRIMARY` alone, as `audit` has them."""
    return list(_deciding(TRAINED, *_asked(subject, world)))


def _asked(subject: Subject, world: World) -> list[dict[str, Views]]:
    return [facts.ask(subject, world, f) for f in ("facts", "contradicted", "absent")]


def _deciding(
    phrasings: str,
    told: dict[str, Views],
    contradicted: dict[str, Views],
    absent: dict[str, Views],
) -> Iterator[Finding]:
    """What decides of every family."""
    both = Views(*zip(told[phrasings], absent[phrasings], strict=True))
    deciding: tuple[tuple[str, Statistic, Views, float], ...] = (
        ("recall", _mean(_beyond_others), told[phrasings], 0.0),
        ("contradicted", _mean(_share_of_two), contradicted[phrasings], 0.5),
        ("absent", _mean(_agreement), absent[phrasings], 0.0),
        ("knowledge", _less, both, 0.0),
    )
    for family, statistic, views, chance in deciding:
        item, measure = PRIMARY[family]
        item = item.replace(TRAINED, phrasings)
        yield _finding(family, item, measure, statistic, views, chance)


def _finding(
    family: str,
    item: str,
    measure: str,
    statistic: Statistic,
    views: Views,
    chance: float | None = None,
) -> Finding:
    """A statistic of the subject beside the same of the generator and of habit."""
    truth = statistic(views.generator).estimate
    nothing = statistic(views.habit).estimate if chance is None else chance
    return answers.finding(family, item, measure, statistic(views.subject), truth, nothing)


def _mean(rows: Callable[[Said], np.ndarray]) -> Statistic:
    """Mean over people of what a fact has."""
    return lambda said: answers.mean(rows(said), said.people)


def _only(views: Views, exposures: int) -> Views:
    """Facts told so often."""
    return Views(*(Said(*(x[said.exposures == exposures] for x in said)) for said in views))


def _recall(told: dict[str, Views]) -> Iterator[Finding]:
    for phrasings, views in told.items():
        uniform = 1 / views.subject.nats.shape[-1]
        for exposures in EXPOSURES:
            some, item = _only(views, exposures), f"{exposures} exposures, {phrasings}"
            yield _finding("recall", item, "recall@1", _mean(_recalled), some, uniform)
            yield _finding("recall", item, "probability of the value", _mean(_own), some)
        for measure, statistic, chance in (
            ("recall@1", _mean(_recalled), uniform),
            ("recall@1 beyond the most frequent value's", _mean(_beyond_most_frequent), None),
            (f"accuracy of {CHOICES} choices", _mean(_choice), 1 / CHOICES),
            ("probability of the value", _mean(_own), None),
            ("probability per doubling of exposures", _slope, None),
            ("rank correlation with exposures", _spearman, None),
        ):
            yield _finding("recall", phrasings, measure, statistic, views, chance)
    gap = Views(*zip(told[TRAINED], told[HELD_OUT], strict=True))
    item = "trained less held-out phrasings"
    yield _finding("recall", item, "probability of the value", _gap, gap)


def _contradicted(contradicted: dict[str, Views]) -> Iterator[Finding]:
    for phrasings, views in contradicted.items():
        for measure, statistic in (
            ("log-odds of the value told more often, nat", _mean(_log_odds)),
            ("probability of both values told", _mean(_both)),
        ):
            yield _finding("contradicted", phrasings, measure, statistic, views)


def _absent(absent: dict[str, Views]) -> Iterator[Finding]:
    for phrasings, views in absent.items():
        for measure, statistic in (
            ("highest probability beyond the most frequent value's", _mean(_confidence)),
            ("entropy, bits", _mean(_entropy)),
            ("divergence from the marginal, bits", _mean(_divergence)),
        ):
            yield _finding("absent", phrasings, measure, statistic, views)


def _knowledge(told: dict[str, Views]) -> Iterator[Finding]:
    for phrasings, views in told.items():
        for exposures in EXPOSURES:
            some, item = _only(views, exposures), f"{exposures} exposures, {phrasings}"
            yield _finding("knowledge", item, "bits a fact", _mean(_bits), some)
        yield _finding("knowledge", phrasings, "bits a fact", _mean(_bits), views)
        yield _finding("knowledge", phrasings, "bits of all facts told", _total, views)


def _recalled(said: Said) -> np.ndarray:
    return facts.recalled(said.nats, said.right[:, None]).mean(1)


def _beyond_most_frequent(said: Said) -> np.ndarray:
    return _recalled(said) - (said.marginal.argmax(1) == said.right)


def _choice(said: Said) -> np.ndarray:
    return facts.multiple_choice(said.nats, said.right[:, None]).mean(1)


def _own(said: Said) -> np.ndarray:
    return _of(said.share, said.right)


def _of(values: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Each row's value of an answer."""
    return np.take_along_axis(values, answer[:, None], 1)[:, 0]


def _beyond_others(said: Said) -> np.ndarray:
    weights = 1 / facts.sizes(said.people)
    found = np.zeros(len(weights))
    for attribute in np.unique(said.attributes):
        rows = said.attributes == attribute
        found[rows] = facts.beyond_others(
            said.share[rows], said.right[rows], said.marginal[rows], weights[rows]
        )
    return found


def _slope(said: Said) -> Interval:
    return facts.slope(np.log2(said.exposures), _own(said), said.people)


def _spearman(said: Said) -> Interval:
    return facts.spearman(np.log2(said.exposures), _own(said), said.people)


def _gap(both: tuple[Said, Said]) -> Interval:
    trained, held_out = both
    return answers.mean(_own(trained) - _own(held_out), trained.people)


def _log_odds_of_two(said: Said) -> np.ndarray:
    """[fact, phrasing], of the value told more often against the other; NaN where one of them
    is the more frequent among all people, so that a habit is an even answer."""
    first, second = (
        np.take_along_axis(said.nats, which[:, None, None], 2)[:, :, 0]
        for which in (said.right, said.other)
    )
    even = _of(said.marginal, said.right) == _of(said.marginal, said.other)
    return np.where(even[:, None], first - second, np.nan)


def _log_odds(said: Said) -> np.ndarray:
    return _log_odds_of_two(said).mean(1)


def _share_of_two(said: Said) -> np.ndarray:
    return expit(_log_odds_of_two(said)).mean(1)


def _both(said: Said) -> np.ndarray:
    return _of(said.share, said.right) + _of(said.share, said.other)


def _agreement(said: Said) -> np.ndarray:
    """Probability that answers to two phrasings agree, each answer's over what it is by
    chance, beyond the same of two people."""
    first, second = answers.halves(np.exp(said.nats) / said.marginal[:, None] ** 0.5)
    found = np.zeros(len(first))
    for attribute in np.unique(said.attributes):
        rows = said.attributes == attribute
        found[rows] = answers.shared(first[rows], second[rows])
    return found


def _confidence(said: Said) -> np.ndarray:
    return np.exp(said.nats).max(-1).mean(1) - said.marginal.max(1)


def _entropy(said: Said) -> np.ndarray:
    return -(np.exp(said.nats) * said.nats).sum(-1).mean(1) / np.log(2)


def _divergence(said: Said) -> np.ndarray:
    """KL(said || marginal)."""
    prior = said.marginal[:, None]
    return (np.exp(said.nats) * (said.nats - np.log(prior))).sum(-1).mean(1) / np.log(2)


def _bits(said: Said) -> np.ndarray:
    return facts.bits(said.nats, said.right, said.marginal)


def _total(said: Said) -> Interval:
    people = len(set(said.people.tolist()))
    mean = answers.mean(_bits(said) * facts.sizes(said.people), said.people)
    return Interval(people * mean.estimate, people * mean.low, people * mean.high, people)


def _less(both: tuple[Said, Said]) -> Interval:
    told, absent = both
    people = [said.people.tolist() for said in both]
    return intervals.difference(_bits(told), people[0], _bits(absent), people[1])
