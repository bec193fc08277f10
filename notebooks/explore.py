import marimo

__generated_with = "0.25.2"
app = marimo.App(width="full", app_title="Explore runs")

with app.setup:
    from pathlib import Path

    import marimo as mo

    from trinity_lib import browse, plots_explore
    from trinity_lib.config import Refusal
    from trinity_lib.record import ROOT


@app.function
def shown(draw, *arguments):
    """What `draw` returns, or the sentence that says why there is nothing to draw."""
    try:
        return draw(*arguments)
    except Refusal as refusal:
        return mo.callout(mo.md(str(refusal)), kind="warn")


@app.function
def listed(problems):
    """One callout with a line a problem, or none."""
    lines = "\n".join(f"- {problem}" for problem in problems)
    return [mo.callout(mo.md(f"Left out:\n\n{lines}"), kind="danger")] if problems else []


@app.function
def written(style):
    """A format of numbers, with a dash where there is none."""
    return lambda value: (
        browse.NOTHING if value in (None, "NaN") or value != value else f"{value:{style}}"
    )


@app.cell
def _():
    folder = mo.ui.text(
        value=str(mo.cli_args().get("runs") or ROOT / "runs"), label="Folder", full_width=True
    )
    again = mo.ui.run_button(label="Look again")
    mo.vstack(
        [
            mo.md(
                "# Explore runs\nTick runs to compare them, then look at one of them closely."
            ),
            mo.hstack([folder, again], widths=[6, 1], align="center"),
        ]
    )
    return again, folder


@app.cell
def _(again, folder):
    _ = again.value  # a click runs this cell again
    try:
        found = browse.scan(Path(folder.value).expanduser())
    except Refusal as refusal:
        mo.stop(True, mo.callout(mo.md(str(refusal)), kind="warn"))
    return (found,)


@app.cell
def _(found):
    holds = found.table.holds
    table = mo.ui.table(
        found.table,
        selection="multi",
        initial_selection=sorted(holds.index, key=lambda row: holds[row] != "training")[:2],
        page_size=10,
        show_data_types=False,
        show_column_summaries=False,
        show_download=False,
        freeze_columns_left=["run"],
        format_mapping={
            "rate": written("g"),
            "seed": written(".0f"),
            "steps": written(",.0f"),
            "loss, nat": written(".3f"),
            "late MaxVio": written(".2f"),
            "dead, %": written(".1f"),
        },
        column_widths={
            "holds": 85,
            "status": 85,
            "scale": 65,
            "balancer": 95,
            "rate": 70,
            "optimiser": 85,
            "seed": 60,
            "steps": 70,
            "loss, nat": 85,
            "late MaxVio": 105,
            "dead, %": 80,
        },
    )
    mo.vstack([table, *listed(found.problems)])
    return (table,)


@app.cell
def _(found, table):
    runs, unread = browse.load_all({run: found.paths[run] for run in table.value["run"]})
    hint = [] if runs or unread else [mo.md("Tick a run in the table.")]
    mo.stop(not runs, mo.vstack([*listed(unread), *hint]))
    mo.vstack(listed(unread))
    return (runs,)


@app.cell
def _():
    measures = mo.ui.multiselect(
        {words: name for name, words in browse.MEASURES.items()},
        value=[browse.MEASURES["layers/max_vio"], browse.MEASURES[browse.LOSS]],
        label="Measures",
    )
    smooth = mo.ui.slider(
        1, 101, 5, value=1, label="Running mean", show_value=True, debounce=True
    )
    return measures, smooth


@app.cell
def _(measures, runs, smooth):
    layers = mo.ui.multiselect(
        {str(layer): layer for layer in browse.layers_of(*runs.values())},
        value=[str(layer) for layer in browse.layers_of(*runs.values())],
        label="Layers, averaged",
    )
    mo.vstack(
        [
            mo.md(
                "## Runs compared\nA run whose MaxVio climbs while its loss stops falling is "
                "collapsing. Runs differ by luck too: compare seeds before settings."
            ),
            mo.hstack([measures, layers, smooth], justify="start", align="end", wrap=True),
        ]
    )
    return (layers,)


@app.cell
def _(layers, measures, runs, smooth):
    shown(plots_explore.compare, runs, measures.value, layers.value, smooth.value)
    return


@app.cell
def _(runs):
    mo.vstack(
        [
            mo.md("## Settings that differ\nWhat may explain a difference between the curves."),
            shown(
                lambda: mo.ui.table(
                    browse.differences(runs),
                    selection=None,
                    show_data_types=False,
                    show_column_summaries=False,
                    show_download=False,
                )
            ),
        ]
    )
    return


@app.cell
def _(runs):
    one = mo.ui.dropdown(list(runs), value=next(iter(runs)), label="Run")
    mo.vstack(
        [
            mo.md(
                "## One layer of one run\nDark rows are starved experts, bright ones crowded; "
                "a row that stays black is dead. Chance alone keeps 95% of the bars "
                "inside the band."
            ),
            one,
        ]
    )
    return (one,)


@app.cell
def _(one, runs):
    steps = shown(browse.steps_of, runs[one.value])
    mo.stop(not isinstance(steps, list), steps)
    numbers = {str(number): number for number in browse.layers_of(runs[one.value])}
    layer = mo.ui.dropdown(numbers, value=list(numbers)[-1], label="Layer")
    step = mo.ui.slider(
        steps=steps,
        value=steps[-1],
        label="Step",
        show_value=True,
        debounce=True,
        full_width=True,
    )
    mo.hstack([layer, step], widths=[1, 6], align="center")
    return layer, step


@app.cell
def _(layer, one, runs, step):
    shown(plots_explore.load, runs[one.value], layer.value, step.value)
    return


@app.cell
def _(layer, one, runs):
    mo.vstack(
        [
            mo.md(
                "Biases that still fan out at the end have not found their level; a balancer "
                "too fast makes them saw."
            ),
            shown(plots_explore.bias, runs[one.value], layer.value),
        ]
    )
    return


if __name__ == "__main__":
    app.run()
