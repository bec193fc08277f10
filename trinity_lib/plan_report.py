"""What a plan says in tables and sentences, from its run file alone; no torch."""

import json
import math
from typing import Any

import pandas as pd
import xarray as xr

from trinity_lib.metrics import group
from trinity_lib.plots_rehearsal import PARTS

OPERATIONS = {
    "projections": "attention: projections",
    "attention": "attention: scores, values",
    "dense": "dense layers",
    "routed": "routed experts",
    "shared": "shared experts",
    "router": "router",
    "head": "head",
}
"""What figures call the operations of /flops."""


def settings(run: xr.DataTree) -> dict[str, Any]:
    """The parameters of the plan."""
    return json.loads(run.attrs["config"])


def published(run: xr.DataTree) -> pd.DataFrame:
    """What is published of Large beside what its shapes give."""
    table = group(run, "published").to_dataframe()
    table["apart, %"] = 100 * (table["computed"] / table["published"] - 1)
    return table[["published", "computed", "unit", "apart, %"]]


def reckonings(run: xr.DataTree) -> pd.DataFrame:
    """Operations of the run in several ways, and what each implies over its days."""
    table = group(run, "reckonings").to_dataframe()
    return pd.DataFrame(
        {
            "N, billion": table["parameters"] / 1e9,
            "10^21 FLOP": table["operations"] / 1e21,
            "TFLOP/s a GPU": table["rate"] / 1e12,
            "% of dense bf16": 100 * table["efficiency"],
        }
    )


def least_table(run: xr.DataTree) -> pd.DataFrame:
    """Fewest GPUs by kind: training, then inference at each precision; 0 where none fit."""
    table = group(run, "fits")
    columns = {"training": table["training_gpus"].values}
    for name, bits in zip(table.precision.values, table["bits"].values, strict=True):
        held = table["inference_gpus"].sel(precision=name).values
        columns[f"{name}\n{float(bits):g} bit"] = held
    kinds = group(run, "gpus")["memory"]
    index = [
        f"{n} ({float(b) / 1e9:.0f} GB)" for n, b in zip(kinds.gpu.values, kinds, strict=True)
    ]
    return pd.DataFrame(columns, index=pd.Index(index))


def decoding_table(run: xr.DataTree) -> pd.DataFrame:
    """Tokens per second of one sequence at most, on the fewest GPUs of each kind."""
    table = group(run, "fits")["decoding"].transpose("gpu", "precision")
    kinds, precisions = pd.Index(table.gpu.values), pd.Index(table.precision.values)
    return pd.DataFrame(table.values, index=kinds, columns=precisions)


def articles(run: xr.DataTree) -> str:
    """The claims of public articles as a Markdown table."""
    rows = ["| said | right | verdict |", "|---|---|---|"]
    for name, row in group(run, "articles").to_dataframe().iterrows():
        rows.append(f"| {name} | {row['finding']} | {row['verdict']} |".replace("$", r"\$"))
    return "\n".join(rows)


def reading(run: xr.DataTree) -> str:
    """What the plan says, in sentences whose figures come from it."""
    parts = [
        str(run.attrs["summary"]),
        _implied(run),
        _cheapest(run),
        _fullest(run),
        _cache(run),
    ]
    if run.attrs["status"] != "complete":
        parts.append(f"The plan is not complete: {run.attrs['status']}.")
    return "\n\n".join(parts)


def _implied(run: xr.DataTree) -> str:
    config, table = settings(run), reckonings(run)
    rates = table["TFLOP/s a GPU"]
    text = (
        f"{config['tokens']:,.3g} tokens in {config['days']:g} days on {config['gpus']:,} "
        f"{config['gpu']} imply {rates.min():,.3g} to {rates.max():,.3g} TFLOP/s a GPU, "
        f"{table['% of dense bf16'].min():.3g} to {table['% of dense bf16'].max():.3g}% of the "
        "dense bf16 peak, by how operations are counted; the most is every product of the "
        "shapes, attention included."
    )
    price = float(run.attrs["implied_price"])
    if math.isfinite(price):
        budget = float(run.attrs["published_dollars"]) / 1e6
        text += (
            f" Were all of the published ${budget:.0f}M paid for those days, a GPU-hour would "
            f"have cost ${price:.2f}; it is said of four models in six months, so it was less."
        )
    return text


def _cheapest(run: xr.DataTree) -> str:
    table = least_table(run)
    training = table["training"]
    able = training[training > 0]
    none = [str(kind) for kind in training[training == 0].index]
    text = ", ".join(f"{count:,} {kind}" for kind, count in able.items())
    parts = [f"Fewest GPUs that train: {text}." if text else "No number of GPUs trains it."]
    if none:
        needed = float(group(run, "fits")["training_bytes"].min()) / 1e9
        parts.append(
            f"No number of {' or '.join(none)}: {needed:.3g} GB a GPU do not shrink further at "
            "so many tokens at once."
        )
    return " ".join(parts)


def _fullest(run: xr.DataTree) -> str:
    table = group(run, "memory")["bytes"] / 1e9
    totals = table.sum("part")
    moment = str(totals.idxmax("moment").item())
    parts = table.sel(moment=moment).sortby(table.sel(moment=moment), ascending=False)
    named = ", ".join(
        f"{float(v):,.3g} GB {PARTS[str(v.part.item())]}" for v in parts[:4] if float(v) > 0
    )
    return f"A GPU is fullest at {moment}, {float(totals.max()):,.3g} GB: {named}."


def _cache(run: xr.DataTree) -> str:
    config = settings(run)
    windows, full = (float(run.attrs[k]) / 1e9 for k in ("cache_bytes", "cache_bytes_full"))
    return (
        f"{config['batch']} x {config['context']:,} tokens of cache are {windows:,.3g} GB in "
        f"bf16 where sliding layers keep their window alone, {full:,.3g} GB where every layer "
        "keeps everything."
    )
