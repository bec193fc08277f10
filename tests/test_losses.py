"""Token losses against torch's own, and across splits."""

import math

import pytest
import torch
import torch.nn.functional as F

from trinity_lib.losses import (
    log_probabilities,
    policy_loss,
    preference_loss,
    token_loss,
)

LOGITS = torch.randn(4, 6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.randint(-1, 11, (4, 6), generator=torch.Generator().manual_seed(1))


def test_sums_over_predicted_tokens() -> None:
    loss = token_loss(LOGITS, TARGETS)
    keep = TARGETS >= 0
    chosen = LOGITS.log_softmax(-1)[keep].gather(-1, TARGETS[keep, None])
    assert torch.allclose(loss.cross_entropy, -chosen.sum())
    assert torch.allclose(loss.z, LOGITS[keep].exp().sum(-1).log().square().sum())
    assert int(loss.tokens) == int(keep.sum()) < TARGETS.numel()


def test_micro_batches_add_up() -> None:
    whole = token_loss(LOGITS, TARGETS)
    parts = [token_loss(LOGITS[i : i + 1], TARGETS[i : i + 1]) for i in range(4)]
    for name in ("cross_entropy", "z", "tokens"):
        assert torch.allclose(getattr(whole, name), sum(getattr(p, name) for p in parts))


def test_low_precision_logits_are_summed_in_fp32() -> None:
    loss = token_loss(LOGITS.bfloat16(), TARGETS)
    assert loss.cross_entropy.dtype == torch.float32
    flat = LOGITS.bfloat16().float().flatten(0, 1)
    expected = F.cross_entropy(flat, TARGETS.flatten(), ignore_index=-1, reduction="sum")
    assert torch.equal(loss.cross_entropy, expected)


def test_nothing_to_predict_is_zero() -> None:
    loss = token_loss(LOGITS, torch.full_like(TARGETS, -1))
    assert float(loss.cross_entropy) == float(loss.z) == int(loss.tokens) == 0


def test_against_scalar_arithmetic() -> None:
    cross_entropy = z = 0.0
    for logits, target in zip(LOGITS.flatten(0, 1), TARGETS.flatten().tolist(), strict=True):
        if target >= 0:
            log_total = math.log(sum(math.exp(v) for v in logits.tolist()))
            cross_entropy += log_total - float(logits[target])
            z += log_total**2
    loss = token_loss(LOGITS, TARGETS)
    assert float(loss.cross_entropy) == pytest.approx(cross_entropy, rel=1e-12)
    assert float(loss.z) == pytest.approx(z, rel=1e-12)


def test_gradients_of_micro_batches_add_up_and_skip_what_is_ignored() -> None:
    grads = []
    for size in (4, 2, 1):
        logits = LOGITS.clone().requires_grad_()
        for i in range(0, 4, size):
            loss = token_loss(logits[i : i + size], TARGETS[i : i + size])
            (loss.cross_entropy + 0.1 * loss.z).backward()
        grads.append(logits.grad)
    assert torch.allclose(grads[0], grads[1]) and torch.allclose(grads[0], grads[2])
    share = LOGITS.softmax(-1)
    chosen = F.one_hot(TARGETS.clamp(min=0), 11)
    expected = share - chosen + 0.2 * LOGITS.logsumexp(-1, keepdim=True) * share
    assert torch.allclose(grads[0], expected * (TARGETS >= 0).unsqueeze(-1))


def test_large_logits_stay_finite() -> None:
    loss = token_loss(torch.tensor([[[1e4, -1e4]]]), torch.tensor([[1]]))
    assert float(loss.cross_entropy) == 2e4 and float(loss.z) == 1e8


def test_log_probabilities_sum_to_the_cross_entropy() -> None:
    logp = log_probabilities(LOGITS, TARGETS)
    assert torch.allclose(-logp.sum(), token_loss(LOGITS, TARGETS).cross_entropy)
    assert (logp[TARGETS < 0] == 0).all()


def test_preferences_are_equation_7() -> None:
    """Rafailov et al. 2023, one pair after another."""
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double().mul(5)
    found = preference_loss(*values, beta=0.3)
    for i, (chosen, rejected, old_chosen, old_rejected) in enumerate(values.T.tolist()):
        inner = 0.3 * (chosen - old_chosen) - 0.3 * (rejected - old_rejected)
        assert float(found.margin_P[i]) == pytest.approx(inner)
        assert float(found.loss_P[i]) == pytest.approx(-math.log(1 / (1 + math.exp(-inner))))
    chosen = values[0].clone().requires_grad_()
    preference_loss(chosen, *values[1:], beta=0.3).loss_P.sum().backward()
    assert torch.allclose(chosen.grad, -0.3 * torch.sigmoid(-found.margin_P))


def test_policy_is_equations_3_and_4() -> None:
    """Shao et al. 2024, one token after another."""
    generator = torch.Generator().manual_seed(3)
    new, old, reference, advantage = torch.randn(4, 3, 5, generator=generator).double().unbind()
    new = old + 0.4 * new
    found = policy_loss(new, old, reference, advantage, clip=0.2, beta=0.1)
    for i in range(3):
        for j in range(5):
            ratio = math.exp(float(new[i, j] - old[i, j]))
            gain = float(advantage[i, j])
            surrogate = min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain)
            apart = math.exp(float(reference[i, j] - new[i, j]))
            divergence = apart - math.log(apart) - 1
            assert float(found.loss_BS[i, j]) == pytest.approx(0.1 * divergence - surrogate)
            assert (
                float(found.divergence_BS[i, j]) == pytest.approx(divergence)
                and divergence >= 0
            )
            outside = (gain > 0 and ratio > 1.2) or (gain < 0 and ratio < 0.8)
            assert bool(found.clipped_BS[i, j]) == outside


def test_a_clipped_token_has_no_gradient_from_its_advantage() -> None:
    new = torch.tensor([[1.0, 1.0, -1.0]], requires_grad=True)
    zeros, advantage = torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 1.0]])
    policy_loss(new, zeros, zeros, advantage, clip=0.2, beta=0.0).loss_BS.sum().backward()
    assert new.grad is not None
    assert (new.grad != 0).tolist() == [[False, True, True]]
