"""One optimiser step: micro-batches on every rank, sums over all, weights and bias moved."""

import contextlib
import functools
import math
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import NamedTuple

import torch
from torch import Tensor

from trinity_lib import parallel, rows
from trinity_lib.balance import load
from trinity_lib.config import Refusal
from trinity_lib.data import IGNORE, Batch
from trinity_lib.losses import token_loss
from trinity_lib.model import Output
from trinity_lib.session import REMEMBERED_LOSSES, Session


class StepResult(NamedTuple):
    """What one optimiser step measured."""

    loss: float
    z_loss: float
    balance_loss: float
    batch_het: float
    grad_norm: float
    batch_tokens: int
    load_LE: Tensor
    choices_LTK: Tensor | None
    all_saved: bool
    """Whether a checkpoint that was being written has been, by every rank."""


class TrainingFailed(Refusal, RuntimeError):
    """The loss is no number, or jumped: training stopped before the weights were touched."""


@dataclass
class Sums:
    """What the micro-batches of one optimiser step add up to, on this process."""

    cross_entropy: float = 0.0
    z: float = 0.0
    balance: float = 0.0
    means: dict[int, float] = field(default_factory=dict)
    """Mean loss of a micro-batch, by its number in the batch."""
    choices: dict[int, Tensor] = field(default_factory=dict)
    loads: list[Tensor] = field(default_factory=list)
    statistics: list[Tensor] = field(default_factory=list)


class Together(NamedTuple):
    """The sums over all ranks."""

    cross_entropy: float
    z: float
    balance: float
    means: list[float]
    load_LE: Tensor
    statistics: Tensor
    all_saved: bool


def optimiser_step(session: Session, batch: Batch) -> StepResult:
    """One optimiser step over one global batch, however micro-batches and ranks split it."""
    config, balancer = session.config, session.balancer
    predicted = int((batch.targets_BS != IGNORE).sum())
    held_LTK = _held(session, batch)
    sums = Sums()
    ranks, rank = config.parallel.ranks, 0 if session.layout is None else session.layout.rank
    mine = range(rank, config.micro_batches, ranks)
    for part in mine:
        if session.sharded is not None:  # replicas are summed once, after the last
            session.sharded.model.set_requires_all_reduce(part == mine[-1])  # type: ignore
        _micro_batch(session, batch, part, predicted, held_LTK, sums)
    total = _together(session, sums)
    mean = total.cross_entropy / predicted
    _guard(session, mean)
    norm = _update(session)
    balancer.update(total.statistics)
    session.model.load_bias(balancer.bias_LE)
    return StepResult(
        loss=mean,
        z_loss=total.z / predicted,
        balance_loss=total.balance / len(batch.tokens_BS),
        batch_het=max(total.means) - fmean(total.means),
        grad_norm=float(norm),
        batch_tokens=int((batch.documents_BS >= 0).sum()),
        load_LE=total.load_LE,
        choices_LTK=_all_choices(session, sums) if config.record_choices else None,
        all_saved=total.all_saved,
    )


def _micro_batch(
    session: Session,
    batch: Batch,
    part: int,
    predicted: int,
    held_LTK: Tensor | None,
    sums: Sums,
) -> None:
    """Forward and backward of one part of the batch."""
    config, balancer = session.config, session.balancer
    tokens_BS, targets_BS, documents_BS = (
        torch.from_numpy(piece).to(config.device)
        for piece in rows.share_of(batch, part, config.micro_batches)
    )
    chosen = balancer.begin(tokens_BS, documents_BS)
    if held_LTK is not None:
        count = tokens_BS.numel()
        chosen = held_LTK[:, part * count : (part + 1) * count]
    output = _forward(session, tokens_BS, documents_BS, chosen)
    loss = token_loss(output.logits, targets_BS)
    balance_loss = balancer.loss(output.routing, documents_BS)
    objective = (loss.cross_entropy + config.z_loss * loss.z) / predicted
    if balance_loss is not None:
        objective = objective + balance_loss / len(batch.tokens_BS)
        sums.balance += balance_loss.item()
    routing = output.routing
    del output  # the logits need not live through backward
    objective.backward()
    sums.cross_entropy += loss.cross_entropy.item()
    sums.z += loss.z.item()
    sums.means[part] = loss.cross_entropy.item() / max(1, int(loss.tokens))
    valid_T = documents_BS.flatten() >= 0
    sums.loads.append(load(routing, valid_T))
    sums.statistics.append(balancer.observe(routing, valid_T))
    if config.record_choices:
        sums.choices[part] = torch.stack([r.experts_TK for r in routing])


def _together(session: Session, sums: Sums) -> Together:
    """The sums over ranks: one all-reduce of all counts, one of all that is no count."""
    load_LE = torch.stack(sums.loads).sum(0)
    statistics = functools.reduce(torch.add, sums.statistics)
    count = session.config.micro_batches
    means = [sums.means.get(part, 0.0) for part in range(count)]
    saved = session.saving is None or session.saving.done()
    layout = session.layout
    if layout is None:
        return Together(
            sums.cross_entropy, sums.z, sums.balance, means, load_LE, statistics, False
        )
    counted = not statistics.is_floating_point()
    packed = [load_LE.flatten(), *([statistics.flatten()] if counted else [])]
    counts = layout.sum(torch.cat(packed))
    numbers = [sums.cross_entropy, sums.z, sums.balance, float(saved), *means]
    values = torch.tensor(numbers, dtype=torch.float64, device=load_LE.device)
    cross_entropy, z, balance, all_saved, *means = layout.sum(values).tolist()
    load_LE, rest = counts[: load_LE.numel()].view_as(load_LE), counts[load_LE.numel() :]
    statistics = rest.view_as(statistics) if counted else layout.sum(statistics)
    done = session.saving is not None and all_saved == layout.ranks
    return Together(cross_entropy, z, balance, means, load_LE, statistics, done)


def _update(session: Session) -> Tensor:
    """Move the weights by the step's gradients; their norm before it was clipped."""
    most, sharded = session.config.optim.clip, session.sharded
    if sharded is None:
        norm = torch.nn.utils.clip_grad_norm_(session.model.parameters(), most)
    else:
        parallel.gradients(sharded)
        norm = parallel.clip(sharded, most)
    for optimizer in session.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if sharded is not None:
        parallel.forget_gradients(sharded)
    return norm


def _all_choices(session: Session, sums: Sums) -> Tensor:
    """Every token's choices, in the order of the batch."""
    parts = sums.choices
    if session.layout is not None:
        for theirs in session.layout.gathered({k: v.cpu() for k, v in parts.items()}):
            parts = {**parts, **theirs}
    return torch.cat([parts[part].cpu() for part in sorted(parts)], dim=1)


def _held(session: Session, batch: Batch) -> Tensor | None:
    """The choices a replay holds this step's tokens to."""
    if session.choices is None:
        return None
    chosen_LTK = session.choices.of(session.step + 1, batch.tokens_BS.size)
    return torch.from_numpy(chosen_LTK).to(session.config.device)


def _forward(
    session: Session, tokens_BS: Tensor, documents_BS: Tensor, held_LTK: Tensor | None
) -> Output:
    config = session.config
    cuda = config.device == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
        return session.forward(
            tokens_BS,
            documents_BS,
            select=session.balancer.select,
            replay=None if held_LTK is None else held_LTK.unbind(),
            recompute=config.recompute,
        )


def _guard(session: Session, loss: float) -> None:
    """Stop before the optimiser step where the loss is no number or has jumped."""
    step = session.step + 1
    if not math.isfinite(loss):
        raise TrainingFailed(
            f"the loss is {loss} at step {step}; lower the learning rate or the balance rate."
        )
    recent = session.losses[-REMEMBERED_LOSSES:]
    if len(recent) >= 10 and loss > median(recent) + session.config.spike:
        raise TrainingFailed(
            f"the loss jumped to {loss:.2f} at step {step}, from a median of "
            f"{median(recent):.2f}; lower the learning rate or raise `spike` "
            f"({session.config.spike} nats)."
        )
    session.losses.append(loss)
