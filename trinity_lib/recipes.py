"""Named runs by scale: each function returns a complete `RunConfig`.

`toy` and `small` train on the embedded corpus; `nano`, `mini` and `large` are the published
models (Arcee Trinity Large technical report, table 1 and section 3), whose data is not.
Run this module to print their parameter counts.
"""

import argparse
import dataclasses
from collections.abc import Callable

from trinity_lib.attention import AttentionConfig
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import one_sentence, require
from trinity_lib.data import DataConfig
from trinity_lib.mesh import ParallelConfig
from trinity_lib.model import ModelConfig, count_parameters
from trinity_lib.optim import OptimConfig, Phase, phase_steps
from trinity_lib.routing import RouterConfig
from trinity_lib.run import RunConfig

RAW = {"code": 0.35, "prose": 0.45, "arithmetic": 0.1, "facts": 0.1}
"""The first phase's mixture, the TrueBase's: mostly raw text."""
MIXED = {"code": 0.35, "prose": 0.4, "arithmetic": 0.1, "facts": 0.15}
"""The second phase's."""
POLISHED = {"code": 0.35, "prose": 0.35, "arithmetic": 0.15, "facts": 0.15}
"""The annealing phase's: more of what has a right answer."""


def toy() -> RunConfig:
    """What learns visibly in under a minute on two CPU cores.

    The shape of Large's schedule in small: constant, constant with another mixture, cosine
    to a tenth. lambda is 1e-2, time-compressed from the report's 5e-4, whose effect a run
    this short cannot see.
    """
    model = ModelConfig(
        vocab_size=1024,
        width=64,
        num_layers=4,
        num_dense_layers=1,
        dense_width=192,
        expert_width=32,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=32, window=32),
        router=RouterConfig(num_experts=32, top_k=4, route_scale=2.448),
    )
    config = RunConfig(
        scale="toy",
        model=model,
        data=DataConfig(sequence_length=128, rsdb=32, validation_rows=32),
        balance=BalanceConfig(method="smebu", rate=1e-2),
        optim=OptimConfig(muon_rate=3e-2, adamw_rate=2e-2),
        phases=_embedded_phases(batch=16, warmup=5),
        micro_batches=4,
        evaluate_every=35,
        checkpoint_every=35,
        log_every=20,
    )
    return with_steps(config, 140)


def small() -> RunConfig:
    """50M parameters, 7M active: about an hour on two CPU cores."""
    model = ModelConfig(
        vocab_size=4096,
        width=256,
        num_layers=8,
        num_dense_layers=1,
        dense_width=768,
        expert_width=128,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=64, window=64),
        router=RouterConfig(num_experts=64, top_k=4, route_scale=2.448),
    )
    config = RunConfig(
        scale="small",
        model=model,
        data=DataConfig(sequence_length=256, rsdb=128, validation_rows=32),
        balance=BalanceConfig(method="smebu", rate=5e-3),
        optim=OptimConfig(muon_rate=1e-2, adamw_rate=3e-3),
        phases=_embedded_phases(batch=16, warmup=20),
        micro_batches=2,
        evaluate_every=100,
        record_every=5,
        log_every=10,
        threads=2,
    )
    return with_steps(config, 1000)


def nano() -> RunConfig:
    """Trinity Nano, 6.1B parameters."""
    return _published(
        "nano",
        ModelConfig(
            vocab_size=200_192,
            width=1024,
            num_layers=56,
            num_dense_layers=2,
            dense_width=3072,
            expert_width=256,
            attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=128, window=2048),
            router=RouterConfig(num_experts=128, top_k=8, route_scale=2.826),
        ),
        adamw_rate=3e-4,
    )


def mini() -> RunConfig:
    """Trinity Mini, 26B parameters."""
    return _published(
        "mini",
        ModelConfig(
            vocab_size=200_192,
            width=2048,
            num_layers=32,
            num_dense_layers=2,
            dense_width=6144,
            expert_width=1024,
            attention=AttentionConfig(num_heads=32, num_kv_heads=4, head_dim=128, window=2048),
            router=RouterConfig(num_experts=128, top_k=8, route_scale=2.826),
        ),
        adamw_rate=2e-4,
    )


def large() -> RunConfig:
    """Trinity Large, 398.6B parameters, 13.4B active with embeddings.

    On 2,048 GPUs: weights over 128 ranks, experts over 8 of them (section 3.3).

    60 layers, the 6 dense ones included. The batch grows after 4.9T tokens; phases are the
    10/4/3T of the report's figure 1 (its text says 13:4:3), and the cosine is taken to
    start with the third, which the loss curve suggests and the text does not say. RSDB was
    switched on for that phase only; here a run has one setting, off.
    """
    model = ModelConfig(
        vocab_size=200_192,
        width=3072,
        num_layers=60,
        num_dense_layers=6,
        dense_width=12_288,
        expert_width=3072,
        attention=AttentionConfig(num_heads=48, num_kv_heads=8, head_dim=128, window=4096),
        router=RouterConfig(num_experts=256, top_k=4, route_scale=2.448),
    )
    return RunConfig(
        scale="large",
        model=model,
        data=DataConfig(sequence_length=8192),
        balance=BalanceConfig(method="smebu", rate=5e-4, beta=0.5, kappa=2.0),
        optim=OptimConfig(muon_rate=8e-4, adamw_rate=2e-4),
        phases=(
            Phase(
                tokens=10 * 10**12,
                batch=12_288,
                larger_batch=(49 * 10**11, 16_384),
                warmup=2000,
            ),
            Phase(tokens=4 * 10**12, batch=16_384),
            Phase(tokens=3 * 10**12, batch=16_384, shape="cosine", end=0.1),
        ),
        parallel=ParallelConfig(replicate=16, shard=128, experts=8),
        micro_batches=4096,
        recompute=True,
        evaluate_every=1000,
        checkpoint_every=1000,
        record_every=100,
    )


SCALES: dict[str, Callable[[], RunConfig]] = {
    "toy": toy,
    "small": small,
    "nano": nano,
    "mini": mini,
    "large": large,
}
MOST_STEPS = 1_000_000
"""Steps a schedule may have; Large has 138,800."""
EMBEDDED = ("toy", "small")
"""Scales whose tokenizer the embedded corpus can yield."""


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The same schedule in `steps` optimiser steps, each phase keeping its share of them.

    Batches stay at each phase's first size; a phase left with no step is dropped.
    """
    require(1 <= steps <= MOST_STEPS, "steps", steps, f"at least 1, at most {MOST_STEPS:,}")
    length = config.data.sequence_length
    old = [phase_steps(p, length) for p in config.phases]
    ends = [round(steps * sum(old[: i + 1]) / sum(old)) for i in range(len(old))]
    phases = []
    for phase, begin, end in zip(config.phases, [0, *ends], ends, strict=False):
        if end > begin:
            phases.append(
                dataclasses.replace(
                    phase,
                    tokens=(end - begin) * phase.batch * length,
                    larger_batch=None,
                    warmup=min(phase.warmup, end - begin),
                )
            )
    return dataclasses.replace(config, phases=tuple(phases))


def _embedded_phases(batch: int, warmup: int) -> tuple[Phase, ...]:
    """Large's three phases, 10:4:3, over the embedded corpus; `with_steps` sets the tokens."""
    million = 1_000_000
    return (
        Phase(tokens=10 * million, batch=batch, warmup=warmup, mixture=RAW),
        Phase(tokens=4 * million, batch=batch, mixture=MIXED),
        Phase(tokens=3 * million, batch=batch, shape="cosine", end=0.1, mixture=POLISHED),
    )


def _published(scale: str, model: ModelConfig, adamw_rate: float) -> RunConfig:
    """What Nano and Mini share: 7/1.8/1.2T tokens, centred sign updates, linear decay to 0.

    The balance rate 1e-3 is inferred from load_balance_coeff in the released config.json.
    When the batch grew from 4096 to 8192 rows is not published: here at the second phase.
    Sources disagree on a sequence-wise loss before Large: none here. On 512 GPUs, weights
    over 128 ranks (section 3.3).
    """
    return RunConfig(
        scale=scale,
        model=model,
        data=DataConfig(sequence_length=4096),
        balance=BalanceConfig(method="sign", rate=1e-3, sequence_loss=0.0),
        optim=OptimConfig(muon_rate=1e-3, adamw_rate=adamw_rate),
        phases=(
            Phase(tokens=7 * 10**12, batch=4096, warmup=2000),
            Phase(tokens=18 * 10**11, batch=8192),
            Phase(tokens=12 * 10**11, batch=8192, shape="linear", end=0.0),
        ),
        parallel=ParallelConfig(replicate=4, shard=128),
        micro_batches=2048,
        recompute=True,
        z_loss=0.0,
        evaluate_every=1000,
        checkpoint_every=1000,
        record_every=100,
    )


def main() -> None:
    """Print every scale's parameter counts."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    header = ("scale", "total", "active", "with head", "with embeddings", "expert biases")
    lines = ["{:6} {:>17} {:>15} {:>15} {:>16} {:>14}".format(*header)]
    for name, recipe in SCALES.items():
        c = count_parameters(recipe().model)
        row = (c.total, c.active, c.active_with_head, c.active_with_embeddings, c.expert_bias)
        lines.append("{:6} {:>17,} {:>15,} {:>15,} {:>16,} {:>14,}".format(name, *row))
    with one_sentence():
        print("\n".join(lines))


if __name__ == "__main__":
    main()
