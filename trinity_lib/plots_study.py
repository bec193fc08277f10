"""Figures of a collapse study, drawn from its file alone; seaborn, never torch."""

import textwrap
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from trinity_lib import findings
from trinity_lib.metrics import group
from trinity_lib.report import NAMES, NOT_CAUSAL, claims, finals

COLORS = dict(
    zip(
        NAMES,
        [
            "black", "tab:red", "tab:orange", "tab:brown", "tab:green", "tab:blue", "tab:cyan",
            "#d100a8", "tab:purple", "#c9a800", "tab:olive", "#1b2a8a", "tab:pink",
            "tab:gray", "#00b894",
        ],
        strict=True,
    )
)  # fmt: skip
"""Of balancers, in all figures."""
MARKERS: dict[str, Any] = dict(zip(NAMES, "oXsP*v^D<>phdH8", strict=True))
"""Of balancers, beside their colours: there are too many for colours alone."""
RANGE = ("pi", 100)
"""Bars from the least to the greatest of seeds; a standard deviation can reach below 0%."""


def pareto(study: xr.DataTree) -> Figure:
    """Balance against validation loss: every step size faint, the best over seeds bold."""
    rows, best = findings.of(study), finals(study)
    grid = rows[rows["part"] == "grid"].groupby(["method", "rate"], as_index=False).mean(
        numeric_only=True
    )  # fmt: skip
    methods = [m for m in NAMES if m in set(grid["method"])]
    if grid.empty:
        return _absent("Balance against loss")
    figure, axis = _one(width=9, height=5.5)
    for method in methods:
        color = COLORS[method]
        tried, final = grid[grid["method"] == method], best[best["method"] == method]
        axis.plot(tried["excess"], tried["loss"], "-", color=color, alpha=0.25, lw=1)
        axis.scatter(tried["excess"], tried["loss"], 12, [color], alpha=0.35)
        if len(final):
            spread = {"xerr": final["excess"].std(), "yerr": final["loss"].std()}
            few = len(final) < 2
            axis.errorbar(
                final["excess"].mean(), final["loss"].mean(),
                **({} if few else spread), fmt=MARKERS[method], color=color, ms=8,
                mec="black", mew=0.6, capsize=2,
                label=NAMES[method] + (" (not causal)" if method in NOT_CAUSAL else ""),
            )  # fmt: skip
    axis.set(
        xlabel="excess MaxVio over uniform routing (mean of layers)",
        ylabel="validation loss, nat per token (mean of domains)",
    )  # fmt: skip
    axis.set_xscale("symlog", linthresh=0.5)
    axis.set_title(
        "Balance against loss; faint: every step size, bold: best, with sd over seeds"
    )
    _legend(axis)
    return _done(figure)


def sensitivity(study: xr.DataTree) -> Figure:
    """Excess MaxVio, dead experts and loss over step size, a line a balancer."""
    rows = findings.of(study)
    grid = rows[(rows["part"] == "grid") & (rows["rate"] > 0)].copy()
    methods = [m for m in NAMES if m in set(grid["method"])]
    if grid.empty:
        return _absent("Sensitivity to the step size")
    grid["balancer"] = grid["method"].map(NAMES)
    grid["dead, %"] = 100 * grid["dead"]
    untuned = rows[(rows["part"] == "grid") & (rows["rate"] == 0)]
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", dpi=110)
    labels = {
        "excess": "excess MaxVio", "dead, %": "dead experts, %", "loss": "validation loss, nat",
    }  # fmt: skip
    for axis, (column, label) in zip(axes, labels.items(), strict=True):
        sns.lineplot(
            grid, x="rate", y=column, hue="balancer", hue_order=[NAMES[m] for m in methods],
            style="balancer", markers={NAMES[m]: MARKERS[m] for m in methods}, dashes=False,
            ax=axis, errorbar=RANGE, legend=axis is axes[-1],
            palette=[COLORS[m] for m in methods],
        )  # fmt: skip
        for method, style in (("none", "-"), ("quantile", "--")):
            level = untuned[untuned["method"] == method][column.removesuffix(", %")]
            if len(level):
                value = level.mean() * (100 if column.endswith("%") else 1)
                line = {"color": COLORS[method], "ls": style, "lw": 1.2}
                axis.axhline(value, label=NAMES[method], **line)
        axis.set(xscale="log", xlabel="step size or weight", ylabel=label)
        sns.despine(ax=axis)
    axes[0].set_yscale("symlog", linthresh=0.1)
    axes[0].set_ylim(bottom=0)
    axes[1].set_title(
        "Sensitivity to the step size (mean, least and greatest of the grid's seeds)"
    )
    _legend(axes[-1])
    return _done(figure)


def curves(study: xr.DataTree) -> Figure:
    """MaxVio and dead experts over time, every balancer at its best step size."""
    trials, results = group(study, "trials"), group(study, "results")
    keep = finals(study)
    if keep.empty:
        return _absent("Balance over time")
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained", dpi=110)
    methods = [m for m in NAMES if m in set(keep["method"])]
    for number, method in enumerate(methods):
        keys = keep[keep["method"] == method]["key"]
        chosen = np.isin(trials["key"].values, keys) & _first_of_each(trials["key"].values)
        for axis, name, scale in (
            (axes[0], "max_vio_curve", 1), (axes[1], "dead_curve", 100),
        ):  # fmt: skip
            curve = results[name].isel(trial=chosen).mean(["trial", "trial_layer"])
            bold = 2.4 if method == "smebu" else 1.2
            axis.plot(
                100 * curve.time, scale * curve, color=COLORS[method], lw=bold,
                marker=MARKERS[method], ms=4, markevery=(number % 6, 6), label=NAMES[method],
            )  # fmt: skip
    floor = float(results["floor"].median())
    axes[0].axhline(floor, color="black", ls="--", lw=1, label="uniform routing")
    axes[0].set(yscale="log", xlabel="share of the run, %", ylabel="MaxVio of a batch")
    axes[1].set(xlabel="share of the run, %", ylabel="dead experts, %")
    axes[0].set_title("Balance over time (mean of layers and seeds)")
    axes[1].set_title("Dead experts, in trailing windows")
    _legend(axes[1])
    return _done(figure)


def load(study: xr.DataTree) -> Figure:
    """Validation load of every expert, sorted, every balancer at its best step size."""
    trials, results = group(study, "trials"), group(study, "results")
    keep = finals(study)
    if keep.empty:
        return _absent("Who does the work")
    methods = [m for m in NAMES if m in set(keep["method"])]
    rows = []
    for method in methods:
        keys = keep[keep["method"] == method]["key"]
        chosen = np.isin(trials["key"].values, keys) & _first_of_each(trials["key"].values)
        rows.append(results["load"].isel(trial=chosen).mean(["trial", "trial_layer"]).values)
    with sns.axes_style("white"):
        figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained", dpi=110)
    image = axis.imshow(
        np.stack(rows), aspect="auto", cmap="magma", norm=Normalize(0, 3),
        interpolation="nearest",
    )  # fmt: skip
    axis.set_yticks(range(len(methods)), [NAMES[m] for m in methods])
    axis.set(xlabel="expert, by load", ylabel="")
    axis.set_title("Who does the work: validation load of every expert")
    bar = figure.colorbar(image, ax=axis, extend="max", pad=0.02)
    bar.set_label("load / mean load")
    return _done(figure)


def causes(study: xr.DataTree) -> Figure:
    """Dead experts without a balancer, one thing moved at a time."""
    rows = findings.of(study)
    chosen = rows[rows["part"] == "causes"].copy()
    chosen["dead, %"] = 100 * chosen["dead"]
    return _axes_figure(
        chosen, "dead, %", "dead experts, %", "What deepens collapse (no balancer)"
    )


def anatomy(study: xr.DataTree) -> Figure:
    """SMEBU with one part changed at a time."""
    rows = findings.of(study)
    chosen = rows[rows["part"] == "anatomy"].copy()
    title = "SMEBU taken apart; over the batch, beside sign at its best step size"
    return _axes_figure(chosen, "excess", "excess MaxVio", title)


def rescue(study: xr.DataTree) -> Figure:
    """Dead experts of a collapsed run, and after going on under another balancer."""
    rows = findings.of(study)
    chosen = rows[rows["part"] == "rescue"].copy()
    if chosen.empty:
        return _absent("Rescue")
    chosen["what"] = ["before" if v == "before" else NAMES[v] for v in chosen["level"]]
    chosen["dead, %"] = 100 * chosen["dead"]
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", dpi=110)
    for axis, column, label in (
        (axes[0], "dead, %", "dead experts, %"), (axes[1], "loss", "validation loss, nat"),
    ):  # fmt: skip
        sns.stripplot(chosen, x="what", y=column, ax=axis, color="0.6", size=4)
        sns.pointplot(
            chosen, x="what", y=column, ax=axis, errorbar=RANGE, ls="", color="black",
            capsize=0.15,
        )  # fmt: skip
        axis.tick_params(axis="x", rotation=25)
        axis.set(xlabel="balancer it went on with", ylabel=label)
        sns.despine(ax=axis)
    figure.suptitle("A collapsed router gone on with; mean, least and greatest of seeds")
    return _done(figure)


def leak(study: xr.DataTree) -> Figure:
    """How much of a token's routing later tokens decide, and what that is worth in loss."""
    rows = finals(study).copy()
    if rows.empty:
        return _absent("Routing that reads the future")
    rows["balancer"] = rows["method"].map(NAMES)
    rows["leak, %"] = 100 * rows["leak"]
    rows["gain"] = rows["loss_causal"] - rows["loss_chosen"]
    order = rows.groupby("balancer")["leak, %"].mean().sort_values(ascending=False).index
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            1, 2, figsize=(10, 4.5), layout="constrained", dpi=110, sharey=True
        )
    for axis, column, label in (
        (axes[0], "leak, %", "tokens whose experts later tokens change, %"),
        (axes[1], "gain", "loss decoded causally less with own choices, nat"),
    ):
        sns.barplot(
            rows, y="balancer", x=column, order=list(order), ax=axis, hue="balancer",
            palette={NAMES[m]: color for m, color in COLORS.items()}, legend=False,
            errorbar=RANGE,
        )  # fmt: skip
        axis.set(xlabel=label, ylabel="")
        sns.despine(ax=axis)
    axes[0].set_title("Routing that reads the future; mean, least and greatest of seeds")
    return _done(figure)


def verdicts(study: xr.DataTree) -> Figure:
    """Every statement's estimate and interval, in units of its own interval's reach."""
    judged = claims(study)
    figure, axis = _one(width=10, height=0.32 * len(judged) + 1.2)
    colors = {"supported": "tab:green", "not supported": "tab:red", "undecided": "0.5"}
    numbers = judged[["low", "estimate", "high"]].to_numpy(dtype=float)
    for number, (low, estimate, high) in enumerate(numbers):
        reach = np.nanmax(np.abs([0.0, low, estimate, high]))
        scale = reach if reach > 0 else 1.0
        color = colors[judged["verdict"].iloc[number]]
        if np.isfinite(low):
            axis.plot([low / scale, high / scale], [number] * 2, color=color, lw=2)
        if np.isfinite(estimate):
            face = color if np.isfinite(low) else "white"  # hollow: one seed, no interval
            axis.plot(estimate / scale, number, "o", color=color, mfc=face, ms=5)
    for verdict, color in colors.items():
        axis.plot([], [], "o-", color=color, label=verdict)
    axis.axvline(0, color="black", lw=1)
    axis.set_yticks(range(len(judged)), judged["statement"], fontsize=8)
    axis.invert_yaxis()
    axis.set(
        xlabel="estimate and 95% interval, each over its own largest value", xlim=(-1.1, 1.1)
    )
    axis.set_title("Statements and verdicts: right of zero it holds")
    _legend(axis)
    return _done(figure)


def _absent(title: str) -> Figure:
    """In place of a figure that a study has no runs for."""
    figure, axis = _one(width=7, height=1.2)
    axis.set_axis_off()
    axis.set_title(title)
    axis.text(0.5, 0.5, "not part of this study", ha="center", va="center")
    return _done(figure)


def _axes_figure(rows: pd.DataFrame, column: str, label: str, title: str) -> Figure:
    """A panel for every axis: its levels, a point a seed."""
    if rows.empty:
        return _absent(title)
    names = list(rows["axis"].drop_duplicates())
    across = min(3, len(names))
    down = -(-len(names) // across)
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            down, across, figsize=(4.2 * across, 3 * down), layout="constrained", dpi=110,
            sharey=True, squeeze=False,
        )  # fmt: skip
    for axis, name in zip(axes.flat, names, strict=False):
        part = rows[rows["axis"] == name].copy()
        part["balancer"] = part["method"].map(NAMES)
        methods = [m for m in NAMES if m in set(part["method"])]
        aside: Any = 0.1 if len(methods) > 1 else False
        sns.pointplot(
            part, x="level", y=column, hue="balancer", hue_order=[NAMES[m] for m in methods],
            palette=[COLORS[m] for m in methods], markers=[MARKERS[m] for m in methods],
            dodge=aside, ax=axis, errorbar=RANGE, capsize=0.1, legend=len(methods) > 1,
        )  # fmt: skip
        levels = part["level"].drop_duplicates()
        axis.set_xticks(range(len(levels)), [textwrap.fill(each, 14) for each in levels])
        axis.set(xlabel=name, ylabel=label)
        sns.despine(ax=axis)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.suptitle(f"{title}; mean, least and greatest of seeds")
    return _done(figure)


def _first_of_each(keys: np.ndarray) -> np.ndarray:
    first = np.zeros(len(keys), dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first


def _one(width: float, height: float) -> tuple[Figure, Any]:
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(width, height), layout="constrained", dpi=110)
    sns.despine(ax=axis)
    return figure, axis


def _legend(axis: Any) -> None:
    if not axis.get_legend_handles_labels()[0]:
        return
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8)


def _done(figure: Figure) -> Figure:
    """Close it in pyplot, so that a notebook shows the returned figure once."""
    plt.close(figure)
    return figure
