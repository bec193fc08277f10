"""Config in, run file out: one training loop, from a notebook or `python -m trinity_lib.train`."""

import argparse
import contextlib
import hashlib
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from tokenizers import Tokenizer
from torch import Tensor

from trinity_lib import balance, checkpoint, corpus, data, evaluate, metrics, optim
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import check, digest, from_json, require, to_json
from trinity_lib.data import Batch, DataConfig
from trinity_lib.experts import backend_info
from trinity_lib.losses import token_loss
from trinity_lib.model import ModelConfig, Output, Trinity, count_parameters
from trinity_lib.optim import OptimConfig, Phase
from trinity_lib.progress import Progress
from trinity_lib.record import ROOT, Writer, open_run, provenance

RUNS, CACHE = ROOT / "runs", ROOT / ".cache"
FLUSH_SECONDS = 15.0
SPIKE_HISTORY = 50


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
    threads: int = 2
    """CPU threads; results depend on it in the last bits."""
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


class StepResult(NamedTuple):
    """What one optimiser step measured."""

    loss: float
    z_loss: float
    balance_loss: float
    batch_het: float
    grad_norm: float
    batch_tokens: int
    load_LE: Tensor


class TrainingFailed(RuntimeError):
    """The loss is no number, or jumped: training stopped before the weights were touched."""


def train(config: RunConfig, *, runs: Path = RUNS, cache: Path = CACHE) -> xr.DataTree:
    """Train as `config` says and return the run, which is also a file in `runs`.

    The same configuration on the same machine gives the same losses, counts and weights
    to the bit. Raises FileExistsError where the run's name is taken and TrainingFailed
    where the loss is NaN or jumps; the run file then says `failed` and why.
    """
    with _reproducible(config):
        session = start(config, runs, cache)
        try:
            _evaluate(session)
            for index in range(len(config.phases)):
                _phase(session, index)
        except BaseException as error:
            session.progress.close()
            session.writer.close("failed", f"{type(error).__name__}: {error}")
            raise
        session.progress.close()
        session.writer.annotate(epochs=session.rows.stream.epoch)
        return open_run(session.writer.close("complete"))


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


def _phase(session: Session, index: int) -> None:
    """Train one phase, evaluate at its end and keep its checkpoint."""
    config = session.config
    phase, steps = config.phases[index], config.steps[index]
    session.rows.stream.mix(phase.mixture)
    for step in range(steps):
        begun = time.perf_counter()
        share = optim.rate(config.phases, index, step, steps)
        optim.set_rate(session.optimizers, share)
        rows = optim.batch_rows(phase, step, config.data.sequence_length)
        result = _step(session, session.rows.batch(rows))
        session.step += 1
        seconds = time.perf_counter() - begun
        _record(session, result, index, share, seconds)
        max_vio = float(np.mean(metrics.max_vio(result.load_LE.cpu().numpy())))
        session.progress.step(f"loss {result.loss:.3f}", f"MaxVio {max_vio:.2f}")
        if session.step % config.evaluate_every == 0 or step == steps - 1:
            _evaluate(session)
        if time.monotonic() - session.flushed > FLUSH_SECONDS:
            session.writer.flush()
            session.flushed = time.monotonic()
    if index == 0:
        _keep(session, "truebase")
    if index == len(config.phases) - 1:
        _keep(session, "base")


def _keep(session: Session, stage: str) -> None:
    """Save the checkpoint of a stage and record its step."""
    folder = session.writer.folder / stage
    checkpoint.save(folder, session.model, session.tokenizer, to_json(session.config))
    session.writer.annotate(**{f"{stage}_step": session.step})


def _step(session: Session, batch: Batch) -> StepResult:
    """One optimiser step over one global batch, whatever the number of micro-batches."""
    config, model, balancer = session.config, session.model, session.balancer
    rows = len(batch.tokens_BS)
    predicted = int((batch.targets_BS != data.IGNORE).sum())
    sums = torch.zeros(3, dtype=torch.float64)
    means, load_LE = [], torch.zeros_like(balancer.bias_LE, dtype=torch.int64)
    for part in range(0, rows, rows // config.micro_batches):
        pieces = (array[part : part + rows // config.micro_batches] for array in batch)
        tokens_BS, targets_BS, documents_BS = (
            torch.from_numpy(piece).to(config.device) for piece in pieces
        )
        output = _forward(session, tokens_BS, documents_BS)
        loss = token_loss(output.logits, targets_BS)
        balance_loss = balancer.loss(output.routing, documents_BS)
        objective = (loss.cross_entropy + config.z_loss * loss.z) / predicted
        if balance_loss is not None:
            objective = objective + balance_loss / rows
        objective.backward()
        balance_sum = 0.0 if balance_loss is None else float(balance_loss.detach())
        sums += torch.tensor([loss.cross_entropy.item(), loss.z.item(), balance_sum])
        means.append(loss.cross_entropy.item() / max(1, int(loss.tokens)))
        load_LE += balancer.observe(output.routing, documents_BS.flatten() >= 0)
    mean = float(sums[0]) / predicted
    _guard(session, mean)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    for optimizer in session.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    balancer.update(load_LE)
    model.load_bias(balancer.bias_LE)
    return StepResult(
        loss=mean,
        z_loss=float(sums[1]) / predicted,
        balance_loss=float(sums[2]) / rows,
        batch_het=max(means) - statistics.fmean(means),
        grad_norm=float(norm),
        batch_tokens=int((batch.documents_BS >= 0).sum()),
        load_LE=load_LE,
    )


def _forward(session: Session, tokens_BS: Tensor, documents_BS: Tensor) -> Output:
    config = session.config
    half = torch.autocast("cuda", torch.bfloat16, enabled=config.device == "cuda")
    with half if config.device == "cuda" else contextlib.nullcontext():
        return session.model(
            tokens_BS, documents_BS, select=session.balancer.select, recompute=config.recompute
        )


def _guard(session: Session, loss: float) -> None:
    """Stop before the optimiser step where the loss is no number or has jumped."""
    step = session.step + 1
    if not math.isfinite(loss):
        raise TrainingFailed(
            f"the loss is {loss} at step {step}; lower the learning rate or the balance rate."
        )
    recent = session.losses[-SPIKE_HISTORY:]
    if len(recent) >= 10 and loss > statistics.median(recent) + session.config.spike:
        raise TrainingFailed(
            f"the loss jumped to {loss:.2f} at step {step}, from a median of "
            f"{statistics.median(recent):.2f}; lower the learning rate or raise `spike` "
            f"({session.config.spike} nats)."
        )
    session.losses.append(loss)


def _record(
    session: Session, result: StepResult, phase: int, share: float, seconds: float
) -> None:
    session.tokens += result.batch_tokens
    load_LE = result.load_LE.cpu().numpy()
    bias_LE = session.balancer.bias_LE.float().cpu().numpy()
    values = {k: v for k, v in result._asdict().items() if k != "load_LE"}
    values |= {"tokens": session.tokens, "learning_rate": share}
    values |= {"seconds": seconds, "phase": phase}
    session.writer.append("train", session.step, values)
    entropy_L = metrics.load_entropy(load_LE)
    session.writer.append(
        "layers",
        session.step,
        {
            "max_vio": metrics.max_vio(load_LE),
            "min_vio": metrics.min_vio(load_LE),
            "load_entropy": entropy_L,
            "effective_experts": np.exp(entropy_L),
            "bias_std": bias_LE.std(-1),
            "bias_range": np.ptp(bias_LE, -1),
        },
    )
    if session.step % session.config.record_every == 0:
        session.writer.append("routing", session.step, {"count": load_LE, "bias": bias_LE})


def _evaluate(session: Session) -> None:
    results = evaluate.domains(session.model, session.held_out)
    session.writer.append("evaluation", session.step, results)
    session.progress.note(
        "  ".join(
            f"{name} {loss:.3f}"
            for name, loss in zip(session.held_out, results["loss"][0], strict=True)
        )
    )


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


@contextlib.contextmanager
def _reproducible(config: RunConfig) -> Iterator[None]:
    """Deterministic algorithms and the configured threads, put back afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def main() -> None:
    """Train from a configuration file and print the run's path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="RunConfig as JSON")
    config = from_json(RunConfig, parser.parse_args().config.read_text())
    print(RUNS / f"{train(config).attrs['name']}.nc")


if __name__ == "__main__":
    main()
