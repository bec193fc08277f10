"""Config in, run file out: one loop, from a notebook or `python -m trinity_lib.train`."""

import argparse
import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from trinity_lib import checkpoint, disk, evaluate, loads, optim, probe, replay, resume, rows
from trinity_lib.balance import load
from trinity_lib.config import Refusal, from_file, one_sentence, to_json
from trinity_lib.data import IGNORE, Batch
from trinity_lib.losses import token_loss
from trinity_lib.model import Output
from trinity_lib.record import ROOT
from trinity_lib.run import RunConfig, Step, schedule, stage_name
from trinity_lib.session import (
    REMEMBERED_LOSSES,
    Session,
    most_tokens,
    start,
    state_of,
)

# cuBLAS reads it once, at its first product, before it promises the same bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
RUNS, CACHE = ROOT / "runs", ROOT / ".cache"
FLUSH_SECONDS, FLUSH_SHARE = 15.0, 0.01
"""Time between shards, and its least share of the run so far: a long run has few."""


class StepResult(NamedTuple):
    """What one optimiser step measured."""

    loss: float
    z_loss: float
    balance_loss: float
    batch_het: float
    grad_norm: float
    batch_tokens: int
    load_LE: Tensor
    choices_LTK: Tensor | None


class TrainingFailed(Refusal, RuntimeError):
    """The loss is no number, or jumped: training stopped before the weights were touched."""


def train(
    config: RunConfig, *, runs: Path = RUNS, cache: Path = CACHE, resumes: bool = False
) -> xr.DataTree:
    """Train as `config` says and return the run, which is also a file in `runs`.

    The same configuration on the same machine gives the same losses, counts and weights
    to the bit, also when the run was killed and is resumed: `resumes` goes on with the
    named run, or the newest incomplete one of this configuration, from its last checkpoint.
    Raises Taken where the run's name is taken, and TrainingFailed where the loss is NaN or
    jumps; the run file then says `failed` and why.
    """
    if resumes:
        config = resume.find(config, runs)
    with reproducible(config.threads, config.device):
        session = start(config, runs, cache, resumes=resumes)
        try:
            if session.step == 0:
                _evaluate(session)
            for step in schedule(session.config)[session.step :]:
                _step(session, step)
            session.progress.close()
            session.writer.annotate(epochs=session.rows.stream.epoch)
            for folder in session.writer.folder.glob(f"{checkpoint.ROTATING}*"):
                disk.remove_folder(folder)  # the last phase's end is the base
            session.writer.close("complete")
        except BaseException as error:
            ended = _failed(session, error)
            if ended is error:
                raise
            raise ended from error
        assert session.writer.whole is not None
        return session.writer.whole


def _step(session: Session, step: Step) -> None:
    """Train one step, record it, evaluate and keep a checkpoint where due."""
    config = session.config
    begun = time.perf_counter()
    if step.number == 0:
        session.rows.stream.mix(config.phases[step.phase].mixture)
    optim.set_rate(session.optimizers, step.share)
    result = optimiser_step(session, session.rows.batch(step.rows))
    session.step += 1
    _record(session, result, step, time.perf_counter() - begun)
    max_vio = float(np.mean(loads.max_vio(result.load_LE.cpu().numpy())))
    session.progress.step(f"loss {result.loss:.3f}", f"MaxVio {max_vio:.2f}")
    if step.ends_phase or session.step % config.evaluate_every == 0:
        _evaluate(session)
    if step.ends_phase:
        stage = stage_name(config, step.phase)
        session.writer.annotate(**{f"{stage}_step".replace("-", "_"): session.step})
        _keep(session, stage)
    elif session.step % config.checkpoint_every == 0:
        _keep(session, f"{checkpoint.ROTATING}{session.step:08d}")
        checkpoint.rotate(session.writer.folder, config.keep)
    since = time.monotonic() - session.flushed
    if since > max(FLUSH_SECONDS, FLUSH_SHARE * session.progress.seconds):
        session.writer.flush()
        session.flushed = time.monotonic()


def _keep(session: Session, name: str) -> None:
    """Save a checkpoint; what is recorded up to it reaches the disk first."""
    session.writer.flush()
    folder = session.writer.folder / name
    config_json = to_json(session.config)
    checkpoint.save(folder, session.model, session.vocabulary, config_json, state_of(session))


def _failed(session: Session, error: BaseException) -> BaseException:
    """Write down how the run ended, as far as the disk lets it; what is to be raised."""
    session.progress.close()
    if disk.is_full(error):
        try:
            last = checkpoint.newest(session.writer.folder)
        except Refusal:
            last = None
        kept = f"its last checkpoint is {last.name}" if last else "it has no checkpoint yet"
        error = disk.NoSpace(
            f"The disk of {session.writer.folder} is full at step {session.step}; {kept}: "
            "free some space and resume."
        )
    reason = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
    try:
        session.writer.close("failed", reason)
    except OSError as second:
        error.add_note(f"Nor could the run's status be written: {second}")
    return error


def optimiser_step(session: Session, batch: Batch) -> StepResult:
    """One optimiser step over one global batch, whatever the number of micro-batches."""
    config, model, balancer = session.config, session.model, session.balancer
    num_rows = len(batch.tokens_BS)
    predicted = int((batch.targets_BS != IGNORE).sum())
    cross_entropy = z = balance_sum = 0.0
    means, choices = [], []
    load_LE = torch.zeros_like(balancer.bias_LE, dtype=torch.int64)
    statistics = None
    held_LTK = _held(session, batch)
    for part in range(config.micro_batches):
        tokens_BS, targets_BS, documents_BS = (
            torch.from_numpy(piece).to(config.device)
            for piece in rows.share_of(batch, part, config.micro_batches)
        )
        chosen = balancer.begin(tokens_BS, documents_BS)
        if held_LTK is not None:
            count = tokens_BS.numel()
            chosen = held_LTK[:, part * count : (part + 1) * count]
        output = _forward(session, tokens_BS, documents_BS, chosen)
        loss = token_loss(output.logits, targets_BS)
        balance_loss = balancer.loss(output.routing, documents_BS)
        objective = (loss.cross_entropy + config.z_loss * loss.z) / predicted
        if balance_loss is not None:
            objective = objective + balance_loss / num_rows
        objective.backward()
        cross_entropy += loss.cross_entropy.item()
        z += loss.z.item()
        balance_sum += 0.0 if balance_loss is None else balance_loss.item()
        means.append(loss.cross_entropy.item() / max(1, int(loss.tokens)))
        valid_T = documents_BS.flatten() >= 0
        load_LE += load(output.routing, valid_T)
        observed = balancer.observe(output.routing, valid_T)
        statistics = observed if statistics is None else statistics + observed
        if config.record_choices:
            choices.append(torch.stack([r.experts_TK for r in output.routing]))
    mean = cross_entropy / predicted
    _guard(session, mean)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
    for optimizer in session.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    assert statistics is not None  # there is at least one micro-batch
    balancer.update(statistics)
    model.load_bias(balancer.bias_LE)
    return StepResult(
        loss=mean,
        z_loss=z / predicted,
        balance_loss=balance_sum / num_rows,
        batch_het=max(means) - fmean(means),
        grad_norm=float(norm),
        batch_tokens=int((batch.documents_BS >= 0).sum()),
        load_LE=load_LE,
        choices_LTK=torch.cat(choices, dim=1) if choices else None,
    )


def _held(session: Session, batch: Batch) -> Tensor | None:
    """The choices a replay holds this step's tokens to."""
    if session.choices is None:
        return None
    chosen_LTK = session.choices.of(session.step + 1, batch.tokens_BS.size)
    return torch.from_numpy(chosen_LTK).to(session.config.device)


def _forward(
    session: Session, tokens_BS: Tensor, documents_BS: Tensor, held_LTK: Tensor | None
) -> Output:
    config = session.config
    cuda = config.device == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
        return session.forward(
            tokens_BS,
            documents_BS,
            select=session.balancer.select,
            replay=None if held_LTK is None else held_LTK.unbind(),
            recompute=config.recompute,
        )


def _guard(session: Session, loss: float) -> None:
    """Stop before the optimiser step where the loss is no number or has jumped."""
    step = session.step + 1
    if not math.isfinite(loss):
        raise TrainingFailed(
            f"the loss is {loss} at step {step}; lower the learning rate or the balance rate."
        )
    recent = session.losses[-REMEMBERED_LOSSES:]
    if len(recent) >= 10 and loss > median(recent) + session.config.spike:
        raise TrainingFailed(
            f"the loss jumped to {loss:.2f} at step {step}, from a median of "
            f"{median(recent):.2f}; lower the learning rate or raise `spike` "
            f"({session.config.spike} nats)."
        )
    session.losses.append(loss)


def _record(session: Session, result: StepResult, step: Step, seconds: float) -> None:
    session.tokens += result.batch_tokens
    load_LE = result.load_LE.cpu().numpy()
    bias_LE = session.balancer.bias_LE.float().cpu().numpy()
    values = {k: v for k, v in result._asdict().items() if isinstance(v, float | int)}
    values |= {"tokens": session.tokens, "learning_rate": step.share}
    values |= {"seconds": seconds, "phase": step.phase}
    session.writer.append("train", session.step, values)
    entropy_L = loads.load_entropy(load_LE)
    session.writer.append(
        "layers",
        session.step,
        {
            "max_vio": loads.max_vio(load_LE),
            "min_vio": loads.min_vio(load_LE),
            "load_entropy": entropy_L,
            "effective_experts": np.exp(entropy_L),
            "bias_std": bias_LE.std(-1),
            "bias_range": np.ptp(bias_LE, -1),
        },
    )
    if session.step % session.config.record_every == 0:
        session.writer.append("routing", session.step, {"count": load_LE, "bias": bias_LE})
    if result.choices_LTK is not None:
        chosen = replay.padded(result.choices_LTK.cpu().numpy(), most_tokens(session.config))
        session.writer.append("choices", session.step, {"expert": chosen})


def _evaluate(session: Session) -> None:
    model, fixed = session.model, session.balancer.fixed
    results = evaluate.domains(model, session.held_out, fixed)
    session.writer.append("evaluation", session.step, results)
    looked = probe.look(model, session.probed, fixed)
    session.writer.append("probe", session.step, probe.values(looked, session.looked))
    session.looked = looked
    session.progress.note(
        "  ".join(
            f"{name} {loss:.3f}"
            for name, loss in zip(session.held_out, results["loss"][0], strict=True)
        )
    )


@contextlib.contextmanager
def reproducible(threads: int, device: str) -> Iterator[None]:
    """Deterministic algorithms and a number of CPU threads, put back afterwards."""
    before = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing reads it; 4% of a profile
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic)
        memory.fill_uninitialized_memory = filled


def main() -> None:
    """Train from a configuration file and print the run's path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="RunConfig as JSON")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of run files")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of tokens and text")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    given = parser.parse_args()
    with one_sentence():
        config = from_file(RunConfig, given.config)
        run = train(config, runs=given.runs, cache=given.cache, resumes=given.resume)
        print(given.runs / f"{run.attrs['name']}.nc")


if __name__ == "__main__":
    main()
