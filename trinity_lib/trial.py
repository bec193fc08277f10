"""One trial of a study: a run trained, measured, and reduced to a small file."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from trinity_lib import checkpoint, data, disk, outcome, rows
from trinity_lib.balance import Balancer
from trinity_lib.config import Missing
from trinity_lib.data import Batch, DataConfig
from trinity_lib.losses import token_loss
from trinity_lib.model import Trinity
from trinity_lib.record import ENGINE
from trinity_lib.run import RunConfig
from trinity_lib.session import BALANCER, new_balancer, under
from trinity_lib.step import TrainingFailed
from trinity_lib.train import reproducible, train

WORK = "work"
"""The folder, beside the outcomes, of the runs that trials are while they last."""
STAGE = "base"
"""The checkpoint that a run of one phase ends with."""
LEAK_ROWS, LEAK_EVERY = 8, 3
"""Rows of each domain that the leak is looked for in, and which of them are changed."""


class Leak(NamedTuple):
    """What choosing experts over a whole batch gives away of later tokens."""

    share_L: np.ndarray
    """Share of tokens whose experts change when nothing but later tokens of their row does."""
    loss_chosen: float
    """Validation loss with the balancer's own choices, nats per token."""
    loss_causal: float
    """With what a decoder can do: top-k of scores and stored bias."""


def run(
    key: str, config: RunConfig, folder: Path, cache: Path, keep: bool = False
) -> xr.Dataset:
    """Train a trial; its outcome, which is also `folder`/`key`.nc, whole or not at all.

    What is left of an earlier attempt is removed, and so is the run itself, unless its
    checkpoint is to be kept. A run that diverges has an outcome too, which says so, and so
    has one that was to begin with the checkpoint of such a run.
    """
    work, file = folder / WORK, folder / f"{key}.nc"
    clear(key, folder)
    named = dataclasses.replace(config, name=key)
    try:
        result = outcome.outcome(train(named, runs=work, cache=cache))
        with reproducible(config.threads, config.device):
            found = leak(work / key / STAGE, config, cache)
        result = result.assign(
            leak=("trial_layer", found.share_L),
            loss_chosen=found.loss_chosen,
            loss_causal=found.loss_causal,
        )
    except (TrainingFailed, Missing) as failure:
        result = outcome.failed(str(failure))
    content: Any = result.to_netcdf(engine=ENGINE)
    disk.replace(file, lambda temporary: temporary.write_bytes(content))
    if not keep:
        clear(key, folder)
    return result


def clear(key: str, folder: Path) -> None:
    """Remove a trial's run and checkpoints."""
    if (folder / WORK / key).exists():
        disk.remove_folder(folder / WORK / key)
    (folder / WORK / f"{key}.nc").unlink(missing_ok=True)


def leak(saved: Path, config: RunConfig, cache: Path) -> Leak:
    """Measure it on held-out rows, with the weights and balancer of a checkpoint.

    Exactly 0 for a balancer that looks at one token at a time, which any causal one does
    (Wang et al. 2024, arXiv 2408.15664, section 5.2, on expert choice).
    """
    model = checkpoint.load(saved)
    balancer = new_balancer(config)
    tensors = checkpoint.load_state(saved).tensors
    balancer.load_state(under(BALANCER, tensors))
    batch = _rows(config.data, config.model.vocab_size, cache)
    tokens_BS, targets_BS, documents_BS = (torch.from_numpy(part) for part in batch)
    half = tokens_BS.shape[1] // 2
    held_LTK = balancer.begin(tokens_BS, documents_BS)
    chosen = _route(model, balancer, tokens_BS, documents_BS, held_LTK)
    num_experts = config.model.router.num_experts
    own = [_sets(experts, num_experts, len(tokens_BS)) for experts in chosen.experts]
    changed_L, tokens = np.zeros(len(own)), 0
    for row in range(0, len(tokens_BS), LEAK_EVERY):
        changed_BS = tokens_BS.clone()
        changed_BS[row, half:] = tokens_BS[row - 1, half:]
        fixed_LTK = balancer.fixed(changed_BS)
        other = _route(model, balancer, changed_BS, documents_BS, fixed_LTK)
        early_S = (documents_BS[row] >= 0) & (torch.arange(tokens_BS.shape[1]) < half)
        tokens += int(early_S.sum())
        for layer, experts in enumerate(other.experts):
            sets_BSE = _sets(experts, num_experts, len(tokens_BS))
            differs_S = (sets_BSE[row] != own[layer][row]).any(-1)
            changed_L[layer] += int((differs_S & early_S).sum())
    causal = _route(model, None, tokens_BS, documents_BS, balancer.fixed(tokens_BS))
    return Leak(
        changed_L / tokens, _loss(chosen.logits, targets_BS), _loss(causal.logits, targets_BS)
    )


class _Routed(NamedTuple):
    logits: Tensor
    experts: list[Tensor]


@torch.no_grad()
def _route(
    model: Trinity,
    balancer: Balancer | None,
    tokens_BS: Tensor,
    documents_BS: Tensor,
    held_LTK: Tensor | None,
) -> _Routed:
    output = model(
        tokens_BS,
        documents_BS,
        select=None if balancer is None else balancer.select,
        replay=None if held_LTK is None else held_LTK.unbind(),
    )
    return _Routed(output.logits, [routing.experts_TK for routing in output.routing])


def _sets(experts_TK: Tensor, num_experts: int, rows: int) -> Tensor:
    """Which experts a token took, [B, S, E]; -1 is none."""
    taken_TE = torch.zeros(len(experts_TK), num_experts + 1, dtype=torch.bool)
    taken_TE.scatter_(1, experts_TK % (num_experts + 1), True)
    return taken_TE[:, :num_experts].unflatten(0, (rows, -1))


def _loss(logits_BSV: Tensor, targets_BS: Tensor) -> float:
    loss = token_loss(logits_BSV, targets_BS)
    return float(loss.cross_entropy / loss.tokens)


@functools.lru_cache(maxsize=4)
def _rows(config: DataConfig, vocab_size: int, cache: Path) -> Batch:
    loaded = data.load(config, vocab_size, cache)
    length = config.sequence_length
    parts = [
        rows.validation(name, documents, length, LEAK_ROWS)
        for name, documents in loaded.validation.items()
    ]
    return Batch(*(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))
