"""Losses as functions of the model's output, summed so that micro-batches add up."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinity_lib.data import IGNORE


class TokenLoss(NamedTuple):
    """Sums over one micro-batch, in fp32 or better."""

    cross_entropy: Tensor
    """Nats, summed over predicted tokens."""
    z: Tensor
    """Squared log-partition of the output logits, summed over predicted tokens."""
    tokens: Tensor
    """How many tokens were predicted, int64."""


def token_loss(logits_BSV: Tensor, targets_BS: Tensor) -> TokenLoss:
    """Cross entropy and z-loss of the output logits (z-loss: PaLM, arXiv 2204.02311, s. 5).

    Sums, not means: divide by the tokens of the whole optimiser step, so that the loss does
    not depend on how the batch was split.
    """
    precise = torch.promote_types(logits_BSV.dtype, torch.float32)
    logits_TV, targets_T = logits_BSV.flatten(0, 1).to(precise), targets_BS.flatten()
    valid_T = targets_T != IGNORE
    cross_entropy, z = _Sums.apply(logits_TV, targets_T.clamp(min=0), valid_T)
    return TokenLoss(cross_entropy, z, valid_T.sum())


class _Sums(torch.autograd.Function):
    """Both sums over one log-softmax, which is all that backward keeps.

    Apart, each takes its own passes over the logits: the largest tensor of a small model.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, targets_T: Tensor, valid_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        log_shares_TV = logits_TV.log_softmax(-1)
        targets_T1 = targets_T.unsqueeze(1)
        picked_T = log_shares_TV.gather(1, targets_T1).squeeze(1)
        partition_T = logits_TV.gather(1, targets_T1).squeeze(1) - picked_T
        ctx.save_for_backward(log_shares_TV, targets_T1, valid_T, partition_T)
        z = torch.where(valid_T, partition_T.square(), 0).sum()
        return -torch.where(valid_T, picked_T, 0).sum(), z

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dcross_entropy: Tensor, dz: Tensor
    ) -> tuple[Tensor, None, None]:
        log_shares_TV, targets_T1, valid_T, partition_T = ctx.saved_tensors
        weight_T = torch.where(valid_T, dcross_entropy + 2 * dz * partition_T, 0)
        gradient_TV = log_shares_TV.exp().mul_(weight_T.unsqueeze(1))
        less_T = torch.where(valid_T, -dcross_entropy, 0)
        return gradient_TV.scatter_add_(1, targets_T1, less_T.unsqueeze(1)), None, None
