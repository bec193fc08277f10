"""A run made up in memory, for tests of measures and figures."""

import json

import numpy as np
import xarray as xr

from trinity_lib.schema import SCHEMA, TABLES


def run(
    steps: int = 40, layers: int = 2, experts: int = 8, method: str = "smebu", dead: int = 0
) -> xr.DataTree:
    """A run whose last `dead` experts get nothing; loads are otherwise uneven by a seed."""
    generator = np.random.default_rng(0)
    sizes = {"layer": layers, "expert": experts, "split": 1, "domain": 2}
    labels = {
        "layer": np.arange(1, layers + 1),
        "expert": np.arange(experts),
        "split": ["validation"],
        "domain": ["code", "prose"],
    }
    when = {"train": steps, "layers": steps, "routing": steps, "evaluation": 3}
    groups = {}
    for name, variables in SCHEMA.items():
        if name not in when:
            continue
        at = np.linspace(0 if name == "evaluation" else 1, steps, when[name]).astype(int)
        data = {}
        for key, variable in variables.items():
            shape = [when[name], *(sizes[d] for d in variable.dims[1:])]
            values = generator.random(shape) + 0.5
            if key == "count":
                values = generator.integers(50, 200, shape)
                if dead:
                    values[..., -dead:] = 0
            meta = {"units": variable.units, "long_name": variable.long_name}
            data[key] = (variable.dims, values.astype(variable.dtype), meta)
        used = {d for v in variables.values() for d in v.dims[1:]}
        coordinates = {"step": at, **{d: labels[d] for d in used}}
        groups[name] = xr.Dataset(data, coordinates)
    groups["train"]["batch_tokens"][:] = 512
    groups["train"]["phase"][:] = np.arange(steps) * 2 // steps
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {
        "name": "made-up",
        "status": "complete",
        "seed": 0,
        "scale": "toy",
        "config": json.dumps(
            {
                "model": {"router": {"num_experts": experts, "top_k": 2}},
                "balance": {"method": method, "rate": 0.01},
                "data": {"rsdb": 0},
                "micro_batches": 4,
            }
        ),
        "parameters_total": 1000,
        "parameters_active_with_embeddings": 100,
        "truebase_step": steps // 2,
        "base_step": steps,
        "warnings": "[]",
    }
    return tree


def kernels(
    backends: tuple[str, ...] = ("torch", "native", "megablocks"),
    untimed: tuple[str, ...] = ("megablocks",),
    tokens: tuple[int, ...] = (32, 1024),
) -> xr.DataTree:
    """A run that measured kernels: native is twice as fast as torch, each within 3 epsilons."""
    generator = np.random.default_rng(0)
    labels = {
        "backend": list(backends),
        "tokens": list(tokens),
        "routing": ["balanced", "random", "collapsed"],
        "quantity": ["output", "token gradient", "expert weight gradient"],
        "direction": ["forward", "forward+backward"],
        "repetition": np.arange(4),
    }
    groups = {}
    for name in ("agreement", "speed"):
        variables, data = TABLES[name], {}
        for key, variable in variables.items():
            shape = [len(labels[d]) for d in variable.dims]
            meta = {"units": variable.units, "long_name": variable.long_name}
            data[key] = (variable.dims, generator.random(shape) + 1, meta)
        used = {d for v in variables.values() for d in v.dims}
        groups[name] = xr.Dataset(data, {d: labels[d] for d in used})
    epsilon = float(np.finfo(np.float32).eps)
    groups["agreement"]["error"] *= epsilon
    groups["speed"]["dense_rate"][:] = 1e11
    groups["speed"]["flops"] = groups["speed"]["flops"].copy(data=[[1e6, 3e6]] * len(tokens))
    seconds = groups["speed"]["seconds"]
    for number, backend in enumerate(backends):
        seconds.loc[{"backend": backend}] = seconds.sel(backend="torch") / (number + 1)
    for backend in untimed:
        seconds.loc[{"backend": backend}] = np.nan
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {
        "name": "made-up",
        "status": "complete",
        "seed": 0,
        "device_name": "",
        "dtype": "float32",
        "epsilon": epsilon,
        "not_measured": "{}",
        "not_timed": json.dumps({name: "it is interpreted" for name in untimed}),
        "config": json.dumps(
            {
                "num_experts": 8, "width": 16, "expert_width": 12, "top_k": 2,
                "shape": "toy", "threads": 2,
            }
        ),
    }  # fmt: skip
    return tree
