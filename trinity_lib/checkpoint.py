"""Checkpoints as folders: weights, configuration, tokenizer, and what resuming needs.

Tensors are safetensors and everything else is JSON; nothing is pickled. A folder is written
whole or not at all, and its manifest says what it holds, so that a damaged one is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trinity_lib import disk, tokenizer
from trinity_lib.config import BadValue, Missing, build, first_line
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.tokenizer import Vocabulary

WEIGHTS, CONFIG, MANIFEST = "model.safetensors", "config.json", "manifest.json"
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

    `config_json` is the run configuration whose key `model` describes the weights. The
    selection biases are among the tensors.
    """

    def write(temporary: Path) -> None:
        _save_tensors(temporary / WEIGHTS, model.state_dict())
        _save_tensors(temporary / STATE, state.tensors)
        (temporary / FACTS).write_text(json.dumps(state.facts))
        (temporary / CONFIG).write_text(config_json)
        vocabulary.save(temporary)
        files = {path.name: _described(path) for path in sorted(temporary.iterdir())}
        manifest = {"step": state.facts["step"], "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))

    disk.replace_folder(folder, write)


def load(folder: Path) -> Trinity:
    """The model of a checkpoint folder, on the CPU, in the dtype it was saved in.

    Raises Missing where the folder is no checkpoint, and BadValue where it is damaged or
    its weights are not the configuration's.
    """
    verify(folder)
    config = model_config(folder)
    with torch.device("meta"):
        model = Trinity(config)
    tensors = _load_tensors(folder / WEIGHTS)
    expected = model.state_dict()
    for name in sorted({*expected, *tensors}):
        if name not in expected or name not in tensors:
            where = WEIGHTS if name in tensors else CONFIG
            raise BadValue(f"{folder}: only {where} knows the tensor {name!r}.")
        here, right = list(tensors[name].shape), list(expected[name].shape)
        if here != right:
            raise BadValue(f"{folder}: {name} has shape {here}; its {CONFIG} asks for {right}.")
    model.load_state_dict(tensors, assign=True)
    return model


def load_state(folder: Path) -> State:
    """What a verified checkpoint holds beside the weights."""
    return State(json.loads((folder / FACTS).read_text()), _load_tensors(folder / STATE))


def load_vocabulary(folder: Path) -> Vocabulary:
    """The tokenizer the weights were trained with."""
    return tokenizer.load(folder)


def model_config(folder: Path) -> ModelConfig:
    """The shape of a checkpoint's model; Missing where there is none."""
    _manifest(folder)
    try:
        return build(ModelConfig, json.loads((folder / CONFIG).read_text())["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadValue(
            f"{folder / CONFIG} is not a run's configuration: {first_line(error)}."
        ) from error


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all what it says, to the last byte."""
    manifest = _manifest(folder)
    for name, described in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise BadValue(f"The checkpoint {folder} is damaged: {name} is missing.")
        if path.stat().st_size != described["bytes"]:
            raise BadValue(
                f"The checkpoint {folder} is damaged: {name} has {path.stat().st_size:,} "
                f"bytes and was written with {described['bytes']:,}."
            )
        if _described(path) != described:
            raise BadValue(f"The checkpoint {folder} is damaged: {name} has changed.")
    return manifest


def sha256(folder: Path) -> str:
    """Hash of a checkpoint's weights, from its manifest."""
    return _manifest(folder)["files"][WEIGHTS]["sha256"]


def newest(run: Path) -> Path | None:
    """The checkpoint of a run's folder with the highest step, or None."""
    folders = [path.parent for path in run.glob(f"[!.]*/{MANIFEST}")]
    return max(folders, key=lambda folder: _manifest(folder)["step"], default=None)


def rotate(run: Path, keep: int) -> None:
    """Remove all but the last `keep` rotating checkpoints; named ones stay."""
    folders = sorted(run.glob(f"{ROTATING}*"))
    for folder in folders[: len(folders) - keep]:
        disk.remove_folder(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        listed = {WEIGHTS, CONFIG, STATE, FACTS} <= set(manifest["files"])
        known = isinstance(manifest["step"], int) and listed
    except FileNotFoundError as error:
        raise Missing(f"{folder} is no checkpoint: it has no {MANIFEST}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadValue(f"{folder / MANIFEST} is damaged: {first_line(error)}.") from error
    if not known:
        raise BadValue(f"{folder / MANIFEST} is damaged: it does not list the weights.")
    return manifest


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors in memory of their own: as mapped from the file they lie at any address, and
    a matrix product of unaligned memory rounds differently, which a resumed run would show.
    """
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()  # with the user's own permissions, which save_file would narrow
    save_file(plain, path, metadata={"format": "pt"})
