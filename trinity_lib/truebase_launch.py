"""A study of stages from a notebook's parameters: checked first, then run here."""

import dataclasses
import inspect
import json
import os
from pathlib import Path
from typing import Any

import xarray as xr

from trinity_lib import hub, launch, posttrain_launch, truebase, truebase_config
from trinity_lib.card import JSON
from trinity_lib.config import Missing, convert, require
from trinity_lib.interview import Reader
from trinity_lib.posttrain_config import Stage
from trinity_lib.record import ROOT
from trinity_lib.train import RUNS
from trinity_lib.truebase_config import SCALES, Scale, TruebaseConfig


def configure(
    *,
    scale: str = "toy",
    seeds: int | None = None,
    steps: str = "",
    instruct_steps: str = "",
    debias_steps: int | None = None,
    draws: int | None = None,
    ablate: bool | None = None,
    checkpoints: str = "",
    world: str = "",
    items: str = "",
    texts: str = "",
    tasks: str = "",
    limit: int = 100,
    source: str = "",
    reader: str = "trinity",
    seed: int = 0,
    workers: int | None = None,
    threads: int = 1,
    device: str | None = None,
    name: str = "",
) -> TruebaseConfig:
    """The study that a notebook's parameters describe; None and "" take the scale's own.

    `checkpoints` are folders, or OWNER/NAME, in their order, each STAGE=FOLDER or a folder
    whose name is the stage's. A Refusal, one sentence, for a parameter that is unknown to this
    call, of another type, out of range, or a file that cannot be used.
    """
    launch.refuse_unknown(inspect.signature(configure).parameters)
    own = SCALES[convert(Scale, scale, "scale")]()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given: dict[str, Any] = {
        "seeds": convert(int | None, seeds, "seeds"),
        "steps": _steps(steps),
        "instruct": _instruct(own, instruct_steps),
        "debias": _debias(debias_steps),
        "draws": convert(int | None, draws, "draws"),
        "ablate": convert(bool | None, ablate, "ablate"),
        "workers": cores if workers is None else convert(int, workers, "workers"),
    }
    config = dataclasses.replace(
        own,
        checkpoints=_checkpoints(checkpoints),
        world_file=_file("world", world),
        items=_file("items", items),
        texts=_file("texts", texts),
        tasks=tuple(launch.listed(convert(str, tasks, "tasks"))),
        limit=convert(int, limit, "limit"),
        source=_file("source", source),
        reader=convert(Reader, reader, "reader"),
        seed=convert(int, seed, "seed"),
        threads=convert(int, threads, "threads"),
        device=posttrain_launch.device_of(device),
        name=convert(str, name, "name"),
        **{key: value for key, value in given.items() if value is not None},
    )
    both = bool(config.source) and bool(config.checkpoints)
    require(not both, "source", source, "empty where checkpoints are given")
    return truebase_config.named(config)


def describe(config: TruebaseConfig) -> str:
    """What is about to be done."""
    if config.source:
        return f"drawn from {_shown(Path(config.source))}"
    if config.checkpoints:
        return "\n".join(_described(stage, Path(at)) for stage, at in config.checkpoints)
    raw, clean = config.steps
    kinds = ", ".join(f"{stage.kind} {stage.steps}" for stage in config.instruct)
    return (
        f"{config.seeds} chain{'s' * (config.seeds > 1)}: TrueBase after {raw} steps, Base "
        f"after {clean} more, Instruct after {kinds}, debiased after {config.debias.kind} "
        f"{config.debias.steps}; world of seed {config.world.seed}, audits read by "
        f"{config.reader}, {config.draws} null worlds"
    )


def run(config: TruebaseConfig) -> xr.DataTree:
    """Train what is missing, ask, compare, and return the run, a file in `runs`."""
    return truebase.run(config, runs=RUNS)


def left_out(run: xr.DataTree) -> str:
    """What was not asked, a line a reason."""
    reasons: dict[str, list[str]] = {}
    for what, why in json.loads(run.attrs["left_out"]).items():
        reasons.setdefault(why, []).append(what)
    if not reasons:
        return "nothing was left out"
    return "\n".join(f"left out: {', '.join(what)}: {why}" for why, what in reasons.items())


def drawn_from(run: xr.DataTree, config: TruebaseConfig) -> Path:
    """The file that the figures are drawn from."""
    return _shown(Path(config.source)) if config.source else launch.run_file(run)


def cards(run: xr.DataTree) -> str:
    """Where each stage's card is, and the command that checks its folder, a line each."""
    folder = _shown(RUNS / run.attrs["name"])
    where: dict[str, str] = json.loads(run.attrs["cards"])
    audited: dict[str, str] = json.loads(run.attrs["folders"])
    check = "python -m trinity_lib.card verify"
    if not (RUNS / run.attrs["name"]).is_dir():
        return f"the checkpoints and cards of {run.attrs['name']} are not on this machine"
    return "\n".join(
        f"{check} {folder / place / JSON} {_shown(Path(audited[stage]))}"
        for stage, place in where.items()
    )


def _shown(path: Path) -> Path:
    """From the repository's root on, where it is inside."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _described(stage: str, folder: Path) -> str:
    shape = hub.read_config(folder)
    return (
        f"{stage}: {folder}, {shape.num_layers} layers, {shape.router.num_experts} experts, "
        f"top-{shape.router.top_k}"
    )


def _checkpoints(given: Any) -> tuple[tuple[str, str], ...]:
    found = []
    for each in launch.listed(given):
        stage, equals, place = each.partition("=")
        folder = _folder(place if equals else each)
        found.append((stage.strip() if equals else Path(each).name, str(folder)))
    return tuple(found)


def _folder(place: str) -> Path:
    """A folder that is there, or OWNER/NAME of the hub."""
    try:
        folder = launch.located("checkpoints", place.strip())
    except Missing:
        folder = hub.local(place.strip())
    hub.inspect(folder)
    return folder


def _file(parameter: str, given: Any) -> str:
    path = convert(str, given, parameter)
    return str(launch.located(parameter, path)) if path else ""


def _steps(given: Any) -> tuple[int, int] | None:
    values = [convert(int, value, "steps") for value in launch.listed(given)]
    if not values:
        return None
    right = "two numbers: of the constant rate, and of the annealing"
    require(len(values) == 2, "steps", given, right)
    return values[0], values[1]


def _instruct(own: TruebaseConfig, given: Any) -> tuple[Stage, ...] | None:
    values = [convert(int, value, "instruct_steps") for value in launch.listed(given)]
    if not values:
        return None
    kinds = ", ".join(stage.kind for stage in own.instruct)
    right = f"a number for each of {kinds}"
    require(len(values) == len(own.instruct), "instruct_steps", given, right)
    pairs = zip(own.instruct, values, strict=True)
    return tuple(dataclasses.replace(stage, steps=steps) for stage, steps in pairs)


def _debias(given: Any) -> Stage | None:
    steps = convert(int | None, given, "debias_steps")
    return None if steps is None else Stage(kind="sft", steps=steps)
