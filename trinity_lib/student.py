"""A model in post-training and what moves it: one update of weights and balancer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trinity_lib import balancers, examination, optim
from trinity_lib.balance import Balancer, load
from trinity_lib.chat import Packed, Template
from trinity_lib.model import Trinity
from trinity_lib.posttrain_config import PosttrainConfig, Stage
from trinity_lib.step import TrainingFailed

Objective = Callable[[Tensor, Tensor, int], tuple[Tensor, dict[str, float]]]
"""(logits, targets, number of the part) -> loss, and sums to record; all add up over parts."""
NAN = float("nan")


@dataclass
class Student:
    """A model that is trained, and all that moves it."""

    config: PosttrainConfig
    model: Trinity
    template: Template
    balancer: Balancer
    optimizers: list[torch.optim.Optimizer]
    trained: list[torch.nn.Parameter]
    """The weights, or the adapters, that optimisers move."""


class Measures(NamedTuple):
    """What one step measured; NaN where a stage has no such thing."""

    loss: float
    reward: float = NAN
    kl: float = NAN
    accuracy: float = NAN
    margin: float = NAN
    clipped: float = NAN
    grad_norm: float = NAN
    tokens: int = 0
    load_LE: Tensor = torch.zeros(0)


class Update(NamedTuple):
    """What one optimiser update measured."""

    sums: dict[str, float]
    grad_norm: float
    tokens: int
    load_LE: Tensor


def update(student: Student, parts: Sequence[Packed], objective: Objective) -> Update:
    """One optimiser update over all parts, then one of the balancer, as in pre-training."""
    model, balancer = student.model, student.balancer
    rows = sum(len(part.owner_BS) for part in parts)
    sums: dict[str, float] = {}
    loads, statistics, tokens = [], [], 0
    for number, part in enumerate(parts):
        tokens_BS, targets_BS, documents_BS = examination.tensors(part, model)
        balancer.begin(tokens_BS, documents_BS)
        with examination.autocast(tokens_BS.device.type):
            output = model(tokens_BS, documents_BS, select=balancer.select)
        loss, values = objective(output.logits, targets_BS, number)
        balance_loss = balancer.loss(output.routing, documents_BS)
        if balance_loss is not None:
            loss = loss + balance_loss / rows
        loss.backward()
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
        valid_T = documents_BS.flatten() >= 0
        loads.append(load(output.routing, valid_T))
        statistics.append(balancer.observe(output.routing, valid_T))
        tokens += int(valid_T.sum())
    if not math.isfinite(sums["loss"]):
        raise TrainingFailed(f"the loss is {sums['loss']}; lower the learning rate.")
    norm = torch.nn.utils.clip_grad_norm_(student.trained, student.config.optim.clip)
    for optimizer in student.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    balancer.update(torch.stack(statistics).sum(0))
    model.load_bias(balancer.bias_LE)
    return Update(sums, float(norm), tokens, torch.stack(loads).sum(0))


def share(stage: Stage, number: int, warmup: float) -> float:
    """Learning rate of step `number` (from 0), as a share of the stage's peak.

    A linear rise over the first `warmup` of the steps, then linear to 0 after the last
    (technical report, section 4).
    """
    rising = math.ceil(warmup * stage.steps)
    if number < rising:
        return (number + 1) / rising
    return (stage.steps - number) / (stage.steps - rising + 1)


def optimizers(
    student_model: Trinity, config: PosttrainConfig, trained: Sequence[torch.nn.Parameter]
) -> list[torch.optim.Optimizer]:
    """Pre-training's for whole weights, AdamW for adapters; `peak` is the run's."""
    if config.lora is None:
        made = optim.build(student_model, config.optim)
        factor = config.rate
    else:
        rate = config.optim.adamw_rate
        made = [
            torch.optim.AdamW(
                trained, lr=rate, betas=config.optim.adamw_betas, eps=config.optim.adamw_eps,
                weight_decay=0.0,
            )
        ]  # fmt: skip
        factor = config.rate * config.lora.rate
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"] * factor
    return made


def balancer_of(config: PosttrainConfig, model: Trinity) -> Balancer:
    """The balancer at a stage's start: the model's biases, and no momentum."""
    router, routers = model.config.router, model.routers()
    made = balancers.build(
        config.balance,
        num_layers=len(routers),
        num_experts=router.num_experts,
        top_k=router.top_k,
        vocab_size=model.config.vocab_size,
        seed=config.seed,
        device=config.device,
    )
    made.bias_LE = torch.stack([router.bias_E for router in routers]).clone()
    return made
