"""What must hold before a run's first step: memory, disk, the same text, a fitting checkpoint.

Each raises a Refusal, one sentence, where it does not.
"""

import json
import os
from pathlib import Path

import torch

from trinity_lib import checkpoint, disk, hub, onednn, optim, tokenizer
from trinity_lib.config import BadValue, differences
from trinity_lib.experts import backend_info
from trinity_lib.model import Trinity, count_parameters
from trinity_lib.record import read_attributes
from trinity_lib.run import RunConfig
from trinity_lib.tokenizer import Vocabulary


def require_alike(config: RunConfig, folder: Path, vocabulary: Vocabulary | None) -> None:
    """BadValue where the checkpoint that `init` names is of another model or tokenizer."""
    unused = ("load_balance_coeff", "max_positions")
    changed = differences(hub.read_config(folder), config.model, unused)
    if changed:
        raise BadValue(
            f"init is {config.init!r}, a checkpoint of another model: {'; '.join(changed)}."
        )
    has_one = (folder / tokenizer.FILE).is_file()
    if not has_one and not config.data.tokenizer:
        raise BadValue(f"init is {config.init!r}, which has no tokenizer.json: give tokenizer.")
    theirs = checkpoint.load_vocabulary(folder) if has_one else vocabulary
    if theirs is not None and vocabulary is not None and theirs.sha256 != vocabulary.sha256:
        raise BadValue(
            f"init is {config.init!r}, whose tokenizer is another than this run's: give "
            f"tokenizer={config.init}."
        )


def require_same_text(folder: Path, facts: dict[str, str]) -> None:
    """BadValue where a resumed run would read another text, by its hashes."""
    old = read_attributes(folder)
    for name, value in facts.items():
        if old.get(name) != value:
            what = name.removesuffix("_sha256")
            raise BadValue(
                f"The run {folder.name!r} cannot be resumed: its {what} has changed "
                f"({name} is {value[:12]} and was {str(old.get(name))[:12]})."
            )


def fallback(config: RunConfig) -> list[str]:
    """Sentences where a faster backend or library was to be had, but is not there."""
    dtype = products_dtype(config)
    info = backend_info(config.experts, config.device, dtype)
    said = []
    if config.device == "cpu" and dtype == torch.float32 and not onednn.AVAILABLE:
        said.append(f"Large products take longer than they might: {info['dense_products']}.")
    wanted = "megablocks" if config.device == "cuda" else "native"
    if config.experts != "auto" or info["backend"] == wanted or dtype == torch.float64:
        return said
    return [*said, f"{info['backend']} computes the experts, not {wanted}: {info[wanted]}."]


def require_same_backend(folder: Path, config: RunConfig) -> None:
    """BadValue where a resumed run would be computed by another backend or library."""
    old = json.loads(read_attributes(folder)["experts_backend"])
    now = backend_info(config.experts, config.device, products_dtype(config))
    computes = {"backend": "experts", "dense_products": "dense products"}
    if config.device == "cpu":
        computes["native"] = "C++ operators"
    for key, what in computes.items():
        if old.get(key) != now[key]:
            raise BadValue(
                f"The run {folder.name!r} cannot be resumed to the bit: what computed its "
                f"{what} was '{old.get(key)}', and here it is '{now[key]}'; "
                "`python -m trinity_lib.experts` says why."
            )


def require_memory(config: RunConfig) -> None:
    """Weights, gradients and momentum must fit, whatever the rest takes."""
    needed, there, what = memory_needed(config), *memory(config.device)
    if needed > there:
        raise BadValue(
            f"scale {config.scale!r} needs {needed / 1e9:,.0f} GB for weights, gradients and "
            f"momentum; this machine has {there / 1e9:,.0f} GB of {what}: take a smaller scale."
        )


def memory_needed(config: RunConfig) -> int:
    """Least bytes a GPU, or this machine's ranks together, must hold of a run."""
    width = 8 if config.dtype == "float64" else 4
    everything = 3 * width * count_parameters(config.model).total
    ranks = 1 if config.device == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return everything * ranks // config.parallel.shard


def memory(device: str) -> tuple[int, str]:
    """Bytes of the GPU's memory or of the machine's, and what to call it."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory, "GPU memory"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "memory"


def require_space(config: RunConfig, folder: Path) -> None:
    """Room for every checkpoint that is kept and one being written, and recorded choices."""
    with torch.device("meta"):
        model = Trinity(config.model)
    values = sum(p.numel() for p in model.parameters())
    values += optim.state_values(optim.build(model, config.optim))
    one = values * (8 if config.dtype == "float64" else 4)
    copies = len(config.phases) + config.keep + 1
    needed = copies * one
    if config.record_choices:
        layers, top_k = len(config.model.moe_layers), config.model.router.top_k
        needed += 4 * layers * top_k * sum(phase.tokens for phase in config.phases)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    what = f"{copies} checkpoints of {one / 1e6:,.1f} MB"
    disk.require_space(folder, needed - there, what)


def products_dtype(config: RunConfig) -> torch.dtype:
    """What matrices are multiplied in: bf16 on CUDA, the weights' dtype on the CPU."""
    return torch.bfloat16 if config.device == "cuda" else getattr(torch, config.dtype)
