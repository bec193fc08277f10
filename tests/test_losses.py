"""Token losses against torch's own, and across splits."""

import math

import pytest
import torch
import torch.nn.functional as F

from trinity_lib.losses import token_loss

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
