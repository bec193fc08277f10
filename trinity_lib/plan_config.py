"""What is planned: its settings, and how a notebook's parameters become them."""

import dataclasses
import inspect

from trinity_lib import articles, gpus, launch, recipes
from trinity_lib.config import check, convert, require
from trinity_lib.mesh import ParallelConfig
from trinity_lib.plan import Cluster, Plan, make
from trinity_lib.run import RunConfig, require_common

SHARD, EXPERT_PARALLEL = 128, 8
"""What `configure` takes where the user gives neither: those of the published run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A training run that is only planned."""

    scale: str
    """The model: a recipe."""
    gpu: str
    """Kind of GPU."""
    gpus: int
    """How many of them."""
    price: float
    """Dollars per GPU-hour."""
    efficiency: float
    """Share of the dense bf16 peak that training reaches (MFU)."""
    tokens: float
    """Tokens to train."""
    days: float
    """Days that a run of so many tokens on so many GPUs took, to ask what that implies."""
    shard: int
    """Ranks over which weights and optimiser state are split."""
    expert_parallel: int
    """Ranks of such a group that share a layer's experts."""
    micro_tokens: int
    """Tokens a rank computes at once."""
    recompute: bool
    """Recompute activations in backward instead of keeping them."""
    context: int
    """Tokens of a sequence that is decoded."""
    batch: int
    """Sequences that are decoded together."""
    name: str = ""
    """Name of the run; empty: plan, scale, configuration hash and time."""

    def __post_init__(self) -> None:
        check(self)
        require_common(self.name, 0, 1)
        scales = recipes.SCALES
        require(self.scale in scales, "scale", self.scale, f"one of {', '.join(scales)}")
        _ = self.cluster  # which checks gpu, gpus, price and efficiency
        for name in ("tokens", "days"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above zero")
        for name in ("context", "batch"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        self._require_divisor("shard", SHARD, "gpus")
        self._require_divisor("expert_parallel", EXPERT_PARALLEL, "shard")
        length = self.length
        whole = self.micro_tokens >= 1 and self.micro_tokens % length == 0
        right = f"a multiple of the {length:,} tokens of a packed row"
        require(whole, "micro_tokens", self.micro_tokens, right)

    def _require_divisor(self, name: str, default: int, of: str) -> None:
        value, whole = getattr(self, name), getattr(self, of)
        divides = value >= 1 and whole % value == 0
        if value == default:  # the user may have given only the other
            right = f"a multiple of {name} ({value}), or {name} a divisor of it"
            require(divides, of, whole, right)
        require(divides, name, value, f"a divisor of {of} ({whole})")

    @property
    def recipe(self) -> RunConfig:
        """The run whose model and rows are planned."""
        return recipes.SCALES[self.scale]()

    @property
    def length(self) -> int:
        """Tokens of a packed row."""
        return self.recipe.data.sequence_length

    @property
    def cluster(self) -> Cluster:
        """The GPUs."""
        return Cluster(
            gpu=self.gpu, count=self.gpus, price=self.price, efficiency=self.efficiency
        )

    @property
    def parallel(self) -> ParallelConfig:
        """The layout over them."""
        return ParallelConfig(
            replicate=self.gpus // self.shard, shard=self.shard, experts=self.expert_parallel
        )

    @property
    def plan(self) -> Plan:
        """The plan of this run."""
        return make(
            self.recipe.model,
            self.parallel,
            self.cluster,
            tokens=self.tokens,
            micro_tokens=self.micro_tokens,
            length=self.length,
            recompute=self.recompute,
            optimizer=self.recipe.optim.optimizer,
        )


def configure(
    *,
    scale: str = "large",
    gpu: str = "B300",
    gpus: int = 2048,
    price: float | None = None,
    efficiency: float = 0.118,
    tokens: float | None = None,
    days: float = 33.0,
    shard: int = SHARD,
    expert_parallel: int = EXPERT_PARALLEL,
    micro_tokens: int = 8192,
    recompute: bool = True,
    context: int = 32_768,
    batch: int = 1,
    name: str = "",
) -> PlanConfig:
    """The plan that a notebook's parameters ask for; None takes what scale and kind say.

    A Refusal, one sentence, for a parameter that is unknown to this call (papermill only
    warns of it), of another type or out of range.
    """
    launch.refuse_unknown(inspect.signature(configure).parameters)
    scale, kind = convert(str, scale, "scale"), _kind(convert(str, gpu, "gpu"))
    require(scale in recipes.SCALES, "scale", scale, f"one of {', '.join(recipes.SCALES)}")
    price = convert(float | None, price, "price")
    tokens = convert(float | None, tokens, "tokens")
    own = sum(phase.tokens for phase in recipes.SCALES[scale]().phases)
    return PlanConfig(
        scale=scale,
        gpu=kind.name,
        gpus=gpus,
        price=kind.price if price is None else price,
        efficiency=efficiency,
        tokens=own if tokens is None else tokens,
        days=days,
        shard=shard,
        expert_parallel=expert_parallel,
        micro_tokens=micro_tokens,
        recompute=recompute,
        context=context,
        batch=batch,
        name=name,
    )


def _kind(name: str) -> gpus.GPU:  # `gpus` is a parameter of `configure`
    return gpus.find(name)


def active(config: PlanConfig) -> float:
    """Active parameters as published of the scale, else counted without embeddings."""
    own = float(config.plan.counts.active)
    return articles.ACTIVE.get(config.scale, own)


def describe(config: PlanConfig) -> str:
    """One line on what is about to be planned."""
    return (
        f"{config.scale}: {config.tokens:.3g} tokens on {config.gpus:,} {config.gpu} at "
        f"{100 * config.efficiency:.3g}% of the bf16 peak and ${config.price:.2f} a GPU-hour, "
        f"shards of {config.shard}, experts over {config.expert_parallel}, "
        f"{config.micro_tokens:,} tokens at once, "
        f"{'recomputed' if config.recompute else 'all activations kept'}"
    )
