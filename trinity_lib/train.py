"""Config in, run file out: one loop, from a notebook or `python -m trinity_lib.train`."""

import argparse
import contextlib
import math
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from trinity_lib import checkpoint, data, evaluate, metrics, optim
from trinity_lib.config import from_json, to_json
from trinity_lib.data import Batch
from trinity_lib.losses import token_loss
from trinity_lib.model import Output
from trinity_lib.record import ROOT, open_run
from trinity_lib.session import RunConfig, Session, start

RUNS, CACHE = ROOT / "runs", ROOT / ".cache"
FLUSH_SECONDS = 15.0
SPIKE_HISTORY = 50


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
        result = optimiser_step(session, session.rows.batch(rows))
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


def optimiser_step(session: Session, batch: Batch) -> StepResult:
    """One optimiser step over one global batch, whatever the number of micro-batches."""
    config, model, balancer = session.config, session.model, session.balancer
    rows = len(batch.tokens_BS)
    predicted = int((batch.targets_BS != data.IGNORE).sum())
    cross_entropy = z = balance_sum = 0.0
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
        cross_entropy += loss.cross_entropy.item()
        z += loss.z.item()
        balance_sum += 0.0 if balance_loss is None else balance_loss.item()
        means.append(loss.cross_entropy.item() / max(1, int(loss.tokens)))
        load_LE += balancer.observe(output.routing, documents_BS.flatten() >= 0)
    mean = cross_entropy / predicted
    _guard(session, mean)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    for optimizer in session.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    balancer.update(load_LE)
    model.load_bias(balancer.bias_LE)
    return StepResult(
        loss=mean,
        z_loss=z / predicted,
        balance_loss=balance_sum / rows,
        batch_het=max(means) - statistics.fmean(means),
        grad_norm=float(norm),
        batch_tokens=int((batch.documents_BS >= 0).sum()),
        load_LE=load_LE,
    )


def _forward(session: Session, tokens_BS: Tensor, documents_BS: Tensor) -> Output:
    config = session.config
    cuda = config.device == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
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


@contextlib.contextmanager
def _reproducible(config: RunConfig) -> Iterator[None]:
    """Deterministic algorithms and the configured threads, put back afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.set_num_threads(config.threads)
    if config.device == "cuda":  # cuBLAS asks for this before it promises the same bits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing reads it; 4% of a profile
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        memory.fill_uninitialized_memory = filled


def main() -> None:
    """Train from a configuration file and print the run's path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="RunConfig as JSON")
    config = from_json(RunConfig, parser.parse_args().config.read_text())
    print(RUNS / f"{train(config).attrs['name']}.nc")


if __name__ == "__main__":
    main()
