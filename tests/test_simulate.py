"""A router alone: seeds, the bound, recovery, noise, the suggested lambda, figures."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

from tests import synthetic
from trinity_lib import balance, plots_simulate, simulate, stability
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import BadValue
from trinity_lib.run import RunConfig
from trinity_lib.simulate import SimulationConfig
from trinity_lib.train import train

SMALL = SimulationConfig(experts=16, top_k=2, tokens=256, steps=120, keep=4, shift=61)


def with_method(method: str, rate: float = 1e-2) -> SimulationConfig:
    return dataclasses.replace(SMALL, balance=BalanceConfig(method=method, rate=rate))


@pytest.fixture(scope="module")
def measured() -> xr.Dataset:
    return stability.stability(betas=(0.0, 0.5, 0.9), gains=(1.0, 4.0, 12.0, 60.0))


def test_the_same_seed_gives_the_same_bits() -> None:
    torch.manual_seed(1)
    first = simulate.simulate(SMALL)
    torch.manual_seed(2)
    xr.testing.assert_identical(first, simulate.simulate(SMALL))
    other = simulate.simulate(dataclasses.replace(SMALL, seed=1))
    assert not np.array_equal(first["bias"], other["bias"])


def test_every_variable_says_what_it_is() -> None:
    for found in (simulate.simulate(SMALL), simulate.recovery(gaps=(0.1,), tokens=256)):
        for name, array in found.data_vars.items():
            assert array.attrs["long_name"] and array.attrs["units"], name


def test_records_agree_with_a_plain_loop() -> None:
    config = dataclasses.replace(SMALL, shift=0, keep=1, steps=6, drift=0.01)
    found = simulate.simulate(config)
    assert (found["count"].sum("expert") == 256 * 2).all()
    bias, momentum = torch.zeros(1, 16), torch.zeros(1, 16)
    for step in range(6):
        load = torch.tensor(found["count"].values[step])[None]
        bias, momentum = balance.smebu(bias, momentum, load, lam=1e-2, beta=0.5, kappa=2.0)
        np.testing.assert_array_equal(found["bias"].values[step], bias[0].numpy())
    highest = found["count"].max("expert") / 32 - 1
    np.testing.assert_allclose(found["max_vio"], highest.values)
    assert (found["popularity_std"].diff("step") != 0).all()


@pytest.mark.parametrize("method", simulate.STEERING)
def test_rivals_see_the_same_world(method: str) -> None:
    found, control = simulate.simulate(with_method(method, 0.02)), simulate.simulate(
        with_method("none")
    )  # fmt: skip
    np.testing.assert_array_equal(found["popularity_std"], control["popularity_std"])
    late = slice(100, None)
    if method not in ("none", "dropout"):
        better = found["max_vio"].isel(step=late).mean()
        assert better < 0.5 * control["max_vio"].isel(step=late).mean()
        assert found["dead"][-1] == 0


def test_a_shift_deals_popularity_anew() -> None:
    found = simulate.simulate(SMALL)
    assert (found["popularity_std"][:60] == found["popularity_std"][0]).all()
    assert found["max_vio"][60] > 3 * found["max_vio"][50:60].mean()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"balance": BalanceConfig(method="switch")}, "balance.method is 'switch'; it must be"),
        ({"top_k": 16}, "top_k is 16; it must be at least 1, below experts (16)"),
        ({"noise": -1}, "noise is -1.0; it must be zero or more"),
        ({"keep": 0}, "keep is 0; it must be 1 or more"),
    ],
)
def test_bad_settings_are_refused(change: dict, says: str) -> None:
    with pytest.raises(BadValue, match=f"^{says}".replace("(", r"\(").replace(")", r"\)")):
        dataclasses.replace(SMALL, **change)


def test_jacobian_is_the_finite_difference() -> None:
    scores = stability.population(4000, 6, spread=0.1, noise=0.1, seed=3).double()
    bias, step = stability.balanced(scores, 2), 0.01
    expected = torch.empty(6, 6, dtype=torch.float64)
    for j in range(6):
        push = step * torch.eye(6, dtype=torch.float64)[j]
        loads = stability.loads_of(scores, torch.stack([bias + push, bias - push]), 2)
        high, low = balance.violation(loads.double())
        expected[:, j] = -(high - low) / (2 * step)
    found = stability.jacobian(scores, bias, 2, step)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(0), torch.zeros(6, dtype=torch.float64))
    assert (stability.eigenvalues(found) > 0).all()


def test_balanced_is_even() -> None:
    scores = stability.population(4096, 8, spread=0.1, noise=0.1, seed=0)
    load = stability.loads_of(scores, stability.balanced(scores, 2)[None], 2)
    assert balance.violation(load.float()).abs().max() < 0.01


def test_the_boundary_is_the_bound(measured: xr.Dataset) -> None:
    """Within a tenth for beta 0, 0.5 and 0.9; S is known to a twentieth."""
    np.testing.assert_allclose(measured["boundary"] / measured["bound"], 1, atol=0.1)
    gain = measured["bound"] * measured.attrs["slope"] * measured.attrs["kappa"]
    np.testing.assert_allclose(gain, [2, 6, 38])
    assert measured.attrs["slope_error"] < 0.05 * measured.attrs["slope"]
    assert (measured["growth"].isel(gain=0) < 1).all()


def test_gains_must_reach_across_the_boundary() -> None:
    with pytest.raises(BadValue, match="^gains is .*; it must be stable at first, unstable"):
        stability.stability(betas=(0.5,), gains=(1.0, 2.0), tokens=1024)


def test_recovery_is_gap_over_speed() -> None:
    """Within a tenth or two steps."""
    found = simulate.recovery(gaps=(0.2, 0.4))
    measured, predicted = found["steps"].values, found["predicted"].values
    assert (abs(measured - predicted) <= np.maximum(2, 0.1 * predicted)).all()
    smebu = found["predicted"].sel(balancer="smebu", case="collapse", gap=0.4)
    assert float(smebu) == pytest.approx(0.4 / (5e-3 * (1 + np.tanh(2.0))))


def test_sign_never_rests_and_smebu_does() -> None:
    found = simulate.noise(tokens=(128, 4096), steps=200)
    ratio = found["jitter"].sel(balancer="sign") / found["jitter"].sel(balancer="smebu")
    assert ratio[1] > 2 * ratio[0] > 2
    assert found["excess"].sel(balancer="smebu", tokens=4096) < 0.02
    assert found["excess"].sel(balancer="sign", tokens=4096) > 0.04


class Output(NamedTuple):
    routing: tuple


def model_of(*layers: Tensor):
    routing = tuple(simulate.Routed(s, s.topk(2).indices) for s in layers)
    return lambda tokens: Output(routing)


def test_lambda_from_a_models_scores() -> None:
    even = stability.population(4096, 8, spread=0.0, noise=0.1, seed=0)
    apart = even.clone()
    apart[:, 0] -= 0.3
    found = stability.suggest_lambda(model_of(even, apart), torch.zeros(1, 1), steps=50)
    assert found.gap == pytest.approx(0.3, abs=0.02)
    assert found.lower == pytest.approx(found.gap / (50 * (1 + np.tanh(2.0))))
    assert found.upper == pytest.approx(stability.bound(found.slope, beta=0.5, kappa=2.0))
    assert found.rate == found.lower < found.upper / 2
    hasty = stability.suggest_lambda(model_of(apart), torch.zeros(1, 1), steps=1)
    assert hasty.rate == hasty.upper / 2 < hasty.lower


def test_the_slope_is_seen_in_counts_and_biases() -> None:
    """Within a fifth of J's mean eigenvalue, where plain regression is off by three times."""
    config = SimulationConfig(experts=32, top_k=2, tokens=512, drift=0.002, keep=1, steps=400)
    found = simulate.simulate(config).isel(kept=slice(100, None))
    count, bias = found["count"].values[:, None], found["bias"].values[:, None]
    scores = stability.population(16384, 32, spread=0.1, noise=0.1, seed=0)
    level = stability.balanced(scores, 2)
    mean = float(stability.eigenvalues(stability.jacobian(scores, level, 2, 0.01)).mean())
    assert stability.observed_slope(count, bias)[0] == pytest.approx(mean, rel=0.2)
    answer, cause = np.diff(1 - count / 32, axis=0)[1:], np.diff(bias, axis=0)[:-1]
    assert -(answer * cause).sum() / (cause**2).sum() > 2 * mean


def test_lambda_from_a_run(tiny: RunConfig, tmp_path: Path, cache: Path) -> None:
    phase = dataclasses.replace(tiny.phases[0], tokens=40 * 8 * 32)
    config = dataclasses.replace(tiny, name="run", phases=(phase,), evaluate_every=40)
    run = train(config, runs=tmp_path, cache=cache)
    found = stability.suggest_lambda(run)
    assert 0 < found.rate <= found.upper / 2
    assert found.gap == pytest.approx(np.ptp(run["routing"]["bias"].values, axis=-1).max())
    assert 1 < found.slope < 500


def test_runs_that_do_not_tell_are_refused() -> None:
    few, bare, resting = (synthetic.run(steps=n) for n in (20, 40, 40))
    del bare["routing"]
    resting["routing"]["bias"][:] = 0
    for source, says in (
        (bare, "The run has no /routing group"),
        (few, "The run records 20 steps of /routing; at least 30 without gaps"),
        (resting, "The run's biases hardly move"),
    ):
        with pytest.raises(BadValue, match=f"^{says}"):
            stability.suggest_lambda(source)
    with pytest.raises(BadValue, match="^tokens_BS is None; it must be a batch"):
        stability.suggest_lambda(model_of())


def titles(figure: Figure) -> str:
    parts = [figure.get_suptitle(), *(axis.get_title() for axis in figure.axes)]
    return "\n".join(parts)


def test_figures_read_alone(measured: xr.Dataset) -> None:
    runs = simulate.beside(
        "sign", 0.02, lam=0.01, kappa=2.0, beta=0.5, experts=16, top_k=2, tokens=64
    )
    figures = {
        "SMEBU, λ 0.01: late MaxVio": plots_simulate.trajectories(*runs),
        "centred sign, u 0.02": plots_simulate.trajectories(*runs),
        "measured / bound": plots_simulate.stability(measured),
        "λ = u = 0.005, κ = 2": plots_simulate.recovery(simulate.recovery(gaps=(0.1,))),
        "16 equal experts, top-2": plots_simulate.noise(
            simulate.noise(tokens=(64, 128), steps=20)
        ),
    }
    for says, figure in figures.items():
        assert says in titles(figure)
        assert any(axis.get_xlabel() for axis in figure.axes)
        assert plots_simulate.png(figure).startswith(b"\x89PNG")


def test_every_rival_has_a_name() -> None:
    assert set(plots_simulate.NAMES) > set(simulate.STEERING) > set(simulate.RIVALS)


def test_figures_need_no_torch() -> None:
    code = "import sys, trinity_lib.plots_simulate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
