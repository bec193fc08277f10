"""A run made up in memory, for tests of measures and figures."""

import json

import numpy as np
import xarray as xr

from trinity_lib.schema import SCHEMA


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
        if name == "choices":
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
