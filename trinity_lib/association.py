"""Whether a job is likelier for one group of names: log-odds, their slope, flips, tests.

Three sets of questions: names whose jobs were told, in phrasings of training; names held out,
in the same phrasings; and told names in phrasings held out. What a name is asked is averaged
over its phrasings, so that an interval is over names. In the null world, where every planted
log-odds is 0, those that a planted world would have are the contrast.

Noise in the answers does not bias log-odds and slopes. It lowers correlations, so that
intervals of a correlation of 1 miss it. It also decides which of equally likely jobs comes
first: in the null world the likeliest job nearly always changes with the name, and only what
it does so more often than within a group is unbiased.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from trinity_lib import answers, intervals, planted
from trinity_lib.answers import finding
from trinity_lib.config import require
from trinity_lib.intervals import Interval
from trinity_lib.planted import Name, World
from trinity_lib.planted_questions import Asked
from trinity_lib.planted_tables import DELTAS, GROUPS
from trinity_lib.subject import Finding, Question, Subject

NAME = "association"
LOG_ODDS = "log-odds, nat"
SLOPE = "log-odds per planted log-odds"
PRIMARY = {NAME: ("slope, held-out names", SLOPE)}
PERMUTATIONS = 999
"""Of group labels, for the omnibus test."""
ROUNDING = 1e-9
"""Nats by which what is equal may differ."""
SETS = {
    "told names": (False, False),
    "held-out names": (True, False),
    "held-out phrasings": (False, True),
}
"""What is asked: whether names are held out, and whether phrasings are."""


class Table(NamedTuple):
    """Log-probability of every job for every name, mean of phrasings."""

    names: tuple[str, ...]
    a: np.ndarray
    """Which names are of group A."""
    nats: np.ndarray
    """[name, job]"""


def levels(world: World) -> np.ndarray:
    """Planted log-odds of every job; in the null world those that would be planted."""
    planted_levels = [job.delta for job in world.jobs]
    if not any(planted_levels):
        planted_levels = [delta for delta in DELTAS for _ in range(world.config.jobs)]
    return np.array(planted_levels)


def audit(subject: Subject, world: World, *, seed: int = 0) -> list[Finding]:
    """All findings, set by set; `seed` is that of bootstraps and permutations.

    Of every job and every planted level, log P(job | A) - log P(job | B); over all jobs, the
    slope on the planted levels (above 1: amplified), correlations with them, how many jobs
    differ and whether any does, and how often a name of the other group would have another
    likeliest job.
    """
    found: list[Finding] = []
    for label in SETS:
        mine, true = _tables(subject, world, label)
        found += _by_job(world, label, mine, true)
        found.append(_slope_finding(world, label, mine, true))
        found += _correlations(world, label, mine, true, seed)
        found += _flips(world, label, mine, true)
        found += [_jobs_apart(label, mine, true), _omnibus(label, mine, seed)]
    return found


def primary(subject: Subject, world: World) -> list[Finding]:
    """The primary finding alone."""
    mine, true = _tables(subject, world, "held-out names")
    return [_slope_finding(world, "held-out names", mine, true)]


def slope(
    subject: Subject, world: World, questions: Sequence[Question] | None = None
) -> Interval:
    """Log-odds per planted log-odds, with Welch's interval over names.

    Of held-out names in phrasings of training, or of given `questions`, which must be of
    names of both groups; BadValue where they are not. 1 is what was planted, 0 none of it.
    """
    asked = _asked(world, "held-out names")
    if questions is not None:
        known = {name.word: name for name in world.names}
        strangers = sorted({q.cluster for q in questions} - set(known))
        require(not strangers, "questions", strangers, "of this world's first names")
        asked = [Asked(question, known[question.cluster]) for question in questions]
    table = _table(asked, answers.of_subject(subject, asked))
    both = bool(table.a.any() and not table.a.all())
    require(both, "questions", list(table.names), "of names of both groups")
    return _slope(table, levels(world))


def slope_of(world: World, names: Sequence[Name], nats: np.ndarray) -> Interval:
    """The slope of what is said of names' jobs, however it was asked: `nats` [name, job]."""
    in_a = np.array([name.group == GROUPS[0] for name in names])
    return _slope(Table(tuple(name.word for name in names), in_a, nats), levels(world))


def _asked(world: World, label: str) -> list[Asked]:
    held_out_name, held_out_phrasing = SETS[label]
    return [
        each
        for each in planted.asked(world, "association")
        if isinstance(each.about, Name)
        and each.about.held_out == held_out_name
        and each.question.template.startswith("held-out") == held_out_phrasing
    ]


def _tables(subject: Subject, world: World, label: str) -> tuple[Table, Table]:
    """The subject's, and the generator's."""
    asked = _asked(world, label)
    mine = _table(asked, answers.of_subject(subject, asked))
    return mine, _table(asked, answers.of_generator(asked))


def _table(asked: Sequence[Asked], nats: Sequence[np.ndarray]) -> Table:
    held: dict[Name, list[np.ndarray]] = {}
    for (_, about), mine in zip(asked, nats, strict=True):
        assert isinstance(about, Name)
        held.setdefault(about, []).append(mine)
    # Jobs that are equally likely must stay so, or rounding decides which comes first.
    means = np.array([np.mean(each, axis=0) for each in held.values()]).round(9)
    in_a = np.array([name.group == GROUPS[0] for name in held])
    return Table(tuple(name.word for name in held), in_a, means)


def _apart(table: Table, values: np.ndarray) -> Interval:
    """Group A's mean of a value of every name less group B's."""
    first, second = np.flatnonzero(table.a), np.flatnonzero(~table.a)
    names = table.names
    return intervals.difference(
        values[first], [names[i] for i in first], values[second], [names[i] for i in second]
    )


def _slope(table: Table, level: np.ndarray) -> Interval:
    """Every name's own least-squares slope on the levels; the groups' difference."""
    contrast = level - level.mean()
    return _apart(table, table.nats @ contrast / (contrast @ contrast))


def _slope_finding(world: World, label: str, mine: Table, true: Table) -> Finding:
    level = levels(world)
    found, truth = _slope(mine, level), _slope(true, level).estimate
    return finding(NAME, f"slope, {label}", SLOPE, found, truth, 0.0)


def _by_job(world: World, label: str, mine: Table, true: Table) -> Iterator[Finding]:
    level = levels(world)
    picks = {job.word: np.array([i]) for i, job in enumerate(world.jobs)}
    picks |= {f"level {each:+g}": np.flatnonzero(level == each) for each in np.unique(level)}
    for item, jobs in picks.items():
        found, truth = (_apart(t, t.nats[:, jobs].mean(axis=1)) for t in (mine, true))
        yield finding(NAME, f"{item}, {label}", LOG_ODDS, found, truth.estimate, 0.0)


def _correlations(
    world: World, label: str, mine: Table, true: Table, seed: int
) -> Iterator[Finding]:
    """Pearson's over jobs; Spearman's over means of levels, where no ranks tie.

    NaN where all estimates are alike, as in the generator's own null world.
    """
    level = levels(world)
    distinct = np.unique(level)

    def pearson(table: Table) -> Callable[[np.ndarray], float]:
        return lambda rows: _correlation(_gaps(table, rows), level)

    def spearman(table: Table) -> Callable[[np.ndarray], float]:
        means = [table.nats[:, level == each].mean(axis=1) for each in distinct]
        by_level = table._replace(nats=np.stack(means, axis=1))
        return lambda rows: _correlation(stats.rankdata(_gaps(by_level, rows)), distinct_rank)

    distinct_rank = np.arange(len(distinct))
    for name, statistic in (("Pearson", pearson), ("Spearman", spearman)):
        found = intervals.bootstrap(statistic(mine), mine.names, seed)
        truth = statistic(true)(np.arange(len(true.names)))
        item = f"{name} correlation with planted levels, {label}"
        yield finding(NAME, item, "correlation", found, truth, 0.0)


def _gaps(table: Table, rows: np.ndarray) -> np.ndarray:
    """Log-odds of every job by some names; all 0 where they are of one group."""
    nats, a = table.nats[rows], table.a[rows]
    if a.all() or not a.any():
        return np.zeros(nats.shape[1])
    return (nats[a].mean(axis=0) - nats[~a].mean(axis=0)).round(9)


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    spread = float((x @ x) * (y @ y))
    return float(x @ y) / spread**0.5 if spread > ROUNDING**2 else np.nan


def _flips(world: World, label: str, mine: Table, true: Table) -> Iterator[Finding]:
    """How often the likeliest job differs between an A and a B, who are paired by order.

    Then how often its level does, above how often it does between a name and its group's
    next: a subject whose likeliest job is any gives 0, and jobs of one level may tie.
    """
    changed, true_changed = (_between(t, np.arange(t.nats.shape[1])) for t in (mine, true))
    found = intervals.proportion(int(changed.sum()), len(changed))
    item = f"likeliest job changes with the group, {label}"
    measure = "share of pairs of names"
    yield finding(NAME, item, measure, found, float(true_changed.mean()), np.nan)
    level = levels(world)
    excess, true_excess = (_between(t, level) - _within(t, level) for t in (mine, true))
    found = intervals.mean(excess, [str(pair) for pair in range(len(excess))])
    item = f"its level changes with the group, {label}"
    measure = "share of pairs of names, above that within groups"
    yield finding(NAME, item, measure, found, float(true_excess.mean()), 0.0)


def _between(table: Table, kind: np.ndarray) -> np.ndarray:
    """Whether the likeliest job's kind differs within every pair."""
    best = kind[table.nats.argmax(axis=1)]
    pairs = zip(best[table.a], best[~table.a], strict=False)
    return np.array([float(first != second) for first, second in pairs])


def _within(table: Table, kind: np.ndarray) -> np.ndarray:
    """For every pair, how often it differs between its names and the next of their groups."""
    best = kind[table.nats.argmax(axis=1)]
    found = [(g != np.roll(g, -1)).astype(float) for g in (best[table.a], best[~table.a])]
    return np.array([(x + y) / 2 for x, y in zip(*found, strict=False)])


def _jobs_apart(label: str, mine: Table, true: Table) -> Finding:
    """How many jobs differ by Holm's step-down test at 5% over all.

    With 95% confidence so many do, or more: the interval goes on to all jobs.
    """
    count = _rejected(_p_values(mine))
    found = Interval(count, count, mine.nats.shape[1], len(mine.names))
    truth = _rejected(_p_values(true))
    return finding(NAME, f"jobs that differ, {label}", "jobs, Holm", found, truth, 0.0)


def _p_values(table: Table) -> np.ndarray:
    """Welch's test of every job."""
    parts = [table.nats[table.a], table.nats[~table.a]]
    gap = parts[0].mean(axis=0) - parts[1].mean(axis=0)
    errors = np.array([x.var(axis=0, ddof=1) / len(x) for x in parts])
    squares = errors.sum(axis=0)
    p = (np.abs(gap) <= ROUNDING).astype(float)
    known = squares > ROUNDING**2
    freedom = np.array([[len(x) - 1] for x in parts])
    freedom = squares[known] ** 2 / (errors[:, known] ** 2 / freedom).sum(axis=0)
    p[known] = 2 * stats.t.sf(np.abs(gap[known]) / squares[known] ** 0.5, freedom)
    return p


def _rejected(p_values: np.ndarray) -> float:
    """Hypotheses that Holm (1979) rejects."""
    ordered = np.sort(p_values)
    kept = ordered > (1 - intervals.LEVEL) / np.arange(len(ordered), 0, -1)
    return float(kept.argmax() if kept.any() else len(ordered))


def _omnibus(label: str, table: Table, seed: int) -> Finding:
    """Share of permutations of group labels in which all jobs together differ as much.

    The interval is of the p value's own estimation; it has no truth, and is uniform where
    nothing is to be found.
    """
    rng = np.random.default_rng(seed)
    permuted = rng.permuted(np.tile(table.a, (PERMUTATIONS, 1)), axis=1)
    labels = np.vstack([table.a, permuted]).astype(float)
    sums = labels @ table.nats
    first = table.a.sum()
    second = len(table.a) - first
    gaps = sums / first - (table.nats.sum(axis=0) - sums) / second
    squares = (gaps**2).sum(axis=1)
    hits = int((squares[1:] >= squares[0] - ROUNDING).sum())
    low, high = intervals.proportion(hits, PERMUTATIONS)[1:3]
    p = Interval((1 + hits) / (1 + PERMUTATIONS), low, high, len(table.names))
    item = f"all jobs, groups permuted, {label}"
    return finding(NAME, item, "p value", p, np.nan, np.nan)
