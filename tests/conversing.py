"""What tests of post-training share: tokenizers, a tiny model, a tiny checkpoint."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken

from trinity_lib import balancers, chat, corpus, hub, tokenizer
from trinity_lib.balance import BalanceConfig
from trinity_lib.chat import CHATML, Template
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.optim import OptimConfig
from trinity_lib.posttrain_config import PosttrainConfig, Stage
from trinity_lib.student import Student, optimizers
from trinity_lib.tokenizer import Vocabulary

OPTIM = OptimConfig(muon_rate=2e-2, adamw_rate=1e-2)
"""Pre-training's peaks."""


@functools.cache
def vocabulary() -> Vocabulary:
    """384 entries of procedural text."""
    return tokenizer.train(corpus.procedural(0).sample(20_000), 384)


def template(chatml: bool = False) -> Template:
    """The template of a tokenizer without ChatML's marks, or with them (two more entries)."""
    if not chatml:
        return chat.template(vocabulary())
    made = tokenizer.Tokenizer.from_str(vocabulary().tokenizer.to_str())
    made.add_special_tokens([AddedToken(mark, special=True) for mark in CHATML])
    made.encode_special_tokens = True
    return chat.template(Vocabulary(made, tokenizer.BEGIN, tokenizer.END))


def model(config: ModelConfig, seed: int = 0) -> Trinity:
    """A model with weights and selection biases."""
    made = Trinity(config)
    generator = torch.Generator().manual_seed(seed)
    made.initialise(generator)
    for router in made.routers():
        router.bias_E.copy_(0.1 * torch.randn(router.bias_E.shape, generator=generator))
    return made


def base(config: ModelConfig, folder: Path) -> Path:
    """A checkpoint folder of such a model, as it would be released."""
    hub.save(model(config), folder, tokenizer=vocabulary())
    return folder


def settings(init: Path | str = "nowhere", *stages: Stage, **changes: Any) -> PosttrainConfig:
    """Small steps from a checkpoint, at pre-training's own rate."""
    values: dict[str, Any] = {"optim": OPTIM, "rate": 1.0, "sequence_length": 64}
    values |= {"questions": 8, "stages": stages or (Stage(kind="sft", steps=4, batch=4),)}
    return PosttrainConfig(init=str(init), **values | changes)


def student(config: PosttrainConfig, shape: ModelConfig) -> Student:
    """A student before its first step, without adapters."""
    made = model(shape)
    balancer = balancers.build(
        config.balance,
        num_layers=len(made.routers()),
        num_experts=shape.router.num_experts,
        top_k=shape.router.top_k,
        vocab_size=shape.vocab_size,
        seed=0,
    )
    balancer.bias_LE = torch.stack([router.bias_E for router in made.routers()]).clone()
    weights = list(made.parameters())
    moved = optimizers(made, config, weights)
    for optimizer in moved:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"]
    return Student(config, made, template(), balancer, moved, weights)


def jsonl(path: Path, records: Sequence[dict]) -> str:
    """A file of records, one a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


ON = BalanceConfig(method="smebu", rate=1e-2)
