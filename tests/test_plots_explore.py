"""Figures of the app: readable alone, and a sentence where there is nothing to draw."""

from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from tests import synthetic
from trinity_lib import browse, plots_explore
from trinity_lib.config import Missing


def drawn(figure: Figure) -> Figure:
    figure.savefig(BytesIO(), format="png")
    assert plt.get_fignums() == []
    return figure


def labels(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_runs_are_compared_a_panel_a_measure() -> None:
    runs = {"a": synthetic.run(), "b": synthetic.run(layers=3), "k": synthetic.kernels()}
    measures = ["layers/max_vio", browse.LOSS, "routing/dead"]
    figure = drawn(plots_explore.compare(runs, measures, [1, 2], smooth=5))
    assert [axis.get_title() for axis in figure.axes] == [browse.MEASURES[m] for m in measures]
    assert labels(figure.axes[0]) == ["a", "b", "k (has none)"]
    assert figure.axes[1].get_ylabel() == "loss, nat"
    assert figure.axes[-1].get_xlabel() == "optimiser step"


def test_smoothing_is_a_running_mean() -> None:
    run = synthetic.run()
    (line, *_) = plots_explore.compare({"a": run}, ["train/loss"], [1], 4).axes[0].lines
    np.testing.assert_allclose(line.get_ydata()[-1], run["train"]["loss"][-4:].mean())


def test_nothing_to_compare_is_one_sentence() -> None:
    with pytest.raises(Missing, match="Choose a run and a measure"):
        plots_explore.compare({"a": synthetic.run()}, [], [1])
    with pytest.raises(Missing, match="None of these runs has steps"):
        plots_explore.compare({"k": synthetic.kernels()}, ["train/loss"], [1])


@pytest.mark.parametrize("steps", [1, 2, 40, 700])
def test_load_marks_the_step_and_sorts_its_bars(steps: int) -> None:
    run = synthetic.run(steps=steps, dead=3)
    figure = drawn(plots_explore.load(run, 2, step=steps))
    heat, bars = figure.axes[:2]
    assert heat.lines[0].get_xdata()[0] == steps
    heights = bars.patches[0].get_data().values
    assert (np.diff(heights) <= 0).all()
    assert (heights[-3:] == 0).all()
    assert np.mean(heights) == pytest.approx(1)
    assert bars.get_title().endswith("3 of 8 without a token")
    assert bars.get_title().startswith(f"Step {steps}: MaxVio")
    assert labels(bars)[0].startswith("uniform: ")


def test_load_takes_the_nearest_recorded_step() -> None:
    figure = plots_explore.load(synthetic.run(), 1, step=10**6)
    assert "Step 40:" in figure.axes[1].get_title()


def test_load_of_a_step_without_tokens() -> None:
    run = synthetic.run(steps=3)
    run["routing"]["count"] *= 0
    assert "MaxVio 0.00" in drawn(plots_explore.load(run, 1, 3)).axes[1].get_title()


@pytest.mark.parametrize("steps", [1, 40, 700])
def test_bias_has_a_line_an_expert(steps: int) -> None:
    figure = drawn(plots_explore.bias(synthetic.run(steps=steps), 1))
    (lines,) = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    assert len(lines.get_segments()) == 8
    assert "layer 1" in figure.axes[0].get_title()


def test_a_bias_that_never_moves_is_said_to_be_none() -> None:
    run = synthetic.run(method="none")
    run["routing"]["bias"] *= 0
    assert "keeps no bias" in drawn(plots_explore.bias(run, 1)).axes[0].get_title()


@pytest.mark.parametrize("figure", [plots_explore.load, plots_explore.bias])
def test_what_a_run_lacks_is_one_sentence(figure) -> None:
    arguments = (5,) if figure is plots_explore.load else ()
    with pytest.raises(Missing, match="has no /routing"):
        figure(synthetic.kernels(), 1, *arguments)
    with pytest.raises(Missing, match="no layer 9 with experts: the run has 1, 2"):
        figure(synthetic.run(), 9, *arguments)
