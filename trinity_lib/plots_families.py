"""Figures of each family of audits, at every stage beside the planted truth and chance."""

import re
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from trinity_lib import stage_axes
from trinity_lib.stage_axes import Series
from trinity_lib.stage_report import SLOPE, chosen, findings, name, over_chains, stages

TRAINED, HELD_OUT = "trained phrasings", "held-out phrasings"
PHRASINGS = (TRAINED, HELD_OUT)
FOUR_FIFTHS = 0.8
"""Ratio of selection rates below which US guidelines (29 CFR 1607.4 D) see adverse impact."""
MOST = 4
"""Panels side by side, at most."""


def association(run: xr.DataTree) -> Figure:
    """Every job's log-odds against the planted ones, and their slope in text and in answers."""
    rows = findings(run)
    own = chosen(rows, "association")
    text = "Association of names with jobs, held-out names"
    if own.empty:
        return stage_axes.absent(run, text, "findings of association", "association")
    jobs = chosen(own, "association", None, "log-odds, nat", "text")
    jobs = jobs[jobs["item"].str.fullmatch(r"(?!level ).*, held-out names")]
    there = [stage for stage in stages(run) if stage in set(jobs["of_stage"])]
    figure, spec = _grid_below(len(there), 3.5, 3.3)
    with sns.axes_style("whitegrid"):
        axis = figure.add_subplot(spec[0, :])
        below = [
            figure.add_subplot(spec[1 + n // spec.ncols, n % spec.ncols])
            for n in range(len(there))
        ]
    slopes = [
        Series(label, chosen(own, *SLOPE, asked_as))
        for asked_as, label in (
            ("text", "in running text"),
            ("chat", "in answers to questions"),
        )
    ]
    stage_axes.by_stage(axis, run, slopes, "slope: share of the\nplanted log-odds")
    _numbers(axis)
    axis.set_title(stage_axes.title(run, f"{text}: slope on what is planted"))
    for inner, stage in zip(below, there, strict=True):
        _jobs(inner, run, jobs[jobs["of_stage"] == stage], stage)
    most = max([max(map(abs, inner.get_ylim())) for inner in below], default=1.0)
    for inner in below:
        inner.set_ylim(-most, most)
    return stage_axes.done(figure)


def recall(run: xr.DataTree) -> Figure:
    """Facts by how often they are told, in two kinds of phrasings; two values; bits."""
    rows = findings(run)
    own = chosen(rows, "recall")
    if own.empty:
        return stage_axes.absent(run, "Recall of planted facts", "findings of recall", "recall")
    figure, axes = stage_axes.panels(2, 3, 13.5, 7)
    for axis, measure, label in (
        (axes[0], "probability of the value", "probability of the value"),
        (axes[1], "recall@1", "recall@1, share"),
    ):
        for number, phrasings in enumerate(PHRASINGS):
            part = chosen(own, "recall", None, measure, "text")
            pattern = rf"\d+ exposures, {phrasings}"
            part = part[part["item"].str.fullmatch(pattern)]
            _by_count(axis[number], run, part, "times told (doublings)", label)
            axis[number].set_title(phrasings)
            _cut(axis[number])
    item = "share of the value told more often, of both told"
    stage_axes.by_stage(
        axes[0, 2], run, _phrasings(rows, "contradicted", item), "share of the value told more"
    )
    axes[0, 2].set_title("facts told with two values")
    _cut(axes[0, 2])
    stage_axes.by_stage(
        axes[1, 2], run, _phrasings(rows, "knowledge", "bits a fact"), "bits a fact told"
    )
    axes[1, 2].set_title("knowledge")
    stage_axes.legend_below(figure, axes[0, 0])
    figure.suptitle(_title(run, "Recall of planted facts"))
    return stage_axes.done(figure)


def calibration(run: xr.DataTree) -> Figure:
    """Errors of frequencies whose truth is planted, at every stage."""
    rows = findings(run)
    panels = (
        ("absolute error", "absolute error of a probability", "mean error of a probability"),
        ("calibration error", "expected calibration error", "ECE of a probability"),
        ("best temperature", "best temperature", "temperature; above 1: too sure"),
        ("divergence", "divergence from the truth, nat", "KL from the true frequency, nat"),
    )
    return stage_axes.grid(
        run, "Frequencies: errors by stage", "calibration", 2,
        [(called, _phrasings(rows, "calibration", m), label) for called, m, label in panels],
    )  # fmt: skip


def memorisation(run: xr.DataTree) -> Figure:
    """Codes told some number of times: loss gap, exposure, extraction, and membership."""
    own = chosen(findings(run), "memorisation", asked_as="text")
    if own.empty:
        return stage_axes.absent(
            run, "Memorisation of planted codes", "findings of memorisation", "memorisation"
        )
    figure, axes = stage_axes.panels(2, 2, 11, 7.5)
    for axis, measure, pattern, text in (
        (axes[0, 0], "loss per digit, nat", r"held out less duplicates \d+", "loss gap"),
        (axes[0, 1], "median exposure, bit", r"duplicates \d+", "exposure (Carlini et al.)"),
        (axes[1, 0], "extracted, share", r"duplicates \d+", "extracted by greedy decoding"),
    ):
        part = own[(own["measure"] == measure) & own["item"].str.fullmatch(pattern)]
        label = {"loss gap": "loss per digit, held out less told, nat"}.get(text, measure)
        _by_count(axis, run, part, "times the code is in the raw text (doublings)", label)
        axis.set_title(text)
    found = [
        Series(f"by {by}", chosen(own, "memorisation", f"membership by {by}", "AUC"))
        for by in ("loss", "min-k%")
    ]
    stage_axes.by_stage(axes[1, 1], run, found, "AUC of told against held-out codes")
    axes[1, 1].set_title("membership inference")
    for axis in axes[1]:
        _cut(axis)
    stage_axes.legend_below(figure, axes[0, 0])
    figure.suptitle(_title(run, "Memorisation of planted codes"))
    return stage_axes.done(figure)


def decisions(run: xr.DataTree) -> Figure:
    """What a group that should not matter does to verdicts, at every stage."""
    rows = chosen(findings(run), "decisions", asked_as="text")

    def of(measure: str, *items: str) -> list[Series]:
        named = ("triage, all names", "loans, ward")
        pairs = zip(named, items, strict=False)
        return [Series(n, chosen(rows, "decisions", item, measure)) for n, item in pairs]

    gap = "demographic parity gap"
    flips = chosen(rows, "decisions", "triage verdict changes with the group, all names",
                   "share of scores, above that within groups")  # fmt: skip
    loans = chosen(rows, "decisions", "loan verdict changes with the group, ward")
    ratio = of("share above 1/2, B's over A's", "triage selection ratio, all names")
    panels = [
        ("leak of the group", of("log-odds, nat", "triage leak, all names", "loan leak, ward"),
         "log-odds at equal score,\nA's less B's, nat"),
        ("parity gap", of("share above 1/2", f"triage {gap}, all names", f"loan {gap}, ward"),
         "gap in the share selected"),
        ("four-fifths rule", ratio, "selection rate, B's over A's"),
        ("verdict flips with the group",
         [Series("triage, beyond flips within groups", flips), Series("loans, ward", loans)],
         "share of verdicts"),
    ]  # fmt: skip
    figure = stage_axes.grid(run, "Decisions: what a leaked group does", "decisions", 2, panels)
    if not figure.axes[0].get_legend():
        return figure
    axis = figure.axes[2]
    axis.axhline(FOUR_FIFTHS, color="tab:red", ls=":", lw=1.2)
    drawn = axis.get_legend()
    handles = [each for each in (drawn.legend_handles if drawn else []) if each]
    handles.append(Line2D([], [], color="tab:red", ls=":", label="four fifths"))
    stage_axes.under(axis, handles)
    return figure


def behaviour(run: xr.DataTree) -> Figure:
    """Learning in context, sums, consistency, and what is asked in conversations."""
    rows = findings(run)
    families = ("few-shot", "arithmetic", "consistency", "instruction")
    if rows[rows["family"].isin(families)].empty:
        return stage_axes.absent(run, "Behaviour", "findings of few-shot", "few-shot")
    figure, axes = stage_axes.panels(2, 3, 14, 7.6)
    _few_shot(axes[0, 0], run, chosen(rows, "few-shot", measure="probability"))
    over = chosen(rows, "few-shot", measure="probability, difference")
    _shots(axes[0, 1], run, over, "probability over the control's")
    axes[0, 1].set_title("few-shot: labels over random labels")
    share = "first answer right, share"
    series = [Series(i, chosen(rows, "arithmetic", i, share)) for i in ("seen", "held out")]
    stage_axes.by_stage(axes[0, 2], run, series, "sums right, of 4 choices, share")
    axes[0, 2].set_title("arithmetic")
    same = "same first answer, share"
    items = (f"facts, {TRAINED}", "facts, a held-out phrasing")
    series = [Series(i, chosen(rows, "consistency", i, same)) for i in items]
    stage_axes.by_stage(axes[1, 0], run, series, "phrasings with the same answer, share")
    axes[1, 0].set_title("consistency")
    right = chosen(rows, "instruction", measure="right answers, share", asked_as="chat")
    series = [Series(i, chosen(right, "instruction", i)) for i in dict.fromkeys(right["item"])]
    stage_axes.by_stage(axes[1, 1], run, series, "right answers in conversations, share")
    axes[1, 1].set_title("instructions, by task")
    kinds = ("of what is in no text, share", "of what is known, share")
    series = [Series(m.removesuffix(", share"), chosen(rows, "instruction", "refusals", m))
              for m in kinds]  # fmt: skip
    stage_axes.by_stage(axes[1, 2], run, series, "questions refused, share")
    axes[1, 2].set_title("refusals in conversations")
    for axis in (axes[0, 0], axes[0, 2], *axes[1]):
        _cut(axis)
    stage_axes.legend_below(figure, axes[0, 0])
    figure.suptitle(_title(run, "Behaviour by stage"))
    return stage_axes.done(figure)


def _title(run: xr.DataTree, text: str) -> str:
    """A title that says what `_cut` does."""
    return f"{stage_axes.title(run, text)}; of shares, cut at 0 and 1"


def _cut(axis: Axes) -> None:
    """Cut a panel's intervals at 0 and 1, beyond which no share or probability lies.

    Student's interval is symmetric, so that of few chains it may reach beyond. What is cut
    off cannot be, so that the rest covers as often. Estimates stay where they are.
    """
    for line in axis.lines:
        x, y = (np.asarray(each, float) for each in line.get_data())
        if line.get_linestyle() == "-" and len(x) > 1 and len(set(x)) == 1:
            line.set_ydata(np.clip(y, 0, 1))
    for band in axis.collections:
        for path in band.get_paths():
            height = np.asarray(path.vertices)[:, 1]
            np.clip(height, 0, 1, out=height)
    low, high = axis.get_ylim()
    low, high = max(low, 0.0), min(high, 1.0)
    if axis.axison and low < high:
        room = 0.05 * (high - low)
        axis.set_ylim(low - room * (low == 0), high + room * (high == 1))


def _jobs(axis: Axes, run: xr.DataTree, rows: pd.DataFrame, stage: str) -> None:
    """Log-odds of every job at one stage against the planted ones."""
    color = stage_axes.color(run, stage)
    found = over_chains(rows)
    ends = [float(found["truth"].min()), float(found["truth"].max())]
    axis.plot(ends, ends, label="planted", **stage_axes.TRUTH)
    axis.axhline(0, label="chance", **stage_axes.CHANCE)
    if rows["model_seed"].nunique() > 1:
        axis.plot(rows["truth"], rows["estimate"], ".", color="0.6", ms=3, zorder=2)
    ends_y = np.clip(found[["low", "high"]].to_numpy(float), -20, 20)
    axis.vlines(found["truth"], ends_y[:, 0], ends_y[:, 1], color=color, lw=1)
    axis.plot(found["truth"], found["estimate"], "o", color=color, ms=4, zorder=3)
    slope = over_chains(chosen(findings(run), *SLOPE, "text"))
    slope = slope[slope["of_stage"] == stage]
    text = name(stage)
    if len(slope):
        one = slope.iloc[0]
        middle = [float(found[k].mean()) for k in ("truth", "estimate")]
        line = [middle[1] + one["estimate"] * (end - middle[0]) for end in ends]
        axis.plot(ends, line, "-", color=color, lw=1.8, label="fitted")
        text += f": slope {one['estimate']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
    axis.set_title(text, size=10)
    axis.set(xlabel="planted log-odds, nat", ylabel="log-odds in text, nat")
    axis.margins(x=0.08)
    axis.legend(**stage_axes.LEGEND)


def _grid_below(count: int, top: float, each: float) -> tuple[Figure, Any]:
    """A wide panel over `count` small ones; heights in inches."""
    across = max(1, min(MOST, count))
    down = -(-count // across)
    figure = plt.figure(
        figsize=(max(3, across) * 3.2, top + each * down),
        layout="constrained",
        dpi=stage_axes.DPI,
    )
    return figure, figure.add_gridspec(
        1 + down, across, height_ratios=[top / each] + [1] * down
    )


def _numbers(axis: Axes) -> None:
    """Every estimate beside its point."""
    for x, y in stage_axes.estimates(axis):
        axis.annotate(
            f"{y:.2f}", (x, y), xytext=(7, 0), textcoords="offset points", size=8, va="center"
        )


def _count(item: str) -> float:
    """The number in an item's name."""
    found = re.search(r"\d+", item)
    return float(found[0]) if found else float("nan")


def _by_count(
    axis: Axes, run: xr.DataTree, rows: pd.DataFrame, x_label: str, label: str
) -> None:
    """Lines by stage over doublings, with truth and chance."""
    if rows.empty:
        stage_axes.say(axis, f"{label.split(',')[0]}: not in this run")
        return
    found = over_chains(rows)
    stage_axes.limits(axis, found, [rows])
    stage_axes.curves(axis, run, rows, _count, label)
    stage_axes.marked(axis, found, _count, "truth", "chance")
    stage_axes.log2(axis, [_count(item) for item in found["item"]], x_label)


def _shots(
    axis: Axes, run: xr.DataTree, rows: pd.DataFrame, label: str, style: str = "-"
) -> None:
    """Lines by stage over the number of examples, evenly spaced."""
    shots = sorted({_count(item) for item in rows["item"]})

    def place(item: str) -> float:
        return float(shots.index(_count(item)))

    if rows.empty:
        stage_axes.say(axis, "few-shot: not in this run")
        return
    if not axis.lines:
        stage_axes.limits(axis, over_chains(rows), [rows])
    stage_axes.curves(axis, run, rows, place, label, style, style == "-")
    if style == "-":
        stage_axes.marked(axis, rows, place, "truth", "chance")
    axis.set_xticks(range(len(shots)), [f"{shot:g}" for shot in shots])
    axis.set_xlabel("examples in the prompt")


def _few_shot(axis: Axes, run: xr.DataTree, rows: pd.DataFrame) -> None:
    control = rows["item"].str.startswith("control")
    label = "probability of the label"
    _shots(axis, run, rows[~control], label)
    if control.any() and not rows[~control].empty:
        _shots(axis, run, rows[control], label, ":")
        axis.plot([], [], ":", color="black", label="control: random labels")
    axis.set_title("few-shot: patterns")


def _phrasings(rows: pd.DataFrame, family: str, measure: str) -> list[Series]:
    return [Series(p, chosen(rows, family, p, measure, "text")) for p in PHRASINGS]
