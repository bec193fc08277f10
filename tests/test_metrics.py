"""Measures at exact vectors, their floors, and readings that follow the figures."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import synthetic
from trinity_lib import metrics

LOAD = np.array([4, 3, 1, 8])


def test_exact_vectors() -> None:
    assert metrics.max_vio(LOAD) == 1.0
    assert metrics.min_vio(LOAD) == 0.75
    entropy = -sum(n / 16 * math.log(n / 16) for n in LOAD)
    assert metrics.load_entropy(LOAD) == pytest.approx(entropy)
    assert metrics.effective_experts(LOAD) == pytest.approx(math.exp(entropy))
    assert metrics.cv(LOAD) == pytest.approx(math.sqrt(26 / 4) / 4)
    assert metrics.gini(LOAD) == pytest.approx(22 / 64)
    assert metrics.gini(np.array([0, 0, 0, 5])) == 0.75
    assert metrics.dead_fraction(np.array([1000, 1000, 6, 0])) == 0.25 + 0.0
    assert metrics.dead_fraction(np.array([1000, 1000, 4, 0])) == 0.5


def test_even_loads_and_no_loads() -> None:
    even, none = np.full((2, 8), 7), np.zeros((2, 8))
    for load in (even, none):
        assert metrics.max_vio(load).tolist() == [0, 0]
        assert metrics.min_vio(load).tolist() == [0, 0]
        assert metrics.cv(load).tolist() == metrics.gini(load).tolist() == [0, 0]
        assert metrics.dead_fraction(load).tolist() == [0, 0]
    assert metrics.effective_experts(even) == pytest.approx([8, 8])
    assert metrics.load_entropy(none).tolist() == [0, 0]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_bounds(loads: list[int]) -> None:
    load, experts = np.array(loads), len(loads)
    assert -1e-9 <= metrics.max_vio(load) <= experts - 1 + 1e-9
    assert -1e-9 <= metrics.min_vio(load) <= 1
    assert 0.999 <= metrics.effective_experts(load) <= experts + 1e-6
    assert -1e-9 <= metrics.gini(load) <= (experts - 1) / experts + 1e-9
    shuffled = np.random.default_rng(0).permutation(load)
    assert metrics.load_entropy(shuffled) == pytest.approx(float(metrics.load_entropy(load)))


@given(st.integers(1, 12), st.data())
def test_max_vio_of_top_k_loads_is_at_most_e_over_k_less_1(experts: int, data) -> None:
    top_k = data.draw(st.integers(1, experts))
    chosen = data.draw(
        st.lists(st.permutations(range(experts)).map(lambda p: p[:top_k]), min_size=1)
    )
    load = np.bincount(np.ravel(chosen), minlength=experts)
    assert -1e-9 <= metrics.max_vio(load) <= experts / top_k - 1 + 1e-9


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "highest", "lowest"),
    [
        (256, 4, 1024, 0.758, 0.611),
        (256, 4, 2048, 0.539, 0.475),
        (256, 4, 8192, 0.253, 0.238),
        (64, 4, 2048, 0.204, 0.195),
        (16, 4, 2048, 0.071, 0.070),
    ],
)
def test_sampling_floors(
    experts: int, top_k: int, tokens: int, highest: float, lowest: float
) -> None:
    assert metrics.sampling_floor(tokens, experts, top_k) == pytest.approx(highest, rel=0.04)
    found = metrics.sampling_floor(tokens, experts, top_k, metrics.min_vio)
    assert found == pytest.approx(lowest, rel=0.04)


def test_choosing_every_expert_has_no_floor() -> None:
    """Distinct choices: with top-k of all experts, chance has nothing to vary."""
    assert metrics.sampling_floor(64, 4, 4) == 0.0


@pytest.mark.parametrize("top_k", [2, 3])  # repeats drawn again, and keys partitioned
def test_every_set_of_distinct_experts_is_as_likely(top_k: int) -> None:
    chosen = metrics._distinct(np.random.default_rng(0), 50_000, 5, top_k)
    sets, count = np.unique(np.sort(chosen, axis=1), axis=0, return_counts=True)
    assert len(sets) == math.comb(5, top_k) and (np.diff(sets, axis=1) > 0).all()
    assert count == pytest.approx(np.full(10, 5000), rel=0.06)


def test_a_rolling_window_holds_enough_tokens() -> None:
    run = synthetic.run()
    count = run["routing"]["count"]
    one = metrics.rolling_load(run, 10)
    assert one.attrs["window"] == 1 and np.array_equal(one, count)
    wide = metrics.rolling_load(run, 400)
    window = wide.attrs["window"]
    assert float(wide.mean()) >= 400 > float(count.mean()) * (window - 1)
    expected = count.isel(step=slice(5 - window + 1, 6)).sum("step")
    np.testing.assert_array_equal(wide.sel(step=count.step[5]), expected)


def test_dead_experts_are_counted_on_validation() -> None:
    dead = metrics.dead_experts(synthetic.run(dead=2))
    assert dead.dims == ("layer",) and dead.values.tolist() == [0.25, 0.25]
    assert metrics.dead_experts(synthetic.run()).values.tolist() == [0, 0]


def test_too_few_validation_tokens_are_reported() -> None:
    run = synthetic.run()
    run["evaluation"]["count"][:] = 1
    with pytest.warns(UserWarning, match="the mean validation load is 2 tokens"):
        metrics.dead_experts(run)


def test_the_reading_follows_the_run() -> None:
    run = synthetic.run()
    text = metrics.reading(run)
    assert "time-compressed from the report's 0.0005" in text
    assert "no expert is dead" in text and "not complete" not in text
    collapsed = metrics.reading(synthetic.run(dead=4, method="none"))
    assert "50.0% of experts are dead (50.0% in layer 1, 50.0% in layer 2)" in collapsed
    assert "time-compressed" not in collapsed
    run["evaluation"]["loss"][:] = 99.0
    assert " above the unigram entropy" in metrics.reading(run)
    run.attrs |= {"status": "failed", "warnings": '["the corpus changed."]'}
    assert "not complete: failed" in metrics.reading(run)
    assert "Warning: the corpus changed." in metrics.reading(run)


def test_the_table_has_a_row_a_domain() -> None:
    table = metrics.losses_table(synthetic.run())
    assert list(table.index) == ["code", "prose"]
    gain = table["unigram entropy, nat/token"] - table["loss, nat/token"]
    assert (table["gain, nat/token"] == gain).all()
