"""lm_eval's tasks as findings: real ones, run here, on a model that is trained here."""

import math
from pathlib import Path

import pytest

from trinity_lib import lm_tasks
from trinity_lib.config import BadValue, override
from trinity_lib.run import RunConfig
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
    assert {f.units for f in found} == {8}
    for each in found:
        assert math.isnan(each.truth)
        assert math.isnan(each.chance)
        assert each.low <= each.estimate <= each.high
    accuracy = next(f for f in found if f.measure.startswith(("acc", "exact")))
    assert 0 <= accuracy.estimate <= 1


@pytest.mark.filterwarnings("default")
def test_an_unknown_task_is_one_sentence(folder: Path) -> None:
    with pytest.raises(BadValue, match="no_such_task.*cannot run") as caught:
        lm_tasks.evaluate(folder, ["no_such_task"], limit=8)
    assert "\n" not in str(caught.value)
