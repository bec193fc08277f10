"""Bytes that one rank needs to train a model, by what they are for and by when.

Everything follows from shapes: of the parameters on the meta device, of the rows that
`mesh` gives each rank, of what autograd keeps (`activations`). The formulas of whole weights
and gradients stand in `_gathered`, and what is held when in `training`. Not counted: the CUDA
context, communication buffers of NCCL, fragmentation, the balancer (kilobytes).
"""

import functools
from collections import Counter
from typing import Literal, NamedTuple

import numpy as np
import torch

from trinity_lib import activations, optim
from trinity_lib.activations import FULL, HALF
from trinity_lib.config import require
from trinity_lib.experts import Experts
from trinity_lib.mesh import ParallelConfig, chunk
from trinity_lib.model import ModelConfig, Trinity

LOGIT = HALF + FULL + FULL
"""Bytes a logit: bf16, its fp32 copy and the log-softmax; in backward the gradient is the
second."""
NEWTON_SCHULZ = 2 * FULL + 6 * HALF
"""Bytes a number while Muon orthogonalises: the average and the result in fp32, the
iterate, its Gram matrix and their products in bf16."""


class Weight(NamedTuple):
    """One parameter of a model."""

    name: str
    shape: tuple[int, ...]
    block: int
    """Number of its block, -1 outside."""
    of_experts: bool
    """Split by whole experts, not by rows over the shard group."""
    muon: bool
    """Whether it is Muon's, with one moment; AdamW has two."""
    precise: bool
    """Multiplied in fp32: norms, routers, the embedding."""

    @property
    def numbers(self) -> int:
        """Parameters in it."""
        return int(np.prod(self.shape))


class Memory(NamedTuple):
    """Bytes on one rank at one moment."""

    weights: int
    """fp32 master weights of this rank's rows."""
    gradients: int
    """Their fp32 gradients, summed over ranks."""
    optimizer: int
    """Muon's momentum, AdamW's two moments, fp32."""
    gathered: int
    """Whole weights of the modules in flight, bf16 (norms, routers and embedding fp32)."""
    unreduced: int
    """Whole gradients of those, and the copy that is summed over ranks."""
    kept: int
    """Activations kept for backward."""
    working: int
    """What one block recomputes, and gradients of activations in flight."""
    logits: int
    """Logits, their log-softmax and gradient."""
    exchange: int
    """Rows on their way to other ranks' experts and back."""
    stepping: int
    """Temporaries of the optimiser's largest matrix."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


Moment = Literal["loss", "block", "embedding", "step"]
"""The end of forward; backward through a block; its last, the embedding; the optimiser."""
Optimizer = Literal["muon", "adamw"]


@functools.lru_cache(maxsize=64)
def weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Every parameter of a model; none is allocated."""
    with torch.device("meta"):
        model = Trinity(config)
    matrices, transposed, _ = optim.split(model)
    muon = {id(p) for p in (*matrices, *transposed)}
    routers = {id(router.weight_ED) for router in model.routers()}
    embedding = id(model.embedding.weight)
    experts = {id(p) for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    found = []
    for name, p in model.named_parameters():
        parts = name.split(".")
        found.append(
            Weight(
                name=name,
                shape=tuple(p.shape),
                block=int(parts[1]) if parts[0] == "blocks" else -1,
                of_experts=id(p) in experts,
                muon=id(p) in muon,
                precise=p.dim() == 1 or id(p) in routers or id(p) == embedding,
            )
        )
    return tuple(found)


def held(config: ModelConfig, parallel: ParallelConfig) -> np.ndarray:
    """Parameters that each rank of a shard group holds, [shard] int64; replicas hold alike."""
    return sum(_held(config, parallel), np.zeros(parallel.shard, dtype=np.int64))


def training(
    config: ModelConfig,
    parallel: ParallelConfig,
    *,
    tokens: int,
    length: int,
    recompute: bool,
    optimizer: Optimizer = "muon",
) -> dict[Moment, Memory]:
    """What the rank that holds most needs, at the moments of a step that may need most.

    `tokens` a rank computes at once (a micro-batch), in documents of `length`. With
    `recompute` a block keeps its input alone.

    loss       activations of all blocks, the logits, the head (the root group of FSDP,
               gathered from the first forward to the end of backward)
    block      backward of the last block: all that is kept, what it recomputes, its whole
               weights and those fetched ahead for the next, whole gradients of one block and
               of the head
    embedding  the last of backward: embedding and head whole, with their gradients
    step       nothing of the above, but the temporaries of the largest matrix
    """
    require(tokens >= 1, "tokens", tokens, "at least 1")
    require(length >= 1, "length", length, "at least 1")
    muon, adamw = _held(config, parallel)
    numbers, moments = muon + adamw, (muon if optimizer == "muon" else 2 * muon) + 2 * adamw
    most = int((2 * numbers + moments).argmax())
    base = Memory(
        FULL * int(numbers[most]), FULL * int(numbers[most]), FULL * int(moments[most]),
        0, 0, 0, 0, 0, 0, 0,
    )  # fmt: skip
    exchanged = parallel.experts > 1
    kept = tokens * activations.kept(config, length, recompute=recompute, exchanged=exchanged)
    working = activations.moving(config)
    if recompute:
        working += max(activations.kept_by_blocks(config, length, exchanged))
    choices, width = config.router.top_k, config.width
    rows = 2 * HALF * choices * width * tokens if exchanged and config.moe_layers else 0
    whole = _gathered(config, parallel.experts, parallel.ranks == 1, recompute)
    return {
        "loss": base._replace(
            kept=kept, logits=LOGIT * tokens * config.vocab_size, gathered=whole.head
        ),
        "block": base._replace(
            kept=kept, working=tokens * working, exchange=rows,
            gathered=whole.head + whole.blocks, unreduced=whole.head + whole.gradients,
        ),
        "embedding": base._replace(
            gathered=whole.head + whole.embedding, unreduced=whole.last_gradients
        ),
        "step": base._replace(stepping=NEWTON_SCHULZ * _largest(config, parallel, optimizer)),
    }  # fmt: skip


def peak(moments: dict[Moment, Memory]) -> tuple[Moment, Memory]:
    """The moment that needs most."""
    return max(moments.items(), key=lambda each: each[1].total)


class _Whole(NamedTuple):
    """Bytes of what is gathered whole, and of whole gradients."""

    head: int
    blocks: int
    gradients: int
    embedding: int
    last_gradients: int


@functools.lru_cache(maxsize=256)
def _gathered(config: ModelConfig, experts: int, alone: bool, recompute: bool) -> _Whole:
    """Whole weights: of the largest block and of the one fetched ahead; of head, embedding.

    Experts are gathered over `expert_shard` ranks alone: the first expert rank's, which has
    most. Gradients are bf16 as autograd leaves them, and fp32 as they are summed. One rank
    alone gathers nothing: autocast makes bf16 copies of matrices and, without `recompute`,
    keeps all of them for backward.
    """
    numbers: Counter[tuple[int, bool]] = Counter()
    for weight in weights(config):
        share = weight.numbers
        if weight.of_experts:
            share = share // weight.shape[0] * chunk(weight.shape[0], experts, 0).count
        numbers[weight.block, weight.precise] += share
    sizes = [
        HALF * numbers[i, False] + FULL * numbers[i, True] for i in range(config.num_layers)
    ]
    most = [HALF * numbers[i, False] for i in range(config.num_layers)]
    table = config.vocab_size * config.width
    head = HALF * table
    if alone:
        return _Whole(head, max(most) if recompute else sum(most), max(most), 0, 0)
    summed = max(
        HALF * numbers[i, False] + FULL * sum(numbers[i, p] for p in (False, True))
        for i in range(config.num_layers)
    )
    ahead = max(a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True))
    if config.tied:  # the embedding is the root group's, in fp32
        return _Whole(FULL * table, ahead, summed, 0, 2 * FULL * table)
    return _Whole(head, ahead, summed, FULL * table, (2 * FULL + HALF + FULL) * table)


def _held(config: ModelConfig, parallel: ParallelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Muon's and AdamW's parameters on each rank of a shard group."""
    every = np.arange(parallel.shard)
    found = {True: np.zeros_like(every), False: np.zeros_like(every)}
    for (muon, of_experts, shape), times in _alike(config).items():
        rows = _counts(shape[0], parallel.shard, every)
        if of_experts:
            mine = _counts(shape[0], parallel.experts, every % parallel.experts)
            rows = _counts(mine, parallel.expert_shard, every // parallel.experts)
        found[muon] += times * rows * int(np.prod(shape[1:]))
    return found[True], found[False]


@functools.lru_cache(maxsize=64)
def _alike(config: ModelConfig) -> Counter[tuple[bool, bool, tuple[int, ...]]]:
    """How many parameters there are of every kind and shape."""
    return Counter((w.muon, w.of_experts, w.shape) for w in weights(config))


def _counts(total: np.ndarray | int, parts: int, part: np.ndarray) -> np.ndarray:
    """`mesh.chunk`'s counts, of many parts at once."""
    size = -(-np.asarray(total) // parts)
    return np.clip(total - part * size, 0, size)


def _largest(config: ModelConfig, parallel: ParallelConfig, optimizer: Optimizer) -> int:
    """Numbers of the largest tensor Muon orthogonalises on a rank: experts, or a matrix."""
    if optimizer != "muon":
        return 0
    largest = 0
    for muon, of_experts, shape in _alike(config):
        rows = shape[0]
        if of_experts:
            rows = chunk(chunk(rows, parallel.experts, 0).count, parallel.expert_shard, 0).count
        if muon:
            largest = max(largest, rows * int(np.prod(shape[1:])))
    return largest
