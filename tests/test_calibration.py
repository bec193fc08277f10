"""Calibration: scores by hand, subjects too sure or too timid, alarms without an effect."""

from random import Random

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize_scalar

from tests.answering import Changed, noisy
from trinity_lib import calibration, planted
from trinity_lib.answers import HELD_OUT, TRAINED
from trinity_lib.calibration import Answered, Views, decomposition, ece, fit_temperature
from trinity_lib.config import BadValue
from trinity_lib.oracle import Oracle
from trinity_lib.planted import World, WorldConfig
from trinity_lib.planted_questions import Asked
from trinity_lib.subject import Finding

ASKED = ("frequencies",)
SMALL = {"people": 9, "places": 7, "names": 4, "codes": 2}


@pytest.fixture(scope="module")
def full() -> World:
    return planted.world(WorldConfig())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "DRAWS", 19)


def found(findings: list[Finding]) -> dict[tuple[str, str], Finding]:
    known = {(f.item, f.measure): f for f in findings}
    assert len(known) == len(findings)
    return known


def tempered(world: World, by: float) -> Changed:
    return Changed(world, ASKED, lambda _, nats: by * nats)


def test_the_calibration_error_is_of_bins_of_equal_mass() -> None:
    confidence = [0.9, 0.6, 0.5, 0.8, 0.7, 0.95]
    correct = [1, 0, 1, 1, 0, 1]
    # bins of (0.5, 0.6), (0.7, 0.8), (0.9, 0.95)
    assert ece(confidence, correct, 3) == pytest.approx((0.05 + 0.25 + 0.075) / 3)
    assert ece(confidence, correct, 1) == pytest.approx(abs(4.45 - 4) / 6)
    every = np.abs(np.subtract(confidence, correct)).mean()
    assert ece(confidence, correct) == pytest.approx(every)
    assert ece([0.3, 0.7], [0.3, 0.7]) == 0


def test_rows_that_say_the_same_share_a_bin_whatever_their_order() -> None:
    confidence = np.repeat([0.2, 0.5, 0.8], [5, 9, 4])
    correct = np.arange(18) % 3 == 0
    order = np.random.default_rng(0).permutation(18)
    shuffled = ece(confidence[order] + 1e-15 * order, correct[order], 4)
    by_hand = sum(
        n * abs(c - correct[confidence == c].mean())
        for n, c in zip((5, 9, 4), (0.2, 0.5, 0.8), strict=True)
    )
    assert ece(confidence, correct, 4) == pytest.approx(by_hand / 18)
    assert shuffled == pytest.approx(by_hand / 18)


def test_scores_refuse_what_does_not_fit() -> None:
    for said, right in (([0.5], [1, 0]), ([], [])):
        with pytest.raises(BadValue, match="outcomes is"):
            ece(said, right)
    with pytest.raises(BadValue, match="bins is 0"):
        ece([0.5], [1], 0)
    with pytest.raises(BadValue, match="at most 2"):
        calibration.squared_error([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], 4)


def test_of_outcomes_drawn_the_squared_error_has_no_bias_and_the_plain_one_has() -> None:
    rng = np.random.default_rng(1)
    confidence = np.repeat(np.linspace(0.05, 0.95, 15), 8)
    draws = rng.random((400, len(confidence)))
    for shift in (0.0, 0.05):
        right = np.clip(confidence - shift, 0, 1)
        outcomes = draws < right
        squared = [calibration.squared_error(confidence, each) for each in outcomes]
        error = np.std(squared) / 20
        assert abs(np.mean(squared) - shift**2) < 3 * error
    assert np.mean([ece(confidence, each) for each in draws < confidence]) > 0.05
    assert ece(confidence, confidence) == 0


def test_proper_scores_by_hand() -> None:
    said, true = np.array([0.8, 0.2]), np.array([0.5, 0.5])
    assert calibration.brier(said, true) == pytest.approx(2 * (0.09 + 0.25))
    assert calibration.brier(said, [1, 0]) == pytest.approx(0.08)
    nats = np.log(said)
    assert calibration.nll(nats, true) == pytest.approx(-np.log(0.16) / 2)
    assert calibration.nll(nats, [0, 1]) == pytest.approx(-np.log(0.2))
    known = stats.entropy([0.5, 0.5], said)
    assert calibration.divergence(nats, true) == pytest.approx(known)
    padded = np.array([*nats, -np.inf])
    assert calibration.divergence(padded, [*true, 0]) == pytest.approx(known)


def test_parts_of_a_score_add_up() -> None:
    rng = np.random.default_rng(2)
    forecast = rng.integers(1, 9, 300) / 10
    outcome = rng.random(300) < forecast**2
    parts = decomposition(forecast, outcome)
    score = np.mean((forecast - outcome) ** 2)
    assert parts.reliability - parts.resolution + parts.uncertainty == pytest.approx(score)
    base = outcome.mean()
    assert parts.uncertainty == pytest.approx(base * (1 - base))
    assert decomposition([0.3] * 4, [0, 0, 0, 1]) == pytest.approx((0.05**2, 0, 3 / 16))


def test_the_best_temperature_is_the_least_loss() -> None:
    rng = np.random.default_rng(3)
    nats = np.log(rng.dirichlet([1, 1, 1, 1], 60))
    right = np.eye(4)[[rng.choice(4, p=np.exp(row)) for row in nats]]

    def loss(temperature: float) -> float:
        scaled = nats / temperature
        scaled = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
        return float(calibration.nll(scaled, right).sum())

    known = minimize_scalar(loss, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(nats, right) == pytest.approx(known.x, rel=1e-5)
    for by in (0.2, 1, 2, 30):
        assert fit_temperature(by * nats, np.exp(nats)) == pytest.approx(by)
    assert fit_temperature(-nats, np.exp(nats)) == np.inf
    assert fit_temperature(nats, np.full((60, 4), 0.25)) == np.inf
    assert np.isnan(fit_temperature(np.zeros((3, 2)), np.full((3, 2), 0.5)))
    assert fit_temperature([[-1.0, -2.0]], [[1, 0]]) < 0.01
    padded = np.pad(2 * nats, ((0, 0), (0, 1)), constant_values=-np.inf)
    truth = np.pad(np.exp(nats), ((0, 0), (0, 1)))
    assert fit_temperature(padded, truth) == pytest.approx(2)


@pytest.mark.parametrize("config", [{}, {"planted": False}, SMALL])
@pytest.mark.usefixtures("quick")
def test_the_generator_recovers_every_truth(config: dict) -> None:
    world = planted.world(WorldConfig(**config))
    findings = calibration.audit(Oracle(world), world)
    assert all(f.recovered for f in findings if not np.isnan(f.truth))
    deciding = found(findings)[calibration.PRIMARY["calibration"]]
    assert [deciding] == calibration.primary(Oracle(world), world)
    by_name = found(findings)
    if config.get("planted", True):
        assert not deciding.at_chance and not any(np.isnan(f.truth) for f in findings)
        assert by_name[TRAINED, "best temperature"].truth == pytest.approx(1)
        slope = by_name[f"coin, {HELD_OUT}", "slope of log-odds on the true"]
        assert slope.truth == pytest.approx(1)
    else:
        assert deciding.at_chance and deciding.truth == pytest.approx(0)
        nothing = {f.measure for f in findings if np.isnan(f.truth)}
        assert nothing == {
            "best temperature", "slope of log-odds on the true", "correlation of frequencies",
        }  # fmt: skip


def test_the_truth_by_hand(full: World) -> None:
    by_name = found(calibration.audit(Oracle(full), full))
    true = [np.array(thing.probabilities) for thing in full.things]
    score = by_name[TRAINED, "Brier score"].truth
    assert score == pytest.approx(np.mean([(q * (1 - q)).sum() for q in true]))
    loss = by_name[TRAINED, "negative log-likelihood, nat"].truth
    assert loss == pytest.approx(np.mean([stats.entropy(q) for q in true]))
    coins = np.array([t.probabilities for t in full.things if t.kind == "coin"])
    lamps = np.array([t.probabilities for t in full.things if t.kind == "lamp"])
    spread = [
        np.trace(np.cov((np.log(q) - np.log(q).mean(1, keepdims=True)).T)) / q.shape[1]
        for q in (coins, lamps)
    ]
    deciding = by_name[calibration.PRIMARY["calibration"]]
    assert deciding.truth == pytest.approx(np.mean(spread))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("by", [0.5, 2.0])
def test_a_subject_too_sure_or_too_timid_is_mended_by_its_temperature(
    full: World, by: float
) -> None:
    by_name = found(calibration.audit(tempered(full, by), full))
    exact = found(calibration.audit(Oracle(full), full))
    for phrasings in (TRAINED, HELD_OUT):
        fitted = by_name[phrasings, "best temperature"]
        assert fitted.estimate == pytest.approx(by) and not fitted.recovered
        for kind in ("coin", "lamp"):
            slope = by_name[f"{kind}, {phrasings}", "slope of log-odds on the true"]
            assert slope.estimate == pytest.approx(by) and not slope.recovered
            assert by_name[f"{kind}, {phrasings}", "correlation of frequencies"].low > 0.8
        for measure in ("expected calibration error", "reliability"):
            off = by_name[phrasings, measure]
            assert off.low > off.truth + 1e-3
        for measure in ("Brier score", "negative log-likelihood, nat"):
            assert by_name[phrasings, measure].estimate > exact[phrasings, measure].estimate
    deciding = calibration.PRIMARY["calibration"]
    assert by_name[deciding].estimate == pytest.approx(by**2 * exact[deciding].estimate)


@pytest.mark.usefixtures("quick")
def test_a_subject_with_one_answer_for_all_places_is_at_chance(full: World) -> None:
    def mean(each: Asked, nats: np.ndarray) -> np.ndarray:
        kind = [t.probabilities for t in full.things if t.kind == each.about.kind]
        return np.log(np.mean(kind, axis=0))

    for f in calibration.audit(Changed(full, ASKED, mean), full):
        if f.measure == "correlation of frequencies":
            assert np.isnan(f.estimate)
        assert f.at_chance or np.isnan(f.chance)
        if f.measure in ("expected calibration error", "reliability"):
            assert f.recovered


def test_places_told_apart_in_trained_phrasings_alone(full: World) -> None:
    def memorises(each: Asked, nats: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(Random(each.question.prompt).randrange(2**32))
        held_out = each.question.template.startswith("held-out")
        return noise.normal(0, 0.5, len(nats)) if held_out else nats

    measure = calibration.PRIMARY["calibration"][1]
    by_name = found(calibration.audit(Changed(full, ASKED, memorises), full))
    assert by_name[TRAINED, measure].recovered
    assert by_name[HELD_OUT, measure].at_chance
    assert by_name[f"{TRAINED} with held-out", measure].at_chance


def with_errors(rng: np.random.Generator, asked: dict[str, Views]) -> dict[str, Views]:
    """The generator's answers as a noisy oracle gives them."""
    found = {}
    for phrasings, (_, said, habit) in asked.items():
        nats = said.nats + rng.normal(0, 0.3, said.nats.shape)
        nats = nats - np.logaddexp.reduce(nats, axis=-1, keepdims=True)
        found[phrasings] = Views(Answered(nats, *said[1:]), said, habit)
    return found


@pytest.mark.parametrize("config", [{}, SMALL])
def test_where_places_do_not_differ_alarms_are_as_rare_as_they_should_be(config: dict) -> None:
    draws = 400
    world = planted.world(WorldConfig(planted=False, **config))
    asked = calibration._asked(Changed(world, ASKED, lambda _, nats: nats), world)
    rng = np.random.default_rng(0)
    alarms = dict.fromkeys((TRAINED, HELD_OUT, f"{TRAINED} with held-out"), 0)
    for _ in range(draws):
        for f in calibration._deciding(with_errors(rng, asked)):
            alarms[f.item] += not f.at_chance
    low, high = stats.binom.interval(0.95, draws, 0.05)
    assert all(low <= count <= high for count in alarms.values()), alarms


def test_slopes_and_covariances_cover_their_truth(full: World) -> None:
    draws = 400
    asked = calibration._asked(Changed(full, ASKED, lambda _, nats: nats), full)
    rng = np.random.default_rng(0)
    covered = {"coin": 0, "lamp": 0, "covariance": 0}
    for _ in range(draws):
        noisy_views = with_errors(rng, asked)
        for kind in ("coin", "lamp"):
            slope = calibration._slope(calibration._only(noisy_views[TRAINED].subject, kind), 1)
            covered[kind] += slope.low <= 1 <= slope.high
        covered["covariance"] += next(calibration._deciding(noisy_views)).recovered
    low, high = stats.binom.interval(0.95, draws, 0.95)
    assert low <= covered["coin"] <= high and low <= covered["lamp"] <= high
    assert covered["covariance"] >= low


def test_the_noisy_oracle_too() -> None:
    world = planted.world(WorldConfig(planted=False, **SMALL))
    alarms = [
        not f.at_chance
        for seed in range(40)
        for f in calibration.primary(Oracle(world, 0.3, seed), world)
    ]
    assert len(alarms) == 40 and sum(alarms) <= 6


def test_draws_of_the_bootstrap_are_the_seeds_own(full: World) -> None:
    subject = Changed(full, ASKED, noisy(1))
    drawn = [str(calibration.audit(subject, full, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
