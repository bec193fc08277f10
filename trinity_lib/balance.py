"""Balancers: what keeps every expert of a sparse router in use.

A balancer has three methods: `select` gives what the router ranks experts by, `observe`
turns one micro-batch's routing into statistics that add up over micro-batches and ranks,
and `update` moves the selection bias once per optimiser step. Where it has a loss, `loss`
returns it. The bias selects experts and never weighs them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from trinity_lib.config import check, require


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Which balancer, how fast it moves, and the weight of the sequence-wise loss."""

    method: Literal["none", "sign", "smebu"] = "smebu"
    """`none`, `sign` (centred sign updates: Nano, Mini) or `smebu` (Large)."""
    rate: float = 5e-4
    """Step size of the bias per optimiser step: gamma of `sign`, lambda of `smebu`."""
    beta: float = 0.5
    """Momentum of `smebu`."""
    kappa: float = 2.0
    """Slope of the soft clamp of `smebu`."""
    sequence_loss: float = 1e-4
    """Weight alpha of the sequence-wise loss; `none` switches it off as well."""

    def __post_init__(self) -> None:
        check(self)
        require(self.rate >= 0, "balance.rate", self.rate, "zero or more")
        require(0 <= self.beta < 1, "balance.beta", self.beta, "from 0 up to, not including, 1")
        require(self.kappa > 0, "balance.kappa", self.kappa, "above zero")
        require(
            self.sequence_loss >= 0, "balance.sequence_loss", self.sequence_loss, "0 or more"
        )


class Routed(Protocol):
    """What a balancer reads of a layer's routing; `routing.Routing` has it."""

    @property
    def scores_TE(self) -> Tensor:
        """Affinities before the bias, with their graph."""

    @property
    def experts_TK(self) -> Tensor:
        """The chosen experts."""


class Balancer(ABC):
    """The protocol of all balancers. State is fp32, one row per MoE layer."""

    bias_LE: Tensor
    """Selection bias of every MoE layer."""
    momentum_LE: Tensor
    """The bias's velocity, zeros where a method has none."""

    @abstractmethod
    def select(self, scores_TE: Tensor, layer: int) -> Tensor:
        """The ranking [T, E] whose top-k MoE layer `layer` takes; no gradient flows."""

    @abstractmethod
    def observe(self, routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
        """Statistics [L, E] of one micro-batch, to be summed over the optimiser step."""

    @abstractmethod
    def update(self, statistics_LE: Tensor) -> None:
        """Move the bias, once per optimiser step, after it."""

    @abstractmethod
    def loss(self, routing: Sequence[Routed], documents_BS: Tensor) -> Tensor | None:
        """The balancing loss summed over the rows of a micro-batch, or None."""


class Unbalanced(Balancer):
    """The control: no update, no loss. A bias that came with the weights stays as it is."""

    def __init__(self, num_layers: int, num_experts: int, device: str = "cpu") -> None:
        self.bias_LE = torch.zeros(num_layers, num_experts, device=device)
        self.momentum_LE = torch.zeros_like(self.bias_LE)

    def select(self, scores_TE: Tensor, layer: int) -> Tensor:
        """Scores plus the bias that came with the weights: zero in a new model."""
        return scores_TE + self.bias_LE[layer]

    def observe(self, routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
        """Expert loads: recorded, never acted on."""
        return load(routing, valid_T)

    def update(self, statistics_LE: Tensor) -> None:
        """Nothing moves: that is the method."""

    def loss(self, routing: Sequence[Routed], documents_BS: Tensor) -> Tensor | None:
        """None."""
        return None


class Biased(Balancer):
    """Loss-free balancing by a selection bias: centred sign updates or SMEBU, by config."""

    def __init__(
        self, config: BalanceConfig, num_layers: int, num_experts: int, device: str = "cpu"
    ) -> None:
        self.config = config
        self.bias_LE = torch.zeros(num_layers, num_experts, device=device)
        self.momentum_LE = torch.zeros_like(self.bias_LE)

    def select(self, scores_TE: Tensor, layer: int) -> Tensor:
        """Scores plus the layer's bias."""
        return scores_TE + self.bias_LE[layer]

    def observe(self, routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
        """Expert loads as integers."""
        return load(routing, valid_T)

    def update(self, statistics_LE: Tensor) -> None:
        """One step of `sign` or `smebu` on the loads of the whole optimiser step."""
        c = self.config
        if c.method == "sign":
            self.bias_LE = sign(self.bias_LE, statistics_LE, gamma=c.rate)
            return
        self.bias_LE, self.momentum_LE = smebu(
            self.bias_LE,
            self.momentum_LE,
            statistics_LE,
            lam=c.rate,
            beta=c.beta,
            kappa=c.kappa,
        )

    def loss(self, routing: Sequence[Routed], documents_BS: Tensor) -> Tensor | None:
        """The sequence-wise loss, summed over layers and rows."""
        if self.config.sequence_loss == 0:
            return None
        losses = [sequence_loss(r.scores_TE, r.experts_TK, documents_BS) for r in routing]
        return self.config.sequence_loss * torch.stack(losses).sum()


def build(
    config: BalanceConfig, num_layers: int, num_experts: int, device: str = "cpu"
) -> Balancer:
    """The balancer that `config` names, with zero state for `num_layers` MoE layers."""
    if config.method == "none":
        return Unbalanced(num_layers, num_experts, device)
    return Biased(config, num_layers, num_experts, device)


def load(routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
    """Tokens per expert [L, E], int64; each valid token once per chosen expert.

    Taken from the routing that forward returned, so recomputing activations in backward
    cannot count a token twice.
    """
    rows = [
        torch.bincount(r.experts_TK[valid_T].flatten(), minlength=r.scores_TE.shape[-1])
        for r in routing
    ]
    return torch.stack(rows)


def sign(bias_LE: Tensor, load_LE: Tensor, *, gamma: float) -> Tensor:
    """The next bias by centred sign updates, `b += gamma sign(mean(n) - n)`, `b -= mean(b)`.

    Trinity Nano and Mini (technical report, equations 19-22); the uncentred rule is
    Wang et al. 2024 (arXiv 2408.15664, algorithm 1).
    """
    violation_LE = load_LE.to(bias_LE).mean(-1, keepdim=True) - load_LE.to(bias_LE)
    moved_LE = bias_LE + gamma * violation_LE.sign()
    return moved_LE - moved_LE.mean(-1, keepdim=True)


def smebu(
    bias_LE: Tensor,
    momentum_LE: Tensor,
    load_LE: Tensor,
    *,
    lam: float,
    beta: float,
    kappa: float,
) -> tuple[Tensor, Tensor]:
    """One Soft-clamped Momentum Expert Bias Update: the next (bias, momentum), both [L, E].

    `load_LE` counts the routed tokens of one whole optimiser step. The violation
    v = (mean(n) - n) / mean(n) is relative, so lambda does not depend on the batch; tanh
    bounds the step, not the bias; a layer that saw no token keeps its direction.
    Works in the dtype of `bias_LE`. Trinity Large technical report, equations 23-28.
    """
    load_LE = load_LE.to(bias_LE)
    mean_L1 = load_LE.mean(-1, keepdim=True)
    violation_LE = (mean_L1 - load_LE) / torch.where(mean_L1 > 0, mean_L1, 1.0)
    step_LE = lam * torch.tanh(kappa * violation_LE)
    step_LE = step_LE - step_LE.mean(-1, keepdim=True)
    momentum_LE = beta * momentum_LE + (1 - beta) * step_LE
    return bias_LE + momentum_LE, momentum_LE


def sequence_loss(scores_TE: Tensor, experts_TK: Tensor, documents_BS: Tensor) -> Tensor:
    """The sequence-wise balance loss of one layer, summed over packed rows; 1 a row if even.

    f_i is the share of a row's tokens that chose expert i, bias included, times E/K; P_i
    the mean of the scores normalised over experts, bias not included; the loss is
    sum_i f_i P_i. Padding (document below 0) is left out. Trinity Large technical report,
    equations 29-32; DeepSeek-V3 (arXiv 2412.19437), equations 17-20.
    """
    rows, positions = documents_BS.shape
    num_experts, top_k = scores_TE.shape[-1], experts_TK.shape[-1]
    valid_BS1 = (documents_BS >= 0).unsqueeze(-1).to(scores_TE.dtype)
    tokens_B1 = valid_BS1.sum(1).clamp(min=1)
    chosen_BSE = torch.zeros_like(scores_TE).scatter_(1, experts_TK, 1.0)
    chosen_BSE = chosen_BSE.view(rows, positions, num_experts)
    share_BSE = (scores_TE / scores_TE.sum(-1, keepdim=True)).view(rows, positions, num_experts)
    fraction_BE = (chosen_BSE * valid_BS1).sum(1) * num_experts / (top_k * tokens_B1)
    mean_BE = (share_BSE * valid_BS1).sum(1) / tokens_B1
    return (fraction_BE.detach() * mean_BE).sum()
