"""Figures, tables and the reading of a run that measured kernels."""

import json
import subprocess
import sys
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from tests import synthetic
from trinity_lib import plots_kernels

FIGURES = (plots_kernels.agreement, plots_kernels.speed, plots_kernels.share)


def drawn(figure: Figure) -> None:
    figure.savefig(BytesIO(), format="png")


def labels(figure: Figure) -> list[str]:
    legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
def test_figures_read_alone(plot) -> None:
    before = plt.get_fignums()
    figure = plot(synthetic.kernels())
    drawn(figure)
    title = figure.get_suptitle() or figure.axes[0].get_title()
    assert "8 experts of 16 x 12, top-2 (toy), float32, CPU, 2 threads" in title
    assert any(axis.get_xlabel() for axis in figure.axes)
    assert figure.axes[0].get_ylabel()
    assert any(label.startswith("torch") for label in labels(figure))
    assert plt.get_fignums() == before


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
@pytest.mark.parametrize(
    "case",
    [
        {"tokens": (5,)},
        {"backends": ("torch",), "untimed": ()},
        {"backends": ("native", "torch"), "untimed": ()},
        {"untimed": ()},
        {"untimed": ("native", "megablocks")},
    ],
    ids=str,
)
def test_figures_draw_in_unusual_runs(plot, case: dict) -> None:
    run = synthetic.kernels(**case)
    drawn(plot(run))
    assert plots_kernels.reading(run)


def missing(run: xr.DataTree, backend: str) -> xr.DataTree:
    run["agreement"]["error"].loc[{"backend": backend}] = np.nan
    run["speed"]["seconds"].loc[{"backend": backend}] = np.nan
    run.attrs["not_measured"] = json.dumps({backend: "it is not installed"})
    return run


def test_what_is_missing_is_said_and_not_drawn() -> None:
    run = missing(synthetic.kernels(untimed=()), "megablocks")
    for plot in FIGURES:
        figure = plot(run)
        drawn(figure)
        assert not any("megablocks" in label for label in labels(figure))
    text = plots_kernels.reading(run)
    assert "Not measured: megablocks, because it is not installed." in text
    assert plots_kernels.agreement_table(run).loc["megablocks", "verdict"] == "not measured"
    assert "megablocks" not in plots_kernels.speed_table(run).columns.get_level_values(1)


def test_what_is_not_timed_is_said_in_the_figure() -> None:
    for plot in (plots_kernels.speed, plots_kernels.share):
        figure = plot(synthetic.kernels())
        assert "not timed: megablocks" in figure.get_suptitle()
        assert not any("megablocks" in label for label in labels(figure))
    text = plots_kernels.reading(synthetic.kernels())
    assert "Not timed: megablocks, because it is interpreted." in text


def test_ratios_are_taken_within_a_repetition() -> None:
    run = synthetic.kernels()
    ratio = plots_kernels.ratios(run)
    np.testing.assert_allclose(ratio.sel(backend="native"), 2)
    table = plots_kernels.speed_table(run)
    assert len(table) == 2 * 3 * 2
    np.testing.assert_allclose(table["times as fast as torch", "native"], 2)
    where = {"backend": "native", "direction": "forward", "tokens": 32, "routing": "random"}
    milliseconds = 1e3 * run["speed"]["seconds"].sel(where).median()
    row = table.loc[("forward", "random", 32)]
    assert row["ms", "native"] == pytest.approx(float(milliseconds))
    part = (1e6 / run["speed"]["seconds"].sel(where) / 1e11).median()
    assert row["% of the dense rate", "native"] == pytest.approx(100 * float(part))
    assert "2.00 times torch's speed" in plots_kernels.reading(run)


@pytest.mark.parametrize("wrong", [1e-3, np.inf])
def test_a_wrong_backend_is_called_so(wrong: float) -> None:
    run = synthetic.kernels()
    at = {"backend": "native", "quantity": "token gradient", "routing": "collapsed"}
    run["agreement"]["error"].loc[at] = wrong
    table = plots_kernels.agreement_table(run)
    assert table["verdict"].tolist() == ["agrees", "does not agree", "agrees"]
    assert table.loc["native", "token gradient"] == wrong
    assert "at worst (token gradient), does not agree" in plots_kernels.reading(run)
    figure = plots_kernels.agreement(run)
    drawn(figure)
    highest = max(
        np.nanmax(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_ydata())
    )
    assert highest == min(wrong, 1) and figure.axes[0].get_ylim()[1] > highest


def test_the_limit_is_the_dtypes() -> None:
    """Three epsilons are rounding in fp32, and a mistake in bf16, which sums in fp32."""
    run = synthetic.kernels()
    run["agreement"]["error"][:] = 3 * run.attrs["epsilon"]
    assert set(plots_kernels.agreement_table(run)["verdict"]) == {"agrees"}
    run.attrs["dtype"] = "bfloat16"
    assert set(plots_kernels.agreement_table(run)["verdict"]) == {"does not agree"}


def test_an_incomplete_run_says_so() -> None:
    run = synthetic.kernels()
    run.attrs["status"] = "failed"
    assert "not complete: failed" in plots_kernels.reading(run)


def test_no_torch_is_imported() -> None:
    code = "import sys, trinity_lib.plots_kernels; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_dense_rate_is_no_ceiling_and_the_figure_says_so() -> None:
    run = synthetic.kernels()
    run["speed"]["dense_rate"][:] = 1.0
    assert float(plots_kernels.shares(run).max()) > 1
    title = plots_kernels.share(run).get_suptitle()
    assert "torch's own dense product" in title and "which other kernels can exceed" in title
