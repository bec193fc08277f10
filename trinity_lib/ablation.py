"""Which experts carry a planted fact or bias: each is taken out in turn, and what changes.

An effect is causal for this model and these questions, and no more: other experts may hold
the same and step in, and an expert that many tokens use does more to everything. So an
effect is set beside those of all other experts.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr

from trinity_lib import stage_schema
from trinity_lib.config import require
from trinity_lib.model import Trinity
from trinity_lib.routing import Routing

Mode = Literal["reroute", "zero"]
"""`reroute`: no token may choose the expert, the next best takes its place; `zero`: it keeps
its tokens and weights, and adds nothing."""
Measure = Callable[[Trinity], float]
"""Deterministic, such as a loss, a recall or an association's slope; it asks the model."""


class Ablation(NamedTuple):
    """What taking out every expert does. Arrays are [measure, layer, expert]."""

    measures: tuple[str, ...]
    layers: tuple[int, ...]
    """Layers with experts, numbered as in the model."""
    whole_M: np.ndarray
    """Each measure with all experts."""
    effect_MLE: np.ndarray
    """The measure without the expert, less whole; 0 where none of its tokens chooses it."""
    used_MLE: np.ndarray
    """Share of the tokens that the measure routes, padding among them, that choose it."""

    @property
    def rank_MLE(self) -> np.ndarray:
        """Of an effect's size among the experts used, 1 the largest; NaN: not used."""
        return _each(_ranked, self.effect_MLE, self.used_MLE)

    @property
    def z_MLE(self) -> np.ndarray:
        """Effect less the other used experts' mean, over their standard deviation; else NaN.

        Nothing is tested here: of n experts that are alike, the largest is at about
        sqrt(2 ln n), and further where use is uneven.
        """
        return _each(_standing, self.effect_MLE, self.used_MLE)


@contextlib.contextmanager
def without(
    model: Trinity, layer: int, expert: int, mode: Mode = "reroute"
) -> Iterator[Trinity]:
    """The model without one expert, and afterwards whole again, whatever happened.

    `layer` counts as in the model. Experts must be chosen by the stored bias, as all
    inference does. BadValue where there is no such expert, or no other to take its place.
    """
    router, layers = model.config.router, model.config.moe_layers
    require(layer in layers, "layer", layer, f"one with experts, {list(layers)}")
    right = f"from 0 to {router.num_experts - 1}"
    require(0 <= expert < router.num_experts, "expert", expert, right)
    require(mode in ("reroute", "zero"), "mode", mode, "reroute or zero")
    spare = mode == "zero" or router.num_experts > router.top_k
    require(spare, "mode", mode, "zero where a token takes all experts")
    block: Any = model.blocks[layer]
    held = block.router.bias_E if mode == "reroute" else block.experts.down_EFD.data
    before = held[expert].clone()
    held[expert] = -torch.inf if mode == "reroute" else 0
    try:
        yield model
    finally:
        held[expert] = before


@torch.no_grad()
def effects(
    model: Trinity, measures: Mapping[str, Measure], *, mode: Mode = "reroute"
) -> Ablation:
    """Every measure without every expert that its tokens choose; the model stays as it is.

    That is one call of a measure for each expert it uses, and one more.
    """
    require(len(measures) > 0, "measures", 0, "at least one")
    layers = tuple(model.config.moe_layers)
    require(len(layers) > 0, "model", "dense", "one with experts")
    shape = (len(measures), len(layers), model.config.router.num_experts)
    whole_M, effect_MLE, used_MLE = np.empty(len(measures)), np.zeros(shape), np.zeros(shape)
    for m, (name, measure) in enumerate(measures.items()):
        with _counted(model) as count_LE:
            whole_M[m] = _finite(name, measure(model))
        require(
            bool(count_LE.any()),
            f"measure {name}",
            "without a token",
            "one that asks the model",
        )
        used_MLE[m] = _shares(count_LE, model.config.router.top_k)
        for number, expert in np.argwhere(count_LE > 0).tolist():
            with without(model, layers[number], expert, mode):
                found = _finite(name, measure(model))
            effect_MLE[m, number, expert] = found - whole_M[m]
    return Ablation(tuple(measures), layers, whole_M, effect_MLE, used_MLE)


def _finite(name: str, value: float) -> float:
    require(bool(np.isfinite(value)), f"measure {name}", value, "a finite number")
    return float(value)


@contextlib.contextmanager
def _counted(model: Trinity) -> Iterator[np.ndarray]:
    """Counts [layer, expert] of the choices of whatever the model is asked meanwhile."""
    routers = model.routers()
    count_LE = np.zeros((len(routers), model.config.router.num_experts), dtype=np.int64)

    def counting(row: np.ndarray) -> Callable[[Any, Any, Routing], None]:
        def count(_: Any, __: Any, routing: Routing) -> None:
            chosen = routing.experts_TK[routing.experts_TK >= 0].cpu().numpy()
            row[:] += np.bincount(chosen, minlength=len(row))

        return count

    hooks = [
        router.register_forward_hook(counting(row))
        for router, row in zip(routers, count_LE, strict=True)
    ]
    try:
        yield count_LE
    finally:
        for hook in hooks:
            hook.remove()


def _shares(count_LE: np.ndarray, top_k: int) -> np.ndarray:
    """Of the tokens; a layer's sum to `top_k`."""
    return count_LE * top_k / np.maximum(count_LE.sum(1, keepdims=True), 1)


def _each(
    function: Callable[[np.ndarray], np.ndarray], effect_MLE: np.ndarray, used_MLE: np.ndarray
) -> np.ndarray:
    """A function of the used experts' effects, measure by measure; NaN where not used."""
    found_MLE = np.full(effect_MLE.shape, np.nan)
    for found_LE, effect_LE, used_LE in zip(found_MLE, effect_MLE, used_MLE, strict=True):
        found_LE[used_LE > 0] = function(effect_LE[used_LE > 0])
    return found_MLE


def _ranked(effect: np.ndarray) -> np.ndarray:
    size = np.abs(effect)
    larger = (size > size[:, None]).sum(1)
    same = (size == size[:, None]).sum(1)
    return larger + (same + 1) / 2  # those alike share a place


def _standing(effect: np.ndarray) -> np.ndarray:
    """NaN where fewer than two others, or none that differ."""
    found = np.full(len(effect), np.nan)
    for number, value in enumerate(effect):
        others = np.delete(effect, number)
        if len(others) > 1 and np.ptp(others) > 0:
            found[number] = (value - others.mean()) / others.std(ddof=1)
    return found


def dataset(stages: Mapping[str, Ablation]) -> xr.Dataset:
    """The group `ablation`: stages of one shape, asked the same measures."""
    require(len(stages) > 0, "stages", 0, "at least one")
    every: Sequence[Ablation] = list(stages.values())
    kinds = {(each.measures, each.layers, each.effect_MLE.shape) for each in every}
    require(len(kinds) == 1, "stages", list(stages), "of the same measures and experts")
    values = {
        "whole": [each.whole_M for each in every],
        "effect": [each.effect_MLE for each in every],
        "used": [each.used_MLE for each in every],
        "rank": [each.rank_MLE for each in every],
        "z": [each.z_MLE for each in every],
    }
    at = {
        "ablated": list(stages),
        "measure": list(every[0].measures),
        "layer": list(every[0].layers),
        "expert": np.arange(every[0].effect_MLE.shape[-1]),
    }
    return stage_schema.dataset("ablation", values, at)
