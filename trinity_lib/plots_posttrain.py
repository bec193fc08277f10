"""Figures, a table and the reading of a run of post-training; from its file alone."""

import json
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest

from trinity_lib import loads
from trinity_lib.metrics import group

NAMES = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "start": "before"}
"""What stages and moments are called in figures."""
PAIRS = "preferences"
"""The task that is marked by likelihood, and has no chance but a coin's."""
CURVES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "sft": (("loss", "cross entropy of answers, nat"), ("accuracy", "share of tokens right")),
    "dpo": (("loss", "loss, nat"), ("margin", "margin, nat")),
    "grpo": (("reward", "mean reward"), ("kl", "KL from the reference, nat per token")),
}
"""The two curves that tell of a stage: variable and label, left and right."""
SMOOTH = 8
"""Steps of the running mean, at most."""


def learning(run: xr.DataTree) -> Figure:
    """Every stage's own two curves, each step pale and a running mean over it."""
    table, kinds = group(run, "posttrain"), stages(run)
    with sns.axes_style("ticks"):
        figure, axes = plt.subplots(
            1, len(kinds), figsize=(1 + 4.2 * len(kinds), 3.8), squeeze=False,
            layout="constrained", dpi=110,
        )  # fmt: skip
    for number, (axis, kind) in enumerate(zip(axes[0], kinds, strict=True)):
        own = table.isel(step=np.flatnonzero(table["stage"].values == number))
        pairs = zip((axis, axis.twinx()), CURVES[kind], ("C0", "C1"), strict=True)
        for side, (name, label), color in pairs:
            values = own[name]
            side.plot(values.step, values, color=color, lw=0.8, alpha=0.35)
            side.plot(values.step, _smooth(values), color=color, lw=2)
            side.set_ylabel(label, color=color)
            side.tick_params(axis="y", colors=color)
            side.spines["top"].set_visible(False)
        axis.set(xlabel="step", title=f"{NAMES[kind]}: {own.sizes['step']} steps")
    return _done(figure)


def answers(run: xr.DataTree) -> Figure:
    """Right answers, and answers of the right form, by task before and after every stage."""
    table = group(run, "answers")
    with sns.axes_style("whitegrid", {"axes.grid.axis": "y"}):
        figure, axes = plt.subplots(
            2, 1, figsize=(9, 6), sharex=True, layout="constrained", dpi=110
        )
    for axis, name, label in zip(
        axes, ("accuracy", "formed"), ("right answers, %", "right form, %"), strict=True
    ):
        _shares(axis, table[name], table["questions"].values)
        axis.set(ylabel=label, ylim=(-3, 103))
        sns.despine(ax=axis)
    tasks = [str(t) for t in table.task.values]
    labels = [f"{t}\n(likelier of 2)" if t == PAIRS else t for t in tasks]
    axes[1].set_xticks(range(len(tasks)), labels)
    if PAIRS in tasks:
        place = tasks.index(PAIRS)
        axes[0].hlines(50, place - 0.45, place + 0.45, color="0.3", ls=":", label="a coin's")
    axes[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    count = sorted(set(table["questions"].values.tolist()))
    many = f"{count[0]} to {count[-1]}" if len(count) > 1 else f"{count[0]}"
    axes[0].set_title(f"Held-out questions, {many} a task; bars are 95% Wilson intervals")
    return _done(figure)


def balance(run: xr.DataTree) -> Figure:
    """MaxVio of every layer, with the stages' borders and the floor of the batch's size."""
    layers, table = group(run, "layers")["max_vio"], group(run, "posttrain")
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained", dpi=110)
    numbers = layers.layer.values
    palette = sns.color_palette("viridis", len(numbers))
    for color, layer in zip(palette, numbers, strict=True):
        curve = layers.sel(layer=layer)
        axis.plot(curve.step, curve, color=color, lw=1.2, label=f"layer {layer}")
    for number in range(len(stages(run))):
        own = table.step[table["stage"].values == number]
        if not len(own):
            continue
        floor = _floor(run, table.sel(step=own))
        ends = [int(own[0]) - 0.5, int(own[-1]) + 0.5]
        label = "sampling floor" if number == 0 else None
        axis.plot(ends, [floor, floor], color="0.3", ls="--", lw=1, label=label)
        if number:
            axis.axvline(ends[0], color="0.5", lw=1)
        axis.text(
            ends[0] + 0.5,
            1.01,
            NAMES[stages(run)[number]],
            transform=axis.get_xaxis_transform(),
        )
    axis.set(xlabel="step", ylabel="MaxVio", ylim=(0, None))
    axis.set_title(f"Highest expert load above the mean (balance: {_method(run)})", pad=18)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    sns.despine(ax=axis)
    return _done(figure)


def said(run: xr.DataTree, each: int = 2) -> pd.DataFrame:
    """What is answered to the first questions of every task, before and after each stage."""
    table = group(run, "transcripts")
    rows = []
    for task in dict.fromkeys(table["subject"].values.tolist()):
        for at in np.flatnonzero(table["subject"].values == task)[:each]:
            one = table.isel(question=at)
            row = {"task": task, "question": str(one["asked"].item())}
            row["right"] = str(one["wanted"].item())
            for moment in table.moment.values:
                row[NAMES[str(moment)]] = str(one["said"].sel(moment=moment).item())
            rows.append(row)
    return pd.DataFrame(rows).set_index(["task", "question"])


def marks(run: xr.DataTree) -> pd.DataFrame:
    """Share of right answers with its 95% interval, by task and moment."""
    table = group(run, "answers")
    return pd.DataFrame(
        {
            NAMES[str(moment)]: [
                _interval(float(table["accuracy"].sel(moment=moment, task=task)), int(n))
                for task, n in zip(table.task.values, table["questions"].values, strict=True)
            ]
            for moment in table.moment.values
        },
        index=pd.Index(table.task.values, name="task"),
    )


def reading(run: xr.DataTree) -> str:
    """What a run shows, in sentences whose figures and verdicts come from the run."""
    table, about = group(run, "posttrain"), run.attrs
    config = json.loads(about["config"])
    trained, total = int(about["parameters_trained"]), int(about["parameters_total"])
    first = (
        f"{' then '.join(NAMES[kind] for kind in stages(run))} from {config['init']}, seed "
        f"{about['seed']}: {table.sizes['step']} steps in {float(table['seconds'].sum()):.0f} "
        f"s, {trained:,} of {total:,} parameters trained ({trained / total:.1%})."
    )
    parts = [first, *(_stage(run, n) for n in range(len(stages(run))))]
    parts += [_exam(run), _balance(run)]
    parts += [f"Warning: {note}." for note in json.loads(about.get("warnings") or "[]")]
    if about["status"] != "complete":
        parts.append(f"The run is not complete: {about['status']}.")
    return "\n\n".join(parts)


def stages(run: xr.DataTree) -> list[str]:
    """The kinds of a run's stages, in order."""
    return json.loads(run.attrs["stages"])


def _stage(run: xr.DataTree, number: int) -> str:
    kind, table = stages(run)[number], group(run, "posttrain")
    own = table.isel(step=np.flatnonzero(table["stage"].values == number))
    if not own.sizes["step"]:
        return f"{NAMES[kind]}: not reached."
    few = max(1, own.sizes["step"] // 4)
    parts = []
    for name, label in CURVES[kind]:
        begin, end = (float(own[name][part].mean()) for part in (slice(few), slice(-few, None)))
        parts.append(f"{label.split(',')[0]} {begin:.3f} in the first {few} steps, {end:.3f} "
                     f"in the last")  # fmt: skip
    return f"{NAMES[kind]}: {'; '.join(parts)}."


def _exam(run: xr.DataTree) -> str:
    """Which tasks' right answers changed by more than chance would have it."""
    table = group(run, "answers")
    last = [
        m for m in table.moment.values if not np.isnan(table["accuracy"].sel(moment=m)).all()
    ]
    told = []
    for task, count in zip(table.task.values, table["questions"].values, strict=True):
        before, after = (
            float(table["accuracy"].sel(moment=m, task=task)) for m in (last[0], last[-1])
        )
        low, high = _bounds(before, int(count)), _bounds(after, int(count))
        verdict = "no change beyond chance"
        if high[0] > low[1]:
            verdict = "more"
        elif high[1] < low[0]:
            verdict = "fewer"
        told.append(f"{task} {before:.0%} to {after:.0%} ({verdict})")
    return (
        "Right answers to held-out questions, before and after: "
        + "; ".join(told)
        + ". A verdict means that the two 95% intervals do not meet."
    )


def _balance(run: xr.DataTree) -> str:
    table = group(run, "posttrain")
    few = min(10, table.sizes["step"])
    begin, end = (
        float(table["max_vio"][part].mean()) for part in (slice(few), slice(-few, None))
    )
    bias = group(run, "routing")["bias"]
    moved = float(np.abs(bias.isel(step=-1) - bias.isel(step=0)).max())
    return (
        f"MaxVio, mean over layers, was {begin:.2f} in the first {few} steps and {end:.2f} in "
        f"the last (floor {_floor(run, table.isel(step=slice(-few, None))):.2f}); balance "
        f"{_method(run)}: the selection biases moved by at most {moved:.3g}."
    )


def _shares(axis: Axes, values: xr.DataArray, counts: np.ndarray) -> None:
    moments = values.moment.values
    palette = sns.color_palette("crest", len(moments) - 1)
    width = 0.8 / len(moments)
    for number, moment in enumerate(moments):
        color = "0.7" if number == 0 else palette[number - 1]
        shares = values.sel(moment=moment).values
        place = np.arange(len(shares)) + width * (number - (len(moments) - 1) / 2)
        known = ~np.isnan(shares)
        bounds = np.array(
            [_bounds(s, int(n)) for s, n in zip(shares[known], counts[known], strict=True)]
        ).reshape(-1, 2)
        shown = 100 * shares[known]
        error: Any = np.abs(100 * bounds.T - shown)
        axis.bar(place[known], shown, width, color=color, label=NAMES[str(moment)])
        axis.errorbar(place[known], shown, error, fmt="none", ecolor="0.25", lw=1)


def _bounds(share: float, count: int) -> tuple[float, float]:
    """95% Wilson interval of a share of `count`."""
    found = binomtest(round(share * count), count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _interval(share: float, count: int) -> str:
    if np.isnan(share):
        return ""
    low, high = _bounds(share, count)
    return f"{share:.0%} ({low:.0%} to {high:.0%})"


def _floor(run: xr.DataTree, table: xr.Dataset) -> float:
    router = json.loads(run.attrs["model"])["router"]
    tokens = int(table["batch_tokens"].median())
    return loads.sampling_floor(tokens, router["num_experts"], router["top_k"])


def _method(run: xr.DataTree) -> str:
    method = json.loads(run.attrs["config"])["balance"]["method"]
    return "frozen" if method == "none" else method


def _smooth(values: xr.DataArray) -> np.ndarray:
    few = max(1, min(SMOOTH, values.sizes["step"] // 4))
    return values.to_series().rolling(few, center=True, min_periods=1).mean().to_numpy()


def _done(figure: Figure) -> Figure:
    """Close it in pyplot, so that a notebook shows the returned figure once."""
    plt.close(figure)
    return figure
