"""Config in, run file out: one loop, from a notebook or `python -m trinity_lib.train`."""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import xarray as xr

from trinity_lib import (
    checkpoint,
    disk,
    evaluate,
    flops,
    gpus,
    loads,
    optim,
    probe,
    replay,
    resume,
    shards,
)
from trinity_lib.config import Refusal, from_file, to_json
from trinity_lib.mesh import joined
from trinity_lib.ranks import recorded, restarted
from trinity_lib.record import ROOT
from trinity_lib.run import RunConfig, Step, named, schedule, stage_name
from trinity_lib.session import Session, most_tokens, start, state_of
from trinity_lib.step import StepResult, optimiser_step

# cuBLAS reads it once, at its first product, before it promises the same bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
RUNS, CACHE = ROOT / "runs", ROOT / ".cache"
FLUSH_SECONDS, FLUSH_SHARE = 15.0, 0.01
"""Time between shards, and its least share of the run so far: a long run has few."""


def train(
    config: RunConfig, *, runs: Path = RUNS, cache: Path = CACHE, resumes: bool = False
) -> xr.DataTree:
    """Train as `config` says and return the run, which is also a file in `runs`.

    The same configuration on the same machine gives the same losses, counts and weights
    to the bit, also when the run was killed and is resumed: `resumes` goes on with the
    named run, or the newest incomplete one of this configuration, from its last checkpoint.
    Under torchrun this process is one of the ranks that `config.parallel` says; the run is
    rank 0's to return, and the others return an empty one. Raises Taken where the run's name is
    taken, and TrainingFailed where the loss is NaN or jumps; the run file then says `failed`
    and why.
    """
    with (
        reproducible(config.threads, config.device),
        joined(config.parallel, config.device) as layout,
    ):
        if layout is None or layout.rank == 0:
            config = resume.find(config, runs) if resumes else named(config)
        if layout is not None:
            config = layout.shared(config)
        session = start(config, runs, cache, resumes=resumes, layout=layout)
        try:
            if session.step == 0:
                _evaluate(session)
            for step in schedule(session.config)[session.step :]:
                _step(session, step)
            _saved(session)
            session.progress.close()
            session.writer.annotate(epochs=session.rows.stream.epoch, **_speed(session))
            if layout is None or layout.rank == 0:
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
    if result.all_saved:
        _saved(session)
    if step.ends_phase or session.step % config.evaluate_every == 0:
        _evaluate(session)
    if step.ends_phase:
        stage = stage_name(config, step.phase)
        session.writer.annotate(**{f"{stage}_step".replace("-", "_"): session.step})
        _keep(session, stage, released=True)
    elif session.step % config.checkpoint_every == 0:
        _keep(session, f"{checkpoint.ROTATING}{session.step:08d}")
    since = time.monotonic() - session.flushed
    if since > max(FLUSH_SECONDS, FLUSH_SHARE * session.progress.seconds):
        session.writer.flush()
        session.flushed = time.monotonic()


def _keep(session: Session, name: str, *, released: bool = False) -> None:
    """Save a checkpoint; what is recorded up to it reaches the disk first.

    Several ranks write it while training goes on, unless it is the end of a phase.
    """
    session.writer.flush()
    folder = session.writer.folder / name
    config_json = to_json(session.config)
    if session.sharded is None:
        checkpoint.save(
            folder, session.model, session.vocabulary, config_json, state_of(session)
        )
        checkpoint.rotate(session.writer.folder, session.config.keep)
        return
    _saved(session)
    session.saving = shards.save(
        folder, session.sharded, session.vocabulary, config_json, state_of(session),
        released=released,
    )  # fmt: skip
    if released:
        _saved(session)


def _saved(session: Session) -> None:
    """Wait for the checkpoint that is being written, if there is one."""
    if session.saving is None or session.layout is None:
        return
    shards.finish(session.saving)
    session.saving = None
    if session.layout.rank == 0:
        checkpoint.rotate(session.writer.folder, session.config.keep)


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


def _record(session: Session, result: StepResult, step: Step, seconds: float) -> None:
    session.tokens += result.batch_tokens
    session.paces.append(result.batch_tokens / seconds)
    load_LE = result.load_LE.cpu().numpy()
    bias_LE = session.balancer.bias_LE.float().cpu().numpy()
    values = {k: v for k, v in result._asdict().items() if isinstance(v, float | int)}
    values.pop("all_saved")
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


def _speed(session: Session) -> dict[str, Any]:
    """Tokens per second of the median step, and the share of the GPUs' rate that it is (MFU).

    Operations are those of rows that are one document each; a GPU that is not among `gpus`
    has no MFU.
    """
    config = session.config
    if not session.paces:
        return {}
    pace = median(session.paces)
    operations = flops.per_token(config.model, config.data.sequence_length).training
    about: dict[str, Any] = {"tokens_per_second": pace, "flops_per_token": operations}
    if config.device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
        if (kind := gpus.known(about["gpu"])) is not None:
            about["mfu"] = pace * operations / (kind.bf16 * config.parallel.ranks)
    return about


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


@recorded
def main() -> None:
    """Train from a configuration file and print the run's path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="RunConfig as JSON")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of run files")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of tokens and text")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    given = parser.parse_args()
    config = from_file(RunConfig, given.config)
    begun = (given.runs / config.name / "run.json").is_file()
    resumes = given.resume or (restarted() and begun)
    run = train(config, runs=given.runs, cache=given.cache, resumes=resumes)
    if run.attrs:
        print(given.runs / f"{run.attrs['name']}.nc")


if __name__ == "__main__":
    main()
