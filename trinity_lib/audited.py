"""The folder that is audited: which of its files decide what a model says, and their hashes.

Every file counts but documentation and hidden ones: whatever a loader may read, which includes
a shard, a pickle, a program or a chat template that somebody adds. Files are read as streams.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trinity_lib.config import BadValue, Missing, first_line

CARDS = ("audit_card.json", "audit_card.html")
"""A card's own files, which may lie in the folder."""
DOCUMENTATION = (".md", ".rst", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".gif")
LICENCES = ("LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt", "COPYING", "USE_POLICY.md")
STATE = ("state.safetensors", "state.json", "manifest.json")
"""What a training checkpoint keeps beside the weights."""
CONFIGURATION = ("config.json", "run_config.json")
"""Where the model's configuration is, the first that is there."""
TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
"""How the names of a tokenizer's files begin."""
SHARDS = "shards/"
"""Where several processes put their parts of a checkpoint."""
AT_ONCE = 8
"""Files hashed at the same time."""


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes, SHA-256 and role of every file that counts, by its path inside the folder.

    Raises Missing where there is no folder, BadValue where it holds no weights.
    """
    paths = _files(folder)
    roles = _roles(list(paths))
    if "weights" not in roles.values():
        raise BadValue(f"{folder} holds no weights in safetensors; there is nothing to audit.")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(hashed, paths.values())
    return {n: {**f, "role": roles[n]} for n, f in zip(paths, found, strict=True)}


def overall(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """One hash of the weights, as `checkpoint.sha256` has it, of the tokenizer, and of all."""
    names = {"weights": "weights", "tokenizer": "tokenizer", "everything": None}
    return {
        name: _joint({n: f for n, f in files.items() if role in (None, f["role"])})
        for name, role in names.items()
    }


def _joint(files: Mapping[str, Mapping[str, Any]]) -> str:
    if not files:
        return ""
    text = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()


def hashed(path: Path) -> dict[str, Any]:
    """A file's bytes and SHA-256; Missing where it cannot be read."""
    try:
        with path.open("rb") as file:
            return {
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                "bytes": path.stat().st_size,
            }
    except OSError as error:
        raise Missing(f"{path} cannot be read: {first_line(error)}.") from error


def differences(files: Mapping[str, Mapping[str, Any]], folder: Path) -> list[str]:
    """A sentence for every file that is missing, was added or has changed."""
    there = _files(folder)
    problems = [f"{name} is missing." for name in files if name not in there]
    problems += [
        f"{name} was not there when the folder was audited."
        for name in there
        if name not in files
    ]
    same = {name: path for name, path in there.items() if name in files}
    sizes = {name: path.stat().st_size for name, path in same.items()}
    resized = [name for name in same if sizes[name] != files[name]["bytes"]]
    problems += [
        f"{name} has changed: it has {sizes[name]:,} bytes and had {files[name]['bytes']:,}."
        for name in resized
    ]
    alike = {name: path for name, path in same.items() if name not in resized}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(alike, pool.map(hashed, alike.values()), strict=True))
    problems += [
        f"{name} has changed: as many bytes, another SHA-256."
        for name in alike
        if found[name]["sha256"] != files[name]["sha256"]
    ]
    return problems


def configuration(folder: Path) -> dict[str, Any]:
    """The content of a folder's configuration, with the file's name as `file`."""
    path = next((folder / n for n in CONFIGURATION if (folder / n).is_file()), None)
    if path is None:
        raise Missing(f"{folder} is no checkpoint: it has no {CONFIGURATION[0]}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadValue(f"{path} is not JSON: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise BadValue(f"{path} is not a JSON object.")
    return {"file": path.name, "content": content}


def _files(folder: Path) -> dict[str, Path]:
    """Every file that counts, by its path inside the folder, in order."""
    if not folder.is_dir():
        raise Missing(f"There is no folder {folder}.")
    return {name: folder / name for name in sorted(_walk(folder))}


def _walk(folder: Path) -> Iterator[str]:
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in inner:
            if (Path(place) / name).is_symlink():
                raise BadValue(f"{Path(place) / name} is a link to a folder; it must be one.")
        for name in names:
            if not _leave_out(name) and (Path(place) / name).is_file():
                yield (Path(place) / name).relative_to(folder).as_posix()


def _leave_out(name: str) -> bool:
    documents = name.lower().endswith(DOCUMENTATION) or name in LICENCES
    return documents or name in CARDS or name.startswith(".")


def _roles(names: list[str]) -> dict[str, str]:
    """weights, tokenizer, configuration, training state or other, by name.

    Parts in `shards/` are the weights where there are no others; beside released weights they
    are what training goes on from.
    """
    roles = {name: _role(name) for name in names}
    weights = [name for name, role in roles.items() if role == "weights"]
    if any(not name.startswith(SHARDS) for name in weights):
        roles |= {n: "training state" for n in weights if n.startswith(SHARDS)}
    return roles


def _role(name: str) -> str:
    base = name.rpartition("/")[2]
    if base in STATE:
        return "training state"
    if base.endswith(".safetensors"):
        return "weights"
    if base.startswith(TOKENIZER):
        return "tokenizer"
    return "configuration" if base.endswith("config.json") else "other"
