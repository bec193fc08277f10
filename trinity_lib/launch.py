"""A run from a notebook's parameters: checked first, then put where it fits."""

import ast
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from IPython import get_ipython

from trinity_lib import recipes
from trinity_lib.config import convert, override, require
from trinity_lib.session import RunConfig
from trinity_lib.train import RUNS, train


def configure(
    *,
    scale: str = "toy",
    steps: int | None = None,
    seed: int = 0,
    balance: str | None = None,
    balance_rate: float | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    optimizer: str | None = None,
    learning_rate: float | None = None,
    rsdb: int | None = None,
    micro_batches: int | None = None,
    recompute: bool | None = None,
    threads: int | None = None,
    device: str | None = None,
    name: str = "",
) -> RunConfig:
    """The run that a notebook's parameters describe; None takes the scale's own value.

    `learning_rate` is the peak of Muon (of AdamW under `optimizer="adamw"`); other rates
    keep their ratio to it. ValueError, one sentence, for a parameter that is unknown to
    this call (papermill only warns of it), of another type, or out of range.
    """
    given = _converted(locals())
    refuse_unknown(given)
    require(scale in recipes.SCALES, "scale", scale, f"one of {', '.join(recipes.SCALES)}")
    config = recipes.SCALES[scale]()
    if scale not in recipes.EMBEDDED:
        raise ValueError(
            f"scale {scale!r} needs text and a tokenizer of {config.model.vocab_size:,} "
            f"entries; the embedded corpus serves {' and '.join(recipes.EMBEDDED)}."
        )
    paths = {
        "seed": "seed",
        "balance": "balance.method",
        "balance_rate": "balance.rate",
        "num_experts": "model.router.num_experts",
        "top_k": "model.router.top_k",
        "optimizer": "optim.optimizer",
        "rsdb": "data.rsdb",
        "micro_batches": "micro_batches",
        "recompute": "recompute",
        "threads": "threads",
        "device": "device",
        "name": "name",
    }
    changes = {path: given[p] for p, path in paths.items() if given[p] is not None}
    config = override(config, changes)
    if given["learning_rate"] is not None:
        config = override(config, _rates(config, given["learning_rate"]))
    if given["steps"] is not None:
        config = recipes.with_steps(config, given["steps"])
    if config.device == "cuda":
        require(
            torch.cuda.is_available(), "device", "cuda", "cpu: this machine has no CUDA GPU"
        )
    return config


def run(config: RunConfig) -> xr.DataTree:
    """Train here and return the finished run."""
    return train(config)


def _rates(config: RunConfig, peak: float) -> dict[str, float]:
    require(peak > 0, "learning_rate", peak, "above zero")
    optim = config.optim
    own = optim.muon_rate if optim.optimizer == "muon" else optim.adamw_rate
    return {
        "optim.muon_rate": optim.muon_rate * peak / own,
        "optim.adamw_rate": optim.adamw_rate * peak / own,
    }


def _converted(given: Mapping[str, Any]) -> dict[str, Any]:
    hints = inspect.get_annotations(configure, eval_str=True)
    return {name: convert(hints[name], value, name) for name, value in given.items()}


def refuse_unknown(known: Iterable[str]) -> None:
    """ValueError for a parameter that papermill injected and the notebook does not have."""
    for name in injected():
        if name not in known:
            raise ValueError(
                f"there is no parameter {name!r}; this notebook has {', '.join(known)}."
            )


def injected() -> list[str]:
    """Names assigned in the cell papermill put in, as the kernel saw it; none elsewhere."""
    shell = get_ipython()
    cells = shell.user_ns.get("In", []) if shell is not None else []
    names = []
    for cell in cells:
        if cell.startswith("# Parameters"):
            for node in ast.parse(cell).body:
                if isinstance(node, ast.Assign):
                    names += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return names


def describe(config: RunConfig) -> str:
    """One line on what is about to run."""
    model, router = config.model, config.model.router
    steps = sum(config.steps)
    return (
        f"{config.scale}: {router.num_experts} experts, top-{router.top_k}, "
        f"{model.num_layers} layers, {steps} steps of {config.phases[0].batch} x "
        f"{config.data.sequence_length} tokens, {config.optim.optimizer}, "
        f"balance {config.balance.method} at {config.balance.rate:g}"
    )


def run_file(run: xr.DataTree) -> Path:
    """Where a finished run's file is."""
    return RUNS / f"{run.attrs['name']}.nc"
