"""Tasks of EleutherAI's lm_eval as findings about a checkpoint."""

import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from trinity_lib import intervals
from trinity_lib.config import BadValue, first_line
from trinity_lib.intervals import Interval
from trinity_lib.subject import Finding

FAMILY = "lm_eval"
OURS = Path(__file__).parent / "tasks"
"""Tasks about the embedded corpus."""
SHARES = ("acc", "acc_norm", "exact_match")
"""Metrics that are 0 or 1 of an item."""
COUNTS = ("sample_len", "sample_count")
"""What stands among the metrics and is none."""
WHOLE = 1e-6
"""How far a number of right items may be from a whole one."""


def evaluate(
    folder: Path, tasks: Sequence[str], limit: int, device: str = "cpu"
) -> list[Finding]:
    """Every metric of every task with its interval; chance is not known here.

    A task is a name that lm_eval knows, or a YAML file. At most `limit` items of each. BadValue
    where lm_eval refuses, which it does for a task whose data is not on this machine.
    """
    try:
        with warnings.catch_warnings():  # of a progress bar of its own
            warnings.filterwarnings("ignore", "IProgress not found")
            import lm_eval
            from lm_eval.tasks import TaskManager

            from trinity_lib.harness import TrinityLM
    except ImportError as error:
        raise BadValue("tasks need lm_eval: pip install 'trinity-lib[eval]'.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        given = TrinityLM(path=str(folder), device=device)
        found: dict[str, Any] | None = lm_eval.simple_evaluate(
            model=given,
            tasks=list(tasks),
            limit=limit,
            task_manager=TaskManager(include_path=str(OURS)),
            bootstrap_iters=1000,
            log_samples=False,
        )
    except Exception as error:  # a task's loader raises whatever its data's library does
        raise BadValue(
            f"tasks are {', '.join(tasks)}; lm_eval cannot run them here: {first_line(error)}."
        ) from error
    assert found is not None
    return [f for name, values in found["results"].items() for f in _rows(name, values, found)]


def _rows(name: str, values: dict[str, Any], found: dict[str, Any]) -> list[Finding]:
    every = found.get("n-samples", {}).get(name, {}).get("effective")
    of_group = values.get("sample_count") or {}
    rows = []
    for key, value in values.items():
        metric, _, of = key.partition(",")
        if metric.endswith("_stderr") or metric in COUNTS or not _is_number(value):
            continue
        count = int(of_group.get(key) or every or 0)
        held = _interval(metric, float(value), values.get(f"{metric}_stderr,{of}"), count)
        rows.append(Finding(FAMILY, name, metric, math.nan, *held[:3], math.nan, count))
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _interval(metric: str, value: float, error: Any, count: int) -> Interval:
    """The exact binomial one of a share of right items, or Student's of a standard error.

    The former too where the standard error of a value from 0 to 1 is 0, as of items that are
    all right: that is no certainty. Infinite where nothing is known of it.
    """
    unknown = Interval(value, -math.inf, math.inf, count)
    if count < 1 or not math.isfinite(value):
        return unknown
    known = _is_number(error) and math.isfinite(error)
    inside = 0 <= value <= 1
    hits = round(value * count) if inside else 0
    share = metric in SHARES and abs(value * count - hits) <= WHOLE * count
    if inside and (share or (known and error == 0)):
        return intervals.proportion(hits, count)._replace(estimate=value)
    if not known or error == 0 or count < 2:
        return unknown
    half = float(stats.t.ppf((1 + intervals.LEVEL) / 2, count - 1)) * error
    return Interval(value, value - half, value + half, count)
