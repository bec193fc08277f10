"""The published configurations, exactly, and schedules in any number of steps."""

import subprocess
import sys

import pytest

from trinity_lib import optim, recipes
from trinity_lib.model import count_parameters


@pytest.mark.parametrize(
    ("scale", "total", "with_bias", "active", "with_head", "with_embeddings"),
    [
        ("nano", 6_119_996_416, 6_120_003_328, 0.614, 0.819, 1.024),
        ("mini", 26_123_970_560, 26_123_974_400, 2.655, 3.065, 3.475),
        ("large", 398_635_272_192, 398_635_286_016, 12.142, 12.757, 13.372),
    ],
)
def test_published_parameter_counts(
    scale: str,
    total: int,
    with_bias: int,
    active: float,
    with_head: float,
    with_embeddings: float,
) -> None:
    count = count_parameters(recipes.SCALES[scale]().model)
    assert count.total == total
    assert count.total + count.expert_bias == with_bias
    assert round(count.active / 1e9, 3) == active
    assert round(count.active_with_head / 1e9, 3) == with_head
    assert round(count.active_with_embeddings / 1e9, 3) == with_embeddings


def test_small_is_the_shape_that_benchmarks_are_quoted_on() -> None:
    model = recipes.small().model
    assert (model.width, model.num_layers, model.num_dense_layers) == (256, 8, 1)
    assert (model.dense_width, model.expert_width, model.num_shared_experts) == (768, 128, 1)
    assert (model.attention.num_heads, model.attention.num_kv_heads) == (4, 2)
    assert (model.attention.head_dim, model.attention.window) == (64, 64)
    assert (model.router.num_experts, model.router.top_k) == (64, 4)
    assert (model.vocab_size, recipes.small().data.sequence_length) == (4096, 256)
    assert round(count_parameters(model).total / 1e6, 2) == 49.64


def test_larges_schedule_is_the_published_one() -> None:
    large = recipes.large()
    assert sum(p.tokens for p in large.phases) == 17 * 10**12
    length = large.data.sequence_length
    first = large.phases[0]
    assert first.batch * length == 100_663_296
    grown = optim.phase_steps(first, length) - 1
    assert optim.batch_rows(first, grown, length) * length == 134_217_728
    assert round(sum(large.steps) / 1e3, 1) == 138.8
    rates = [optim.rate(large.phases, 2, s, large.steps[2]) for s in (0, large.steps[2])]
    assert rates == [1.0, pytest.approx(0.1)]
    assert large.optim.muon_rate == 8e-4 and large.optim.adamw_rate == 2e-4


@pytest.mark.parametrize("scale", ["nano", "mini"])
def test_nano_and_mini_balance_by_centred_signs(scale: str) -> None:
    config = recipes.SCALES[scale]()
    assert (config.balance.method, config.balance.rate) == ("sign", 1e-3)
    assert [p.tokens for p in config.phases] == [7 * 10**12, 18 * 10**11, 12 * 10**11]
    assert optim.rate(config.phases, 2, config.steps[2], config.steps[2]) == 0.0


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 60, 300])
def test_any_number_of_steps_keeps_the_shares(steps: int) -> None:
    config = recipes.with_steps(recipes.toy(), steps)
    assert sum(config.steps) == steps
    if steps >= 17:
        shares = [s / steps for s in config.steps]
        assert shares == pytest.approx([10 / 17, 4 / 17, 3 / 17], abs=2 / steps)


def test_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="steps is 0; it must be at least 1"):
        recipes.with_steps(recipes.toy(), 0)


def test_the_module_takes_no_argument() -> None:
    command = [sys.executable, "-m", "trinity_lib.recipes", "foo"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "unrecognized arguments: foo" in done.stderr


def test_the_module_prints_every_count() -> None:
    command = [sys.executable, "-m", "trinity_lib.recipes"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for figure in ("6,119,996,416", "26,123,970,560", "398,635,272,192"):
        assert figure in out
