"""AFMoE checkpoints in and out: folders of config.json and safetensors, as released."""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trinity_lib import disk
from trinity_lib.afmoe import Place, config_json, from_config, places, views
from trinity_lib.attention import RMSNorm
from trinity_lib.config import BadValue, Missing, first_line, one_sentence
from trinity_lib.mesh import Layout, Span
from trinity_lib.model import ModelConfig, Trinity, count_parameters
from trinity_lib.tokenizer import Vocabulary

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest shard that `save` writes unless told otherwise."""
AT_ONCE = 16 * 10**6
"""Bytes read before a file is closed, so that its mapped pages are given back."""


class Stored(NamedTuple):
    """A checkpoint folder whose names, shapes and files have been checked."""

    config: ModelConfig
    """The model's shape."""
    files: dict[str, Path]
    """Which file holds a tensor."""
    dtypes: dict[str, torch.dtype]
    """What a tensor is stored in."""
    shapes: dict[str, tuple[int, ...]]
    """And its shape."""

    def bytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize


class Spread(Protocol):
    """A model spread over ranks, as saving and loading see it; `parallel.Sharded` is one."""

    @property
    def model(self) -> Trinity:
        """The model, whose parameters are spread."""

    @property
    def layout(self) -> Layout:
        """The ranks."""

    def fetch(self, place: Place, writer: int) -> Tensor | None:
        """A released tensor, on rank `writer`; every rank calls it, for the same ones."""

    def wanted(self, place: Place) -> tuple[Tensor, Span | None] | None:
        """Where a released tensor goes here, and which of its rows; None where none does."""


@overload
def load(
    folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> Trinity: ...
@overload
def load(folder: str | Path, *, into: Spread) -> Trinity: ...


def load(
    folder: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    into: Spread | None = None,
) -> Trinity:
    """The model of a released checkpoint: a folder, or OWNER/NAME on the Hugging Face hub.

    Weights come in `dtype`, by default what they are stored in; selection biases and norm
    gains are fp32 in any case, because bf16 would round a whole SMEBU step away. Tensors are
    read one after another into the model, so that memory stays near the model's own size.
    `into` is a model spread over ranks that has its dtype: each rank reads what it holds.
    Raises Missing where there is no checkpoint, BadValue naming a tensor that is missing, too
    many or misshapen, or a setting this library has no meaning for.
    """
    folder = local(folder)
    stored = inspect(folder)
    if into is not None:
        wanted = {n: into.wanted(p) for n, p in places(into.model.config).items()}
        model = into.model
    else:
        main = stored.dtypes["model.embed_tokens.weight"] if dtype is None else dtype
        model = empty(stored.config, device, main)
        wanted = {name: (view, None) for name, view in views(model).items()}
    for file, names in _by_file(stored):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    if (there := wanted.get(name)) is not None:
                        target, span = there
                        target.copy_(_read(tensors, name, span))
        except (SafetensorError, OSError) as error:
            raise BadValue(f"{file} cannot be read: {first_line(error)}.") from error
    return model


def _read(tensors: Any, name: str, span: Span | None) -> Tensor:
    if span is None:
        return tensors.get_tensor(name)
    return tensors.get_slice(name)[span.first : span.first + span.count]


def empty(config: ModelConfig, device: str, dtype: torch.dtype) -> Trinity:
    """A model without values: biases and gains fp32 (or better), all else in `dtype`."""
    with torch.device("meta"):
        model = Trinity(config).to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight_D = nn.Parameter(module.weight_D.to(precise))
    for router in model.routers():
        router.bias_E = router.bias_E.to(precise)
    return model.to_empty(device=device)


def save(
    model: Trinity | Spread,
    folder: str | Path,
    *,
    tokenizer: Vocabulary | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the released layout: config.json, one tensor an expert, shards with an index.

    The folder is written whole or not at all. Tensors keep the model's dtypes. A model that
    is spread over ranks is saved by all of them, each writing some of the shards.
    """
    if shard_bytes < 1:
        raise BadValue(f"shard_bytes is {shard_bytes}; it must be at least 1.")

    def written(temporary: Path) -> None:
        write(model, temporary, tokenizer=tokenizer, shard_bytes=shard_bytes)

    if isinstance(model, Trinity):
        disk.replace_folder(Path(folder), written)
    else:
        model.layout.replace_folder(Path(folder), written)


def write(
    model: Trinity | Spread,
    folder: Path,
    *,
    tokenizer: Vocabulary | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The files of `save`, into a folder that is there."""
    _write_weights(model, folder, shard_bytes)
    whole = model if isinstance(model, Trinity) else model.model
    settings = config_json(whole.config, whole.embedding.weight.dtype)
    if not isinstance(model, Trinity) and model.layout.rank > 0:
        return
    if tokenizer is not None:
        tokenizer.save(folder)
        settings |= tokenizer.ids
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _write_weights(model: Trinity | Spread, folder: Path, shard_bytes: int) -> None:
    """One file, or shards of at most `shard_bytes` and their index."""
    spread = None if isinstance(model, Trinity) else model
    whole = model if isinstance(model, Trinity) else model.model
    sizes = _sizes(whole)
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(names, file)
        writer = 0 if spread is None else (number - 1) % spread.layout.ranks
        tensors = _tensors(model, names, writer)
        if spread is None or spread.layout.rank == writer:
            (folder / file).touch()  # with the user's own permissions, which save_file narrows
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1 and (spread is None or spread.layout.rank == 0):
        about = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(about, indent=2, sort_keys=True))


def _sizes(model: Trinity) -> dict[str, int]:
    """Bytes of every released tensor, in the order they are written."""
    with torch.device("meta"):
        alike = Trinity(model.config)
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sizes = {
        name: place.view(tensors).numel() * ours[place.name].element_size()
        for tensors in [{**dict(alike.named_parameters()), **dict(alike.named_buffers())}]
        for name, place in places(model.config).items()
    }
    if not model.config.num_shared_experts:  # as transformers has them
        for i in model.config.moe_layers:
            prefix = f"model.layers.{i}.mlp.shared_experts"
            sizes |= {f"{prefix}.{part}_proj.weight": 0 for part in ("gate", "up", "down")}
    return sizes


def _tensors(model: Trinity | Spread, names: list[str], writer: int) -> dict[str, Tensor]:
    """The tensors of one file, on the rank that writes it."""
    if isinstance(model, Trinity):
        held = views(model)
        found = {name: held[name] for name in names if name in held}
        whole = model
    else:
        whole = model.model
        where = places(whole.config)
        got = {name: model.fetch(where[name], writer) for name in names if name in where}
        found = {name: tensor for name, tensor in got.items() if tensor is not None}
    width, dtype = whole.config.width, whole.embedding.weight.dtype
    for name in names:
        if "shared_experts" in name and not whole.config.num_shared_experts:
            shape = (width, 0) if "down_proj" in name else (0, width)
            found[name] = torch.empty(shape, dtype=dtype)
    return {name: found[name].cpu().contiguous() for name in names if name in found}


def inspect(folder: Path) -> Stored:
    """Check a checkpoint folder by its configuration and file headers; nothing is loaded."""
    config = read_config(folder)
    files = _files(folder)
    dtypes, shapes = {}, {}
    for file in sorted(set(files.values())):
        for name, dtype, shape in _header(file):
            if files.get(name) == file:
                dtypes[name], shapes[name] = dtype, shape
            elif name not in files:
                files[name], dtypes[name], shapes[name] = file, dtype, shape
    with torch.device("meta"):
        expected = {name: tuple(view.shape) for name, view in views(Trinity(config)).items()}
    for name, shape in expected.items():
        if name not in shapes:
            raise BadValue(f"{folder} lacks the tensor {name}.")
        if shapes[name] != shape:
            raise BadValue(
                f"{folder}: {name} has shape {list(shapes[name])}; its {CONFIG} asks for "
                f"{list(shape)}."
            )
    for name, shape in shapes.items():
        tied = config.tied and name == "lm_head.weight"
        if name not in expected and 0 not in shape and not tied:
            raise BadValue(f"{folder} has a tensor that the model has not: {name}.")
    return Stored(config, files, dtypes, shapes)


def read_config(folder: Path) -> ModelConfig:
    """The model's shape by its config.json; BadValue for a setting without a meaning here."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Missing(f"{folder} is no checkpoint: it has no {CONFIG}.") from error
    except (OSError, ValueError) as error:
        raise BadValue(f"{folder / CONFIG} is not JSON: {first_line(error)}.") from error
    if not isinstance(values, dict):
        raise BadValue(f"{folder / CONFIG} is not a JSON object.")
    try:
        return from_config(values)
    except ValueError as error:
        raise BadValue(f"{folder / CONFIG}: {error}") from error


def local(folder: str | Path) -> Path:
    """A folder as it is; OWNER/NAME through huggingface_hub's snapshot download."""
    path = Path(folder)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    def missing(said: str, why: BaseException) -> Missing:
        about = f"the Hugging Face hub {said}: {first_line(why)}."
        return Missing(f"{folder} is no folder here, and {about}")

    try:
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(str(folder), allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise missing("gives none of the name", error) from error
    except LocalEntryNotFoundError as error:  # not in the package's cache, and no answer
        raise missing("could not be reached", error.__cause__ or error) from error
    except Exception as error:  # the package and the network raise all sorts
        raise missing("did not give it", error) from error


def _files(folder: Path) -> dict[str, Path]:
    """Tensor -> file by the index, or the one file's tensors."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            files = {name: folder / file for name, file in index.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadValue(f"{folder / INDEX} is not an index: {first_line(error)}.") from error
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise Missing(f"{folder} lacks {file.name}, which {INDEX} lists.")
        return files
    if (folder / WEIGHTS).is_file():
        return {name: folder / WEIGHTS for name, _, _ in _header(folder / WEIGHTS)}
    if pickled := sorted(p.name for p in folder.glob("*.bin")):
        raise BadValue(
            f"{folder} holds {pickled[0]}, which is a pickle; only safetensors are read."
        )
    raise Missing(f"{folder} is no checkpoint: it has neither {WEIGHTS} nor {INDEX}.")


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""What weights may be stored in, by safetensors' names."""


def _header(file: Path) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of a file's tensors; BadValue where it is cut short."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                part = tensors.get_slice(name)
                if (dtype := DTYPES.get(part.get_dtype())) is None:
                    raise BadValue(
                        f"{file}: {name} is stored as {part.get_dtype()}; read are "
                        f"{', '.join(DTYPES)}."
                    )
                yield name, dtype, tuple(part.get_shape())
    except (SafetensorError, OSError) as error:
        raise BadValue(f"{file} cannot be read: {first_line(error)}.") from error


def _by_file(stored: Stored) -> Iterator[tuple[Path, list[str]]]:
    """Names in groups of one file and at most AT_ONCE bytes."""
    for file in sorted(set(stored.files.values())):
        group: list[str] = []
        size = 0
        for name in (n for n, f in stored.files.items() if f == file):
            group.append(name)
            size += stored.bytes(name)
            if size > AT_ONCE:
                yield file, group
                group, size = [], 0
        if group:
            yield file, group


def main() -> None:
    """Print what a checkpoint is: configuration, parameters, bytes, selection biases."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", help="an AFMoE checkpoint, or OWNER/NAME on the hub")
    given = parser.parse_args()
    with one_sentence():
        print(describe(local(given.folder)))


def describe(folder: Path) -> str:
    """The text of `main`; weights other than selection biases are not read."""
    stored = inspect(folder)
    count = count_parameters(stored.config)
    sizes: dict[torch.dtype, int] = {}
    for name, dtype in stored.dtypes.items():
        sizes[dtype] = sizes.get(dtype, 0) + stored.bytes(name)
    lines = [
        json.dumps(config_json(stored.config, stored.dtypes["model.embed_tokens.weight"])),
        f"parameters          {count.total:>19,}",
        f"  expert biases     {count.expert_bias:>19,}",
        f"  active            {count.active:>19,}  (one token, no embedding, no head)",
        f"  with head         {count.active_with_head:>19,}",
        f"  with embeddings   {count.active_with_embeddings:>19,}",
        *(
            f"{str(dtype):20}{size:>19,} bytes"
            for dtype, size in sorted(sizes.items(), key=str)
        ),
        "layer    mean bias     std     lowest    highest",
    ]
    for layer in stored.config.moe_layers:
        name = f"model.layers.{layer}.mlp.expert_bias"
        with safe_open(stored.files[name], framework="pt") as tensors:
            bias_E = tensors.get_tensor(name).double()
        figures = (bias_E.mean(), bias_E.std(unbiased=False), bias_E.min(), bias_E.max())
        lines.append(f"{layer:>5}  " + "  ".join(f"{float(each):+9.5f}" for each in figures))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
