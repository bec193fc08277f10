"""A collapse study as a row a trial, best step sizes, and verdicts from intervals. No torch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from trinity_lib.schema import TABLES

CLOSE = 0.005
"""Losses within this share of a balancer's best count as its best."""
CONFIDENCE = 0.95
OF_THE_ROUTER = (
    "override", "score_price", "router_entropy", "mutual_information", "churn",
    "churn_by_weights", "churn_by_bias",
)  # fmt: skip
"""Measures of a router's scores, which hash routing does not go by."""


def table(described: Mapping[str, Any], results: Mapping[str, Any]) -> pd.DataFrame:
    """One row a trial: what it is, and its results as single numbers.

    Layers and domains are averaged; `first_max_vio` is the first MoE layer's. Results are NaN
    where a run diverged or is still missing, and for `hash` what the router would have done.
    """
    rows = pd.DataFrame({name: described[name] for name in TABLES["trials"]})
    for name, variable in TABLES["results"].items():
        if "time" in variable.dims or "expert_rank" in variable.dims:
            continue
        values = np.asarray(results[name], dtype=float)
        if values.ndim > 1:
            known = ~np.isnan(values)
            total = np.where(known, values, 0.0).sum(1)
            mean = total / np.maximum(known.sum(1), 1)
            values = np.where(known.any(1), mean, np.nan)
        rows[name] = values
    rows["first_max_vio"] = np.asarray(results["max_vio"], dtype=float)[:, 0]
    rows.loc[rows["method"] == "hash", list(OF_THE_ROUTER)] = np.nan
    return rows


def of(study: xr.DataTree) -> pd.DataFrame:
    """The table of a study's run; what is missing is left out."""
    groups = {name: study[name].to_dataset() for name in ("trials", "results")}
    rows = table(
        {name: groups["trials"][name].values for name in TABLES["trials"]},
        {name: groups["results"][name].values for name in TABLES["results"]},
    )
    return rows[rows["status"] != "missing"].reset_index(drop=True)


def best_rates(described: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, float]:
    """Every balancer's best step size: of those whose loss on the grid's first seed is within
    0.5% of its lowest, the one with the lowest MaxVio. The rule was fixed before any run."""
    rows = table(described, results)
    return best_of(rows[(rows["part"] == "grid") & (rows["seed"] == 0)])


def best_of(tried: pd.DataFrame) -> dict[str, float]:
    """`best_rates` of rows that are the grid's, of one seed."""
    best = {}
    for method, each in tried.dropna(subset=["loss", "excess"]).groupby("method"):
        close = each[each["loss"] <= each["loss"].min() * (1 + CLOSE)]
        best[str(method)] = float(close.loc[close["excess"].idxmin(), "rate"])
    return best


class Judged(NamedTuple):
    """Estimate, 95% interval and verdict."""

    estimate: float
    low: float
    high: float
    seeds: int
    verdict: str


def judge(values: pd.Series) -> Judged:
    """`supported` where the interval is above 0, `not supported` where below, else undecided.

    Without two seeds there is no interval and nothing is decided.
    """
    known = values.dropna().to_numpy(dtype=float)
    count = len(known)
    if count == 0:
        return Judged(np.nan, np.nan, np.nan, 0, "undecided")
    mean = float(known.mean())
    if count == 1:
        return Judged(mean, np.nan, np.nan, 1, "undecided")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * stats.sem(known))
    low, high = mean - half, mean + half
    verdict = "supported" if low > 0 else "not supported" if high < 0 else "undecided"
    return Judged(mean, low, high, count, verdict)
