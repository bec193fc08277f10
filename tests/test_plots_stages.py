"""Figures of what moved between stages and of what is inside, from numbers that are known."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from tests import staged
from trinity_lib import drift, plots_stages, stage_axes

FIGURES = {
    plots_stages.drift: (7, "norm of the change / norm before"),
    plots_stages.routing: (4, "share of later choices made before"),
    plots_stages.functional: (2, "domain"),
    plots_stages.path: (1, "loss, nat per token"),
    plots_stages.tasks: (1, "loss, nat per token"),
    plots_stages.lens: (3, "share of targets that come first"),
    plots_stages.probes: (3, "accuracy, names not trained on"),
    plots_stages.relearning: (2, "association in answers"),
    plots_stages.ablation: (2, "association without the expert, less whole"),
}
COMPARED = (plots_stages.drift, plots_stages.routing, plots_stages.functional,
            plots_stages.path, plots_stages.tasks)  # fmt: skip
INSIDE = tuple(plot for plot in FIGURES if plot not in COMPARED)
CHANGES = ["TrueBase to Base", "Base to Instruct", "Instruct to debiased",
           "TrueBase to debiased"]  # fmt: skip


def drawn(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


def curves(axis) -> dict[str, np.ndarray]:
    """Lines that a legend names, by name."""
    return {
        str(line.get_label()): np.asarray(line.get_ydata(), float)
        for line in axis.lines
        if not str(line.get_label()).startswith("_") and len(line.get_xdata())
    }


def said(figure: Figure) -> str:
    return "\n".join(text.get_text() for axis in figure.axes for text in axis.texts)


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
def test_figures_read_alone(plot) -> None:
    before = plt.get_fignums()
    figure = drawn(plot(staged.run()))
    axes, label = FIGURES[plot]
    assert len(figure.axes) == axes
    assert label in figure.axes[0].get_ylabel()
    title = figure.get_suptitle() or figure.axes[0].get_title()
    assert title.endswith("\nchain of seed 0")
    assert all(axis.get_xlabel() or axis.get_xticklabels() for axis in figure.axes)
    assert any(axis.get_legend() for axis in figure.axes)
    assert plt.get_fignums() == before


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
def test_unusual_runs_are_drawn(plot) -> None:
    several = drawn(plot(staged.run(seeds=(4, 5))))
    title = several.get_suptitle() or several.axes[0].get_title()
    assert "chain of seed 4, the first of 2" in title
    drawn(plot(staged.run(stages=("a", "b", "c", "d", "e", "f"))))
    drawn(plot(staged.run(stages=("base",))))


def test_what_is_missing_is_said_with_its_reason() -> None:
    for plot in COMPARED:
        text = said(drawn(plot(staged.given(("raw",)))))
        assert "This run has no" in text and "(one checkpoint was given)" in text
        assert "This run has no" not in said(plot(staged.given()))
    for plot in INSIDE:
        assert "(need planted answers)" in said(drawn(plot(staged.given())))


def test_drift_pools_tensors_as_one_vector() -> None:
    figure = plots_stages.drift(staged.run())
    module, rank, layer = figure.axes[:3]
    assert len(module.lines) == len(CHANGES)
    wanted = [0.5, 0.5, 1.0, np.nan]  # embedding, router, experts, and a norm that was 0
    assert np.allclose(module.lines[0].get_ydata(), wanted, equal_nan=True)
    assert np.allclose(rank.lines[0].get_ydata(), [0.75, 0.5, 0.5, np.nan], equal_nan=True)
    found = curves(layer)
    assert list(found) == CHANGES
    assert found[CHANGES[0]] == pytest.approx(
        [np.sqrt(9.25) / np.sqrt(10), np.sqrt(16.25 / 17)]
    )


def test_drift_and_load_are_correlated_within_layers() -> None:
    run = staged.run()
    table = run["expert_drift"].to_dataset()
    for change in table.change.values:
        own = table.sel(change=change)
        found = plots_stages.within_layers(own["load"].values, own["relative"].values)
        assert found == pytest.approx(drift.load_correlation(table, str(change)).estimate)
    figure = plots_stages.drift(run)
    titles = [axis.get_title() for axis in figure.axes[3:]]
    assert [title.split("\n")[0] for title in titles] == CHANGES
    assert f"{found:+.2f}" in titles[-1]
    run["expert_drift"]["load"][:] = np.nan
    assert "loads unknown" in drawn(plots_stages.drift(run)).axes[3].get_title()


def test_without_experts_weights_are_drawn_alone() -> None:
    run = staged.given()
    del run["expert_drift"]
    assert len(drawn(plots_stages.drift(run)).axes) == 3


def test_saturation_has_its_chance() -> None:
    figure = plots_stages.routing(staged.run())
    found = curves(figure.axes[0])
    assert list(found) == [*CHANGES, "chance, k / E"]
    assert np.allclose(found["chance, k / E"], 0.25) and np.allclose(found[CHANGES[1]], 0.7)
    used = curves(figure.axes[2])
    assert list(used) == ["TrueBase", "Base", "Instruct", "debiased", "all 6 experts"]
    assert np.allclose(used["Base"], 5)
    run = staged.run()
    del run["routing_change"]
    assert "no change of routing" in said(drawn(plots_stages.routing(run)))


def test_changes_are_told_apart_by_colour_or_line() -> None:
    axis = plots_stages.path(staged.run()).axes[0]
    looks = [(line.get_color(), line.get_linestyle()) for line in axis.lines
             if " to " in str(line.get_label())]  # fmt: skip
    assert len(set(looks)) == len(CHANGES)


def test_divergence_has_intervals_that_stay_on_the_axis() -> None:
    axis = drawn(plots_stages.functional(staged.run())).axes[0]
    assert np.isfinite(axis.get_xlim()).all() and axis.get_xlim()[1] < 2
    assert [label.get_text() for label in axis.get_yticklabels()] == ["code", "prose"]
    assert np.allclose(axis.lines[0].get_xdata(), [0.3, 0.6])
    assert len(axis.collections) == len(CHANGES)


def test_the_chord_joins_both_ends_and_the_barrier_is_named() -> None:
    axis = plots_stages.path(staged.run()).axes[0]
    names = list(curves(axis))
    assert names == [f"{change}: barrier 1.000 nat" for change in CHANGES]
    chords = [line for line in axis.lines if line.get_linestyle() == ":" and line.get_zorder()
              == 1]  # fmt: skip
    assert all(list(chord.get_ydata()) == [2.0, 1.0] for chord in chords)
    assert len(chords) == len(CHANGES)


def test_task_vectors_are_a_line_a_domain_around_the_stage_as_it_is() -> None:
    figure = plots_stages.tasks(staged.run())
    axis = figure.axes[0]
    assert axis.get_title() == "TrueBase + scale × (debiased − Base)"
    found = curves(axis)
    assert list(found) == ["code", "prose", "as it is"]
    assert list(found["code"]) == [2.0, 1.0, 1.5] and list(found["prose"]) == [3.0, 2.0, 1.9]
    assert all(list(line.get_xdata()) == [-1, 0, 1] for line in axis.lines[:2])
    assert list(axis.lines[-1].get_xdata()) == [0, 0]
    run = staged.run()
    several = run["task_vector"].to_dataset()
    named = [several.assign_coords(task=[task]) for task in ("odd", *map(str, range(4)))]
    run["task_vector"] = xr.DataTree(xr.concat(named, "task"))
    panels = [axis for axis in drawn(plots_stages.tasks(run)).axes if axis.get_visible()]
    assert [axis.get_title() for axis in panels] == ["odd", "0", "1", "2", "3"]


def test_the_lens_has_a_line_a_stage() -> None:
    figure = plots_stages.lens(staged.run())
    right = curves(figure.axes[0])
    assert list(right) == [f"{stage}: 1.5 [1.2, 1.8]" for stage in
                           ("TrueBase", "Base", "Instruct", "debiased")]  # fmt: skip
    assert all(np.allclose(curve, [0.5, 0.8, 1.0]) for curve in right.values())
    assert all(np.allclose(c, [9, 2, 1]) for c in curves(figure.axes[1]).values())
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert colors == set(stage_axes.COLORS.values())


def test_probes_mark_what_is_beyond_chance() -> None:
    figure = plots_stages.probes(staged.run())
    for axis, place in zip(figure.axes, ("name", "end of text", "end of question"),
                           strict=True):  # fmt: skip
        assert place in axis.get_title()
        assert np.allclose(curves(axis)["chance: permuted labels"], 0.5)
        dots = [line for line in axis.lines if line.get_marker() == "o" and
                len(line.get_xdata())]  # fmt: skip
        hollow = [line for line in dots if line.get_markerfacecolor() == "white"]
        read = [line for line in dots if line not in hollow]
        assert len(hollow) >= 4 and all(y == 0.5 for li in hollow for y in li.get_ydata())
        assert len(axis.collections) == 5  # intervals
        assert {tuple(line.get_ydata()) for line in read if len(line.get_ydata()) > 1} == {
            (0.8, 1.0), (0.6, 0.7),
        }  # fmt: skip


def test_the_probe_s_control_is_dashed_and_grey() -> None:
    axis = plots_stages.probes(staged.run()).axes[0]
    control = next(li for li in axis.lines if li.get_label() == "a model that never had it")
    assert control.get_linestyle() == "--" and control.get_color() == "0.4"
    assert list(control.get_ydata()) == [0.5, 0.6, 0.7]
    run = staged.run()
    without = run["attribute_probe"].to_dataset().sel(probed=list(staged.STAGES))
    run["attribute_probe"] = xr.DataTree(without)
    assert "a model that never had it" not in curves(plots_stages.probes(run).axes[0])


def test_the_association_by_block_has_intervals_and_a_control() -> None:
    figure = plots_stages.association_lens(staged.run())
    for axis, place in zip(figure.axes, ("end of text", "end of question"), strict=True):
        assert place in axis.get_title()
        found = curves(axis)
        assert np.allclose(found["planted truth"], 1) and np.allclose(
            found["no association"], 0
        )
        bars = axis.containers
        assert len(bars) == 5
        for bar in bars:
            line, _, (spans,) = bar
            assert line.get_ydata().tolist() == [0.0, 0.4, 0.7]
            heights = [np.ptp(segment[:, 1]) for segment in spans.get_segments()]
            assert heights == pytest.approx([0.2, 0.2, 0.3])
        assert bars[-1][0].get_linestyle() == "--" and bars[-1][0].get_color() == "0.4"
    run = staged.run()
    run = xr.DataTree.from_dict({
        name: node.to_dataset() for name, node in run.children.items()
        if name != "association_lens"
    })  # fmt: skip
    run.attrs = staged.run().attrs
    said = plots_stages.association_lens(run).axes[0].texts[0].get_text()
    assert "This run has no logit lens of jobs" in said


def test_relearning_draws_targets_and_what_is_not_reached() -> None:
    axis, other = plots_stages.relearning(staged.run()).axes
    assert axis.get_title() == "from debiased"
    assert other.get_title() == "from a model that never had it"
    assert "the association: there before" in curves(other)
    found = curves(axis)
    assert list(found)[:2] == ["the association: in 3.0 steps", "its opposite: not reached"]
    assert found["the association: in 3.0 steps"] == pytest.approx([0, 0.3, 0.6])
    flat = [float(line.get_ydata()[0]) for line in axis.lines if line.get_linestyle() == "--"
            and len(line.get_ydata())]  # fmt: skip
    assert {0.5, -0.5} <= set(flat)


def test_ablation_names_the_largest_and_shows_the_unused() -> None:
    figure = plots_stages.ablation(staged.run())
    axis = figure.axes[0]
    assert axis.get_title() == "TrueBase: association, 0.800 with all"
    assert axis.texts[0].get_text() == "expert 4, z -3.0"
    assert axis.texts[0].xy[1] == -0.5
    used, unused = (dots.get_offsets() for dots in axis.collections)
    assert len(used) == 10 and len(unused) == 2
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2"]
