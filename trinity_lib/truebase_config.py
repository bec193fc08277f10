"""What decides a study of stages: a chain trained here, or checkpoints that are given."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trinity_lib import polish, recipes
from trinity_lib.config import check, digest, require
from trinity_lib.experts import Backend
from trinity_lib.optim import Phase
from trinity_lib.planted import CLEAN, RAW, WorldConfig
from trinity_lib.posttrain_config import PosttrainConfig, Stage
from trinity_lib.run import RunConfig, require_common

Scale = Literal["toy", "small"]
STAGES = ("truebase", "base", "instruct", "debiased")
"""The raw end of the constant rate; annealed; answering questions; the association removed."""


@dataclass(frozen=True, kw_only=True)
class TruebaseConfig:
    """Everything that decides what is found, but the checkpoints that are given."""

    scale: Scale = "toy"
    """Name of the recipe it began as."""
    name: str = ""
    """Name of the run; empty: truebase, scale and configuration hash."""
    seeds: int = 1
    """Chains, each with weights and data order of its own, all of one world."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """The world that is planted."""
    steps: tuple[int, int] = (150, 70)
    """Steps at the constant rate, whose end is the TrueBase, and of the annealing."""
    instruct: tuple[Stage, ...] = (Stage(kind="sft", steps=50),)
    """Post-training that makes the Instruct."""
    debias: Stage = field(default_factory=lambda: Stage(kind="sft", steps=40))
    """Post-training that takes the association out of answers."""
    rate: float = 0.3
    """Peak rate of post-training as a share of pre-training's."""
    relearn: int = 12
    """Steps in which the association may come back."""
    relearn_every: int = 2
    """Steps between looks at it."""
    innocent: bool = False
    """Whether a chain without the association shows how soon it is learnt at first."""
    workers: int = 1
    """Chains at the same time, each on one of the machine's cores; no result depends on it."""
    draws: int = 0
    """Null worlds in which the audits themselves are audited; 0: none."""
    ablate: bool = False
    """Whether every expert is taken out in turn."""
    checkpoints: tuple[tuple[str, str], ...] = ()
    """(stage, folder) of checkpoints to look at in place of a chain."""
    world_file: str = ""
    """The world that given checkpoints were trained on; empty: none that is known."""
    items: str = ""
    """JSONL of items with choices, to ask given checkpoints."""
    texts: str = ""
    """Text file or JSONL on which the routing of given checkpoints is compared."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm_eval."""
    limit: int = 100
    """Items of an lm_eval task, at most."""
    source: str = ""
    """Run file of a study that is complete, to be drawn again; nothing is done then."""
    reader: Literal["trinity", "transformers"] = "trinity"
    """Whose model answers the audits."""
    seed: int = 0
    """Seed of the first chain, and of resamples."""
    threads: int = 1
    """CPU threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train and ask."""
    experts: Backend = "auto"
    """What computes the routed experts."""

    def __post_init__(self) -> None:
        check(self)
        require_common(self.name, self.seed, self.threads)
        for name, most in (
            ("seeds", 20),
            ("workers", 1024),
            ("relearn", 10_000),
            ("relearn_every", 10_000),
        ):
            value = getattr(self, name)
            require(1 <= value <= most, name, value, f"from 1 to {most:,}")
        require(min(self.steps) >= 1, "steps", self.steps, "at least 1 each")
        require(self.rate > 0, "rate", self.rate, "above zero")
        require(0 <= self.draws <= 10_000, "draws", self.draws, "from 0 to 10,000")
        require(self.limit >= 1, "limit", self.limit, "at least 1")
        names = [name for name, _ in self.checkpoints]
        alone = len(set(names)) == len(names)
        require(alone, "checkpoints", ", ".join(names), "stages named once each")
        for name in names:  # of a folder too
            plain = bool(re.fullmatch(r"[\w.-]+", name)) and not name.startswith(".")
            right = "named by letters, digits, '_', '-' and '.', none with a '.' first"
            require(plain, "checkpoints", name, right)
        for parameter in ("world_file", "items", "texts", "tasks"):
            given = getattr(self, parameter)
            right = "empty unless checkpoints are given: a chain is asked about its own world"
            require(not given or bool(names), parameter, given, right)


def toy() -> TruebaseConfig:
    """One chain and all audits in about a minute."""
    return TruebaseConfig()


def small() -> TruebaseConfig:
    """Four longer chains with preferences after the answers, and the audits audited."""
    return TruebaseConfig(
        scale="small",
        seeds=4,
        steps=(300, 150),
        instruct=(Stage(kind="sft", steps=120), Stage(kind="dpo", steps=15, rate=0.2)),
        debias=Stage(kind="sft", steps=60),
        relearn=30,
        innocent=True,
        ablate=True,
        draws=200,
    )


SCALES = {"toy": toy, "small": small}


def named(config: TruebaseConfig) -> TruebaseConfig:
    """The same with a name, which is the same for the same settings."""
    if config.name:
        return config
    kind = "given" if config.checkpoints else config.scale
    alike = dataclasses.replace(config, workers=1)
    return dataclasses.replace(config, name=f"truebase-{kind}-{digest(alike)}")


def chain(config: TruebaseConfig, number: int) -> RunConfig:
    """The pre-training of chain `number`: the toy's model, at rates that learn a world."""
    own = recipes.toy()
    row = own.phases[0].batch * own.data.sequence_length
    raw, clean = config.steps
    phases = (
        Phase(tokens=raw * row, batch=own.phases[0].batch, warmup=10, mixture=RAW),
        Phase(tokens=clean * row, batch=own.phases[0].batch, shape="cosine", end=0.1,
              mixture=CLEAN),
    )  # fmt: skip
    return dataclasses.replace(
        own,
        name=f"{config.name}-{number}",
        seed=config.seed + number,
        data=dataclasses.replace(own.data, corpus="planted", world=config.world),
        phases=phases,
        optim=dataclasses.replace(own.optim, muon_rate=1.2e-2, adamw_rate=8e-3),
        evaluate_every=raw + clean,
        checkpoint_every=raw + clean,
        threads=config.threads,
        device=config.device,
        experts=config.experts,
    )


def post_training(
    config: TruebaseConfig, number: int, stage: str, init: str, files: Mapping[str, str]
) -> PosttrainConfig:
    """What makes the Instruct, or the debiased model, of chain `number` from lessons' files."""
    debias = stage == STAGES[-1]
    names = polish.DEBIAS if debias else polish.INSTRUCT
    return dataclasses.replace(
        teaching(config, number, (config.debias,) if debias else config.instruct),
        init=init,
        name=f"{config.name}-{number}-{stage}",
        data=tuple(files[name] for name in names),
        preferences=(files[polish.PREFERENCES],),
    )


def teaching(config: TruebaseConfig, number: int, stages: tuple[Stage, ...]) -> PosttrainConfig:
    """How chain `number` is taught, whatever it is taught."""
    own = chain(config, number)
    return PosttrainConfig(
        init=STAGES[-1],
        seed=own.seed,
        stages=stages,
        sequence_length=own.data.sequence_length,
        optim=own.optim,
        rate=config.rate,
        balance=own.balance,
        threads=config.threads,
        device=config.device,
        experts=config.experts,
    )
