"""lm_eval's tasks as findings: real ones, run here, on a model that is trained here."""

import math
from pathlib import Path

import pytest
from scipy import stats

from trinity_lib import intervals, lm_tasks
from trinity_lib.config import BadValue, override
from trinity_lib.run import RunConfig
from trinity_lib.subject import Finding
from trinity_lib.train import train

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tiny: RunConfig, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    train(override(tiny, {"name": "run"}), runs=runs, cache=cache)
    return runs / "run" / "base"


@pytest.mark.filterwarnings("default")  # of lm_eval's own libraries
def test_a_tasks_metrics_have_intervals(folder: Path) -> None:
    found = lm_tasks.evaluate(folder, ["trinity_arithmetic"], limit=8)
    assert {f.item for f in found} == {"trinity_arithmetic"}
    assert {f.units for f in found} == {8} and {f.measure for f in found} == {"exact_match"}
    for each in found:
        assert math.isnan(each.truth)
        assert math.isnan(each.chance)
        assert each.low <= each.estimate <= each.high
    assert 0 <= found[0].estimate <= 1
    assert found[0].high - found[0].low > 0.3  # eight items are no certainty


@pytest.mark.filterwarnings("default")
def test_an_unknown_task_is_one_sentence(folder: Path) -> None:
    with pytest.raises(BadValue, match="no_such_task.*cannot run") as caught:
        lm_tasks.evaluate(folder, ["no_such_task"], limit=8)
    assert "\n" not in str(caught.value)


def rows(values: dict[str, object], count: object = 4) -> dict[str, Finding]:
    found = {"n-samples": {"mine": {"original": 9, "effective": count}}}
    return {f.measure: f for f in lm_tasks._rows("mine", values, found)}


def ends(finding: Finding) -> tuple[float, float]:
    return finding.low, finding.high


def test_what_counts_items_is_no_metric() -> None:
    values = {"alias": "mine", "name": "mine", "sample_len": 4, "sample_count": {"acc": 4},
              "acc,none": 0.5, "acc_stderr,none": 0.25}  # fmt: skip
    assert list(rows(values)) == ["acc"]


@pytest.mark.parametrize("hits", range(5))
@pytest.mark.parametrize("metric", lm_tasks.SHARES)
def test_a_share_of_right_items_has_the_exact_interval(hits: int, metric: str) -> None:
    error = (hits / 4 * (1 - hits / 4) / 3) ** 0.5
    found = rows({f"{metric},none": hits / 4, f"{metric}_stderr,none": error})[metric]
    exact = intervals.proportion(hits, 4)
    assert (found.estimate, found.low, found.high, found.units) == exact
    without = rows({f"{metric},none": hits / 4, f"{metric}_stderr,none": "N/A"})[metric]
    assert ends(without) == exact[1:3]
    if hits in (0, 4):
        assert found.high - found.low > 0.6


def test_another_metric_has_students_interval() -> None:
    found = rows({"bleu,none": 12.0, "bleu_stderr,none": 2.0, "acc,none": 0.3,
                  "acc_stderr,none": 0.1, "f1,none": 1.0, "f1_stderr,none": 0.0})  # fmt: skip
    t = float(stats.t.ppf(0.975, 3))
    assert ends(found["bleu"]) == pytest.approx((12 - 2 * t, 12 + 2 * t))
    assert ends(found["acc"]) == pytest.approx((0.3 - 0.1 * t, 0.3 + 0.1 * t))  # no count
    assert ends(found["f1"]) == intervals.proportion(4, 4)[1:3]


@pytest.mark.parametrize("count", [0, None])
def test_without_a_count_nothing_is_known(count: object) -> None:
    values = {
        "acc,none": 0.0,
        "acc_stderr,none": 0.0,
        "bleu,none": 3.0,
        "bleu_stderr,none": 1.0,
    }
    for found in rows(values, count).values():
        assert ends(found) == (-math.inf, math.inf) and found.units == 0
    (of_group,) = lm_tasks._rows("group", {"acc,none": 0.5, "acc_stderr,none": 0.1}, {})
    assert ends(of_group) == (-math.inf, math.inf)


def test_a_group_of_tasks_says_how_many_items_it_has() -> None:
    values = {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_count": {"acc,none": 6}}
    (found,) = lm_tasks._rows("group", values, {})
    assert (found.low, found.high, found.units) == intervals.proportion(3, 6)[1:]


def test_without_an_error_or_a_second_item_nothing_is_known() -> None:
    for error in ("N/A", None, math.nan, 0.0):
        found = rows({"bleu,none": 3.0, "bleu_stderr,none": error})["bleu"]
        assert ends(found) == (-math.inf, math.inf)
    assert ends(rows({"bleu,none": 3.0, "bleu_stderr,none": 1.0}, 1)["bleu"])[1] == math.inf
    assert ends(rows({"acc,none": math.nan, "acc_stderr,none": 0.0})["acc"])[1] == math.inf
