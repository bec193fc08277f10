"""Exams: what is sampled, scored and marked, against one question at a time."""

import numpy as np
import pytest
import torch

from tests import conversing
from trinity_lib import examination, lessons
from trinity_lib.chat import Example
from trinity_lib.config import BadValue
from trinity_lib.dialogues import Question, ask
from trinity_lib.examination import PREFERENCES, Exam
from trinity_lib.model import ModelConfig


def test_sampling_is_a_full_forward_pass_a_token(tiny_model: ModelConfig) -> None:
    model, template = conversing.model(tiny_model), conversing.template()
    prompts = [template.prompt(ask(text)) for text in ("one", "a longer question?", "37 + 4 =")]
    new = examination.sample(model, template, prompts, 5)
    for prompt, row in zip(prompts, new.tolist(), strict=True):
        tokens = prompt.tolist()
        for token in row:
            with torch.no_grad():
                best = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            assert token == best
            if token == template.stop:
                break
            tokens.append(token)


def test_likelihoods_are_sums_over_the_answer(tiny_model: ModelConfig) -> None:
    model, template = conversing.model(tiny_model).double(), conversing.template()
    pairs = lessons.preferences("formats", 0).held_out[:40]
    found = examination.likelihoods(model, template, pairs, 64)
    for pair, row in zip(pairs[:6], found[:6].tolist(), strict=True):
        for text, logp in zip((pair.chosen, pair.rejected), row, strict=True):
            asked = len(template.prompt(pair.asked))
            question = Question("", pair.asked, text)
            tokens = torch.from_numpy(template.encode(question.conversation).tokens).long()
            with torch.no_grad():
                shares = model(tokens[None]).logits[0].log_softmax(-1)
            alone = sum(float(shares[i - 1, tokens[i]]) for i in range(asked, len(tokens)))
            assert logp == pytest.approx(alone, abs=1e-9)


def test_marks_are_shares_by_task(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, template = conversing.model(tiny_model), conversing.template()
    questions = [Question("a", ask(f"{i}"), str(i), "number") for i in range(4)]
    questions += [Question("b", ask("x"), "yes")]
    pairs = lessons.preferences("facts", 0).held_out[:3]
    exam = Exam(questions, pairs)
    said = ["0", "7", "word", "3", "no"]
    monkeypatch.setattr(examination, "answers", lambda *_: said)
    scores = torch.tensor([[-1.0, -2.0], [-3.0, -2.0], [-1.0, -1.5]])
    monkeypatch.setattr(examination, "likelihoods", lambda *_: scores)
    marks = examination.sit(model, template, exam, 64)
    assert exam.tasks == ["a", "b", PREFERENCES]
    assert [exam.count(task) for task in exam.tasks] == [4, 1, 3]
    assert marks.accuracy == pytest.approx([0.5, 0.0, 2 / 3])
    assert marks.formed == [0.75, 1.0, None]
    assert marks.said == said


def test_an_exam_is_the_same_for_the_same_seed() -> None:
    held_out = {name: lessons.task(name, 0).held_out for name in ("facts", "digits")}
    first, second, other = (examination.choose(held_out, [], 9, seed) for seed in (0, 0, 1))
    assert first == second != other
    assert [first.count(task) for task in first.tasks] == [9, 9]


def test_what_cannot_be_learnt_is_refused() -> None:
    def example(length: int, asked: int, token: int = 5) -> Example:
        return Example(np.full(length, token, np.int32), np.arange(length) >= asked)

    fits = examination.require_fits([example(9, 4), example(30, 4)], 10, "mine", 384)
    assert fits == ["1 of 2 examples of mine are cut at 10 tokens"]
    with pytest.raises(BadValue, match="sequence_length is 10; .* no answer of mine fits in"):
        examination.require_fits([example(30, 12)], 10, "mine", 384)
    with pytest.raises(BadValue, match="the tokenizer gives token 400; the model has 384"):
        examination.require_fits([example(9, 4, 400)], 10, "mine", 384)
