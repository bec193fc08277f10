"""Figures of a rehearsal: what a step would hold; each says that nothing was trained."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

BANNER = "REHEARSED, NOT TRAINED"
PARTS = {
    "weights": "fp32 weights",
    "gradients": "fp32 gradients",
    "optimizer": "optimiser state",
    "gathered": "whole weights in flight",
    "unreduced": "whole gradients in flight",
    "kept": "activations kept",
    "working": "activations of one block",
    "logits": "logits",
    "exchange": "expert exchange",
    "stepping": "optimiser's temporaries",
}
"""What figures and plans call the parts of memory."""


def banner(run: xr.DataTree, missing: str) -> Figure:
    """In place of a figure of training that a rehearsal has not got."""
    figure, axis = plt.subplots(figsize=(9, 1.1), dpi=110)
    axis.set_axis_off()
    reason = str(run.attrs["reason"]).removeprefix(f"{BANNER}: ")
    text = f"{BANNER}: no {missing}. {reason[:1].upper()}{reason[1:]}"
    figure.text(0.5, 0.5, text, ha="center", va="center", wrap=True, color="tab:red")
    plt.close(figure)
    return figure


def memory(run: xr.DataTree) -> Figure:
    """Bytes of a GPU by part at the moments of a step, planned beside traced."""
    held = run["rehearsed_memory"].to_dataset() / 1e9
    parts = [str(part) for part in held.part.values]
    moments = [str(moment) for moment in held.moment.values]
    with sns.axes_style("whitegrid"):
        figure, axis = plt.subplots(figsize=(9, 5), layout="constrained", dpi=110)
    colours = sns.color_palette("tab10", len(parts))
    for side, name, hatch in ((-0.21, "planned", "//"), (0.21, "traced", "")):
        values = np.nan_to_num(held[name].transpose("part", "moment").values)
        below = np.zeros(len(moments))
        for part, colour, row in zip(parts, colours, values, strict=True):
            axis.bar(
                np.arange(len(moments)) + side, row, 0.38, bottom=below, color=colour,
                hatch=hatch, edgecolor="white", lw=0.4,
                label=None if hatch else PARTS.get(part, part),
            )  # fmt: skip
            below += row
    usable = run.attrs["bytes_usable"] / 1e9
    axis.axhline(usable, color="0.3", ls="--", lw=1)
    axis.annotate(
        f"usable of a {run.attrs['gpu']}", (len(moments) - 0.5, usable),
        ha="right", va="bottom", fontsize=8,
    )  # fmt: skip
    axis.bar([0], [0], color="0.7", hatch="//", edgecolor="white", label="hatched: planned")
    labels = [moment.replace(" ", "\n") for moment in moments]
    axis.set_xticks(np.arange(len(moments)), labels)
    axis.set(ylabel="GB on a GPU", xlabel="moment of an optimiser step (fullest point of each)")
    axis.set_title(
        f"{BANNER}: memory of one of {run.attrs['ranks']:,} {run.attrs['gpu']}, "
        f"{run.attrs['scale']}\nleft of each pair: planned from shapes; right: traced"
    )
    sns.despine(ax=axis)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    plt.close(figure)
    return figure
