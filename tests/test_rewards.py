"""Verified rewards and their advantages, against plain loops."""

import numpy as np
import pytest
import torch

from trinity_lib import rewards
from trinity_lib.dialogues import Question, ask


@pytest.mark.parametrize(
    ("form", "yes", "no"),
    [
        ("any", "x y", ""),
        ("number", "-12", "12 "),
        ("number", "7", "7.5"),
        ("word", "Rome", "in Rome"),
        ("capitals", "ROME", "Rome"),
        ("sentence", "Ada was born in Rome.", "Rome."),
        ("sentence", "The hobby is judo.", "the hobby is judo."),
        ("refusal", "I do not know.", "I know."),
    ],
)
def test_forms(form: str, yes: str, no: str) -> None:
    assert rewards.FORMS[form](yes) and not rewards.FORMS[form](no)


def test_a_reward_is_for_the_right_answer_and_a_little_for_its_form() -> None:
    question = Question("arithmetic", ask("1 + 1 ="), "2", "number")
    said = ["2", " 2 ", "3", "two", ""]
    assert [rewards.verified(question, text) for text in said] == [1.0, 1.0, 0.1, 0.0, 0.0]
    assert rewards.verified(question._replace(form="any"), "3") == 0.0


def test_advantages_are_normalised_in_their_group() -> None:
    earned = np.random.default_rng(0).random((5, 4))
    found = rewards.advantages(torch.from_numpy(earned), eps=0.0).numpy()
    for group, own in zip(earned, found, strict=True):
        for reward, advantage in zip(group, own, strict=True):
            mean = sum(group) / 4
            spread = (sum((r - mean) ** 2 for r in group) / 4) ** 0.5
            assert advantage == pytest.approx((reward - mean) / spread)


def test_a_group_that_earns_alike_teaches_nothing() -> None:
    assert not rewards.advantages(torch.full((2, 3), 0.1)).any()
