"""How stages are drawn: one colour each, intervals, chance and truth, and what is missing."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from trinity_lib import stage_report
from trinity_lib.stage_report import name, stages

DPI = 110
COLORS = {
    "truebase": "#0173b2",
    "base": "#de8f05",
    "instruct": "#029e73",
    "debiased": "#cc78bc",
}
"""Of a chain's stages, in all figures."""
OTHERS = ("#d55e00", "#56b4e9", "#8c613c", "#6a3d9a", "#b2182b", "#4d9221", "#525252")
"""Of other stages, in their order."""
TRUTH: dict[str, Any] = {"color": "black", "ls": "-", "lw": 1.1, "zorder": 1}
CHANCE: dict[str, Any] = {"color": "0.45", "ls": "--", "lw": 1.1, "zorder": 1}
ESTIMATE = 4
"""Order of drawing of estimates that stand alone."""
FIRST = ("o", "s", "D", "^", "v", "P")
"""Marks of what is drawn beside each other in one panel, in their order."""
LEGEND: dict[str, Any] = {"fontsize": 8, "framealpha": 0.8, "edgecolor": "none"}
"""Of a legend inside a panel."""
REACH = 0.6
"""How far an axis goes on for intervals longer than usual, as a share of what is else on it."""


class Series(NamedTuple):
    """Findings of one kind, by stage."""

    label: str
    rows: pd.DataFrame
    """Of any number of chains."""


def colors(run: xr.DataTree) -> dict[str, str]:
    """A colour for every stage."""
    other = [stage for stage in stages(run) if stage not in COLORS]
    return COLORS | {s: OTHERS[n % len(OTHERS)] for n, s in enumerate(other)}


def color(run: xr.DataTree, stage: object) -> str:
    """A stage's colour; grey for one that the run does not list."""
    return colors(run).get(str(stage), "0.4")


def panels(rows: int, columns: int, width: float, height: float, **settings: Any) -> tuple:
    """A figure of equal panels; axes are [row, column]."""
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained",
            dpi=DPI, **settings,
        )  # fmt: skip
    return figure, axes


def absent(run: xr.DataTree, title: str, what: str, *reasons: str) -> Figure:
    """In place of a figure, that there is none of `what`; see `stage_report.missing`."""
    figure, axes = panels(1, 1, 9, 1.4)
    axes[0, 0].set_title(title)
    say(axes[0, 0], stage_report.missing(run, what, *reasons), 110)
    return done(figure)


def say(axis: Axes, sentence: str, width: int = 34) -> None:
    """In place of a panel's content, what is not there."""
    axis.set_axis_off()
    axis.text(
        0.5, 0.5, textwrap.fill(sentence, width), ha="center", va="center", size=9,
        transform=axis.transAxes,
    )  # fmt: skip


def done(figure: Figure) -> Figure:
    """Close it in pyplot, so that a notebook shows the returned figure once."""
    for axis in figure.axes:
        sns.despine(ax=axis)
    plt.close(figure)
    return figure


def title(run: xr.DataTree, text: str) -> str:
    """A figure's title with what its intervals rest on."""
    seeds = stage_report.chains(stage_report.findings(run))
    if len(seeds) > 1:
        return f"{text}\n{len(seeds)} chains: faint, each; strong, their mean and 95% interval"
    one = f"one chain, seed {seeds[0]}; " if seeds else ""
    return f"{text}\n{one}bars and bands are 95% intervals"


def title_of_first(run: xr.DataTree, text: str) -> str:
    """A figure's title with the chain that comparisons and looks inside are of."""
    rows = stage_report.findings(run)
    seeds = stage_report.chains(rows)
    if not seeds:
        return text
    first = int(rows["model_seed"].iloc[0])
    return f"{text}\nchain of seed {first}" + f", the first of {len(seeds)}" * (len(seeds) > 1)


def by_stage(axis: Axes, run: xr.DataTree, series: Sequence[Series], label: str) -> None:
    """Points with intervals, a place a stage; hollow where chance is covered.

    Several series stand beside each other with a mark each. Truth and chance are lines where
    all stages share them, else a short line at each.
    """
    series = [each for each in series if not each.rows.empty]
    if not series:
        say(axis, f"{label.split(',')[0]}: not asked in this run")
        return
    found = [stage_report.over_chains(each.rows) for each in series]
    limits(axis, pd.concat(found), [each.rows for each in series])
    order, palette = stages(run), colors(run)
    width = 0.5 / len(series)
    for number, (each, together) in enumerate(zip(series, found, strict=True)):
        side = (number - (len(series) - 1) / 2) * width
        for row in together.to_dict("records"):
            if row["of_stage"] not in order:
                continue
            at = order.index(row["of_stage"]) + side
            own = each.rows[each.rows["of_stage"] == row["of_stage"]]["estimate"]
            if len(own) > 1:
                axis.plot([at - 0.05] * len(own), own, ".", color="0.6", ms=4, zorder=2)
            point(axis, at, row, palette[str(row["of_stage"])], FIRST[number])
    named = lines(axis, pd.concat(found), order)
    axis.set_xticks(range(len(order)), [name(stage) for stage in order])
    if sum(map(len, (name(s) for s in order))) > 30:
        axis.tick_params(axis="x", rotation=20)
    axis.set(xlim=(-0.5, len(order) - 0.5), ylabel=label)
    axis.grid(False, axis="x")
    legend(axis, [each.label for each in series], named)


def point(axis: Axes, at: float, row: Mapping[Any, Any], color: str, mark: str = "o") -> None:
    """An estimate with its interval, cut where the axis ends; hollow at chance."""
    low, high = _ends(axis.get_ylim(), row)
    axis.plot([at, at], [low, high], "-", color=color, lw=1.6, zorder=3)
    face = "white" if row["at_chance"] else color
    axis.plot([at], [row["estimate"]], mark, color=color, mfc=face, ms=6.5, zorder=ESTIMATE)


def estimates(axis: Axes) -> list[tuple[float, float]]:
    """Where the points of estimates are, those that have a value."""
    drawn = [line.get_xydata() for line in axis.lines if line.get_zorder() == ESTIMATE]
    points = [np.asarray(each, float)[0] for each in drawn]
    return [(float(x), float(y)) for x, y in points if np.isfinite([x, y]).all()]


def curves(
    axis: Axes, run: xr.DataTree, rows: pd.DataFrame, x: Callable[[str], float], label: str,
    style: str = "-", named: bool = True,
) -> None:  # fmt: skip
    """A line a stage over what `x` reads in an item, with its interval as a band."""
    palette = colors(run)
    for stage in stages(run):
        own = rows[rows["of_stage"] == stage]
        if own.empty:
            continue
        seeds = sorted(set(own["model_seed"]))
        for seed in seeds if len(seeds) > 1 else []:
            each = _sorted(own[own["model_seed"] == seed], x)
            axis.plot(each["x"], each["estimate"], style, color=palette[stage], lw=0.6,
                      alpha=0.5)  # fmt: skip
        each = _sorted(stage_report.over_chains(own), x)
        axis.plot(
            each["x"], each["estimate"], marker="o", ms=4, ls=style, lw=1.8,
            color=palette[stage], label=name(stage) if named else None,
        )  # fmt: skip
        low, high = np.array([_ends(axis.get_ylim(), r) for r in each.to_dict("records")]).T
        axis.fill_between(each["x"], low, high, color=palette[stage], alpha=0.13, lw=0)
    axis.set_ylabel(label)


def marked(axis: Axes, rows: pd.DataFrame, x: Callable[[str], float], *which: str) -> None:
    """Truth and chance over what `x` reads in an item, the same of all stages, as lines."""
    for column, style in (("truth", TRUTH), ("chance", CHANCE)):
        if column not in which:
            continue
        values = rows.groupby(rows["item"].map(x))[column].mean().dropna()
        if len(values):
            axis.plot(values.index, values, label=_called(column), **style)


def limits(axis: Axes, found: pd.DataFrame, each: Sequence[pd.DataFrame] = ()) -> None:
    """Set where a vertical axis ends: all estimates and lines, and intervals within reach."""
    inner = [found[column] for column in ("estimate", "truth", "chance")]
    inner += [rows["estimate"] for rows in each]
    core = _finite(np.concatenate([np.asarray(part, float) for part in inner]))
    if not len(core):
        return
    span = (core.max() - core.min()) or abs(core[0]) or 1.0
    ends = _finite(found[["low", "high"]].to_numpy(float).ravel())
    lengths = _finite((found["high"] - found["low"]).to_numpy(float))
    usual = float(np.median(lengths)) if len(lengths) else 0.0
    reach = max(REACH * span, 1.5 * usual)
    low = max(min([*core, *ends]), core.min() - reach)
    high = min(max([*core, *ends]), core.max() + reach)
    room = 0.06 * ((high - low) or 1.0)
    axis.set_ylim(low - room, high + room)


def lines(axis: Axes, found: pd.DataFrame, order: Sequence[str]) -> list[str]:
    """Truth and chance: one line where all findings share it, else a short one at each stage.

    What they are called, those of truth first.
    """
    named: dict[str, str] = {}
    truths = _finite(found["truth"].to_numpy(float))
    for column, style in (("truth", TRUTH), ("chance", CHANCE)):
        known = found[np.isfinite(found[column].to_numpy(float))]
        for value, own in known.groupby(known[column].round(6)):
            same = column == "chance" and "truth" in named
            if same and np.isclose(truths, value, atol=1e-6).all():
                named = {"truth": "planted truth, and chance"}
                continue
            named[column] = _called(column)
            if set(own["of_stage"]) == set(known["of_stage"]):
                axis.axhline(value, **style)
                continue
            for at in {order.index(stage) for stage in own["of_stage"] if stage in order}:
                axis.plot([at - 0.4, at + 0.4], [value] * 2, **style)
    return [named[column] for column in ("truth", "chance") if column in named]


def grid(
    run: xr.DataTree, text: str, family: str, across: int,
    parts: Sequence[tuple[str, list[Series], str]],
) -> Figure:  # fmt: skip
    """Panels of points by stage: each its title, its series and its label."""
    if all(each.rows.empty for _, series, _ in parts for each in series):
        return absent(run, text, f"findings of {family}", family)
    down = -(-len(parts) // across)
    figure, axes = panels(down, across, 5.2 * across, 0.6 + 3.3 * down)
    for axis, (called, series, label) in zip(axes.flat, parts, strict=False):
        by_stage(axis, run, series, label)
        axis.set_title(called)
    for axis in axes.flat[len(parts) :]:
        axis.set_visible(False)
    figure.suptitle(title(run, text))
    return done(figure)


def legend(axis: Axes, marks: Sequence[str], named: Sequence[str] = ()) -> None:
    """What marks and lines are: marks in black, as colours are stages."""
    handles = [
        Line2D([], [], color="black", marker=mark, ls="", ms=5.5, label=label)
        for mark, label in zip(FIRST, marks, strict=False)
        if label
    ]
    for label in named:
        style = CHANCE if label == _called("chance") else TRUTH
        handles.append(Line2D([], [], label=label, **style))
    under(axis, handles)


def under(axis: Axes, handles: Sequence[Artist]) -> None:
    """A legend below a panel, where it hides nothing."""
    turned = any(label.get_rotation() for label in axis.get_xticklabels())
    if handles:
        axis.legend(
            handles=list(handles), loc="upper center", ncols=2, frameon=False, fontsize=8,
            bbox_to_anchor=(0.5, -0.26 if turned else -0.1),
        )  # fmt: skip


def legend_below(figure: Figure, axis: Axes) -> None:
    """What a panel's lines are, below all panels: it is the same in each of them."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=8, frameon=False, fontsize=8
        )


def beside(axis: Axes, **settings: Any) -> None:
    """A legend to the right of a panel."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(
            frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8, **settings
        )


def from_zero(axis: Axes) -> None:
    """Let a vertical axis begin at 0, with room above the highest point."""
    points = [_finite(np.asarray(line.get_ydata(), float)) for line in axis.lines]
    highest = max([float(each.max()) for each in points if len(each)], default=1.0)
    axis.set_ylim(0, 1.06 * highest or 1.0)


def log2(axis: Axes, values: Sequence[float], label: str) -> None:
    """A horizontal axis of doublings, with a tick at each value there is."""
    axis.set_xscale("log", base=2)
    ticks = sorted(set(values))
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(label)


def _sorted(rows: pd.DataFrame, x: Callable[[str], float]) -> pd.DataFrame:
    return rows.assign(x=rows["item"].map(x)).sort_values("x")


def _ends(within: tuple[float, float], row: Mapping[Any, Any]) -> tuple[float, float]:
    """An interval's ends, those that are not finite or far away where the axis ends."""
    low, high = float(row["low"]), float(row["high"])
    if np.isnan(low) or np.isnan(high):
        return float("nan"), float("nan")
    return max(low, within[0]), min(high, within[1])


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _called(column: str) -> str:
    return "planted truth" if column == "truth" else column
