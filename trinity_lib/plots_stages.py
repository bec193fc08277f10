"""Figures of what moved between stages of a model, and what is inside each of them.

Weights, routing, predictions and the line between two stages; lens, probes, relearning and
experts taken out. From a run file alone; comparisons are of a run's first chain.
"""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from trinity_lib import stage_axes
from trinity_lib.metrics import group
from trinity_lib.plots_inside import ablation as ablation
from trinity_lib.plots_inside import association_lens as association_lens
from trinity_lib.plots_inside import lens as lens
from trinity_lib.plots_inside import probes as probes
from trinity_lib.plots_inside import relearning as relearning
from trinity_lib.stage_axes import CHANCE, TRUTH
from trinity_lib.stage_report import name

STYLES = (("-", "o"), ("--", "D"), (":", "^"), ("-.", "v"))
"""Of changes that lead to the same stage, in their order."""


def drift(run: xr.DataTree) -> Figure:
    """How far weights moved, by module and layer, in how many directions, and by load."""
    text = "How far weights move between stages"
    if "weight_drift" not in run.children:
        return stage_axes.absent(run, text, "comparison of weights", "comparisons")
    tensors = _pooled(group(run, "weight_drift"))
    looks = _changes(run, group(run, "weight_drift"))
    with_experts = "expert_drift" in run.children
    figure, axes, below = _two_rows(len(looks) if with_experts else 0)
    modules = list(dict.fromkeys(tensors["module"]))
    _by_module(axes[0], tensors, looks, modules, "relative")
    axes[0].set(ylabel="norm of the change / norm before", title="by module, all layers")
    stage_axes.from_zero(axes[0])
    _by_module(axes[1], tensors, looks, modules, "rank")
    axes[1].axhline(1, label="full rank", **CHANCE)
    axes[1].set(ylabel="effective rank / full rank", title="directions of the change")
    axes[1].set_ylim(0, 1.08)
    layers = tensors[tensors["layer"] >= 0]
    for change, (color, style, mark) in looks.items():
        own = _norms(layers[layers["change"] == change], "layer")
        axes[2].plot(own.index, own, style, marker=mark, color=color, label=_called(change))
    axes[2].set(xlabel="layer", ylabel="norm of the change / norm before", title="by layer")
    axes[2].set_xticks(sorted(set(layers["layer"])))
    stage_axes.from_zero(axes[2])
    stage_axes.beside(axes[2])
    for axis, change in zip(below, looks, strict=False):
        _by_load(axis, group(run, "expert_drift").sel(change=change), change)
    figure.suptitle(stage_axes.title_of_first(run, text))
    return stage_axes.done(figure)


def routing(run: xr.DataTree) -> Figure:
    """Choices that are kept, loads that shift, experts in use, and what decides a choice."""
    text = "Routing at every stage"
    if "stage_routing" not in run.children and "routing_change" not in run.children:
        return stage_axes.absent(run, text, "comparison of routing", "routing", "comparisons")
    figure, axes = stage_axes.panels(2, 2, 13, 7)
    if "routing_change" in run.children:
        moved = group(run, "routing_change")
        _over_layers(axes[0, 0], run, moved, "saturation")
        chance = moved["chance"].mean("change")
        axes[0, 0].plot(chance.layer, chance, label="chance, k / E", **CHANCE)
        axes[0, 0].set(ylabel="share of later choices made before", ylim=(0, 1.03))
        _over_layers(axes[0, 1], run, moved, "load_divergence")
        axes[0, 1].set(ylabel="KL of loads, before to after, nat")
        stage_axes.from_zero(axes[0, 1])
    else:
        for axis in axes[0]:
            stage_axes.say(axis, "one stage: no change of routing")
    if "stage_routing" in run.children:
        found = group(run, "stage_routing")
        _of_stages(axes[1, 0], run, found, "effective")
        every = found.sizes["expert"]
        axes[1, 0].axhline(every, label=f"all {every} experts", **TRUTH)
        axes[1, 0].set(ylabel="effective experts")
        _of_stages(axes[1, 1], run, found, "token_information")
        _of_stages(axes[1, 1], run, found, "label_information", ":", "s")
        axes[1, 1].plot([], [], "o-", color="black", label="with the token")
        axes[1, 1].plot([], [], "s:", color="black", label="with the domain")
        axes[1, 1].axhline(0, label="permuted", **CHANCE)
        axes[1, 1].set(ylabel="information of a choice, bit")
    for axis, called in zip(
        axes.flat, ("router saturation", "shift of loads", "experts in use",
                    "what an expert's choice tells"), strict=True
    ):  # fmt: skip
        axis.set_title(called)
        stage_axes.beside(axis)
    figure.suptitle(stage_axes.title_of_first(run, text))
    return stage_axes.done(figure)


def functional(run: xr.DataTree) -> Figure:
    """How far predictions moved in each domain, and how often the first choice stays."""
    text = "How far predictions move between stages"
    if "functional" not in run.children:
        return stage_axes.absent(
            run, text, "comparison of predictions", "predictions", "comparisons"
        )
    found = group(run, "functional")
    domains = [str(domain) for domain in found.domain.values]
    figure, axes = stage_axes.panels(1, 2, 12.5, 1.6 + 0.42 * len(domains), sharey=True)
    looks = _changes(run, found)
    for number, (change, (color, _, mark)) in enumerate(looks.items()):
        own = found.sel(change=change)
        place = np.arange(len(domains)) + (number - (len(looks) - 1) / 2) * 0.17
        low, high = (np.nan_to_num(own[k], posinf=1e3, neginf=0) for k in ("low", "high"))
        axes[0, 0].hlines(place, low, high, color=color, lw=1.5)
        axes[0, 0].plot(own["divergence"], place, mark, color=color, ms=5)
        axes[0, 1].plot(
            own["same_first"], place, mark, color=color, ms=5, label=_called(change)
        )
    axes[0, 0].set_yticks(range(len(domains)), domains)
    axes[0, 0].set_ylim(len(domains) - 0.5, -0.5)
    most = float(found["divergence"].max()) or 1.0
    axes[0, 0].set_xlim(0, min(1.05 * max(most, _largest(found["high"])), 2.5 * most))
    axes[0, 0].set(xlabel="KL(before || after) of the next token, nat", ylabel="domain",
                   title="divergence, with 95% intervals over rows")  # fmt: skip
    axes[0, 1].set(xlabel="share of tokens", title="likeliest next token stays", xlim=(0, 1.02))
    stage_axes.beside(axes[0, 1])
    figure.suptitle(stage_axes.title_of_first(run, text))
    return stage_axes.done(figure)


def path(run: xr.DataTree) -> Figure:
    """Loss along the straight line between two stages, with the chord and the barrier."""
    text = "Loss along the line between two stages"
    if "path" not in run.children:
        return stage_axes.absent(run, text, "line between stages", "paths", "comparisons")
    found = group(run, "path")
    figure, axes = stage_axes.panels(1, 1, 9, 4.6)
    axis = axes[0, 0]
    for change, (color, style, mark) in _changes(run, found).items():
        loss = found["loss"].sel(change=change)
        barrier = float(found["barrier"].sel(change=change))
        label = f"{_called(change)}: barrier {barrier:.3f} nat"
        axis.plot(loss.alpha, loss, style, marker=mark, color=color, label=label, ms=4)
        if {0.0, 1.0} <= set(loss.alpha.values.tolist()):
            ends = [float(loss.sel(alpha=end)) for end in (0, 1)]
            axis.plot([0, 1], ends, ":", color=color, lw=1.2, zorder=1)
    axis.plot([], [], ":", color="black", label="chord: both ends' losses, mixed")
    for end in (0, 1):
        axis.axvline(end, color="0.6", lw=0.8, zorder=0)
    axis.set(xlabel="share of the way (0: before, 1: after; beyond: extrapolated)",
             ylabel="loss, nat per token")  # fmt: skip
    axis.set_title(stage_axes.title_of_first(run, text))
    stage_axes.beside(axis)
    return stage_axes.done(figure)


def tasks(run: xr.DataTree) -> Figure:
    """Loss by domain where a change's weights are added, scaled, to another stage."""
    text = "What a change does where it is added or taken away"
    if "task_vector" not in run.children:
        return stage_axes.absent(run, text, "task vectors", "paths", "comparisons")
    found = group(run, "task_vector")
    across = min(3, found.sizes["task"])
    down = -(-found.sizes["task"] // across)
    figure, axes = stage_axes.panels(
        down, across, 2.4 + 4.4 * across, 0.6 + 3.5 * down, sharey=True
    )
    colors = sns.color_palette("colorblind", found.sizes["domain"])
    for axis, task in zip(axes.flat, found.task.values, strict=False):
        for color, domain in zip(colors, found.domain.values, strict=True):
            curve = found["loss"].sel(task=task, domain=domain)
            axis.plot(found.scale, curve, "o-", color=color, ms=4, label=str(domain))
        axis.axvline(0, label="as it is", **CHANCE)
        axis.set(xlabel="scale (1: added; below 0: taken away)", title=_sum(str(task)))
        axis.set_xticks(found.scale.values)
    for axis in axes.flat[found.sizes["task"] :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("loss, nat per token")
    stage_axes.beside(axes[0, -1])
    figure.suptitle(stage_axes.title_of_first(run, text))
    return stage_axes.done(figure)


def within_layers(load: np.ndarray, moved: np.ndarray) -> float:
    """Spearman's rank correlation of [layer, expert] arrays, ranks within layers, pooled.

    NaN where either is unknown, or the same in all experts of every layer.
    """
    known = np.isfinite(load) & np.isfinite(moved)
    parts = []
    for values in (load, moved):
        ranks = [stats.rankdata(row[at]) for row, at in zip(values, known, strict=True)]
        parts.append(np.concatenate([r - r.mean() for r in ranks if len(r)] or [np.empty(0)]))
    x, y = parts
    spread = float((x @ x) * (y @ y)) ** 0.5
    return float(x @ y) / spread if spread else float("nan")


def _by_load(axis: Axes, one: xr.Dataset, change: str) -> None:
    """Experts' drift against their load, a colour a layer."""
    load, moved = (one[k].transpose("layer", "expert").values for k in ("load", "relative"))
    colors = sns.color_palette("viridis", len(load))
    for color, layer, x, y in zip(colors, one.layer.values, load, moved, strict=True):
        axis.scatter(x, y, 10, color=[color], label=f"layer {layer}")
    found = within_layers(load, moved)
    told = "loads unknown" if np.isnan(found) else f"rank correlation {found:+.2f}"
    axis.set_title(f"{_called(change)}\n{told}, within layers", size=9)
    axis.set(xlabel="load / mean load", ylabel="an expert's change / norm")
    axis.legend(**stage_axes.LEGEND | {"fontsize": 7})


def _pooled(found: xr.Dataset) -> pd.DataFrame:
    """A row a tensor and change: module, layer, norms and the share of full rank."""
    table = found.to_dataframe().reset_index()
    table = table.rename(columns={"tensor_layer": "layer"})
    full = table["full_rank"].where(table["full_rank"] > 0)
    return table.assign(rank=table["effective_rank"] / full)


def _norms(rows: pd.DataFrame, by: str) -> pd.Series:
    """Norm of all that moved over the norm of all, tensors as one vector."""
    squares = rows.assign(a=rows["moved"] ** 2, b=rows["norm"] ** 2)
    sums = squares.groupby(by, sort=False)[["a", "b"]].sum()
    return (sums["a"] / sums["b"].where(sums["b"] > 0)) ** 0.5


def _by_module(
    axis: Axes, tensors: pd.DataFrame, looks: dict, modules: list[str], what: str
) -> None:
    """Points by module: `relative` of all its tensors as one, `rank` the mean of matrices."""
    for number, (change, (color, _, mark)) in enumerate(looks.items()):
        own = tensors[tensors["change"] == change]
        values = (
            _norms(own, "module") if what == "relative" else own.groupby("module")[what].mean()
        )
        place = np.arange(len(modules)) + (number - (len(looks) - 1) / 2) * 0.17
        axis.plot(place, values.reindex(modules), mark, color=color, ms=5)
    axis.set_xticks(range(len(modules)), modules, rotation=35, ha="right")
    axis.grid(False, axis="x")


def _over_layers(axis: Axes, run: xr.DataTree, found: xr.Dataset, variable: str) -> None:
    for change, (color, style, mark) in _changes(run, found).items():
        curve = found[variable].sel(change=change)
        axis.plot(curve.layer, curve, style, marker=mark, ms=4, color=color,
                  label=_called(change))  # fmt: skip
    axis.set_xlabel("layer")
    axis.set_xticks(found.layer.values)


def _of_stages(
    axis: Axes, run: xr.DataTree, found: xr.Dataset, variable: str, style: str = "-",
    mark: str = "o",
) -> None:  # fmt: skip
    for stage in found.stage.values:
        curve = found[variable].sel(stage=stage)
        label = name(str(stage)) if style == "-" else None
        axis.plot(curve.layer, curve, style, marker=mark, ms=4, label=label,
                  color=stage_axes.color(run, stage))  # fmt: skip
    axis.set_xlabel("layer")
    axis.set_xticks(found.layer.values)


def _changes(run: xr.DataTree, found: xr.Dataset) -> dict[str, tuple[str, str, str]]:
    """Colour, line and mark of every change: the colour is the later stage's."""
    seen: dict[str, int] = {}
    looks = {}
    for change in map(str, found.change.values):
        after = change.split(" -> ")[-1]
        style, mark = STYLES[seen.get(after, 0) % len(STYLES)]
        seen[after] = seen.get(after, 0) + 1
        looks[change] = (stage_axes.color(run, after), style, mark)
    return looks


def _called(change: str) -> str:
    return " to ".join(name(stage) for stage in change.split(" -> "))


def _sum(task: str) -> str:
    """A task by the names of its stages: third + (after - before)."""
    found = re.fullmatch(r"(.+) \+ \((.+) - (.+)\)", task)
    if not found:
        return task
    third, after, before = (name(part) for part in found.groups())
    return f"{third} + scale × ({after} − {before})"


def _largest(values: xr.DataArray) -> float:
    known = values.values[np.isfinite(values.values)]
    return float(known.max()) if known.size else 1.0


def _two_rows(below: int) -> tuple[Figure, list[Axes], list[Axes]]:
    """Three panels, and under them one for each change, four a row."""
    across = min(4, max(3, below))
    down = -(-below // across)
    figure = plt.figure(
        figsize=(14, 4.4 + 3.3 * down), layout="constrained", dpi=stage_axes.DPI
    )
    spec = figure.add_gridspec(1 + down, 3 * across, height_ratios=[1.3] + [1] * down)
    with sns.axes_style("whitegrid"):
        top = [figure.add_subplot(spec[0, across * n : across * (n + 1)]) for n in range(3)]
        under = []
        for number in range(below):
            row, column = divmod(number, across)
            place = spec[1 + row, 3 * column : 3 * column + 3]
            under.append(figure.add_subplot(place))
    return figure, top, under
