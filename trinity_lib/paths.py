"""Straight lines between models: loss along them, and changes added to other models.

No model that is given is changed: weights are computed aside, and a model is run with them
in place of its own for the length of a forward pass. Beside the models, one more set of
weights is held, in fp32 or better.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.func import functional_call

from trinity_lib import stage_schema
from trinity_lib.config import BadValue, differences, require
from trinity_lib.data import Batch
from trinity_lib.losses import token_loss
from trinity_lib.model import Trinity

ROWS_AT_ONCE = 8
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
EXTEND = (-0.5, 1.5)
SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0)
_NOTHING = ("max_positions", "load_balance_coeff")
"""Settings on which no output depends."""


@torch.no_grad()
def loss(model: Trinity, rows: Batch, weights: Mapping[str, Tensor] | None = None) -> float:
    """Mean loss of rows in nats per predicted token, by a model's weights or by others.

    `weights` are all of a model's parameters and selection biases, by their names here, and
    are cast to the dtypes of those they stand for.
    """
    held = _weights(model)
    taken = held if weights is None else {n: w.to(held[n].dtype) for n, w in weights.items()}
    device = model.embedding.weight.device
    nats, tokens = 0.0, 0
    for start in range(0, len(rows.tokens_BS), ROWS_AT_ONCE):
        parts = (part[start : start + ROWS_AT_ONCE] for part in rows)
        tokens_BS, targets_BS, documents_BS = (torch.from_numpy(p).to(device) for p in parts)
        output = functional_call(model, taken, (tokens_BS, documents_BS), strict=True)
        found = token_loss(output.logits, targets_BS)
        nats, tokens = nats + float(found.cross_entropy), tokens + int(found.tokens)
    require(tokens > 0, "rows", rows.tokens_BS.shape, "of tokens with a next one to predict")
    return nats / tokens


@torch.no_grad()
def between(first: Trinity, second: Trinity, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) W0 + alpha W1 of all weights and selection biases, in fp32 or better.

    Raises BadValue for models whose shapes or settings differ.
    """
    _require_alike(first, second)
    ends = _weights(second)
    return {
        name: (1 - alpha) * _precise(start) + alpha * _precise(ends[name])
        for name, start in _weights(first).items()
    }


def along(
    models: Mapping[str, Trinity],
    changes: Sequence[tuple[str, str]],
    rows: Batch,
    *,
    alphas: Sequence[float] = ALPHAS,
    extend: Sequence[float] = EXTEND,
    progress: Callable[[str], None] | None = None,
) -> xr.Dataset:
    """The group path: loss on rows along the line between two stages, and its barrier.

    Linear mode connectivity (Frankle et al. 2020, arXiv 1912.05671): a line without a
    barrier joins models of one basin. `alphas` lie on it and hold 0 and 1; `extend` lie
    beyond its ends and count for no barrier. What lies between alphas is not seen.
    """
    names = stage_schema.change_names(changes, list(models))
    inside = all(0 <= alpha <= 1 for alpha in alphas) and {0.0, 1.0} <= set(alphas)
    require(inside, "alphas", list(alphas), "from 0 to 1, both included")
    beyond = all(not 0 <= alpha <= 1 for alpha in extend)
    require(beyond, "extend", list(extend), "below 0 or above 1")
    places = sorted({float(alpha) for alpha in (*alphas, *extend)})
    losses = np.zeros((len(changes), len(places)))
    for number, (before, after) in enumerate(changes):
        for place, alpha in enumerate(places):
            if progress is not None:
                progress(f"path: {names[number]}, alpha {alpha:g}")
            here = between(models[before], models[after], alpha)
            losses[number, place] = loss(models[before], rows, here)
    values = {"loss": losses, "barrier": [barrier(places, each) for each in losses]}
    return stage_schema.dataset("path", values, {"change": names, "alpha": places})


def barrier(alphas: Sequence[float], losses: Sequence[float] | np.ndarray) -> float:
    """Highest loss above the chord between the losses at 0 and 1, in nats; 0 or more."""
    at = dict(zip(alphas, map(float, losses), strict=True))
    first, last = at[0.0], at[1.0]
    excess = [at[a] - ((1 - a) * first + a * last) for a in at if 0 < a < 1]
    return max([0.0, *excess])


@torch.no_grad()
def task_vector(start: Trinity, end: Trinity) -> dict[str, Tensor]:
    """What training added to all weights and selection biases, in fp32 or better.

    Ilharco et al. 2023 (arXiv 2212.04089).
    """
    _require_alike(start, end)
    ends = _weights(end)
    return {n: _precise(ends[n]) - _precise(held) for n, held in _weights(start).items()}


@torch.no_grad()
def added(model: Trinity, vector: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A model's weights plus `scale` times a task vector; below 0 it is taken away."""
    held = _weights(model)
    unlike = [n for n in held if n not in vector or vector[n].shape != held[n].shape]
    if unlike or len(vector) > len(held):
        name = unlike[0] if unlike else next(n for n in vector if n not in held)
        raise BadValue(f"{name} differs in shape between the task vector and the model.")
    return {n: _precise(w) + scale * vector[n].to(w.device) for n, w in held.items()}


@torch.no_grad()
def edited(model: Trinity, vector: Mapping[str, Tensor], scale: float) -> Trinity:
    """A new model, of weights plus `scale` times a task vector."""
    made = copy.deepcopy(model)
    for name, weight in added(model, vector, scale).items():
        _weights(made)[name].copy_(weight)
    return made


def tasks(
    models: Mapping[str, Trinity],
    arithmetic: Sequence[tuple[str, str, str]],
    rows: Mapping[str, Batch],
    *,
    scales: Sequence[float] = SCALES,
    progress: Callable[[str], None] | None = None,
) -> xr.Dataset:
    """The group task_vector: loss per domain of third models with changes added, scaled.

    `arithmetic` has (before, after, third): the change from before to after is added to the
    third, or taken away where the scale is below 0. Domains are the names of `rows`.
    """
    names, losses = [], np.zeros((len(arithmetic), len(scales), len(rows)))
    for number, (before, after, third) in enumerate(arithmetic):
        for stage in (before, after, third):
            require(stage in models, "arithmetic", stage, f"of stages {', '.join(models)}")
        names.append(f"{third} + ({after} - {before})")
        vector = task_vector(models[before], models[after])
        for place, scale in enumerate(scales):
            if progress is not None:
                progress(f"task vector: {names[number]}, scale {scale:g}")
            here = added(models[third], vector, scale)
            losses[number, place] = [loss(models[third], each, here) for each in rows.values()]
    labels = {"task": names, "scale": list(scales), "domain": list(rows)}
    return stage_schema.dataset("task_vector", {"loss": losses}, labels)


def _weights(model: Trinity) -> dict[str, Tensor]:
    """All parameters and selection biases, as they are held."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in held.items()}


def _precise(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _require_alike(first: Trinity, second: Trinity) -> None:
    ends = _weights(second)
    for name, start in _weights(first).items():
        shapes = list(start.shape), list(ends[name].shape) if name in ends else None
        if shapes[0] != shapes[1]:
            raise BadValue(
                f"{name} has shape {shapes[0]} in one model and {shapes[1]} in the other; "
                "weights of equal shapes can be mixed."
            )
    unlike = differences(first.config, second.config, _NOTHING)
    if unlike:
        raise BadValue(f"The models cannot be mixed, for their settings differ: {unlike[0]}.")
