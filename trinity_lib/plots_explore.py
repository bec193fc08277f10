"""Figures of the app `explore`: runs side by side, and one layer of one run. No torch."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from trinity_lib import browse, loads
from trinity_lib.config import Missing

DPI = 75
"""marimo draws at twice this, and shows a figure as large whatever it is: less is faster."""
MOST_COLUMNS = 250
"""Steps of a heat map or trajectory that are drawn: more than a screen tells apart."""
FEW = 20
"""Points of a curve up to which each is marked."""
TRAINED = ("train", "layers", "routing", "evaluation")
"""Groups over steps: a run without any has no curves."""
HIGHEST = 3.0
"""Relative load at which the colours of a heat map end."""


def compare(
    runs: Mapping[str, xr.DataTree],
    measures: Sequence[str],
    layers: Sequence[int],
    smooth: int = 1,
) -> Figure:
    """Measures over steps, a panel each, a colour a run; the mean over the chosen layers.

    `smooth` is the length of a running mean, in recorded steps. A run without a measure says
    so in the legend. Raises Missing where no run or no measure is chosen.
    """
    if not runs or not measures:
        raise Missing("Choose a run and a measure to see it over steps.")
    if not any(name in run.children for run in runs.values() for name in TRAINED):
        raise Missing("None of these runs has steps to draw: a study or kernels have none.")
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            len(measures), 1, figsize=(10, 3.2 * len(measures)), squeeze=False, sharex=True,
            layout="constrained", dpi=DPI,
        )  # fmt: skip
    for axis, measure in zip(axes[:, 0], measures, strict=True):
        _curves(axis, runs, measure, list(layers), smooth)
    axes[-1, 0].set_xlabel("optimiser step")
    return _done(figure)


def load(run: xr.DataTree, layer: int, step: int) -> Figure:
    """One layer's expert load over time, and sorted at one step beside the uniform level.

    The nearest recorded step is taken. The band is what 95% of experts would get if every
    token picked at random. Raises Missing where the run has no expert counts.
    """
    count = _layer(run, "count", layer)
    now = count.isel(step=int(np.abs(count.step.values - step).argmin()))
    with sns.axes_style("white"):
        figure, axes = plt.subplots(
            1, 2, figsize=(11.5, 4), width_ratios=(1.35, 1), layout="constrained", dpi=DPI
        )
    _heat_map(axes[0], count, int(now.step))
    axes[0].set_title(f"Layer {layer} over time")
    _sorted_bars(axes[1], now)
    sns.despine(ax=axes[1])
    return _done(figure)


def bias(run: xr.DataTree, layer: int) -> Figure:
    """Selection bias of every expert of a layer over time, coloured by its final load.

    Raises Missing where the run has no biases.
    """
    values, count = _layer(run, "bias", layer), _layer(run, "count", layer)
    relative = _final(count)
    thin = values.isel(step=slice(None, None, _every(values)))
    steps = thin.step.values.astype(float)
    lines = [
        np.column_stack([steps, curve]) for curve in thin.transpose("expert", "step").values
    ]
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(10, 3.6), layout="constrained", dpi=DPI)
    colors = sns.color_palette("viridis", as_cmap=True)
    drawn = LineCollection(lines, cmap=colors, norm=Normalize(0, 2), linewidths=0.8)
    drawn.set_array(relative)
    axis.add_collection(drawn)
    if len(steps) == 1:  # a line of one point would be invisible
        axis.scatter(steps.repeat(len(lines)), thin.values.ravel(), c=relative, cmap=colors)
    axis.autoscale_view()
    still = " (all 0: this balancer keeps no bias)" if not thin.values.any() else ""
    axis.set(xlabel="optimiser step", ylabel="selection bias")
    axis.set_title(f"Selection bias of the {len(lines)} experts of layer {layer}{still}")
    bar = figure.colorbar(drawn, ax=axis, extend="max", pad=0.02)
    bar.set_label("final load / mean load")
    sns.despine(ax=axis)
    return _done(figure)


def _curves(
    axis: Axes, runs: Mapping[str, xr.DataTree], measure: str, layers: list[int], smooth: int
) -> None:
    """One panel of `compare`."""
    variable = measure.split("/")[1]
    colors = sns.color_palette("colorblind", len(runs))
    for color, (label, run) in zip(colors, runs.items(), strict=True):
        try:
            curve = browse.series(run, measure, layers).dropna("step")
        except Missing:
            axis.plot([], [], color=color, ls=":", label=f"{label} (has none)")
            continue
        if smooth > 1:
            curve = curve.rolling(step=smooth, min_periods=1).mean()
        marked = "o-" if curve.sizes["step"] <= FEW else "-"
        axis.plot(curve.step, curve, marked, color=color, ms=4, lw=1.4, label=label)
        units = curve.attrs["units"]
        axis.set_ylabel(variable if units == "1" else f"{variable}, {units}")
    axis.set_title(browse.MEASURES[measure], size=11)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    sns.despine(ax=axis)


def _layer(run: xr.DataTree, variable: str, layer: int) -> xr.DataArray:
    """Counts or biases of one layer, [step, expert]; Missing where the run has none."""
    values = browse.require(run, "routing")[variable]
    if layer not in values.layer.values:
        known = ", ".join(str(number) for number in values.layer.values)
        raise Missing(f"There is no layer {layer} with experts: the run has {known}.")
    return values.sel(layer=layer)


def _final(count: xr.DataArray) -> np.ndarray:
    """Load over mean load of every expert, in the last tenth of recorded steps."""
    late = count.isel(step=slice(-max(1, count.sizes["step"] // 10), None)).mean("step")
    return (late / max(float(late.mean()), 1e-9)).values


def _every(values: xr.DataArray) -> int:
    return -(-values.sizes["step"] // MOST_COLUMNS)


def _heat_map(axis: Axes, count: xr.DataArray, step: int) -> None:
    """Relative load, [expert by final load, step], with the chosen step marked."""
    some = count.coarsen(step=_every(count), boundary="pad").mean()
    mean = some.mean("expert")
    relative = (some / mean.where(mean > 0, 1)).transpose("expert", "step").values
    order = np.argsort(_final(count))[::-1]
    first, last = float(count.step[0]), float(count.step[-1])
    half = (last - first) / max(1, count.sizes["step"] - 1) / 2 or 0.5
    image = axis.imshow(
        relative[order], aspect="auto", cmap="magma", norm=Normalize(0, HIGHEST),
        extent=(first - half, last + half, len(order) - 0.5, -0.5), interpolation="nearest",
    )  # fmt: skip
    axis.axvline(step, color="cyan", lw=1.5)
    axis.set(xlabel="optimiser step (line: the chosen one)", ylabel="experts, by final load")
    bar = axis.figure.colorbar(image, ax=axis, extend="max", pad=0.02)
    bar.set_label("load / mean load")


def _sorted_bars(axis: Axes, count: xr.DataArray) -> None:
    """Loads of one step, highest first, beside the uniform level and chance."""
    load = np.sort(count.values)[::-1]
    mean = max(float(load.mean()), 1e-9)
    spread = 2 / mean**0.5  # two standard deviations of a Poisson count
    edges = np.arange(len(load) + 1) + 0.5
    axis.stairs(load / mean, edges, fill=True, color="tab:blue", alpha=0.8)
    axis.axhline(1, color="black", ls="--", lw=1, label=f"uniform: {mean:.0f} tokens an expert")
    axis.axhspan(
        max(0, 1 - spread), 1 + spread, color="0.5", alpha=0.25, lw=0, label="95% by chance"
    )
    idle = int((load == 0).sum())
    axis.set(xlabel="experts, highest load first", ylabel="load / mean load")
    axis.set(xlim=(edges[0], edges[-1]), ylim=(0, max(2.0, 1.1 * float(load[0]) / mean)))
    axis.set_title(
        f"Step {int(count.step)}: MaxVio {float(loads.max_vio(load)):.2f}, "
        f"{idle} of {len(load)} without a token"
    )
    axis.legend(frameon=False, loc="upper right")


def _done(figure: Figure) -> Figure:
    """Close it in pyplot, so that it is shown once, where it was returned."""
    plt.close(figure)
    return figure
