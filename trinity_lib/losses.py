"""Losses as functions of the model's output, summed so that micro-batches add up."""

from typing import Any, NamedTuple

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


def log_probabilities(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Each target's log-probability [B, S], in fp32 or better; 0 where nothing is predicted."""
    precise = torch.promote_types(logits_BSV.dtype, torch.float32)
    log_shares_BSV = logits_BSV.to(precise).log_softmax(-1)
    picked_BS = log_shares_BSV.gather(-1, targets_BS.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets_BS != IGNORE, picked_BS, 0.0)


class PreferenceLoss(NamedTuple):
    """One value a pair."""

    loss_P: Tensor
    """Nats."""
    margin_P: Tensor
    """How much more the chosen answer's implicit reward is than the rejected one's."""


def preference_loss(
    chosen_P: Tensor,
    rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    beta: float,
) -> PreferenceLoss:
    """DPO on the answers' log-probabilities, the policy's and the frozen reference's.

    -log sigmoid(beta log(pi(c)/ref(c)) - beta log(pi(r)/ref(r))): Rafailov et al. 2023
    (arXiv 2305.18290, equation 7).
    """
    margin_P = beta * ((chosen_P - reference_chosen_P) - (rejected_P - reference_rejected_P))
    return PreferenceLoss(-F.logsigmoid(margin_P), margin_P)


class PolicyLoss(NamedTuple):
    """One value a token."""

    loss_BS: Tensor
    """What is minimised."""
    divergence_BS: Tensor
    """Estimate of the KL divergence from the reference, nats, never below 0."""
    clipped_BS: Tensor
    """Where the clipped ratio stops the gradient of the advantage; bool."""


def policy_loss(
    new_BS: Tensor,
    old_BS: Tensor,
    reference_BS: Tensor,
    advantage_BS: Tensor,
    *,
    clip: float,
    beta: float,
) -> PolicyLoss:
    """GRPO on the log-probabilities of sampled tokens: policy, sampler and reference.

    -min(r A, clip(r, 1 - e, 1 + e) A) + beta D, r = pi/old, D = ref/pi - log(ref/pi) - 1:
    Shao et al. 2024 (arXiv 2402.03300, equations 3 and 4), which average over an answer's
    tokens and then over answers.
    """
    ratio_BS = (new_BS - old_BS).exp()
    bounded_BS = ratio_BS.clamp(1 - clip, 1 + clip)
    plain_BS, least_BS = ratio_BS * advantage_BS, bounded_BS * advantage_BS
    apart_BS = reference_BS - new_BS
    divergence_BS = apart_BS.expm1() - apart_BS
    loss_BS = beta * divergence_BS - torch.minimum(plain_BS, least_BS)
    return PolicyLoss(loss_BS, divergence_BS.detach(), (least_BS < plain_BS).detach())
