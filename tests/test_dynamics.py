"""Biases and routing over time: exact cases, plain loops, and what chance gives."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity_lib import dynamics

SEEDS = st.integers(0, 2**32 - 1)
WAVE = np.sin(2 * np.pi * np.arange(40) / 8)


def _scores(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def _top(row: np.ndarray, top_k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda expert: -row[expert])[:top_k])


def test_range_and_spread() -> None:
    bias = [[1.0, -1.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]]
    assert dynamics.bias_range(bias).tolist() == [4, 0]
    assert dynamics.bias_std(bias) == pytest.approx([math.sqrt(2), 0])


def test_a_line_does_not_oscillate() -> None:
    line = np.outer(np.arange(30), [0.5, -2.0, 0.0]) + [1, 2, 3]
    assert dynamics.oscillation(line, 20) == pytest.approx(0, abs=1e-12)
    assert math.isnan(dynamics.dominant_period(line, 20))
    assert math.isnan(dynamics.dominant_period(line[:1], 20))
    assert dynamics.sign_flip_rate(line, 20) == 0
    assert dynamics.oscillation(line[:1], 20) == dynamics.sign_flip_rate(line[:2], 9) == 0


def test_oscillation_against_polyfit() -> None:
    bias = np.random.default_rng(0).normal(size=(2, 50, 3)).cumsum(axis=1)
    found, time = dynamics.oscillation(bias, 16), np.arange(16)
    for layer in range(2):
        spread = []
        for expert in range(3):
            late = bias[layer, -16:, expert]
            residual = late - np.polyval(np.polyfit(time, late, 1), time)
            spread.append(math.sqrt(sum(r * r for r in residual) / 16))
        assert found[layer] == pytest.approx(sum(spread) / 3)


def test_a_wave_is_measured_and_dated() -> None:
    wave = np.stack([WAVE, -WAVE, 0 * WAVE, 0 * WAVE], axis=1)
    drift = wave + 0.1 * np.arange(40)[:, None]
    for bias in (wave, drift):
        assert dynamics.dominant_period(bias, 40) == 8
        assert dynamics.oscillation(bias, 40) == pytest.approx(math.sqrt(0.5) / 2, rel=0.02)
    both = np.stack([wave, np.zeros_like(wave)])
    np.testing.assert_array_equal(dynamics.dominant_period(both, 40), [8, np.nan])


def test_flips_are_counted_where_a_bias_moves() -> None:
    relay = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 2.0], [0.0, 2.0]])
    # the first expert turns 3 times of 3; the second moves twice in a row, without a turn
    assert dynamics.sign_flip_rate(relay, 5) == pytest.approx(3 / 4)
    assert dynamics.sign_flip_rate(relay, 3) == pytest.approx(1)


def test_a_random_walk_gives_what_chance_does() -> None:
    steps = np.random.default_rng(0).choice([-1.0, 1.0], size=(200, 2000))
    walk = 1e-3 * steps.cumsum(axis=0)
    # the mean of roots is a little under the root of the mean
    assert dynamics.oscillation(walk, 100) == pytest.approx(1e-3 * (100 / 15) ** 0.5, rel=0.07)
    assert dynamics.sign_flip_rate(walk, 100) == pytest.approx(0.5, abs=0.005)
    assert dynamics.dominant_period(walk, 100) >= 50


@given(SEEDS, st.integers(1, 6))
def test_overrides_and_their_price_against_loops(seed: int, top_k: int) -> None:
    scores, bias = _scores(seed, 2, 5, 6), _scores(seed + 1, 2, 6)
    override = dynamics.override_fraction(scores, bias, top_k)
    price = dynamics.score_price(scores, bias, top_k)
    for layer in range(2):
        new, paid, best = 0, 0.0, 0.0
        for row in scores[layer]:
            chosen, free = _top(row + bias[layer], top_k), _top(row, top_k)
            new += len(chosen - free)
            paid += sum(float(row[expert]) for expert in chosen)
            best += sum(float(row[expert]) for expert in free)
        assert override[layer] == pytest.approx(new / (5 * top_k))
        assert price[layer] == pytest.approx(paid / best)
        assert 0 <= override[layer] <= 1 and 0 <= price[layer] <= 1 + 1e-6


def test_no_bias_overrides_nothing_and_a_large_one_everything() -> None:
    scores = _scores(0, 500, 16)
    assert dynamics.override_fraction(scores, np.zeros(16, "f4"), 4) == 0
    assert dynamics.score_price(scores, np.zeros(16, "f4"), 4) == 1
    assert dynamics.score_price(np.zeros((3, 4)), np.ones(4), 2) == 1
    fixed = np.r_[np.full(4, 9), np.zeros(12)]
    assert dynamics.override_fraction(scores, fixed, 4) == pytest.approx(1 - 4 / 16, abs=0.03)
    mean_of_best = np.sort(scores, axis=1)[:, -4:].mean()
    price = dynamics.score_price(scores, fixed, 4)
    assert price == pytest.approx(scores.mean() / mean_of_best, abs=0.03)


@given(SEEDS, st.integers(1, 6))
def test_churn_against_loops(seed: int, top_k: int) -> None:
    before, after = _scores(seed, 2, 5, 6), _scores(seed + 1, 2, 5, 6)
    old, new = _scores(seed + 2, 2, 6), _scores(seed + 3, 2, 6)
    found = dynamics.churn(before, old, after, new, top_k)
    for layer in range(2):

        def differ(a, b, c, d, layer=layer):
            sets = [
                (_top(one + b[layer], top_k), _top(other + d[layer], top_k))
                for one, other in zip(a[layer], c[layer], strict=True)
            ]
            return sum(len(x - y) for x, y in sets) / (5 * top_k)

        total = differ(before, old, after, new)
        by_weights = differ(before, old, after, old) + differ(before, new, after, new)
        by_bias = differ(after, old, after, new) + differ(before, old, before, new)
        assert found.total[layer] == pytest.approx(total)
        assert found.by_weights[layer] == pytest.approx(by_weights / 2)
        assert found.by_bias[layer] == pytest.approx(by_bias / 2)
        assert found.undone[layer] == pytest.approx((by_weights + by_bias) / 2 - total)
        assert found.undone[layer] >= -1e-9
    back = dynamics.churn(after, new, before, old, top_k)  # the way back is as long
    np.testing.assert_allclose(back, found, atol=1e-12)


def test_churn_of_one_cause_is_all_its_own() -> None:
    before, after = _scores(0, 300, 32), _scores(1, 300, 32)
    old, new = _scores(2, 32), _scores(3, 32)
    bias = dynamics.churn(before, old, before, new, 4)
    assert bias.by_weights == 0 and bias.by_bias == bias.total > 0 and bias.undone == 0
    weights = dynamics.churn(before, old, after, old, 4)
    assert weights.by_bias == 0 and weights.by_weights == weights.total > 0
    assert dynamics.churn(before, old, before, old, 4) == (0, 0, 0, 0)
    chance = dynamics.churn(before, 0 * old, after, 0 * old, 4)
    assert chance.total == pytest.approx(1 - 4 / 32, abs=0.03)


def test_a_bias_that_undoes_the_weights_is_told_apart() -> None:
    before, after = np.array([[0.75, 0.5]]), np.array([[0.5, 0.75]])
    found = dynamics.churn(before, np.zeros(2), after, np.array([0.5, 0.0]), 1)
    assert found == (0, 0.5, 0.5, 1)


def test_entropy_and_information_of_exact_scores() -> None:
    even, sure = np.full((8, 4), 0.3), np.tile(np.eye(4), (2, 1))
    assert dynamics.router_entropy(even) == pytest.approx(1)
    assert dynamics.mutual_information(even) == pytest.approx(0)
    assert dynamics.router_entropy(sure) == pytest.approx(0)
    assert dynamics.mutual_information(sure) == pytest.approx(2)
    same = np.tile([0.5, 0.25, 0.25, 0.0], (8, 1))
    assert dynamics.router_entropy(same) == pytest.approx(0.75)
    assert dynamics.mutual_information(same) == pytest.approx(0)
    assert dynamics.router_entropy(np.zeros((2, 4))) == pytest.approx(1)
    assert dynamics.router_entropy(np.ones((2, 1))) == 0


@given(SEEDS)
def test_entropy_and_information_against_loops(seed: int) -> None:
    scores = _scores(seed, 2, 6, 5)
    entropy, shared = dynamics.router_entropy(scores), dynamics.mutual_information(scores)

    def bits(shares):
        return -sum(share * math.log2(share) for share in shares if share > 0)

    for layer in range(2):
        shares = [[float(s) / math.fsum(map(float, row)) for s in row] for row in scores[layer]]
        each = sum(map(bits, shares)) / 6
        mean = [sum(column) / 6 for column in zip(*shares, strict=True)]
        assert entropy[layer] == pytest.approx(each / math.log2(5))
        assert shared[layer] == pytest.approx(bits(mean) - each, abs=1e-9)
        assert -1e-9 <= shared[layer] <= math.log2(5)
    order = np.random.default_rng(seed).permutation(6)
    np.testing.assert_allclose(dynamics.mutual_information(scores[:, order]), shared, atol=1e-9)
