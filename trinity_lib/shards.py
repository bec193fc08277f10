"""Checkpoints of several ranks: torch.distributed.checkpoint, in safetensors, asynchronously.

Every rank writes what it holds into `shards/` of a checkpoint's folder while training goes on;
once all have, the folder gets its manifest and its name. Any number of ranks can read it, one
included. Tensors of the model are called model.NAME, all others as in any checkpoint.
"""

import json
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)

from trinity_lib import checkpoint, disk, hub
from trinity_lib.checkpoint import FACTS, MANIFEST, RUN, State
from trinity_lib.mesh import Layout
from trinity_lib.parallel import Sharded
from trinity_lib.tokenizer import Vocabulary

FOLDER = "shards"
MODEL, OPTIMIZER = "model.", "optimizer."


@dataclass
class Saving:
    """A checkpoint that is being written."""

    folder: Path
    """What it will be called."""
    temporary: Path
    step: int
    layout: Layout
    written: Future

    def done(self) -> bool:
        """Whether this rank's part is written."""
        return self.written.done()


def save(
    folder: Path,
    sharded: Sharded,
    vocabulary: Vocabulary,
    config_json: str,
    state: State,
    *,
    released: bool = False,
) -> Saving:
    """Begin to write a checkpoint; `finish` gives it its name. Every rank calls both.

    Values are copied before this returns, so that training may go on. `released` puts the
    weights into the folder as `hub.save` writes them too, before this returns.
    """
    layout = sharded.layout
    temporary = Path(layout.shared(str(disk.beside(folder))))
    if layout.rank == 0:
        disk.new_folder(temporary)
        (temporary / FOLDER).mkdir()
        vocabulary.save(temporary)
        (temporary / FACTS).write_text(json.dumps(state.facts))
        (temporary / RUN).write_text(config_json)
    dist.barrier(layout.control)
    if released:
        hub.write(sharded, temporary, tokenizer=vocabulary)
    writer = HuggingFaceStorageWriter(str(temporary / FOLDER), save_distributed=True)
    written = dcp.async_save(
        _distributed(sharded, state.tensors), storage_writer=writer,
        process_group=layout.background,
    )  # fmt: skip
    return Saving(folder, temporary, state.facts["step"], layout, written)  # type: ignore[arg-type]


def finish(saving: Saving) -> None:
    """Wait until every rank has written its part; then the folder is whole and has its name."""
    layout = saving.layout
    saving.written.result()
    mine = sorted((saving.temporary / FOLDER).glob(f"shard-{layout.rank + 1:05d}-*"))
    parts = layout.gathered({f"{FOLDER}/{p.name}": checkpoint.described(p) for p in mine})
    if layout.rank == 0:
        others = sorted(path for path in saving.temporary.iterdir() if path.is_file())
        files = {path.name: checkpoint.described(path) for path in others}
        for part in parts:
            files |= part
        manifest = {"step": saving.step, "files": files}
        (saving.temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        disk.put(saving.temporary, saving.folder)
    dist.barrier(layout.control)


def are_in(folder: Path) -> bool:
    """Whether a checkpoint was written by several ranks."""
    return (folder / FOLDER).is_dir()


def load(folder: Path, weights: Mapping[str, Tensor], sharded: Sharded | None = None) -> State:
    """A checkpoint's state, for these ranks or this one process; weights are filled in place.

    `weights` are what is held of every parameter: rows of it, if the model is `sharded`.
    """
    reader = HuggingFaceStorageReader(str(folder / FOLDER))
    targets: dict[str, Tensor] = {}
    for name, about in reader.read_metadata().state_dict_metadata.items():
        size, dtype = about.size, about.properties.dtype  # type: ignore[union-attr]
        targets[name] = _target(name, size, dtype, weights, sharded)
    group = None if sharded is None else sharded.layout.control
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(
            targets, storage_reader=HuggingFaceStorageReader(str(folder / FOLDER)),
            process_group=group, no_dist=group is None,
        )  # fmt: skip
    facts: dict[str, Any] = json.loads((folder / FACTS).read_text())
    local = {n: t.to_local() if hasattr(t, "to_local") else t for n, t in targets.items()}
    return State(facts, {n: t for n, t in local.items() if not n.startswith(MODEL)})


def _target(
    name: str,
    size: torch.Size,
    dtype: torch.dtype,
    weights: Mapping[str, Tensor],
    sharded: Sharded | None,
) -> Tensor:
    """Where a tensor goes: into the weights, or into memory of its own, split as they are."""
    parameter = name.removeprefix(MODEL)
    piece = None
    if name.startswith(OPTIMIZER):
        parameter = name.split(".", 3)[3]
        if sharded is not None and sharded.pieces[parameter].shape == size:
            piece = sharded.pieces[parameter]
            return piece.distributed(torch.zeros_like(piece.rows, dtype=dtype))
    elif name.startswith(MODEL):
        if sharded is not None:
            piece = sharded.pieces[parameter]
            return piece.distributed(piece.rows)
        return weights[parameter].detach()
    return torch.zeros(size, dtype=dtype)


def _distributed(sharded: Sharded, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All that is saved, each tensor as the part of a whole that it is."""
    found: dict[str, Tensor] = {
        f"{MODEL}{name}": piece.distributed(piece.rows)
        for name, piece in sharded.pieces.items()
    }
    for name, tensor in tensors.items():
        found[name] = tensor
        if name.startswith(OPTIMIZER):
            piece = sharded.pieces[name.split(".", 3)[3]]
            if tensor.shape == piece.rows.shape and tensor.dim():
                found[name] = piece.distributed(tensor)
    return found
