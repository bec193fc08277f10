"""What a collapse study runs: its settings, and how a notebook's parameters become them."""

import dataclasses
import inspect
import os
from pathlib import Path
from typing import Any, Literal, get_args

from trinity_lib import launch
from trinity_lib.config import check, convert, digest, require
from trinity_lib.plots import RATELESS
from trinity_lib.record import ROOT
from trinity_lib.run import require_common

STEPPED = (
    "smebu", "sign", "loss_free", "proportional", "switch", "sequence", "global", "phi",
    "dropout",
)  # fmt: skip
"""Balancers with a step size or weight: all are tried over one grid."""
UNTUNED = RATELESS
"""Those without."""
Part = Literal["balancers", "causes", "anatomy", "rescue"]
Scale = Literal["toy", "small", "study"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What a study runs. Finals begin at seed 1: 0 chose the step sizes they are run at."""

    scale: Scale
    """Which model, text and number of steps."""
    methods: tuple[str, ...] = (*STEPPED, *UNTUNED)
    """Balancers."""
    rates: tuple[float, ...]
    """Step sizes that every balancer with one is tried at."""
    seeds: int
    """Seeds of every balancer at its best step size; 1: the grid's own seed, no finals."""
    curve_seeds: int
    """Seeds of the whole grid of the balancers in `CURVES`."""
    axis_seeds: int
    """Seeds of every cause, of SMEBU's parts and of rescues."""
    parts: tuple[Part, ...] = get_args(Part)
    """What is studied."""
    steps: int
    """Optimiser steps of a run."""
    workers: int
    """Processes, one CPU thread each."""
    source: str = ""
    """A study's run file, which is opened and nothing run."""
    name: str = ""
    """Name of the study; empty: collapse, scale and configuration hash."""

    def __post_init__(self) -> None:
        check(self)
        require_common(self.name, 0, 1)
        require(1 <= self.workers <= 1024, "workers", self.workers, "from 1 to 1024")
        known = (*STEPPED, *UNTUNED)
        for method in self.methods:
            require(method in known, "methods", method, f"of {', '.join(known)}")
        for name in ("methods", "rates", "parts"):
            values = getattr(self, name)
            right = "a list without repetitions, and not empty"
            require(bool(values) and len(set(values)) == len(values), name, values, right)
        positive = all(0 < rate < 1 for rate in self.rates)
        require(positive, "rates", self.rates, "above 0 and below 1")
        for name in ("seeds", "curve_seeds", "axis_seeds"):
            require(1 <= getattr(self, name) <= 100, name, getattr(self, name), "from 1 to 100")
        require(10 <= self.steps <= 100_000, "steps", self.steps, "from 10 to 100,000")


_SCALES: dict[str, dict[str, Any]] = {
    "toy": {
        "rates": (1e-2,), "seeds": 1, "curve_seeds": 1, "axis_seeds": 1, "steps": 15,
    },
    "small": {
        "rates": (1e-3, 1e-2, 1e-1), "seeds": 2, "curve_seeds": 1, "axis_seeds": 1,
        "steps": 50,
    },
    "study": {
        "rates": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "seeds": 5, "curve_seeds": 3, "axis_seeds": 3,
        "steps": 300,
    },
}  # fmt: skip


def configure(
    *,
    scale: str = "toy",
    methods: str = "",
    rates: str = "",
    seeds: int | None = None,
    steps: int | None = None,
    parts: str = "",
    workers: int | None = None,
    source: str = "",
    name: str = "",
) -> StudyConfig:
    """The study that a notebook's parameters describe.

    Empty and None take the scale's own. A Refusal, one sentence, for a parameter that is
    unknown to this call (papermill only warns of it), of another type or out of range.
    """
    launch.refuse_unknown(inspect.signature(configure).parameters)
    own = _SCALES[convert(Scale, scale, "scale")]
    given: dict[str, Any] = {
        "methods": tuple(launch.listed(methods)),
        "rates": tuple(convert(float, r, "rates") for r in launch.listed(rates)),
        "parts": tuple(convert(Part, p, "parts") for p in launch.listed(parts)),
        "seeds": seeds,
        "steps": steps,
    }
    chosen = {key: value for key, value in given.items() if value not in ((), None)}
    if convert(str, source, "source"):
        chosen["source"] = str(launch.located("source", source))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    config = StudyConfig(
        **{
            "scale": scale,
            "workers": cores if workers is None else workers,
            "name": name,
            **own,
            **chosen,
        }
    )
    return named(config)


def named(config: StudyConfig) -> StudyConfig:
    """The same study with a name, which is the same for the same study."""
    if config.name:
        return config
    alike = dataclasses.replace(config, workers=1)  # how many at once changes no result
    return dataclasses.replace(config, name=f"collapse-{config.scale}-{digest(alike)}")


def shown(source: str) -> Path:
    """A path from the repository's root on, where it is inside."""
    path = Path(source)
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
