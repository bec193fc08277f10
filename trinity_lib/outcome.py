"""What a study keeps of one run: measures at its end, and thinned curves. No torch."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from trinity_lib import dynamics, loads, specialisation
from trinity_lib.metrics import floor_of, group, rolling_load, router_of, validation_load
from trinity_lib.schema import TABLES

TIMES = 40
"""Points of a curve, evenly spread over the run."""
LATE = 0.2
"""Share of the last steps that batch measures are averaged over."""
NULLS = 20
"""Permutations behind the null of an information."""


def outcome(run: xr.DataTree) -> xr.Dataset:
    """The variables of /results of one finished run, without the dimension `trial`."""
    values = {**_loss(run), **_batches(run), **_validation(run), **_bias(run)}
    values |= {**_probe(run), **_curves(run)}
    layers = len(group(run, "layers").layer)
    sizes = {"trial_layer": np.arange(1, layers + 1), "time": (np.arange(TIMES) + 1) / TIMES}
    domains = [str(name) for name in group(run, "evaluation").domain.values]
    found = xr.Dataset(
        {name: (TABLES["results"][name].dims[1:], value) for name, value in values.items()},
        {**sizes, "trial_domain": domains},
    )
    return found.assign_attrs(status="complete", reason="")


def failed(reason: str) -> xr.Dataset:
    """The outcome of a run that diverged."""
    return xr.Dataset(attrs={"status": "failed", "reason": reason})


def _loss(run: xr.DataTree) -> dict[str, Any]:
    train = group(run, "train")
    last = group(run, "evaluation").isel(step=-1).sel(split="validation")
    return {
        "loss": last["loss"].values,
        "seconds": float(train["seconds"].median()),
        "loss_curve": _thinned(train["loss"]),
    }


def _batches(run: xr.DataTree) -> dict[str, Any]:
    layers = group(run, "layers")
    late = layers.isel(step=slice(-max(1, round(LATE * layers.sizes["step"])), None))
    floor = floor_of(run)
    max_vio = late["max_vio"].mean("step").values
    return {
        "floor": floor,
        "max_vio": max_vio,
        "excess": max_vio - floor,
        "min_vio": late["min_vio"].mean("step").values,
        "bias_range": layers["bias_range"].isel(step=-1).values,
    }


def _validation(run: xr.DataTree) -> dict[str, Any]:
    load, (_, top_k) = validation_load(run).values, router_of(run)
    tokens = int(load[0].sum()) // top_k
    ranked = np.sort(load, axis=-1)[:, ::-1]
    return {
        "max_vio_global": loads.max_vio(load),
        "excess_global": loads.excess_max_vio(load, tokens, top_k),
        "dead": loads.dead_fraction(load),
        "starved": loads.starved_fraction(load),
        "effective": loads.effective_experts(load),
        "gini": loads.gini(load),
        "cv": loads.cv(load),
        "load": ranked / ranked.mean(-1, keepdims=True),
    }


def _bias(run: xr.DataTree) -> dict[str, Any]:
    bias = group(run, "routing")["bias"].transpose("layer", "step", "expert").values
    quarter = max(4, bias.shape[1] // 4)
    return {"oscillation": dynamics.oscillation(bias, quarter)}


def _probe(run: xr.DataTree) -> dict[str, Any]:
    """Of the last look at the probe, and of the one half-way."""
    looks, tokens = group(run, "probe"), group(run, "probe_tokens")
    experts, top_k = router_of(run)
    last, half = looks.isel(step=-1), looks.isel(step=looks.sizes["step"] // 2)
    generator = np.random.default_rng(run.attrs["seed"])
    names = ("router_entropy", "mutual_information", "override", "score_price")
    values: dict[str, Any] = {name: last[name].values for name in (*names, *CHURN)}
    pairs = list(zip(half["expert"].values, last["expert"].values, strict=True))
    values["saturation"] = [specialisation.saturation(a, b) for a, b in pairs]
    for name, labels in (("token", tokens["token"]), ("domain", tokens["domain_number"])):
        values[f"{name}_information"] = [
            _beyond_chance(_bits, chosen, labels.values, generator) for _, chosen in pairs
        ]
    values["vocabulary"] = [
        _beyond_chance(
            specialisation.vocabulary_specialisation, chosen, tokens["token"].values, generator
        )
        for _, chosen in pairs
    ]
    values["co_activation"] = [
        specialisation.co_activation(chosen, experts).max(1).mean() for _, chosen in pairs
    ]
    values["atom_floor"] = loads.atom_floor_of(tokens["token"].values, experts, top_k)
    return values


CHURN = ("churn", "churn_by_weights", "churn_by_bias")


def _bits(chosen: np.ndarray, labels: np.ndarray) -> float:
    return specialisation.information(chosen, labels).bits


def _beyond_chance(
    measure: Callable[[np.ndarray, np.ndarray], float],
    chosen: np.ndarray,
    labels: np.ndarray,
    generator: np.random.Generator,
) -> float:
    null = specialisation.null(measure, chosen, labels, NULLS, generator)
    return null.value - null.mean


def _curves(run: xr.DataTree) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load = rolling_load(run)
        over_time = load.transpose("layer", "step", "expert").values
        ever, back = loads.ever_dead(over_time), loads.rescue_time(over_time)
    recorded = float(load.step[-1] - load.step[0]) / max(1, load.sizes["step"] - 1)
    known = np.isfinite(back)
    mean = np.where(known, back, 0.0).sum(-1) / np.maximum(known.sum(-1), 1)
    dead = loads.over_experts(loads.dead_fraction, load)
    return {
        "max_vio_curve": _thinned(group(run, "layers")["max_vio"]),
        "dead_curve": _thinned(dead),
        "ever_dead": ever,
        "rescue_time": np.where(known.any(-1), recorded * mean, np.nan),
    }


def _thinned(curve: xr.DataArray) -> np.ndarray:
    """The mean of the steps that fall between one point in time and the next."""
    last = float(curve.step[-1])
    bins = np.minimum((curve.step.values - 1) * TIMES // last, TIMES - 1)
    means = curve.groupby(xr.DataArray(bins, dims="step", name="time")).mean()
    full = means.reindex(time=np.arange(TIMES), method="ffill")
    return full.transpose("time", ...).values
