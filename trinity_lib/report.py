"""What a collapse study says in tables and sentences, from its file alone; no torch."""

import json
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from trinity_lib import findings
from trinity_lib.metrics import group

NAMES = {
    "none": "none",
    "switch": "Switch loss",
    "sequence": "sequence-wise loss",
    "global": "global-batch loss",
    "loss_free": "loss-free sign",
    "sign": "centred sign",
    "proportional": "proportional",
    "smebu": "SMEBU",
    "quantile": "quantile balancing",
    "bip": "BIP",
    "phi": "phi-balancing",
    "sinkhorn": "Sinkhorn",
    "expert_choice": "expert choice",
    "dropout": "expert dropout",
    "hash": "hash routing",
}
"""What figures call the balancers."""
NOT_CAUSAL = ("expert_choice", "bip", "sinkhorn")
"""Trained with routing over a whole batch; what a decoder can do is another routing."""


def claims(study: xr.DataTree) -> pd.DataFrame:
    """The table of /claims, a row a statement."""
    return group(study, "claims").to_dataframe()[
        ["statement", "statistic", "estimate", "low", "high", "seeds", "verdict"]
    ]


def balancers(study: xr.DataTree) -> pd.DataFrame:
    """Every balancer at its best step size: mean and spread over seeds, best balance first.

    `excess MaxVio` is of training batches as they were routed, `deployed` of the validation
    text routed as a decoder would. `edge` marks a best step size at the grid's end, where a
    better one may lie beyond; `diverged` counts runs of the grid and the finals.
    """
    rows, every = finals(study), findings.of(study)
    columns = {
        "loss, nat/token": "loss",
        "excess MaxVio": "excess",
        "deployed": "excess_global",
        "dead, %": "dead",
        "effective experts": "effective",
        "bias-driven, %": "override",
        "leak, %": "leak",
    }
    found = []
    for method, each in rows.groupby("method"):
        own = every[(every["method"] == method) & every["part"].isin(["grid", "finals"])]
        rate, rates = each["rate"].iloc[0], own[own["part"] == "grid"]["rate"]
        row: dict[str, Any] = {
            "balancer": NAMES[str(method)],
            "causal": method not in NOT_CAUSAL,
            "step size": rate,
            "edge": bool(rate > 0 and rate in (rates.min(), rates.max())),
        }
        for label, name in columns.items():
            row[label] = (100 if label.endswith("%") else 1) * each[name].mean()
            if name in ("loss", "excess"):
                row[f"sd of {name}"] = each[name].std() if len(each) > 1 else np.nan
        failed = int((own["status"] == "failed").sum())
        found.append(row | {"seeds": len(each), "diverged": failed})
    if not found:
        return pd.DataFrame({"balancer": [], "excess MaxVio": []}).set_index("balancer")
    return pd.DataFrame(found).set_index("balancer").sort_values("excess MaxVio")


def reading(study: xr.DataTree) -> str:
    """What the study found, in sentences whose figures come from it."""
    rows, judged, every = finals(study), claims(study), findings.of(study)
    count = judged["verdict"].value_counts()
    text = (
        f"{study.attrs['scale']}: {every['key'].nunique()} runs of "
        f"{study.attrs['num_experts']} experts, top-{study.attrs['top_k']}; "
        f"{every[every['status'] == 'failed']['key'].nunique()} of them diverged."
    )
    if len(rows):
        text += (
            f" Uniform routing of a batch has a MaxVio of {rows['floor'].median():.2f}; the "
            "least of a router that gives equal tokens equal experts is "
            f"{rows['atom_floor'].median():.2f}, on text of equal shares of the domains."
        )
    parts = [
        text,
        f"Of {len(judged)} statements {count.get('supported', 0)} are supported, "
        f"{count.get('not supported', 0)} are not (the opposite holds), and "
        f"{count.get('undecided', 0)} are undecided: their interval covers zero, or there are "
        "too few seeds for one. Each interval is 95% on its own; among so many one may be "
        "wrong by chance.",
    ]
    if len(rows):
        parts.append(_ranking(balancers(study)))
    if "anatomy" in set(every["part"]):
        parts.append(_centring(study))
    return "\n\n".join(parts)


def _ranking(table: pd.DataFrame) -> str:
    causal = table[table["causal"]]
    text = (
        f"Of the {len(causal)} balancers that a decoder can follow, {causal.index[0]} is best "
        f"balanced (excess MaxVio {causal['excess MaxVio'].iloc[0]:.2f}), and "
        f"{causal['loss, nat/token'].idxmin()} has the lowest loss "
        f"({causal['loss, nat/token'].min():.3f} nat/token)."
    )
    if "SMEBU" in causal.index:
        places = causal["loss, nat/token"].rank().loc["SMEBU"]
        text += (
            f" SMEBU is number {list(causal.index).index('SMEBU') + 1} in balance and "
            f"{int(places)} in loss."
        )
    edge = table[table["edge"]].index
    if len(edge):
        text += f" At the grid's edge, so perhaps not at their best: {', '.join(edge)}."
    return text


def _centring(study: xr.DataTree) -> str:
    rows = findings.of(study)
    chosen = rows[(rows["part"] == "anatomy") & (rows["axis"] == "centring")]
    excess = chosen.pivot_table(index="seed", columns="level", values="excess")
    if {"on", "off"} - set(excess.columns):
        return "Centring was not varied."
    return (
        "Centring moves all biases of a layer alike, and top-k does not see that: without it "
        f"excess MaxVio changes by {float((excess['off'] - excess['on']).abs().max()):.3f} at "
        "most, by rounding that training makes larger."
    )


def finals(study: xr.DataTree) -> pd.DataFrame:
    """Rows of every balancer at its best step size: the finals, or without them the grid's."""
    rows = findings.of(study)
    finals = rows[rows["part"] == "finals"]
    if len(finals):
        return finals.dropna(subset=["loss"])
    best = json.loads(study.attrs.get("best_rates", "{}"))
    grid = rows[(rows["part"] == "grid") & (rows["seed"] == 0)].dropna(subset=["loss"])
    pairs = zip(grid["method"], grid["rate"], strict=True)
    return grid[np.array([best.get(m) == r for m, r in pairs], dtype=bool)]
