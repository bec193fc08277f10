"""Figures of a run, each readable without the text around it; drawn from run files alone."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from trinity_lib import loads, metrics, plots_rehearsal
from trinity_lib.metrics import RATELESS as RATELESS
from trinity_lib.metrics import group

SMOOTH = 20
"""Steps of the running mean drawn over noisy curves."""
MOST_PANELS = 6

Draw = Callable[[xr.DataTree], Figure]


def _of_training(missing: str = "") -> Callable[[Draw], Draw]:
    """A figure of training; of a rehearsal, that there is none of `missing`, or its memory."""

    def decorate(draw: Draw) -> Draw:
        @functools.wraps(draw)
        def drawn(run: xr.DataTree) -> Figure:
            if run.attrs["status"] != "rehearsed":
                return draw(run)
            return (
                plots_rehearsal.banner(run, missing) if missing else plots_rehearsal.memory(run)
            )

        return drawn

    return decorate


@_of_training()
def loss(run: xr.DataTree) -> Figure:
    """Training loss, validation loss per domain, and the learning rate behind them."""
    figure, axes = _figure(1, width=9, height=4.5)
    train, evaluation = group(run, "train"), group(run, "evaluation")
    alone = _alone(train)
    axes[0].plot(
        train.step, train["loss"], alone, color="0.8", lw=0.8, label="training, each step"
    )
    smooth = _smooth(train["loss"])
    label = f"training, mean of {SMOOTH} steps"
    axes[0].plot(train.step, smooth, alone, color="0.3", label=label)
    domains = evaluation.domain.values
    for color, domain in zip(sns.color_palette(n_colors=len(domains)), domains, strict=True):
        curve = evaluation["loss"].sel(domain=domain, split="validation")
        axes[0].plot(curve.step, curve, "o-", color=color, ms=4, label=f"validation, {domain}")
        entropy = float(evaluation["unigram_entropy"].sel(domain=domain).values.flat[-1])
        axes[0].axhline(entropy, color=color, ls=":", lw=1)
    axes[0].plot([], [], color="0.5", ls=":", label="unigram entropy, same colours")
    rate = axes[0].twinx()
    rate.fill_between(train.step, train["learning_rate"], color="tab:blue", alpha=0.08, lw=0)
    rate.set(ylim=(0, 1.05), ylabel="learning rate, share of peak (shaded)")
    rate.grid(False)
    sns.despine(ax=rate, left=True, right=False)
    _stages(run, axes[0])
    axes[0].set(xlabel="optimiser step", ylabel="loss, nat per token")
    axes[0].set_title("Loss by domain, and the learning rate")
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.13, 1), frameon=False)
    return _done(figure)


@_of_training("bits per byte")
def losses(run: xr.DataTree) -> Figure:
    """Bits per byte of the model beside gzip -9 on the same validation bytes."""
    table = metrics.losses_table(run)
    names = {"bits per byte": "this model", "gzip -9, bits per byte": "gzip -9"}
    long = table[list(names)].rename(columns=names).reset_index()
    long = long.melt(id_vars="domain", var_name="coder", value_name="bits")
    figure, axes = _figure(1, width=7, height=3.5)
    sns.barplot(long, x="domain", y="bits", hue="coder", ax=axes[0])
    for bars in axes[0].containers:
        axes[0].bar_label(bars, fmt="%.2f", fontsize=8)  # type: ignore[arg-type]
    axes[0].margins(y=0.1)
    axes[0].set(xlabel="domain", ylabel="bits per byte of text")
    axes[0].set_title("Validation text: the model against gzip")
    axes[0].legend(title=None, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    return _done(figure)


@_of_training("expert loads")
def expert_load(run: xr.DataTree) -> Figure:
    """Heat maps over time of every expert's load, one a layer, experts sorted at the end."""
    count = group(run, "routing")["count"]
    layers = _some(count.layer.values)
    figure, axes = _figure(len(layers), width=9, height=1.9 * len(layers) + 0.8)
    image: Any = None
    for axis, layer in zip(axes, layers, strict=True):
        image = _load_map(axis, count.sel(layer=layer))
        axis.set(ylabel=f"layer {layer}\nexperts by final load")
    axes[0].set_title(f"Expert load over time (balance: {_method(run)})")
    axes[-1].set_xlabel("optimiser step")
    bar = figure.colorbar(image, ax=list(axes), extend="max", pad=0.02)
    bar.set_label("load / mean load")
    return _done(figure)


@_of_training("MaxVio")
def max_vio(run: xr.DataTree) -> Figure:
    """MaxVio of every layer over time, with what chance alone would show."""
    figure, axes = _figure(1, width=9, height=4)
    curves = group(run, "layers")["max_vio"]
    _per_layer(axes[0], curves)
    floor = metrics.floor_of(run)
    axes[0].axhline(floor, color="black", ls="--", label=f"sampling floor, {floor:.2f}")
    _stages(run, axes[0])
    axes[0].set(xlabel="optimiser step", ylabel="MaxVio (highest / mean load, less 1)")
    axes[0].set_ylim(bottom=0)
    axes[0].set_title(f"MaxVio, mean of {SMOOTH} steps (balance: {_method(run)})")
    _legend(axes[0])
    return _done(figure)


@_of_training("biases")
def bias(run: xr.DataTree) -> Figure:
    """Selection bias of every expert over time, coloured by its final load."""
    bias_, count = group(run, "routing")["bias"], group(run, "routing")["count"]
    layers = _some(bias_.layer.values)
    figure, axes = _figure(len(layers), width=9, height=1.9 * len(layers) + 0.8, share=True)
    window = slice(-max(1, count.sizes["step"] // 10), None)
    norm, colors = Normalize(0, 2), sns.color_palette("viridis", as_cmap=True)
    for axis, layer in zip(axes, layers, strict=True):
        load = count.sel(layer=layer).isel(step=window).mean("step")
        relative = (load / load.mean()).values
        for expert, share in enumerate(relative):
            curve = bias_.sel(layer=layer).isel(expert=expert)
            axis.plot(bias_.step, curve, _alone(bias_), lw=0.7, color=colors(norm(share)))
        axis.set(ylabel=f"layer {layer}\nbias")
    axes[0].set_title(f"Selection bias of every expert (balance: {_method(run)})")
    axes[-1].set_xlabel("optimiser step")
    scale = plt.cm.ScalarMappable(norm, colors)
    bar = figure.colorbar(scale, ax=list(axes), extend="max", pad=0.02)
    bar.set_label("final load / mean load")
    return _done(figure)


@_of_training("experts in use")
def experts_in_use(run: xr.DataTree) -> Figure:
    """Dead and effective experts of every layer over a window long enough to tell."""
    load = metrics.rolling_load(run)
    figure, axes = _figure(2, width=9, height=5.5)
    dead = loads.over_experts(loads.dead_fraction, load)
    used = loads.over_experts(loads.effective_experts, load)
    _per_layer(axes[0], 100 * dead, smooth=1)
    _per_layer(axes[1], used, smooth=1)
    experts = metrics.router_of(run)[0]
    axes[1].axhline(experts, color="black", ls="--", label=f"all {experts}")
    axes[0].set(ylabel="dead experts, %")
    axes[0].set_ylim(-2, max(10.0, float(105 * dead.max())))
    axes[1].set(xlabel="optimiser step", ylabel="effective experts", ylim=(0, experts * 1.05))
    window = load.attrs["window"]
    axes[0].set_title(
        f"Experts in use, over windows of {window} recorded step{'s' if window > 1 else ''} "
        f"(balance: {_method(run)})"
    )
    for axis in axes:
        _legend(axis)
    return _done(figure)


@_of_training("BatchHet")
def batch_het(run: xr.DataTree) -> Figure:
    """BatchHet of every step, with the mean of each phase."""
    train = group(run, "train")
    config = json.loads(run.attrs["config"])
    figure, axes = _figure(1, width=9, height=3.5)
    axes[0].plot(
        train.step, train["batch_het"], _alone(train), color="0.7", lw=0.8, label="each step"
    )
    palette = sns.color_palette(n_colors=int(train["phase"].max()) + 1)
    for phase, part in train.groupby("phase"):
        mean = float(part["batch_het"].mean())
        ends = [int(part.step[0]), int(part.step[-1])]
        label = f"phase {int(phase) + 1}: mean {mean:.3f}"
        axes[0].plot(
            ends, [mean] * 2, _alone(part), color=palette[int(phase)], lw=2, label=label
        )
    rsdb = config["data"]["rsdb"]
    order = f"RSDB of {rsdb} documents" if rsdb else "documents packed in order"
    axes[0].set(xlabel="optimiser step", ylabel="BatchHet, nat")
    axes[0].set_ylim(bottom=0)
    axes[0].set_title(f"BatchHet over {config['micro_batches']} micro-batches, {order}")
    _legend(axes[0])
    return _done(figure)


def compare(runs: Mapping[str, xr.DataTree]) -> Figure:
    """Dead experts and late MaxVio of several runs, by layer."""
    rows = []
    for name, run in runs.items():
        dead = metrics.dead_experts(run)
        steps = group(run, "layers").sizes["step"]
        late = (
            group(run, "layers")["max_vio"]
            .isel(step=slice(-max(1, steps // 5), None))
            .mean("step")
        )
        for layer in dead.layer.values:
            share, vio = float(dead.sel(layer=layer)), float(late.sel(layer=layer))
            rows.append({"run": name, "layer": str(layer), "dead": 100 * share, "vio": vio})
    table = pd.DataFrame(rows)
    figure, axes = _figure(2, width=7, height=5)
    for axis, column, label in (
        (axes[0], "dead", "dead experts on validation, %"),
        (axes[1], "vio", "MaxVio, last fifth of steps"),
    ):
        sns.barplot(table, x="layer", y=column, hue="run", ax=axis, legend=axis is axes[0])
        axis.set(xlabel="layer", ylabel=label)
    axes[0].set_title("Runs compared")
    _legend(axes[0])
    return _done(figure)


def collapse(runs: Mapping[str, xr.DataTree]) -> Figure:
    """Expert load over time in the last MoE layer of several runs, side by side."""
    with sns.axes_style("white"):
        figure, axes = plt.subplots(
            1, len(runs), figsize=(5 * len(runs), 3.2), layout="constrained", squeeze=False
        )
    image: Any = None
    for axis, (label, run) in zip(axes[0], runs.items(), strict=True):
        layer = int(group(run, "routing").layer[-1])
        image = _load_map(axis, group(run, "routing")["count"].sel(layer=layer))
        dead = float(metrics.dead_experts(run).sel(layer=layer))
        axis.set_title(f"{label}: {dead:.0%} of experts dead at the end")
        axis.set(xlabel="optimiser step", ylabel=f"experts of layer {layer}, by final load")
    bar = figure.colorbar(image, ax=list(axes[0]), extend="max", pad=0.02)
    bar.set_label("load / mean load")
    return _done(figure)


def _load_map(axis: Axes, count: xr.DataArray) -> Any:
    """One layer's load relative to its mean, [step, expert], experts sorted at the end."""
    width = max(1, count.sizes["step"] // 150)
    load = count.coarsen(step=width, boundary="trim").mean()
    relative = load / load.mean("expert")
    final = relative.isel(step=slice(-max(1, relative.sizes["step"] // 10), None))
    order = np.argsort(final.mean("step").values)[::-1]
    extent = (float(count.step[0]) - 1, float(count.step[-1]), len(order) - 0.5, -0.5)
    axis.grid(False)
    return axis.imshow(
        relative.values[:, order].T,
        aspect="auto",
        cmap="magma",
        extent=extent,
        norm=Normalize(0, 3),
        interpolation="nearest",
    )


def _figure(rows: int, width: float, height: float, share: bool = False) -> tuple[Figure, Any]:
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            rows, 1, figsize=(width, height), squeeze=False, sharex=True, sharey=share,
            layout="constrained", dpi=110,
        )  # fmt: skip
    for axis in axes[:, 0]:
        sns.despine(ax=axis)
    return figure, axes[:, 0]


def _done(figure: Figure) -> Figure:
    """Close it in pyplot, so that a notebook shows the returned figure once."""
    plt.close(figure)
    return figure


def _per_layer(axis: Axes, curves: xr.DataArray, smooth: int = SMOOTH) -> None:
    layers = curves.layer.values
    for color, layer in zip(sns.color_palette("viridis", len(layers)), layers, strict=True):
        curve = _smooth(curves.sel(layer=layer), smooth)
        label = (
            f"layer {layer}" if len(layers) <= 8 or layer in (layers[0], layers[-1]) else None
        )
        axis.plot(curves.step, curve, _alone(curves), color=color, label=label)


def _smooth(curve: xr.DataArray, steps: int = SMOOTH) -> xr.DataArray:
    return curve.rolling(step=steps, min_periods=1).mean()


def _alone(data: xr.Dataset | xr.DataArray) -> str:
    """A format that shows a single step too: a line of one point would be invisible."""
    return "o" if data.sizes["step"] == 1 else "-"


def _stages(run: xr.DataTree, axis: Axes) -> None:
    """Where the TrueBase and the Base were kept."""
    for stage, label in (("truebase_step", "TrueBase"), ("base_step", "Base")):
        if stage in run.attrs:
            axis.axvline(int(run.attrs[stage]), color="0.4", ls="-.", lw=1)
            axis.annotate(
                label, (int(run.attrs[stage]), 1), xycoords=("data", "axes fraction"),
                xytext=(-3, -3), textcoords="offset points", ha="right", va="top", fontsize=8,
            )  # fmt: skip


def _legend(axis: Axes) -> None:
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def _method(run: xr.DataTree) -> str:
    balance = json.loads(run.attrs["config"])["balance"]
    return metrics.balancer(balance["method"], balance["rate"])


def _some(layers: np.ndarray) -> list[int]:
    """At most six layers, evenly spread."""
    picked = np.linspace(0, len(layers) - 1, min(len(layers), MOST_PANELS)).round().astype(int)
    return [int(layers[i]) for i in picked]
