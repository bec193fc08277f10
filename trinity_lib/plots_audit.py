"""What the audits found at every stage, beside the planted truth and chance: all figures.

From a run file alone, of any number of chains and of stages with any names; what a run has not
got is said in its place. A point that covers chance is hollow.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from trinity_lib import audit, stage_axes, stage_report
from trinity_lib.intervals import LEVEL
from trinity_lib.metrics import group
from trinity_lib.plots_families import association as association
from trinity_lib.plots_families import behaviour as behaviour
from trinity_lib.plots_families import calibration as calibration
from trinity_lib.plots_families import decisions as decisions
from trinity_lib.plots_families import memorisation as memorisation
from trinity_lib.plots_families import recall as recall
from trinity_lib.stage_axes import Series
from trinity_lib.stage_report import chosen, findings, name, stages
from trinity_lib.stage_report import claims as claims
from trinity_lib.stage_report import reading as reading
from trinity_lib.stage_report import table as table

WITHIN = 2.0
"""The overview goes to this many times the planted effect, or as far as there are estimates."""
FARTHEST = 6.0
"""Further than which an estimate is an arrow at the edge."""


def overview(run: xr.DataTree) -> Figure:
    """Every family's deciding finding at every stage, scaled: chance is 0, the truth is 1."""
    rows = stage_report.primaries(run)
    rows = rows[rows["truth"].notna() & rows["of_stage"].isin(stages(run))]
    if rows.empty:
        return stage_axes.absent(
            run, "What the audits find", "findings beside a planted truth", "association"
        )
    families = [f for f in audit.PRIMARY if f in set(rows["family"])]
    axes_of = _two_scales(rows, families)
    figure, axes = stage_axes.panels(
        len(axes_of), 1, 9.5, 1.6 + 0.55 * len(families),
        height_ratios=[len(own) + 0.4 for own, _ in axes_of],
    )  # fmt: skip
    for axis, (own, scaled) in zip(axes[:, 0], axes_of, strict=True):
        _scaled(axis, run, rows, own, scaled)
    axes[0, 0].set_title(stage_axes.title(run, "What is planted and what every stage shows"))
    handles = [
        Line2D([], [], color=stage_axes.colors(run)[s], marker="o", label=name(s))
        for s in stages(run)
    ]
    handles += [
        Line2D([], [], color="black", marker="o", mfc="white", ls="", label="covers chance"),
        Line2D([], [], label="planted truth", **stage_axes.TRUTH),
        Line2D([], [], label="chance", **stage_axes.CHANCE),
    ]
    axes[0, 0].legend(
        handles=handles, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=8
    )
    return stage_axes.done(figure)


def audits(run: xr.DataTree) -> Figure:
    """How often every family finds what is not there, and how often it covers what is."""
    if "audits" not in run.children:
        return stage_axes.absent(run, "The audits audited", "audit of the audits themselves")
    found = group(run, "audits").to_dataframe().reset_index()
    draws = int(found["draws"].max())
    figure, axes = stage_axes.panels(1, 2, 11, 1.6 + 0.3 * len(found), sharey=True)
    place = np.arange(len(found))
    sound = found["calibrated"].astype(bool)
    for low, high, at in zip(found["low"], found["high"], place, strict=True):
        axes[0, 0].barh(at, high - low, 0.7, left=low, color="0.85", zorder=1)
    colors = np.where(sound, "tab:green", "tab:red")
    axes[0, 0].scatter(found["share"], place, c=colors, zorder=3)
    axes[0, 0].axvline(1 - LEVEL, color="black", lw=1, label=f"{1 - LEVEL:.0%}")
    low = stats.binom.ppf(0.025, draws, LEVEL) / draws
    axes[0, 1].axvspan(low, 1, color="0.85", zorder=1)
    under = found["covered"] < low
    axes[0, 1].scatter(found["covered"], place, c=np.where(under, "tab:red", "tab:green"),
                       zorder=3)  # fmt: skip
    axes[0, 1].axvline(LEVEL, color="black", lw=1)
    axes[0, 0].set_yticks(place, found["family"])
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlim=(-0.01, None), xlabel="share of null worlds with an effect",
                   ylabel="family of audits", title="false alarms")  # fmt: skip
    axes[0, 1].set(xlabel="share of planted worlds whose truth is covered", title="coverage")
    handles = [
        Line2D([], [], color="tab:green", marker="o", ls="", label="as intervals promise"),
        Line2D([], [], color="tab:red", marker="o", ls="", label="not so"),
        Line2D([], [], color="black", lw=1, label="nominal: 5%, 95%"),
        Line2D([], [], color="0.85", lw=7, label="95% of such shares, if nominal"),
    ]
    axes[0, 1].legend(handles=handles, frameon=False, loc="upper left",
                      bbox_to_anchor=(1.01, 1), fontsize=8)  # fmt: skip
    figure.suptitle(f"The audits audited: {draws} worlds with nothing in them, {draws} planted")
    return stage_axes.done(figure)


def items(run: xr.DataTree) -> Figure:
    """Items and lm_eval tasks that any checkpoint can be asked, a panel a measure."""
    rows = findings(run)
    rows = rows[rows["family"].isin(("items", "lm_eval"))]
    if rows.empty:
        return stage_axes.absent(run, "Items and tasks", "items or tasks", "items", "lm_eval")
    panels = []
    for (family, measure), own in rows.groupby(["family", "measure"], sort=False):
        series = [Series(i, chosen(own, str(family), i)) for i in dict.fromkeys(own["item"])]
        lot = [series[n : n + len(stage_axes.FIRST)] for n in
               range(0, len(series), len(stage_axes.FIRST))]  # fmt: skip
        panels += [(str(family), each, str(measure)) for each in lot]
    return stage_axes.grid(
        run, "Items and tasks by stage", "items", min(3, len(panels)), panels
    )


def _two_scales(rows: pd.DataFrame, families: Sequence[str]) -> list[tuple[list[str], bool]]:
    """Families that can be scaled, and those whose truth is chance itself."""
    first = rows.drop_duplicates("family").set_index("family")
    flat = np.isclose(first["truth"], first["chance"], atol=1e-6)
    own = {f: bool(at) for f, at in zip(first.index, flat, strict=True)}
    parts = [([f for f in families if own[f] == kind], not kind) for kind in (False, True)]
    return [part for part in parts if part[0]]


def _scaled(
    axis: Axes, run: xr.DataTree, rows: pd.DataFrame, families: list[str], scaled: bool
) -> None:
    """One panel of the overview, a row a family."""
    order, palette = stages(run), stage_axes.colors(run)
    raw = findings(run)
    for number, family in enumerate(families):
        for row in chosen(rows, family).to_dict("records"):
            unit = row["truth"] - row["chance"] if scaled else 1.0
            place = number + (order.index(row["of_stage"]) - (len(order) - 1) / 2) * 0.16
            ends = sorted((row[k] - row["chance"]) / unit for k in ("low", "high"))
            color = palette[row["of_stage"]]
            low, high = np.clip(ends, -1e3, 1e3)
            axis.plot([low, high], [place] * 2, "-", color=color, lw=1.8, zorder=3)
            face = "white" if row["at_chance"] else color
            at = (row["estimate"] - row["chance"]) / unit
            mark = "o" if not abs(at) > FARTHEST else ">" if at > 0 else "<"
            axis.plot(
                [np.clip(at, -FARTHEST, FARTHEST)], [place], mark, color=color, mfc=face,
                ms=5.5, zorder=stage_axes.ESTIMATE,
            )  # fmt: skip
            own = chosen(raw, family, row["item"], row["measure"], "text")
            each = own[own["of_stage"] == row["of_stage"]]["estimate"]
            if len(each) > 1:
                axis.plot((each - row["chance"]) / unit, [place] * len(each), "|", color="0.5",
                          ms=5, zorder=5)  # fmt: skip
    axis.axvline(0, **(stage_axes.CHANCE if scaled else stage_axes.TRUTH))
    if scaled:
        axis.axvline(1, **stage_axes.TRUTH)
    axis.set_xlim(_reach(axis, scaled))
    axis.set_yticks(range(len(families)), families)
    axis.set_ylim(len(families) - 0.5, -0.5)
    axis.grid(False, axis="y")
    what = "estimate: 0 is chance, 1 is what was planted"
    alone = "estimate, own units: nothing is planted, truth and chance are 0"
    axis.set(xlabel=what if scaled else alone, ylabel="family of audits" if scaled else "")


def _reach(axis: Axes, scaled: bool) -> tuple[float, float]:
    """From chance to the truth and some way on, and as far as there are estimates."""
    points = [x for x, _ in stage_axes.estimates(axis)]
    low, high = (-WITHIN / 4, WITHIN) if scaled else (0.0, 0.1)
    low, high = min([low, *points]), max([high, *points])
    span = high - low
    if not scaled:
        return low - 0.1 * span, high + 0.5 * span
    return low - 0.05 * span * (low in points), high + 0.05 * span * (high in points)
