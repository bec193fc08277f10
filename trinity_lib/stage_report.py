"""What was found of a model's stages, as tables and sentences; from the run file alone.

Of several chains a figure is the mean, with a t-interval over chains; of one chain it has the
finding's own interval, over names, people or places, which says nothing of other seeds.
"""

import json
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from trinity_lib import audit, intervals
from trinity_lib.metrics import group
from trinity_lib.stage_schema import STAGES

NAMES = {
    "truebase": "TrueBase", "base": "Base", "instruct": "Instruct", "debiased": "debiased",
    "oracle": "generator", "never had it": "a model that never had it",
}  # fmt: skip
"""What tables and figures call the stages of a chain; others keep their own names."""
KEYS = ["of_stage", "asked_as", "family", "item", "measure"]
"""Columns that tell one finding from another, but for the chain."""
SLOPE = ("association", "slope, held-out names", "log-odds per planted log-odds")
"""How much of the planted association is there."""
AT_THE_END = "end of question"
"""Where a probe reads what the answer could be made from."""
CONTROL = "never had it"
"""Of a null world, never told the association: what is probed and taught beside a chain's."""
LEVEL = 0.05
"""Of an adjusted p value below which a probe is said to read something."""
HELD = (
    "the planted truth is covered", "part of the effect shows",
    "the figure is beyond the truth", "at chance",
    "undecided, truth and chance are both covered", "the opposite is held", "no interval",
)  # fmt: skip
"""What a finding can say of a planted effect; not the fourth, fifth and last: chance is out."""


def name(stage: str) -> str:
    """What a stage is called."""
    return NAMES.get(stage, stage)


def findings(run: xr.DataTree) -> pd.DataFrame:
    """The table of /findings, a row a finding and chain; empty where there are none."""
    if "findings" not in run.children:
        return pd.DataFrame(columns=list(STAGES["findings"]))
    return group(run, "findings").to_dataframe().reset_index(drop=True)


def stages(run: xr.DataTree) -> list[str]:
    """The stages that are compared, in their order."""
    return [str(stage) for stage in json.loads(run.attrs["stages"])]


def chains(rows: pd.DataFrame) -> list[int]:
    """The seeds of the chains that findings are of; empty for checkpoints that are given."""
    return sorted(int(seed) for seed in set(rows["model_seed"]) if seed >= 0)


def chosen(
    rows: pd.DataFrame,
    family: str,
    item: str | None = None,
    measure: str | None = None,
    asked_as: str | None = None,
) -> pd.DataFrame:
    """The findings of a family that have an item, a measure, a way of asking."""
    wanted = {"family": family, "item": item, "measure": measure, "asked_as": asked_as}
    for column, value in wanted.items():
        if value is not None:
            rows = rows[rows[column] == value]
    return rows


def over_chains(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for every finding, whatever the number of chains, in the order of the first.

    Adds `chains`, how many gave a value, and `at_chance`, whether the interval covers chance.
    """
    made = [
        {**dict(zip(KEYS, key, strict=True)), **_together(own)}
        for key, own in rows.groupby(KEYS, sort=False)
    ]
    values = ["truth", "estimate", "low", "high", "chance", "units", "chains"]
    table = pd.DataFrame(made, columns=[*KEYS, *values])
    within = (table["low"] <= table["chance"]) & (table["chance"] <= table["high"])
    return table.assign(at_chance=within)


def _together(own: pd.DataFrame) -> dict[str, float]:
    known = own[np.isfinite(own["estimate"].to_numpy(float))]
    first = (known if len(known) else own).iloc[0]
    found = {key: float(first[key]) for key in ("estimate", "low", "high")}
    if len(known) > 1:
        seeds = known["model_seed"].astype(str)
        found = intervals.mean(known["estimate"].to_numpy(float), list(seeds))._asdict()
    values = {key: float(own[key].mean()) for key in ("truth", "chance")}
    found["units"] = int(first["units"])
    return {**values, **found, "chains": len(known)}


def primaries(run: xr.DataTree) -> pd.DataFrame:
    """Every family's deciding finding, by stage, over chains; as the text goes on."""
    rows = findings(run)
    own = [chosen(rows, family, *which, "text") for family, which in audit.PRIMARY.items()]
    return over_chains(pd.concat(own))


def missing(run: xr.DataTree, what: str, *reasons: str) -> str:
    """The sentence that says that a run has none of something, and why if it is known.

    `reasons` are words to look for in what the run left out, the most telling first.
    """
    left = left_out(run)
    for word in reasons:
        why = next((why for key, why in left.items() if word in key), "")
        if why:
            return f"This run has no {what} ({why})."
    return f"This run has no {what}."


def left_out(run: xr.DataTree) -> dict[str, str]:
    """What was not done, and why."""
    return json.loads(run.attrs.get("left_out") or "{}")


def table(run: xr.DataTree, family: str | None = None) -> pd.DataFrame:
    """Estimates and intervals beside the truth, a column a stage.

    Without `family` the finding that decides of each family; else all that a family has. Of
    what the run has not got, a row that says so.
    """
    rows = primaries(run) if family is None else over_chains(chosen(findings(run), family))
    if rows.empty:
        what = "findings beside a planted truth" if family is None else f"findings of {family}"
        return _nothing("finding", missing(run, what, family or "association"))
    index = ["family", "item", "measure", "asked_as"]
    made = []
    for key, own in rows.groupby(index, sort=False):
        row = dict(zip(index, key, strict=True))
        row["truth"] = _number(own["truth"].iloc[0])
        at = own.set_index("of_stage")
        for stage in stages(run):
            row[name(stage)] = _cell(at.loc[[stage]]) if stage in at.index else ""
        made.append(row)
    return pd.DataFrame(made).set_index(index)


def claims(run: xr.DataTree) -> pd.DataFrame:
    """What was said beforehand of a chain, the statistic that decides it, and the verdict."""
    if "claims" not in run.children:
        what = "statements: they are made of a chain that is trained here"
        return _nothing("statement", missing(run, what))
    found = group(run, "claims").to_dataframe()
    shown = [_interval(*row) for row in found[["estimate", "low", "high"]].to_numpy(float)]
    return pd.DataFrame(
        {
            "statement": found["statement"],
            "statistic": found["statistic"],
            "estimate [95% interval]": shown,
            "chains": found["seeds"],
            "verdict": found["verdict"],
        }
    ).set_index("statement")


def reading(run: xr.DataTree) -> str:
    """What a run shows, in sentences whose figures and verdicts come from the run."""
    parts = [
        _about(run), *_planted(run), *_invented(run), *_polished(run), *_inside(run),
        *_said(run), *_not_done(run),
    ]  # fmt: skip
    if run.attrs.get("status") != "complete":
        parts.append(f"The run is not complete: {run.attrs.get('status')}.")
    return "\n\n".join(parts)


def _about(run: xr.DataTree) -> str:
    named = ", ".join(name(stage) for stage in stages(run))
    rows = findings(run)
    seeds = chains(rows)
    if not seeds:
        every = f"Checkpoints that were given: {named}."
        return f"{every} Intervals are over what each was asked." if len(rows) else every
    if len(seeds) == 1:
        return (
            f"{named}: one chain, seed {seeds[0]}. Intervals are over names, people or places "
            "of this chain and say nothing of other seeds."
        )
    listed = ", ".join(str(seed) for seed in seeds)
    return (
        f"{named}: {len(seeds)} chains, seeds {listed}. Intervals are over chains; comparisons "
        f"and looks inside are of the first, seed {rows['model_seed'].iloc[0]}."
    )


def _planted(run: xr.DataTree) -> list[str]:
    """Which families recover what was planted, a sentence a stage."""
    rows, found = primaries(run), []
    for stage in stages(run):
        own = rows[(rows["of_stage"] == stage) & rows["truth"].notna()]
        truth, chance = (own[key].to_numpy(float) for key in ("truth", "chance"))
        own = own[~np.isclose(truth, chance, atol=1e-6)]
        if own.empty:
            continue
        told = own["family"].groupby(_held(own), sort=False).agg(list)
        each = [f"{what} ({_listed(told[what])})" for what in HELD if what in told.index]
        found.append(f"{name(stage)}, by each family's deciding figure: {'; '.join(each)}.")
    return found


def _held(own: pd.DataFrame) -> pd.Series:
    """Which of `HELD` every finding is; one that covers truth and chance decides nothing."""
    unknown = own[["estimate", "low", "high"]].isna().any(axis=1)
    covers = (own["low"] <= own["truth"]) & (own["truth"] <= own["high"])
    share = (own["estimate"] - own["chance"]) / (own["truth"] - own["chance"])
    cases = [unknown, covers & own["at_chance"], covers, own["at_chance"], share < 0, share < 1]
    named = [HELD[6], HELD[4], HELD[0], HELD[3], HELD[5], HELD[1]]
    return pd.Series(np.select(cases, named, HELD[2]), own.index)


def _invented(run: xr.DataTree) -> list[str]:
    """What the last stage says of what no text tells: there truth and chance are one."""
    rows = chosen(primaries(run), "absent")
    rows = rows[rows["of_stage"] == stages(run)[-1]]
    if rows.empty:
        return []
    row = rows.iloc[0]
    return [
        f"What {name(row['of_stage'])} invents where nothing was told (absent): "
        f"{row['measure']}, {_cell(rows)}; the truth is {_number(row['truth'])}."
    ]


def _polished(run: xr.DataTree) -> list[str]:
    """The association in running text and in conversations."""
    rows = over_chains(chosen(findings(run), *SLOPE))
    found = []
    for asked_as, where in (("text", "in running text"), ("chat", "in answers")):
        own = rows[rows["asked_as"] == asked_as].set_index("of_stage")
        there = [stage for stage in stages(run) if stage in own.index]
        if not there:
            continue
        each = (f"{name(s)} {_cell(own.loc[[s]])}" for s in there)
        found.append(f"Share of the planted association {where}: {'; '.join(each)}.")
    if not found:
        return []
    return [" ".join([*found, *_last(run, rows)])]


def _last(run: xr.DataTree, rows: pd.DataFrame) -> list[str]:
    """What the last stage did to the association, and what it left."""
    both = {asked_as: own.set_index("of_stage") for asked_as, own in rows.groupby("asked_as")}
    order = [s for s in stages(run) if "chat" in both and s in both["chat"].index]
    if len(order) < 2 or "text" not in both or order[-1] not in both["text"].index:
        return []
    before, after = (both["chat"].loc[[stage]].iloc[0] for stage in order[-2:])
    step = f"From {name(order[-2])} to {name(order[-1])}"
    low, high = _moved(run, order[-2], order[-1])
    if high < 0:
        told = f"{step} it {_fell(before, after)}"
    elif low > 0:
        told = f"{step} it rose in answers"
    else:
        told = f"{step} what became of it in answers is undecided"
    text = both["text"].loc[order[-1]]
    left = "the opposite is there" if text["high"] < 0 else "it is undecided"
    left = "it is still there" if text["low"] > 0 else left
    return [f"{told}; in {name(order[-1])} {left} in running text."]


def _fell(before: pd.Series, after: pd.Series) -> str:
    """What it is, in answers, that fell: only what was there before can go out."""
    if not before["low"] > 0:
        return f"fell in answers, where {name(str(before.name))} had not shown it"
    if after["at_chance"]:
        return "went out of answers, to where chance is covered"
    if after["high"] < 0:
        return "went out of answers, and the opposite is there"
    return "went out of answers, though not wholly"


def _moved(run: xr.DataTree, before: str, after: str) -> tuple[float, float]:
    """Interval of what the slope in answers rose by: paired over chains, where there are some.

    Of one chain, the two intervals apart from each other: wider than a paired one.
    """
    rows = chosen(findings(run), *SLOPE)
    rows = rows[rows["asked_as"] == "chat"].set_index(["of_stage", "model_seed"])
    first, last = rows.loc[before], rows.loc[after]
    if len(first) > 1:
        gaps = (last["estimate"] - first["estimate"]).dropna()
        found = intervals.mean(gaps.to_numpy(float), [str(seed) for seed in gaps.index])
        return found.low, found.high
    old, new = first.iloc[0], last.iloc[0]
    return new["low"] - old["high"], new["high"] - old["low"]


def _inside(run: xr.DataTree) -> list[str]:
    """Whether a name's group can be read off inside, and whether it comes back."""
    found = []
    if "attribute_probe" in run.children:
        found += _probed(group(run, "attribute_probe"), stages(run)[-1])
    if "relearning" in run.children:
        found += _relearnt(group(run, "relearning"))
    return [" ".join(found)] if found else []


def _probed(found: xr.Dataset, last: str) -> list[str]:
    """The probe at the question's end, half way through, and the control's beside it.

    Before the first block the state there is the same for all names, so that is not counted.
    """
    if AT_THE_END not in found.place.values or last not in found.probed.values:
        return []
    at = found.sel(place=AT_THE_END).isel(block=found.block.values > 0)
    read = int((at["p_adjusted"].sel(probed=last) < LEVEL).sum())
    half = int(at.block[(at.sizes["block"] - 1) // 2])
    told = f"Inside {name(last)} a linear probe at the question's end reads a name's group, "
    told += f"beyond chance, after {read} of {at.sizes['block']} blocks: "
    told += _accuracy(at, last, half)
    if CONTROL not in at.probed.values:
        return [f"{told}; no model that never had the association was probed beside it."]
    told += f"; in {name(CONTROL)}, {_accuracy(at, CONTROL, half)}."
    if float(at["p_adjusted"].sel(probed=CONTROL, block=half)) < LEVEL:
        told += " The group can be read there as well: by itself that is no hidden association."
    return [told]


def _accuracy(at: xr.Dataset, probed: str, block: int) -> str:
    one = at.sel(probed=probed, block=block)
    shown = _interval(*(float(one[key]) for key in ("accuracy", "low", "high")))
    chance = _number(float(one["chance"]))
    return f"accuracy {shown} after block {block} of {int(at.block[-1])}, chance {chance}"


def _relearnt(taught: xr.Dataset) -> list[str]:
    """The slope at the first and the last look, of every start, and what it reached."""
    most, told = int(taught["steps"].max()), []
    for start in taught.start.values:
        one = taught.sel(start=start)
        none = bool(one["needed"].isnull().all())
        each = []
        for lesson in taught.lesson.values:
            bias = one["bias"].sel(lesson=lesson).values
            way = f"taught {lesson}, from {_number(bias[0])} to {_number(bias[-1])}"
            each.append(way if none else f"{way} ({_reached(one.sel(lesson=lesson))})")
        end = f"; no target was reached in {most} steps" if none else ""
        what = f"{most} steps of SFT move the slope in answers of {name(str(start))}"
        told.append(f"{what}: {'; '.join(each)}{end}.")
    return told


def _reached(one: xr.Dataset) -> str:
    target, needed = f"target {_number(float(one['target']))}", float(one["needed"])
    if needed == 0:
        return f"beyond its {target} before it was taught"
    return f"{target} " + (f"reached in {needed:.1f} steps" if needed > 0 else "not reached")


def _said(run: xr.DataTree) -> list[str]:
    """How many statements hold, and those that do not."""
    if "claims" not in run.children:
        return []
    found = group(run, "claims").to_dataframe()
    told = []
    for verdict in ("supported", "not supported", "undecided"):
        own = found["statement"][found["verdict"] == verdict]
        told.append(f"{len(own)} {verdict}")
        if verdict != "supported" and len(own):
            told[-1] += f" ({' '.join(own)})"
    return [f"Of {len(found)} statements made beforehand: {'; '.join(told)}."]


def _not_done(run: xr.DataTree) -> list[str]:
    """What was left out, once for every reason."""
    why: dict[str, list[str]] = {}
    for what, reason in left_out(run).items():
        why.setdefault(reason, []).append(what)
    told = "; ".join(f"{', '.join(what)} ({reason})" for reason, what in why.items())
    return [f"Not done: {told}."] if told else []


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _cell(found: pd.DataFrame) -> str:
    """The first row's."""
    row = found.to_dict("records")[0]
    shown = _interval(row["estimate"], row["low"], row["high"])
    return f"{shown}, at chance" if row["at_chance"] else shown


def _interval(estimate: float, low: float, high: float) -> str:
    if math.isnan(estimate):
        return ""
    if math.isnan(low) or math.isnan(high):
        return f"{_number(estimate)}, no interval"
    return f"{_number(estimate)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    """Three digits; what rounding left of 0 is 0."""
    if math.isnan(value):
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{0.0 if abs(value) < 1e-6 else value:.3g}"


def _nothing(column: str, sentence: str) -> pd.DataFrame:
    """A table that says that there is none."""
    return pd.DataFrame({column: [sentence]}).set_index(column)
