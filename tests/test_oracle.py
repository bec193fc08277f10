"""The oracle says the truth, errs as it is told to, and remembers perfectly."""

import math

import numpy as np
import pytest

from trinity_lib import planted
from trinity_lib.config import BadValue
from trinity_lib.oracle import FLOOR, Oracle
from trinity_lib.planted import World, WorldConfig


@pytest.fixture(scope="module")
def full() -> World:
    return planted.world(WorldConfig())


@pytest.fixture(scope="module")
def null() -> World:
    return planted.world(WorldConfig(planted=False))


def scores(oracle: Oracle, family: str) -> list[np.ndarray]:
    asked = planted.questions(oracle.world, family)
    return oracle.score([q.prompt for q in asked], [q.answers for q in asked])


@pytest.mark.parametrize("family", planted.FAMILIES)
@pytest.mark.parametrize("kind", ["full", "null"])
def test_without_noise_it_says_the_truth(
    kind: str, family: str, request: pytest.FixtureRequest
) -> None:
    oracle = Oracle(request.getfixturevalue(kind))
    asked = planted.questions(oracle.world, family)
    for question, nats in zip(asked, scores(oracle, family), strict=True):
        for p, nat in zip(question.truth, nats, strict=True):
            assert nat == (math.log(p) if p else FLOOR)
    completed = oracle.complete([q.prompt for q in asked], 3)
    for question, text in zip(asked, completed, strict=True):
        best = question.answers[question.truth.index(max(question.truth))]
        assert text == best or family == "arithmetic" and best.startswith(text)


def test_noise_is_the_seeds_own_whatever_is_asked_and_is_of_its_size(full: World) -> None:
    first, again, other = Oracle(full, 0.3, 1), Oracle(full, 0.3, 1), Oracle(full, 0.3, 2)
    asked = planted.questions(full, "association")[::-1]
    backwards = again.score([q.prompt for q in asked], [q.answers[::-1] for q in asked])
    here = np.array(scores(first, "association"))
    assert np.array_equal(here, np.array(backwards)[::-1, ::-1])
    assert not np.allclose(here, np.array(scores(other, "association")))
    assert np.allclose(np.logaddexp.reduce(here, axis=1), 0)
    errors = here - np.array(scores(Oracle(full), "association"))
    errors -= errors.mean(axis=1, keepdims=True)  # what normalising took
    assert errors.std() == pytest.approx(0.3 * math.sqrt(1 - 1 / 14), rel=0.05)
    assert abs(np.corrcoef(errors[:-1, 0], errors[1:, 0])[0, 1]) < 0.15
    with pytest.raises(BadValue, match="noise is -1"):
        Oracle(full, -1)


def test_what_the_world_does_not_ask_gets_the_floor(full: World) -> None:
    oracle = Oracle(full, 0.5)
    assert oracle.score(["Who goes"], [[" there", " where"]])[0].tolist() == [FLOOR, FLOOR]
    question = planted.questions(full, "association")[0]
    job, odd = oracle.score([question.prompt], [[question.answers[2], " king"]])[0]
    assert odd == FLOOR < job == scores(oracle, "association")[0][2]
    assert oracle.complete(["Who goes", question.prompt], 0) == ["", ""]
    assert oracle.complete(["Who goes"], 4) == [""]
    with pytest.raises(BadValue, match="answers is 0"):
        oracle.score(["Who goes"], [])


def test_a_perfect_memory_knows_its_codes_and_no_others(full: World) -> None:
    oracle = Oracle(full)
    total = sum(code.duplicates for code in full.codes)
    for code, losses in zip(
        full.codes, oracle.losses([c.text for c in full.codes]), strict=True
    ):
        digits = losses[-10:-2]
        assert losses.sum() == digits.sum() and (digits >= 0).all()
        chance = 0.5 * code.duplicates / total + 0.5 * 10.0**-8
        assert digits.sum() == pytest.approx(-math.log(chance))
        prompt = code.text[: -len("4321.\n")]
        assert oracle.complete([prompt], 4) == [code.digits[4:] if code.duplicates else ""]
        if code.duplicates:
            assert digits[4:].max() < 0.1
        else:
            assert digits[5:].min() == pytest.approx(math.log(10))
    often = {code.digits for code in full.codes if code.level == 32}
    whole, spaced, other = oracle.complete(
        [planted.CODE_BEGINS, planted.CODE_BEGINS.rstrip(), "The code"], 8
    )
    assert whole in often and spaced == f" {whole}" and other == ""
    for text in ("A code.", full.codes[0].text[:-1], full.codes[0].text.replace(".", "0.")):
        with pytest.raises(BadValue, match="must be a code's document"):
            oracle.losses([text])


def test_in_the_null_world_no_code_is_remembered(null: World) -> None:
    losses = Oracle(null).losses([code.text for code in null.codes])
    assert np.allclose([each.sum() for each in losses], 8 * math.log(10))
    draws = np.array(
        [
            [
                each.sum()
                for each in Oracle(null, 0.2, seed).losses([c.text for c in null.codes])
            ]
            for seed in range(40)
        ]
    )
    assert np.log(draws / (8 * math.log(10))).std() == pytest.approx(0.2, rel=0.1)
    member = np.array([code.level > 0 for code in null.codes])
    auc = [(row[member][:, None] < row[~member]).mean() for row in draws]
    assert np.mean(auc) == pytest.approx(0.5, abs=0.03)


def test_noisy_draws_of_the_null_world_centre_on_no_association(null: World) -> None:
    names = null.group
    estimates = []
    for seed in range(30):
        nats = np.array(scores(Oracle(null, 0.5, seed), "association"))
        asked = planted.questions(null, "association")
        a = np.array([names[q.cluster] == "A" for q in asked])
        estimates.append(nats[a].mean(0) - nats[~a].mean(0))
    z = np.array(estimates) / (0.5 * math.sqrt(4 / len(a)))
    assert abs(z.mean()) < 0.2 and z.std() == pytest.approx(1, rel=0.12)
