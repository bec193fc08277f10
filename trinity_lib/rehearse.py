"""A run that is too large for this machine, taken as far as shapes go: rehearsed, not trained.

    python -m trinity_lib.rehearse --config F --gpu B300      # RunConfig as JSON

It is planned; the real model is sharded over ranks that are not there; a step of rank 0 is
traced with fake tensors. The run file says what each of these gave, side by side.
"""

import argparse
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from trinity_lib import plan, ranks, serving, trace
from trinity_lib.config import from_file, to_json
from trinity_lib.footprint import Memory
from trinity_lib.holdings import KINDS, Held, count_held
from trinity_lib.plan import Cluster, Plan
from trinity_lib.record import ROOT, Claim, Writer, provenance
from trinity_lib.run import RunConfig, named
from trinity_lib.trace import Trace

RUNS = ROOT / "runs"
GPUS = {"large": "B300"}
"""The kind of GPU that a scale was trained on, where it was not H200."""
ROUTING = "balanced: every expert rank is sent as many rows, for tensors without values"
TRACED = (
    "rank 0's optimiser step and micro-batches of all layers, with fake tensors of the CPU "
    "that take CUDA's kernels: bf16 products over fp32 weights, attention with a mask, fused "
    "norms, experts by the torch backend; allocator, NCCL and CUDA context are not in it"
)


def rehearse(
    config: RunConfig,
    cluster: Cluster,
    *,
    runs: Path = RUNS,
    say: Callable[[str], object] = ranks.say,
) -> xr.DataTree:
    """Rehearse `config` as if on `cluster` and return the run, which is also a file in `runs`.

    Its status is `rehearsed`, its reason what training would need and this machine has.
    BadValue where the ranks are not the cluster's GPUs; Taken where the name is taken.
    """
    config = named(config)
    begun, parallel = time.monotonic(), config.parallel
    say(
        f"rehearsing {config.name}: {cluster.count:,} {cluster.gpu}, replicate "
        f"{parallel.replicate} x shard {parallel.shard}, experts over {parallel.experts}"
    )
    planned = _planned(config, cluster)
    say(plan.describe(planned))
    claim = Claim(runs / config.name)
    try:
        held, traced = _tried(config, planned, say)
        say(verdict(planned, traced))
        writer = Writer(
            claim.folder,
            {
                **_attributes(config, planned, held, traced),
                "seconds": time.monotonic() - begun,
            },
            _coordinates(traced),
            claim=claim,
        )
    except BaseException:
        claim.release()
        raise
    for name, table in _tables(config, planned, held, traced).items():
        writer.table(name, table)
    reason = shortfall(cluster)
    writer.close("rehearsed", reason)
    say(reason)
    assert writer.whole is not None
    return writer.whole


def micro_batch_rows(config: RunConfig) -> int:
    """Rows that a rank computes at once where the schedule's batch is largest."""
    batches = [r for p in config.phases for r in (p.batch, *(p.larger_batch or ())[1:])]
    return max(batches) // config.micro_batches


def shortfall(cluster: Cluster) -> str:
    """That nothing was trained, what that needs, and what this machine has."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = f"has {count}" if count else "has none"
    many = "GPUs" if cluster.count > 1 else "GPU"
    return (
        f"REHEARSED, NOT TRAINED: it needs {cluster.count:,} {cluster.gpu} {many} of "
        f"{cluster.kind.memory / 1e9:.0f} GB; this machine {here}."
    )


def verdict(planned: Plan, traced: Trace) -> str:
    """Whether the traced step fits the GPU, in a sentence."""
    moment, peak = _fullest(traced)
    usable, kind = serving.usable(planned.cluster.kind), planned.cluster.kind
    fits = "fits" if peak <= usable else "does not fit"
    return (
        f"traced: {peak / 1e9:,.3g} GB a GPU at most, in {_moment(moment)} (planned: "
        f"{planned.peak.total / 1e9:,.3g} GB): {fits} the {kind.memory / 1e9:,.0f} GB of a "
        f"{kind.name}, a tenth left free"
    )


def _planned(config: RunConfig, cluster: Cluster) -> Plan:
    length = config.data.sequence_length
    return plan.make(
        config.model,
        config.parallel,
        cluster,
        tokens=sum(phase.tokens for phase in config.phases),
        micro_tokens=micro_batch_rows(config) * length,
        length=length,
        recompute=config.recompute,
        optimizer=config.optim.optimizer,
    )


def _tried(
    config: RunConfig, planned: Plan, say: Callable[[str], object]
) -> tuple[Held, Trace]:
    """Shard the real model over pretended ranks, and trace a step of rank 0."""
    total, count = planned.counts.total, config.parallel.ranks
    rows, length = micro_batch_rows(config), config.data.sequence_length
    with trace.pretended(config.parallel) as layout:
        say(f"sharding {total:,} parameters over {count:,} ranks ...")
        sharded = trace.shard(config, layout)
        held = count_held(sharded, config.parallel)
        say(f"rank 0 holds {held.rank_0.sum():,} parameters")
        say(
            f"tracing a step of rank 0, micro-batches of {rows} x {length:,} tokens through "
            f"{config.model.num_layers} layers ..."
        )
        return held, trace.step(config, sharded, rows, say)


def _attributes(config: RunConfig, planned: Plan, held: Held, traced: Trace) -> dict[str, Any]:
    text, cluster, counts = to_json(config), planned.cluster, planned.counts
    moment, peak = _fullest(traced)
    totals = held.every.sum(1)
    return {
        **provenance(),
        **planned.cost._asdict(),
        "name": config.name,
        "scale": config.scale,
        "seed": config.seed,
        "config": text,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "device": "none: nothing is computed",
        "parameters_total": counts.total,
        "parameters_active": counts.active,
        "parameters_active_with_embeddings": counts.active_with_embeddings,
        "parameters_a_rank": int(held.rank_0.sum()),
        "parameters_held_least": int(totals.min()),
        "parameters_held_most": int(totals.max()),
        "rank_with_least": int(totals.argmin()),
        "rank_with_most": int(totals.argmax()),
        "ranks": config.parallel.ranks,
        "gpu": cluster.gpu,
        "price": cluster.dollars_per_hour,
        "efficiency": cluster.efficiency,
        "bytes_usable": serving.usable(cluster.kind),
        "summary": plan.describe(planned),
        "verdict": verdict(planned, traced),
        "planned_peak_bytes": planned.peak.total,
        "traced_peak_bytes": peak,
        "traced_peak_moment": _moment(moment),
        "fits": peak <= serving.usable(cluster.kind),
        "micro_batch_rows": micro_batch_rows(config),
        "micro_batches_a_rank": config.micro_batches // config.parallel.ranks,
        "layers_traced": config.model.num_layers,
        "operators_traced": traced.operators,
        "routing": ROUTING,
        "balance_traced": traced.balance,
        "traced": TRACED,
    }


def _coordinates(traced: Trace) -> dict[str, Any]:
    return {
        "kind": list(KINDS),
        "moment": [_moment(moment) for moment in trace.MOMENTS],
        "part": list(Memory._fields),
        "direction": list(trace.DIRECTIONS),
        "operator": list(trace.OPERATORS),
        "collective": [f"{each.kind} of {each.ranks:,}" for each in traced.traffic],
    }


def _tables(
    config: RunConfig, planned: Plan, held: Held, traced: Trace
) -> dict[str, Mapping[str, Any]]:
    totals = held.every.sum(1)
    unknown = [math.nan] * len(Memory._fields)
    expected = _operations(config, planned)
    moved = traced.traffic.values()
    return {
        "parameters": {
            "whole": held.whole,
            "rank_0": held.rank_0,
            "least": held.every[totals.argmin()],
            "most": held.every[totals.argmax()],
        },
        "rehearsed_memory": {
            "planned": [list(_at(planned, moment) or unknown) for moment in trace.MOMENTS],
            "traced": [list(traced.memory[moment]) for moment in trace.MOMENTS],
        },
        "operations": {
            "planned": [
                [expected.get((d, o), math.nan) for o in trace.OPERATORS]
                for d in trace.DIRECTIONS
            ],
            "traced": [
                [traced.flops.get((d, o), 0) for o in trace.OPERATORS] for d in trace.DIRECTIONS
            ],
        },
        "collectives": {
            "ranks": [each.ranks for each in traced.traffic],
            "calls": [each.calls for each in moved],
            "bytes": [each.bytes for each in moved],
            "sent": [each.sent for each in moved],
        },
    }


def _operations(config: RunConfig, planned: Plan) -> dict[tuple[str, str], float]:
    """FLOP of a micro-batch as planned; backward repeats the blocks' forward to recompute."""
    tokens = micro_batch_rows(config) * config.data.sequence_length
    each, again = planned.flops, int(config.recompute)
    products = each.forward - each.attention - each.routed
    forward = {"products": products, "attention": each.attention, "experts": each.routed}
    found = {("forward", name): tokens * count for name, count in forward.items()}
    for name, count in forward.items():
        repeated = again * (count - each.head if name == "products" else count)
        found["backward", name] = tokens * (2 * count + repeated)
    return found


def _fullest(traced: Trace) -> tuple[str, int]:
    totals = {moment: memory.total for moment, memory in traced.memory.items()}
    moment = max(totals, key=lambda each: totals[each])
    return moment, totals[moment]


def _at(planned: Plan, moment: str) -> Memory | None:
    """What is planned for a moment; None where nothing is."""
    return next((found for each, found in planned.memory.items() if each == moment), None)


def _moment(moment: str) -> str:
    """What figures call a moment."""
    return next((name for each, name in plan.MOMENTS.items() if each == moment), moment)


@ranks.recorded
def main() -> None:
    """Rehearse a run from its configuration file and print the run's path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="RunConfig as JSON")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of run files")
    parser.add_argument("--gpu", help="kind of GPU, one for each rank; else the scale's own")
    parser.add_argument("--price", type=float, help="dollars per GPU-hour; else the kind's")
    parser.add_argument(
        "--efficiency", type=float, default=Cluster.efficiency, help="share of the bf16 peak"
    )
    given = parser.parse_args()
    config = from_file(RunConfig, given.config)
    cluster = Cluster(
        gpu=given.gpu or GPUS.get(config.scale, "H200"),
        count=config.parallel.ranks,
        price=given.price,
        efficiency=given.efficiency,
    )
    run = rehearse(config, cluster, runs=given.runs)
    print(given.runs / f"{run.attrs['name']}.nc", flush=True)


if __name__ == "__main__":
    main()
