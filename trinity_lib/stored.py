"""The same tensor of several checkpoints, one tensor after another: never a whole model."""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trinity_lib import hub
from trinity_lib.afmoe import places, views
from trinity_lib.config import BadValue, first_line
from trinity_lib.model import ModelConfig, Trinity

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class Part(NamedTuple):
    """Where a released tensor is stored."""

    file: Path
    name: str
    cut: tuple[int | slice, ...]
    """Which part of what the file has under the name; (): all."""
    shape: tuple[int, ...]
    bytes: int


class Stored(NamedTuple):
    """A checkpoint folder that has been checked."""

    folder: Path
    config: ModelConfig
    parts: dict[str, Part]
    """By released name, in the model's order."""


def inspect(folder: Path) -> Stored:
    """Where a checkpoint has its tensors, by its configuration and file headers.

    Besides the released layout, the one with all experts of a layer in one tensor is read.
    Raises Missing and BadValue as `hub.inspect` does.
    """
    fused = _fused(folder)
    if fused:
        return fused
    there = hub.inspect(folder)
    parts = {
        name: Part(there.files[name], name, (), there.shapes[name], there.bytes(name))
        for name in places(there.config)
    }
    return Stored(folder, there.config, parts)


def _fused(folder: Path) -> Stored | None:
    """The same of a folder with a layer's experts in one tensor; None where it has none such.

    As transformers holds them, and writes them with `save_original_format=False`: gate over
    up in gate_up_proj [E, 2F, D], and down_proj [E, D, F].
    """
    files = _headers(folder)
    if not any(name.endswith(".mlp.experts.gate_up_proj") for name in files):
        return None
    config = hub.read_config(folder)
    with torch.device("meta"):
        expected = {name: tuple(view.shape) for name, view in views(Trinity(config)).items()}
    parts = {}
    for name, shape in expected.items():
        held, cut, whole = _place(name, shape, config)
        if held not in files:
            raise BadValue(f"{folder} lacks the tensor {held}.")
        file, stored, size = files[held]
        if stored != whole:
            raise BadValue(
                f"{folder}: {held} has shape {list(stored)}; its {hub.CONFIG} asks for "
                f"{list(whole)}."
            )
        parts[name] = Part(file, held, cut, shape, math.prod(shape) * size)
    return Stored(folder, config, parts)


def _place(
    name: str, shape: tuple[int, ...], config: ModelConfig
) -> tuple[str, tuple[int | slice, ...], tuple[int, ...]]:
    """Name, part and whole shape of what holds a released tensor in a fused file."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        return name, (), shape
    prefix, expert, kind = found.groups()
    experts, wide = config.router.num_experts, config.expert_width
    if kind == "down":
        return f"{prefix}.down_proj", (int(expert),), (experts, *shape)
    rows = slice(0, wide) if kind == "gate" else slice(wide, 2 * wide)
    return f"{prefix}.gate_up_proj", (int(expert), rows), (experts, 2 * wide, shape[1])


def _headers(folder: Path) -> dict[str, tuple[Path, tuple[int, ...], int]]:
    """File, shape and bytes an element of every tensor; empty where that cannot be read."""
    found = {}
    try:
        names = {hub.WEIGHTS}
        if (folder / hub.INDEX).is_file():
            names = set(json.loads((folder / hub.INDEX).read_text())["weight_map"].values())
        for file in sorted(folder / name for name in names):
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    part = tensors.get_slice(name)
                    size = hub.DTYPES[part.get_dtype()].itemsize
                    found[name] = (file, tuple(part.get_shape()), size)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # `hub.inspect` says what is wrong with it
    return found


def require_alike(stored: Mapping[str, Stored]) -> None:
    """Raise BadValue for checkpoints whose tensors differ in shape, or in name."""
    first, *others = stored.values()
    for other in others:
        for name, part in first.parts.items():
            if name in other.parts and part.shape != other.parts[name].shape:
                raise BadValue(
                    f"{name} has shape {list(part.shape)} in {first.folder} and "
                    f"{list(other.parts[name].shape)} in {other.folder}; stages of one model "
                    "have equal shapes."
                )
        for one, two in ((first, other), (other, first)):
            if lacking := [name for name in one.parts if name not in two.parts]:
                raise BadValue(
                    f"{lacking[0]} is in {one.folder} and not in {two.folder}; stages of one "
                    "model have the same tensors."
                )


def streamed(
    stored: Mapping[str, Stored], names: Sequence[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Tensors by name and stage, as stored, on the CPU.

    They are mapped from their files, which are closed whenever `hub.AT_ONCE` bytes of a
    stage have been given, so that their pages are given back.
    """
    for group in _groups(stored, names):
        with contextlib.ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in group:
                parts = {stage: each.parts[name] for stage, each in stored.items()}
                yield name, {stage: _read(part, opened, stack) for stage, part in parts.items()}


def _groups(stored: Mapping[str, Stored], names: Sequence[str]) -> Iterator[list[str]]:
    """Names of at most `hub.AT_ONCE` bytes in a stage, one tensor at least."""
    group: list[str] = []
    size = 0
    for name in names:
        more = max(each.parts[name].bytes for each in stored.values())
        if group and size + more > hub.AT_ONCE:
            yield group
            group, size = [], 0
        group.append(name)
        size += more
    yield group


def _read(part: Part, opened: dict[Path, Any], stack: contextlib.ExitStack) -> Tensor:
    try:
        if part.file not in opened:
            opened[part.file] = stack.enter_context(safe_open(part.file, framework="pt"))
        tensors = opened[part.file]
        return (
            tensors.get_slice(part.name)[part.cut]
            if part.cut
            else tensors.get_tensor(part.name)
        )
    except (SafetensorError, OSError) as error:
        raise BadValue(f"{part.file} cannot be read: {first_line(error)}.") from error
