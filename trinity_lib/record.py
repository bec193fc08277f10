"""One run as one labelled file: the waist between making runs and reading them.

While a run lasts it is a folder of shards, `runs/NAME/log/*.nc`, each written under a
temporary name, synced and renamed; at the end they become `runs/NAME.nc`. `open_run` and
`open_runs` are the only ways in, and read either.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

SCHEMA_VERSION = "1"
ENGINE: Any = "h5netcdf"
ROOT = Path(__file__).resolve().parent.parent


class Variable(NamedTuple):
    """How one variable is stored."""

    dims: tuple[str, ...]
    """Dimensions, `step` first."""
    dtype: str
    """numpy dtype."""
    units: str
    """Units, "1" for a pure number."""
    long_name: str
    """What it is."""


_STEP, _LAYER = ("step",), ("step", "layer")
_EXPERT, _DOMAIN = ("step", "layer", "expert"), ("step", "split", "domain")

SCHEMA: dict[str, dict[str, Variable]] = {
    "train": {
        "loss": Variable(_STEP, "f8", "nat", "training cross entropy per token"),
        "z_loss": Variable(_STEP, "f8", "nat^2", "mean squared log-partition of the logits"),
        "balance_loss": Variable(_STEP, "f8", "1", "weighted balancing loss"),
        "learning_rate": Variable(_STEP, "f8", "1", "learning rate as a share of its peak"),
        "grad_norm": Variable(_STEP, "f8", "1", "gradient norm before clipping"),
        "tokens": Variable(_STEP, "i8", "token", "tokens trained so far"),
        "batch_tokens": Variable(_STEP, "i8", "token", "tokens routed in this step"),
        "batch_het": Variable(
            _STEP, "f8", "nat", "BatchHet: highest less mean micro-batch loss"
        ),
        "seconds": Variable(_STEP, "f8", "s", "wall time of the step"),
        "phase": Variable(_STEP, "i8", "1", "phase of the schedule"),
    },
    "layers": {
        "max_vio": Variable(_LAYER, "f8", "1", "MaxVio: highest load over mean load, less 1"),
        "min_vio": Variable(_LAYER, "f8", "1", "MinVio: 1 less lowest load over mean load"),
        "load_entropy": Variable(_LAYER, "f8", "nat", "entropy of the expert loads"),
        "effective_experts": Variable(
            _LAYER, "f8", "expert", "exponential of the load entropy"
        ),
        "bias_std": Variable(_LAYER, "f8", "1", "standard deviation of the selection bias"),
        "bias_range": Variable(_LAYER, "f8", "1", "highest less lowest selection bias"),
    },
    "routing": {
        "count": Variable(_EXPERT, "i8", "token", "tokens routed to the expert in this step"),
        "bias": Variable(_EXPERT, "f4", "1", "selection bias after the step"),
    },
    "evaluation": {
        "loss": Variable(_DOMAIN, "f8", "nat", "cross entropy per token"),
        "bits_per_byte": Variable(_DOMAIN, "f8", "bit", "cross entropy per byte of text"),
        "gzip_bits_per_byte": Variable(_DOMAIN, "f8", "bit", "gzip -9 on the same bytes"),
        "unigram_entropy": Variable(_DOMAIN, "f8", "nat", "unigram entropy of the same tokens"),
        "tokens": Variable(_DOMAIN, "i8", "token", "tokens predicted"),
        "bytes": Variable(_DOMAIN, "i8", "byte", "bytes of text predicted"),
        "count": Variable(
            (*_DOMAIN, "layer", "expert"),
            "i8",
            "token",
            "evaluated tokens routed to the expert",
        ),
    },
}
"""Every group and variable of a run file; each group has its own `step`."""


class Writer:
    """The only writer of one run; a second is refused while it lives.

    `coordinates` gives the labels of layer, expert, split and domain. Values arrive with
    `append` and reach the disk with `flush`.
    """

    def __init__(
        self, folder: Path, attributes: Mapping[str, Any], coordinates: Mapping[str, Any]
    ) -> None:
        self.folder, self.log = folder, folder / "log"
        self.file = folder.with_name(folder.name + ".nc")
        if self.file.exists():
            raise FileExistsError(
                f"The run {folder.name!r} is complete ({self.file}); choose another name."
            )
        self.log.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        if any(self.log.glob("*.nc")):
            self._lock.close()
            raise FileExistsError(
                f"The run {folder.name!r} was begun before ({folder}); choose another name."
            )
        self.attributes = dict(attributes)
        self.coordinates = {name: np.asarray(v) for name, v in coordinates.items()}
        self._shards = 0
        self._pending: dict[str, list[tuple[int, dict[str, Any]]]] = {g: [] for g in SCHEMA}
        self.annotate(status="running", schema_version=SCHEMA_VERSION, created_at=_now())

    def annotate(self, **attributes: Any) -> None:
        """Set root attributes, on disk at once. Bools become 0 or 1, mappings JSON."""
        self.attributes.update(attributes)
        text = json.dumps({k: _plain(v) for k, v in self.attributes.items()}, indent=1)
        _replace(self.folder / "run.json", lambda path: path.write_text(text))

    def append(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        """Add one step of a group; the names must be exactly the schema's."""
        if set(values) != set(SCHEMA[group]):
            wrong = sorted(set(values) ^ set(SCHEMA[group]))
            raise ValueError(f"group {group!r} takes exactly its schema's names; see {wrong}.")
        self._pending[group].append((step, dict(values)))

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not any(self._pending.values()):
            return
        last = max(rows[-1][0] for rows in self._pending.values() if rows)
        groups = {g: self._dataset(g, rows) for g, rows in self._pending.items() if rows}
        tree = xr.DataTree.from_dict(groups)
        self._shards += 1
        shard = self.log / f"{last:08d}-{self._shards:06d}.nc"
        _replace(shard, lambda path: tree.to_netcdf(path, engine=ENGINE))
        self._pending = {g: [] for g in SCHEMA}

    def close(self, status: str, reason: str = "") -> Path:
        """Record how the run ended; a complete run becomes one file, which is returned."""
        self.flush()
        self.annotate(status=status, reason=reason, finished_at=_now())
        if status == "complete":
            tree = _merge(self.folder)
            _replace(self.file, lambda path: _save(tree, path))
            for shard in self.log.glob("*.nc"):
                shard.unlink()
        self._lock.close()
        return self.file if status == "complete" else self.folder

    def _dataset(self, group: str, rows: Sequence[tuple[int, dict[str, Any]]]) -> xr.Dataset:
        data: dict[str, Any] = {}
        for name, variable in SCHEMA[group].items():
            stacked = np.stack([np.asarray(values[name]) for _, values in rows])
            meta = {"units": variable.units, "long_name": variable.long_name}
            data[name] = (variable.dims, stacked.astype(variable.dtype), meta)
        used = {d for variable in SCHEMA[group].values() for d in variable.dims} - {"step"}
        coordinates: dict[str, Any] = {name: self.coordinates[name] for name in sorted(used)}
        steps = np.asarray([step for step, _ in rows], dtype="i8")
        about = {"units": "1", "long_name": "optimiser steps done"}
        return xr.Dataset(data, {"step": ("step", steps, about), **coordinates})


def open_run(path: str | os.PathLike) -> xr.DataTree:
    """One run, loaded whole: its file, or the folder of a run that is not complete.

    Raises FileNotFoundError where there is no run.
    """
    path = Path(path)
    if path.is_file():
        try:
            with xr.open_datatree(path, engine=ENGINE) as tree:
                return tree.load()
        except OSError as error:
            raise ValueError(f"{path} is not a run file that can be read: {error}.") from error
    folder = path.with_suffix("") if path.suffix == ".nc" else path
    finished = folder.with_name(folder.name + ".nc")
    if finished.is_file():
        return open_run(finished)
    if (folder / "run.json").is_file():
        return _merge(folder)
    raise FileNotFoundError(f"There is no run at {path}: neither a .nc file nor a run folder.")


def open_runs(pattern: str, group: str = "train", *, rehearsed: bool = False) -> xr.Dataset:
    """One group of many runs along `run`, steps joined; rehearsals only if asked for.

    Status, seed, scale, balancer and optimiser are coordinates along `run`.
    """
    datasets, labels = [], []
    for path in sorted(glob(pattern)):
        tree = open_run(path)
        attributes = tree.attrs
        if group not in tree or (attributes["status"] == "rehearsed" and not rehearsed):
            continue
        config = json.loads(attributes["config"])
        label = {
            "run": attributes["name"],
            "status": attributes["status"],
            "seed": attributes["seed"],
            "scale": attributes["scale"],
            "balance": config["balance"]["method"],
            "optimizer": config["optim"]["optimizer"],
        }
        datasets.append(tree[group].to_dataset())
        labels.append(label)
    if not datasets:
        raise FileNotFoundError(f"No run matches {pattern} with a group {group!r}.")
    runs: Any = {key: ("run", [label[key] for label in labels]) for key in labels[0]}
    joined = xr.concat(
        datasets, "run", join="outer", coords="minimal", compat="override", data_vars="all"
    )
    return joined.assign_coords(runs)


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


def _plain(value: Any) -> Any:
    """A value that netCDF takes as an attribute: no bool, None, mapping or nested list."""
    if isinstance(value, bool):
        return int(value)
    if value is None:
        return ""
    if isinstance(value, dict | list | tuple):
        return json.dumps(value)
    return value


def _lock(folder: Path) -> Any:
    file = (folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise FileExistsError(
            f"The run {folder.name!r} is being written by a live process; choose another name."
        ) from error
    return file


def _replace(path: Path, write: Any) -> None:
    """Write a file so that a reader or a crash sees the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with _open_descriptor(temporary) as descriptor:
            os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with _open_descriptor(path.parent) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _open_descriptor(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _merge(folder: Path) -> xr.DataTree:
    """All shards of a run folder as one tree, with the attributes of run.json."""
    parts: dict[str, list[xr.Dataset]] = {}
    for shard in sorted((folder / "log").glob("*.nc")):
        with xr.open_datatree(shard, engine=ENGINE) as tree:
            tree.load()
        for name, node in tree.children.items():
            parts.setdefault(name, []).append(node.to_dataset())
    groups = {
        name: xr.concat(
            datasets, "step", join="exact", coords="minimal", compat="override", data_vars="all"
        )
        for name, datasets in parts.items()
    }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = json.loads((folder / "run.json").read_text())
    return tree


def _save(tree: xr.DataTree, path: Path) -> None:
    packed = {"zlib": True, "complevel": 1, "shuffle": True}
    encoding = {
        f"/{name}": {
            variable: packed for variable, array in node.data_vars.items() if array.ndim > 2
        }
        for name, node in tree.children.items()
    }
    tree.to_netcdf(path, engine=ENGINE, encoding=encoding)
