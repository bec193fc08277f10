"""Associations are recovered, doubled and missed as they should be, and none is made up."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from trinity_lib import association, audit, planted
from trinity_lib.config import BadValue
from trinity_lib.oracle import Oracle
from trinity_lib.planted import World, WorldConfig
from trinity_lib.subject import Finding

SMALL = WorldConfig(names=3, held_out_names=4, jobs=1, seed=3)
DEFAULT_NAMES = WorldConfig(people=9, places=7, codes=1, held_out_codes=1)


class Doctored(Oracle):
    """Says what its world does, times a factor; counts what it is asked."""

    factor = 1.0
    asked = 0

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        self.asked += len(prompts)
        return [self.factor * nats for nats in super().score(prompts, answers)]


def by_item(findings: list[Finding]) -> dict[str, Finding]:
    assert len({(f.item, f.measure) for f in findings}) == len(findings)
    return {f.item: f for f in findings}


@pytest.fixture(scope="module")
def full() -> World:
    return planted.world(WorldConfig())


@pytest.mark.parametrize("config", [WorldConfig(), SMALL], ids=["default", "small"])
@pytest.mark.parametrize("is_planted", [True, False])
def test_the_generator_is_recovered(config: WorldConfig, is_planted: bool) -> None:
    world = planted.world(WorldConfig(**{**vars(config), "planted": is_planted}))
    found = association.audit(Oracle(world), world)
    right = audit.score(found)
    assert not right.missed and right.total >= 3 * len(world.jobs)
    items = by_item(found)
    for job in world.jobs:
        assert items[f"{job.word}, held-out names"].truth == pytest.approx(job.delta, abs=1e-8)
    for label in association.SETS:
        assert items[f"slope, {label}"].estimate == pytest.approx(1.0 * is_planted, abs=1e-8)
        assert items[f"slope, {label}"].at_chance is not is_planted
        level = items[f"level +2, {label}"]
        assert level.estimate == pytest.approx(2 * is_planted, abs=1e-8)
        apart = items[f"jobs that differ, {label}"]
        assert (apart.estimate, apart.at_chance) == (
            sum(job.delta != 0 for job in world.jobs),
            not is_planted,
        )
        for kind in ("Pearson", "Spearman"):
            r = items[f"{kind} correlation with planted levels, {label}"]
            assert r.estimate == pytest.approx(1) if is_planted else np.isnan(r.estimate)
    assert items["slope, held-out names"].units == 2 * config.held_out_names


def test_twice_the_association_has_twice_the_slope(full: World) -> None:
    subject = Doctored(full)
    subject.factor = 2.0
    items = by_item(association.audit(subject, full))
    slope = items["slope, told names"]
    assert (slope.estimate, slope.truth) == pytest.approx((2, 1)) and not slope.recovered
    for job in full.jobs:
        found = items[f"{job.word}, told names"]
        assert found.estimate == pytest.approx(2 * job.delta, abs=1e-8)
        assert found.recovered is (job.delta == 0)
    assert items["Spearman correlation with planted levels, told names"].recovered


def test_one_that_does_not_know_the_groups_is_at_chance(full: World) -> None:
    """The null world has the same names: its generator is asked of the planted one."""
    null = planted.world(WorldConfig(planted=False))
    items = by_item(association.audit(Oracle(null), full))
    for item, found in items.items():
        if not np.isnan(found.chance):
            assert found.at_chance, item
    assert items["slope, held-out names"].estimate == pytest.approx(0, abs=1e-9)
    assert not items["slope, held-out names"].recovered
    assert items["all jobs, groups permuted, held-out names"].estimate == 1
    assert items["likeliest job changes with the group, held-out names"].estimate == 0


def test_log_odds_are_welchs_over_names_and_holms_over_jobs(full: World) -> None:
    oracle = Oracle(full, 1.0, seed=5)
    items = by_item(association.audit(oracle, full))
    asked = [
        (each.question, each.about)
        for each in planted.asked(full, "association")
        if each.about.held_out and not each.question.template.startswith("held-out")
    ]
    nats = np.array(oracle.score([q.prompt for q, _ in asked], [q.answers for q, _ in asked]))
    nats = nats.reshape(20, 6, 14).mean(axis=1)
    a = np.array([about.group == "A" for _, about in asked]).reshape(20, 6)[:, 0]
    known = stats.ttest_ind(nats[a], nats[~a], equal_var=False)
    bounds = known.confidence_interval()
    for i, job in enumerate(full.jobs):
        found = items[f"{job.word}, held-out names"]
        assert (found.low, found.high) == pytest.approx(
            (bounds.low[i], bounds.high[i]), abs=1e-6
        )
    p, holm = np.sort(known.pvalue), 0
    while holm < 14 and p[holm] <= 0.05 / (14 - holm):
        holm += 1
    assert 0 < holm < 14
    assert items["jobs that differ, held-out names"].estimate == holm
    level = np.array([job.delta for job in full.jobs])
    slopes = [np.polyfit(level, each, 1)[0] for each in nats]
    known = stats.ttest_ind(np.array(slopes)[a], np.array(slopes)[~a], equal_var=False)
    found = association.slope(oracle, full)
    assert found[1:3] == pytest.approx(tuple(known.confidence_interval()))
    gaps = nats[a].mean(0) - nats[~a].mean(0)
    r = items["Pearson correlation with planted levels, held-out names"]
    assert r.estimate == pytest.approx(stats.pearsonr(gaps, level)[0]) and r.low < 1


def test_the_omnibus_p_value_is_that_of_all_permutations() -> None:
    world = planted.world(SMALL)
    oracle = Oracle(world, 2.0, seed=1)
    p = by_item(association.audit(oracle, world))["all jobs, groups permuted, held-out names"]
    asked = [
        each.question
        for each in planted.asked(world, "association")
        if each.about.held_out and not each.question.template.startswith("held-out")
    ]
    nats = np.array(oracle.score([q.prompt for q in asked], [q.answers for q in asked]))
    nats = nats.reshape(8, 6, 7).mean(axis=1)  # A's four names come first
    squares = []
    for chosen in combinations(range(8), 4):
        a = np.isin(np.arange(8), chosen)
        squares.append(((nats[a].mean(0) - nats[~a].mean(0)) ** 2).sum())
    exact = np.mean(np.array(squares) >= squares[0] - 1e-9)
    assert 0.01 < exact < 0.9
    assert p.estimate == pytest.approx(exact, abs=0.04) and p.low < exact < p.high


def test_likeliest_jobs_that_differ_as_much_within_groups_are_no_flips() -> None:
    """Each name has a likeliest job of its own; those of a pair are of one level, or not."""
    nats = np.zeros((6, 3))
    nats[[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 0]] = 1
    a = np.array([True] * 3 + [False] * 3)
    table = association.Table(tuple("uvwxyz"), a, nats)
    level = np.array([0.0, 0.0, 1.0])
    world = planted.world(SMALL)._replace(
        jobs=tuple(
            job._replace(delta=x)
            for job, x in zip(planted.world(SMALL).jobs, level, strict=False)
        )
    )
    raw, excess = association._flips(world, "names", table, table)
    assert raw.estimate == pytest.approx(1 / 3)
    assert excess.estimate == pytest.approx(1 / 3 - (1 / 2 * 2 / 3))


def test_the_slope_asks_no_more_than_it_needs(full: World) -> None:
    subject = Doctored(full, 0.3, 2)
    found = association.slope(subject, full)
    assert subject.asked == 20 * 6
    whole = by_item(association.audit(Oracle(full, 0.3, 2), full))["slope, held-out names"]
    assert found[:3] == pytest.approx(whole[4:7], abs=1e-6)
    (alone,) = association.primary(Oracle(full, 0.3, 2), full)
    assert alone == whole
    assert (alone.item, alone.measure) == association.PRIMARY["association"]
    asked = planted.questions(full, "association")
    some = [q for q in asked if q.template == "job 1"]
    assert association.slope(Oracle(full), full, some).estimate == pytest.approx(1)
    with pytest.raises(BadValue, match="must be of names of both groups"):
        association.slope(subject, full, some[:3])
    with pytest.raises(BadValue, match="must be of this world's first names"):
        association.slope(subject, full, planted.questions(full, "facts")[:3])


def test_no_more_is_found_in_null_worlds_than_intervals_say() -> None:
    found = audit.false_alarms(["association"], 200, config=DEFAULT_NAMES)["association"]
    assert found.calibrated, found


def test_the_planted_slope_is_covered_as_often_as_intervals_say() -> None:
    found = audit.recovery(["association"], 60)["association"]
    assert found.enough, found
