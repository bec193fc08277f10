"""What decides a run: its configuration, and the schedule of steps that follows from it."""

import dataclasses
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

from trinity_lib import optim
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import check, digest, require
from trinity_lib.data import DataConfig
from trinity_lib.experts import Backend
from trinity_lib.mesh import ParallelConfig
from trinity_lib.model import ModelConfig
from trinity_lib.optim import OptimConfig, Phase


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
    init: str = ""
    """Checkpoint folder whose weights and biases the run begins with; empty: drawn anew."""
    replay: str = ""
    """Run file whose recorded choices the routing is held to; empty: the router chooses."""
    z_loss: float = 1e-6
    """Weight of the z-loss on the output logits."""
    micro_batches: int = 1
    """Pieces a step's batch is split into, which ranks share; gradients are accumulated."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the run is laid out over ranks."""
    recompute: bool = False
    """Recompute activations in backward instead of keeping them."""
    evaluate_every: int = 50
    """Steps between evaluations; the end of every phase is evaluated too."""
    record_every: int = 1
    """Steps between records of every expert's count and bias."""
    probe_tokens: int = 1024
    """Held-out tokens whose routing is looked at in every evaluation, about."""
    record_choices: bool = False
    """Record every token's chosen experts at every step, for replays."""
    checkpoint_every: int = 100
    """Steps between checkpoints to resume from; the end of every phase is one too."""
    keep: int = 2
    """Checkpoints kept beside those of phase ends."""
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
    experts: Backend = "auto"
    """What computes the routed experts: `auto`, `torch`, `native` or `megablocks`."""
    compile: bool = False
    """Compile the model with torch.compile: half a minute or more, then a faster step."""

    def __post_init__(self) -> None:
        check(self)
        require_common(self.name, self.seed, self.threads)
        experts = len(self.model.moe_layers)
        right = f"below num_layers ({self.model.num_layers}): a run trains a router"
        require(experts > 0, "num_dense_layers", self.model.num_dense_layers, right)
        fits = not self.record_choices or self.model.router.num_experts < 2**15
        require(fits, "record_choices", True, "false above 32,767 experts: stored as int16")
        require(len(self.phases) > 0, "phases", self.phases, "at least one phase")
        ragged = self.record_choices and self.balance.method == "expert_choice"
        require(not ragged, "record_choices", True, "false under balance expert_choice: ragged")
        counts = (
            "micro_batches",
            "probe_tokens",
            "evaluate_every",
            "record_every",
            "log_every",
        )
        for name in (*counts, "checkpoint_every", "keep"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        ranks = self.parallel.ranks
        right = f"a multiple of the {ranks} ranks"
        require(self.micro_batches % ranks == 0, "micro_batches", self.micro_batches, right)
        right = "false where a run has several ranks"
        require(ranks == 1 or not self.compile, "compile", self.compile, right)
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


def require_common(name: str, seed: int, threads: int) -> None:
    """BadValue where a name cannot be a run file's, or a seed or threads are out of range."""
    plain = not set(name) & set("/\\") and not name.startswith(".") and name.isprintable()
    require(plain, "name", name, "a file name without slashes or a leading dot")
    require(not name.endswith(".nc"), "name", name, "a name without .nc")
    require(len(name.encode()) <= 200, "name", name, "at most 200 bytes")
    require(seed >= 0, "seed", seed, "zero or more")
    require(seed < 2**63, "seed", seed, "below 2**63")
    require(threads >= 1, "threads", threads, "at least 1")
    require(threads <= 1024, "threads", threads, "at most 1024")


class Step(NamedTuple):
    """One optimiser step of a schedule."""

    phase: int
    """Number of its phase, from 0."""
    number: int
    """Its number within the phase, from 0."""
    ends_phase: bool
    """Whether it is the phase's last."""
    rows: int
    """Packed rows of its batch."""
    share: float
    """Learning rate as a share of its peak."""


def schedule(config: RunConfig) -> list[Step]:
    """Every optimiser step of a run."""
    length = config.data.sequence_length
    return [
        Step(
            phase=index,
            number=number,
            ends_phase=number == steps - 1,
            rows=optim.batch_rows(phase, number, length),
            share=optim.rate(config.phases, index, number, steps),
        )
        for index, (phase, steps) in enumerate(zip(config.phases, config.steps, strict=True))
        for number in range(steps)
    ]


def stage_name(config: RunConfig, phase: int) -> str:
    """Name of the checkpoint at a phase's end; a run of one phase ends in its base."""
    if phase == len(config.phases) - 1:
        return "base"
    return "truebase" if phase == 0 else f"phase-{phase + 1}"


def named(config: RunConfig) -> RunConfig:
    """The same run with a name."""
    if config.name:
        return config
    return dataclasses.replace(config, name=fresh_name(config.scale, config))


def fresh_name(kind: str, config: Any) -> str:
    """Kind, hash of the configuration, and the time to a thousandth of a second."""
    return f"{kind}-{digest(config)}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
