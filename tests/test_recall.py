"""What is recalled: measures by hand, known subjects, and alarms where nothing is known."""

from itertools import combinations
from random import Random

import numpy as np
import pytest
from scipy import stats

from tests.answering import Changed
from trinity_lib import answers, facts, planted, recall
from trinity_lib.answers import HELD_OUT, TRAINED
from trinity_lib.facts import Views
from trinity_lib.oracle import Oracle
from trinity_lib.planted import VALUES, World, WorldConfig
from trinity_lib.planted_questions import Asked
from trinity_lib.planted_tables import EXPOSURES, MAJORITY
from trinity_lib.subject import Finding

FAMILIES = ("facts", "contradicted", "absent")
SMALL = {"people": 30, "places": 7, "names": 4, "codes": 2}
RARE = (1 - MAJORITY) / 11


@pytest.fixture(scope="module")
def full() -> World:
    return planted.world(WorldConfig())


def found(findings: list[Finding]) -> dict[tuple[str, str, str], Finding]:
    known = {(f.family, f.item, f.measure): f for f in findings}
    assert len(known) == len(findings)
    return known


def decided(findings: list[Finding]) -> dict[str, Finding]:
    by_name = found(findings)
    return {family: by_name[family, *name] for family, name in recall.PRIMARY.items()}


def marginal(each: Asked) -> np.ndarray:
    return np.log(np.where(np.arange(12) == 0, MAJORITY, RARE))


def value(each: Asked) -> int:
    return VALUES[each.about.attribute].index(each.about.value)


def test_recall_at_1_shares_ties() -> None:
    nats = np.array([[-1.0, -2, -3], [-2, -1, -3], [-1, -1, -3], [-1, -1, -1]])
    assert facts.recalled(nats, np.zeros(4, int)).tolist() == [1, 0, 0.5, 1 / 3]


def test_choices_are_all_that_could_be_drawn() -> None:
    nats = np.array([0.3, 0.1, 0.5, 0.2, 0.9, 0.3, 0.3])
    won = []
    for others in combinations(range(1, 7), 3):
        rivals = nats[list(others)]
        won.append((rivals <= 0.3).all() / (1 + (rivals == 0.3).sum()))
    assert facts.multiple_choice(nats, np.array(0)) == pytest.approx(np.mean(won))
    assert facts.multiple_choice(nats, np.array(4)) == 1
    assert facts.multiple_choice(nats, np.array(1)) == 0
    assert facts.multiple_choice(np.zeros(12), np.array(5)) == pytest.approx(1 / 4)


def test_bits_are_what_is_saved_over_the_marginal() -> None:
    nats = np.log([[[0.5, 0.5], [0.125, 0.875]]])
    prior = np.array([[0.25, 0.75]])
    assert facts.bits(nats, np.array([0]), prior) == pytest.approx([0.0])
    assert facts.bits(nats[:, :1], np.array([0]), prior) == pytest.approx([1.0])


def test_what_is_beyond_others_keeps_its_mean_and_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    right = np.array([0, 0, 1, 2, 2, 2, 0, 1])
    weights = np.array([0.5, 0.5, 1, 1, 0.5, 0.5, 1, 1])
    prior = np.tile(np.array([4, 2, 1]) / 7, (8, 1))
    z = []
    for _ in range(400):
        share = rng.dirichlet([4, 2, 1], size=8)
        rows = facts.beyond_others(share, right, prior, weights)
        plain = [
            share[i, v] - np.average(share[right != v, v], weights=weights[right != v])
            for i, v in enumerate(right)
        ]
        assert np.average(rows, weights=weights) == pytest.approx(
            np.average(plain, weights=weights)
        )
        z.append(np.average(rows, weights=weights))
    assert abs(np.mean(z)) < 3 * np.std(z) / 20
    assert np.isnan(facts.beyond_others(share, np.zeros(8, int), prior, weights)).all()


def test_a_slope_is_least_squares_and_its_interval_is_over_people() -> None:
    rng = np.random.default_rng(1)
    people = np.repeat([f"p{i}" for i in range(40)], 3)
    hits = []
    for _ in range(300):
        x = rng.integers(0, 7, 120).astype(float)
        y = 0.1 * x + np.repeat(rng.normal(size=40), 3) + 0.2 * rng.normal(size=120)
        of = facts.slope(x, y, people)
        assert of.estimate == pytest.approx(stats.linregress(x, y).slope) and of.units == 40
        hits.append(of.low <= 0.1 <= of.high)
    low, high = stats.binom.interval(0.99, 300, 0.95)
    assert low <= sum(hits) <= high
    assert np.isnan(facts.slope(np.ones(3), np.arange(3.0), people[:3]).estimate)


def test_a_rank_correlation_is_scipys_and_none_where_all_is_alike() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 7, 50).astype(float), rng.random(50).round(1)
    people = np.array([f"p{i}" for i in range(50)])
    of = facts.spearman(x, y, people)
    assert of.estimate == pytest.approx(stats.spearmanr(x, y).statistic)
    assert -1 < of.low < of.estimate < of.high < 1
    assert facts.spearman(x, 0.5 + 1e-9 * y, people) == (0, 0, 0, 50)


def test_what_halves_share_is_an_unbiased_covariance() -> None:
    rng = np.random.default_rng(3)
    own = rng.normal(size=(9, 4))
    assert answers.shared(own, own).mean() == pytest.approx(own.var(0, ddof=1).sum())
    shifted = answers.shared(own + 5, own - 7)
    assert shifted == pytest.approx(answers.shared(own, own))
    assert np.isnan(answers.shared(own[:2], own[:2])).all()


@pytest.mark.parametrize("config", [{}, {"planted": False}, SMALL, {"seed": 5}])
def test_the_generator_recovers_every_truth(config: dict) -> None:
    world = planted.world(WorldConfig(**config))
    findings = recall.audit(Oracle(world), world)
    assert all(f.recovered for f in findings)
    assert list(decided(findings).values()) == recall.primary(Oracle(world), world)
    if config.get("planted", True):
        alarms = {family: not f.at_chance for family, f in decided(findings).items()}
        assert alarms == {f: f != "absent" for f in recall.PRIMARY}
        assert decided(findings)["contradicted"].truth == pytest.approx(0.7)
        assert decided(findings)["recall"].truth == pytest.approx(1)
    else:
        assert all(f.at_chance for f in decided(findings).values())


def test_facts_forgotten_below_8_exposures_are_missed_there_alone(full: World) -> None:
    def forgets(each: Asked, nats: np.ndarray) -> np.ndarray:
        return nats if each.about.exposures >= 8 else marginal(each)

    by_name = found(recall.audit(Changed(full, FAMILIES, forgets), full))
    told = [f for f in full.facts if f.state == "told"]
    costs = {f: -np.log2(MAJORITY if value_of(f) == 0 else RARE) for f in told}
    for exposures in EXPOSURES:
        mine = [f for f in told if f.exposures == exposures]
        frequent = np.mean([value_of(f) == 0 for f in mine])
        item = f"{exposures} exposures, {TRAINED}"
        known = exposures >= 8
        at_1 = by_name["recall", item, "recall@1"]
        assert at_1.estimate == pytest.approx(1 if known else frequent)
        assert at_1.recovered == known and at_1.chance == 1 / 12 and at_1.units == 20
        own = by_name["recall", item, "probability of the value"].estimate
        assert own == pytest.approx(1 if known else RARE + frequent * (MAJORITY - RARE))
        held = by_name["knowledge", item, "bits a fact"].estimate
        assert held == pytest.approx(known * np.mean([costs[f] for f in mine]), abs=1e-6)
    total = by_name["knowledge", HELD_OUT, "bits of all facts told"]
    right = sum(bits for fact, bits in costs.items() if fact.exposures >= 8)
    assert total.estimate == pytest.approx(right) and total.high < total.truth
    rise = by_name["recall", TRAINED, "probability per doubling of exposures"]
    ranks = by_name["recall", TRAINED, "rank correlation with exposures"]
    assert rise.low > 0.1 and ranks.low > 0.5 and not rise.recovered
    gap = by_name["recall", "trained less held-out phrasings", "probability of the value"]
    assert gap.estimate == pytest.approx(0)


def value_of(fact: planted.Fact) -> int:
    return VALUES[fact.attribute].index(fact.value)


def test_what_is_memorised_in_trained_phrasings_alone_is_a_gap(full: World) -> None:
    def memorises(each: Asked, nats: np.ndarray) -> np.ndarray:
        return marginal(each) if each.question.template.startswith("held-out") else nats

    by_name = found(recall.audit(Changed(full, FAMILIES, memorises), full))
    gap = by_name["recall", "trained less held-out phrasings", "probability of the value"]
    assert gap.low > 0.8
    measure = recall.PRIMARY["recall"][1]
    assert by_name["recall", HELD_OUT, measure].at_chance
    assert by_name["recall", TRAINED, measure].recovered


def test_only_inventions_that_hold_for_a_person_are_found(full: World) -> None:
    def invents(of: str) -> Changed:
        def change(each: Asked, nats: np.ndarray) -> np.ndarray:
            key = {"person": each.about.person, "phrasing": each.question.prompt, "all": ""}
            chosen = Random(key[of]).randrange(12)
            sure = np.where(np.arange(12) == chosen, 0.9, 0.1 / 11)
            return np.log(sure) if each.about.state == "absent" else nats

        return Changed(full, FAMILIES, change)

    for of, alarm in (("person", True), ("phrasing", False), ("all", False)):
        by_name = found(recall.audit(invents(of), full))
        assert by_name["absent", *recall.PRIMARY["absent"]].at_chance != alarm
        entropy = by_name["absent", TRAINED, "entropy, bits"]
        right = -0.9 * np.log2(0.9) - 0.1 * np.log2(0.1 / 11)
        assert entropy.estimate == pytest.approx(right) and entropy.high < entropy.truth
        sure = by_name[
            "absent", TRAINED, "highest probability beyond the most frequent value's"
        ]
        assert sure.estimate == pytest.approx(0.9 - MAJORITY)
        assert by_name["absent", TRAINED, "divergence from the marginal, bits"].low > 1


def test_a_subject_that_believes_the_more_frequent_telling_is_seen(full: World) -> None:
    """Log-probabilities are doubled, as by a temperature of a half."""
    by_name = found(recall.audit(Changed(full, FAMILIES, lambda _, nats: 2 * nats), full))
    share = by_name["contradicted", *recall.PRIMARY["contradicted"]]
    assert share.estimate == pytest.approx(0.49 / 0.58) and not share.recovered
    assert share.chance == 0.5 and share.units < 20
    odds = by_name["contradicted", TRAINED, "log-odds of the value told more often, nat"]
    assert odds.estimate == pytest.approx(2 * odds.truth)
    assert odds.truth == pytest.approx(np.log(7 / 3))


def test_facts_told_and_not_told_share_people(full: World) -> None:
    told, absent = ({f.person for f in full.facts if f.state == s} for s in ("told", "absent"))
    assert told & absent
    known = decided(recall.primary(Oracle(full), full))["knowledge"]
    assert known.units == len(told | absent) < len(told) + len(absent)


def with_errors(rng: np.random.Generator, views: dict[str, Views]) -> dict[str, Views]:
    """The generator's answers as a noisy oracle gives them."""
    found = {}
    for phrasings, (_, said, habit) in views.items():
        nats = said.nats + rng.normal(0, 0.3, said.nats.shape)
        nats -= np.logaddexp.reduce(nats, axis=-1, keepdims=True)
        found[phrasings] = Views(said._replace(nats=nats), said, habit)
    return found


@pytest.mark.parametrize("config", [{}, SMALL])
def test_where_nothing_is_known_alarms_are_as_rare_as_they_should_be(config: dict) -> None:
    worlds, draws = 8, 50
    alarms = dict.fromkeys(recall.PRIMARY, 0)
    for seed in range(worlds):
        world = planted.world(WorldConfig(planted=False, seed=seed, **config))
        subject = Changed(world, FAMILIES, lambda _, nats: nats)
        asked = [facts.ask(subject, world, family) for family in FAMILIES]
        rng = np.random.default_rng(seed)
        for _ in range(draws):
            said = [with_errors(rng, views) for views in asked]
            for f in recall._deciding(TRAINED, *said):
                alarms[f.family] += not f.at_chance
    together = 1 - 0.05 / len(alarms)  # 95% for all families at once
    low, high = stats.binom.interval(together, worlds * draws, 0.05)
    assert all(low <= count <= high for count in alarms.values()), alarms


def test_the_noisy_oracle_is_at_chance_where_nothing_is_known() -> None:
    world = planted.world(WorldConfig(planted=False, **SMALL))
    draws = [recall.primary(Oracle(world, 0.3, seed), world) for seed in range(12)]
    assert sum(not f.at_chance for found in draws for f in found) <= 7
    assert all(f.recovered == f.at_chance for found in draws for f in found)


def test_a_noisy_subject_covers_the_truth(full: World) -> None:
    draws = 400
    names = {
        ("contradicted", TRAINED, "log-odds of the value told more often, nat"): 0,
        ("contradicted", HELD_OUT, "log-odds of the value told more often, nat"): 0,
        ("absent", *recall.PRIMARY["absent"]): 0,
    }
    subject = Changed(full, FAMILIES, lambda _, nats: nats)
    told, two, none = (facts.ask(subject, full, family) for family in FAMILIES)
    rng = np.random.default_rng(0)
    for _ in range(draws):
        both, absent = with_errors(rng, two), with_errors(rng, none)
        findings = [*recall._contradicted(both), *recall._deciding(TRAINED, told, both, absent)]
        by_name = found(findings)
        for name in names:
            names[name] += by_name[name].recovered
    low, high = stats.binom.interval(0.95, draws, 0.95)
    assert all(low <= count <= high for count in names.values()), names
