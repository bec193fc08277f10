"""Figures, tables and the reading of a run that measured kernels; from its file alone."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trinity_lib.metrics import group

LIMITS = {"float32": 10.0, "bfloat16": 1.5}
"""A backend agrees with float64 where its errors stay within this many epsilons.

fp32 sums in its own precision and reaches 4; bf16 sums in fp32 and reaches 0.6.
"""
BASE = "torch"
"""The backend that speeds are compared with."""
MIDDLE = (0.25, 0.5, 0.75)
"""Quartiles: what is drawn of the repetitions."""
MARKERS = "osD^v"


def agreement(run: xr.DataTree) -> Figure:
    """Every relative error against float64, by quantity and backend, beside the epsilon."""
    error = group(run, "agreement")["error"]
    epsilon, limit = float(run.attrs["epsilon"]), _limit(run)
    # inf, a result that is not finite, is drawn at the top; 0 has no place on a log scale
    error = error.clip(epsilon / 100, 1)
    palette, names = _palette(run), _with_values(error)
    with sns.axes_style("whitegrid", {"axes.grid.axis": "y"}):
        figure, axis = plt.subplots(figsize=(9.5, 4), layout="constrained", dpi=110)
    tokens = np.linspace(-0.07, 0.07, error.sizes["tokens"])
    for number, name in enumerate(names):
        place = np.arange(error.sizes["quantity"]) + 0.24 * (number - (len(names) - 1) / 2)
        for marker, routing in zip(MARKERS, error.routing.values, strict=False):
            values = error.sel(backend=name, routing=routing).transpose("quantity", "tokens")
            axis.plot(
                (place[:, None] + tokens).ravel(), values.values.ravel(), marker,
                color=palette[name], ms=5, alpha=0.7,
            )  # fmt: skip
        label = f"{name}, {_reach(error, name)}"
        axis.plot([], [], lw=5, color=palette[name], label=label)
    for marker, routing in zip(MARKERS, error.routing.values, strict=False):
        axis.plot([], [], marker, color="0.4", ms=5, label=f"{routing} routing")
    axis.axhline(
        limit * epsilon, color="0.3", ls="--", lw=1, label=f"limit, {limit:g} epsilons"
    )
    label = f"epsilon of {run.attrs['dtype']}, {epsilon:.1e}"
    axis.axhline(epsilon, color="0.3", lw=1, label=label)
    low, high = float(error.min()), float(error.max())
    axis.set(yscale="log", ylim=(min(low, epsilon) / 3, 3 * max(high, limit * epsilon)))
    quantities = [str(q).replace(" gradient", "\ngradient") for q in error.quantity.values]
    axis.set_xticks(range(len(quantities)), quantities)
    axis.set(xlabel="more tokens further right", ylabel="relative error (norm)")
    axis.set_title(f"Agreement with float64\n{_where(run)}", size=11)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    sns.despine(ax=axis)
    return _done(figure)


def speed(run: xr.DataTree) -> Figure:
    """How many times as fast as torch each backend is, with the quartiles of repetitions."""
    ratio = ratios(run)
    figure, axes = _grid(run)
    compared = [name for name in _timed(run) if name != BASE]
    _draw(axes, ratio.sel(backend=compared), _palette(run))
    for axis in axes.flat:
        axis.axhline(1, color=_palette(run)[BASE], lw=1.5, label=BASE)
        axis.set_ylim(bottom=0)
    for axis, direction in zip(axes[:, 0], ratio.direction.values, strict=True):
        axis.set_ylabel(f"{direction}\ntimes as fast as {BASE}")
    _titled(run, figure, axes, f"Speed beside {BASE}")
    return _done(figure)


def share(run: xr.DataTree) -> Figure:
    """The share of a dense matrix product's rate that each backend reaches.

    That rate is measured of one product, torch's own, and is no ceiling: others can be faster.
    """
    part = 100 * shares(run)
    figure, axes = _grid(run)
    _draw(axes, part.sel(backend=_timed(run)), _palette(run))
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
    for axis, direction in zip(axes[:, 0], part.direction.values, strict=True):
        axis.set_ylabel(f"{direction}\n% of the dense rate")
    title = f"Share of the rate of {BASE}'s own dense product ({_dense(run)})"
    _titled(run, figure, axes, f"{title}, which other kernels can exceed")
    return _done(figure)


def ratios(run: xr.DataTree) -> xr.DataArray:
    """torch's seconds over each backend's, in the same repetition."""
    seconds = group(run, "speed")["seconds"]
    return seconds.sel(backend=BASE, drop=True) / seconds


def shares(run: xr.DataTree) -> xr.DataArray:
    """Each pass's operations per second over the dense rate of the same repetition."""
    table = group(run, "speed")
    return table["flops"] / table["seconds"] / table["dense_rate"]


def agreement_table(run: xr.DataTree) -> pd.DataFrame:
    """Each backend's worst relative error by quantity, and the verdict."""
    error = group(run, "agreement")["error"]
    table = error.max(["tokens", "routing"]).to_pandas()
    worst = error.max(["tokens", "routing", "quantity"]).values / run.attrs["epsilon"]
    return table.assign(epsilons=worst, verdict=[_verdict(run, value) for value in worst])


def speed_table(run: xr.DataTree) -> pd.DataFrame:
    """Median milliseconds, times as fast as torch, and share of the dense rate."""
    measures = {
        "ms": 1e3 * group(run, "speed")["seconds"],
        f"times as fast as {BASE}": ratios(run),
        "% of the dense rate": 100 * shares(run),
    }
    order, columns = ("direction", "routing", "tokens"), {}
    for measure, values in measures.items():
        for name in _timed(run):
            if not (measure.startswith("times") and name == BASE):
                middle = values.sel(backend=name, drop=True).median("repetition")
                columns[measure, name] = middle.transpose(*order).to_series()
    return pd.DataFrame(columns)


def reading(run: xr.DataTree) -> str:
    """What a run shows, in sentences whose figures and verdicts come from the run."""
    parts = [_about(run), _agreeing(run), *_speeds(run)]
    missing = json.loads(run.attrs["not_measured"])
    parts += [f"Not measured: {name}, because {why}." for name, why in missing.items()]
    untimed = json.loads(run.attrs["not_timed"])
    parts += [f"Not timed: {name}, because {why}." for name, why in untimed.items()]
    if run.attrs["status"] != "complete":
        parts.append(f"The run is not complete: {run.attrs['status']}.")
    return "\n\n".join(parts)


def _about(run: xr.DataTree) -> str:
    max_vio = group(run, "agreement")["max_vio"].isel(tokens=-1)
    loads = ", ".join(f"{float(v):.2f} {v.routing.item()}" for v in max_vio)
    return f"{_where(run)}, seed {run.attrs['seed']}. MaxVio of the routings: {loads}."


def _agreeing(run: xr.DataTree) -> str:
    table = agreement_table(run)
    error = group(run, "agreement")["error"]
    quantities = list(error["quantity"].values)
    rows = []
    for name, row in table[table["epsilons"].notna()].iterrows():
        worst = row[quantities].astype(float).idxmax()
        size = f"{row['epsilons']:.1f} epsilons at worst ({worst})"
        rows.append(f"{name}, {_reach(error, str(name))}: {size}, {row['verdict']}.")
    limit = f"within {_limit(run):g} epsilons of {run.attrs['dtype']}"
    return f"Agreement with float64 ({limit}). {' '.join(rows)}"


def _speeds(run: xr.DataTree) -> list[str]:
    """A sentence for each backend and direction, at the most tokens."""
    ratio, part = ratios(run).isel(tokens=-1), shares(run).isel(tokens=-1)
    tokens = int(ratio.tokens)
    texts = []
    for direction in ratio.direction.values:
        rows = []
        for name in _timed(run):
            at = {"backend": name, "direction": direction}
            reached = part.sel(at).median("repetition")
            text = f"{name} reaches {_span(100 * reached, '.0f')}% of the dense rate"
            if name != BASE:
                times = ratio.sel(at).median("repetition")
                text += f", {_span(times, '.2f')} times {BASE}'s speed"
            rows.append(text)
        texts.append(
            f"Speed, {direction}, {tokens:,} tokens, medians over the routings: "
            f"{'; '.join(rows)}."
        )
    return texts


def _span(values: xr.DataArray, form: str) -> str:
    low, high = (format(float(v), form) for v in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _limit(run: xr.DataTree) -> float:
    return LIMITS[run.attrs["dtype"]]


def _verdict(run: xr.DataTree, worst: float) -> str:
    if np.isnan(worst):
        return "not measured"
    return "agrees" if worst <= _limit(run) else "does not agree"


def _where(run: xr.DataTree) -> str:
    config = json.loads(run.attrs["config"])
    threads = config["threads"]
    place = run.attrs["device_name"] or f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return (
        f"{config['num_experts']} experts of {config['width']} x {config['expert_width']}, "
        f"top-{config['top_k']} ({config['shape']}), {run.attrs['dtype']}, {place}"
    )


def _dense(run: xr.DataTree) -> str:
    low, middle, high = group(run, "speed")["dense_rate"].quantile(MIDDLE).values / 1e9
    return f"{middle:,.0f} GFLOP/s, quartiles {low:,.0f} to {high:,.0f}"


def _reach(error: xr.DataArray, backend: str) -> str:
    most = error.sel(backend=backend).dropna("tokens", how="all").tokens.max()
    return f"up to {int(most):,} tokens"


def _timed(run: xr.DataTree) -> list[str]:
    return _with_values(group(run, "speed")["seconds"])


def _with_values(values: xr.DataArray) -> list[str]:
    """Backends that were measured."""
    return [str(b) for b in values.backend.values if values.sel(backend=b).notnull().any()]


def _palette(run: xr.DataTree) -> dict[str, tuple[float, float, float]]:
    names = [str(name) for name in group(run, "agreement").backend.values]
    return dict(zip(names, sns.color_palette(n_colors=len(names)), strict=True))


def _grid(run: xr.DataTree) -> tuple[Figure, np.ndarray]:
    """A panel for each direction (rows) and routing (columns)."""
    table = group(run, "speed")
    rows, columns = table.sizes["direction"], table.sizes["routing"]
    with sns.axes_style("whitegrid"):
        figure, axes = plt.subplots(
            rows, columns, figsize=(9.5, 5), squeeze=False, sharex=True, sharey="row",
            layout="constrained", dpi=110,
        )  # fmt: skip
    return figure, axes


def _draw(axes: np.ndarray, values: xr.DataArray, palette: dict) -> None:
    """Medians and quartiles over the repetitions, tokens side by side on the x axis."""
    tokens = values.tokens.values
    names, markers = (
        list(map(str, values.backend.values)),
        dict(zip(palette, MARKERS, strict=False)),
    )
    for row, direction in zip(axes, values.direction.values, strict=True):
        for axis, routing in zip(row, values.routing.values, strict=True):
            for number, name in enumerate(names):
                at = {"backend": name, "direction": direction, "routing": routing}
                quartiles = values.sel(at).quantile(MIDDLE, "repetition")
                low, middle, high = quartiles.transpose("quantile", "tokens").values
                aside = 0.12 * (number - (len(names) - 1) / 2)
                axis.errorbar(
                    np.arange(len(tokens)) + aside, middle, [middle - low, high - middle],
                    fmt=markers[name] + "-", ms=5, lw=1, capsize=3,
                    color=palette[name], label=name,
                )  # fmt: skip
            axis.set_xticks(range(len(tokens)), [f"{t:,}" for t in tokens])
            axis.set_xlim(-0.5, len(tokens) - 0.5)
            sns.despine(ax=axis)


def _titled(run: xr.DataTree, figure: Figure, axes: np.ndarray, title: str) -> None:
    max_vio = group(run, "agreement")["max_vio"].isel(tokens=-1)
    for axis, routing in zip(axes[0], max_vio.routing.values, strict=True):
        axis.set_title(f"{routing}, MaxVio {float(max_vio.sel(routing=routing)):.1f}", size=10)
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    _legend(axes[0, -1])
    untimed = ", ".join(json.loads(run.attrs["not_timed"]))
    note = f"\nnot timed: {untimed}, whose kernels are interpreted here" if untimed else ""
    figure.suptitle(f"{title}\n{_where(run)}{note}", size=11)


def _legend(axis: Axes) -> None:
    axis.legend(
        title="median, quartiles", frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1)
    )


def _done(figure: Figure) -> Figure:
    """Close it in pyplot, so that a notebook shows the returned figure once."""
    plt.close(figure)
    return figure
