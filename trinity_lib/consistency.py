"""Whether a subject's answers agree with each other when it is asked otherwise.

An oracle's noise is independent by phrasing. It biases no agreement where all answers are
equally likely, and hardly reaches what is certain. Where some answer is likelier without
being certain (of names and places, and of facts in the null world), it makes first answers
differ, so that their agreement is below its truth then.

The primary finding is somewhat conservative: in 2,500 null worlds 3.96% of its intervals miss
chance; 95% of such shares lie in 4.16% to 5.84% where intervals are exact.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from trinity_lib import answers, intervals, planted
from trinity_lib.intervals import Interval
from trinity_lib.planted import World
from trinity_lib.subject import Finding, Subject

FAMILY = "consistency"
PRIMARY = {FAMILY: ("facts", "answers drawn agree beyond other people's, probability")}
"""The finding that decides, by family: (item, measure)."""
TIES = 1e-9
"""Nats by which answers that are as likely may differ."""


class Agreement(NamedTuple):
    """Of each thing that is asked about."""

    own: np.ndarray
    """Probability that two phrasings have the same answer."""
    chance: np.ndarray
    """The same where the second answer is about another thing."""


def audit(subject: Subject, world: World) -> list[Finding]:
    """Of facts, of names' jobs, and of how coins fall and lamps shine.

    Agreement of first answers is over pairs of phrasings, both trained on or one of them held
    out; its chance is how often two things of a kind get the same, so that a favourite answer
    is no agreement. Its truth is below 1 where the generator's first answer is one of several.
    """
    findings = primary(subject, world)
    for family in ("facts", "association", "frequencies"):
        asked = planted.asked(world, family)
        tables = _tables(world, family)
        clusters = [asked[i].question.cluster for table in tables for i in table[:, 0]]
        both = answers.of_subject(subject, asked), answers.of_generator(asked)
        for item, held_out in (("trained phrasings", False), ("a held-out phrasing", True)):
            said, told = (
                [agreement(first(_of(nats, t)), _pairs(world, family, t, held_out))
                 for t in tables]
                for nats in both
            )  # fmt: skip
            findings.append(agreed(f"{family}, {item}", said, told, clusters))
    return findings


def primary(subject: Subject, world: World) -> list[Finding]:
    """Of told facts, how likely answers drawn under two halves of the phrasings are to agree.

    Less the same of two people: a covariance over people, summed over answers, see
    `answers.shared`; 0 where nobody has values of their own. What a null text tells of people
    by chance can be remembered, and a network's own fancy about a name counts too.
    """
    asked = planted.asked(world, "facts")
    tables = _tables(world, "facts")
    clusters = [asked[i].question.cluster for table in tables for i in table[:, 0]]
    found, truth = (
        answers.mean(
            np.concatenate(
                [answers.shared(*answers.halves(np.exp(_of(nats, table)))) for table in tables]
            ),
            clusters,
        )
        for nats in (answers.of_subject(subject, asked), answers.of_generator(asked))
    )
    return [answers.finding(FAMILY, *PRIMARY[FAMILY], found, truth.estimate, 0.0)]


def first(nats: np.ndarray) -> np.ndarray:
    """1 for the likeliest answer, in equal parts where several are as likely; last axis."""
    best = nats >= nats.max(-1, keepdims=True) - TIES
    return best / best.sum(-1, keepdims=True)


def agreement(first_NPV: np.ndarray, pairs: Sequence[tuple[int, int]]) -> Agreement:
    """Agreement over pairs of phrasings, of two things or more.

    `first_NPV` is the part that each answer has in the first answer to each phrasing.
    """
    own, chance = [], []
    for one, other in pairs:
        a_NV, b_NV = first_NPV[:, one], first_NPV[:, other]
        own.append((a_NV * b_NV).sum(1))
        chance.append((a_NV @ b_NV.sum(0) - own[-1]) / (len(first_NPV) - 1))
    return Agreement(np.mean(own, axis=0), np.mean(chance, axis=0))


def agreed(
    item: str, said: Sequence[Agreement], told: Sequence[Agreement], clusters: Sequence[str]
) -> Finding:
    """Mean agreement over clusters, of kinds one after the other."""
    found = share(np.concatenate([each.own for each in said]), clusters)
    truth, chance = (
        intervals.mean(np.concatenate(parts), clusters).estimate
        for parts in ([each.own for each in told], [each.chance for each in said])
    )
    return answers.finding(FAMILY, item, "same first answer, share", found, truth, chance)


def share(values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> Interval:
    """Mean over clusters; exact where each of them is a trial that succeeds or fails."""
    means = intervals.by_cluster(values, clusters).mean
    if np.isin(means, (0, 1)).all():
        return intervals.proportion(int(means.sum()), len(means))
    return intervals.mean(values, clusters)


def _tables(world: World, family: str) -> list[np.ndarray]:
    """Numbers of the questions of each kind, [thing, phrasing]."""
    held: dict[str, dict[str, list[int]]] = {}
    for number, each in enumerate(planted.asked(world, family)):
        kind = each.question.template.removeprefix("held-out ").split()[0]
        held.setdefault(kind, {}).setdefault(each.question.cluster, []).append(number)
    return [np.array(list(things.values())) for things in held.values()]


def _of(nats: Sequence[np.ndarray], table: np.ndarray) -> np.ndarray:
    """Log-probabilities of a kind's answers, [thing, phrasing, answer]."""
    return np.array([[nats[number] for number in row] for row in table])


def _pairs(
    world: World, family: str, table: np.ndarray, held_out: bool
) -> list[tuple[int, int]]:
    """Pairs of phrasings of which one is held out, or none."""
    asked = planted.asked(world, family)
    new = [asked[i].question.template.startswith("held-out") for i in table[0]]
    pairs = combinations(range(len(new)), 2)
    return [(a, b) for a, b in pairs if new[a] + new[b] == int(held_out)]
