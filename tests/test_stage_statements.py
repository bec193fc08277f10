"""Each statement's number has the sign of what its text says, of tables made by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from trinity_lib import stage_statements
from trinity_lib.intervals import Interval
from trinity_lib.stage_statements import CLAIMS, Seen

SLOPE = ("association", "slope, held-out names", "log-odds per planted log-odds")
FOLLOWS = (
    "association", "Pearson correlation with planted levels, held-out names", "correlation"
)  # fmt: skip
DOUBLING = ("recall", "trained phrasings", "probability per doubling of exposures")
PROBABILITY = ("recall", "trained phrasings", "probability of the value")
LOSS = ("memorisation", *stage_statements.memorisation.PRIMARY["memorisation"])
ERROR = ("calibration", "trained phrasings", "absolute error of a probability")
INVENTED = (
    "absent", "trained phrasings", "highest probability beyond the most frequent value's"
)  # fmt: skip
HALF = 0.01
"""Half of every interval."""

Key = tuple[str, str, tuple[str, str, str]]
HOLDS: dict[Key, float] = {
    ("truebase", "text", FOLLOWS): 0.95,
    ("base", "text", FOLLOWS): 0.98,
    ("truebase", "text", SLOPE): 0.5,
    ("base", "text", SLOPE): 0.7,
    ("instruct", "text", SLOPE): 0.8,
    ("debiased", "text", SLOPE): 0.6,
    ("instruct", "chat", SLOPE): 0.9,
    ("debiased", "chat", SLOPE): 0.1,
    ("base", "text", DOUBLING): 0.08,
    ("truebase", "text", PROBABILITY): 0.3,
    ("base", "text", PROBABILITY): 0.65,
    ("truebase", "text", LOSS): 1.1,
    ("base", "text", LOSS): 0.2,
    ("truebase", "text", ERROR): 0.2,
    ("base", "text", ERROR): 0.05,
    ("instruct", "text", ERROR): 0.12,
    ("base", "text", INVENTED): 0.2,
    ("instruct", "text", INVENTED): 0.5,
}
"""Findings of a chain of which all is true."""
TURNED: dict[Key, float] = {
    ("truebase", "text", FOLLOWS): 0.5,
    ("base", "text", FOLLOWS): 0.85,
    ("truebase", "text", SLOPE): 1.5,
    ("base", "text", SLOPE): 1.3,
    ("instruct", "text", SLOPE): 1.2,
    ("debiased", "text", SLOPE): 0.4,
    ("instruct", "chat", SLOPE): 0.1,
    ("debiased", "chat", SLOPE): 0.9,
    ("base", "text", DOUBLING): -0.08,
    ("truebase", "text", PROBABILITY): 0.65,
    ("base", "text", PROBABILITY): 0.3,
    ("truebase", "text", LOSS): 0.2,
    ("base", "text", LOSS): 1.1,
    ("truebase", "text", ERROR): 0.05,
    ("base", "text", ERROR): 0.2,
    ("instruct", "text", ERROR): 0.12,
    ("base", "text", INVENTED): 0.5,
    ("instruct", "text", INVENTED): 0.2,
}
"""Of one of which nothing is."""
EXPECTED = {
    "The TrueBase's job associations follow": (0.05, -0.4),
    "The Base's job associations follow": (0.08, -0.05),
    "The Base holds less of the association": (0.3, -0.3),
    "Annealing strengthens the association": (0.2, -0.2),
    "Facts that are told more often are recalled better": (0.08, -0.08),
    "Annealing raises recall": (0.35, -0.35),
    "Codes of the raw text fade in annealing": (0.9, -0.9),
    "Annealing makes frequencies more exact": (0.15, -0.15),
    "Post-training makes frequencies less exact": (0.07, -0.08),
    "Post-training makes inventions about people more confident": (0.3, -0.3),
    "Fair answers take the association out of answers": (0.8, -0.8),
    "Most of the association stays in running text": (0.2, -0.2),
    "A name's group can be read off inside the debiased model": (0.4, -0.4),
    "It can be read off better than in a model that never had": (0.3, -0.3),
    "One block before the debiased model answers fairly": (0.35, -0.35),
    "The removed association comes back further than its opposite": (0.6, -0.2),
    "It comes back further than a model learns it that never had it": (0.3, -0.3),
    "Experts with more load drift more": (1.0, -1.0),
    "Post-training changes fewer choices of the router than annealing": (0.3, -0.3),
}
"""What a statement begins with: the statistic where it holds, and where its opposite does."""
BACK = list(EXPECTED).index("The removed association comes back further than its opposite")
SAVED = BACK + 1
CONTROL = list(EXPECTED).index("It can be read off better than in a model that never had")


def groups(sign: int) -> dict[str, xr.Dataset]:
    """Looks inside of a chain of which all is true (1), or nothing (-1)."""
    places, stages = ["name", "end of question"], ["truebase", "base", "instruct", "debiased"]
    probed = [*stages, "never had it"]
    at = {"place": places, "probed": probed, "block": np.arange(5)}
    accuracy = xr.DataArray(np.full((2, 5, 5), 0.5), at)
    accuracy.loc["end of question", "debiased", stage_statements.PROBED] += 0.4 * sign
    accuracy.loc["end of question", "never had it", stage_statements.PROBED] += 0.1 * sign
    inside = {"lens_place": ["end of text", "end of question"], **dict(list(at.items())[1:])}
    slope = xr.DataArray(np.zeros((2, 5, 5)), inside)
    slope.loc["end of question", "debiased", 3] = 0.35 * sign
    lens = {"slope": slope, "low": slope - HALF, "high": slope + HALF, "units": 0 * slope + 20}
    probe = {"accuracy": accuracy, "low": accuracy - HALF, "high": accuracy + HALF,
             "chance": 0 * accuracy + 0.5, "units": 0 * accuracy + 20}  # fmt: skip
    ends = [[0.5, -0.1], [0.2, -0.4]] if sign > 0 else [[0.3, -0.3], [0.6, -0.4]]
    bias = xr.DataArray(
        [[[0.1, 9.0, end] for end in own] for own in ends],
        {"start": ["debiased", "never had it"], "lesson": ["the association", "its opposite"]},
        ("start", "lesson", "look"),
    )
    changes = ["truebase -> base", "base -> instruct"]
    layers, experts = [1, 2, 3], np.arange(8)
    load = xr.DataArray(
        np.tile(np.linspace(0.5, 2, 8), (2, 3, 1)),
        {"change": changes, "layer": layers, "expert": experts},
    )
    kept = xr.DataArray([[0.5, 0.52, 0.51], [0.8, 0.82, 0.81]][::sign],
                        {"change": changes, "layer": layers})  # fmt: skip
    return {
        "attribute_probe": xr.Dataset(probe),
        "association_lens": xr.Dataset(lens),
        "relearning": xr.Dataset({"bias": bias}),
        "expert_drift": xr.Dataset({"relative": 3 + sign * load, "load": load}),
        "routing_change": xr.Dataset({"saturation": kept}),
    }


def seen(values: dict[Key, float], sign: int = 1, shift: float = 0.0) -> Seen:
    rows = [
        {"of_stage": stage, "asked_as": how, "family": f, "item": item, "measure": measure,
         "estimate": x + shift, "low": x + shift - HALF, "high": x + shift + HALF, "units": 20}
        for (stage, how, (f, item, measure)), x in values.items()
    ]  # fmt: skip
    return Seen(pd.DataFrame(rows), groups(sign))


def nothing() -> Seen:
    columns = ["of_stage", "asked_as", "family", "item", "measure", "estimate", "low", "high",
               "units"]  # fmt: skip
    return Seen(pd.DataFrame([], columns=columns), {})


def test_every_statement_has_its_numbers_here() -> None:
    assert len(CLAIMS) == len(EXPECTED)
    for claim, begins in zip(CLAIMS, EXPECTED, strict=True):
        assert claim.text.startswith(begins) and claim.text.endswith(".")


@pytest.mark.parametrize("reverse", [False, True])
def test_the_sign_is_what_the_text_says(reverse: bool) -> None:
    chain = seen(TURNED, -1) if reverse else seen(HOLDS)
    found = stage_statements.claims([chain])
    expected = [pair[reverse] for pair in EXPECTED.values()]
    np.testing.assert_allclose(found["estimate"], expected, atol=1e-12)
    verdicts = ["not supported" if reverse else "supported"] * len(CLAIMS)
    verdicts[BACK] = verdicts[SAVED] = "undecided"  # of one chain they have no interval
    assert found["verdict"] == verdicts
    assert found["seeds"] == [1] * len(CLAIMS)
    assert found["statement"] == [claim.text for claim in CLAIMS]


def test_one_chain_is_judged_by_its_own_interval() -> None:
    """Of differences as if their sides were independent."""
    found = stage_statements.claims([seen(HOLDS)])
    where = {text: n for n, text in enumerate(EXPECTED)}
    halves = {
        "Facts that are told more often are recalled better": HALF,
        "The TrueBase's job associations follow": HALF,
        "Annealing raises recall": math.hypot(HALF, HALF),
        "Most of the association stays in running text": math.hypot(HALF, HALF / 2),
    }
    for text, half in halves.items():
        n = where[text]
        ends = [found["low"][n], found["high"][n]]
        middle = EXPECTED[text][0]
        assert ends == pytest.approx([middle - half, middle + half])
    close = {**HOLDS, ("base", "text", PROBABILITY): 0.3 + HALF}
    assert stage_statements.claims([seen(close)])["verdict"][5] == "undecided"


def test_several_chains_are_judged_over_chains() -> None:
    shifts = (-0.003, 0.001, 0.004)
    chains = [seen({k: v * (1 + s) for k, v in HOLDS.items()}) for s in shifts]
    found = stage_statements.claims(chains)
    values = stage_statements.values(chains)["estimate"]
    assert values.shape == (len(CLAIMS), len(shifts))
    for n, row in enumerate(values):
        each = [CLAIMS[n].measure(chain).estimate for chain in chains]
        np.testing.assert_array_equal(row, each)
        assert found["estimate"][n] == pytest.approx(np.mean(row))
        if np.ptp(row) > 0:
            wanted = stats.t.interval(0.95, 2, np.mean(row), stats.sem(row))
            assert (found["low"][n], found["high"][n]) == pytest.approx(wanted)
        assert found["seeds"][n] == 3 and found["verdict"][n] == "supported"
    wide = [seen({**HOLDS, ("base", "text", PROBABILITY): x}) for x in (0.1, 0.3, 0.65)]
    assert stage_statements.claims(wide)["verdict"][5] == "undecided"
    turned = stage_statements.claims([seen(TURNED, -1), seen(TURNED, -1)])
    assert set(turned["verdict"]) == {"not supported"}


def test_what_was_not_found_decides_nothing() -> None:
    for chains in ([nothing()], [nothing(), nothing()]):
        found = stage_statements.claims(chains)
        assert found["verdict"] == ["undecided"] * len(CLAIMS)
        assert found["seeds"] == [0] * len(CLAIMS) and np.isnan(found["estimate"]).all()
        values = stage_statements.values(chains)
        assert all(np.isnan(each).all() for each in values.values())
    some = stage_statements.claims([seen(HOLDS), nothing(), seen(HOLDS)])
    assert some["seeds"] == [2] * len(CLAIMS)
    alone = stage_statements.claims([seen(HOLDS), nothing()])
    assert set(alone["verdict"]) == {"undecided"}


def test_a_lesson_that_moves_answers_the_other_way_has_not_taught() -> None:
    chain = seen(HOLDS)
    bias = chain.groups["relearning"]["bias"]
    bias.loc["debiased", "the association", 2] = -0.5
    bias.loc["debiased", "its opposite", 2] = 0.1
    assert CLAIMS[BACK].measure(chain).estimate == pytest.approx(-0.2)


def test_without_an_innocent_chain_nothing_is_said_of_it() -> None:
    chain = seen(HOLDS)
    alone = chain.groups["relearning"].sel(start=["debiased"])
    probes = chain.groups["attribute_probe"].sel(probed=["base", "debiased"])
    groups = {**chain.groups, "relearning": alone, "attribute_probe": probes}
    chain = chain._replace(groups=groups)
    for number in (BACK, SAVED, CONTROL):
        assert math.isnan(CLAIMS[number].measure(chain).estimate)
    assert CLAIMS[CONTROL - 1].measure(chain).estimate == pytest.approx(0.4)


def test_a_difference_is_as_uncertain_as_both() -> None:
    found = stage_statements.less(Interval(3.0, 1.0, 4.0, 9), Interval(1.0, 0.0, 5.0, 4))
    assert found == (2.0, 2.0 - math.hypot(2, 4), 2.0 + math.hypot(1, 1), 9)
    assert stage_statements.less(Interval(3.0, 1.0, 4.0, 9), 1) == (2.0, 0.0, 3.0, 9)
    endless = stage_statements.less(
        Interval(1.0, -math.inf, math.inf, 1), Interval(0.5, -math.inf, math.inf, 1)
    )
    assert endless == (0.5, -math.inf, math.inf, 1)
