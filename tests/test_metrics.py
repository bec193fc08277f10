"""Readings that follow the figures of a run."""

import numpy as np
import pytest

from tests import synthetic
from trinity_lib import metrics


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


def test_a_balancer_without_a_step_size_is_called_without_one() -> None:
    assert metrics.balancer("none", 0.01) == "none"
    assert metrics.balancer("hash", 0.01) == "hash"
    assert metrics.balancer("smebu", 0.01) == "SMEBU at 0.01"
    assert "Balance (none)." in metrics.reading(synthetic.run(method="none"))
    assert "Balance (sign at " in metrics.reading(synthetic.run(method="sign"))
