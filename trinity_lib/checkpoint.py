"""Checkpoints as folders: a released model's layout, and beside it what resuming needs.

Every checkpoint is an AFMoE one (`hub`), so transformers, vLLM and llama.cpp's converter
read it as it is. Tensors are safetensors and everything else is JSON; nothing is pickled. A
folder is written whole or not at all, and its manifest says what it holds, so that a damaged
one is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trinity_lib import disk, hub, tokenizer
from trinity_lib.config import BadValue, Missing, first_line
from trinity_lib.model import Trinity
from trinity_lib.parallel import Piece
from trinity_lib.tokenizer import Vocabulary

RUN, MANIFEST = "run_config.json", "manifest.json"
STATE, FACTS = "state.safetensors", "state.json"
ROTATING = "step-"
"""Beginning of the names of checkpoints that later ones replace."""


class State(NamedTuple):
    """What resuming needs beside the weights."""

    facts: dict[str, Any]
    """Counters, positions and generators, for JSON; `step` is among them."""
    tensors: dict[str, Tensor]
    """Optimiser and balancer state, and the unread tokens of open documents."""


def save(
    folder: Path, model: Trinity, vocabulary: Vocabulary, config_json: str, state: State
) -> None:
    """Write a checkpoint, whole or not at all; an existing folder is replaced.

    `config_json` is the run's configuration, kept as it is.
    """

    def write(temporary: Path) -> None:
        hub.write(model, temporary, tokenizer=vocabulary)
        _save_tensors(temporary / STATE, state.tensors)
        (temporary / FACTS).write_text(json.dumps(state.facts))
        (temporary / RUN).write_text(config_json)
        files = {path.name: described(path) for path in sorted(temporary.iterdir())}
        manifest = {"step": state.facts["step"], "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))

    disk.replace_folder(folder, write)


def load(folder: Path) -> Trinity:
    """The model of a checkpoint folder, ours or any AFMoE one, on the CPU, as it was saved.

    Raises Missing where the folder is no checkpoint, and BadValue where it is damaged or
    its weights are not the configuration's.
    """
    check(folder)
    return hub.load(folder)


def check(folder: Path) -> None:
    """Refuse a folder that is no checkpoint; where there is a manifest, by content first."""
    if (folder / MANIFEST).exists():
        verify(folder)
    hub.inspect(folder)


def load_state(folder: Path, pieces: Mapping[str, Piece] | None = None) -> State:
    """What a verified checkpoint of one process holds beside the weights.

    Of optimiser state, only the rows that belong to `pieces`, where those are given.
    """
    return State(
        json.loads((folder / FACTS).read_text()), _load_tensors(folder / STATE, pieces or {})
    )


def load_vocabulary(folder: Path) -> Vocabulary:
    """The tokenizer the weights were trained with."""
    return tokenizer.load(folder)


def verify(folder: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all what it says, to the last byte.

    Of `parts` processes that verify together, each reads some of the files.
    """
    manifest = _manifest(folder)
    for i, (name, told) in enumerate(manifest["files"].items()):
        path = folder / name
        if not path.is_file():
            raise BadValue(f"The checkpoint {folder} is damaged: {name} is missing.")
        if path.stat().st_size != told["bytes"]:
            raise BadValue(
                f"The checkpoint {folder} is damaged: {name} has {path.stat().st_size:,} "
                f"bytes and was written with {told['bytes']:,}."
            )
        if i % parts == part and described(path) != told:
            raise BadValue(f"The checkpoint {folder} is damaged: {name} has changed.")
    return manifest


def sha256(folder: Path) -> str:
    """One hash of a checkpoint's weights, whoever wrote it."""
    files = sorted({path.name: path for path in hub.inspect(folder).files.values()}.items())
    parts = "".join(f"{name} {described(path)['sha256']}\n" for name, path in files)
    return hashlib.sha256(parts.encode()).hexdigest()


def newest(run: Path) -> Path | None:
    """The checkpoint of a run's folder with the highest step, or None."""
    folders = [path.parent for path in run.glob(f"[!.]*/{MANIFEST}")]
    return max(folders, key=lambda folder: _manifest(folder)["step"], default=None)


def rotate(run: Path, keep: int) -> None:
    """Remove all but the last `keep` rotating checkpoints; named ones stay."""
    for folder in sorted(run.glob(f"{ROTATING}*"))[:-keep]:
        disk.remove_folder(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = set(manifest["files"])
        alone = {hub.CONFIG, STATE} <= names
        listed = {RUN, FACTS} <= names and (alone or any("/" in name for name in names))
        known = isinstance(manifest["step"], int) and listed
    except FileNotFoundError as error:
        raise Missing(f"{folder} is no checkpoint: it has no {MANIFEST}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadValue(f"{folder / MANIFEST} is damaged: {first_line(error)}.") from error
    if not known:
        raise BadValue(f"{folder / MANIFEST} is damaged: it does not list all that is needed.")
    return manifest


def described(path: Path) -> dict[str, Any]:
    """A file's bytes and hash, for a manifest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _load_tensors(path: Path, pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """Tensors in memory of their own: as mapped from the file they lie at any address, and
    a matrix product of unaligned memory rounds differently, which a resumed run would show.
    """
    found = {}
    with safe_open(path, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (no mapping)
            parameter = name.split(".", 3)[-1]
            part = tensors.get_slice(name)
            if parameter in pieces and part.get_shape():
                span = pieces[parameter].span
                found[name] = part[span.first : span.first + span.count].clone()
            else:
                found[name] = tensors.get_tensor(name).clone()
    return found


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()  # with the user's own permissions, which save_file would narrow
    save_file(plain, path, metadata={"format": "pt"})
