"""One run as one labelled file: the waist between making runs and reading them.

While a run lasts it is a folder of shards, `runs/NAME/log/*.nc`, each written under a
temporary name, synced and renamed; at the end they become `runs/NAME.nc`. `open_run` and
`open_runs` are the only ways in, and read either.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from glob import escape as glob_escape
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from trinity_lib import disk
from trinity_lib.config import BadValue, Missing, Taken, first_line
from trinity_lib.schema import SCHEMA, SCHEMA_VERSION, TABLES, Variable

ENGINE: Any = "h5netcdf"
ROOT = Path(__file__).resolve().parent.parent
WHOLE = ("complete", "rehearsed")
"""How a run ends that becomes one file."""
DAMAGE = (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)
"""What readers raise on a file that is torn or foreign."""


class Claim:
    """The right to write one run: taken before any work, gone with its process.

    Raises Taken where the run is complete, was begun before and is not to be resumed, or
    is being written by a living process; Missing where there is nothing to resume.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        self.folder = folder
        self.file = folder.with_name(folder.name + ".nc")
        if resume and not folder.is_dir() and not self.file.exists():
            raise Missing(f"There is no run {folder.name!r} to resume in {folder.parent}.")
        self._refuse_complete()
        folder.mkdir(parents=True, exist_ok=True)
        lock = disk.lock(folder / "lock")
        if lock is None:
            raise Taken(
                f"The run {folder.name!r} is being written by a live process; choose another "
                "name, or wait until it ends."
            )
        self._lock = lock
        try:
            self._refuse_complete()
            self.begun = (folder / "run.json").exists() or any((folder / "log").glob("*.nc"))
            if self.begun and not resume:
                raise Taken(
                    f"The run {folder.name!r} was begun before ({folder}); choose another "
                    "name, or resume it."
                )
            disk.tidy(folder)
            for torn in folder.parent.glob(f".{glob_escape(folder.name)}.nc.*"):
                torn.unlink()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the run up; a folder with nothing in it goes."""
        if self._lock.closed:  # another may hold the run by now
            return
        (self.folder / "lock").unlink(missing_ok=True)
        self._lock.close()
        with contextlib.suppress(OSError):  # not empty, or taken in this moment
            self.folder.rmdir()

    def _refuse_complete(self) -> None:
        if self.file.exists():
            raise Taken(
                f"The run {self.folder.name!r} is complete ({self.file}); choose another name."
            )


class Writer:
    """The only writer of one run.

    `coordinates` gives the labels of every dimension but step. Values arrive with `append`
    (groups without a step: `table`) and reach the disk with `flush`. To go on with a run that
    was begun before, `resume_at` is the step of the checkpoint it goes on from (0: from the
    start): attributes stay, shards past that step are dropped. Without a `claim` the run is
    claimed here.
    """

    def __init__(
        self,
        folder: Path,
        attributes: Mapping[str, Any],
        coordinates: Mapping[str, Any],
        *,
        claim: Claim | None = None,
        resume_at: int | None = None,
    ) -> None:
        self.claim = claim or Claim(folder)
        self.folder, self.file, self.log = folder, self.claim.file, folder / "log"
        self.log.mkdir(exist_ok=True)
        self.coordinates = {name: np.asarray(v) for name, v in coordinates.items()}
        self._pending: dict[str, list[tuple[int, dict[str, Any]]]] = {g: [] for g in SCHEMA}
        self._tables: dict[str, dict[str, Any]] = {}
        self._shards, self._last = 0, resume_at or 0
        self.whole: xr.DataTree | None = None  # the run, once it is complete
        self.attributes = {"created_at": _now(), **attributes}
        if resume_at is not None:
            self._rewind(resume_at)
        self.annotate(status="running", reason="", schema_version=SCHEMA_VERSION)

    def _rewind(self, step: int) -> None:
        """Take over a begun run's attributes; drop its shards past `step`."""
        old = read_attributes(self.folder)
        past = json.loads(old.get("resumed") or "[]")
        past.append({"step": step, "at": _now(), **provenance()})
        old.pop("finished_at", None)
        kept = {name: self.attributes[name] for name in ("config", "config_sha256")}
        self.attributes = {**old, **kept, "resumed": past}
        for shard in sorted(self.log.glob("*.nc")):
            last, number = map(int, shard.stem.split("-"))
            if last > step or step == 0:
                shard.unlink()
            else:
                self._shards = max(self._shards, number)

    def annotate(self, **attributes: Any) -> None:
        """Set root attributes, on disk at once. Bools become 0 or 1, mappings JSON."""
        self.attributes.update(attributes)
        text = json.dumps(self._attributes(), indent=1)
        disk.replace(self.folder / "run.json", lambda path: path.write_text(text))

    def _attributes(self) -> dict[str, Any]:
        return {name: _plain(value) for name, value in self.attributes.items()}

    def append(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one step of a group; the names must be exactly the schema's."""
        _require_names(group, values, SCHEMA[group])
        self._pending[group].append((step, dict(values)))

    def table(self, group: str, values: Mapping[str, Any]) -> None:
        """Set a group that has no step, whole; the last one set is the run's."""
        _require_names(group, values, TABLES[group])
        self._tables[group] = dict(values)

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not any(self._pending.values()) and not self._tables:
            return
        ends = [rows[-1][0] for rows in self._pending.values() if rows]
        last = self._last = max(ends, default=self._last)
        groups = {g: self._dataset(g, rows) for g, rows in self._pending.items() if rows}
        groups |= {g: self._labelled(TABLES[g], values) for g, values in self._tables.items()}
        tree = xr.DataTree.from_dict(groups)
        self._shards += 1
        shard = self.log / f"{last:08d}-{self._shards:06d}.nc"
        _save(tree, shard)
        self._pending, self._tables = {g: [] for g in SCHEMA}, {}

    def close(self, status: str, reason: str = "") -> Path:
        """Record how the run ended; a whole run becomes one file, which is returned."""
        self.attributes |= {"status": status, "reason": reason, "finished_at": _now()}
        if status not in WHOLE:
            try:
                self.flush()
            finally:  # how it ended is small, and may fit where a shard does not
                try:
                    self.annotate()
                finally:
                    self.claim.release()
            return self.folder
        self.flush()
        tree = _merge(self.folder)
        tree.attrs = self._attributes()
        self.whole = tree
        _save(tree, self.file, _packed(tree))  # first: a kill here leaves a whole run
        self.annotate()
        for shard in self.log.glob("*.nc"):
            shard.unlink()
        self.claim.release()
        return self.file

    def _dataset(self, group: str, rows: Sequence[tuple[int, dict[str, Any]]]) -> xr.Dataset:
        variables = SCHEMA[group]
        stacked = {n: np.stack([np.asarray(v[n]) for _, v in rows]) for n in variables}
        steps = np.asarray([step for step, _ in rows], dtype="i8")
        about = {"units": "1", "long_name": "optimiser steps done"}
        return self._labelled(variables, stacked, {"step": ("step", steps, about)})

    def _labelled(
        self,
        variables: Mapping[str, Variable],
        values: Mapping[str, Any],
        coordinates: Mapping[str, Any] | None = None,
    ) -> xr.Dataset:
        data = {}
        for name, variable in variables.items():
            meta = {"units": variable.units, "long_name": variable.long_name}
            array = np.asarray(values[name]).astype(variable.dtype)
            data[name] = (variable.dims, array, meta)
        used = {d for variable in variables.values() for d in variable.dims} - {"step"}
        labels: dict[str, Any] = {name: self.coordinates[name] for name in sorted(used)}
        return xr.Dataset(data, {**(coordinates or {}), **labels})


class Onlooker:
    """What ranks other than the first have for a writer: it writes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole: xr.DataTree | None = xr.DataTree()

    def annotate(self, **attributes: Any) -> None:
        """Nothing."""

    def append(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def table(self, group: str, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def close(self, status: str, reason: str = "") -> Path:
        """Nothing; where the run will be."""
        return self.folder


def open_run(path: str | os.PathLike) -> xr.DataTree:
    """One run, loaded whole: its file, or the folder of a run that is not complete.

    The folder of a run whose process was killed says `running`, and in `reason` that the
    process is gone. Raises Missing where there is no run, BadValue where it is damaged.
    """
    path = Path(path)
    if path.is_file():
        try:
            with xr.open_datatree(path, engine=ENGINE) as tree:
                return tree.load()
        except DAMAGE as error:
            raise BadValue(
                f"{path} is not a run file that can be read: {first_line(error)}."
            ) from error
    folder = path.with_suffix("") if path.suffix == ".nc" else path
    if not folder.name:
        raise Missing(f"There is no run at {path}: it is no run's folder.")
    finished = folder.with_name(folder.name + ".nc")
    if finished.is_file():
        return open_run(finished)
    if (folder / "run.json").is_file():
        tree = _merge(folder)
        if tree.attrs["status"] == "running" and not disk.locked(folder / "lock"):
            tree.attrs["reason"] = (
                "its process is gone: killed, or its machine or disk gave out"
            )
        return tree
    raise Missing(f"There is no run at {path}: neither a .nc file nor a run folder.")


def open_runs(pattern: str, group: str = "train", *, rehearsed: bool = False) -> xr.Dataset:
    """One group of many runs along `run`, steps joined; rehearsals only if asked for.

    Status, seed, scale, balancer and optimiser are coordinates along `run`.
    """
    datasets, labels = [], []
    groups: set[str] = set()
    for path in sorted(glob(pattern)):
        tree = open_run(path)
        attributes = tree.attrs
        if attributes["status"] == "rehearsed" and not rehearsed:
            continue
        groups.update(tree.children)
        if group not in tree:
            continue
        config = json.loads(attributes["config"])
        label = {
            "run": attributes["name"],
            "status": attributes["status"],
            "seed": attributes["seed"],
            "scale": attributes["scale"],
            "balance": config.get("balance", {}).get("method", ""),
            "optimizer": config.get("optim", {}).get("optimizer", ""),
        }
        datasets.append(tree[group].to_dataset())
        labels.append(label)
    if not datasets:
        has = f"; those that match have {', '.join(sorted(groups))}" if groups else ""
        raise Missing(f"No run matches {pattern} with a group {group!r}{has}.")
    runs: Any = {key: ("run", [label[key] for label in labels]) for key in labels[0]}
    joined = xr.concat(
        datasets, "run", join="outer", coords="minimal", compat="override", data_vars="all"
    )
    return joined.assign_coords(runs)


def failed(folder: Path, reason: str) -> None:
    """Write down that a run whose processes are gone has failed; nothing where none is there.

    One that said itself how it ended is left as it is.
    """
    if not (folder / "run.json").is_file() or disk.locked(folder / "lock"):
        return
    about = read_attributes(folder)
    if about["status"] == "running":
        about |= {"status": "failed", "reason": reason, "finished_at": _now()}
        text = json.dumps(about, indent=1)
        disk.replace(folder / "run.json", lambda path: path.write_text(text))


def read_attributes(folder: Path) -> dict[str, Any]:
    """The attributes of a run's folder; Missing where it holds none, BadValue where torn."""
    try:
        return json.loads((folder / "run.json").read_text())
    except FileNotFoundError as error:
        raise Missing(f"There is no run in {folder}: it has no run.json.") from error
    except ValueError as error:
        raise BadValue(f"{folder / 'run.json'} is damaged: {error}.") from error


def provenance() -> dict[str, Any]:
    """What made a run, as root attributes: code, packages, machine, command."""
    packages = ("torch", "numpy", "xarray", "tokenizers", "safetensors", "megablocks", "triton")
    return {
        "command": " ".join(sys.argv),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _require_names(group: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if set(values) != set(known):
        wrong = sorted(set(values) ^ set(known))
        raise ValueError(f"group {group!r} takes exactly its schema's names; see {wrong}.")


def _plain(value: Any) -> Any:
    """A value that netCDF takes as an attribute: no bool, None, mapping or nested list."""
    if isinstance(value, bool):
        return int(value)
    if value is None:
        return ""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value)
    return value


def _merge(folder: Path) -> xr.DataTree:
    """All shards of a run folder as one tree, with the attributes of run.json."""
    parts: dict[str, list[xr.Dataset]] = {}
    for shard in sorted((folder / "log").glob("*.nc")):
        try:
            with xr.open_datatree(shard, engine=ENGINE) as tree:
                tree.load()
        except DAMAGE as error:
            raise BadValue(f"{shard} is damaged: {first_line(error)}.") from error
        for name, node in tree.children.items():
            parts.setdefault(name, []).append(node.to_dataset())
    groups = {
        name: datasets[-1]
        if name in TABLES
        else xr.concat(
            datasets, "step", join="exact", coords="minimal", compat="override", data_vars="all"
        )
        for name, datasets in parts.items()
    }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = read_attributes(folder)
    return tree


def _save(tree: xr.DataTree, path: Path, encoding: Mapping[str, Any] | None = None) -> None:
    """Through memory: HDF5 crashes the process where a disk fills up under it."""
    content: Any = tree.to_netcdf(engine=ENGINE, encoding=encoding)
    disk.replace(path, lambda temporary: temporary.write_bytes(content))


def _packed(tree: xr.DataTree) -> dict[str, Any]:
    packed = {"zlib": True, "complevel": 1, "shuffle": True}
    return {
        f"/{name}": {
            variable: packed for variable, array in node.data_vars.items() if array.ndim > 2
        }
        for name, node in tree.children.items()
    }
