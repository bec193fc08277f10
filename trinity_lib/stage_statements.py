"""What is said of a chain's stages, and the statistic that decides each of it.

Each statement was written down before the reference chains were trained (`LOG.md` says which
pilots came before): a number a chain, positive where it holds. Over several chains its mean has
a 95% t-interval; of one alone the interval is the finding's own, over names, people or places,
and says nothing of other seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from trinity_lib import association, drift, findings, intervals, memorisation
from trinity_lib.intervals import Interval

RAW, BASE, INSTRUCT, DEBIASED = "truebase", "base", "instruct", "debiased"
NEVER = "never had it"
"""The start of relearning that was told no association."""
ASKED = "end of question"
"""Where the state is looked at: there the answer is said next."""
UNKNOWN = Interval(math.nan, math.nan, math.nan, 0)
"""Of what was not looked at."""
PROBED = 2
"""Block whose state is probed: half of the four that a chain's model has."""


class Seen(NamedTuple):
    """What was found of one chain."""

    rows: pd.DataFrame
    """The findings."""
    groups: Mapping[str, xr.Dataset]
    """Comparisons and looks inside, where they were made."""


class Statement(NamedTuple):
    """One statement and the statistic that decides it."""

    text: str
    """What is said."""
    statistic: str
    """What is measured, positive where it holds."""
    measure: Callable[[Seen], Interval]
    """Of one chain."""


def one(
    seen: Seen, stage: str, family: str, item: str, measure: str, asked_as: str = "text"
) -> Interval:
    """One finding; without a value where it was not made."""
    rows = seen.rows
    at = (rows["of_stage"] == stage) & (rows["family"] == family) & (rows["item"] == item)
    found = rows[at & (rows["measure"] == measure) & (rows["asked_as"] == asked_as)]
    if found.empty:
        return UNKNOWN
    row = found.iloc[0]
    return Interval(row["estimate"], row["low"], row["high"], int(row["units"]))


def less(first: Interval, second: Interval | float) -> Interval:
    """A difference. Of two findings as if they were independent: of the same names they are
    rather alike, and the interval is wide."""
    if isinstance(second, float | int):
        second = Interval(float(second), float(second), float(second), first.units)
    estimate = first.estimate - second.estimate
    below = math.hypot(first.estimate - first.low, second.high - second.estimate)
    above = math.hypot(first.high - first.estimate, second.estimate - second.low)
    return Interval(estimate, estimate - below, estimate + above, first.units)


def _slope(stage: str, asked_as: str = "text") -> Callable[[Seen], Interval]:
    item, measure = association.PRIMARY[association.NAME]
    return lambda seen: one(seen, stage, association.NAME, item, measure, asked_as)


_FOLLOWS = "Pearson correlation with planted levels, held-out names"
_TOLD = "trained phrasings"
_PER_DOUBLING = "probability per doubling of exposures"
_PROBABILITY = "probability of the value"
_ERROR = "absolute error of a probability"
_INVENTED = "highest probability beyond the most frequent value's"
_LOSS, _DIGIT = memorisation.PRIMARY[memorisation.FAMILY]


def _change(after: str, before: str, family: str, item: str, measure: str) -> Callable:
    """One finding at a stage less the same at another."""
    return lambda seen: less(
        one(seen, after, family, item, measure), one(seen, before, family, item, measure)
    )


def _correlated(stage: str) -> Callable[[Seen], Interval]:
    return lambda seen: less(one(seen, stage, association.NAME, _FOLLOWS, "correlation"), 0.9)


def _removed(seen: Seen) -> Interval:
    return less(_slope(INSTRUCT, "chat")(seen), _slope(DEBIASED, "chat")(seen))


def _left_in_text(seen: Seen) -> Interval:
    """More than half of the Instruct's."""
    before = _slope(INSTRUCT)(seen)
    half = Interval(before.estimate / 2, before.low / 2, before.high / 2, before.units)
    return less(_slope(DEBIASED)(seen), half)


def _decoded(seen: Seen) -> Interval:
    if "attribute_probe" not in seen.groups:
        return UNKNOWN
    at = seen.groups["attribute_probe"].sel(place=ASKED, probed=DEBIASED, block=PROBED)
    estimate, low, high = (float(at[name]) for name in ("accuracy", "low", "high"))
    return less(Interval(estimate, low, high, int(at["units"])), float(at["chance"]))


def _beyond_control(seen: Seen) -> Interval:
    """The same less the accuracy in a model that never had the association."""
    found = seen.groups.get("attribute_probe")
    if found is None or NEVER not in found["probed"]:
        return UNKNOWN
    at = found.sel(place=ASKED, block=PROBED)
    both = [at.sel(probed=each) for each in (DEBIASED, NEVER)]
    mine, control = (
        Interval(float(b["accuracy"]), float(b["low"]), float(b["high"]), int(b["units"]))
        for b in both
    )
    return less(mine, control)


def _said_inside(seen: Seen) -> Interval:
    """The slope that an answer would have one block before the last."""
    found = seen.groups.get("association_lens")
    if found is None:
        return UNKNOWN
    at = found.sel(lens_place=ASKED, probed=DEBIASED).isel(block=-2)
    estimate, low, high = (float(at[name]) for name in ("slope", "low", "high"))
    return Interval(estimate, low, high, int(at["units"]))


def _relearnt(seen: Seen, start: str) -> tuple[float, float]:
    """How far each lesson moves the answers its own way by the last look; NaN: no start."""
    found = seen.groups.get("relearning")
    if found is None or start not in found["start"]:
        return math.nan, math.nan
    bias = found["bias"].sel(start=start)
    moved = bias.isel(look=-1) - bias.isel(look=0)  # the opposite's way is down
    old, new = (float(moved.sel(lesson=n)) for n in ("the association", "its opposite"))
    return old, -new


def _comes_back(seen: Seen) -> Interval:
    """More than its opposite; lessons may not be alike, so beyond a model that never had it."""
    (old, new), (first, other) = (_relearnt(seen, start) for start in (DEBIASED, NEVER))
    return Interval((old - new) - (first - other), math.nan, math.nan, 1)


def _saved(seen: Seen) -> Interval:
    """More than a model learns it that never had it."""
    return Interval(
        _relearnt(seen, DEBIASED)[0] - _relearnt(seen, NEVER)[0], math.nan, math.nan, 1
    )


def _drift_follows_load(seen: Seen) -> Interval:
    if "expert_drift" not in seen.groups:
        return UNKNOWN
    return drift.load_correlation(seen.groups["expert_drift"], f"{BASE} -> {INSTRUCT}")


def _settles(seen: Seen) -> Interval:
    """Shares of choices kept; layers are the units."""
    if "routing_change" not in seen.groups:
        return UNKNOWN
    kept = seen.groups["routing_change"]["saturation"]
    gaps = kept.sel(change=f"{BASE} -> {INSTRUCT}") - kept.sel(change=f"{RAW} -> {BASE}")
    return intervals.mean(gaps.values, [str(layer) for layer in gaps["layer"].values])


CLAIMS = (
    Statement(
        "The TrueBase's job associations follow the planted ones (correlation above 0.9).",
        "correlation of log-odds, held-out names, TrueBase, less 0.9",
        _correlated(RAW),
    ),
    Statement(
        "The Base's job associations follow the planted ones (correlation above 0.9).",
        "correlation of log-odds, held-out names, Base, less 0.9",
        _correlated(BASE),
    ),
    Statement(
        "The Base holds less of the association than was planted.",
        "1 less the slope of log-odds on the planted ones, held-out names, Base",
        lambda seen: less(Interval(1.0, 1.0, 1.0, 0), _slope(BASE)(seen)),
    ),
    Statement(
        "Annealing strengthens the association.",
        "slope, held-out names: Base less TrueBase",
        lambda seen: less(_slope(BASE)(seen), _slope(RAW)(seen)),
    ),
    Statement(
        "Facts that are told more often are recalled better.",
        "probability of a told value, per doubling of exposures, Base",
        lambda seen: one(seen, BASE, "recall", _TOLD, _PER_DOUBLING),
    ),
    Statement(
        "Annealing raises recall.",
        "probability of a told value: Base less TrueBase",
        _change(BASE, RAW, "recall", _TOLD, _PROBABILITY),
    ),
    Statement(
        "Codes of the raw text fade in annealing, which has none of them.",
        "loss per digit, held-out less told codes: TrueBase less Base",
        _change(RAW, BASE, "memorisation", _LOSS, _DIGIT),
    ),
    Statement(
        "Annealing makes frequencies more exact.",
        "mean absolute error of a frequency: TrueBase less Base",
        _change(RAW, BASE, "calibration", _TOLD, _ERROR),
    ),
    Statement(
        "Post-training makes frequencies less exact.",
        "mean absolute error of a frequency: Instruct less Base",
        _change(INSTRUCT, BASE, "calibration", _TOLD, _ERROR),
    ),
    Statement(
        "Post-training makes inventions about people more confident in running text.",
        "highest probability of a fact never told, beyond its marginal: Instruct less Base",
        _change(INSTRUCT, BASE, "absent", _TOLD, _INVENTED),
    ),
    Statement(
        "Fair answers take the association out of answers.",
        "slope in conversations, held-out names: Instruct less debiased",
        _removed,
    ),
    Statement(
        "Most of the association stays in running text when answers are fair.",
        "slope in text, held-out names: debiased less half of the Instruct's",
        _left_in_text,
    ),
    Statement(
        "A name's group can be read off inside the debiased model where it answers fairly.",
        f"accuracy of a linear probe after block {PROBED} at the question's end, less chance",
        _decoded,
    ),
    Statement(
        "It can be read off better than in a model that never had the association.",
        f"accuracy of the same probe: debiased less one of a null world, block {PROBED}",
        _beyond_control,
    ),
    Statement(
        "One block before the debiased model answers fairly, its answer has the association.",
        "slope by the logit lens before the last block, at the question's end, debiased",
        _said_inside,
    ),
    Statement(
        "The removed association comes back further than its opposite is learnt.",
        "SFT's move of the slope: the association less its opposite, less the same of one of a "
        "null world",
        _comes_back,
    ),
    Statement(
        "It comes back further than a model learns it that never had it.",
        "SFT's move of the slope: debiased less one of a null world",
        _saved,
    ),
    Statement(
        "Experts with more load drift more in post-training.",
        "rank correlation within layers of drift, Base to Instruct, and load on held-out text",
        _drift_follows_load,
    ),
    Statement(
        "Post-training changes fewer choices of the router than annealing.",
        "share of choices kept: Base to Instruct less TrueBase to Base",
        _settles,
    ),
)
"""What is said of every chain."""


def values(chains: Sequence[Seen]) -> dict[str, np.ndarray]:
    """The values of /claim_values: every statement's statistic of every chain."""
    found = [[statement.measure(seen) for seen in chains] for statement in CLAIMS]
    return {
        name: np.array([[getattr(interval, name) for interval in row] for row in found])
        for name in ("estimate", "low", "high")
    }


def claims(chains: Sequence[Seen]) -> dict[str, Any]:
    """The values of /claims: over chains, or of the one chain's own intervals."""
    judged = [_judged([statement.measure(seen) for seen in chains]) for statement in CLAIMS]
    return {
        "statement": [statement.text for statement in CLAIMS],
        "statistic": [statement.statistic for statement in CLAIMS],
        **{name: [getattr(j, name) for j in judged] for name in findings.Judged._fields},
    }


def _judged(found: Sequence[Interval]) -> findings.Judged:
    if len(found) > 1:
        return findings.judge(pd.Series([interval.estimate for interval in found]))
    ((estimate, low, high, _),) = found
    verdict = "supported" if low > 0 else "not supported" if high < 0 else "undecided"
    return findings.Judged(estimate, low, high, int(not math.isnan(estimate)), verdict)
