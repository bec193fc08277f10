"""Checkpoints as folders: safetensors weights, the run's configuration, the tokenizer."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from trinity_lib.config import build
from trinity_lib.model import ModelConfig, Trinity

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"


def save(folder: Path, model: Trinity, tokenizer: Tokenizer, config_json: str) -> None:
    """Write a checkpoint, whole or not at all: a temporary folder, synced, then renamed.

    `config_json` is the run configuration whose key `model` describes the weights. The
    selection biases are among the tensors. An existing folder is replaced.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    (temporary / CONFIG).write_text(config_json)
    tokenizer.save(str(temporary / TOKENIZER))
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def load(folder: Path) -> Trinity:
    """The model of a checkpoint folder, on the CPU, in the dtype it was saved in.

    FileNotFoundError names a missing file; a tensor too many, missing or misshapen is a
    RuntimeError that names it.
    """
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint: it has no {name}.")
    settings = json.loads((folder / CONFIG).read_text())["model"]
    with torch.device("meta"):
        model = Trinity(build(ModelConfig, settings))
    model.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    return model
