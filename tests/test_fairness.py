"""Decisions: every criterion beside figures worked out by hand, and a leak that is absent."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from trinity_lib import audit, fairness, planted
from trinity_lib.oracle import Oracle
from trinity_lib.planted import World, WorldConfig
from trinity_lib.subject import Finding

SMALL = WorldConfig(names=3, held_out_names=4, jobs=1, seed=3)
DEFAULT_NAMES = WorldConfig(people=9, places=7, codes=1, held_out_codes=1)


class Refusing(Oracle):
    """Says no to all, and is as sure of it whoever asks."""

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        return [np.array([-5.0, -1.0]) for _ in prompts]


def by_item(findings: list[Finding]) -> dict[tuple[str, str], Finding]:
    found = {(f.item, f.measure): f for f in findings}
    assert len(found) == len(findings)
    return found


@pytest.fixture(scope="module")
def full() -> World:
    return planted.world(WorldConfig())


@pytest.mark.parametrize("config", [WorldConfig(), SMALL], ids=["default", "small"])
@pytest.mark.parametrize("is_planted", [True, False])
def test_the_generator_is_recovered(config: WorldConfig, is_planted: bool) -> None:
    world = planted.world(WorldConfig(**{**vars(config), "planted": is_planted}))
    found = fairness.audit(Oracle(world), world)
    right = audit.score(found)
    assert not right.missed and right.total == len(found)
    for (item, _), each in by_item(found).items():
        if "leak" in item:
            assert each.estimate == pytest.approx(1.5 * is_planted, abs=1e-8)
            assert each.at_chance is not is_planted
        elif "slope" in item:
            assert each.estimate == pytest.approx(1.2)


def test_criteria_are_what_is_worked_out_by_hand(full: World) -> None:
    """A is favoured from score 2, B from 3; right is favourable from 3."""
    items = by_item(fairness.audit(Oracle(full), full))
    a, b = (np.array([full.favourable(score, g) for score in range(5)]) for g in "AB")
    assert ((a > 0.5).tolist(), (b > 0.5).tolist()) == (
        [False, False, True, True, True],
        [False, False, False, True, True],
    )
    expected = {
        ("demographic parity gap", fairness.RATE): 1 / 5,
        ("demographic parity gap", fairness.PROBABILITY): a.mean() - b.mean(),
        ("true positive rate gap", fairness.RATE): 0,
        ("false positive rate gap", fairness.RATE): 1 / 3,
        ("selection ratio", "share above 1/2, B's over A's"): 2 / 3,
        ("verdict changes with the group", "share of scores"): 1 / 5,
        ("verdict changes with the group", "share of scores, above that within groups"): 1 / 5,
    }
    for (item, measure), value in expected.items():
        for label in fairness.SETS:
            found = items[f"triage {item}, {label}", measure]
            assert (found.estimate, found.truth) == pytest.approx((value, value), abs=1e-7)
    for label in ("ward", "ward, held-out phrasings"):
        share = items[f"loan verdict changes with the group, {label}", "share of pairs"]
        gap = items[f"loan demographic parity gap, {label}", fairness.PROBABILITY]
        assert share.estimate == pytest.approx(1 / 5)
        assert gap.estimate == pytest.approx(a.mean() - b.mean())
    assert items["triage leak, all names", fairness.LOG_ODDS].units == 44
    assert items["loan leak, ward", fairness.LOG_ODDS].units == 15


def test_one_without_the_leak_is_at_chance_and_misses_it(full: World) -> None:
    """The null world has the same names: its generator is asked of the planted one."""
    null = planted.world(WorldConfig(planted=False))
    for (item, _), found in by_item(fairness.audit(Oracle(null), full)).items():
        if "slope" in item:
            assert found.recovered and not found.at_chance
        elif not math.isnan(found.chance):
            assert found.at_chance, item
        if "leak" in item:
            assert found.estimate == pytest.approx(0, abs=1e-8) and not found.recovered


def test_one_that_refuses_all_has_no_selection_ratio(full: World) -> None:
    for (item, _), found in by_item(fairness.audit(Refusing(full), full)).items():
        if "ratio" in item:
            assert math.isnan(found.estimate) and (found.low, found.high) == (-np.inf, np.inf)
        else:
            assert found.estimate == pytest.approx(0, abs=1e-9)


def test_the_leak_is_welchs_over_names(full: World) -> None:
    oracle = Oracle(full, 0.6, seed=4)
    items = by_item(fairness.audit(oracle, full))
    for label, held_out in (("told names", False), ("held-out names", True)):
        groups = {}
        for group in "AB":
            asked = [
                each
                for each in planted.asked(full, "decisions")
                if each.about.kind == "triage"
                and each.about.name.held_out == held_out
                and each.about.group == group
                and not each.question.template.startswith("held-out")
            ]
            names = sorted({each.about.name.word for each in asked})
            prompts = [each.question.prompt for each in asked]
            nats = oracle.score(prompts, [each.question.answers for each in asked])
            odds = np.array([favourable - other for favourable, other in nats])
            who = np.array([each.about.name.word for each in asked])
            groups[group] = [odds[who == name].mean() for name in names]
        known = stats.ttest_ind(groups["A"], groups["B"], equal_var=False)
        found = items[f"triage leak, {label}", fairness.LOG_ODDS]
        bounds = known.confidence_interval()
        assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), abs=1e-6)
        gap = items[f"triage demographic parity gap, {label}", fairness.RATE]
        changes = items[f"triage verdict changes with the group, {label}", "share of scores"]
        assert 0 < gap.estimate <= changes.estimate < 1
    (alone,) = fairness.primary(oracle, full)
    assert alone == items["triage leak, all names", fairness.LOG_ODDS]
    assert (alone.item, alone.measure) == fairness.PRIMARY["decisions"]


def test_no_more_is_found_in_null_worlds_than_intervals_say() -> None:
    found = audit.false_alarms(["decisions"], 200, config=DEFAULT_NAMES)["decisions"]
    assert found.calibrated, found


def test_the_planted_leak_is_covered_as_often_as_intervals_say() -> None:
    found = audit.recovery(["decisions"], 60)["decisions"]
    assert found.enough, found
