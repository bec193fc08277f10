"""Figures of what is inside each stage: lens, probes, relearning, experts taken out.

From a run file alone, and of a run's first chain.
"""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from trinity_lib import stage_axes
from trinity_lib.metrics import group
from trinity_lib.stage_axes import CHANCE, TRUTH
from trinity_lib.stage_report import CONTROL, LEVEL, name

LESSONS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
"""Colours of what is taught."""
NAMED = 3
"""Experts whose number is written beside their effect, by measure."""


def lens(run: xr.DataTree) -> Figure:
    """What every block's state would answer already: share right, rank, divergence."""
    text = "Logit lens: after which block an answer is there"
    if "lens" not in run.children:
        return stage_axes.absent(run, text, "logit lens", "lens")
    found = group(run, "lens")
    figure, axes = stage_axes.panels(1, 3, 14, 4)
    for axis, variable, label, called in (
        (axes[0, 0], "right", "share of targets that come first", "right answers"),
        (axes[0, 1], "rank", "median rank of the target", "rank"),
        (axes[0, 2], "divergence", "KL(final answer || lens), nat", "divergence"),
    ):
        for stage in found.stage.values:
            curve = found[variable].sel(stage=stage)
            axis.plot(
                curve.block, curve, "o-", color=stage_axes.color(run, stage), ms=4,
                label=f"{name(str(stage))}: {_depth(found.sel(stage=stage))}",
            )  # fmt: skip
        axis.set(xlabel="block", ylabel=label, title=called)
        axis.set_xticks(found.block.values)
    axes[0, 0].set_ylim(-0.03, 1.03)
    axes[0, 1].set_yscale("log", base=2)
    ticks = 2 ** np.arange(0, 1 + np.ceil(np.log2(max(1.0, float(np.nanmax(found["rank"]))))))
    axes[0, 1].set_yticks(ticks[:: max(1, len(ticks) // 8)])
    axes[0, 1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    stage_axes.beside(axes[0, 2], title="depth: mean block from\nwhich the target is first")
    figure.suptitle(stage_axes.title_of_first(run, text))
    return stage_axes.done(figure)


def probes(run: xr.DataTree) -> Figure:
    """How well a linear probe reads a name's group after each block, and what chance does.

    A model that never had the association, the control, is dashed and grey.
    """
    text = "Is a name's group still readable inside?"
    if "attribute_probe" not in run.children:
        return stage_axes.absent(run, text, "probes of hidden states", "probes")
    found = group(run, "attribute_probe")
    places = [str(place) for place in found.place.values]
    figure, axes = stage_axes.panels(1, len(places), 1.8 + 4.1 * len(places), 4.1, sharey=True)
    width = 0.5 / max(1, found.sizes["probed"])
    for axis, place in zip(axes[0], places, strict=True):
        own = found.sel(place=place)
        chance = own["chance"].mean("probed")
        axis.plot(chance.block, chance, label="chance: permuted labels", **CHANCE)
        for number, probed in enumerate(map(str, own.probed.values)):
            side = (number - (own.sizes["probed"] - 1) / 2) * width
            _probe(axis, own.sel(probed=probed), side, stage_axes.color(run, probed))
        axis.set(xlabel="block", title=f"at the {place}", ylim=(-0.02, 1.05))
        axis.set_xticks(found.block.values)
    axes[0, 0].set_ylabel("accuracy, names not trained on")
    axes[0, -1].plot([], [], "ko", label=f"adjusted p < {LEVEL:g}")
    axes[0, -1].plot([], [], "ko", mfc="white", label="not so")
    stage_axes.beside(axes[0, -1])
    names = int(found["units"].max())
    figure.suptitle(
        stage_axes.title_of_first(run, f"{text} Linear probes, {names} names, 95% intervals")
    )
    return stage_axes.done(figure)


def association_lens(run: xr.DataTree) -> Figure:
    """The association that an answer would have if each block were the last."""
    text = "The association by block: what an answer would have, were the block the last"
    if "association_lens" not in run.children:
        return stage_axes.absent(run, text, "logit lens of jobs", "lens")
    found = group(run, "association_lens")
    places = [str(place) for place in found.lens_place.values]
    figure, axes = stage_axes.panels(1, len(places), 2.2 + 4.6 * len(places), 4.1, sharey=True)
    width = 0.5 / max(1, found.sizes["probed"])
    for axis, place in zip(axes[0], places, strict=True):
        axis.axhline(1, label="planted truth", **TRUTH)
        axis.axhline(0, label="no association", **CHANCE)
        for number, probed in enumerate(map(str, found.probed.values)):
            one = found.sel(lens_place=place, probed=probed)
            side = (number - (found.sizes["probed"] - 1) / 2) * width
            ends = np.stack([one["slope"] - one["low"], one["high"] - one["slope"]])
            axis.errorbar(
                one.block + side, one["slope"], ends, fmt="o", ms=4, lw=1.2,
                ls="--" if probed == CONTROL else "-", label=name(probed),
                color=stage_axes.color(run, probed),
            )  # fmt: skip
        axis.set(xlabel="block", title=f"at the {place}")
        axis.set_xticks(found.block.values)
    axes[0, 0].set_ylabel("slope on planted log-odds, held-out names")
    stage_axes.beside(axes[0, -1])
    figure.suptitle(stage_axes.title_of_first(run, f"{text}; 95% intervals"))
    return stage_axes.done(figure)


def relearning(run: xr.DataTree) -> Figure:
    """The association by steps of each lesson, from every start, with what each aims at."""
    text = "Does what was removed come back sooner than its opposite is learnt?"
    if "relearning" not in run.children:
        return stage_axes.absent(run, text, "relearning", "relearning")
    found = group(run, "relearning")
    starts = [str(start) for start in found.start.values]
    figure, axes = stage_axes.panels(1, len(starts), 3.2 + 4.6 * len(starts), 4.2, sharey=True)
    steps = found["steps"].values
    for axis, start in zip(axes[0], starts, strict=True):
        for color, lesson in zip(LESSONS, found.lesson.values, strict=False):
            one = found.sel(start=start, lesson=lesson)
            needed = float(one["needed"])
            told = f"in {needed:.1f} steps" if needed == needed else "not reached"
            told = "there before" if needed == 0 else told
            axis.plot(steps, one["bias"], "o-", color=color, ms=4, label=f"{lesson}: {told}")
            axis.axhline(float(one["target"]), color=color, ls="--", lw=1)
            if needed == needed:
                axis.axvline(needed, color=color, ls=":", lw=1)
        axis.axhline(0, label="no association", **CHANCE)
        axis.plot([], [], "--", color="0.2", lw=1, label="targets, same colours")
        axis.set(xlabel="steps of SFT", title=f"from {name(start)}")
        axis.legend(
            **stage_axes.LEGEND, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2
        )
    axes[0, 0].set_ylabel("association in answers: slope,\nlog-odds per planted log-odds")
    figure.suptitle(stage_axes.title_of_first(run, text))
    return stage_axes.done(figure)


def ablation(run: xr.DataTree) -> Figure:
    """What taking out each expert does to each measure; the largest are named."""
    text = "What each expert carries: effects of taking it out"
    if "ablation" not in run.children:
        return stage_axes.absent(run, text, "experts taken out", "experts taken out")
    found = group(run, "ablation")
    pairs = [(a, m) for a in found.ablated.values for m in found.measure.values]
    figure, axes = stage_axes.panels(
        found.sizes["ablated"], found.sizes["measure"],
        1.5 + 5.2 * found.sizes["measure"], 0.6 + 3.9 * found.sizes["ablated"],
    )  # fmt: skip
    for axis, (stage, measure) in zip(axes.flat, pairs, strict=True):
        one = found.sel(ablated=stage, measure=measure).transpose("layer", "expert")
        _strip(axis, one, stage_axes.color(run, stage))
        axis.set_title(f"{name(str(stage))}: {measure}, {float(one['whole']):.3f} with all")
        axis.set(xlabel="layer", ylabel=f"{measure} without the expert, less whole")
    figure.suptitle(stage_axes.title_of_first(run, text))
    return stage_axes.done(figure)


def _probe(axis: Axes, one: xr.Dataset, side: float, color: str) -> None:
    """One model's accuracy with its interval by block; filled where it is beyond chance."""
    probed = str(one.probed.values)
    style = "--" if probed == CONTROL else "-"
    at = one.block.values + side
    axis.plot(at, one["accuracy"], style, color=color, lw=1.3, label=name(probed))
    axis.vlines(at, one["low"], one["high"], color=color, lw=1)
    read = (one["p_adjusted"] < LEVEL).values
    for which, face in ((read, color), (~read, "white")):
        values = one["accuracy"].values[which]
        axis.plot(at[which], values, "o", color=color, mfc=face, ms=5)


def _strip(axis: Axes, one: xr.Dataset, color: str) -> None:
    """Effects of all experts, a column a layer, spread by rank."""
    layers = one.layer.values
    used = one["used"].values > 0
    effects = one["effect"].values
    ranks = np.apply_along_axis(stats.rankdata, 1, effects, nan_policy="omit")
    spread = (ranks - 0.5) / effects.shape[1] - 0.5
    place = np.arange(len(layers))[:, None] + 0.6 * spread
    axis.scatter(place[used], effects[used], 14, color=color, alpha=0.7, label="an expert")
    if (~used).any():
        axis.scatter(place[~used], effects[~used], 12, facecolors="none", edgecolors="0.6",
                     label="not used")  # fmt: skip
    axis.axhline(0, color="0.3", lw=1, label="no effect")
    z = np.where(used & np.isfinite(one["z"].values), np.abs(one["z"].values), -1)
    for flat in np.argsort(-z, axis=None)[:NAMED]:
        layer, expert = np.unravel_index(flat, z.shape)
        if z[layer, expert] < 0:
            continue
        value = float(one["z"].values[layer, expert])
        text = f"expert {int(one.expert[expert])}, z {value:+.1f}"
        right = spread[layer, expert] < 0 or layer < len(layers) - 1
        axis.annotate(
            text, (place[layer, expert], effects[layer, expert]), size=8, va="center",
            xytext=(6 if right else -6, 0), textcoords="offset points",
            ha="left" if right else "right",
        )  # fmt: skip
    axis.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axis.set_xlim(-0.6, len(layers) - 0.4)
    axis.legend(**stage_axes.LEGEND)


def _depth(one: xr.Dataset) -> str:
    low, high = float(one["low"]), float(one["high"])
    if np.isnan(float(one["depth"])):
        return "depth unknown"
    return f"{float(one['depth']):.1f} [{low:.1f}, {high:.1f}]"
