"""Intervals against scipy's own, by coverage, and where they are none."""

import numpy as np
import pytest
from scipy import stats

from trinity_lib import intervals


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_mean_is_students(rng: np.random.Generator) -> None:
    values = rng.normal(size=12)
    found = intervals.mean(values, [str(i) for i in range(12)])
    known = stats.ttest_1samp(values, 0).confidence_interval()
    assert found == pytest.approx((values.mean(), known.low, known.high, 12))


def test_a_cluster_counts_once_however_often_it_is_asked() -> None:
    assert intervals.mean([1, 1, 1, 4], ["a", "a", "a", "b"]).estimate == 2.5
    assert intervals.mean([1.0, 2.0], ["a", "a"])[1:] == (-np.inf, np.inf, 1)


def test_a_difference_is_welchs(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=9), 3 * rng.normal(size=14)
    names = [str(i) for i in range(23)]
    found = intervals.difference(a, names[:9], b, names[9:])
    known = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert found == pytest.approx((a.mean() - b.mean(), known.low, known.high, 23))


def test_a_difference_of_the_same_clusters_is_of_pairs(rng: np.random.Generator) -> None:
    names = [str(i) for i in range(9)]
    a, b = rng.normal(size=9), rng.normal(size=9)
    found = intervals.difference(a, names, b, names)
    known = stats.ttest_rel(a, b).confidence_interval()
    assert found == pytest.approx((a.mean() - b.mean(), known.low, known.high, 9))
    same = intervals.difference(a, names, a + 1, names)
    assert same == pytest.approx((-1, -1, -1, 9))


def test_what_shared_clusters_move_alike_is_taken_off(rng: np.random.Generator) -> None:
    """The variance is a sum over clusters of what each moves the difference by, squared."""
    a, b = rng.normal(size=6), rng.normal(size=11)
    parts = np.zeros(13)
    parts[:6] += (a - a.mean()) / (6 * 5) ** 0.5
    parts[2:] -= (b - b.mean()) / (11 * 10) ** 0.5
    names = [str(i) for i in range(13)]
    welch = stats.ttest_ind(a, b, equal_var=False).df
    half = stats.t.ppf(0.975, min(welch, 12)) * (parts**2).sum() ** 0.5
    middle = a.mean() - b.mean()
    found = intervals.difference(a, names[:6], b, names[2:])
    assert found == pytest.approx((middle, middle - half, middle + half, 13))
    one = intervals.difference(a[:1], names[:1], b, names[:11])
    assert one[1:] == (-np.inf, np.inf, 11)


def test_a_slope_is_scipys(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=20), rng.normal(size=20)
    known = stats.linregress(x, y)
    half = stats.t.ppf(0.975, 18) * known.stderr
    found = intervals.slope(x, y)
    assert found == pytest.approx((known.slope, known.slope - half, known.slope + half, 20))
    assert intervals.slope([1, 1], [0, 5])[1:3] == (-np.inf, np.inf)


def test_a_proportion_is_never_certain() -> None:
    for hits in range(8):
        known = stats.binomtest(hits, 7).proportion_ci(0.95, "exact")
        found = intervals.proportion(hits, 7)
        assert found == pytest.approx((hits / 7, known.low, known.high, 7))
    found = intervals.proportion(0, 20)
    assert found.low == 0
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert intervals.proportion(0, 0)[1:] == (0.0, 1.0, 0)


def test_a_bootstrap_resamples_clusters(rng: np.random.Generator) -> None:
    """Ten copies of each of twenty values are twenty units; rows would be too sure."""
    values = rng.normal(size=20)
    rows = np.repeat(values, 10)
    clusters = [str(i) for i in np.repeat(np.arange(20), 10)]
    found = intervals.bootstrap(lambda at: float(rows[at].mean()), clusters, seed=1)
    once = intervals.mean(values, [str(i) for i in range(20)])
    assert found.units == 20
    assert found.high - found.low == pytest.approx(once.high - once.low, rel=0.2)
    assert found == intervals.bootstrap(lambda at: float(rows[at].mean()), clusters, seed=1)


@pytest.mark.parametrize("one, other, spread", [(range(12), range(12), 1),
                         (range(8), range(3, 18), 0.3), (range(5), range(10), 1)])  # fmt: skip
def test_differences_of_tied_sides_miss_one_time_in_twenty(
    one: range, other: range, spread: float, rng: np.random.Generator
) -> None:
    """Each cluster moves both sides; some have two values. Welch's test is too wide here."""
    draws, missed = 2000, 0
    sides = [list(one), list(other) + [other[-1]]]
    names = [[str(i) for i in side] for side in sides]
    for _ in range(draws):
        own = rng.normal(size=20)
        a, b = (0.8 * own[side] + 0.6 * rng.normal(size=len(side)) for side in sides)
        found = intervals.difference(a, names[0], spread * b, names[1])
        missed += not found.low <= 0 <= found.high
    low, high = stats.binom.interval(0.999, draws, 0.05)
    assert low <= missed <= high


@pytest.mark.parametrize("kind", ["mean", "difference", "slope"])
def test_they_miss_one_time_in_twenty(kind: str, rng: np.random.Generator) -> None:
    draws, missed = 2000, 0
    names = [str(i) for i in range(10)]
    for _ in range(draws):
        a, b = rng.normal(size=10), rng.normal(size=10)
        if kind == "mean":
            found = intervals.mean(a, names)
        elif kind == "difference":
            found = intervals.difference(a, names, b, [f"other {name}" for name in names])
        else:
            found = intervals.slope(a, b)
        missed += not found.low <= 0 <= found.high
    low, high = stats.binom.interval(0.999, draws, 0.05)
    assert low <= missed <= high
