"""Many runs as independent processes: a grid of trials, resumable, gathered into one file.

python -m trinity_lib.study --config F            # StudyConfig as JSON
"""

import argparse
import dataclasses
import hashlib
import multiprocessing
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from trinity_lib import (
    data,
    disk,
    findings,
    grid,
    replay,
    statements,
    study_config,
    trial,
    workers,
)
from trinity_lib.config import (
    BadValue,
    Refusal,
    differences,
    from_file,
    from_json,
    one_sentence,
    to_json,
)
from trinity_lib.data import Loaded
from trinity_lib.experts import backend_info
from trinity_lib.grid import Trial
from trinity_lib.outcome import TIMES
from trinity_lib.progress import Progress
from trinity_lib.record import ENGINE, Claim, Writer, open_run, provenance, read_attributes
from trinity_lib.run import RunConfig
from trinity_lib.schema import TABLES
from trinity_lib.study_config import StudyConfig
from trinity_lib.train import CACHE, RUNS
from trinity_lib.trial import WORK
from trinity_lib.workers import WorkerDied

GATHER_EVERY = 40
"""Finished trials between two writings of what is known so far."""


def file_of(config: StudyConfig, runs: Path = RUNS) -> Path:
    """The run file of a study, or the one it is drawn from."""
    if config.source:
        return study_config.shown(config.source)
    return runs / f"{study_config.named(config).name}.nc"


def study(config: StudyConfig, *, runs: Path = RUNS, cache: Path = CACHE) -> xr.DataTree:
    """Run what is not done yet and return the study, which is also a file in `runs`.

    A study that was cut off goes on with the trials that it has no outcome of; one that is
    complete is opened. Raises BadValue where its name is another study's.
    """
    if config.source:
        return _study_in(Path(config.source))
    config = study_config.named(config)
    folder, file = runs / config.name, file_of(config, runs)
    if file.is_file():
        return _complete(file, config)
    begun = (folder / "run.json").is_file()
    if begun:
        _require_same(config, read_attributes(folder))
    claim = Claim(folder, resume=begun)
    try:
        loaded = _prepare(config, cache)
        facts = _facts(loaded)
        if begun:
            _require_same_facts(folder, facts)
        writer = Writer(
            folder,
            _attributes(config) | facts,
            _coordinates(config, list(loaded.validation)),
            claim=claim,
            resume_at=0 if begun else None,
        )
        writer.annotate(**facts)
    except BaseException:
        claim.release()
        raise
    try:
        lasting = _Study(config, writer, cache)
        lasting.run()
    except BaseException as error:
        reason = (
            str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
        )
        writer.close("failed", reason)
        raise
    done = writer.close("complete")
    lasting.tidy()
    return open_run(done)


class _Study:
    """A study while it lasts."""

    def __init__(self, config: StudyConfig, writer: Writer, cache: Path) -> None:
        self.config, self.writer, self.cache = config, writer, cache
        self.folder = writer.folder / "trials"
        self.folder.mkdir(exist_ok=True)
        self.outcomes: dict[str, xr.Dataset] = {}
        self.first = grid.first_wave(config)
        self.kept = {t.parent for t in grid.most(config) if t.parent}

    def run(self) -> None:
        """Both waves; what is known is on the disk now and then, and at the end."""
        context = multiprocessing.get_context("spawn")
        about = str(self.writer.folder), os.getpid()
        pool = ProcessPoolExecutor(self.config.workers, context, workers.begin, about)
        try:
            later = {t.key for t in grid.most(self.config)} - {t.key for t in self.first}
            self._execute(pool, self.first, len(later))
            best = findings.best_rates(*self._tables(self.first))
            self.writer.annotate(best_rates=best)
            trials = self.first + grid.second_wave(self.config, best)
            self._execute(pool, trials)
            self._gather(trials)
        except BrokenProcessPool as error:
            raise WorkerDied(
                f"A worker of study {self.config.name!r} was killed, probably for want of "
                f"memory; run it again to go on, with fewer workers than {self.config.workers}."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def tidy(self) -> None:
        """Remove the checkpoints that rescues began with, and what killed workers left."""
        if (self.folder / WORK).exists():
            disk.remove_folder(self.folder / WORK)

    def _execute(self, pool: Executor, trials: list[Trial], later: int = 0) -> None:
        """Run what has no outcome yet; `later` more runs at most are to come after these."""
        todo = self._todo(trials)
        if not todo:
            return
        here = len({t.key for t in trials})
        every = max(1, (here + later) // 20)
        done = here - len(todo)
        bar = Progress(here + later, every, self.config.name, done, unit="run")
        try:
            futures = {pool.submit(trial.run, *self._call(t)): t for t in todo}
            for count, future in enumerate(as_completed(futures), 1):
                one, error = futures[future], future.exception()
                if error is not None and not isinstance(error, BrokenProcessPool):
                    error.add_note(f"in trial {one.key}: {one.part}, {one.axis} {one.level}")
                self.outcomes[one.key] = future.result()
                bar.step(one.part, one.config.balance.method)
                if count % GATHER_EVERY == 0:
                    self._gather(trials)
        finally:
            bar.close()

    def _todo(self, trials: Iterable[Trial]) -> list[Trial]:
        """Trials without an outcome, once each, the longest first."""
        missing = {t.key: t for t in trials if not self._done(t.key)}
        return sorted(missing.values(), key=lambda t: -t.config.phases[0].tokens)

    def _done(self, key: str) -> bool:
        file = self.folder / f"{key}.nc"
        if not file.is_file():
            return False
        return key not in self.kept or self._checkpoint(key).is_dir() or _has_failed(file)

    def _checkpoint(self, key: str) -> Path:
        return self.folder / WORK / key / trial.STAGE

    def _call(self, one: Trial) -> tuple[str, RunConfig, Path, Path, bool]:
        config = one.config
        if one.parent:
            config = dataclasses.replace(config, init=str(self._checkpoint(one.parent)))
        return one.key, config, self.folder, self.cache, one.key in self.kept

    def _tables(self, trials: list[Trial]) -> tuple[dict[str, Any], dict[str, Any]]:
        for key in {t.key for t in trials} - set(self.outcomes):
            if (self.folder / f"{key}.nc").is_file():
                with xr.open_dataset(self.folder / f"{key}.nc", engine=ENGINE) as opened:
                    self.outcomes[key] = opened.load()
        return gathered(trials, self.outcomes, self.writer.coordinates)

    def _gather(self, trials: list[Trial]) -> None:
        described, results = self._tables(trials)
        self.writer.table("trials", described)
        self.writer.table("results", results)
        self.writer.table("claims", statements.claims(described, results))
        self.writer.flush()


def _has_failed(file: Path) -> bool:
    with xr.open_dataset(file, engine=ENGINE) as outcome:
        return outcome.attrs["status"] == "failed"


def gathered(
    trials: list[Trial], outcomes: Mapping[str, xr.Dataset], labels: Mapping[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of /trials and /results; NaN where a trial has no outcome or no such value."""
    count = len(labels["trial"])
    rows: dict[str, list[Any]] = {name: [] for name in TABLES["trials"]}
    results = {
        name: np.full([len(labels[d]) for d in variable.dims], np.nan)
        for name, variable in TABLES["results"].items()
    }
    for number in range(count):
        one = trials[number] if number < len(trials) else None
        found = outcomes.get(one.key) if one else None
        for name, value in _described(one, found).items():
            rows[name].append(value)
        for label, value in ({} if found is None else found.data_vars).items():
            within: Any = (number, *map(slice, value.shape))
            results[str(label)][within] = value.values
    return rows, results


def _described(one: Trial | None, found: xr.Dataset | None) -> dict[str, Any]:
    if one is None:
        nothing = dict.fromkeys(TABLES["trials"], "")
        return {**nothing, "rate": np.nan, "seed": -1, "status": "missing"}
    balance = one.config.balance
    status = "missing" if found is None else found.attrs["status"]
    return {
        "key": one.key,
        "part": one.part,
        "axis": one.axis,
        "level": one.level,
        "method": balance.method,
        "rate": balance.rate,
        "seed": one.config.seed,
        "status": status,
        "reason": "" if found is None else found.attrs["reason"],
    }


def _prepare(config: StudyConfig, cache: Path) -> Loaded:
    """Tokenise the text before workers race to."""
    base = grid.base(config)
    return data.load(base.data, base.model.vocab_size, cache)


def _facts(loaded: Loaded) -> dict[str, Any]:
    """What all runs of a study must share beside their configuration."""
    hashes = replay.hashes(loaded.sha256, loaded.vocabulary.sha256)
    return {**hashes, "experts_backend": backend_info()["backend"]}


def _require_same_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    old = read_attributes(folder)
    for name, value in facts.items():
        if old.get(name, value) != value:
            raise BadValue(
                f"The study {folder.name!r} cannot be gone on with: its {name} is "
                f"{value[:12]} here and was {old[name][:12]}; choose another name."
            )


def _study_in(file: Path) -> xr.DataTree:
    run = open_run(file)
    if "trials" not in run:
        raise BadValue(f"source is '{file}', which is no collapse study's run file.")
    return run


def _complete(file: Path, config: StudyConfig) -> xr.DataTree:
    run = open_run(file)
    _require_same(config, run.attrs)
    print(f"{config.name} is complete: opened from {file}", flush=True)
    return run


def _require_same(config: StudyConfig, attributes: Mapping[Any, Any]) -> None:
    old = from_json(StudyConfig, attributes["config"])
    changed = differences(old, config, ("workers",))
    if not changed:  # the same settings, of which another version may make another run
        before = from_json(RunConfig, attributes["base"])
        changed = differences(before, grid.base(config))
    if changed:
        raise BadValue(
            f"The study {config.name!r} is another one: {'; '.join(changed)}; choose another "
            "name."
        )


def _attributes(config: StudyConfig) -> dict[str, Any]:
    text, base = to_json(config), grid.base(config)
    return {
        **provenance(),
        "name": config.name,
        "scale": config.scale,
        "seed": 0,
        "config": text,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "base": to_json(base),
        "num_experts": base.model.router.num_experts,
        "top_k": base.model.router.top_k,
        "device": "cpu",
        "threads": 1,
    }


def _coordinates(config: StudyConfig, domains: list[str]) -> dict[str, Any]:
    trials = grid.most(config)
    experts = max(t.config.model.router.num_experts for t in trials)
    layers = max(len(t.config.model.moe_layers) for t in trials)
    return {
        "trial": np.arange(len(trials)),
        "trial_layer": np.arange(1, layers + 1),
        "trial_domain": domains,
        "time": (np.arange(TIMES) + 1) / TIMES,
        "expert_rank": np.arange(experts),
        "claim": np.arange(len(statements.CLAIMS)),
    }


def main() -> None:
    """Run a study from a configuration file and print its file's path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="StudyConfig as JSON")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of run files")
    given = parser.parse_args()
    with one_sentence():
        run = study(from_file(StudyConfig, given.config), runs=given.runs)
        print(given.runs / f"{run.attrs['name']}.nc")


if __name__ == "__main__":
    main()
