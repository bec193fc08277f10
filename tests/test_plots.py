"""Every figure reads without its text: a title, labelled axes, units, a legend."""

from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from tests import synthetic
from trinity_lib import plots

FIGURES = {
    plots.loss: (2, "nat per token"),
    plots.losses: (1, "bits per byte"),
    plots.expert_load: (3, "experts by final load"),
    plots.max_vio: (1, "MaxVio"),
    plots.bias: (3, "bias"),
    plots.experts_in_use: (2, "dead experts, %"),
    plots.batch_het: (1, "nat"),
}
LEGENDS = (plots.loss, plots.losses, plots.max_vio, plots.experts_in_use, plots.batch_het)


def drawn(figure: Figure) -> None:
    figure.savefig(BytesIO(), format="png")


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
def test_figures_read_alone(plot) -> None:
    before = plt.get_fignums()
    figure = plot(synthetic.run())
    drawn(figure)
    axes, label = FIGURES[plot]
    assert len(figure.axes) == axes
    assert figure.axes[0].get_title()
    assert label in figure.axes[0].get_ylabel()
    assert any(axis.get_xlabel() for axis in figure.axes)
    assert all(axis.get_ylabel() for axis in figure.axes)
    assert bool(figure.axes[0].get_legend()) == (plot in LEGENDS)
    assert plt.get_fignums() == before


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
@pytest.mark.parametrize(
    "case",
    [
        {"steps": 1},
        {"layers": 1},
        {"method": "none", "dead": 4},
        {"layers": 20, "experts": 3},
        {"method": "sign"},
    ],
    ids=str,
)
def test_figures_draw_in_unusual_runs(plot, case: dict) -> None:
    run = synthetic.run(**case)
    if case.get("method") == "none":
        run["routing"]["bias"][:] = 0
    drawn(plot(run))


@pytest.mark.parametrize(
    "plot", [plots.loss, plots.max_vio, plots.bias, plots.experts_in_use, plots.batch_het]
)
def test_a_single_step_is_visible(plot) -> None:
    """A line of one point draws nothing unless it has a marker."""
    figure = plot(synthetic.run(steps=1, layers=1))
    lines = [line for axis in figure.axes for line in axis.lines]
    points = [line for line in lines if len(set(map(float, line.get_xdata()))) == 1]
    points = [line for line in points if line.get_linestyle() != "-."]  # TrueBase, Base
    assert points and all(line.get_marker() == "o" for line in points)


def test_the_sampling_floor_is_drawn_and_named() -> None:
    figure = plots.max_vio(synthetic.run())
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [label for label in labels if label.startswith("sampling floor, ")]


def test_layers_are_thinned_to_six_panels() -> None:
    assert len(plots.bias(synthetic.run(layers=20)).axes) == 6 + 1


def test_runs_are_compared_by_layer() -> None:
    figure = plots.compare({"a": synthetic.run(), "b": synthetic.run(method="none", dead=4)})
    drawn(figure)
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
    heights = sorted({round(p.get_height(), 3) for p in figure.axes[0].patches})
    assert heights[-1] == 50


def test_a_rehearsal_s_figures_say_what_is_missing_in_sentences() -> None:
    run = synthetic.run()
    run.attrs |= {"status": "rehearsed", "reason": "REHEARSED, NOT TRAINED: it needs 2 GPUs."}
    said = plots.losses(run).texts[0].get_text()
    assert said == "REHEARSED, NOT TRAINED: no bits per byte. It needs 2 GPUs."


def test_a_rehearsal_calls_parts_of_memory_as_a_plan_does() -> None:
    shape, parts = ("moment", "part"), ["weights", "kept", "of its own"]
    held = {name: (shape, np.ones((1, 3))) for name in ("planned", "traced")}
    about = {
        "status": "rehearsed",
        "bytes_usable": 9e9,
        "gpu": "H100",
        "ranks": 2,
        "scale": "x",
    }
    table = xr.Dataset(held, {"part": parts, "moment": ["step"]})
    run = xr.DataTree.from_dict({"/": xr.Dataset(attrs=about), "/rehearsed_memory": table})
    legend = plots.loss(run).axes[0].get_legend()
    named = [text.get_text() for text in legend.get_texts()]
    assert named[:3] == ["fp32 weights", "activations kept", "of its own"]


def test_titles_say_a_step_size_only_where_there_is_one() -> None:
    title = plots.max_vio(synthetic.run(method="none", dead=4)).axes[0].get_title()
    assert "(balance: none)" in title
    assert (
        "(balance: sign at " in plots.max_vio(synthetic.run(method="sign")).axes[0].get_title()
    )
