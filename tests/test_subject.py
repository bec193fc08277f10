"""What is asked twice is asked once, and findings say when they are at chance."""

from collections.abc import Sequence

import numpy as np

from trinity_lib.subject import Finding, Remembered


class Counting:
    """Says how long an answer is, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        self.asked += [(p, tuple(a)) for p, a in zip(prompts, answers, strict=True)]
        return [np.array([float(len(each)) for each in mine]) for mine in answers]

    def complete(self, prompts: Sequence[str], tokens: int) -> list[str]:
        return [f"{prompt} {tokens}" for prompt in prompts]

    def losses(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.arange(len(text)) for text in texts]


def test_the_same_question_is_put_once() -> None:
    inner = Counting()
    subject = Remembered(inner)
    first = subject.score(["p", "q", "p"], [["a", "bb"], ["c"], ["a", "bb"]])
    first[0][0] = np.nan  # what a caller does to an answer is its own
    again = subject.score(["q", "p", "p"], [["c"], ["a", "bb"], ["a"]])
    assert [each.tolist() for each in again] == [[1.0], [1.0, 2.0], [1.0]]
    assert inner.asked == [("p", ("a", "bb")), ("q", ("c",)), ("p", ("a",))]
    assert subject.score([], []) == []
    assert subject.complete(["x"], 3) == ["x 3"]
    assert subject.losses(["ab"])[0].tolist() == [0, 1]


def test_a_finding_knows_chance_and_truth() -> None:
    found = Finding("f", "i", "m", 1.0, 0.4, 0.2, 0.6, 0.5, 9)
    assert found.at_chance
    assert not found.recovered
    assert not found._replace(chance=float("nan")).at_chance
