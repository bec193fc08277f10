"""Saved runs at a glance: which there are, what each holds, where settings differ. No torch."""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pandas as pd
import xarray as xr

from trinity_lib import disk, loads, metrics
from trinity_lib.config import BadValue, Missing, Refusal, first_line
from trinity_lib.record import DAMAGE, open_run
from trinity_lib.schema import SCHEMA

LATE = 5
"""Late is the last one of this many parts of a run."""
KEPT_RUNS = 32
"""Runs held in memory once read."""
KINDS = {"train": "training", "trials": "study", "speed": "kernels", "agreement": "kernels"}
NOTHING = "-"
"""What tables say where a run has no such thing."""
LOSS = "evaluation/loss"
OF_LOADS: dict[str, Callable[[Any], Any]] = {
    "routing/dead": loads.dead_fraction,
    "routing/gini": loads.gini,
}
"""Measures of loads over a trailing window, long enough to tell."""
MEASURES = {
    f"{name}/{variable}": about.long_name
    for name in ("layers", "train", "probe")
    for variable, about in SCHEMA[name].items()
    if about.dims in (("step",), ("step", "layer"))
} | {
    LOSS: "validation loss per token, all domains",
    "routing/dead": "share of dead experts, trailing window",
    "routing/gini": "Gini coefficient of the loads, trailing window",
}
"""What can be drawn over steps: GROUP/VARIABLE to what it is."""


class Scan(NamedTuple):
    """What a folder of runs holds."""

    table: pd.DataFrame
    """A row a run, newest first."""
    paths: dict[str, Path]
    """Where the run of each row is."""
    problems: list[str]
    """A sentence for every file that cannot be read."""


def scan(folder: Path) -> Scan:
    """Every run of a folder and of `reference` in it, finished or not.

    Reads attributes and a few numbers of each, once as long as its files stay the same.
    Raises Missing where there is no folder, or no run in it that can be read.
    """
    if not folder.is_dir():
        raise Missing(f"There is no folder {folder}: name one that holds runs.")
    rows, paths, problems = {}, {}, []
    for label, path in _candidates(folder):
        try:
            rows[label] = _row(path, _stamp(path))
            paths[label] = path
        except Refusal as refusal:
            problems.append(str(refusal))
    if problems and not rows:
        raise Missing(f"{folder} holds no run that can be read. {' '.join(problems)}")
    if not rows:
        raise Missing(f"{folder} holds no run yet: `make train` makes one in about a minute.")
    newest = sorted(rows, key=lambda label: rows[label]["made"], reverse=True)
    table = pd.DataFrame([{"run": label, **rows[label]} for label in newest])
    return Scan(table, paths, problems)


def load(path: Path) -> xr.DataTree:
    """One run, read once as long as its files stay the same; not to be changed.

    Raises Missing where there is none, BadValue where it is damaged.
    """
    return _load(path, _stamp(path))


def load_all(paths: Mapping[str, Path]) -> tuple[dict[str, xr.DataTree], list[str]]:
    """The runs that can be read, and a sentence for every other."""
    runs, problems = {}, []
    for label, path in paths.items():
        try:
            runs[label] = load(path)
        except Refusal as refusal:
            problems.append(str(refusal))
    return runs, problems


def require(run: xr.DataTree, name: str) -> xr.Dataset:
    """One group of a run; Missing, in a sentence, where the run has none."""
    if name not in run.children:
        kind = _kind(run.children)
        held = ", ".join(f"/{child}" for child in run.children) or "nothing yet"
        raise Missing(f"The run {run.attrs['name']} ({kind}) has no /{name}; it holds {held}.")
    return metrics.group(run, name)


def layers_of(*runs: xr.DataTree) -> list[int]:
    """Numbers of the layers with experts of any of these runs; none where no run trained."""
    trained = [metrics.group(run, "routing") for run in runs if "routing" in run.children]
    return sorted({int(layer) for routing in trained for layer in routing.layer.values})


def steps_of(run: xr.DataTree) -> list[int]:
    """Steps whose expert counts were recorded; Missing where the run is no training run."""
    return [int(step) for step in require(run, "routing").step.values]


def series(run: xr.DataTree, measure: str, layers: list[int]) -> xr.DataArray:
    """One of `MEASURES` over steps, with its units: the mean over those layers.

    Measures without layers are as they are; the loss is the mean of validation tokens over
    domains. Raises Missing where the run has no such measure, or none of the layers.
    """
    name, variable = measure.split("/")
    data = require(run, name)
    if measure == LOSS:
        return _validation_loss(data)
    if measure in OF_LOADS:
        load = _of_layers(run, metrics.rolling_load(run), layers)
        values = loads.over_experts(OF_LOADS[measure], load).assign_attrs(units="1")
    elif variable in data:
        values = _of_layers(run, data[variable], layers)
    else:
        raise Missing(f"The run {run.attrs['name']} has no {variable} in /{name}.")
    return values.mean("layer", keep_attrs=True) if "layer" in values.dims else values


def differences(runs: Mapping[str, xr.DataTree]) -> pd.DataFrame:
    """The settings in which runs differ: a row a dotted path, a column a run.

    Names always do, and are left out. A run without such a setting has "-". Raises Missing
    for fewer than two runs, and where none differs.
    """
    if len(runs) < 2:
        raise Missing("Choose two runs or more to see in which settings they differ.")
    flat = {
        label: dict(_flatten(json.loads(run.attrs["config"]))) for label, run in runs.items()
    }
    names = sorted({name for settings in flat.values() for name in settings} - {"name"})
    rows = [
        {
            "setting": name,
            **{label: settings.get(name, NOTHING) for label, settings in flat.items()},
        }
        for name in names
        if len({settings.get(name) for settings in flat.values()}) > 1
    ]
    if not rows:
        raise Missing("These runs have the same settings throughout.")
    return pd.DataFrame(rows)


def _candidates(folder: Path) -> Iterator[tuple[str, Path]]:
    """Labels and places of what may be runs; a finished run stands for its folder."""
    for place in (folder, folder / "reference"):
        finished = sorted(place.glob("[!.]*.nc"))
        begun = sorted(path.parent for path in place.glob("*/run.json"))
        for path in [
            *finished,
            *(p for p in begun if p.with_name(p.name + ".nc") not in finished),
        ]:
            yield str(path.relative_to(folder)).removesuffix(".nc"), path


def _stamp(path: Path) -> tuple:
    """What changes when a run's files do, or when the process that writes it ends."""
    parts = (path, path / "run.json", path / "log") if path.is_dir() else (path,)
    stats = [part.stat() for part in parts if part.exists()]
    written = path.is_dir() and disk.locked(path / "lock")
    return (*((s.st_mtime_ns, s.st_size) for s in stats), written)


@functools.lru_cache(maxsize=KEPT_RUNS)
def _load(path: Path, stamp: tuple) -> xr.DataTree:
    try:
        return open_run(path)
    except Refusal:
        raise
    except DAMAGE as error:
        raise BadValue(f"{path} is damaged: {first_line(error)}.") from error


@functools.lru_cache(maxsize=4096)
def _row(path: Path, stamp: tuple) -> dict[str, Any]:
    """One row of the table; a finished file is not read whole: a hundred of them take long."""
    try:
        if path.is_dir():
            run = _load(path, stamp)
            return _summary(run.attrs, run)
        with h5py.File(path) as file:
            plain = {k: v if isinstance(v, str) else v.item() for k, v in file.attrs.items()}
            return _summary(plain, file)
    except Refusal:
        raise
    except DAMAGE as error:
        raise BadValue(f"{path} is not a run that can be read: {first_line(error)}.") from error


def _summary(attributes: Mapping[Any, Any], held: Any) -> dict[str, Any]:
    """What the table shows of a run, from its attributes and the ends of some arrays."""
    if not {"name", "status", "config", "created_at"} <= set(attributes):
        raise ValueError("it has not the attributes of one")
    config = json.loads(attributes["config"])
    balance, optim = _settings(config, "balance"), _settings(config, "optim")
    status, reason = attributes["status"], attributes.get("reason")
    trained = _tail(held, "train/step")
    return {
        "holds": _kind(held),
        "status": "killed" if status == "running" and reason else status,
        "scale": attributes.get("scale", NOTHING),
        "balancer": balance.get("method", NOTHING),
        "rate": balance.get("rate"),
        "optimiser": optim.get("optimizer", NOTHING),
        "seed": attributes.get("seed"),
        "steps": None if trained is None else int(trained[-1]),
        "loss, nat": _last_loss(held),
        "late MaxVio": _late_max_vio(held),
        "dead, %": _dead(held),
        "made": str(attributes["created_at"])[:16].replace("T", " "),
        "reason": reason or NOTHING,
    }


def _settings(config: Any, name: str) -> dict[str, Any]:
    """The named part of a training run's configuration; empty where it is another's."""
    part = config.get(name) if isinstance(config, dict) else None
    return part if isinstance(part, dict) else {}


def _kind(groups: Any) -> str:
    return next((kind for name, kind in KINDS.items() if name in groups), "nothing yet")


def _tail(held: Any, path: str, last: int = 1) -> np.ndarray | None:
    """The end of an array of an open file or of a tree; None where it has none."""
    group, variable = path.split("/")
    if group not in held or variable not in held[group]:
        return None
    values = np.asarray(held[group][variable][-last:])
    return values if values.size else None


def _last_loss(held: Any) -> float | None:
    loss, tokens = _tail(held, LOSS), _tail(held, "evaluation/tokens")
    if loss is None or tokens is None or not tokens.sum():
        return None
    return float((loss * tokens).sum() / tokens.sum())


def _late_max_vio(held: Any) -> float | None:
    steps = len(held["layers"]["step"]) if "layers" in held else 0
    late = _tail(held, "layers/max_vio", max(1, steps // LATE))
    return None if late is None else float(late.mean())


def _dead(held: Any) -> float | None:
    """Percent of experts dead at the last evaluation; None where it is too small to tell."""
    count = _tail(held, "evaluation/count")
    load = None if count is None else count.sum((0, 1, 2))
    if load is None or load.mean() < loads.ENOUGH_TOKENS:
        return None
    return float(100 * loads.dead_fraction(load).mean())


def _validation_loss(evaluation: xr.Dataset) -> xr.DataArray:
    loss = evaluation["loss"].weighted(evaluation["tokens"]).mean(["split", "domain"])
    return loss.assign_attrs(units="nat")


def _of_layers(run: xr.DataTree, values: xr.DataArray, layers: list[int]) -> xr.DataArray:
    if "layer" not in values.dims:
        return values
    kept = [layer for layer in values.layer.values if layer in layers]
    if not kept:
        raise Missing(f"The run {run.attrs['name']} has none of the chosen layers.")
    return values.sel(layer=kept)


def _flatten(settings: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every leaf of nested settings, under its dotted path, as JSON without quotes."""
    if isinstance(settings, dict | list) and settings:
        items = settings.items() if isinstance(settings, dict) else enumerate(settings)
        for name, value in items:
            yield from _flatten(value, f"{path}.{name}" if path else str(name))
    else:
        yield path, settings if isinstance(settings, str) else json.dumps(settings)
