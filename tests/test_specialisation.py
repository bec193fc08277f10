"""Specialisation: exact cases, plain loops, and nulls that know nothing from something."""

import math
import time
from collections import Counter
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity_lib import specialisation

TOKENS, EXPERTS, TOP_K = 4096, 256, 4
SEEDS = st.integers(0, 2**32 - 1)


def _choices(seed: int, tokens: int = TOKENS, experts: int = EXPERTS, top_k: int = TOP_K):
    keys = np.random.default_rng(seed).random((tokens, experts))
    return np.argsort(keys, axis=1)[:, :top_k]


def _ragged(seed: int):
    chosen = _choices(seed, 30, 7, 3)
    chosen[np.random.default_rng(seed).random(chosen.shape) < 0.2] = -1
    return chosen


def _sets(chosen):
    return [[int(e) for e in row if e >= 0] for row in chosen]


def _bits(measure):
    return lambda choices, labels: measure(choices, labels).bits


@given(SEEDS)
def test_against_loops(seed: int) -> None:
    chosen, end = _ragged(seed), _ragged(seed + 1)
    labels = np.random.default_rng(seed).integers(-1, 4, 30)
    labels[0] = 3
    common = sum(len(set(a) & set(b)) for a, b in zip(_sets(chosen), _sets(end), strict=True))
    final = sum(map(len, _sets(end)))
    assert specialisation.saturation(chosen, end) == pytest.approx(common / final)

    load = Counter(e for row in _sets(chosen) for e in row)
    pairs = Counter(pair for row in _sets(chosen) for pair in permutations(row, 2))
    found = specialisation.co_activation(chosen, 7)
    domain = specialisation.domain_specialisation(chosen, labels, 7)
    of_label = Counter(int(label) for label in labels)
    both = Counter(
        (e, int(d)) for row, d in zip(_sets(chosen), labels, strict=True) for e in row
    )
    for i in range(7):
        for j in range(7):
            assert found[i, j] == pytest.approx(pairs[i, j] / max(load[i], 1))
        for d in range(4):
            assert domain[i, d] == pytest.approx(both[i, d] / max(of_label[d], 1))

    frequent = [d for d in range(4) if of_label[d] >= 5]
    highest = [max(both[i, d] for i in range(7)) / of_label[d] for d in frequent]
    vocabulary = specialisation.vocabulary_specialisation(chosen, labels, 5)
    if frequent:
        assert vocabulary == pytest.approx(sum(highest) / len(highest))
    else:
        assert math.isnan(vocabulary)


@given(SEEDS)
def test_information_against_loops(seed: int) -> None:
    chosen = _ragged(seed)
    labels = np.random.default_rng(seed).integers(-1, 4, 30)
    slots = [
        (e, int(label))
        for row, label in zip(_sets(chosen), labels, strict=True)
        for e in row
        if label >= 0
    ]

    def bits(values):
        count = Counter(values).values()
        plain = -sum(n / len(values) * math.log2(n / len(values)) for n in count)
        return plain + (len(count) - 1) / (2 * len(values) * math.log(2))

    label_bits = bits([label for _, label in slots])
    expected = bits([e for e, _ in slots]) + label_bits - bits(slots)
    found = specialisation.information(chosen, labels)
    assert found.bits == pytest.approx(expected, abs=1e-9)
    assert found.label_bits == pytest.approx(label_bits)
    assert found.percent == pytest.approx(100 * expected / label_bits if label_bits else 0)
    order = np.random.default_rng(seed).permutation(30)
    again = specialisation.information(chosen[order], labels[order])
    assert again.bits == pytest.approx(found.bits, abs=1e-9)


def test_the_released_script_counts_neighbours_alone() -> None:
    chosen = _choices(0, 200, 9, 4)
    load = Counter(chosen.ravel().tolist())
    pairs: Counter = Counter()
    for row in chosen.tolist():
        for a, b in pairwise(row):
            pairs[a, b] += 1
            pairs[b, a] += 1
    found = specialisation.co_activation(chosen, 9, olmoe_compat=True)
    for i, j in np.ndindex(9, 9):
        assert found[i, j] == pytest.approx(pairs[i, j] / load[i])
    every = specialisation.co_activation(chosen, 9)
    assert every.sum(axis=1) == pytest.approx(np.full(9, 3))
    assert (every >= found).all() and found.sum() < every.sum()


def test_chance_gives_what_is_documented() -> None:
    chosen, domains = _choices(0), np.arange(TOKENS) % 4
    share = specialisation.uniform_share(EXPERTS, TOP_K)
    pair = specialisation.uniform_pair(EXPERTS, TOP_K)
    assert (share, pair) == (4 / 256, 3 / 255)
    assert specialisation.saturation(chosen, _choices(1)) == pytest.approx(share, abs=0.005)
    off = ~np.eye(EXPERTS, dtype=bool)
    every = specialisation.co_activation(chosen, EXPERTS)[off].mean()
    near = specialisation.co_activation(chosen, EXPERTS, olmoe_compat=True)[off].mean()
    assert every == pytest.approx(pair) and near == pytest.approx(2 / 4 * pair, rel=0.05)
    domain = specialisation.domain_specialisation(chosen, domains, EXPERTS)
    assert domain.shape == (EXPERTS, 4) and domain.sum(axis=0) == pytest.approx(4)
    assert domain.mean() == pytest.approx(share)
    # few labels: Miller-Madow leaves nothing; its standard error is 1.7e-3 bits here
    assert abs(specialisation.information(chosen, domains).bits) < 6e-3


def test_the_same_choices_are_saturated_whatever_their_order() -> None:
    chosen = _choices(0, 50)
    assert specialisation.saturation(chosen, chosen[:, ::-1]) == 1
    assert specialisation.saturation(chosen, np.full_like(chosen, -1)) == 0
    assert specialisation.saturation(np.full_like(chosen, -1), chosen) == 0


def test_experts_of_their_own_tell_the_label() -> None:
    labels = np.arange(4000) % 8
    own = labels[:, None] * 4 + np.arange(4)
    found = specialisation.information(own, labels)
    assert found.bits == pytest.approx(3, abs=0.01) and found.label_bits == pytest.approx(
        3, abs=0.01
    )
    assert found.percent == pytest.approx(100, abs=0.1)
    assert specialisation.vocabulary_specialisation(own, labels) == 1
    assert specialisation.information(own, np.zeros(4000, int)).percent == 0
    assert specialisation.information(own, np.full(4000, -1)) == (0, 0, 0)


def test_rare_ids_do_not_count() -> None:
    chosen, tokens = _choices(0, 30), np.r_[np.zeros(20, int), np.arange(1, 11)]
    highest = np.bincount(chosen[:20].ravel()).max() / 20
    assert specialisation.vocabulary_specialisation(chosen, tokens) == pytest.approx(highest)
    assert specialisation.vocabulary_specialisation(chosen, tokens, 1) > highest
    assert math.isnan(specialisation.vocabulary_specialisation(chosen, tokens, 21))


MEASURES = {  # and the number of labels
    "information": (_bits(specialisation.information), 500),
    "vocabulary": (specialisation.vocabulary_specialisation, 500),
    "domain": (lambda c, d: specialisation.domain_specialisation(c, d, EXPERTS).std(), 8),
}


@pytest.mark.parametrize(("measure", "count"), MEASURES.values(), ids=MEASURES)
def test_nulls_tell_nothing_from_something(measure, count: int) -> None:
    """Labels frequent and rare, as words are, and a fifth of the choices follow them."""
    generator = np.random.default_rng(7)
    for seed in range(3):
        labels = generator.zipf(1.3, TOKENS) % count
        nothing = specialisation.null(measure, _choices(seed), labels, 40, generator)
        assert abs(nothing.z) < 4
    chosen = _choices(9)
    follows = generator.random(TOKENS) < 0.2
    chosen[follows] = (labels[follows, None] * 4 + np.arange(4)) % EXPERTS
    planted = specialisation.null(measure, chosen, labels, 40, generator)
    assert planted.z > 10 and planted.value > planted.mean
    assert planted.z == pytest.approx((planted.value - planted.mean) / planted.deviation)


def test_nulls_keep_loads_and_come_from_the_generator() -> None:
    chosen, labels = _choices(0, 100), np.arange(100) % 5
    given: list = []

    def measure(choices, permuted):
        assert choices is chosen
        given.append(permuted)
        return float(permuted @ np.arange(100))

    first = specialisation.null(measure, chosen, labels, 5, np.random.default_rng(3))
    assert (given[0] == labels).all() and len(given) == 6
    assert all((np.bincount(each) == 20).all() for each in given)
    assert first == specialisation.null(measure, chosen, labels, 5, np.random.default_rng(3))
    flat = specialisation.null(lambda c, x: 0.1, chosen, labels, 5, np.random.default_rng(3))
    assert flat == (0.1, pytest.approx(0.1), pytest.approx(0), 0)


def test_nulls_are_fast() -> None:
    """A hundred draws in seconds; they take about 0.2 s."""
    chosen, generator = _choices(0), np.random.default_rng(0)
    labels = generator.zipf(1.3, TOKENS) % 500
    start = time.perf_counter()
    specialisation.null(MEASURES["information"][0], chosen, labels, 100, generator)
    assert time.perf_counter() - start < 2
