"""What a training run needs, before anything is allocated: memory, time, dollars.

    plan.make(model, parallel, Cluster(gpu="B300", count=2048), tokens=17e12, ...) -> Plan

`footprint` counts bytes, `flops` operations, `serving` is inference, `gpus` knows the kinds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from trinity_lib import flops, footprint, gpus, serving
from trinity_lib.config import check, require
from trinity_lib.flops import Flops
from trinity_lib.footprint import Memory, Moment, Optimizer
from trinity_lib.gpus import GPU
from trinity_lib.mesh import ParallelConfig
from trinity_lib.model import ModelConfig, ParameterCount

DAY, HOUR = 86_400.0, 3_600.0
MACHINE = 8
"""GPUs of one machine: counts above four are multiples of it."""
MOST_GPUS = 16_384
"""Where the search for the smallest count ends."""

MOMENTS: dict[Moment, str] = {
    "loss": "the loss",
    "block": "a block's backward",
    "embedding": "the embedding's backward",
    "step": "the optimiser's step",
}
"""What figures call a step's moments."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs of one kind, what they cost, and how much of them training reaches."""

    gpu: str
    """Kind, one of `gpus.KINDS`."""
    count: int
    """How many."""
    price: float | None = None
    """Dollars per GPU-hour; None assumes the kind's list price."""
    efficiency: float = 0.118
    """Share of the dense bf16 peak that model operations reach (MFU); the published run of
    Large implies the default."""

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "gpu", gpus.find(self.gpu).name)
        fits = 1 <= self.count <= 2**20
        require(fits, "gpus", self.count, "at least 1, at most 1,048,576")
        free = self.price is None or self.price >= 0
        require(free, "price", self.price, "zero or more dollars per GPU-hour")
        fits = 0 < self.efficiency <= 1
        require(fits, "efficiency", self.efficiency, "above 0, at most 1")

    @property
    def kind(self) -> GPU:
        """What its GPUs can do."""
        return gpus.KINDS[self.gpu]

    @property
    def dollars_per_hour(self) -> float:
        """Of one GPU."""
        return self.kind.price if self.price is None else self.price


class Cost(NamedTuple):
    """What training takes."""

    tokens_per_second: float
    """Of all GPUs together."""
    days: float
    """Of wall time."""
    gpu_hours: float
    """GPUs times hours."""
    dollars: float
    """GPU-hours times their price."""


class Plan(NamedTuple):
    """A training run, planned."""

    model: ModelConfig
    parallel: ParallelConfig
    cluster: Cluster
    counts: ParameterCount
    """Parameters total and active, with and without embeddings."""
    held: tuple[int, int]
    """Parameters on the rank with least, and with most."""
    memory: dict[Moment, Memory]
    """Bytes on the rank with most, at the moments that may need most."""
    flops: Flops
    """Forward operations of a token."""
    cost: Cost

    @property
    def peak(self) -> Memory:
        """The moment that needs most."""
        return footprint.peak(self.memory)[1]

    @property
    def fits(self) -> bool:
        """Whether the peak leaves a GPU its headroom."""
        return self.peak.total <= serving.usable(self.cluster.kind)


class Fit(NamedTuple):
    """The smallest number of GPUs that training fits."""

    gpus: int
    """How many, all in one shard group; 0 where no number does."""
    experts: int
    """Ranks that share a layer's experts."""
    bytes: int
    """Peak on the rank with most; where nothing fits, the least that was found."""


def make(
    model: ModelConfig,
    parallel: ParallelConfig,
    cluster: Cluster,
    *,
    tokens: float,
    micro_tokens: int,
    length: int,
    recompute: bool = True,
    optimizer: Optimizer = "muon",
) -> Plan:
    """The plan of training `model` on `tokens` tokens.

    Each rank computes `micro_tokens` at once, in documents of `length` tokens. BadValue
    where the ranks of `parallel` are not the cluster's GPUs.
    """
    right = f"replicate x shard = {cluster.count}, the GPUs there are"
    require(parallel.ranks == cluster.count, "replicate x shard", parallel.ranks, right)
    held = footprint.held(model, parallel)
    per_token = flops.per_token(model, length)
    return Plan(
        model=model,
        parallel=parallel,
        cluster=cluster,
        counts=serving.counted(model),
        held=(int(held.min()), int(held.max())),
        memory=footprint.training(
            model,
            parallel,
            tokens=micro_tokens,
            length=length,
            recompute=recompute,
            optimizer=optimizer,
        ),
        flops=per_token,
        cost=cost(cluster, per_token.training, tokens),
    )


def cost(cluster: Cluster, flops_per_token: float, tokens: float) -> Cost:
    """What `tokens` tokens take at the cluster's efficiency; operations as `Flops.training`."""
    require(tokens > 0, "tokens", tokens, "above zero")
    rate = cluster.count * cluster.kind.bf16 * cluster.efficiency / flops_per_token
    hours = cluster.count * tokens / rate / HOUR
    return Cost(rate, tokens / rate / DAY, hours, hours * cluster.dollars_per_hour)


def implied_rate(operations: float, count: int, days: float) -> float:
    """FLOP/s that each of `count` GPUs reached if `operations` took them `days`."""
    require(days > 0, "days", days, "above zero")
    return operations / (count * days * DAY)


def implied_price(dollars: float, count: int, days: float) -> float:
    """Dollars per GPU-hour if that were all they paid for."""
    require(days > 0, "days", days, "above zero")
    return dollars / (count * days * DAY / HOUR)


def least_gpus(
    model: ModelConfig,
    gpu: GPU,
    *,
    micro_tokens: int,
    length: int,
    recompute: bool = True,
    optimizer: Optimizer = "muon",
    most_experts: int = MACHINE,
) -> Fit:
    """The smallest number of GPUs of a kind that training fits, in one shard group.

    Tried are 1, 2, 4 and multiples of eight, each with every number of expert ranks that
    divides it, up to `most_experts`: more spread experts thinner, and leave the machine's
    fast link.
    """
    found = Fit(0, 0, 0)
    for parallel in _layouts(most_experts):
        moments = footprint.training(
            model,
            parallel,
            tokens=micro_tokens,
            length=length,
            recompute=recompute,
            optimizer=optimizer,
        )
        needed = footprint.peak(moments)[1].total
        if found.bytes == 0 or needed < found.bytes:
            found = Fit(0, parallel.experts, needed)
        if needed <= serving.usable(gpu):
            return Fit(parallel.ranks, parallel.experts, needed)
    return found


def _layouts(most_experts: int) -> Iterator[ParallelConfig]:
    """One shard group of every size, smallest first; steps grow where groups are large."""
    count = 1
    while count <= MOST_GPUS:
        for experts in range(min(most_experts, count), 0, -1):
            if count % experts == 0:
                yield ParallelConfig(shard=count, experts=experts)
        count += count if count < MACHINE else MACHINE * max(1, count // 256)


def describe(plan: Plan) -> str:
    """The plan in a few lines."""
    counts, cost, cluster = plan.counts, plan.cost, plan.cluster
    moment, peak = footprint.peak(plan.memory)
    least, most = plan.held
    ranks = f"{most:,}" if least == most else f"{least:,} to {most:,}"
    fits = "fits" if plan.fits else "does not fit"
    return (
        f"{counts.total:,} parameters, {counts.active_with_embeddings:,} active with both "
        f"embeddings ({counts.active:,} without); {ranks} a rank, {cluster.count:,} in all "
        f"(shards of {plan.parallel.shard}, experts over {plan.parallel.experts}).\n"
        f"{peak.total / 1e9:,.3g} GB a GPU at most, in {MOMENTS[moment]}: {fits} the "
        f"{cluster.kind.memory / 1e9:,.0f} GB of a {cluster.gpu}, a tenth left free.\n"
        f"{plan.flops.training / 1e9:,.4g} GFLOP a token; at {100 * cluster.efficiency:.3g}% "
        f"of {cluster.kind.bf16 / 1e12:,.0f} TFLOP/s {cost.tokens_per_second:,.0f} tokens/s: "
        f"{cost.days:,.3g} days, {_rounded(cost.gpu_hours)} GPU-hours, "
        f"${_rounded(cost.dollars)} at ${cluster.dollars_per_hour:.2f}."
    )


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
