"""Losses as functions of the model's output, summed so that micro-batches add up."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
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
    cross_entropy = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORE, reduction="sum")
    z_T = logits_TV.logsumexp(-1).square()
    return TokenLoss(cross_entropy, torch.where(valid_T, z_T, 0).sum(), valid_T.sum())
