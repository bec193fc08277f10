"""Checkpoints of one model side by side: weights, routing, predictions, and lines between.

Works for any AFMoE folders. Models are loaded when they are needed: one to look at its
routing, two for a change, three for a task vector.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from trinity_lib import drift, hub, intervals, paths, stage_routing, stage_schema
from trinity_lib.config import require
from trinity_lib.data import IGNORE, Batch
from trinity_lib.model import Trinity

LOGITS = 2**24
"""Logits of a model that are held at one time, in float64, where a row has fewer."""


def compare(
    folders: Mapping[str, str | Path],
    rows: Mapping[str, Batch],
    *,
    changes: Sequence[tuple[str, str]] | None = None,
    arithmetic: Sequence[tuple[str, str, str]] = (),
    alphas: Sequence[float] = paths.ALPHAS,
    extend: Sequence[float] = paths.EXTEND,
    scales: Sequence[float] = paths.SCALES,
    device: str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, xr.Dataset]:
    """The groups of `stage_schema` that compare checkpoints, by name.

    `folders` are stages in their order, `rows` held-out rows by domain. `changes` are pairs
    of stages: by default each to the next, and where there are more, the first to the last.
    `arithmetic` is that of `paths.tasks`, whose group is there where any is given. fp32 is
    what a small change needs: a `dtype` of None keeps what is stored. Raises Missing and
    BadValue as `hub.load` does, and for stages whose shapes differ.
    """
    pairs = chain(list(folders)) if changes is None else list(changes)
    stage_schema.change_names(pairs, list(folders))
    batch, labels = joined(rows)

    def load(stage: str) -> Trinity:
        return hub.load(folders[stage], device=device, dtype=dtype)

    looks = {}
    for stage in folders:
        _tell(progress, f"routing: {stage}")
        looks[stage] = stage_routing.look(load(stage), batch)
    routing, changed = stage_routing.described(looks, batch, pairs, labels=labels, seed=seed)
    weights, experts = drift.weights(folders, pairs, load=routing["load"], progress=progress)
    lines, moved = [], []
    for pair in pairs:
        models = {stage: load(stage) for stage in dict.fromkeys(pair)}
        _tell(progress, f"predictions: {pair[0]} -> {pair[1]}")
        moved.append(functional(models, [pair], rows))
        lines.append(
            paths.along(models, [pair], batch, alphas=alphas, extend=extend, progress=progress)
        )
    found = {
        "weight_drift": weights,
        "expert_drift": experts,
        "stage_routing": routing,
        "routing_change": changed,
        "functional": xr.concat(moved, "change"),
        "path": xr.concat(lines, "change"),
    }
    sums = []
    for each in arithmetic:
        models = {stage: load(stage) for stage in dict.fromkeys(each)}
        sums.append(paths.tasks(models, [each], rows, scales=scales, progress=progress))
    return found | ({"task_vector": xr.concat(sums, "task")} if sums else {})


def chain(stages: Sequence[str]) -> list[tuple[str, str]]:
    """Each stage to the next, and of three or more the first to the last."""
    require(len(stages) >= 2, "stages", list(stages), "two or more")
    steps = list(zip(stages, stages[1:], strict=False))
    return steps if len(stages) == 2 else [*steps, (stages[0], stages[-1])]


class Joined(NamedTuple):
    """Rows of all domains."""

    batch: Batch
    """Padded on the right to the longest."""
    labels: np.ndarray
    """Number of each row's domain."""


def joined(rows: Mapping[str, Batch]) -> Joined:
    """The rows of all domains as one batch, and which is whose."""
    require(len(rows) > 0, "rows", dict(rows), "of one domain or more")
    longest = max(batch.tokens_BS.shape[1] for batch in rows.values())
    parts = [_padded(batch, longest) for batch in rows.values()]
    sizes = [len(part.tokens_BS) for part in parts]
    batch = Batch(*(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))
    return Joined(batch, np.repeat(np.arange(len(parts)), sizes))


def _padded(batch: Batch, length: int) -> Batch:
    more = ((0, 0), (0, length - batch.tokens_BS.shape[1]))
    fills = (0, IGNORE, IGNORE)
    parts = zip(batch, fills, strict=True)
    return Batch(*(np.pad(part, more, constant_values=fill) for part, fill in parts))


def functional(
    models: Mapping[str, Trinity],
    changes: Sequence[tuple[str, str]],
    rows: Mapping[str, Batch],
) -> xr.Dataset:
    """The group functional: how the next token's distribution moved, per domain.

    Over the positions that have a token to predict. A row's tokens go together, so the
    interval is over rows, each with the mean of its tokens; a document that goes on in the
    next row makes it somewhat short. Raises BadValue where a domain predicts nothing.
    """
    names = stage_schema.change_names(changes, list(models))
    keys = ("divergence", "low", "high", "same_first", "rows")
    values: dict[str, np.ndarray] = {key: np.zeros((len(changes), len(rows))) for key in keys}
    for number, (before, after) in enumerate(changes):
        for place, (domain, batch) in enumerate(rows.items()):
            found = list(_answers(models[before], models[after], batch))
            require(len(found) > 0, f"rows of {domain}", len(found), "rows with targets")
            nats, same = zip(*found, strict=True)
            interval = intervals.mean(
                [float(each.mean()) for each in nats], [str(i) for i in range(len(nats))]
            )
            shares = (float(np.concatenate(same).mean()), interval.units)
            for key, value in zip(keys, (*interval[:3], *shares), strict=True):
                values[key][number, place] = value
    return stage_schema.dataset("functional", values, {"change": names, "domain": list(rows)})


@torch.no_grad()
def _answers(
    first: Trinity, second: Trinity, rows: Batch
) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Of every row that predicts: KL of each next token, and whether the likeliest agrees."""
    size = max(model.config.vocab_size for model in (first, second))
    at_once = max(1, LOGITS // (size * rows.tokens_BS.shape[1]))
    for start in range(0, len(rows.tokens_BS), at_once):
        parts = Batch(*(part[start : start + at_once] for part in rows))
        logits = [_logits(model, parts) for model in (first, second)]
        one_BSV, two_BSV = (each.double().log_softmax(-1) for each in logits)
        nats_BS = (one_BSV.exp() * (one_BSV - two_BSV)).sum(-1).cpu().numpy()
        same_BS = (one_BSV.argmax(-1) == two_BSV.argmax(-1)).cpu().numpy()
        for row, targets_S in enumerate(parts.targets_BS):
            asked_S = targets_S != IGNORE
            if asked_S.any():
                yield nats_BS[row, asked_S], same_BS[row, asked_S]


def _logits(model: Trinity, rows: Batch) -> Tensor:
    device = model.embedding.weight.device
    tokens_BS, _, documents_BS = (torch.from_numpy(part).to(device) for part in rows)
    return model(tokens_BS, documents_BS).logits


def _tell(progress: Callable[[str], None] | None, text: str) -> None:
    if progress is not None:
        progress(text)
