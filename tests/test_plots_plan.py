"""Figures, tables and sentences of a plan, from its run file alone."""

import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from trinity_lib import plan_report, planner, plots_plan
from trinity_lib.plan_config import configure
from trinity_lib.record import open_run

FIGURES = (
    plots_plan.cost, plots_plan.memory, plots_plan.operations, plots_plan.least,
    plots_plan.traffic, plots_plan.offload,
)  # fmt: skip
PLANS: dict[str, dict] = {
    "large": {},
    "mini": {
        "scale": "mini", "gpu": "H200", "gpus": 512, "expert_parallel": 1, "recompute": False,
        "micro_tokens": 16_384,
    },
    "toy": {"scale": "toy", "gpu": "RTX 4090", "gpus": 1, "shard": 1, "expert_parallel": 1},
    "free": {"price": 0.0, "efficiency": 1.0, "gpu": "L40S", "micro_tokens": 524_288},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, xr.DataTree]:
    folder = tmp_path_factory.mktemp("plans")
    for name, changes in PLANS.items():
        planner.draw_up(configure(name=name, **changes), runs=folder)
    return {name: open_run(Path(folder / f"{name}.nc")) for name in PLANS}


def drawn(figure: Figure) -> bytes:
    held = BytesIO()
    figure.savefig(held, format="png")
    return held.getvalue()


def texts(figure: Figure) -> str:
    """Everything written in a figure."""
    found = [figure.get_suptitle()]
    for axis in figure.axes:
        found += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]
        found += [t.get_text() for t in (*axis.texts, *axis.get_xticklabels())]
        found += [t.get_text() for t in axis.get_yticklabels()]
        if axis.get_legend():
            found += [t.get_text() for t in axis.get_legend().get_texts()]
    return "\n".join(found)


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name", PLANS)
def test_figures_read_alone(plot, name: str, runs: dict[str, xr.DataTree]) -> None:
    before = plt.get_fignums()
    figure = plot(runs[name])
    assert len(drawn(figure)) > 10_000
    written = texts(figure)
    assert PLANS[name].get("scale", "large") in written
    assert any(axis.get_ylabel() or axis.get_xlabel() for axis in figure.axes)
    assert not re.search(r"\b(nan|inf)\b", written)
    assert plt.get_fignums() == before


def test_the_planned_cell_and_the_budget_are_marked(runs: dict[str, xr.DataTree]) -> None:
    figure = plots_plan.cost(runs["large"])
    written = texts(figure)
    assert "17T tokens, 2,048 x B300" in written and "over the published $20M" in written
    (box,) = [p for p in figure.axes[0].patches if p.get_edgecolor()[0] > 0.9]
    row, column = int(box.get_y()), int(box.get_x())
    cells = np.array([t.get_text() for t in figure.axes[0].texts]).reshape(7, 7)
    assert cells[row, column] == "9.8"
    dollars = runs["large"]["cost"]["dollars"].values
    sides = sum(
        int((dollars > 20e6)[r, c] != (dollars > 20e6)[r + i, c + j])
        for i, j in ((0, 1), (1, 0))
        for r in range(7 - i)
        for c in range(7 - j)
    )
    assert len(figure.axes[0].lines) == sides > 0
    other = plots_plan.cost(runs["mini"])
    assert "published" not in texts(other) and not other.axes[0].lines


def test_pieces_add_up_to_the_peak(runs: dict[str, xr.DataTree]) -> None:
    for name in ("large", "mini"):
        figure = plots_plan.memory(runs[name])
        table = runs[name]["memory"]["bytes"]
        ends = {}
        for bar in figure.axes[0].patches:
            row = round(bar.get_y() + bar.get_height() / 2)
            ends[row] = max(ends.get(row, 0), bar.get_x() + bar.get_width())
        np.testing.assert_allclose(
            [ends[i] for i in range(4)], table.sum("part").values / 1e9, rtol=1e-6
        )
    assert "usable: 259 GB (beyond the axis)" in texts(plots_plan.memory(runs["large"]))
    assert "usable: 127 GB (dashed)" in texts(plots_plan.memory(runs["mini"]))
    assert "expert exchange" not in texts(plots_plan.memory(runs["mini"]))


def test_what_no_number_of_gpus_trains_is_said(runs: dict[str, xr.DataTree]) -> None:
    table = plan_report.least_table(runs["large"])
    assert table.loc["RTX 4090 (24 GB)", "training"] == 0
    assert table.loc["B300 (288 GB)", "training"] == 24
    assert "none" in texts(plots_plan.least(runs["large"]))
    assert "No number of RTX 4090 (24 GB)" in plan_report.reading(runs["large"])
    assert "none" not in texts(plots_plan.least(runs["toy"]))
    assert "No number of GPUs trains it." in plan_report.reading(runs["free"])


def test_tables(runs: dict[str, xr.DataTree]) -> None:
    large = runs["large"]
    assert (plan_report.published(large)["apart, %"].abs() < 1).all()
    table = plan_report.reckonings(large)
    assert table["TFLOP/s a GPU"].iloc[0] == pytest.approx(227, abs=1)
    assert table["N, billion"].iloc[0] == 13
    speeds = plan_report.decoding_table(large)
    assert speeds.shape == (7, 5) and (speeds > 0).all().all()
    markdown = plan_report.articles(large).splitlines()
    assert len(markdown) == 2 + large["articles"].sizes["article"]
    assert all(line.count("|") == 4 for line in markdown)
    assert "$" not in "".join(markdown).replace(r"\$", "")


def test_the_reading_has_the_runs_own_figures(runs: dict[str, xr.DataTree]) -> None:
    text = plan_report.reading(runs["large"])
    for words in ("398,635,272,192", "212 to 266 TFLOP/s", "9.43 to 11.8%", "$12.33", "61.8 GB",
                  "2.77 GB in bf16"):  # fmt: skip
        assert words in text
    assert "$" + "12.33" not in plan_report.reading(runs["mini"])
    failed = runs["toy"].copy()
    failed.attrs["status"] = "failed"
    assert "not complete: failed" in plan_report.reading(failed)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, trinity_lib.plots_plan, trinity_lib.plan_report; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
