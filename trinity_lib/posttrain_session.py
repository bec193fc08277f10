"""What a run of post-training holds while it lasts: checked and built before its first step."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trinity_lib import (
    chat,
    checkpoint,
    curriculum,
    examination,
    hub,
    lora,
    preflight,
    tokenizer,
)
from trinity_lib.allocator import keep_memory
from trinity_lib.chat import Template
from trinity_lib.config import BadValue, Refusal, from_json, require, to_json
from trinity_lib.curriculum import Curriculum
from trinity_lib.examination import Exam
from trinity_lib.experts import backend_info, use_backend
from trinity_lib.model import ModelConfig, Trinity, count_parameters
from trinity_lib.posttrain_config import PosttrainConfig
from trinity_lib.progress import Progress
from trinity_lib.record import Claim, Writer, provenance, read_attributes

LAST = "instruct"
"""Folder of the checkpoint at the last stage's end; others are named after their stage."""
BEFORE = "start"
"""The moment before the first stage."""


@dataclass
class Session:
    """What a run holds while it lasts."""

    config: PosttrainConfig
    model: Trinity
    template: Template
    given: Curriculum
    """What is learnt."""
    exam: Exam
    writer: Writer
    progress: Progress
    step: int = 0
    marks: list[dict[str, Any]] = field(default_factory=list)
    """What came of the exam, moment by moment."""


def start(config: PosttrainConfig, runs: Path, resume: bool) -> Session:
    """Everything that can be refused is, before a step; what is refused leaves nothing."""
    _require_memory(config)
    claim = Claim(runs / config.name, resume=resume)
    try:
        if claim.begun:
            _require_same(config, claim.folder)
        return _build(config, claim)
    except BaseException as error:
        claim.release()
        if isinstance(error, OSError) and not isinstance(error, Refusal) and error.filename:
            raise BadValue(f"{error.filename} cannot be used: {error.strerror}.") from error
        raise


def _build(config: PosttrainConfig, claim: Claim) -> Session:
    first = Path(config.init)
    whole = done(claim.folder, config) if claim.begun else []
    folder = whole[-1] if whole else first
    checkpoint.check(folder)
    if not (first / tokenizer.FILE).is_file():
        raise BadValue(f"init is {config.init!r}, which has no {tokenizer.FILE}.")
    shape = hub.read_config(folder)
    require(len(shape.moe_layers) > 0, "init", config.init, "of a model with experts")
    template = chat.template(checkpoint.load_vocabulary(first))
    given = curriculum.read(config, template)
    warnings = curriculum.warnings(given, config, template, shape.vocab_size)
    trained = _trained(config, shape)
    model = hub.load(folder, device=config.device, dtype=torch.float32)
    use_backend(model, config.experts, products_dtype(config))
    exam = examination.choose(
        given.held_out, given.held_out_pairs, config.questions, config.seed
    )
    facts = json.loads((folder / checkpoint.FACTS).read_text()) if whole else {}
    step = facts.get("step", 0)
    writer = Writer(
        claim.folder,
        {**_attributes(config, model, first, warnings), "parameters_trained": trained},
        _coordinates(config, model, exam),
        claim=claim,
        resume_at=step if claim.begun else None,
    )
    total = sum(stage.steps for stage in config.stages)
    progress = Progress(total, config.log_every, config.name, step)
    marks = facts.get("marks", [])
    return Session(config, model, template, given, exam, writer, progress, step, marks)


def stage_name(config: PosttrainConfig, number: int) -> str:
    """Name of the checkpoint at a stage's end."""
    return LAST if number == len(config.stages) - 1 else config.stages[number].kind


def done(folder: Path, config: PosttrainConfig) -> list[Path]:
    """Checkpoints of the stages that are done, in order, each verified."""
    found = []
    for number in range(len(config.stages)):
        stage = folder / stage_name(config, number)
        if not stage.is_dir():
            break
        checkpoint.verify(stage)
        found.append(stage)
    return found


def _require_same(config: PosttrainConfig, folder: Path) -> None:
    text = read_attributes(folder).get("config", "{}")
    try:
        same = from_json(PosttrainConfig, text) == config
    except ValueError:
        same = False
    if not same:
        raise BadValue(
            f"The run {folder.name!r} cannot be resumed: it was begun with other settings."
        )


def _require_memory(config: PosttrainConfig) -> None:
    """Weights, gradients and momentum, and a frozen reference where rewards are learnt from."""
    total = count_parameters(hub.read_config(Path(config.init))).total
    copies = 3 if config.lora is None else 1
    copies += any(stage.kind == "grpo" for stage in config.stages)
    there, what = preflight.memory(config.device)
    if 4 * copies * total > there:
        raise BadValue(
            f"init is {config.init!r}, which needs {4 * copies * total / 1e9:,.0f} GB to be "
            f"trained; this machine has {there / 1e9:,.0f} GB of {what}: take lora, or a "
            "smaller checkpoint."
        )


def products_dtype(config: PosttrainConfig) -> torch.dtype:
    """What matrices are multiplied in."""
    return torch.bfloat16 if config.device == "cuda" else torch.float32


def _coordinates(config: PosttrainConfig, model: Trinity, exam: Exam) -> dict[str, Any]:
    return {
        "layer": list(model.config.moe_layers),
        "expert": np.arange(model.config.router.num_experts),
        "moment": [BEFORE, *(stage.kind for stage in config.stages)],
        "task": exam.tasks,
        "question": np.arange(len(exam.questions)),
    }


def _attributes(
    config: PosttrainConfig, model: Trinity, init: Path, warnings: list[str]
) -> dict[str, Any]:
    text, count = to_json(config), count_parameters(model.config)
    hashes = {name: checkpoint.described(Path(name))["sha256"] for name in config.files}
    return {
        **provenance(),
        "name": config.name,
        "scale": "posttrain",
        "seed": config.seed,
        "config": text,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "init_sha256": checkpoint.sha256(init),
        "data_sha256": hashes,
        "model": dataclasses.asdict(model.config),
        "stages": [stage.kind for stage in config.stages],
        "device": config.device,
        "threads": config.threads,
        "experts_backend": backend_info(config.experts, config.device, products_dtype(config)),
        "allocator": keep_memory() if config.device == "cpu" else "torch's CUDA allocator",
        "parameters_total": count.total,
        "warnings": warnings,
    }


def _trained(config: PosttrainConfig, shape: ModelConfig) -> int:
    """Parameters that are trained; refuses adapters on a part that the model has not."""
    if config.lora is None:
        return count_parameters(shape).total
    with torch.device("meta"):
        found = lora.attach(Trinity(shape), config.lora, 0)
    return sum(parameter.numel() for parameter in found.values())
