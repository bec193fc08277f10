"""Whether a subject's probabilities are those of the coins and lamps that it was told of.

The generator's frequencies are known, so expectations over them stand where outcomes would
have to be drawn: no error here has the bias of finite samples, which `squared_error` takes out
where there are outcomes and no known truth (Kumar, Liang and Ma, arXiv 1909.10155). Intervals
are over places, each with a coin and a lamp; those of binned errors are percentile bootstraps,
short where places are few. `chance` is what a subject shows that gives all places one answer,
the mean over places; it is calibrated too, and has no resolution.

An error without a mean in log-probabilities (the oracle's noise) raises every distance from
the truth, which is 0 at best, and Brier score and negative log-likelihood with it; it lowers
correlations and raises the best temperature. No interval covers such a bias. The slope of
log-odds and the covariance between halves of phrasings have none; the places' own differences
widen the latter's interval, which covers its truth more often than 95% where there are any.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from trinity_lib import answers, intervals, planted
from trinity_lib.answers import HELD_OUT, TRAINED
from trinity_lib.forecasts import (
    Decomposition,
    brier,
    curvature,
    decomposition,
    divergence,
    ece,
    fit_temperature,
    gradient,
    inverse_temperature,
    nll,
    squared_error,
    temperature,
)
from trinity_lib.intervals import Interval
from trinity_lib.planted import OUTCOMES, World
from trinity_lib.planted_questions import Asked
from trinity_lib.subject import Finding, Subject

__all__ = (
    "PRIMARY", "audit", "brier", "decomposition", "divergence", "ece", "fit_temperature",
    "nll", "primary", "squared_error",
)  # fmt: skip

DRAWS = intervals.DRAWS
"""Resamples of a bootstrap."""
SAME = 1e-9
"""Numbers that spread no wider are one number."""
PRIMARY = {"calibration": (TRAINED, "covariance of log-odds between halves of phrasings, nat2")}
"""Whether places are told apart: what one half of the phrasings says of a place beyond the mean
place, times what the other half does. 0 where places do not differ."""


class Answered(NamedTuple):
    """What is said of some things, and what is true."""

    nats: np.ndarray
    """Log-probabilities [thing, phrasing, answer]; -inf where a kind has fewer answers."""
    truth: np.ndarray
    """Probabilities [thing, answer]."""
    kinds: np.ndarray
    """coin or lamp."""
    places: np.ndarray

    @property
    def each(self) -> np.ndarray:
        """The truth of each question, [thing, phrasing, answer]."""
        return np.broadcast_to(self.truth[:, None], self.nats.shape)

    @property
    def clusters(self) -> np.ndarray:
        """The place of each question, [thing * phrasing]."""
        return np.repeat(self.places, self.nats.shape[1])


class Views(NamedTuple):
    """The same things as three subjects have them."""

    subject: Answered
    generator: Answered
    habit: Answered
    """Says of every place what is true of the mean place."""


Statistic = Callable[[Answered, int], Interval]
"""Of what is answered, with so many resamples where it is a bootstrap."""


def audit(subject: Subject, world: World, *, seed: int = 0) -> list[Finding]:
    """How a subject's probabilities stand to the frequencies; `seed` is of the bootstraps."""
    asked = _asked(subject, world)
    found = list(_deciding(asked))
    for phrasings, views in asked.items():
        for measure, statistic, chance in _measures(seed):
            found.append(_finding(phrasings, measure, statistic, views, chance))
        for kind in OUTCOMES:
            some, item = Views(*(_only(view, kind) for view in views)), f"{kind}, {phrasings}"
            for measure, paired in (
                ("slope of log-odds on the true", _slope),
                ("correlation of frequencies", _correlation),
            ):
                found.append(_finding(item, measure, paired, some, 0.0))
    return found


def primary(subject: Subject, world: World) -> list[Finding]:
    """The finding of `PRIMARY` alone, as `audit` has it."""
    return list(_deciding(_asked(subject, world)))[:1]


def _asked(subject: Subject, world: World) -> dict[str, Views]:
    """What is said of things, by kind of phrasing."""
    asked = planted.asked(world, "frequencies")
    said, true = answers.of_subject(subject, asked), answers.of_generator(asked)
    found = {}
    for phrasings, held_out in ((TRAINED, False), (HELD_OUT, True)):
        mine, truth = (_answered(asked, nats, held_out) for nats in (said, true))
        same = np.stack([mine.truth[mine.kinds == kind].mean(0) for kind in mine.kinds])
        habit = np.log(same, out=np.full_like(same, -np.inf), where=same > 0)
        shape = mine.nats.shape
        habits = mine._replace(nats=np.broadcast_to(habit[:, None], shape))
        found[phrasings] = Views(mine, truth, habits)
    return found


def _answered(asked: Sequence[Asked], nats: Sequence[np.ndarray], held_out: bool) -> Answered:
    found: dict[Any, np.ndarray] = answers.by_thing(asked, nats, held_out)
    most = max(map(len, OUTCOMES.values()))
    said = [
        np.pad(rows, ((0, 0), (0, most - rows.shape[1])), constant_values=-np.inf)
        for rows in found.values()
    ]
    truth = [np.pad(t.probabilities, (0, most - len(t.probabilities))) for t in found]
    kinds, places = [thing.kind for thing in found], [thing.place for thing in found]
    return Answered(np.stack(said), np.stack(truth), np.array(kinds), np.array(places))


def _only(said: Answered, kind: str) -> Answered:
    return Answered(*(x[said.kinds == kind] for x in said))


def _finding(
    item: str, measure: str, statistic: Statistic, views: Views, chance: float | None
) -> Finding:
    """A statistic of the subject beside that of the generator and, for None, of habit."""
    truth = statistic(views.generator, 1).estimate
    nothing = statistic(views.habit, 1).estimate if chance is None else chance
    found = statistic(views.subject, DRAWS)
    return answers.finding("calibration", item, measure, found, truth, nothing)


def _deciding(asked: dict[str, Views]) -> Iterator[Finding]:
    """Whether places are told apart, and in phrasings held out as in those trained on."""
    trained, held_out = asked[TRAINED], asked[HELD_OUT]
    cases = {
        TRAINED: [(view, *answers.halves(_centred(view))) for view in trained],
        HELD_OUT: [(view, *answers.halves(_centred(view))) for view in held_out],
        f"{TRAINED} with held-out": [
            (view, _centred(view).mean(1), _centred(other).mean(1))
            for view, other in zip(trained, held_out, strict=True)
        ],
    }
    measure = PRIMARY["calibration"][1]
    for item, halves in cases.items():
        subject, generator, _ = (_covariance(*each) for each in halves)
        yield answers.finding("calibration", item, measure, subject, generator.estimate, 0.0)


def _centred(said: Answered) -> np.ndarray:
    """Log-probabilities less their mean over answers; 0 for no answer."""
    possible = np.isfinite(said.nats)
    nats = np.where(possible, said.nats, 0.0)
    centre = nats.sum(-1, keepdims=True) / possible.sum(-1, keepdims=True)
    return np.where(possible, nats - centre, 0.0)


def _covariance(said: Answered, first: np.ndarray, second: np.ndarray) -> Interval:
    """Of two halves' log-odds over places, the mean of answers; halves [thing, answer]."""
    found = np.zeros(len(first))
    for kind in np.unique(said.kinds):
        rows = said.kinds == kind
        found[rows] = answers.shared(first[rows], second[rows]) / len(OUTCOMES[str(kind)])
    return answers.mean(found, said.places)


def _measures(seed: int) -> tuple[tuple[str, Statistic, float | None], ...]:
    """Of all things together, each with its chance, None where habit shows it."""
    return (
        ("absolute error of a probability", _mean(_error), None),
        ("Brier score", _mean(lambda s: brier(np.exp(s.nats), s.each)), None),
        ("negative log-likelihood, nat", _mean(lambda s: nll(s.nats, s.each)), None),
        ("divergence from the truth, nat", _mean(lambda s: divergence(s.nats, s.each)), None),
        ("expected calibration error", partial(_resampled, seed, _ece), None),
        ("reliability", partial(_resampled, seed, _reliability), None),
        ("resolution", partial(_resampled, seed, _resolution), None),
        ("best temperature", _best_temperature, float("nan")),
    )


def _mean(rows: Callable[[Answered], np.ndarray]) -> Statistic:
    """Mean over places of what a question, [thing, phrasing], has."""
    return lambda said, _: intervals.mean(rows(said).ravel(), said.clusters.tolist())


def _resampled(
    seed: int,
    statistic: Callable[[np.ndarray, np.ndarray], float],
    said: Answered,
    draws: int,
) -> Interval:
    """A statistic of probabilities and the truth, both [question, answer], over places."""
    answers_of = said.nats.shape[-1]
    probability = np.exp(said.nats).reshape(-1, answers_of)
    truth = said.each.reshape(-1, answers_of)

    def of(rows: np.ndarray) -> float:
        return statistic(probability[rows], truth[rows])

    return intervals.bootstrap(of, said.clusters.tolist(), seed, draws)


def _error(said: Answered) -> np.ndarray:
    apart = np.abs(np.exp(said.nats) - said.each).sum(-1)
    return apart / np.isfinite(said.nats).sum(-1)


def _ece(probability: np.ndarray, truth: np.ndarray) -> float:
    """Of the likeliest answer."""
    best = probability.argmax(1)[:, None]
    confidence, correct = (np.take_along_axis(x, best, 1)[:, 0] for x in (probability, truth))
    return ece(confidence, correct)


def _events(probability: np.ndarray, truth: np.ndarray) -> Decomposition:
    """Every possible answer is an event, forecast or not."""
    possible = truth > 0
    return decomposition(probability[possible], truth[possible])


def _reliability(probability: np.ndarray, truth: np.ndarray) -> float:
    return _events(probability, truth).reliability


def _resolution(probability: np.ndarray, truth: np.ndarray) -> float:
    return _events(probability, truth).resolution


def _best_temperature(said: Answered, _: int) -> Interval:
    """From Student's interval of the inverse over places, by the questions' scores."""
    best = inverse_temperature(said.nats, said.each)
    if np.isnan(best):
        return Interval(best, 0.0, np.inf, len(set(said.places.tolist())))
    moved = gradient(said.nats, said.each, best) / curvature(said.nats, best).mean()
    found = intervals.mean(best - moved.ravel(), said.clusters.tolist())
    low, high = temperature(found.high), temperature(found.low)
    return Interval(temperature(best), low, high, found.units)


def _odds(said: Answered) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of the first answer against the second: true, and mean over phrasings."""
    true = np.log(said.truth[:, 0]) - np.log(said.truth[:, 1])
    return true, (said.nats[:, :, 0] - said.nats[:, :, 1]).mean(1)


def _slope(said: Answered, _: int) -> Interval:
    """Of one kind; 1 is calibrated, more is over-confident."""
    return intervals.slope(*_odds(said))


def _correlation(said: Answered, _: int) -> Interval:
    """Of the first answer's probability with the truth over places, with Fisher's interval."""
    true, mine = said.truth[:, 0], np.exp(said.nats[:, :, 0]).mean(1)
    count = len(true)
    if min(np.ptp(true), np.ptp(mine)) < SAME:
        return Interval(float("nan"), -1.0, 1.0, count)
    estimate = float(np.clip(np.corrcoef(true, mine)[0, 1], -1, 1))
    if 1 - abs(estimate) < SAME:
        return Interval(estimate, estimate, estimate, count)
    centre, half = np.arctanh(estimate), stats.norm.ppf(0.975) / (count - 3) ** 0.5
    return Interval(
        estimate, float(np.tanh(centre - half)), float(np.tanh(centre + half)), count
    )
