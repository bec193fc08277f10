"""A step of each stage: what it asks of the weights, and that they learn it."""

import dataclasses

import numpy as np
import pytest
import torch

from tests import conversing
from trinity_lib import examination, lessons, stages
from trinity_lib.chat import pack
from trinity_lib.data import IGNORE
from trinity_lib.dialogues import Pair, Question, ask
from trinity_lib.losses import log_probabilities, token_loss
from trinity_lib.model import ModelConfig
from trinity_lib.posttrain_config import PolicyConfig, Stage
from trinity_lib.student import Student


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


COLOURS = ("red", "blue", "green", "black")
ECHO = [Question("echo", ask(f"{i}: say {c}."), c) for i in range(40) for c in COLOURS]
"""Taught in a moment: the answer stands in the question."""

WISH = [Question("wish", ask(f"{i}: a colour?"), COLOURS[i % 4]) for i in range(160)]
"""Any of four, with nothing in the question to tell which."""


def taught(
    tiny_model: ModelConfig, steps: int, task: list[Question] = ECHO, **changes: object
) -> Student:
    """A student after SFT on a task."""
    student = conversing.student(conversing.settings(**changes), tiny_model)
    examples = [student.template.encode(q.conversation) for q in task]
    method = stages.Supervised(Stage(kind="sft", steps=steps, batch=8), [examples], rng())
    for _ in range(steps):
        method.step(student)
    return student


def test_prompts_have_no_gradient_and_answers_do(tiny_model: ModelConfig) -> None:
    """Of the loss by each position's logits: zero unless the next token is an answer's."""
    template, model = conversing.template(), conversing.model(tiny_model)
    packed = pack([template.encode(q.conversation) for q in ECHO[:9]], 64)
    tokens, targets, documents = examination.tensors(packed, model)
    logits = model(tokens, documents).logits
    logits.retain_grad()
    token_loss(logits, targets).cross_entropy.backward()
    moved = logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved, targets != IGNORE)
    said = [template.encode(q.conversation) for q in ECHO[:9]]
    assert int(moved.sum()) == sum(int(e.answer.sum()) for e in said)


def test_sft_teaches_its_task(tiny_model: ModelConfig) -> None:
    student = taught(tiny_model, 60)
    asked = [Question("echo", ask(f"{i}: say {c}."), c) for i in range(50, 55) for c in COLOURS]
    before = examination.answers(conversing.model(tiny_model), student.template, asked)
    after = examination.answers(student.model, student.template, asked)
    right = [
        sum(a == q.answer for a, q in zip(said, asked, strict=True)) for said in (before, after)
    ]
    assert right[0] == 0 and right[1] >= 5  # one in four by chance, once it answers at all
    assert set(after) <= set(COLOURS)


def test_dpo_begins_at_log_2_and_prefers_the_chosen(tiny_model: ModelConfig) -> None:
    student = conversing.student(conversing.settings(rate=0.3), tiny_model)
    pairs = lessons.preferences("facts", 0).train[:40]
    before = examination.likelihoods(student.model, student.template, pairs, 64)
    method = stages.Preferences(Stage(kind="dpo", steps=12, batch=8), student, [pairs], rng())
    measured = [method.step(student) for _ in range(12)]
    assert measured[0].loss == pytest.approx(np.log(2), abs=1e-5)
    assert measured[0].margin == pytest.approx(0, abs=1e-5)
    assert measured[-1].loss < 0.6 and measured[-1].accuracy > 0.7
    after = examination.likelihoods(student.model, student.template, pairs, 64)
    gained = (after[:, 0] - before[:, 0]) - (after[:, 1] - before[:, 1])
    assert float(gained.mean()) > 1


def test_dpo_s_first_gradient_is_half_of_betas_differences(tiny_model: ModelConfig) -> None:
    """Equation 7's gradient at the reference: -beta/2 (grad log pi(c) - grad log pi(r))."""
    config = conversing.settings(micro_batches=3)
    student = conversing.student(config, tiny_model)
    student.optimizers, kept = [], {}
    pairs = lessons.preferences("formats", 0).train[:6]
    method = stages.Preferences(Stage(kind="dpo", steps=1, batch=6), student, [pairs], rng())
    student.config = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, clip=1e9)
    )
    method.step(student)
    kept = {
        n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None
    }
    model = conversing.model(tiny_model)
    for pair in pairs:
        for text, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            question = Question("", pair.asked, text)
            part = pack([student.template.encode(question.conversation)], 64)
            tokens, targets, documents = examination.tensors(part, model)
            logp = log_probabilities(model(tokens, documents).logits, targets).sum()
            (-sign * 0.5 * config.dpo.beta * logp / len(pairs)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(kept[name], parameter.grad, atol=1e-6), name


def test_the_reference_is_frozen(tiny_model: ModelConfig) -> None:
    student = conversing.student(conversing.settings(), tiny_model)
    pairs = lessons.preferences("facts", 0).train[:16]
    method = stages.Preferences(Stage(kind="dpo", steps=4, batch=8), student, [pairs], rng())
    before = {pair: value.clone() for pair, value in method.reference.items()}
    for _ in range(4):
        method.step(student)
    assert before.keys() <= set(pairs)
    assert all(torch.equal(before[pair], method.reference[pair]) for pair in before)


def test_grpo_raises_a_reward_that_is_easily_earned(tiny_model: ModelConfig) -> None:
    """One colour of four earns it, whatever is asked."""
    policy = PolicyConfig(group=8, beta=0.01, max_new_tokens=6)
    student = taught(tiny_model, 40, WISH, grpo=policy)
    for optimizer in student.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.3 * group["peak"]

    def liked(_: Question, said: str) -> float:
        return float(said == "red")

    stage = Stage(kind="grpo", steps=15, batch=8)
    method = stages.Rewards(stage, student, [WISH], rng(), liked)
    measured = [method.step(student) for _ in range(15)]
    rewards = [m.reward for m in measured]
    assert np.mean(rewards[:3]) < 0.45 and np.mean(rewards[-3:]) > 0.9, rewards
    assert measured[-1].kl > measured[0].kl >= 0


def test_grpo_s_loss_is_a_loop_over_answers_and_tokens(tiny_model: ModelConfig) -> None:
    """Before any update the ratio is 1, so what is minimised is -A and a divergence of 0."""
    policy = PolicyConfig(group=4, updates=1, max_new_tokens=5)
    for micro_batches in (1, 3):
        config = conversing.settings(grpo=policy, micro_batches=micro_batches)
        student = conversing.student(config, tiny_model)
        earned: list[float] = []

        def reward(_: Question, said: str, earned: list[float] = earned) -> float:
            earned.append(float(len(said)))
            return earned[-1]

        stage = Stage(kind="grpo", steps=1, batch=3)
        measured = stages.Rewards(stage, student, [ECHO], rng(), reward).step(student)
        groups = np.array(earned).reshape(3, 4)
        loss = 0.0
        for group in groups:
            for value in group:
                advantage = (value - group.mean()) / (group.std() + 1e-6)
                loss += -advantage / 12  # every one of its tokens the same
        assert measured.loss == pytest.approx(loss, abs=1e-5)
        assert measured.reward == pytest.approx(np.mean(earned))
        assert measured.kl == pytest.approx(0, abs=1e-6) and measured.clipped == 0


def test_tasks_take_turns_and_are_shuffled_every_epoch() -> None:
    stream = stages.turns([range(3), range(10, 15)], rng())
    drawn = [next(stream) for _ in range(30)]
    assert all(item < 10 for item in drawn[::2]) and all(item >= 10 for item in drawn[1::2])
    for begin in range(0, 15, 3):
        assert sorted(drawn[::2][begin : begin + 3]) == [0, 1, 2]
    assert len({tuple(drawn[::2][b : b + 3]) for b in range(0, 15, 3)}) > 1


def test_a_step_s_rows_are_filled(tiny_model: ModelConfig) -> None:
    student = conversing.student(conversing.settings(sequence_length=48), tiny_model)
    examples = [student.template.encode(q.conversation) for q in ECHO]
    method = stages.Supervised(Stage(kind="sft", steps=1, batch=5), [examples], rng())
    seen = []
    for _ in range(6):
        taken = method._next(student.config)
        packed = pack(taken, 48)
        assert len(packed.owner_BS) == 5
        seen += [tuple(example.tokens) for example in taken]
    assert len(set(seen)) == len(seen)  # none lost, none twice, until all were seen


def test_pairs_and_questions_can_be_told_apart_in_a_dict() -> None:
    assert hash(Pair("t", ask("x"), "a", "b")) != hash(Pair("t", ask("x"), "b", "a"))
