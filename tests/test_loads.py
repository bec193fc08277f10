"""Measures of loads at exact vectors, against loops, and at what chance gives."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity_lib import loads

LOAD = np.array([4, 3, 1, 8])


def test_exact_vectors() -> None:
    assert loads.max_vio(LOAD) == 1.0
    assert loads.min_vio(LOAD) == 0.75
    entropy = -sum(n / 16 * math.log(n / 16) for n in LOAD)
    assert loads.load_entropy(LOAD) == pytest.approx(entropy)
    assert loads.effective_experts(LOAD) == pytest.approx(math.exp(entropy))
    assert loads.cv(LOAD) == pytest.approx(math.sqrt(26 / 4) / 4)
    assert loads.gini(LOAD) == pytest.approx(22 / 64)
    assert loads.gini(np.array([0, 0, 0, 5])) == 0.75
    assert loads.dead_fraction(np.array([1000, 1000, 6, 0])) == 0.25 + 0.0
    assert loads.dead_fraction(np.array([1000, 1000, 4, 0])) == 0.5


def test_even_loads_and_no_loads() -> None:
    even, none = np.full((2, 8), 7), np.zeros((2, 8))
    for load in (even, none):
        assert loads.max_vio(load).tolist() == [0, 0]
        assert loads.min_vio(load).tolist() == [0, 0]
        assert loads.cv(load).tolist() == loads.gini(load).tolist() == [0, 0]
        assert loads.dead_fraction(load).tolist() == [0, 0]
    assert loads.effective_experts(even) == pytest.approx([8, 8])
    assert loads.load_entropy(none).tolist() == [0, 0]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_bounds(counts: list[int]) -> None:
    load, experts = np.array(counts), len(counts)
    assert -1e-9 <= loads.max_vio(load) <= experts - 1 + 1e-9
    assert -1e-9 <= loads.min_vio(load) <= 1
    assert 0.999 <= loads.effective_experts(load) <= experts + 1e-6
    assert -1e-9 <= loads.gini(load) <= (experts - 1) / experts + 1e-9
    shuffled = np.random.default_rng(0).permutation(load)
    assert loads.load_entropy(shuffled) == pytest.approx(float(loads.load_entropy(load)))


@given(st.integers(1, 12), st.data())
def test_max_vio_of_top_k_loads_is_at_most_e_over_k_less_1(experts: int, data) -> None:
    top_k = data.draw(st.integers(1, experts))
    chosen = data.draw(
        st.lists(st.permutations(range(experts)).map(lambda p: p[:top_k]), min_size=1)
    )
    load = np.bincount(np.ravel(chosen), minlength=experts)
    assert -1e-9 <= loads.max_vio(load) <= experts / top_k - 1 + 1e-9


FLOORS = {  # shared/spec/studies.md, section 2: MaxVio, MinVio, CV, Gini, effective / E
    (256, 4, 1024): (0.758, 0.611, 0.246, 0.138, 0.970),
    (256, 4, 2048): (0.539, 0.475, 0.177, 0.099, 0.984),
    (256, 4, 8192): (0.253, 0.238, 0.088, 0.050, 0.996),
    (256, 4, 65536): (0.091, 0.088, 0.031, 0.018, 1.000),
    (64, 4, 2048): (0.204, 0.195, 0.085, 0.048, 0.996),
    (16, 4, 2048): (0.071, 0.070, 0.038, 0.021, 0.999),
}
DRAWS = 20
"""About as many batches as that table must rest on, by how it scatters about these floors."""
MEASURES = (loads.max_vio, loads.min_vio, loads.cv, loads.gini, loads.effective_experts)


@pytest.mark.parametrize(("shape", "expected"), FLOORS.items())
def test_sampling_floors(shape: tuple[int, int, int], expected: tuple[float, ...]) -> None:
    experts, top_k, tokens = shape
    for measure, value in zip(MEASURES, expected, strict=True):
        scale = experts if measure is loads.effective_experts else 1
        found = loads.chance(tokens, experts, top_k, measure)
        assert loads.sampling_floor(tokens, experts, top_k, measure) == found.mean
        error = 3.5 * found.deviation / scale / math.sqrt(DRAWS) + 5e-4  # of rounding
        assert found.mean / scale == pytest.approx(value, abs=error), measure.__name__


@pytest.mark.parametrize("shape", FLOORS)
def test_the_spread_of_uniform_loads_is_the_binomial_one(shape: tuple[int, int, int]) -> None:
    """The mean of CV squared is exact: a load is binomial in k / E, and loads sum to Tk."""
    experts, top_k, tokens = shape
    found = loads.chance(tokens, experts, top_k, lambda load: loads.cv(load) ** 2)
    exact = (1 - top_k / experts) / (tokens * top_k / experts)
    assert found.mean == pytest.approx(exact, abs=3.5 * found.error)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shape", [*list(FLOORS)[:3], *list(FLOORS)[4:], (128, 8, 2048)])
def test_uniform_routing_has_no_excess(shape: tuple[int, int, int], seed: int) -> None:
    """Within sampling error, of batches drawn in another way and from other seeds."""
    experts, top_k, tokens = shape
    generator, batches = np.random.default_rng(1000 + seed), 24
    load = np.zeros((batches, experts), int)
    for each in load:
        keys = generator.random((tokens, experts), dtype=np.float32)
        chosen = np.argpartition(keys, top_k, axis=1)[:, :top_k]
        each += np.bincount(chosen.ravel(), minlength=experts)
    excess = loads.excess_max_vio(load, tokens, top_k)
    floor = loads.chance(tokens, experts, top_k)
    error = math.hypot(floor.deviation / math.sqrt(batches), floor.error)
    assert excess.shape == (batches,) and abs(excess.mean()) < 3.5 * error
    assert excess.std(ddof=1) == pytest.approx(floor.deviation, rel=0.6)


def test_choosing_every_expert_has_no_floor() -> None:
    """Distinct choices: with top-k of all experts, chance has nothing to vary."""
    assert loads.sampling_floor(64, 4, 4) == 0.0


@pytest.mark.parametrize("top_k", [2, 3])  # repeats drawn again, and keys partitioned
def test_every_set_of_distinct_experts_is_as_likely(top_k: int) -> None:
    chosen = loads._distinct(np.random.default_rng(0), 50_000, 5, top_k)
    sets, count = np.unique(np.sort(chosen, axis=1), axis=0, return_counts=True)
    assert len(sets) == math.comb(5, top_k) and (np.diff(sets, axis=1) > 0).all()
    assert count == pytest.approx(np.full(10, 5000), rel=0.06)


def test_starved_experts_are_those_under_a_tenth() -> None:
    assert loads.starved_fraction(np.array([1000, 1000, 54, 46])) == 0.25
    assert loads.starved_fraction(np.array([[1000, 1000, 60, 0], [0, 0, 0, 0]])).tolist() == [
        0.25,
        0,
    ]
    assert loads.starved_fraction(LOAD) == 0


def test_the_commonest_input_sets_a_floor() -> None:
    assert loads.atom_floor(0.169, 256, 4) == pytest.approx(9.816)
    assert loads.atom_floor([0.001, 0.5], 256, 4) == pytest.approx([0, 31])
    tokens = [7] * 3 + [1, 2, 3, 4, 5]
    assert loads.atom_floor_of(tokens, 16, 2) == pytest.approx(3 / 8 * 8 - 1)
    assert loads.atom_floor_of([], 16, 2) == 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(0, 2**32 - 1))
def test_equal_experts_for_equal_tokens_are_no_better(tokens: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    experts_of = [generator.choice(12, 3, replace=False) for _ in range(6)]
    load = np.bincount(np.ravel([experts_of[token] for token in tokens]), minlength=12)
    assert loads.max_vio(load) >= loads.atom_floor_of(tokens, 12, 3) - 1e-9


HISTORY = 1000.0 * np.array(  # [step, expert]: of four experts with a mean load of 1000
    [
        [1, 1, 1, 1],
        [4, 0, 0, 0],
        [2, 1, 1, 0],
        [4, 0, 0, 0],
        [1, 1, 2, 0],
    ]
)


def test_deaths_and_rescues_are_dated() -> None:
    nan = math.nan
    assert loads.ever_dead(HISTORY) == 0.75
    np.testing.assert_array_equal(loads.time_to_death(HISTORY), [nan, 1, 1, 1])
    np.testing.assert_array_equal(loads.rescue_time(HISTORY), [nan, 1, 1, nan])
    assert loads.rescue_rate(HISTORY, 1) == pytest.approx(4 / 7)
    assert loads.rescue_rate(HISTORY, 2) == 0 and math.isnan(loads.rescue_rate(HISTORY, 4))
    both = np.stack([HISTORY, np.full_like(HISTORY, 1000)])
    np.testing.assert_array_equal(loads.ever_dead(both), [0.75, 0])
    np.testing.assert_array_equal(loads.rescue_rate(both, 1), [4 / 7, nan])
    assert loads.rescue_time(both).shape == loads.time_to_death(both).shape == (2, 4)
    assert np.isnan(loads.rescue_time(both)[1]).all()


@given(st.integers(0, 2**32 - 1))
def test_deaths_and_rescues_against_loops(seed: int) -> None:
    load = 1000.0 * np.random.default_rng(seed).integers(0, 2, (7, 4)) + 500 * np.eye(7, 4)
    load[:, 0] += 1000
    death, rescue = loads.time_to_death(load), loads.rescue_time(load)
    for expert in range(4):
        dead = [row[expert] < 0.01 * sum(row) / 4 for row in load]
        if True not in dead:
            assert math.isnan(death[expert]) and math.isnan(rescue[expert])
            continue
        first = dead.index(True)
        later = [step - first for step in range(first, 7) if not dead[step]]
        assert death[expert] == first
        assert rescue[expert] == later[0] if later else math.isnan(rescue[expert])


@pytest.mark.parametrize(
    "measure",
    [
        loads.ever_dead,
        loads.time_to_death,
        loads.rescue_time,
        lambda load: loads.rescue_rate(load, 1),
    ],
)
def test_windows_too_short_to_tell_are_reported(measure) -> None:
    with pytest.warns(UserWarning, match="the mean windowed load is 99 tokens; under 100"):
        measure(HISTORY * 0.099)
