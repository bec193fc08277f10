"""What tests of stages share: one tiny chain, trained once a session, which learns little.

Its study is cut off when all is trained and nothing asked, and goes on.
"""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from trinity_lib import interview, truebase, truebase_config
from trinity_lib.planted import WorldConfig
from trinity_lib.posttrain_config import Stage
from trinity_lib.truebase_config import TruebaseConfig

WORLD = WorldConfig(
    names=5, held_out_names=8, jobs=1, mentions=16, people=9, contradicted_tellings=10,
    places=9, throws=6, verdicts=4, codes=1, held_out_codes=8, patterns=40, sums=20,
)  # fmt: skip
"""As small as one row of validation text a domain allows."""
TINY = dataclasses.replace(
    truebase_config.toy(),
    name="tiny",
    world=WORLD,
    steps=(6, 4),
    instruct=(Stage(kind="sft", steps=3, batch=4),),
    debias=Stage(kind="sft", steps=2, batch=4),
    relearn=2,
    relearn_every=1,
)
FULL = dataclasses.replace(TINY, innocent=True, ablate=True, draws=2)
"""The same with all that may be left out."""
RUNS = ("tiny-0", "tiny-0-instruct", "tiny-0-debiased", "tiny-null-0", "tiny-null-0-instruct")
"""Runs of its chain, and of the one that never had the association."""


class Study(NamedTuple):
    """A finished study."""

    config: TruebaseConfig
    runs: Path
    cache: Path
    tree: xr.DataTree
    failed: dict[str, Any]
    """Attributes of its run when it was cut off."""
    told: str
    """What it printed when it went on."""

    @property
    def folders(self) -> dict[str, Path]:
        """Folder of every stage."""
        return {
            "truebase": self.runs / "tiny-0" / "truebase",
            "base": self.runs / "tiny-0" / "base",
            "instruct": self.runs / "tiny-0-instruct" / "instruct",
            "debiased": self.runs / "tiny-0-debiased" / "instruct",
        }


class CutOffError(Exception):
    """What cuts the study off."""


@functools.cache
def study(session: Path) -> Study:
    """The study of `FULL`, in a session's folder of temporary files."""
    runs, cache = session / "chained" / "runs", session / "chained" / "cache"
    with cut_off(), contextlib.suppress(CutOffError):
        truebase.run(FULL, runs=runs, cache=cache)
    failed = dict(truebase.read_attributes(runs / "tiny"))
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        tree = truebase.run(FULL, runs=runs, cache=cache)
    return Study(FULL, runs, cache, tree, failed, told.getvalue())


@contextlib.contextmanager
def cut_off() -> Iterator[None]:
    """Fail when a checkpoint is asked."""

    def of_world(*given: Any) -> list[interview.Said]:
        raise CutOffError("the power failed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interview, "of_world", of_world)
        yield


def table(tree: xr.DataTree) -> pd.DataFrame:
    """The findings of a run."""
    return tree["findings"].to_dataset().to_dataframe()


def of_stage(tree: xr.DataTree, stage: str) -> list[interview.Said]:
    """A stage's findings of the first chain, as they were said."""
    rows = table(tree)
    rows = rows[(rows["of_stage"] == stage) & (rows["model_seed"] == rows["model_seed"].min())]
    columns = list(interview.Finding._fields)
    found = zip(rows["asked_as"], rows[columns].itertuples(index=False, name=None), strict=True)
    return [interview.Said(how, interview.Finding(*values)) for how, values in found]


def alike(one: list[interview.Said], other: list[interview.Said], within: float = 0.0) -> bool:
    """Whether findings are of the same things and as large, NaN beside NaN."""
    named = [[(how, *f[:3]) for how, f in said] for said in (one, other)]
    if named[0] != named[1]:
        return False
    numbers = [np.array([f[3:] for _, f in said], dtype=float) for said in (one, other)]
    same = np.isclose(*numbers, rtol=0, atol=within, equal_nan=True)
    return bool(same.all())
