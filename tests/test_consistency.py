"""Answers that agree are told from favourite answers, and from noise."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from trinity_lib import consistency, planted
from trinity_lib.consistency import FAMILY, PRIMARY, agreement, first, share
from trinity_lib.oracle import Oracle
from trinity_lib.planted import World, WorldConfig
from trinity_lib.subject import Finding

SMALL = WorldConfig(names=2, held_out_names=2, jobs=1, people=9, places=7, codes=2)


class Answering:
    """Says an answer drawn once, or once for each thing asked about, or for each prompt."""

    def __init__(self, world: World, family: str, rule: str) -> None:
        asked = planted.questions(world, family)
        things = {q.cluster: n for n, q in enumerate(asked)}
        places = np.random.default_rng(0).integers(0, 12, len(asked))
        self.place = {
            q.prompt: places[{"one": 3, "thing": things[q.cluster], "prompt": n}[rule]]
            for n, q in enumerate(asked)
        }

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        return [
            np.where(np.arange(len(a)) == self.place.get(p, 0), 0.0, -30.0)
            for p, a in zip(prompts, answers, strict=True)
        ]

    def complete(self, prompts: Sequence[str], tokens: int) -> list[str]:
        raise NotImplementedError

    def losses(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def full() -> World:
    return planted.world(WorldConfig())


def items(findings: Sequence[Finding]) -> dict[str, Finding]:
    return {finding.item: finding for finding in findings}


def test_the_generator_agrees_with_itself(full: World) -> None:
    found = items(consistency.audit(Oracle(full), full))
    assert all(finding.recovered for finding in found.values())
    for item in ("facts, trained phrasings", "facts, a held-out phrasing"):
        assert found[item].estimate == 1 and found[item].units == 60
        assert found[item].chance < 0.2
    jobs = found["association, a held-out phrasing"]  # two jobs are a group's likeliest
    assert jobs.estimate == 0.5 and jobs.units == 44
    assert jobs.chance == pytest.approx((21 * 0.5 + 22 * 0) / 43)


def test_where_nothing_is_planted_no_answers_agree_beyond_chance() -> None:
    null = planted.world(WorldConfig(planted=False))
    found = items(consistency.audit(Oracle(null), null))
    assert all(f.recovered and f.at_chance for f in found.values())
    assert found["facts"].estimate == pytest.approx(0, abs=1e-12)
    assert found["association, trained phrasings"].estimate == pytest.approx(1 / 14)


@pytest.mark.parametrize("rule, share", [("one", 1.0), ("thing", 1.0), ("prompt", 1 / 12)])
def test_a_favourite_answer_is_no_agreement(full: World, rule: str, share: float) -> None:
    found = items(consistency.audit(Answering(full, "facts", rule), full))
    agrees, decides = found["facts, trained phrasings"], found["facts"]
    assert agrees.estimate == pytest.approx(share, abs=0.03)
    assert agrees.at_chance == (rule != "thing")
    assert (decides.estimate > 0.8) == (rule == "thing")
    assert abs(decides.estimate) < 0.05 or rule == "thing"


def test_agreement_counts_pairs_of_phrasings_and_pairs_of_things() -> None:
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, (7, 4))
    pairs = [(0, 1), (0, 3), (2, 3)]
    found = agreement(np.eye(3)[answers], pairs)
    own = [[answers[i, a] == answers[i, b] for a, b in pairs] for i in range(7)]
    chance = [
        np.mean([answers[i, a] == answers[j, b] for a, b in pairs for j in range(7) if j != i])
        for i in range(7)
    ]
    assert found.own == pytest.approx(np.mean(own, axis=1))
    assert found.chance == pytest.approx(np.array(chance))


def test_the_first_answer_is_parted_where_several_are_as_likely() -> None:
    nats = np.log([[0.4, 0.4 + 1e-12, 0.2], [0.1, 0.2, 0.7]])
    assert first(nats).tolist() == [[0.5, 0.5, 0], [0, 0, 1]]
    half = agreement(first(nats[:1].repeat(2, 0))[None].repeat(2, 0), [(0, 1)])
    assert half.own.tolist() == half.chance.tolist() == [0.5, 0.5]


def test_a_share_is_exact_where_every_cluster_is_a_trial() -> None:
    exact = stats.binomtest(3, 4).proportion_ci(0.95, "exact")
    found = share([1, 1, 1, 1, 0], list("aabcd"))
    assert found == pytest.approx((0.75, exact.low, exact.high, 4))
    assert share([1, 0, 1, 1, 0], list("aabcd")).estimate == 0.625


@pytest.mark.parametrize("config, draws", [(WorldConfig(), 200), (SMALL, 400)])
def test_false_alarms_come_as_often_as_intervals_say(config: WorldConfig, draws: int) -> None:
    world, alarms = planted.world(replace(config, planted=False)), 0
    for seed in range(draws):
        (found,) = consistency.primary(Oracle(world, 0.3, seed), world)
        alarms += not found.at_chance
    assert (found.family, found.item, found.measure) == (FAMILY, *PRIMARY[FAMILY])
    low, high = stats.binom.interval(0.95, draws, 0.05)
    assert low <= alarms <= high


def test_intervals_cover_what_noise_does_not_move(full: World) -> None:
    for seed in range(10):
        found = items(consistency.audit(Oracle(full, 0.3, seed), full))
        for item in ("facts", "facts, trained phrasings", "facts, a held-out phrasing"):
            assert found[item].recovered
        assert found["association, trained phrasings"].estimate < 0.5  # as the module says
