"""Stages of one model side by side: what a raw checkpoint holds, and what polishing changes.

Trains a chain in a planted world, or takes checkpoints that are given, asks every one of them,
looks inside, compares, and writes down what was found: a run file, and a card of each stage.
"""

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from trinity_lib import (
    audit,
    chain,
    checkpoint,
    compare,
    data,
    given,
    inside,
    interview,
    planted,
    rows,
    stage_cards,
    stage_statements,
    truebase_config,
    workers,
)
from trinity_lib.config import BadValue, Refusal, differences, from_json, to_json
from trinity_lib.data import Batch
from trinity_lib.interview import Said
from trinity_lib.progress import Progress
from trinity_lib.record import Claim, Writer, open_run, provenance, read_attributes
from trinity_lib.stage_schema import STAGES as SCHEMA
from trinity_lib.stage_statements import Seen
from trinity_lib.train import CACHE, RUNS, reproducible
from trinity_lib.truebase_config import STAGES, TruebaseConfig

ROWS = 4
"""Held-out rows of a domain that stages are compared on."""
PAUSE = 3.0
"""Seconds between lines on what is done, at least."""
EVERY = 10.0
"""Seconds between lines on what the workers do."""


class Looked(NamedTuple):
    """What was found of one chain, or of checkpoints that were given."""

    said: dict[str, list[Said]]
    """Findings by stage."""
    groups: dict[str, xr.Dataset]
    """Comparisons and looks inside, by group of the run."""
    folders: dict[str, Path]
    """Of the stages."""
    seed: int
    """The chain's; -1 of given checkpoints."""
    left_out: dict[str, str]
    """What was not done, and why."""


def run(config: TruebaseConfig, *, runs: Path = RUNS, cache: Path = CACHE) -> xr.DataTree:
    """Do what is not done yet and return the run, which is also a file in `runs`.

    A chain's own runs are found under the study's name and go on where they were cut off; a
    study that is complete is opened. Raises BadValue where its name is another study's, or
    for what of given checkpoints cannot be used.
    """
    if config.source:
        return _study_in(Path(config.source))
    config = truebase_config.named(config)
    folder, file = runs / config.name, runs / f"{config.name}.nc"
    if file.is_file():
        old = read_attributes(folder)
        _require_same(config, old)
        _require_unchanged(config, old)
        print(f"{config.name} is complete: opened from {file}", flush=True)
        return open_run(file)
    begun = (folder / "run.json").is_file()
    if begun:
        _require_same(config, read_attributes(folder))
    if config.checkpoints:
        given.read(config, cache)  # what cannot be used is refused before a folder is made
    attributes = _attributes(config)
    claim = Claim(folder, resume=begun)
    writer = Writer(folder, attributes, {}, claim=claim, resume_at=0 if begun else None)
    # given folders may have changed since the study was begun
    writer.annotate(**{k: v for k, v in attributes.items() if k.endswith("_sha256")})
    try:
        with reproducible(config.threads, config.device):
            found = _found(config, writer.folder, runs, cache)
            _write(writer, config, found)
        first = found[0]
        cards = stage_cards.write(
            config, writer.folder, first.said, first.folders, first.left_out
        )
        folders = {stage: str(path) for stage, path in first.folders.items()}
        writer.annotate(cards=cards, folders=folders)
        file = writer.close("complete")
    except BaseException as error:
        known = isinstance(error, Refusal)
        writer.close("failed", str(error) if known else f"{type(error).__name__}: {error}")
        raise
    return open_run(file)


def _study_in(file: Path) -> xr.DataTree:
    run = open_run(file)
    if "findings" not in run:
        raise BadValue(f"source is '{file}', which is no run file of a study of stages.")
    return run


def _found(config: TruebaseConfig, folder: Path, runs: Path, cache: Path) -> list[Looked]:
    if config.checkpoints:
        said, groups, left_out = given.look(config, cache, _teller(""))
        folders = {stage: Path(path) for stage, path in config.checkpoints}
        return [Looked(said, groups, folders, -1, left_out)]
    planted.write(planted.world(config.world), folder)
    calls = [(config, number, runs, cache) for number in range(config.seeds)]
    if min(config.workers, config.seeds) == 1:
        return [look(*call) for call in calls]
    return _at_once(config, folder, calls)


def _at_once(
    config: TruebaseConfig, folder: Path, calls: list[tuple[TruebaseConfig, int, Path, Path]]
) -> list[Looked]:
    """All chains, some at a time, each in a process of its own."""
    for log in folder.glob("worker-*.log"):  # of an attempt that was cut off
        log.unlink()
    # one text for all, before they race to it
    own = truebase_config.chain(config, 0)
    data.load(own.data, own.model.vocab_size, calls[0][3])
    about = str(folder), os.getpid()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(config.workers, context, workers.begin, about)
    try:
        futures = [pool.submit(look, *call) for call in calls]
        while not all(future.done() for future in futures):
            wait(futures, timeout=EVERY, return_when=FIRST_EXCEPTION)
            print("\n".join(workers.latest(folder)), flush=True)
            for future in futures:
                if future.done():
                    future.result()  # a failure is raised before the others are awaited
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise workers.WorkerDied(
            f"A worker of {config.name!r} was killed, probably for want of memory; run it "
            f"again to go on, with fewer workers than {config.workers}."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def look(config: TruebaseConfig, number: int, runs: Path, cache: Path) -> Looked:
    """Train chain `number`, ask its stages, compare them, look inside."""
    with reproducible(config.threads, config.device):
        folders = chain.made(config, number, runs, cache)
        world = planted.world(config.world)
        read = {
            stage: interview.read(folder, config.reader, config.device)
            for stage, folder in folders.items()
        }
        innocent = None
        if config.innocent:
            untold = chain.innocent(config, number, runs, cache)
            innocent = interview.read(untold, "trinity", config.device)
        said, tell = {}, _teller(f"chain {number}: ")
        for stage, checkpoint in read.items():
            tell(f"asking {stage}")
            said[stage] = interview.of_world(checkpoint, world, config.seed)
        groups = compare.compare(
            folders,
            _rows(config, number, cache),
            arithmetic=[(STAGES[1], STAGES[2], STAGES[0])],
            extend=(),
            device=config.device,
            seed=config.seed,
            progress=tell,
        )
        groups |= inside.look(inside.Chain(read, world, innocent), config, number, tell)
    seed = truebase_config.chain(config, number).seed
    return Looked(said, groups, folders, seed, _left_out(config))


def _left_out(config: TruebaseConfig) -> dict[str, str]:
    """What a chain that is trained here was not asked."""
    found = {"items and tasks": "those are for checkpoints that are given"}
    if not config.ablate:
        found["experts taken out"] = "ablate is false"
    if not config.draws:
        found["audits audited"] = "draws is 0"
    if not config.innocent:
        found["relearning beside a model that never had the association"] = (
            f"scale {config.scale} trains none"
        )
    return found


def _rows(config: TruebaseConfig, number: int, cache: Path) -> dict[str, Batch]:
    """Held-out rows of every domain."""
    own = truebase_config.chain(config, number)
    loaded = data.load(own.data, own.model.vocab_size, cache)
    return {
        domain: rows.validation(domain, documents, own.data.sequence_length, ROWS)
        for domain, documents in loaded.validation.items()
    }


def _teller(who: str) -> Callable[[str], None]:
    """Prints what is done, but not more often than every few seconds."""
    due = 0.0

    def tell(what: str) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + PAUSE
            print(f"{who}{what}", flush=True)

    return tell


def _write(writer: Writer, config: TruebaseConfig, found: Sequence[Looked]) -> None:
    """All groups of the run; comparisons and looks inside are of the first chain."""
    table = rows_of(found)
    writer.coordinates["finding"] = np.arange(len(table))
    writer.table("findings", {str(name): table[name].to_numpy() for name in table})
    for name, group in found[0].groups.items():
        writer.coordinates |= {str(dim): group[dim].to_numpy() for dim in group.dims}
        writer.table(name, {str(key): value.values for key, value in group.items()})
    if not config.checkpoints:
        seen = [_seen(table, each) for each in found]
        writer.coordinates["claim"] = np.arange(len(stage_statements.CLAIMS))
        writer.coordinates["chain"] = np.array([each.seed for each in found])
        writer.table("claims", stage_statements.claims(seen))
        writer.table("claim_values", stage_statements.values(seen))
    if config.draws:
        _check_audits(writer, config.draws)
    writer.annotate(left_out=found[0].left_out)


def _check_audits(writer: Writer, draws: int) -> None:
    """How often each audit finds what is not there, and misses what is."""
    progress = Progress(2 * draws, max(1, draws // 4), "auditing the audits", unit="world")
    alarms = audit.false_alarms(draws=draws, progress=lambda _: progress.step())
    covered = audit.recovery(draws=draws, progress=lambda _: progress.step())
    progress.close()
    writer.coordinates["family"] = np.array(list(alarms))
    names = ("share", "low", "high", "calibrated")
    values = {name: [getattr(each, name) for each in alarms.values()] for name in names}
    values["covered"] = [each.share for each in covered.values()]
    values["draws"] = [draws] * len(alarms)
    writer.table("audits", values)


def rows_of(found: Sequence[Looked]) -> pd.DataFrame:
    """The columns of /findings, a row a finding."""
    rows: list[dict[str, Any]] = []
    for each in found:
        for stage, said in each.said.items():
            for asked_as, finding in said:
                about = {"model_seed": each.seed, "of_stage": stage, "asked_as": asked_as}
                rows.append({**about, **finding._asdict()})
    return pd.DataFrame(rows, columns=list(SCHEMA["findings"]))


def _seen(table: pd.DataFrame, looked: Looked) -> Seen:
    return Seen(table[table["model_seed"] == looked.seed], looked.groups)


def _require_same(config: TruebaseConfig, attributes: Mapping[Any, Any]) -> None:
    old = from_json(TruebaseConfig, attributes["config"])
    changed = differences(old, config, ("workers",))
    if changed:
        raise BadValue(
            f"The run {config.name!r} is another one: {'; '.join(changed)}; choose another "
            "name."
        )


def _require_unchanged(config: TruebaseConfig, attributes: Mapping[Any, Any]) -> None:
    """Checkpoints that are given must be those that were looked at."""
    looked_at = json.loads(attributes.get("checkpoints_sha256", "{}"))
    for stage, folder in config.checkpoints:
        if checkpoint.sha256(Path(folder)) != looked_at[stage]:
            raise BadValue(
                f"The run {config.name!r} is of other weights than {folder} has now; choose "
                "another name."
            )


def _attributes(config: TruebaseConfig) -> dict[str, Any]:
    text = to_json(config)
    stages = [stage for stage, _ in config.checkpoints] or list(STAGES)
    found = {
        **provenance(),
        "name": config.name,
        "scale": config.scale,
        "seed": config.seed,
        "config": text,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "stages": stages,
        "device": config.device,
        "threads": config.threads,
        "reader": config.reader,
    }
    found["checkpoints_sha256"] = {
        stage: checkpoint.sha256(Path(folder)) for stage, folder in config.checkpoints
    }
    if not config.checkpoints:
        found["world_sha256"] = planted.sha256(planted.world(config.world))
        found["base"] = to_json(truebase_config.chain(config, 0))
    return found
