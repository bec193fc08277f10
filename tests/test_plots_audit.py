"""Figures, tables and sentences of a study of stages, from numbers that are known."""

import json
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tests import staged
from trinity_lib import audit, intervals, plots_audit, stage_axes, stage_report

FIGURES = {
    plots_audit.overview: 2,
    plots_audit.association: 5,
    plots_audit.recall: 6,
    plots_audit.calibration: 4,
    plots_audit.memorisation: 4,
    plots_audit.decisions: 4,
    plots_audit.behaviour: 6,
    plots_audit.audits: 2,
}
OTHERS = ("raw", "alpha", "beta", "gamma", "delta")


def drawn(figure: Figure) -> Figure:
    figure.draw_without_rendering()
    return figure


def texts(figure: Figure) -> str:
    """All that can be read on a figure."""
    found = [figure.get_suptitle()]
    found += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axis in figure.axes:
        found += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]
        found += [text.get_text() for text in axis.texts]
        found += [t.get_text() for t in (*axis.get_xticklabels(), *axis.get_yticklabels())]
        legend = axis.get_legend()
        found += [text.get_text() for text in legend.get_texts()] if legend else []
    return "\n".join(found)


def points(axis) -> dict[str, list[tuple[float, float]]]:
    """Estimates that stand alone, by colour."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in axis.lines:
        if line.get_zorder() == stage_axes.ESTIMATE:
            x, y = line.get_xydata()[0]
            found.setdefault(to_hex(line.get_color()), []).append((float(x), float(y)))
    return found


def levels(axis, style: dict) -> list[float]:
    """Where lines of truth or of chance are."""
    return [
        float(np.mean(line.get_ydata()))
        for line in axis.lines
        if line.get_color() == style["color"] and line.get_zorder() == style["zorder"]
    ]


def change(run: xr.DataTree, asked_as: str, stage: str, slope: float) -> None:
    """Another association at one stage, 0.1 to either side."""
    found = run["findings"]
    at = (found["asked_as"].values == asked_as) & (found["of_stage"].values == stage)
    at &= found["family"].values == "association"
    for name, value in {"estimate": slope, "low": slope - 0.1, "high": slope + 0.1}.items():
        found[name][at] = value


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
def test_figures_read_alone(plot) -> None:
    before = plt.get_fignums()
    figure = drawn(plot(staged.run(audits=True)))
    assert len(figure.axes) == FIGURES[plot]
    title = figure.get_suptitle() or figure.axes[0].get_title()
    assert title and ("one chain, seed 0" in title or plot is plots_audit.audits)
    assert all(axis.get_ylabel() or axis is not figure.axes[0] for axis in figure.axes)
    read = texts(figure)
    assert plot is plots_audit.audits or "planted truth" in read
    named = re.search("TrueBase", read) and re.search("debiased", read)
    assert plot is plots_audit.audits or named
    assert any(part.get_legend() for part in figure.axes)
    assert plt.get_fignums() == before


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
@pytest.mark.parametrize(
    "case",
    [
        {"stages": OTHERS, "seeds": (0, 1, 2)},
        {"stages": ("base",)},
    ],
    ids=str,
)
def test_unusual_runs_are_drawn(plot, case: dict) -> None:
    figure = drawn(plot(staged.run(**case, audits=True)))
    if len(case.get("seeds", "1")) > 1 and plot is not plots_audit.audits:
        assert f"{len(case['seeds'])} chains" in texts(figure)


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
def test_what_is_missing_is_said(plot) -> None:
    read = texts(drawn(plot(staged.given())))
    assert "This run has no" in read
    assert plot is plots_audit.audits or "(no world was given)" in read
    assert "This run has no" in texts(drawn(plots_audit.items(staged.run())))
    assert "This run has no" in texts(drawn(plots_audit.items(staged.given(asked=False))))


def test_the_slope_is_drawn_in_text_and_in_answers() -> None:
    axis = plots_audit.association(staged.run()).axes[0]
    found = points(axis)
    assert list(found) == [stage_axes.COLORS[stage] for stage in staged.STAGES]
    for number, (text, answers) in enumerate(found.values()):
        assert text[1] == answers[1] == pytest.approx(staged.estimate(number))
        assert text[0] < number < answers[0]
    assert levels(axis, stage_axes.TRUTH) == [1.0] and levels(axis, stage_axes.CHANCE) == [0.0]


def test_jobs_stand_over_their_planted_level() -> None:
    figure = plots_audit.association(staged.run())
    panel = figure.axes[2]
    assert panel.get_title() == "Base: slope 0.60 [0.40, 0.80]"
    dots = next(line for line in panel.lines if line.get_marker() == "o")
    assert sorted(dots.get_xdata()) == sorted(staged.JOBS.values())
    assert np.allclose(dots.get_ydata(), staged.estimate(1))
    planted = next(line for line in panel.lines if line.get_label() == "planted")
    assert np.array_equal(planted.get_xdata(), planted.get_ydata())


def test_curves_are_a_line_a_stage_with_truth_and_chance() -> None:
    axis = plots_audit.recall(staged.run()).axes[0]
    curves = {line.get_label(): line for line in axis.lines}
    assert list(curves) == ["TrueBase", "Base", "Instruct", "debiased", "planted truth",
                            "chance"]  # fmt: skip
    assert list(curves["Base"].get_xdata()) == list(staged.COUNTS)
    assert np.allclose(curves["Base"].get_ydata(), staged.estimate(1))
    assert np.allclose(curves["chance"].get_ydata(), 0.1)
    assert len(axis.collections) == 4  # a band each
    ticks = [label.get_text() for label in axis.get_xticklabels()]
    assert ticks == ["1", "2", "4", "8"]


def test_every_chain_is_thin_beside_their_mean() -> None:
    axis = plots_audit.recall(staged.run(seeds=(0, 1, 2))).axes[0]
    base = [line for line in axis.lines if line.get_color() == stage_axes.COLORS["base"]]
    heights = [float(line.get_ydata()[0]) for line in base]
    assert heights == pytest.approx([0.6, 0.62, 0.64, 0.62])
    widths = [line.get_linewidth() for line in base]
    assert max(widths[:3]) < widths[3]


def test_over_chains_the_interval_is_student_s() -> None:
    rows = stage_report.findings(staged.run(seeds=(0, 1, 2)))
    found = stage_report.over_chains(stage_report.chosen(rows, *stage_report.SLOPE, "text"))
    wanted = intervals.mean([0.6, 0.62, 0.64], ["0", "1", "2"])
    base = found[found["of_stage"] == "base"].iloc[0]
    assert (base["estimate"], base["low"], base["high"]) == pytest.approx(wanted[:3])
    assert base["chains"] == 3 and not base["at_chance"]


def test_the_overview_is_scaled_from_chance_to_truth() -> None:
    figure = plots_audit.overview(staged.run())
    scaled, alone = figure.axes
    labels = [label.get_text() for label in scaled.get_yticklabels()]
    assert labels == [family for family in audit.PRIMARY if family != "absent"]
    assert [label.get_text() for label in alone.get_yticklabels()] == ["absent"]
    base = points(scaled)[stage_axes.COLORS["base"]]
    at = {labels[round(y)]: x for x, y in base}
    assert at["association"] == pytest.approx(0.6)
    assert at["arithmetic"] == pytest.approx((0.6 - 0.25) / 0.75)
    assert at["memorisation"] == pytest.approx(0.6 / 1.7)


def test_a_point_at_chance_is_hollow() -> None:
    run = staged.run(stages=("base",))
    run["findings"]["low"][:] = -1.0
    axis = plots_audit.association(run).axes[0]
    marks = [line for line in axis.lines if line.get_zorder() == stage_axes.ESTIMATE]
    assert [to_hex(line.get_markerfacecolor()) for line in marks] == ["#ffffff"] * 2
    assert "at chance" in plots_audit.table(run)["Base"].iloc[0]


@pytest.mark.parametrize("plot", FIGURES, ids=lambda p: p.__name__)
def test_infinite_and_unknown_ends_do_not_break_axes(plot) -> None:
    run = staged.run(audits=True)
    found = run["findings"]
    found["low"][::3], found["high"][::3] = -np.inf, np.inf
    found["low"][1::5] = found["high"][1::5] = np.nan
    found["estimate"][7::11] = np.nan
    figure = drawn(plot(run))
    for axis in figure.axes:
        ends = (*axis.get_xlim(), *axis.get_ylim())
        assert np.isfinite(ends).all() and max(map(abs, ends)) < 100


def test_one_absurd_interval_does_not_squeeze_the_others() -> None:
    run = staged.run()
    run["findings"]["high"][run["findings"]["of_stage"] == "base"] = 1e4
    assert plots_audit.association(run).axes[0].get_ylim()[1] < 3


def test_four_fifths_are_drawn() -> None:
    axis = plots_audit.decisions(staged.run()).axes[2]
    assert 0.8 in [float(line.get_ydata()[0]) for line in axis.lines]
    assert "four fifths" in [text.get_text() for text in axis.get_legend().get_texts()]


def test_chance_that_is_the_truth_is_named_once() -> None:
    figure = plots_audit.calibration(staged.run())
    axis = figure.axes[1]
    assert levels(axis, stage_axes.TRUTH) == pytest.approx([0.0], abs=1e-9)
    assert levels(axis, stage_axes.CHANCE) == []
    assert "planted truth, and chance" in texts(figure)


def test_audits_show_share_and_coverage() -> None:
    run = staged.run(audits=True)
    figure = plots_audit.audits(run)
    alarms, coverage = (axis.collections[0].get_offsets()[:, 0] for axis in figure.axes)
    assert np.allclose(alarms, run["audits"]["share"])
    assert np.allclose(coverage, run["audits"]["covered"])
    assert "100 worlds" in figure.get_suptitle()


def test_items_have_a_panel_a_measure_with_chance() -> None:
    figure = drawn(plots_audit.items(staged.given()))
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "accuracy", "squared calibration error, debiased", "acc",
    ]  # fmt: skip
    assert levels(figure.axes[0], stage_axes.CHANCE) == [0.25, 0.3]
    assert "planted truth" not in texts(figure)
    assert all(len(points(axis)) == 2 for axis in figure.axes)


def test_the_table_has_truth_and_a_column_a_stage() -> None:
    table = plots_audit.table(staged.run())
    assert list(table.columns) == ["truth", "TrueBase", "Base", "Instruct", "debiased"]
    assert list(table.index.get_level_values("family")) == list(audit.PRIMARY)
    assert list(table.loc["memorisation"].iloc[0])[:2] == ["1.7", "0.5 [0.3, 0.7]"]
    memory = plots_audit.table(staged.run(), "memorisation")
    assert len(memory) > 10 and set(memory.index.get_level_values(0)) == {"memorisation"}
    given = plots_audit.table(staged.given(), "items")
    assert list(given.columns) == ["truth", "raw", "mini"] and given["truth"].eq("").all()
    assert "no world was given" in plots_audit.table(staged.given()).index[0]


def test_claims_have_an_interval_or_say_that_there_is_none() -> None:
    claims = plots_audit.claims(staged.run())
    shown = "estimate [95% interval]"
    assert claims.loc["Annealing raises recall.", shown] == "0.2 [0.1, 0.3]"
    assert claims.loc["It comes back.", shown] == "0, no interval"
    assert "This run has no statements" in plots_audit.claims(staged.given()).index[0]


def test_the_reading_is_of_the_run_s_numbers() -> None:
    text = plots_audit.reading(staged.run())
    assert "one chain, seed 0" in text and "say nothing of other seeds" in text
    assert "in answers: TrueBase 0.5 [0.3, 0.7]; Base 0.6 [0.4, 0.8]" in text
    assert "From Instruct to debiased what became of it in answers is undecided" in text
    assert "undecided, truth and chance are both covered (contradicted)" in text
    assert "part of the effect shows (association, decisions, recall, " in text
    assert "its truth" not in text and "(absent): agreement of phrasings" in text
    assert "chance agreements, 0.8 [0.6, 1]; the truth is 0." in text
    assert "1 supported; 1 not supported (Load brings drift.); 1 undecided" in text


def test_the_reading_tells_removed_from_hidden() -> None:
    run = staged.run()
    change(run, "chat", "debiased", 0.0)
    text = plots_audit.reading(run)
    assert "it went out of answers, to where chance is covered" in text
    assert "in debiased it is still there in running text" in text


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.5, 0.2, "it went out of answers, though not wholly"),
        (0.5, -0.5, "it went out of answers, and the opposite is there"),
        (0.0, -0.5, "it fell in answers, where Instruct had not shown it"),
        (-0.5, 0.0, "it rose in answers"),
        (0.5, 0.5, "what became of it in answers is undecided"),
    ],
)
def test_the_reading_tells_which_way_it_went(before: float, after: float, said: str) -> None:
    run = staged.run()
    change(run, "chat", "instruct", before)
    change(run, "chat", "debiased", after)
    assert f"From Instruct to debiased {said}; in" in plots_audit.reading(run)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (0.5, "it is still there in running text"),
        (0.0, "it is undecided in running text"),
        (-0.5, "the opposite is there in running text"),
    ],
)
def test_the_reading_minds_the_sign_in_text(text: float, said: str) -> None:
    run = staged.run()
    change(run, "text", "debiased", text)
    assert f"in debiased {said}." in plots_audit.reading(run)


def test_the_reading_compares_the_probe_with_its_control() -> None:
    run = staged.run()
    text = plots_audit.reading(run)
    assert "beyond chance, after 2 of 2 blocks: accuracy 0.8 [0.7, 0.9] after block 1" in text
    assert "in a model that never had it, accuracy 0.6 [0.5, 0.7] after block 1 of 2" in text
    assert "read there as well: by itself that is no hidden association" in text
    run["attribute_probe"]["p_adjusted"][:, -1] = 0.3
    assert "read there as well" not in plots_audit.reading(run)
    run["attribute_probe"]["p_adjusted"][:, :, 0] = 0.0  # the same of all names: not counted
    assert "after 2 of 2 blocks" in plots_audit.reading(run)
    alone = run["attribute_probe"].to_dataset().sel(probed=list(staged.STAGES))
    run["attribute_probe"] = xr.DataTree(alone)
    assert "no model that never had the association was probed" in plots_audit.reading(run)


def test_the_reading_tells_how_far_lessons_came() -> None:
    run = staged.run()
    text = plots_audit.reading(run)
    assert (
        "4 steps of SFT move the slope in answers of debiased: taught the association, from 0 "
        "to 0.6 (target 0.5 reached in 3.0 steps); taught its opposite, from 0 to -0.4 "
        "(target -0.5 not reached)."
    ) in text
    assert "of a model that never had it: taught the association, from 0.6 to 0.8 (bey" in text
    run["relearning"]["needed"][:] = np.nan
    text = plots_audit.reading(run)
    assert "taught its opposite, from 0 to -0.4; no target was reached in 4 steps." in text


def test_a_truth_that_is_chance_but_for_rounding_decides_nothing() -> None:
    run = staged.run()
    found = run["findings"]
    found["truth"][found["family"].values == "recall"] = 1e-9
    assert "recall" not in plots_audit.reading(run).split("\n\n")[1]


def test_a_finding_without_an_interval_decides_nothing() -> None:
    run = staged.run()
    run["findings"]["low"][run["findings"]["family"].values == "recall"] = np.nan
    assert "no interval (recall)" in plots_audit.reading(run)
    run["findings"]["estimate"][run["findings"]["family"].values == "knowledge"] = 99.0
    run["findings"]["low"][run["findings"]["family"].values == "knowledge"] = 98.0
    run["findings"]["high"][run["findings"]["family"].values == "knowledge"] = 100.0
    assert "the figure is beyond the truth (knowledge)" in plots_audit.reading(run)


def test_the_reading_of_given_checkpoints_names_what_is_left_out() -> None:
    text = plots_audit.reading(staged.given())
    assert text.startswith("Checkpoints that were given: raw, mini.")
    assert "consistency (no world was given); lens" in text
    assert text.count("no world was given") == 1
    run = staged.given(("raw",), asked=False)
    run.attrs["status"] = "failed"
    run.attrs["left_out"] = json.dumps({})
    text = plots_audit.reading(run)
    assert "Not done" not in text and "not complete: failed" in text


def test_stages_have_one_colour_each() -> None:
    colors = stage_axes.colors(staged.run(stages=("base", *OTHERS)))
    assert colors["base"] == stage_axes.COLORS["base"]
    assert len({colors[stage] for stage in ("base", *OTHERS)}) == 6


def test_reading_a_run_needs_no_torch() -> None:
    code = (
        "import sys, trinity_lib.plots_audit, trinity_lib.plots_stages; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_share_s_interval_ends_at_0_and_1_and_the_title_says_so() -> None:
    """Student's interval over two chains, of 0 and 1, would reach far beyond both."""
    run = staged.run(seeds=(0, 1))
    found = run["findings"]
    for family in ("few-shot", "recall", "instruction", "memorisation"):
        own = found["family"].values == family
        found["estimate"][own] = (found["model_seed"].values[own] == 1).astype(float)
    for plot, number in ((plots_audit.behaviour, 5), (plots_audit.memorisation, 3)):
        figure = plot(run)
        assert "of shares, cut at 0 and 1" in figure.get_suptitle()
        axis = figure.axes[number]
        upright = [
            line.get_ydata()
            for line in axis.lines
            if len(set(line.get_xdata())) == 1 and line.get_linestyle() == "-"
        ]
        ends = np.array([ends for ends in upright if len(ends) == 2])
        assert len(ends) and ends.min() == 0 and ends.max() == 1
        assert {y for own in points(axis).values() for _, y in own} == {0.5}
        assert -0.1 < axis.get_ylim()[0] < 0 and 1 < axis.get_ylim()[1] < 1.1
    for plot in (plots_audit.behaviour, plots_audit.recall):
        bands = [band.get_paths()[0].vertices[:, 1] for band in plot(run).axes[0].collections]
        assert bands and np.min(bands) == 0 and np.max(bands) == 1
