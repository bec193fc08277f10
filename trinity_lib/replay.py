"""Routing held to the choices another run recorded, and whether that run fits."""

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from trinity_lib.config import BadValue, from_json
from trinity_lib.record import open_run
from trinity_lib.run import RunConfig, schedule


class Choices:
    """The experts that every token took at every step of a recorded run."""

    def __init__(self, recorded: xr.DataArray) -> None:
        self.recorded = recorded

    def of(self, step: int, tokens: int) -> np.ndarray:
        """experts_LTK, int64, of optimiser step `step` (from 1)."""
        return self.recorded.sel(step=step).values[:, :tokens].astype(np.int64)


def load(config: RunConfig, facts: dict[str, Any]) -> Choices:
    """The choices that `config.replay` names; BadValue where they are of other tokens.

    `facts` are this run's hashes of corpus and tokenizer. What the tokens of a step are
    must agree: text, tokenizer, seed, order, batches; so must layers, experts and top-k.
    Balancer, optimiser, split and device may differ: comparing them is what a replay is for.
    """
    path = Path(config.replay)
    run = open_run(path)
    if "choices" not in run:
        raise BadValue(
            f"replay is {config.replay!r}; it must be a run that recorded its choices "
            "(record_choices)."
        )
    recorded = run["choices"].to_dataset()["expert"]
    old = from_json(RunConfig, run.attrs["config"])
    pairs = {
        "seed": (old.seed, config.seed),
        "rsdb": (old.data.rsdb, config.data.rsdb),
        "sequence_length": (old.data.sequence_length, config.data.sequence_length),
        "experts": (old.model.router.num_experts, config.model.router.num_experts),
        "top_k": (old.model.router.top_k, config.model.router.top_k),
        "MoE layers": (list(old.model.moe_layers), list(config.model.moe_layers)),
    }
    pairs |= {name: (run.attrs[name], value) for name, value in facts.items()}
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise BadValue(
                f"replay is {config.replay!r}, whose {name} is {theirs!r}; this run's is "
                f"{ours!r}, and both must read the same tokens."
            )
    _same_batches(config, old, recorded)
    return Choices(recorded)


def _same_batches(config: RunConfig, old: RunConfig, recorded: xr.DataArray) -> None:
    plan, before = schedule(config), schedule(old)
    last = int(recorded.step[-1])
    if len(plan) > last:
        raise BadValue(
            f"replay is {config.replay!r}, which recorded {last} steps; this run has "
            f"{len(plan)}."
        )
    for number, (new, was) in enumerate(zip(plan, before, strict=False)):
        mixtures = [c.phases[s.phase].mixture for c, s in ((config, new), (old, was))]
        starts = [s.number == 0 for s in (new, was)]  # a phase's start resets the mixture
        if new.rows != was.rows or mixtures[0] != mixtures[1] or starts[0] != starts[1]:
            raise BadValue(
                f"replay is {config.replay!r}, whose step {number + 1} has another batch or "
                "mixture; both must read the same tokens (the same number of steps)."
            )


def padded(choices_LTK: np.ndarray, tokens: int) -> np.ndarray:
    """One step's choices for the run file: int16, filled with -1 up to `tokens`."""
    missing = tokens - choices_LTK.shape[1]
    filled = np.pad(choices_LTK, ((0, 0), (0, missing), (0, 0)), constant_values=-1)
    return filled.astype(np.int16)


def hashes(corpus: str, tokenizer: str) -> dict[str, str]:
    """The facts that `load` compares, by their names in the run file."""
    return {"corpus_sha256": corpus, "tokenizer_sha256": tokenizer}
