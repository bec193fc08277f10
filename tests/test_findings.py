"""Verdicts from numbers made up by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from trinity_lib import findings, statements
from trinity_lib.schema import TABLES


def study(rows: list[dict]) -> tuple[dict, dict]:
    """/trials and /results with what the rows say; the rest unknown."""
    count = len(rows)
    described = {
        name: [row.get(name, "complete" if name == "status" else "") for row in rows]
        for name in TABLES["trials"]
    }
    sizes = {"trial": count, "trial_layer": 2, "trial_domain": 3, "time": 4, "expert_rank": 5}
    results = {}
    for name, variable in TABLES["results"].items():
        values = np.full([sizes[d] for d in variable.dims], np.nan)
        for number, row in enumerate(rows):
            values[number] = row.get(name, np.nan)
        results[name] = values
    return described, results


def row(method: str, rate: float, seed: int = 0, part: str = "grid", **values: float) -> dict:
    return {"method": method, "rate": rate, "seed": seed, "part": part, **values}


def test_an_interval_is_students() -> None:
    values = pd.Series([1.0, 2.0, 4.0])
    judged = findings.judge(values)
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1, 2, 4]))
    assert judged.estimate == pytest.approx(7 / 3)
    assert (judged.low, judged.high) == pytest.approx((low, high))


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([1.0, 1.1, 0.9], "supported"),
        ([-1.0, -1.1, -0.9], "not supported"),
        ([1.0, -1.0, 0.5], "undecided"),
        ([5.0], "undecided"),
        ([], "undecided"),
        ([np.nan, 1.0, 1.1], "supported"),
    ],
)
def test_the_verdict_follows_from_the_interval(values: list[float], verdict: str) -> None:
    assert findings.judge(pd.Series(values, dtype=float)).verdict == verdict


def test_the_best_step_size_is_the_best_balanced_of_those_with_nearly_the_best_loss() -> None:
    described, results = study(
        [
            row("smebu", 1e-3, loss=2.000, excess=9.0),
            row("smebu", 1e-2, loss=2.009, excess=1.0),
            row("smebu", 1e-1, loss=2.011, excess=0.1),  # past half a percent
            row("smebu", 3e-1, seed=1, loss=1.0, excess=0.0),  # not the first seed
            row("sign", 1e-2, loss=np.nan, excess=0.0, status="failed"),
            row("sign", 1e-1, loss=3.0, excess=2.0),
        ]
    )
    assert findings.best_rates(described, results) == {"smebu": 1e-2, "sign": 1e-1}


def test_layers_are_averaged_where_they_are_known() -> None:
    described, results = study([row("none", 0.0), row("none", 0.0, status="missing")])
    results["excess"][0] = [3.0, np.nan]
    results["dead"][0] = [0.2, 0.4]
    results["max_vio"][0] = [7.0, 1.0]
    table = findings.table(described, results)
    assert np.isnan(table["excess"][1])
    assert table["excess"][0] == 3.0 and table["dead"][0] == pytest.approx(0.3)
    assert table["first_max_vio"][0] == 7.0 and np.isnan(table["loss"][0])


def verdicts(rows: list[dict]) -> dict[str, tuple[float, str]]:
    judged = statements.claims(*study(rows))
    pairs = zip(judged["estimate"], judged["verdict"], strict=True)
    return dict(zip(judged["statement"], pairs, strict=True))


def test_paired_differences_decide() -> None:
    rows = []
    for seed in (1, 2, 3):
        rows += [
            row("none", 0.0, seed, "finals", dead=0.5 + 0.01 * seed, loss=2.0 + seed),
            row("smebu", 1e-2, seed, "finals", dead=0.01 * seed, loss=1.9 + seed),
        ]
    found = verdicts(rows)
    estimate, verdict = found["Without a balancer experts die that SMEBU keeps alive."]
    assert estimate == pytest.approx(0.5) and verdict == "supported"
    estimate, verdict = found["Collapse costs validation loss."]  # seeds differ, pairs do not
    assert estimate == pytest.approx(0.1) and verdict == "supported"


def test_the_u_shape_is_not_won_by_the_luckiest_of_many() -> None:
    """Pure noise: the inner minimum would undercut the ends' if it chose itself."""
    (statement,) = [s for s in statements.CLAIMS if "a U" in s.text]
    generator = np.random.default_rng(0)
    rates, estimates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), []
    for _ in range(200):
        noise = generator.normal(5, 1, (3, 5))
        rows = [
            row("loss_free", rate, seed, excess=noise[seed, i])
            for seed in range(3)
            for i, rate in enumerate(rates)
        ]
        estimates.append(statement.measure(findings.table(*study(rows))).mean())
    assert np.mean(estimates) < 0  # the ends' minimum is below an inner rate that others chose


def test_a_u_is_found() -> None:
    rates, excess = (1e-3, 1e-2, 1e-1), (9.0, 1.0, 4.0)
    rows = [
        row("loss_free", rate, seed, excess=value + 0.01 * seed * value)
        for seed in range(3)
        for rate, value in zip(rates, excess, strict=True)
    ]
    name = "The uncentred sign update has a best step size (Wang et al. 2024, figure 4: a U)."
    estimate, verdict = verdicts(rows)[name]
    assert estimate == pytest.approx(3.03) and verdict == "supported"


def test_nothing_is_decided_by_one_seed() -> None:
    rows = [row(m, 0.0, dead=0.5, loss=2.0, excess=1.0) for m in ("none", "quantile")]
    rows += [row("smebu", r, dead=0.0, loss=1.0, excess=0.1) for r in (1e-2, 1e-1)]
    assert {verdict for _, verdict in verdicts(rows).values()} == {"undecided"}


def test_statements_are_said_once() -> None:
    texts = [statement.text for statement in statements.CLAIMS]
    assert len(set(texts)) == len(texts) >= 20


def test_each_ones_own_best_is_where_its_decade_is() -> None:
    """Sign's best is one grid step below SMEBU's; around its own each is alike."""
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    smebu, sign = (8.0, 4.0, 1.0, 4.0, 8.0), (4.0, 1.0, 4.0, 8.0, 16.0)
    rows = []
    for seed in range(3):
        for i, rate in enumerate(rates):
            extra = {"loss": 2.0, "dead": 0.0}
            rows.append(row("smebu", rate, seed, excess=smebu[i] + 0.01 * seed, **extra))
            rows.append(row("sign", rate, seed, excess=sign[i] + 0.02 * seed, **extra))
    found = verdicts(rows)
    equal, _ = found[
        "At equal step sizes, over the whole grid, SMEBU is better balanced than sign."
    ]
    own, _ = found[
        "Over a decade around each one's own best, SMEBU is better balanced than sign."
    ]
    driven, _ = found["At ten times each one's own best, SMEBU is better balanced than sign."]
    assert equal == pytest.approx(1.61) and own == pytest.approx(0.015)
    assert driven == pytest.approx(0.015)


def test_a_run_that_diverged_is_not_left_out_of_a_mean() -> None:
    rows = []
    for seed in range(3):
        for rate in (1e-2, 1e-1):
            wild = rate == 1e-1
            rows.append(row("smebu", rate, seed, excess=1.0, loss=2.0))
            rows.append(row("sign", rate, seed, excess=np.nan if wild else 0.5, loss=2.0))
    estimate, verdict = verdicts(rows)[
        "At equal step sizes, over the whole grid, SMEBU is better balanced than sign."
    ]
    assert np.isnan(estimate) and verdict == "undecided"


def test_claims_can_be_made_of_nothing() -> None:
    judged = statements.claims(
        *study([row("loss_free", r, status="missing") for r in (1, 2, 3)])
    )
    assert set(judged["verdict"]) == {"undecided"}


def test_levels_are_in_the_order_of_their_numbers() -> None:
    rows = [
        row("none", 0, seed, "causes", axis="rows a batch", level=level, dead=int(level) / 100)
        for seed in (1, 2)
        for level in ("64", "4", "16")
    ]
    assert verdicts(rows)["A small batch deepens collapse."][0] == pytest.approx(-0.6)
