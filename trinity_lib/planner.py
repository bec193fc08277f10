"""A plan as a run file: everything its figures draw, from `plan` and `serving`.

python -m trinity_lib.planner --config F          # PlanConfig as JSON
"""

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from trinity_lib import articles, flops, plan, recipes, serving
from trinity_lib.articles import LARGE
from trinity_lib.config import Refusal, from_file, one_sentence, to_json
from trinity_lib.flops import Flops
from trinity_lib.footprint import Memory
from trinity_lib.gpus import KINDS
from trinity_lib.plan import Fit, Plan
from trinity_lib.plan_config import PlanConfig, active
from trinity_lib.record import Claim, Writer, open_run, provenance
from trinity_lib.run import fresh_name
from trinity_lib.train import RUNS

EFFICIENCIES = (0.05, 0.08, 0.15, 0.2, 0.3, 0.4)
"""Shares of the bf16 peak beside the planned one: the low end is 671B on 256 GPUs without
tuning, 0.2 to 0.34 is usual for fine-grained experts, 0.4 is what few reach."""
PRICES = (2.0, 3.0, 4.5, 8.0, 10.0, 12.5)
"""Dollars per GPU-hour beside the planned one: five years reserved to on demand."""
CARDS = ("L40S", "RTX 4090")
"""GPUs on which one sequence is decoded with experts in host memory."""
SEQUENCES = tuple(2**i for i in range(11))
"""Sequences decoded together whose reads are drawn."""
Table = Mapping[str, Any]


def draw_up(config: PlanConfig, *, runs: Path = RUNS) -> xr.DataTree:
    """Plan, and return the run, which is also a file in `runs`.

    Raises Taken where the run's name is taken.
    """
    if not config.name:
        name = fresh_name(f"plan-{config.scale}", config)
        config = dataclasses.replace(config, name=name)
    planned = config.plan
    claim = Claim(runs / config.name)
    try:
        writer = Writer(
            claim.folder, _attributes(config, planned), _coordinates(config), claim=claim
        )
    except BaseException:
        claim.release()
        raise
    try:
        for name, table in _tables(config, planned).items():
            writer.table(name, table)
        return open_run(writer.close("complete"))
    except BaseException as error:
        reason = (
            str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
        )
        writer.close("failed", reason)
        raise


def _attributes(config: PlanConfig, planned: Plan) -> dict[str, Any]:
    text, model = to_json(config), planned.model
    dollars = LARGE.dollars if config.scale == "large" else math.nan
    counts = {f"parameters_{k}": v for k, v in planned.counts._asdict().items()}
    return {
        **provenance(),
        **counts,
        **planned.cost._asdict(),
        "name": config.name,
        "scale": config.scale,
        "seed": 0,
        "config": text,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "device": "none: nothing is computed",
        "summary": plan.describe(planned),
        "sequence_length": config.length,
        "parameters_held_least": planned.held[0],
        "parameters_held_most": planned.held[1],
        "bytes_usable": serving.usable(planned.cluster.kind),
        "headroom": serving.HEADROOM,
        "cache_bytes": serving.cache_bytes(model, config.context, batch=config.batch),
        "cache_bytes_full": serving.cache_bytes(
            model, config.context, batch=config.batch, windows=False
        ),
        "published_dollars": dollars,
        "implied_price": plan.implied_price(dollars, config.gpus, config.days),
    }


def _coordinates(config: PlanConfig) -> dict[str, Any]:
    return {
        "gpu": list(KINDS),
        "moment": list(plan.MOMENTS.values()),
        "part": list(Memory._fields),
        "operation": list(Flops._fields),
        "efficiency": _with(EFFICIENCIES, config.efficiency),
        "price": _with(PRICES, config.price),
        "reckoning": list(_reckoned(config, config.plan)),
        "precision": list(serving.PRECISIONS),
        "card": list(CARDS),
        "host": list(serving.hosts(KINDS[CARDS[0]])),
        "sequences": list(SEQUENCES),
        "quantity": [row[0] for row in _published()],
        "article": [each.claim for each in articles.every()],
    }


def _with(values: tuple[float, ...], planned: float) -> list[float]:
    """The values and the planned one, without those next to it."""
    apart = [v for v in values if not planned / 1.15 < v < planned * 1.15]
    return sorted([*apart, planned])


def _tables(config: PlanConfig, planned: Plan) -> dict[str, Table]:
    model = planned.model
    every = articles.every()
    checks = _published()
    return {
        "gpus": {
            field.name: [getattr(kind, field.name) or math.nan for kind in KINDS.values()]
            for field in dataclasses.fields(planned.cluster.kind)
            if field.name not in ("name", "interconnect")
        },
        "memory": {"bytes": [list(planned.memory[moment]) for moment in plan.MOMENTS]},
        "flops": {"forward": list(planned.flops)},
        "cost": _cost(config, planned),
        "reckonings": _reckonings(config, planned),
        "fits": _fits(config, planned),
        "offload": _offload(config, planned),
        "traffic": {"read": [serving.read_parameters(model, n) for n in SEQUENCES]},
        "published": {
            "published": [row[1] for row in checks],
            "computed": [row[2] for row in checks],
            "unit": [row[3] for row in checks],
        },
        "articles": {
            name: [getattr(each, name) for each in every]
            for name in ("said", "figure", "unit", "verdict", "finding")
        },
    }


def _cost(config: PlanConfig, planned: Plan) -> Table:
    grid = _coordinates(config)
    costs = [
        [
            plan.cost(
                dataclasses.replace(planned.cluster, efficiency=efficiency, price=price),
                planned.flops.training,
                config.tokens,
            )
            for price in grid["price"]
        ]
        for efficiency in grid["efficiency"]
    ]
    return {
        "days": [row[0].days for row in costs],
        "dollars": [[each.dollars for each in row] for row in costs],
    }


def _reckoned(config: PlanConfig, planned: Plan) -> dict[str, tuple[float, float]]:
    """Ways to count a run's operations: (N, operations)."""
    counts, published = planned.counts, active(config)
    named = {
        f"6ND, N = {published / 1e9:.3g}B as published": published,
        "6ND, own N without embeddings": counts.active,
        "6ND, own N with the head": counts.active_with_head,
        "6ND, own N with both embeddings": counts.active_with_embeddings,
    }
    if config.scale not in articles.ACTIVE:
        named.pop(next(iter(named)))
    found = {name: (float(n), flops.six_nd(n, config.tokens)) for name, n in named.items()}
    return found | {"every product of the shapes": (math.nan, _operations(config, planned))}


def _operations(config: PlanConfig, planned: Plan) -> float:
    return planned.flops.training * config.tokens


def _reckonings(config: PlanConfig, planned: Plan) -> Table:
    numbers, operations = np.array(list(_reckoned(config, planned).values())).T
    rate = np.array([plan.implied_rate(each, config.gpus, config.days) for each in operations])
    return {
        "parameters": numbers,
        "operations": operations,
        "rate": rate,
        "efficiency": rate / planned.cluster.kind.bf16,
    }


def _fits(config: PlanConfig, planned: Plan) -> Table:
    model = planned.model
    trained: list[Fit] = [
        plan.least_gpus(
            model,
            kind,
            micro_tokens=config.micro_tokens,
            length=config.length,
            recompute=config.recompute,
            optimizer=config.recipe.optim.optimizer,
            most_experts=config.expert_parallel,
        )
        for kind in KINDS.values()
    ]
    stored = [
        [
            serving.least_gpus(model, kind, bits, config.context, config.batch)
            for bits in serving.PRECISIONS.values()
        ]
        for kind in KINDS.values()
    ]
    decoded = [
        [
            serving.decoding(model, kind, bits, config.context, gpus)
            for bits, gpus in zip(serving.PRECISIONS.values(), counts, strict=True)
        ]
        for kind, counts in zip(KINDS.values(), stored, strict=True)
    ]
    return {
        "training_gpus": [fit.gpus for fit in trained],
        "training_bytes": [fit.bytes for fit in trained],
        "training_experts": [fit.experts for fit in trained],
        "bits": list(serving.PRECISIONS.values()),
        "inference_gpus": stored,
        "decoding": decoded,
    }


def _offload(config: PlanConfig, planned: Plan) -> Table:
    found = [
        [
            [
                serving.offload(planned.model, KINDS[card], bits, config.context, bandwidth)
                for bits in serving.PRECISIONS.values()
            ]
            for bandwidth in serving.hosts(KINDS[card]).values()
        ]
        for card in CARDS
    ]
    return {
        "resident": found[0][0][0].resident,
        "experts": [each.experts for each in found[0][0]],
        "cached": [[each.cached for each in by_host[0]] for by_host in found],
        "bandwidth": [list(serving.hosts(KINDS[card]).values()) for card in CARDS],
        "host_bound": [
            [[each.host_bound for each in row] for row in by_host] for by_host in found
        ],
        "decoding": [
            [[each.tokens_per_second for each in row] for row in by_host] for by_host in found
        ],
    }


def _published() -> list[tuple[str, float, float, str]]:
    """What is published of Large and follows from its shapes."""
    model = recipes.large().model
    operations = flops.six_nd(LARGE.active, LARGE.tokens)
    total = serving.counted(model).total
    cache = serving.cache_bytes(model, 1, windows=False)
    rate = plan.implied_rate(operations, LARGE.gpus, LARGE.days)
    return [
        ("bf16 weights, 31 files", 797.0, serving.weight_bytes(total, 16) / 1e9, "GB"),
        ("cache, every layer whole", 240.0, cache / 1024, "KiB a token"),
        ("operations, 6ND, N = 13B", 1.33, operations / 1e24, "10^24 FLOP"),
        ("a GPU's rate over 33 days", 227.0, rate / 1e12, "TFLOP/s"),
    ]


def main() -> None:
    """Plan as a configuration file says and print the run's path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="PlanConfig as JSON")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of run files")
    given = parser.parse_args()
    with one_sentence():
        run = draw_up(from_file(PlanConfig, given.config), runs=given.runs)
        print(given.runs / f"{run.attrs['name']}.nc")


if __name__ == "__main__":
    main()
