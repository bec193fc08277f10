"""Figures of a plan, drawn from its run file alone; seaborn, never torch."""

import math

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator

from trinity_lib.metrics import group
from trinity_lib.plan_report import OPERATIONS, least_table, settings
from trinity_lib.plots_rehearsal import PARTS

SHORT = 0.05
"""Share of an axis below which a piece has no room for its number."""


def cost(run: xr.DataTree) -> Figure:
    """Dollars over efficiency and price, days beside; the planned run is outlined."""
    table, config = group(run, "cost"), settings(run)
    dollars = table["dollars"].transpose("efficiency", "price")
    large = float(dollars.max()) >= 1e6
    unit, shown = ("million dollars", dollars / 1e6) if large else ("dollars", dollars)
    rows = [
        f"{100 * float(e):.3g}%   {_days(float(d))}"
        for e, d in zip(table.efficiency.values, table["days"].values, strict=True)
    ]
    columns = [f"${float(p):.2f}" for p in table.price.values]
    figure, axis = plt.subplots(figsize=(9.5, 4.6), layout="constrained", dpi=110)
    low, high = float(shown.min()), float(shown.max())
    sns.heatmap(
        shown.values, ax=axis, annot=np.vectorize(_money)(shown.values), fmt="",
        cmap="mako_r", norm=LogNorm(max(low, 1e-9), max(high, 1.01 * low, 2e-9)), linewidths=1,
        xticklabels=columns, yticklabels=rows, cbar_kws={"label": unit},
    )  # fmt: skip
    place = (
        int(np.searchsorted(table.price.values, config["price"])),
        int(np.searchsorted(table.efficiency.values, config["efficiency"])),
    )
    axis.add_patch(Rectangle(place, 1, 1, fill=False, ec="orangered", lw=3, zorder=3))
    note = "outlined: the plan"
    budget = float(run.attrs["published_dollars"])
    if math.isfinite(budget):
        _border(axis, dollars.values > budget)
        note += f"; beyond the dashed line: over the published ${budget / 1e6:.0f}M"
    axis.set(xlabel="dollars per GPU-hour", ylabel="efficiency, days")
    axis.tick_params(axis="y", rotation=0)
    axis.set_title(f"Cost in {unit}: {_planned(run)}\n{note}", size=11)
    return _done(figure)


def memory(run: xr.DataTree) -> Figure:
    """Where each byte of the fullest rank goes, at the moments of a step that need most."""
    table = group(run, "memory")["bytes"] / 1e9
    moments = [str(m) for m in table.moment.values]
    used = [str(p) for p in table.part.values if float(table.sel(part=p).max()) > 0]
    colors = dict(zip(PARTS, sns.color_palette("tab20", len(PARTS)), strict=True))
    figure, axis = _one(width=10, height=3.9)
    capacity = _capacity(run)
    most = max(float(table.sum("part").max()), capacity if _near(run) else 0)
    left = np.zeros(len(moments))
    for part in used:
        values = table.sel(part=part).values
        axis.barh(moments, values, left=left, color=colors[part], label=PARTS[part])
        for row, (start, value) in enumerate(zip(left, values, strict=True)):
            if value > SHORT * most:
                axis.text(
                    start + value / 2, row, f"{value:.3g}", ha="center", va="center", size=9
                )
        left = left + values
    for row, total in enumerate(left):
        axis.annotate(
            f"{total:,.3g} GB", (total, row), (6, 0), textcoords="offset points", size=9,
            va="center", weight="bold", bbox={"fc": "white", "ec": "none", "pad": 1},
        )  # fmt: skip
    room = "beyond the axis"
    if _near(run):
        axis.axvline(capacity, color="0.2", ls="--", lw=1.2)
        room = "dashed"
    axis.set_xlim(0, 1.13 * most)
    axis.invert_yaxis()
    config = settings(run)
    axis.set(xlabel="GB on the rank with most", ylabel="")
    axis.set_title(
        f"Memory of one GPU: {_planned(run)}\nshards of {config['shard']}, experts over "
        f"{config['expert_parallel']}, {config['micro_tokens']:,} tokens at once, "
        f"{'recomputed' if config['recompute'] else 'all activations kept'}; usable: "
        f"{capacity:,.3g} GB ({room})",
        size=11,
    )
    _legend(axis)
    return _done(figure)


def operations(run: xr.DataTree) -> Figure:
    """Where each operation of a token goes, beside 2N for the active parameters."""
    forward = group(run, "flops")["forward"] / 1e9
    forward = forward.sortby(forward, ascending=False)
    names = [OPERATIONS[str(name)] for name in forward.operation.values]
    total = float(forward.sum())
    figure, axis = _one(width=9.5, height=3.4)
    axis.barh(names, forward.values, color=sns.color_palette()[0])
    for row, value in enumerate(forward.values):
        axis.text(value, row, f"  {value:.3g} ({value / total:.1%})", va="center", size=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * float(forward.max()))
    axis.set(xlabel="GFLOP a token, forward (training: three times as many)", ylabel="")
    two = 2 * int(run.attrs["parameters_active_with_head"]) / 1e9
    axis.set_title(
        f"Operations of a token of {settings(run)['scale']}, documents of "
        f"{int(run.attrs['sequence_length']):,} tokens\n{total:.4g} GFLOP forward; twice the "
        f"active parameters with the head are {two:.4g}",
        size=11,
    )
    return _done(figure)


def least(run: xr.DataTree) -> Figure:
    """The fewest GPUs of each kind that train, and that decode at each precision."""
    table = least_table(run)
    figure, axis = plt.subplots(figsize=(9.5, 4.3), layout="constrained", dpi=110)
    values = table.to_numpy(dtype=float)
    shown = np.where(values > 0, values, np.nan)
    text = np.where(values > 0, np.vectorize("{:,.0f}".format)(values), "none")
    sns.heatmap(
        shown, ax=axis, annot=np.where(values > 0, text, ""), fmt="", cmap="mako_r",
        norm=LogNorm(1, max(2.0, float(np.nanmax(shown)))), linewidths=1,
        xticklabels=list(table.columns), yticklabels=list(table.index),
        cbar_kws={"label": "GPUs"},
    )  # fmt: skip
    for row, column in zip(*np.nonzero(values == 0), strict=True):
        axis.text(column + 0.5, row + 0.5, "none", ha="center", va="center", color="0.3")
    axis.axvline(1, color="white", lw=6)
    axis.tick_params(axis="x", rotation=0)
    axis.tick_params(axis="y", rotation=0)
    config = settings(run)
    axis.set_title(
        f"Fewest GPUs for {config['scale']}, {float(run.attrs['headroom']):.0%} of each left "
        f"free\ntraining: {config['micro_tokens']:,} tokens at once; inference: "
        f"{config['batch']} x {config['context']:,} tokens of bf16 cache",
        size=11,
    )
    return _done(figure)


def traffic(run: xr.DataTree) -> Figure:
    """Parameters that a decoding step reads, over sequences decoded together."""
    read = group(run, "traffic")["read"] / 1e9
    figure, axis = _one(width=9.5, height=3.9, grid="y")
    axis.plot(read.sequences, read, "o-", ms=5, label="read in a step, uniform routing")
    whole, fifty = int(run.attrs["parameters_total"]) / 1e9, 50.0
    lines = {f"all {whole:,.4g}B parameters": whole, "a 50B dense model": fifty}
    for (name, height), color in zip(lines.items(), sns.color_palette()[1:], strict=False):
        if height == whole or float(read.min()) < height < whole:
            axis.axhline(height, color=color, ls="--", lw=1.2, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks(read.sequences.values, [f"{n:,}" for n in read.sequences.values])
    axis.set(yscale="log", xlabel="sequences decoded together", ylabel="billion parameters")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
    axis.set_title(
        f"What a decoding step of {settings(run)['scale']} reads: one sequence the active "
        "parameters, many nearly all",
        size=11,
    )
    _legend(axis)
    return _done(figure)


def offload(run: xr.DataTree) -> Figure:
    """Tokens per second of one sequence with experts in host memory, by host and precision."""
    table = group(run, "offload")
    cards, hosts = ([str(x) for x in table[name].values] for name in ("card", "host"))
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            1, len(cards), figsize=(10.5, 4.2), sharey=True, squeeze=False,
            layout="constrained", dpi=110,
        )  # fmt: skip
    place = np.arange(table.sizes["precision"])
    for axis, card in zip(axes[0], cards, strict=True):
        for host, color, marker in zip(hosts, sns.color_palette(), "osD^v", strict=False):
            at = {"card": card, "host": host}
            speed = float(table["bandwidth"].sel(at)) / 1e9
            values = table["decoding"].sel(at).values
            label = f"{host}, {speed:.0f} GB/s"
            axis.plot(place, values, marker + "-", color=color, ms=5, label=label)
            axis.plot(place, table["host_bound"].sel(at).values, ":", color=color, lw=1.2)
            for x, value in zip(place, values, strict=True):
                axis.annotate(
                    f"{value:.3g}", (x, value), (0, -12), textcoords="offset points",
                    ha="center", size=8, color=color,
                )  # fmt: skip
        cached = table["cached"].sel(card=card).values
        labels = [
            f"{name}\n{float(size) / 1e9:,.3g} GB\n{max(0.0, float(share)):.0%}"
            for name, size, share in zip(
                table.precision.values, table["experts"], cached, strict=True
            )
        ]
        axis.set_xticks(place, labels)
        axis.set(title=f"one {card}", yscale="log", xlim=(-0.4, len(place) - 0.6))
        axis.margins(y=0.1)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.minorticks_off()
        axis.grid(visible=False, axis="x")
        sns.despine(ax=axis)
    axes[0, 0].set_ylabel("tokens/s of one sequence, at most")
    axes[0, -1].plot([], [], ":", color="0.4", label="host alone, nothing cached")
    _legend(axes[0, -1], "experts in host memory")
    resident = float(table["resident"]) / 1e9
    figure.supxlabel("routed experts: precision, size, share with room on the GPU", size=10)
    figure.suptitle(
        f"{settings(run)['scale']} on one GPU, routed experts in host memory; "
        f"{resident:,.3g} GB stay on the GPU in bf16, cache included",
        size=11,
    )
    return _done(figure)


def _planned(run: xr.DataTree) -> str:
    config = settings(run)
    tokens, gpus = float(config["tokens"]), f"{config['gpus']:,} x {config['gpu']}"
    count = f"{tokens / 1e12:.3g}T" if tokens >= 1e11 else f"{tokens:,.0f}"
    return f"{config['scale']}, {count} tokens, {gpus}"


def _capacity(run: xr.DataTree) -> float:
    return float(run.attrs["bytes_usable"]) / 1e9


def _near(run: xr.DataTree) -> bool:
    """Whether what is usable is near enough to what is used to be drawn beside it."""
    return _capacity(run) < 4 * float(group(run, "memory")["bytes"].sum("part").max()) / 1e9


def _days(days: float) -> str:
    return f"{days:,.0f} d" if days >= 10 else f"{days:.2g} d"


def _money(value: float) -> str:
    return f"{value:.2g}" if value < 0.95 else f"{value:,.{int(value < 100)}f}"


def _border(axis: Axes, over: np.ndarray) -> None:
    """A staircase between cells that are over a budget and those that are not."""
    rows, columns = over.shape
    for row, column in np.ndindex(rows, columns):
        edges = []
        if column + 1 < columns and over[row, column] != over[row, column + 1]:
            edges.append(([column + 1, column + 1], [row, row + 1]))
        if row + 1 < rows and over[row, column] != over[row + 1, column]:
            edges.append(([column, column + 1], [row + 1, row + 1]))
        for x, y in edges:
            axis.plot(x, y, color="black", ls=(0, (3, 2)), lw=2, zorder=2)


def _one(width: float, height: float, grid: str = "x") -> tuple[Figure, Axes]:
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(width, height), layout="constrained", dpi=110)
    axis.grid(visible=False, axis="y" if grid == "x" else "x")
    sns.despine(ax=axis)
    return figure, axis


def _legend(axis: Axes, title: str | None = None) -> None:
    axis.legend(title=title, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def _done(figure: Figure) -> Figure:
    """Close it in pyplot, so that a notebook shows the returned figure once."""
    plt.close(figure)
    return figure
