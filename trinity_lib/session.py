"""What a run is and holds: its configuration, and everything built from it before a step."""

import hashlib
import warnings
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer

from trinity_lib import balance, corpus, data, evaluate, optim
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import check, digest, require, to_json
from trinity_lib.data import DataConfig
from trinity_lib.experts import backend_info
from trinity_lib.model import ModelConfig, Trinity, count_parameters
from trinity_lib.optim import OptimConfig, Phase
from trinity_lib.progress import Progress
from trinity_lib.record import Writer, provenance


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides a run."""

    scale: str
    """Name of the recipe it began as."""
    name: str = ""
    """Name of the run; empty: scale, configuration hash and time."""
    seed: int = 0
    """Seed of weights and data order."""
    model: ModelConfig
    """The model."""
    data: DataConfig
    """Rows and their order."""
    balance: BalanceConfig
    """The balancer."""
    optim: OptimConfig
    """The optimisers."""
    phases: tuple[Phase, ...]
    """The schedule; the first phase ends in the TrueBase, the last in the Base."""
    z_loss: float = 1e-6
    """Weight of the z-loss on the output logits."""
    micro_batches: int = 1
    """Pieces a step's batch is split into; gradients are accumulated."""
    recompute: bool = False
    """Recompute activations in backward instead of keeping them."""
    evaluate_every: int = 50
    """Steps between evaluations; the end of every phase is evaluated too."""
    record_every: int = 1
    """Steps between records of every expert's count and bias."""
    log_every: int = 25
    """Steps between progress lines where there is no terminal."""
    spike: float = 3.0
    """Stop where the loss is this many nats above the median of the last 50 steps."""
    threads: int = 1
    """CPU threads; results depend on it in the last bits. More pay off from `small` on."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; on CUDA matrices multiply in bf16 over fp32 weights."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the weights."""

    def __post_init__(self) -> None:
        check(self)
        plain = not set(self.name) & set("/\\\0") and not self.name.startswith(".")
        require(plain, "name", self.name, "a file name without slashes or a leading dot")
        require(self.seed >= 0, "seed", self.seed, "zero or more")
        require(len(self.phases) > 0, "phases", self.phases, "at least one phase")
        counts = ("micro_batches", "evaluate_every", "record_every", "log_every", "threads")
        for name in counts:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.z_loss >= 0, "z_loss", self.z_loss, "zero or more")
        require(self.spike > 0, "spike", self.spike, "above zero")
        for phase in self.phases:
            for rows in (phase.batch, *(phase.larger_batch or ())[1:]):
                right = f"a divisor of the batch's {rows} rows"
                whole = rows % self.micro_batches == 0
                require(whole, "micro_batches", self.micro_batches, right)

    @property
    def steps(self) -> list[int]:
        """Optimiser steps of each phase."""
        return [optim.phase_steps(p, self.data.sequence_length) for p in self.phases]


@dataclass
class Session:
    """What a run holds while it lasts."""

    config: RunConfig
    model: Trinity
    balancer: balance.Balancer
    optimizers: list[torch.optim.Optimizer]
    rows: data.Rows
    held_out: dict[str, evaluate.Domain]
    tokenizer: Tokenizer
    writer: Writer
    progress: Progress
    step: int = 0
    tokens: int = 0
    flushed: float = 0.0
    losses: list[float] = field(default_factory=list)


def start(config: RunConfig, runs: Path, cache: Path) -> Session:
    """Data, model and writer of a new run, nothing trained yet."""
    procedural = config.data.corpus == "procedural"
    source = corpus.procedural(0) if procedural else corpus.embedded(cache)
    for warning in source.warnings:
        warnings.warn(warning, stacklevel=3)
    tokenizer = data.tokenizer_for(source, config.model.vocab_size, cache)
    documents = data.tokenised(source, tokenizer, cache)
    length, seed = config.data.sequence_length, config.seed
    held_out = {
        name: evaluate.domain(
            data.validation_rows(each, length, config.data.validation_rows, 0), tokenizer
        )
        for name, each in documents["validation"].items()
    }
    stream = data.Stream(documents["train"], seed)
    for phase in config.phases:
        require(bool(phase.mixture), "phase.mixture", phase.mixture, "shares by domain")
        stream.mix(phase.mixture)

    model = new_model(config)
    layers, experts = config.model.moe_layers, config.model.router.num_experts
    name = config.name or _name(config)
    writer = Writer(
        runs / name,
        {
            **_attributes(config),
            "name": name,
            "warnings": list(source.warnings),
            "corpus_sha256": source.sha256,
            "tokenizer_sha256": data.sha256(tokenizer),
            "documents": data.describe(documents),
        },
        {
            "layer": list(layers),
            "expert": np.arange(experts),
            "split": ["validation"],
            "domain": list(held_out),
        },
    )
    return Session(
        config=config,
        model=model,
        balancer=balance.build(config.balance, len(layers), experts, config.device),
        optimizers=optim.build(model, config.optim),
        rows=data.Rows(stream, length, config.data.rsdb, seed),
        held_out=held_out,
        tokenizer=tokenizer,
        writer=writer,
        progress=Progress(sum(config.steps), config.log_every, writer.folder.name),
    )


def new_model(config: RunConfig) -> Trinity:
    """The run's initial weights: drawn in fp32 on the CPU, whatever device and dtype."""
    with torch.device("meta"):  # the modules' own initialisation would use the global RNG
        model = Trinity(config.model)
    model = model.to_empty(device="cpu")
    model.initialise(torch.Generator().manual_seed(config.seed))
    model = model.to(device=config.device, dtype=getattr(torch, config.dtype))
    for router in model.routers():
        router.bias_E = router.bias_E.float()
    return model


def _name(config: RunConfig) -> str:
    return f"{config.scale}-{digest(config)}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]


def _attributes(config: RunConfig) -> dict[str, Any]:
    count = count_parameters(config.model)
    text = to_json(config)
    return {
        **provenance(),
        "scale": config.scale,
        "seed": config.seed,
        "config": text,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "device": config.device,
        "threads": config.threads,
        "experts_backend": backend_info(),
        "parameters_total": count.total,
        "parameters_active": count.active,
        "parameters_active_with_embeddings": count.active_with_embeddings,
    }
