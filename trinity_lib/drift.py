"""How far weights moved between checkpoints of one model: every tensor, and every expert.

Checkpoints are read tensor by tensor. Held at one time are the same one of every stage, as
stored, a few megabytes of it in float64, and the pages of files of at most `hub.AT_ONCE`
bytes a stage: never a model.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

from trinity_lib import hub, intervals, stage_schema, stored
from trinity_lib.afmoe import Place, places
from trinity_lib.intervals import Interval
from trinity_lib.model import ModelConfig
from trinity_lib.stored import Stored

EXACT = 2**20
"""Elements of a matrix up to which its singular values are computed as such."""
CHUNK = 2**20
"""Elements that are float64 at one time."""


class Move(NamedTuple):
    """How one tensor moved."""

    norm: float
    """Frobenius norm before."""
    norm_after: float
    """And after."""
    moved: float
    """Frobenius norm of the change."""
    inner: float
    """Inner product of before and after."""
    effective_rank: float
    """Of the change; NaN where it is no matrix, or 0."""


def weights(
    folders: Mapping[str, str | Path],
    changes: Sequence[tuple[str, str]],
    *,
    load: xr.DataArray | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[xr.Dataset, xr.Dataset]:
    """The groups weight_drift and expert_drift of AFMoE checkpoints, by stage.

    Tensors have their released names, one an expert and matrix, also where a file holds all
    experts of a layer in one. `load` (stage, layer, expert), as `stage_routing` has it, is
    what expert drift is held against; without it loads are NaN. `progress` is told of every
    layer. Raises BadValue for a stage there is not, and for tensors of unlike shapes.
    """
    names = stage_schema.change_names(changes, list(folders))
    used = dict.fromkeys(stage for change in changes for stage in change)
    held = {stage: stored.inspect(Path(hub.local(folders[stage]))) for stage in used}
    stored.require_alike(held)
    first = next(iter(held.values()))
    where = places(first.config)
    found: dict[str, list[Move]] = {}
    at = -2
    for name, tensors in stored.streamed(held, list(where)):
        if progress is not None and _layer(name) != at:
            at = _layer(name)
            progress("weight drift: " + (name if at < 0 else f"layer {at}"))
        found[name] = [move(tensors[before], tensors[after]) for before, after in changes]
        del tensors  # before the next are read
    experts = _experts(first.config, where, found, names, _loads(load, changes))
    return _tensors(first, where, found, names), experts


def move(before: Tensor, after: Tensor) -> Move:
    """How a tensor moved, in float64.

    Singular values are exact up to EXACT elements. Beyond, they are the roots of the
    eigenvalues of the Gram matrix of the smaller side, where those below rounding (n times
    epsilon times the largest) count as 0. So singular values under sqrt(n epsilon), about
    1e-6 of the largest, are lost: 7e-6 of the effective rank of a spectrum that falls
    exponentially, less of flat ones and of power laws.
    """
    sums = np.zeros(4)
    matrix, large = before.dim() == 2, before.numel() > EXACT
    gram: Any = 0.0
    for a, b in _chunks(before, after):
        change = b - a
        pairs = ((a, a), (b, b), (change, change), (a, b))
        sums += [float(torch.dot(x.flatten(), y.flatten())) for x, y in pairs]
        if matrix and large:
            gram = gram + change.T @ change
    rank = math.nan
    if matrix and large:
        squares = torch.linalg.eigvalsh(gram).clamp(min=0)
        noise = len(squares) * torch.finfo(torch.float64).eps * squares.max()
        rank = effective_rank(torch.where(squares > noise, squares, 0).sqrt().numpy())
    elif matrix:
        values = torch.linalg.svdvals(after.double() - before.double())
        rank = effective_rank(values.numpy())
    norm, norm_after, moved = np.sqrt(sums[:3])
    return Move(float(norm), float(norm_after), float(moved), float(sums[3]), rank)


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of singular values over their sum; NaN where all are 0.

    Roy and Vetterli 2007 (The effective rank). From 1 to the rank.
    """
    total = singular_values.sum()
    if total == 0:
        return math.nan
    share = singular_values[singular_values > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def load_correlation(expert_drift: xr.Dataset, change: str, seed: int = 0) -> Interval:
    """Spearman's rank correlation of experts' relative drift and load, in one change.

    Ranks are within layers, which differ in both for reasons of their own; over layers the
    ranks, less their mean, are pooled. The interval resamples experts. NaN where loads are
    unknown, or all alike.
    """
    one = expert_drift.sel(change=change).transpose("layer", "expert")
    values = np.stack([one[name].values for name in ("relative", "load")])
    layer, expert = np.nonzero(np.isfinite(values).all(0))
    if not len(layer):
        return Interval(math.nan, -np.inf, np.inf, 0)
    keys = np.stack([_in_layers(each[layer, expert], layer) for each in values])

    def correlation(rows: np.ndarray) -> float:
        x, y = (_centred(stats.rankdata(key[rows]), layer[rows]) for key in keys)
        spread = math.sqrt(float((x @ x) * (y @ y)))
        return float(x @ y) / spread if spread else math.nan

    return intervals.bootstrap(correlation, [str(i) for i in range(len(layer))], seed)


def _in_layers(values: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Numbers that order values within a layer, and every layer below the next."""
    return layer + stats.rankdata(values) / (len(values) + 1)


def _centred(ranks: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Less the mean of their layer."""
    count = np.maximum(np.bincount(layer), 1)
    return ranks - (np.bincount(layer, ranks) / count)[layer]


def _chunks(before: Tensor, after: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in float64, a few rows at a time; the rows are the longer side of a matrix."""
    if before.dim() == 2 and before.shape[0] < before.shape[1]:
        before, after = before.T, after.T
    rows = max(1, CHUNK // max(1, before[:1].numel()))
    for a, b in zip(before.split(rows), after.split(rows), strict=True):
        yield a.double(), b.double()


def _layer(name: str) -> int:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _module(place: Place) -> str:
    """What part of a layer or model a tensor belongs to."""
    name = re.sub(r"^blocks\.\d+\.", "", place.name)
    if "norm" in name:
        return "norm"
    return "selection bias" if name.endswith("bias_E") else name.partition(".")[0]


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """NaN where the divisor is 0."""
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)


def _tensors(
    there: Stored,
    where: Mapping[str, Place],
    found: Mapping[str, Sequence[Move]],
    changes: Sequence[str],
) -> xr.Dataset:
    moves = np.array([found[name] for name in where]).transpose(2, 1, 0)
    norm, norm_after, moved, inner, rank = moves
    shapes = [there.parts[name].shape for name in where]
    values = {
        "module": [_module(place) for place in where.values()],
        "tensor_layer": [_layer(name) for name in where],
        "tensor_expert": [-1 if p.expert is None else p.expert for p in where.values()],
        "full_rank": [min(shape) if len(shape) == 2 else 0 for shape in shapes],
        "norm": norm,
        "norm_after": norm_after,
        "moved": moved,
        "relative": _ratio(moved, norm),
        "cosine": _ratio(inner, norm * norm_after).clip(-1, 1),
        "effective_rank": rank,
    }
    return stage_schema.dataset("weight_drift", values, {"change": changes, "tensor": [*where]})


def _experts(
    config: ModelConfig,
    where: Mapping[str, Place],
    found: Mapping[str, Sequence[Move]],
    changes: Sequence[str],
    load: np.ndarray | None,
) -> xr.Dataset:
    """Every expert's three matrices as one vector."""
    layers, experts = list(config.moe_layers), config.router.num_experts
    shape = (len(changes), len(layers), experts)
    squares = np.zeros((4, *shape))
    ranks, matrices = np.zeros(shape), np.zeros(shape)
    for name, place in where.items():
        if place.expert is None:
            continue
        at = (slice(None), layers.index(_layer(name)), place.expert)
        norm, norm_after, moved, inner, rank = np.array(found[name]).T
        squares[(slice(None), *at)] += [norm**2, norm_after**2, moved**2, inner]
        ranks[at] += np.nan_to_num(rank)
        matrices[at] += np.isfinite(rank)
    before, after, change = np.sqrt(squares[:3])
    values = {
        "relative": _ratio(change, before),
        "cosine": _ratio(squares[3], before * after).clip(-1, 1),
        "effective_rank": _ratio(ranks, matrices),
        "load": np.full(shape, np.nan) if load is None else load,
    }
    labels = {"change": changes, "layer": layers, "expert": np.arange(experts)}
    return stage_schema.dataset("expert_drift", values, labels)


def _loads(load: xr.DataArray | None, changes: Sequence[tuple[str, str]]) -> np.ndarray | None:
    """The mean of both stages' loads, over the mean expert's."""
    if load is None:
        return None
    both = [load.sel(stage=list(change)).mean("stage") for change in changes]
    means = [(each / each.mean("expert")).transpose("layer", "expert") for each in both]
    return np.stack([each.values for each in means])
