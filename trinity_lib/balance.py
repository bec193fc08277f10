"""The protocol of the balancers: what keeps every expert of a sparse router in use.

A run calls `begin` before a micro-batch's forward, `select` in every MoE layer, `loss` and
`observe` on the routing that came of it, and `update` once per optimiser step. Statistics
add up over micro-batches and ranks. The bias selects experts and never weighs them; it is
all that inference knows of a balancer.

Here are the protocol, and the balancers that move the bias by expert loads alone;
`auxiliary` has those that are a loss, `assignment` those that look at all scores of a
micro-batch or at none.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from trinity_lib.config import check, require


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Which balancer, how fast it moves, and the weight of the sequence-wise loss."""

    method: Literal[
        "none", "switch", "sequence", "global", "loss_free", "sign", "proportional", "smebu",
        "quantile", "bip", "phi", "sinkhorn", "expert_choice", "dropout", "hash",
    ] = "smebu"  # fmt: skip
    """`sign` (centred) is Trinity Nano's and Mini's, `smebu` Large's; `balancers` has all."""
    rate: float = 5e-4
    """Step of the bias, weight of the method's loss, chance of `dropout`; else unused."""
    beta: float = 0.5
    """Momentum of `smebu`."""
    kappa: float = 2.0
    """Slope of the soft clamp of `smebu`."""
    centre: bool = True
    """Whether `smebu` centres its steps."""
    iterations: int = 4
    """Rounds of `bip` and `sinkhorn` in a micro-batch."""
    share: float = 0.01
    """What `phi`'s mean takes of the newest step."""
    sequence_loss: float = 1e-4
    """Weight of the sequence-wise loss beside the method; `none`, `sequence` do without."""

    def __post_init__(self) -> None:
        check(self)
        require(self.rate >= 0, "balance.rate", self.rate, "zero or more")
        dropped = self.method != "dropout" or self.rate < 1
        require(dropped, "balance.rate", self.rate, "below 1 where the method is dropout")
        require(0 <= self.beta < 1, "balance.beta", self.beta, "from 0 up to, not including, 1")
        require(self.kappa > 0, "balance.kappa", self.kappa, "above zero")
        in_range = 1 <= self.iterations <= 1000
        require(in_range, "balance.iterations", self.iterations, "from 1 to 1000")
        require(0 < self.share <= 1, "balance.share", self.share, "above 0, at most 1")
        require(
            self.sequence_loss >= 0, "balance.sequence_loss", self.sequence_loss, "0 or more"
        )


class Sizes(NamedTuple):
    """What a balancer must know of the model, and the seed of what it draws."""

    num_layers: int
    """MoE layers."""
    num_experts: int
    top_k: int
    vocab_size: int
    seed: int
    device: str
    rank: int = 0
    ranks: int = 1
    """Processes that share a step's micro-batches, and which this one is."""


class Routed(Protocol):
    """What a balancer reads of a layer's routing; `routing.Routing` has it."""

    @property
    def scores_TE(self) -> Tensor:
        """Affinities before the bias, with their graph."""

    @property
    def experts_TK(self) -> Tensor:
        """The chosen experts; -1 is none."""


class Balancer(ABC):
    """The protocol of all balancers. State is fp32, one row per MoE layer.

    What is not overridden adds the bias to the scores, counts loads, and has the
    sequence-wise loss.
    """

    bias_LE: Tensor
    """Selection bias of every MoE layer: what inference adds before top-k."""
    momentum_LE: Tensor
    """The bias's velocity, zeros where a method has none."""
    together: Callable[[Tensor], Tensor] = staticmethod(lambda tensor: tensor)
    """The sum of a tensor over the ranks of a run, in place."""

    def __init__(self, config: BalanceConfig, sizes: Sizes) -> None:
        self.config, self.sizes = config, sizes
        shape = sizes.num_layers, sizes.num_experts
        self.bias_LE = torch.zeros(shape, device=sizes.device)
        self.momentum_LE = torch.zeros(shape, device=sizes.device)

    def state(self) -> dict[str, Tensor]:
        """By name, all that a resumed run needs to go on to the bit."""
        return {"bias": self.bias_LE, "momentum": self.momentum_LE}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave, wherever its tensors are."""
        self.bias_LE = tensors["bias"].to(self.sizes.device)
        self.momentum_LE = tensors["momentum"].to(self.sizes.device)

    def fixed(self, tokens_BS: Tensor) -> Tensor | None:
        """The choices [L, T, K] of a method that goes by token ids alone, else None."""
        return None

    def begin(self, tokens_BS: Tensor, documents_BS: Tensor) -> Tensor | None:
        """Look at a micro-batch before its forward; what `fixed` says of it."""
        return self.fixed(tokens_BS)

    def select(self, scores_TE: Tensor, layer: int) -> Tensor:
        """The ranking [T, E] whose top-k MoE layer `layer` takes; no gradient flows.

        Or the choice itself, int64 [T, K] with -1 for no expert. It changes nothing, for
        recomputing activations calls it again.
        """
        return scores_TE + self.bias_LE[layer]

    def observe(self, routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
        """Statistics [L, ...] of one micro-batch, to be summed over the optimiser step."""
        return load(routing, valid_T)

    @abstractmethod
    def update(self, statistics: Tensor) -> None:
        """Move the bias, once per optimiser step, after it."""

    def loss(self, routing: Sequence[Routed], documents_BS: Tensor) -> Tensor | None:
        """The balancing loss summed over layers and the rows of a micro-batch, or None."""
        return sequence_losses(self.config.sequence_loss, routing, documents_BS)


class Unmoved(Balancer):
    """A balancer that never moves the bias: one that came with the weights stays as it is."""

    def update(self, statistics: Tensor) -> None:
        """Nothing moves."""


class Unbalanced(Unmoved):
    """The control: no update, no loss."""

    def loss(self, routing: Sequence[Routed], documents_BS: Tensor) -> Tensor | None:
        """None, whatever the weight of the sequence-wise loss."""
        return None


class Biased(Balancer):
    """Loss-free balancing: the bias moves by expert loads, by the rule config names."""

    def update(self, statistics: Tensor) -> None:
        """One step of the rule on the loads of the whole optimiser step."""
        c, load_LE = self.config, statistics
        if c.method == "loss_free":
            self.bias_LE = loss_free(self.bias_LE, load_LE, u=c.rate)
        elif c.method == "sign":
            self.bias_LE = sign(self.bias_LE, load_LE, gamma=c.rate)
        elif c.method == "proportional":
            self.bias_LE = proportional(self.bias_LE, load_LE, u=c.rate)
        else:
            self.bias_LE, self.momentum_LE = smebu(
                self.bias_LE,
                self.momentum_LE,
                load_LE,
                lam=c.rate,
                beta=c.beta,
                kappa=c.kappa,
                centre=c.centre,
            )


def load(routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
    """Tokens per expert [L, E], int64; each valid token once per chosen expert.

    Taken from the routing that forward returned, so recomputing activations in backward
    cannot count a token twice. An expert of -1 is none, and falls into a bin before the first.
    """
    rows = [
        torch.bincount(r.experts_TK[valid_T].flatten() + 1, minlength=r.scores_TE.shape[-1] + 1)
        for r in routing
    ]
    return torch.stack(rows)[:, 1:]


def violation(load_LE: Tensor) -> Tensor:
    """(mean(n) - n) / mean(n), in floating point; zero where a layer saw no token."""
    mean_L1 = load_LE.mean(-1, keepdim=True)
    return (mean_L1 - load_LE) / torch.where(mean_L1 > 0, mean_L1, 1.0)


def loss_free(bias_LE: Tensor, load_LE: Tensor, *, u: float) -> Tensor:
    """The next bias by uncentred sign updates, `b += u sign(mean(n) - n)`.

    Wang et al. 2024 (arXiv 2408.15664, algorithm 1).
    """
    return bias_LE + u * violation(load_LE.to(bias_LE)).sign()


def proportional(bias_LE: Tensor, load_LE: Tensor, *, u: float) -> Tensor:
    """The next bias by relative violation, `b += u (mean(n) - n) / mean(n)`.

    Wang et al. 2024 (arXiv 2408.15664, table 3) step by `mean(n) - n`; divided by the mean,
    the step does not depend on the batch.
    """
    return bias_LE + u * violation(load_LE.to(bias_LE))


def sign(bias_LE: Tensor, load_LE: Tensor, *, gamma: float) -> Tensor:
    """The next bias by centred sign updates, `b += gamma sign(mean(n) - n)`, `b -= mean(b)`.

    Trinity Nano and Mini (technical report, equations 19-22); `loss_free` with a centre.
    """
    moved_LE = loss_free(bias_LE, load_LE, u=gamma)
    return moved_LE - moved_LE.mean(-1, keepdim=True)


def smebu(
    bias_LE: Tensor,
    momentum_LE: Tensor,
    load_LE: Tensor,
    *,
    lam: float,
    beta: float,
    kappa: float,
    centre: bool = True,
) -> tuple[Tensor, Tensor]:
    """One Soft-clamped Momentum Expert Bias Update: the next (bias, momentum), both [L, E].

    `load_LE` counts the routed tokens of one whole optimiser step. The violation
    v = (mean(n) - n) / mean(n) is relative, so lambda does not depend on the batch; tanh
    bounds the step, not the bias; a layer that saw no token keeps its direction.
    Works in the dtype of `bias_LE`. Trinity Large technical report, equations 23-28; leaving
    out the centring is a study's.
    """
    step_LE = lam * torch.tanh(kappa * violation(load_LE.to(bias_LE)))
    if centre:
        step_LE = step_LE - step_LE.mean(-1, keepdim=True)
    momentum_LE = beta * momentum_LE + (1 - beta) * step_LE
    return bias_LE + momentum_LE, momentum_LE


def chosen(routed: Routed) -> Tensor:
    """1 where a token chose an expert [T, E], in the dtype of the scores."""
    scores_TE, experts_TK = routed.scores_TE, routed.experts_TK
    num_experts = scores_TE.shape[-1]
    place_TK = torch.where(experts_TK < 0, num_experts, experts_TK)
    taken_TE = scores_TE.new_zeros(len(scores_TE), num_experts + 1).scatter_(1, place_TK, 1.0)
    return taken_TE[:, :num_experts]


def shares(scores_TE: Tensor) -> Tensor:
    """Scores normalised over experts: as they are under softmax."""
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def sequence_loss(routed: Routed, documents_BS: Tensor) -> Tensor:
    """The sequence-wise balance loss of one layer, summed over packed rows; 1 a row if even.

    f_i is expert i's share of a row's choices, bias included, times E; P_i the mean of the
    scores normalised over experts, bias not included; the loss is sum_i f_i P_i. Padding
    (document below 0) is left out. Trinity Large technical report, equations 29-32;
    DeepSeek-V3 (arXiv 2412.19437), equations 17-20.
    """
    scores_TE = routed.scores_TE
    shape = *documents_BS.shape, scores_TE.shape[-1]
    valid_BS1 = (documents_BS >= 0).unsqueeze(-1).to(scores_TE.dtype)
    chosen_BE = (chosen(routed).view(shape) * valid_BS1).sum(1)
    choices_B1 = chosen_BE.sum(-1, keepdim=True).clamp(min=1)
    fraction_BE = chosen_BE * shape[-1] / choices_B1
    tokens_B1 = valid_BS1.sum(1).clamp(min=1)
    mean_BE = (shares(scores_TE).view(shape) * valid_BS1).sum(1) / tokens_B1
    return (fraction_BE * mean_BE).sum()


def sequence_losses(
    weight: float, routing: Sequence[Routed], documents_BS: Tensor
) -> Tensor | None:
    """`weight` times the sequence-wise losses of all layers; None where it weighs nothing."""
    if weight == 0:
        return None
    return weight * torch.stack([sequence_loss(r, documents_BS) for r in routing]).sum()
