"""Parameters by kind that ranks hold: of one, read off its model; of all, by arithmetic."""

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from trinity_lib.mesh import ParallelConfig, chunk
from trinity_lib.parallel import Sharded

KINDS = (
    "embedding", "head", "attention", "dense", "router", "shared", "experts", "norms",
)  # fmt: skip
"""Kinds of parameters."""


class Held(NamedTuple):
    """Parameters of each kind, in the order of KINDS."""

    whole: np.ndarray
    """Of the model, [kind]."""
    rank_0: np.ndarray
    """On rank 0, read off its real pieces, [kind]."""
    every: np.ndarray
    """On each rank of a shard group, by arithmetic, [rank, kind]."""


def count_held(sharded: Sharded, parallel: ParallelConfig) -> Held:
    """Parameters by kind: of the model, on rank 0, and on every rank of a shard group."""
    index = {kind: i for i, kind in enumerate(KINDS)}
    whole, here = np.zeros(len(KINDS), "i8"), np.zeros(len(KINDS), "i8")
    alike: Counter[tuple[str, torch.Size]] = Counter()
    for name, piece in sharded.pieces.items():
        kind = _kind(name, piece.shape)
        whole[index[kind]] += piece.shape.numel()
        here[index[kind]] += piece.rows.numel()
        alike[kind, piece.shape] += 1
    every = np.zeros((parallel.shard, len(KINDS)), "i8")
    for (kind, shape), times in alike.items():
        width = shape[1:].numel()
        for rank in range(parallel.shard):
            every[rank, index[kind]] += times * width * _rows(shape, parallel, rank)
    assert (every[0] == here).all(), "mesh.chunk and the sharded model disagree"
    return Held(whole, here, every)


def _kind(name: str, shape: torch.Size) -> str:
    if len(shape) == 1 and not name.endswith(".bias"):
        return "norms"
    return next(part for part in name.split(".") if part in KINDS)


def _rows(shape: torch.Size, parallel: ParallelConfig, rank: int) -> int:
    """Rows of a parameter on a rank of a shard group, as `mesh.Layout` has them of its own."""
    if len(shape) < 3:
        return chunk(shape[0], parallel.shard, rank).count
    mine = chunk(shape[0], parallel.experts, rank % parallel.experts)
    return chunk(mine.count, parallel.expert_shard, rank // parallel.experts).count
