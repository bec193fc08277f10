"""One update: micro-batches add up, the balancer moves as in pre-training or not at all."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests import conversing
from trinity_lib import balance, lessons
from trinity_lib.chat import pack
from trinity_lib.lora import LoraConfig
from trinity_lib.losses import token_loss
from trinity_lib.model import ModelConfig
from trinity_lib.posttrain_config import Stage
from trinity_lib.step import TrainingFailed
from trinity_lib.student import Student, optimizers, share, update


def parts(count: int = 1) -> list:
    """Sixteen examples in so many parts."""
    template = conversing.template()
    questions = lessons.task("formats", 0).train[:16]
    examples = [template.encode(q.conversation) for q in questions]
    size = 16 // count
    return [pack(examples[i : i + size], 96) for i in range(0, 16, size)]


def objective(logits: Tensor, targets: Tensor, _: int) -> tuple[Tensor, dict[str, float]]:
    loss = token_loss(logits, targets).cross_entropy / 100
    return loss, {"loss": loss.item()}


def weights(student: Student) -> Tensor:
    return torch.cat([p.detach().flatten() for p in student.model.parameters()])


def test_micro_batches_make_one_update(tiny_model: ModelConfig) -> None:
    config = conversing.settings(balance=conversing.ON)
    config = dataclasses.replace(
        config, balance=dataclasses.replace(conversing.ON, sequence_loss=0.0)
    )
    whole, split = (conversing.student(config, tiny_model) for _ in range(2))
    for each in (whole, split):
        each.model.double()
        each.optimizers = optimizers(each.model, config, [])
    one, two = update(whole, parts(1), objective), update(split, parts(4), objective)
    assert one.sums["loss"] == pytest.approx(two.sums["loss"])
    assert one.grad_norm == pytest.approx(two.grad_norm)
    assert one.tokens == two.tokens and torch.equal(one.load_LE, two.load_LE)
    assert (weights(whole) - weights(split)).abs().max() < 1e-9
    assert torch.equal(whole.balancer.bias_LE, split.balancer.bias_LE)


def test_frozen_biases_stay_to_the_bit(tiny_model: ModelConfig) -> None:
    student = conversing.student(conversing.settings(), tiny_model)
    before = [router.bias_E.clone() for router in student.model.routers()]
    started = weights(student)
    for _ in range(3):
        update(student, parts(), objective)
    after = [router.bias_E for router in student.model.routers()]
    assert all(torch.equal(b, a) and bool(b.any()) for b, a in zip(before, after, strict=True))
    assert not torch.equal(started, weights(student))


def test_the_balancer_moves_by_the_loads_of_the_update(tiny_model: ModelConfig) -> None:
    student = conversing.student(conversing.settings(balance=conversing.ON), tiny_model)
    bias, momentum = student.balancer.bias_LE.clone(), student.balancer.momentum_LE.clone()
    for _ in range(2):
        given = parts(2)
        done = update(student, given, objective)
        tokens = sum(int((p.owner_BS >= 0).sum()) for p in given)
        assert done.tokens == tokens
        assert (done.load_LE.sum(-1) == tokens * tiny_model.router.top_k).all()
        c = conversing.ON
        bias, momentum = balance.smebu(
            bias, momentum, done.load_LE, lam=c.rate, beta=c.beta, kappa=c.kappa
        )
        stored = torch.stack([router.bias_E for router in student.model.routers()])
        assert torch.equal(student.balancer.bias_LE, bias) and torch.equal(stored, bias)


def test_a_loss_that_is_no_number_stops_before_the_update(tiny_model: ModelConfig) -> None:
    student = conversing.student(conversing.settings(), tiny_model)
    before = weights(student)

    def broken(logits: Tensor, *_: object) -> tuple[Tensor, dict[str, float]]:
        return logits.sum() * float("nan"), {"loss": float("nan")}

    with pytest.raises(TrainingFailed, match="the loss is nan; lower the learning rate"):
        update(student, parts(), broken)
    assert torch.equal(before, weights(student))


def test_the_rate_rises_then_falls_to_nothing() -> None:
    """Technical report, section 4."""
    stage = Stage(kind="sft", steps=20)
    rates = [share(stage, n, 0.25) for n in range(20)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 15 / 16])
    falls = [a - b for a, b in zip(rates[5:], [*rates[6:], 0.0], strict=True)]
    assert falls == pytest.approx([1 / 16] * 15)
    assert [share(Stage(kind="sft", steps=n), 0, 0.1) for n in (1, 2)] == [1.0, 1.0]
    assert share(stage, 0, 0.0) == pytest.approx(20 / 21)


def test_peaks_are_shares_of_pre_trainings(tiny_model: ModelConfig) -> None:
    config = conversing.settings(rate=0.1)
    student = conversing.student(config, tiny_model)
    peaks = {type(o).__name__: o.param_groups[0]["peak"] for o in student.optimizers}
    own = conversing.OPTIM
    assert peaks == {"Muon": pytest.approx(own.muon_rate / 10), "AdamW": own.adamw_rate / 10}
    config = dataclasses.replace(config, lora=LoraConfig(rate=5.0))
    (only,) = optimizers(student.model, config, student.trained)
    assert only.param_groups[0]["peak"] == pytest.approx(own.adamw_rate / 2)
