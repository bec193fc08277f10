"""Tasks of EleutherAI's lm_eval as findings about a checkpoint."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trinity_lib.config import BadValue, first_line
from trinity_lib.subject import Finding

FAMILY = "lm_eval"
OURS = Path(__file__).parent / "tasks"
"""Tasks about the embedded corpus."""
NORMAL = 1.96
"""Half of a 95% interval, in standard errors."""


def evaluate(
    folder: Path, tasks: Sequence[str], limit: int, device: str = "cpu"
) -> list[Finding]:
    """Every metric of every task with its standard error's interval; chance is not known here.

    A task is a name that lm_eval knows, or a YAML file. At most `limit` items of each. BadValue
    where lm_eval refuses, which it does for a task whose data is not on this machine.
    """
    try:
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
    count = found.get("n-samples", {}).get(name, {}).get("effective", 0)
    rows = []
    for key, value in values.items():
        metric, _, of = key.partition(",")
        if metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{of}")
        half = math.inf
        if isinstance(error, int | float) and math.isfinite(error):
            half = NORMAL * error
        rows.append(
            Finding(FAMILY, name, metric, math.nan, float(value), value - half, value + half,
                    math.nan, int(count))
        )  # fmt: skip
    return rows
