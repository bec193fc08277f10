"""Figures of simulated routers, each readable without the text around it; never torch."""

from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from trinity_lib.report import NAMES

SETTLED = 0.5
"""Share of the steps after which a figure's means begin."""


def trajectories(first: xr.Dataset, second: xr.Dataset) -> Figure:
    """MaxVio, dead experts and every expert's bias under two balancers, side by side."""
    # A layout engine would take half of the time, and an app redraws this.
    figure, axes = _figure(3, 2, width=10, height=7, sharex=True, sharey="row", layout="none")
    figure.subplots_adjust(0.09, 0.07, 0.99, 0.92, wspace=0.05, hspace=0.08)
    runs = (first, second)
    for column, run, color in zip(axes.T, runs, ("tab:blue", "tab:orange"), strict=True):
        late = run["max_vio"].isel(step=slice(int(SETTLED * run.sizes["step"]), None))
        column[0].plot(run.step, run["max_vio"], color=color, lw=1)
        column[0].axhline(run.attrs["floor"], color="black", ls="--", lw=1)
        column[1].fill_between(run.step, 100 * run["dead"], color=color, alpha=0.5, lw=0)
        column[1].plot(run.step, 100 * run["dead"], color=color, lw=1)
        lines = [np.column_stack((run.kept, bias)) for bias in run["bias"].values.T]
        column[2].add_collection(LineCollection(lines, colors=color, lw=0.6, alpha=0.5))
        column[2].autoscale_view()
        end = float(run["dead"][-1])
        column[0].set_title(
            f"{_title(run)}: late MaxVio {float(late.mean()):.2f}, dead {end:.0%}\n"
            f"(dashed: uniform routing, {run.attrs['floor']:.2f})",
            fontsize=10,
        )
        column[2].set_xlabel("balancer step")
    axes[0, 0].set_yscale("symlog", linthresh=1)
    axes[0, 0].set(ylabel="MaxVio\n(highest / mean load, less 1)", ylim=(0, None))
    most = max(100 * float(run["dead"].max()) for run in runs)
    axes[1, 0].set(ylabel="dead experts, %", ylim=(0, max(5.0, 1.05 * most)))
    axes[2, 0].set(ylabel="bias of every expert\n(units of the score)")
    return _done(figure)


def stability(measured: xr.Dataset) -> Figure:
    """Growth of SMEBU's swing by momentum and loop gain, the measured boundary, the bound."""
    figure, axes = _figure(1, 1, width=8, height=5)
    axis, scale = axes[0, 0], measured.attrs["kappa"] * measured.attrs["slope"]
    x, y = np.meshgrid(measured["beta"], measured["gain"], indexing="ij")
    exponent = np.log10(np.maximum(measured["growth"].values, 1e-3))
    points = axis.scatter(x, y, c=exponent, cmap="RdBu_r", vmin=-3, vmax=3, s=60, marker="s")
    bar = figure.colorbar(points, ax=axis, ticks=[-3, -1, 0, 1, 3])
    bar.ax.set_yticklabels(["1/1000", "1/10", "1", "10", "1000"])
    bar.set_label(f"swing after {measured.attrs['steps']} steps / before")
    betas = np.linspace(0, max(0.01, float(measured["beta"].max())), 200)
    axis.plot(betas, 2 * (1 + betas) / (1 - betas), "k--", lw=1, label="bound, 2(1+β)/(1-β)")
    axis.plot(
        measured["beta"], measured["boundary"] * scale, "ko", mfc="none", ms=11, mew=1.5,
        label="measured boundary",
    )  # fmt: skip
    ratio = (measured["boundary"] / measured["bound"]).values
    about = measured.attrs
    axis.set_title(
        "Where SMEBU's loop begins to swing: "
        f"measured / bound {ratio.min():.2f} to {ratio.max():.2f}\n"
        f"(slope S {about['slope']:.1f} ± {about['slope_error']:.1f})"
    )
    axis.set(xlabel="momentum β", ylabel="loop gain λκS", yscale="log")
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2)
    return _done(figure)


def recovery(measured: xr.Dataset) -> Figure:
    """Steps until dead experts are back, by score gap: measured, and gap / closing speed."""
    figure, axes = _figure(1, 2, width=10, height=4, sharex=True, sharey=True)
    titles = {"collapse": "Collapse: few hot experts, all others dead",
              "one dead": "One dead expert, all others balanced"}  # fmt: skip
    for axis, case in zip(axes[0], measured["case"].values, strict=True):
        for color, method in zip(
            sns.color_palette(), measured["balancer"].values, strict=False
        ):
            here = measured.sel(case=case, balancer=method)
            name = NAMES[str(method)]
            axis.plot(here.gap, here["steps"], "o", color=color, label=f"{name}, measured")
            axis.plot(here.gap, here["predicted"], "-", color=color, label=f"{name}, predicted")
        axis.set(xlabel="score gap of the dead", title=titles[str(case)])
    axes[0, 0].set(ylabel="steps until back", ylim=(0, None), xlim=(0, None))
    axes[0, 1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    rate = measured.attrs["rate"]
    figure.suptitle(
        f"Recovery of dead experts, λ = u = {rate:g}, κ = {measured.attrs['kappa']:g}"
    )
    return _done(figure)


def noise(measured: xr.Dataset) -> Figure:
    """Bias jitter and excess MaxVio at equilibrium against tokens a step, by balancer."""
    figure, axes = _figure(1, 2, width=10, height=4, sharex=True)
    for color, method in zip(sns.color_palette(), measured["balancer"].values, strict=False):
        here = measured.sel(balancer=method)
        name = NAMES[str(method)]
        axes[0, 0].plot(here.tokens, here["jitter"], "o-", color=color, label=name)
        axes[0, 1].plot(here.tokens, here["excess"], "o-", color=color, label=name)
    for axis, label in zip(
        axes[0],
        ("spread of the bias (units of the score)", "MaxVio less its floor"),
        strict=True,
    ):
        axis.set(xscale="log", xlabel="tokens a step", ylabel=label)
    axes[0, 0].set(yscale="log", title="Jitter of the bias at equilibrium")
    axes[0, 1].set(
        title="Excess MaxVio at equilibrium",
        ylim=(min(0, *measured["excess"].values.flat), None),
    )
    axes[0, 1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    about = measured.attrs
    figure.suptitle(
        f"{about['experts']} equal experts, top-{about['top_k']}, λ = u = {about['rate']:g}"
    )
    return _done(figure)


def png(figure: Figure) -> bytes:
    """The figure as a PNG, rendered once: a page that renders for itself does so twice."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _title(run: xr.Dataset) -> str:
    """A balancer's name, and its step size where it has one."""
    method, rate = run.attrs["method"], run.attrs["rate"]
    step = {"smebu": ", λ", "sign": ", u", "loss_free": ", u", "proportional": ", u"}.get(
        method
    )
    return NAMES[method] + (f" {rate:g}".join((step, "")) if step else "")


def _figure(rows: int, columns: int, width: float, height: float, **settings: Any) -> tuple:
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, dpi=100,
            **{"layout": "constrained", **settings},
        )  # fmt: skip
    for axis in axes.flat:
        sns.despine(ax=axis)
    return figure, axes


def _done(figure: Figure) -> Figure:
    """Close it in pyplot, so that a notebook shows the returned figure once."""
    plt.close(figure)
    return figure
