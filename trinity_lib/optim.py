"""Muon for matrices, AdamW for the rest, and a schedule made of phases."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from trinity_lib.config import check, require
from trinity_lib.experts import Experts
from trinity_lib.model import Trinity
from trinity_lib.muon import Muon, Owners


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Peak rates and constants. The report publishes the rates and no other constant."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon for hidden matrices, AdamW for the rest; `adamw`: AdamW for all."""
    muon_rate: float = 1e-3
    """Peak learning rate of Muon, before sqrt(max(1, fan_out/fan_in))."""
    adamw_rate: float = 3e-4
    """Peak learning rate of AdamW."""
    muon_momentum: float = 0.95
    """Nesterov momentum of Muon (not published; Jordan et al. 2024)."""
    newton_schulz_steps: int = 5
    """Iterations of the orthogonalisation (not published; Jordan et al. 2024)."""
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates (not published)."""
    adamw_eps: float = 1e-8
    """AdamW's epsilon (not published)."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices, times the learning rate (not published)."""
    clip: float = 1.0
    """Largest global gradient norm (not published)."""
    idle_experts: Literal["rest", "move"] = "rest"
    """Muon on an expert that saw no token: no update, or its stale momentum at full length."""

    def __post_init__(self) -> None:
        check(self)
        for name in ("muon_rate", "adamw_rate", "clip", "adamw_eps"):
            require(getattr(self, name) > 0, f"optim.{name}", getattr(self, name), "above zero")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        momentum = self.muon_momentum
        require(0 <= momentum < 1, "optim.muon_momentum", momentum, "from 0 up to 1")
        steps = self.newton_schulz_steps
        require(steps >= 1, "optim.newton_schulz_steps", steps, "at least 1")
        inside = all(0 <= beta < 1 for beta in self.adamw_betas)
        require(inside, "optim.adamw_betas", self.adamw_betas, "two numbers from 0 up to 1")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one learning-rate shape, batch size and mixture."""

    tokens: int
    """Tokens trained in this phase."""
    batch: int
    """Packed rows per optimiser step."""
    larger_batch: tuple[int, int] | None = None
    """(tokens into the phase, rows per step from there on), where the batch grows."""
    shape: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate moves from the last phase's end (1 at first) to `end`."""
    end: float = 1.0
    """Share of the peak learning rate at the phase's end; unused where constant."""
    warmup: int = 0
    """Steps of linear warm-up at the phase's start."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Share of tokens by domain; shares are normalised."""

    def __post_init__(self) -> None:
        check(self)
        require(self.tokens >= 1, "phase.tokens", self.tokens, "at least 1")
        require(self.batch >= 1, "phase.batch", self.batch, "at least 1")
        require(0 <= self.end <= 1, "phase.end", self.end, "from 0 to 1")
        require(self.warmup >= 0, "phase.warmup", self.warmup, "0 or more")
        shares = self.mixture.values()
        positive = not shares or (min(shares) >= 0 and sum(shares) > 0)
        require(positive, "phase.mixture", self.mixture, "shares of 0 or more, not all zero")
        if self.larger_batch is not None:
            at, rows = self.larger_batch
            grows = 0 < at < self.tokens and rows >= 1
            require(grows, "phase.larger_batch", self.larger_batch, "inside the phase")


def phase_steps(phase: Phase, sequence_length: int) -> int:
    """Optimiser steps of a phase, the last one possibly a little over its tokens."""
    if phase.larger_batch is None:
        return math.ceil(phase.tokens / (phase.batch * sequence_length))
    at, rows = phase.larger_batch
    before = math.ceil(at / (phase.batch * sequence_length))
    left = phase.tokens - before * phase.batch * sequence_length
    return before + max(0, math.ceil(left / (rows * sequence_length)))


def batch_rows(phase: Phase, step: int, sequence_length: int) -> int:
    """Packed rows of the phase's optimiser step `step` (from 0)."""
    if (
        phase.larger_batch is None
        or step * phase.batch * sequence_length < phase.larger_batch[0]
    ):
        return phase.batch
    return phase.larger_batch[1]


def rate(phases: Iterable[Phase], index: int, step: int, steps: int) -> float:
    """Share of the peak learning rate at step `step` of `steps` of phase number `index`.

    A decaying phase reaches `end` after its last step.
    """
    phases = list(phases)
    start = 1.0
    for earlier in phases[:index]:
        start = start if earlier.shape == "constant" else earlier.end
    phase = phases[index]
    progress = step / steps
    if phase.shape == "linear":
        share = start + (phase.end - start) * progress
    elif phase.shape == "cosine":
        share = phase.end + (start - phase.end) * (1 + math.cos(math.pi * progress)) / 2
    else:
        share = start
    return share * min(1.0, (step + 1) / phase.warmup) if phase.warmup else share


def build(
    model: Trinity,
    config: OptimConfig,
    weights: Mapping[str, Tensor] | None = None,
    owners: Owners | None = None,
) -> list[torch.optim.Optimizer]:
    """The optimisers of a model, each group with its peak rate under `peak`.

    Muon: matrices of attention, dense, shared and routed experts. AdamW: embedding, head,
    router and gains (the report says so for the first two and nothing of the others).
    `weights` are what is updated, by name, where it is not the parameters themselves but
    this rank's rows of them; then `owners` are needed too. Muon uses the C++ operator where
    the experts may.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, transposed, rest = split(model)
    if weights is not None:
        matrices, transposed, rest = (
            [weights[names[id(p)]] for p in part] for part in (matrices, transposed, rest)
        )
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        groups = [
            {"params": matrices, "transposed": False},
            {"params": transposed, "transposed": True},
        ]
        optimizers.append(
            Muon(
                groups,
                config.muon_rate,
                momentum=config.muon_momentum,
                steps=config.newton_schulz_steps,
                weight_decay=config.weight_decay,
                idle_experts=config.idle_experts,
                owners=owners,
                native=all(
                    module.backend in ("auto", "native")
                    for module in model.modules()
                    if isinstance(module, Experts)
                ),
            )
        )
    else:
        rest = rest + matrices + transposed
    decayed = [p for p in rest if p.dim() > 1]
    gains = [p for p in rest if p.dim() == 1]
    optimizers.append(
        torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": gains, "weight_decay": 0.0},
            ],
            lr=config.adamw_rate,
            betas=config.adamw_betas,
            eps=config.adamw_eps,
            fused=True,
        )
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def split(model: Trinity) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(matrices stored [.., fan_out, fan_in], those stored transposed, everything else)."""
    down = {id(m.down_EFD) for m in model.modules() if isinstance(m, Experts)}
    other = {id(model.embedding.weight)}
    other |= set() if model.head is None else {id(model.head.weight)}
    other |= {id(router.weight_ED) for router in model.routers()}
    matrices: list[Tensor] = []
    transposed: list[Tensor] = []
    rest: list[Tensor] = []
    for p in model.parameters():
        if p.dim() == 1 or id(p) in other:
            rest.append(p)
        else:
            (transposed if id(p) in down else matrices).append(p)
    return matrices, transposed, rest


def set_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to this share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share


def state_values(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Numbers in the optimisers' state once they have stepped: Muon's momentum, AdamW's two."""
    return sum(
        p.numel() * (1 if isinstance(optimizer, Muon) else 2)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    )


def state_tensors(
    weights: Mapping[str, Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Every tensor of the optimisers' state, named by optimiser, key and parameter."""
    names = {id(p): name for name, p in weights.items()}
    return {
        f"optimizer.{i}.{key}.{names[id(p)]}": value
        for i, optimizer in enumerate(optimizers)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_state_tensors(
    weights: Mapping[str, Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `state_tensors` gave; each value goes where its parameter is."""
    every = list(optimizers)
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key, parameter = name.split(".", 3)
            p = weights[parameter]
            every[int(i)].state[p][key] = value.to(p.device)
