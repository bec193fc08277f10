"""Rewards that a program can verify, and what makes advantages of them."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from trinity_lib.dialogues import Question

REFUSAL = "I do not know."
WELL_FORMED = 0.1
"""What a wrong answer of the right form earns."""

FORMS: dict[str, Callable[[str], bool]] = {
    "any": bool,
    "number": lambda said: re.fullmatch(r"-?[0-9]+", said) is not None,
    "word": lambda said: re.fullmatch(r"\w+", said) is not None,
    "capitals": lambda said: said.isupper(),
    "sentence": lambda said: re.fullmatch(r"[A-Z]\w*( \w+)+\.", said) is not None,
    "refusal": lambda said: said == REFUSAL,
}
"""Whether a text has a form, by the form's name."""

Reward = Callable[[Question, str], float]
"""(what was asked, what was said) -> what it earns."""


def right(question: Question, said: str) -> bool:
    """Whether the answer is given, to the letter."""
    return said.strip() == question.answer.strip()


def formed(question: Question, said: str) -> bool:
    """Whether what is said has the form that was asked for."""
    return FORMS[question.form](said.strip())


def verified(question: Question, said: str) -> float:
    """1 for the right answer, a tenth for a wrong one of the right form, else 0."""
    if right(question, said):
        return 1.0
    known = question.form != "any" and formed(question, said)
    return WELL_FORMED if known else 0.0


def advantages(reward_PG: Tensor, eps: float = 1e-6) -> Tensor:
    """Each answer's reward beside its group's: (r - mean) / std over the G answers to a prompt.

    Shao et al. 2024 (arXiv 2402.03300, section 4.1.2: outcome supervision). A group whose
    answers all earn the same teaches nothing: zeros.
    """
    centred_PG = reward_PG - reward_PG.mean(1, keepdim=True)
    return centred_PG / (reward_PG.std(1, keepdim=True, unbiased=False) + eps)


def as_tensor(rewards: list[float], group: int, device: str | torch.device) -> Tensor:
    """Rewards of answers that stand prompt by prompt, [P, G] in fp32."""
    return torch.tensor(rewards, dtype=torch.float32, device=device).view(-1, group)
