"""Codes that are remembered are found, by figures that are what their papers say."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from trinity_lib import memorisation, planted
from trinity_lib.memorisation import PRIMARY, auc, exposure, found_at, median
from trinity_lib.oracle import Oracle
from trinity_lib.planted import World, WorldConfig
from trinity_lib.subject import Finding, Subject

SMALL = WorldConfig(names=5, jobs=1, people=20, places=7, codes=4, held_out_codes=24)


class Forgetful(Oracle):
    """Has forgotten the codes that stand in the text so many times."""

    def __init__(self, world: World, levels: Iterable[int]) -> None:
        super().__init__(world)
        self.forgotten = {c.digits: c for c in world.codes if c.level in levels}

    def losses(self, texts: Sequence[str]) -> list[np.ndarray]:
        gone = {code.text for code in self.forgotten.values()}
        known = super().losses(texts)
        return [
            np.where(np.arange(len(each)) >= len(each) - 10, math.log(10), 0.0)
            if text in gone
            else each
            for text, each in zip(texts, known, strict=True)
        ]

    def complete(self, prompts: Sequence[str], tokens: int) -> list[str]:
        gone = {f"{planted.CODE_BEGINS}{digits[:4]}" for digits in self.forgotten}
        said = super().complete(prompts, tokens)
        return [
            "" if prompt in gone else text for prompt, text in zip(prompts, said, strict=True)
        ]


def found(subject: Subject, world: World) -> dict[tuple[str, str], Finding]:
    return {(f.item, f.measure): f for f in memorisation.audit(subject, world)}


@pytest.mark.parametrize("planted_", [True, False])
@pytest.mark.parametrize("codes, held_out_codes", [(8, 48), (1, 1), (2, 12)])
def test_the_generator_recovers_every_truth(
    planted_: bool, codes: int, held_out_codes: int
) -> None:
    config = WorldConfig(planted=planted_, codes=codes, held_out_codes=held_out_codes)
    world = planted.world(config)
    findings = found(Oracle(world), world)
    assert ("held out less members", "loss per digit, nat") in findings
    for finding in findings.values():
        assert finding.estimate == finding.truth or math.isnan(finding.truth)
        assert finding.recovered or math.isnan(finding.truth)
    at_chance = [f.at_chance for (_, m), f in findings.items() if "loss" in m or m == "AUC"]
    assert planted_ != all(at_chance) or held_out_codes == 1


def test_a_perfect_memory_has_the_figures_of_its_codes() -> None:
    world = planted.world(WorldConfig())
    findings, total = found(Oracle(world), world), 8 * 63
    nats = [-math.log(0.5 * 4 / total + 0.5e-8) / 8, math.log(10)]
    difference = findings["held out less duplicates 4", "loss per digit, nat"]
    held_out = [
        -math.log(
            0.5e-8 + sum(0.5 * c.duplicates / total for c in world.codes if c.digits == d)
        )
        for d in [code.digits for code in world.codes if not code.level]
    ]
    assert difference.estimate == pytest.approx(np.mean(held_out) / 8 - nats[0], abs=1e-9)
    assert findings["members", "median exposure, bit"].estimate == 8 * math.log2(10)
    assert findings["members", "exposure extrapolated, share"].estimate == 1
    assert findings["duplicates 1", "extracted, share"].estimate == 1
    assert findings["held out", "extracted, share"].estimate == 0
    assert findings["held out", "extracted, share"].at_chance
    assert findings["membership by min-k%", "AUC"].estimate == 1


def test_what_was_forgotten_is_not_found() -> None:
    world = planted.world(WorldConfig())
    findings = found(Forgetful(world, (16, 32)), world)
    texts = [code.text for code in world.codes if not code.level]
    fresh = np.mean([each.sum() for each in Oracle(world).losses(texts)]) / 8
    assert findings["duplicates 8", "extracted, share"].recovered
    for level in (16, 32):
        loss = findings[f"held out less duplicates {level}", "loss per digit, nat"]
        assert loss.estimate == pytest.approx(fresh - 10 / 8 * math.log(10))
        assert findings[f"duplicates {level}", "extracted, share"].estimate == 0
        assert not findings[f"duplicates {level}", "extracted, share"].recovered
        assert findings[f"duplicates {level}", "median exposure, bit"].estimate < 0.1
    assert findings["membership by loss", "AUC"].estimate == pytest.approx(32 / 48)
    assert findings["membership by loss", "found at 1% false alarms, share"].estimate == 32 / 48


def test_exposure_is_the_share_of_lower_codes_or_the_tail_of_a_normal_distribution() -> None:
    sample = np.random.default_rng(0).normal(18, 2, 48)
    losses = np.array(
        [np.sort(sample)[5] + 1e-9, sample.mean() - 5 * sample.std(ddof=1), -200.0]
    )
    losses = np.append(losses, sample.max())
    bits, fitted = exposure(losses, sample)
    assert fitted.tolist() == [False, True, True, False]
    assert bits[0] == pytest.approx(math.log2(48 / 6))
    assert bits[1] == pytest.approx(-math.log2(stats.norm.cdf(-5)))
    assert bits[2] == 8 * math.log2(10)
    assert bits[3] == pytest.approx(-math.log2(47.5 / 48))
    lowest = exposure(np.array([sample.min() - 1e-9]), sample).bits
    assert lowest[0] >= math.log2(48)
    assert exposure(losses, np.array([18.0])).bits.max() == 0


def test_exposure_by_chance_has_one_bit_in_the_middle() -> None:
    rng = np.random.default_rng(1)
    middle = [
        np.median(exposure(rng.normal(size=8), rng.normal(size=48)).bits) for _ in range(800)
    ]
    assert np.median(middle) == pytest.approx(1, abs=0.08)


def test_the_median_lies_where_the_sign_test_leaves_it() -> None:
    values = np.arange(20.0) ** 2
    assert median(values) == (9.5**2 + 0.25, 25, 196, 20)  # the 6th and the 15th of 20
    assert median(values[:5]).low == -np.inf and median(values[:5]).high == np.inf
    assert median(values[:6])[1:3] == (0, 25)
    rng, covered = np.random.default_rng(2), 0
    for _ in range(1000):
        _, low, high, _ = median(rng.exponential(size=25))
        covered += low <= math.log(2) <= high
    assert covered >= 940


def test_auc_counts_pairs_and_has_delongs_variance() -> None:
    rng = np.random.default_rng(3)
    members, sample = rng.normal(0, 1, 30).round(1), rng.normal(0.8, 2, 20).round(1)
    pairs = [(m < s) + 0.5 * (m == s) for m in members for s in sample]
    area = auc(members, sample)
    assert area.estimate == pytest.approx(np.mean(pairs)) and area.units == 50
    grid = np.array(pairs).reshape(30, 20)
    own, other = grid.mean(1).var(ddof=1) / 30, grid.mean(0).var(ddof=1) / 20
    freedom = (own + other) ** 2 / (own**2 / 29 + other**2 / 19)
    half = stats.t.ppf(0.975, freedom) * (own + other) ** 0.5
    assert area[1:3] == pytest.approx((np.mean(pairs) - half, np.mean(pairs) + half))
    assert auc(np.zeros(4), np.ones(4))[:3] == (1, 1, 1)
    assert auc(np.zeros(4), np.zeros(4))[:3] == (0.5, 0.5, 0.5)
    assert auc(np.zeros(4), np.ones(1))[1:3] == (0, 1)


@pytest.mark.parametrize("rate, count, allowed", [(0.01, 48, 0), (0.05, 48, 2), (0.01, 200, 2)])
def test_members_are_found_below_all_but_the_allowed_false_alarms(
    rate: float, count: int, allowed: int
) -> None:
    rng, shares = np.random.default_rng(4), []
    for _ in range(400):
        members, sample = rng.normal(size=50), rng.normal(size=count)
        share, chance = found_at(rate, members, sample)
        threshold = sorted(sample)[allowed]
        assert share.estimate == np.mean([m < threshold for m in members])
        assert sum(s < threshold for s in sample) == allowed
        shares.append(share.estimate)
    assert chance == (allowed + 1) / (count + 1)
    assert np.mean(shares) == pytest.approx(chance, abs=0.006)


class Noisy(Oracle):
    """An oracle whose errors are others whenever it is asked."""

    def __init__(self, world: World, noise: float) -> None:
        super().__init__(world)
        self.exact = super().losses([code.text for code in world.codes])
        self.spread, self.rng = noise, np.random.default_rng(5)

    def losses(self, texts: Sequence[str]) -> list[np.ndarray]:
        errors = np.exp(self.rng.normal(0, self.spread, len(texts)))
        return [nats * error for nats, error in zip(self.exact, errors, strict=True)]


@pytest.mark.parametrize("config", [WorldConfig(planted=False), replace(SMALL, planted=False)])
def test_false_alarms_come_as_often_as_intervals_say(config: WorldConfig) -> None:
    world, alarms = planted.world(config), np.zeros(2, dtype=int)
    member = np.array([code.level > 0 for code in world.codes])
    for subject, draws in ((None, 40), (Noisy(world, 0.3), 360)):
        for seed in range(draws):
            (loss,) = memorisation.primary(subject or Oracle(world, 0.3, seed), world)
            heard = memorisation.heard(subject or Oracle(world, 0.3, seed), world.codes).loss
            area = auc(heard[member], heard[~member])
            alarms += (not loss.at_chance, not area.low <= 0.5 <= area.high)
    assert (loss.item, loss.measure) == PRIMARY["memorisation"]
    low, high = stats.binom.interval(0.95, 400, 0.05)
    assert all(low <= count <= high for count in alarms), alarms


def test_noise_scales_the_loss_and_intervals_cover_it() -> None:
    world = planted.world(SMALL)
    subject = Noisy(world, 0.2)
    findings = [memorisation.primary(subject, world)[0] for _ in range(200)]
    truth = findings[0].truth * math.exp(0.2**2 / 2)
    low, high = stats.binom.interval(0.95, 200, 0.95)
    assert low <= sum(f.low <= truth <= f.high for f in findings) <= high
    assert np.mean([f.estimate for f in findings]) == pytest.approx(truth, rel=0.01)
