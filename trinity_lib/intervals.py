"""Intervals of what an audit finds: over clusters, never over tokens.

Everything one person is asked depends on that person, so all of a cluster's values count as
one. All intervals are two-sided, 95%.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
DRAWS = 999
"""Resamples of a bootstrap."""


class Interval(NamedTuple):
    """An estimate with its 95% interval."""

    estimate: float
    low: float
    high: float
    units: int
    """Independent clusters it rests on."""


class Grouped(NamedTuple):
    """Values by cluster."""

    names: tuple[str, ...]
    """The clusters, in the order in which they first come."""
    mean: np.ndarray
    """Mean of each one's values."""


def by_cluster(values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> Grouped:
    """Every cluster's mean; each counts once, however many values it has."""
    held: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        held.setdefault(cluster, []).append(float(value))
    return Grouped(tuple(held), np.array([np.mean(each) for each in held.values()]))


def mean(values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> Interval:
    """Mean over clusters with Student's interval; infinite where there is one cluster."""
    found = by_cluster(values, clusters).mean
    return _student(float(found.mean()), float(found.var()), len(found) - 1, len(found))


def difference(
    first: Sequence[float] | np.ndarray,
    first_clusters: Sequence[str],
    second: Sequence[float] | np.ndarray,
    second_clusters: Sequence[str],
) -> Interval:
    """Mean of the first less the second's, with Welch's interval over clusters.

    A cluster of both sides, such as a person who is asked two kinds of questions, ties their
    means: what it moves both by is taken off the variance. It counts once in the units, and
    degrees of freedom are at most the units less one. So the interval is that of the paired
    t-test where all clusters are shared, and Welch's own where none is.
    """
    a, b = by_cluster(first, first_clusters), by_cluster(second, second_clusters)
    sides = (a.mean, b.mean)
    units = len({*a.names, *b.names})
    estimate = float(a.mean.mean() - b.mean.mean())
    if min(map(len, sides)) < 2:
        return Interval(estimate, -np.inf, np.inf, units)
    parts = [x.var(ddof=1) / len(x) for x in sides]
    if sum(parts) == 0:
        return Interval(estimate, estimate, estimate, units)
    welch = sum(parts) ** 2 / sum(
        p**2 / (len(x) - 1) for p, x in zip(parts, sides, strict=True)
    )
    variance = max(0.0, sum(parts) - 2 * _covariance(a, b))  # rounding may leave less than 0
    freedom = min(welch, units - 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * variance**0.5
    return Interval(estimate, estimate - half, estimate + half, units)


def slope(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> Interval:
    """Least-squares slope of y on x, each pair a unit, with Student's interval."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    centred = x - x.mean()
    spread = float((centred**2).sum())
    if spread == 0:
        return Interval(np.nan, -np.inf, np.inf, len(x))
    estimate = float((centred * y).sum() / spread)
    left = y - y.mean() - estimate * centred
    return _student(estimate, float((left**2).sum()) / spread, len(x) - 2, len(x))


def proportion(hits: int, total: int) -> Interval:
    """Share of independent trials, with the exact interval of Clopper and Pearson."""
    if total == 0:
        return Interval(np.nan, 0.0, 1.0, 0)
    tail = (1 - LEVEL) / 2
    low = float(stats.beta.ppf(tail, hits, total - hits + 1)) if hits else 0.0
    high = float(stats.beta.isf(tail, hits + 1, total - hits)) if hits < total else 1.0
    return Interval(hits / total, low, high, total)


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    clusters: Sequence[str],
    seed: int,
    draws: int = DRAWS,
) -> Interval:
    """A statistic of rows, given as their numbers, with clusters resampled whole.

    The percentile interval, in which resamples without a value count for nothing; for
    statistics that are no mean. It is short where clusters are few.
    """
    members: dict[str, list[int]] = {}
    for number, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(number)
    rows = [np.array(each) for each in members.values()]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = rng.integers(len(rows), size=len(rows))
        found.append(statistic(np.concatenate([rows[i] for i in chosen])))
    known = np.array(found)[np.isfinite(found)]
    estimate = statistic(np.arange(len(clusters)))
    if not len(known):
        return Interval(estimate, -np.inf, np.inf, len(rows))
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(estimate, float(low), float(high), len(rows))


def _covariance(a: Grouped, b: Grouped) -> float:
    """Of two sides' means, by the clusters in both; 0 where there are none."""
    own, others = (
        dict(zip(x.names, (x.mean - x.mean.mean()) / (n * (n - 1)) ** 0.5, strict=True))
        for x, n in ((a, len(a.names)), (b, len(b.names)))
    )
    return float(sum(own[name] * others[name] for name in own if name in others))


def _student(estimate: float, variance: float, freedom: int, units: int) -> Interval:
    """`variance` over `freedom` is the estimate's own."""
    if freedom < 1:
        return Interval(estimate, -np.inf, np.inf, units)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * (variance / freedom) ** 0.5
    return Interval(estimate, estimate - half, estimate + half, units)
