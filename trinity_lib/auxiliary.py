"""Balancers that are a loss: the router's gradient evens out the load, no bias moves.

With f_i expert i's share of the choices times E, counted and without gradient, and P_i the
mean over tokens of the scores normalised over experts, most are `weight * sum_i f_i P_i`,
which is the weight at an even load. They differ in what f is counted over: one row
(`sequence`), one micro-batch (`switch`), the step (`global`). `phi` counts nothing.

Every loss is summed over rows: a mean over a micro-batch is taken times its rows.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trinity_lib.balance import (
    BalanceConfig,
    Balancer,
    Routed,
    Sizes,
    Unmoved,
    load,
    sequence_losses,
    shares,
)


def mean_shares(routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
    """P [L, E]: the mean over valid tokens of the scores normalised over experts."""
    tokens = valid_T.sum().clamp(min=1)
    return torch.stack([shares(r.scores_TE)[valid_T].sum(0) / tokens for r in routing])


def switch_loss(load_LE: Tensor, mean_LE: Tensor) -> Tensor:
    """sum_i f_i P_i, summed over layers; 1 a layer if either is even.

    f_i = E n_i / sum_j n_j. Fedus et al. 2021 (arXiv 2101.03961, equations 4-6), there for
    one expert a token; n_j sums to k times the tokens.
    """
    choices_L1 = load_LE.sum(-1, keepdim=True).clamp(min=1)
    fraction_LE = load_LE.to(mean_LE) * load_LE.shape[-1] / choices_L1
    return (fraction_LE * mean_LE).sum()


def phi_loss(mean_LE: Tensor, average_LE: Tensor) -> Tensor:
    """<p, grad phi(m)> summed over layers, of phi(m) = sum_i m_i log m_i.

    p is the micro-batch's mean normalised score, with its gradient, m the running average.
    A reading of phi-balancing (arXiv 2605.15403), in which p is over all experts, before
    top-k. The gradient's constant 1 is left out: p sums to 1, so it moves nothing.
    """
    tiny = torch.finfo(average_LE.dtype).tiny
    return (mean_LE * average_LE.clamp(min=tiny).log().to(mean_LE)).sum()


class Switch(Unmoved):
    """The loss of GShard and Switch Transformers, balancing every micro-batch by itself.

    That is its definition: another number of micro-batches is another loss.
    """

    def loss(self, routing: Sequence[Routed], documents_BS: Tensor) -> Tensor | None:
        """The sequence-wise loss and this one."""
        valid_T = documents_BS.flatten() >= 0
        own = switch_loss(load(routing, valid_T), mean_shares(routing, valid_T))
        return _sum(
            super().loss(routing, documents_BS), self.config.rate * len(documents_BS) * own
        )


class SequenceWise(Unmoved):
    """The sequence-wise loss alone, at the weight `rate`."""

    def loss(self, routing: Sequence[Routed], documents_BS: Tensor) -> Tensor | None:
        """The sequence-wise loss, whatever its weight beside other methods."""
        return sequence_losses(self.config.rate, routing, documents_BS)


class GlobalBatch(Balancer):
    """Switch's loss with f counted over the step's micro-batches up to the present one.

    Qiu et al. 2025 (arXiv 2501.11873): counts are summed over ranks, and a buffer keeps them
    over the micro-batches of an optimiser step; P stays local. A reading of its buffer:
    it holds the present micro-batch and those before, and is emptied after the step.
    """

    def __init__(self, config: BalanceConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.load_LE = torch.zeros_like(self.bias_LE, dtype=torch.int64)

    def observe(self, routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
        """Expert loads, which the losses of later micro-batches begin with."""
        load_LE = load(routing, valid_T)
        self.load_LE = self.load_LE + self.together(load_LE.clone())
        return load_LE

    def update(self, statistics: Tensor) -> None:
        """Begin to count anew."""
        self.load_LE = torch.zeros_like(self.load_LE)

    def loss(self, routing: Sequence[Routed], documents_BS: Tensor) -> Tensor | None:
        """The sequence-wise loss and this one."""
        valid_T = documents_BS.flatten() >= 0
        load_LE = self.load_LE + self.together(load(routing, valid_T))
        own = switch_loss(load_LE, mean_shares(routing, valid_T))
        return _sum(
            super().loss(routing, documents_BS), self.config.rate * len(documents_BS) * own
        )


class Phi(Balancer):
    """phi-balancing: soft shares are pushed against a running average of themselves.

    `m = (1 - share) m + share p` once a step, from an even start (a reading: the average is
    that of the steps before, which is zero gradient at the first).
    """

    def __init__(self, config: BalanceConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.average_LE = torch.full_like(self.bias_LE, 1 / sizes.num_experts)

    def state(self) -> dict[str, Tensor]:
        """With the running average."""
        return super().state() | {"average": self.average_LE}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """With the running average."""
        super().load_state(tensors)
        self.average_LE = tensors["average"].to(self.sizes.device)

    def observe(self, routing: Sequence[Routed], valid_T: Tensor) -> Tensor:
        """Summed shares, whose sum over experts counts tokens: [L, E], float64."""
        sums = [shares(r.scores_TE.detach().double())[valid_T].sum(0) for r in routing]
        return torch.stack(sums)

    def update(self, statistics: Tensor) -> None:
        """Move the average towards the step's shares; a layer without tokens keeps its own."""
        share, tokens_L1 = self.config.share, statistics.sum(-1, keepdim=True)
        mean_LE = (statistics / tokens_L1.clamp(min=1)).to(self.average_LE)
        moved_LE = (1 - share) * self.average_LE + share * mean_LE
        self.average_LE = torch.where(tokens_L1 > 0, moved_LE, self.average_LE)

    def loss(self, routing: Sequence[Routed], documents_BS: Tensor) -> Tensor | None:
        """The sequence-wise loss and this one, which is below zero."""
        valid_T = documents_BS.flatten() >= 0
        own = phi_loss(mean_shares(routing, valid_T), self.average_LE)
        return _sum(
            super().loss(routing, documents_BS), self.config.rate * len(documents_BS) * own
        )


def _sum(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first + second
