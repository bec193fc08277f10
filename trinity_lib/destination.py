"""Where a run fits: in this process, on ranks of this machine, or nowhere here."""

import dataclasses
import os
from typing import Literal

import torch

from trinity_lib import preflight, ranks
from trinity_lib.config import BadValue, require
from trinity_lib.mesh import ParallelConfig
from trinity_lib.model import count_parameters
from trinity_lib.run import RunConfig

Mode = Literal["auto", "train", "rehearse"]
Destination = Literal["here", "ranks", "rehearsal"]
RANKS_A_CORE = 4
"""CPU ranks that a core can bear: more only wait for each other."""


def gpus() -> int:
    """CUDA GPUs that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def destination(config: RunConfig, mode: str = "auto") -> Destination:
    """Where `config` runs under a mode; BadValue where it is to train and cannot here.

    `auto` trains where this machine suffices and rehearses a released model where it does
    not, except inside torchrun or SLURM, where whoever asked for machines wants no rehearsal.
    """
    modes = ("auto", "train", "rehearse")
    require(mode in modes, "mode", mode, f"one of {', '.join(modes)}")
    if mode == "rehearse":
        return "rehearsal"
    if missing := shortfall(config):
        within = ranks.inside()
        if mode == "auto" and published(config) and within is None:
            return "rehearsal"
        why = f" (inside {within} nothing is rehearsed unasked)" if within else ""
        way = "start it elsewhere, from the launch folder that mode rehearse writes"
        way = way if published(config) else "take a smaller scale"
        raise BadValue(f"scale {config.scale!r} needs {missing}{why}: {way}.")
    several = config.parallel.ranks > 1
    return "ranks" if several or config.device == "cuda" else "here"


def shortfall(config: RunConfig) -> str:
    """What a run needs that this machine has not, in a clause; "" where it suffices."""
    wanted = config.parallel.ranks
    needed = bytes_a_rank(config)
    if config.device == "cuda":
        if wanted > gpus():
            return f"{wanted:,} GPUs, and this machine has {gpus() or 'none'}"
        there, what = preflight.memory("cuda")
    else:
        there, what = preflight.memory("cpu")
        needed *= wanted
        if published(config) and wanted > 1:
            return f"{wanted:,} GPUs, and this machine has none"
        if wanted > RANKS_A_CORE * cores():
            return f"{wanted:,} processes, and this machine has {cores()} cores"
    if needed > there:
        each = " on every GPU" if wanted > 1 and config.device == "cuda" else ""
        return (
            f"{needed / 1e9:,.0f} GB{each} for weights, gradients and momentum, and this "
            f"machine has {there / 1e9:,.0f} GB of {what}"
        )
    return ""


def published(config: RunConfig) -> bool:
    """Whether the scale is one of the released models, which are trained on GPUs."""
    return config.scale in ("nano", "mini", "large")


def bytes_a_rank(config: RunConfig) -> int:
    """Least bytes a rank must hold: weights, gradients and momentum of its share."""
    width = 8 if config.dtype == "float64" else 4
    return 3 * width * count_parameters(config.model).total // config.parallel.shard


def on_this_machine(config: RunConfig) -> RunConfig:
    """The run on all GPUs of this machine, where they hold it; else as it is."""
    here = gpus()
    if config.device != "cuda" or here >= config.parallel.ranks:
        return config
    alone = laid_out(config, ParallelConfig(shard=here))
    return config if shortfall(alone) else alone


def laid_out(
    config: RunConfig, parallel: ParallelConfig, batch: int | None = None
) -> RunConfig:
    """The run over other ranks, and with other batches, micro-batches about as large as before.

    Their number is the least multiple of the ranks that makes them no larger and divides
    every batch; BadValue where there is none.
    """
    phases = config.phases
    if batch is not None:
        require(batch >= 1, "batch", batch, "at least 1 row")
        length = config.data.sequence_length
        phases = tuple(
            dataclasses.replace(
                phase, batch=batch, larger_batch=None, tokens=max(phase.tokens, batch * length)
            )
            for phase in phases
        )
    rows = [r for p in phases for r in (p.batch, *(p.larger_batch or ())[1:])]
    at_once = max(1, config.phases[0].batch // config.micro_batches)
    least = -(-rows[0] // at_once)
    for pieces in range(parallel.ranks, rows[0] + 1, parallel.ranks):
        if pieces >= least and all(r % pieces == 0 for r in rows):
            return dataclasses.replace(
                config, parallel=parallel, phases=phases, micro_batches=pieces
            )
    right = f"such that every batch ({min(rows):,} rows) is a multiple of them"
    raise BadValue(f"processes is {parallel.ranks}; it must be {right}.")
