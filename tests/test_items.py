"""Items that a user brings: what is asked of them, and what of a file cannot be used."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from trinity_lib import items
from trinity_lib.config import BadValue, Missing
from trinity_lib.items import Item


class Sure:
    """Puts `share` on the choice that the prompt names."""

    def __init__(self, share: float) -> None:
        self.share = share

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        found = []
        for prompt, mine in zip(prompts, answers, strict=True):
            shares = np.full(len(mine), (1 - self.share) / (len(mine) - 1))
            shares[mine.index(prompt)] = self.share
            found.append(np.log(shares) - 3.0)  # not normalised: other texts are likelier
        return found

    def complete(self, prompts: Sequence[str], tokens: int) -> list[str]:
        return list(prompts)

    def losses(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.zeros(1) for _ in texts]


def made(count: int, right: int, group: str = "all") -> list[Item]:
    """`right` of `count` items have the choice for an answer that `Sure` takes."""
    return [
        Item(" a", (" a", " b", " c", " d"), 0 if n < right else 1, group, f"{group} {n}")
        for n in range(count)
    ]


def test_a_model_that_is_as_sure_as_it_is_right_is_calibrated() -> None:
    found = {f.measure: f for f in items.audit(Sure(0.7), made(100, 70))}
    assert found["accuracy"].estimate == pytest.approx(0.7)
    assert found["accuracy"].chance == 0.25
    assert not found["accuracy"].at_chance
    assert found["confidence above accuracy"].estimate == pytest.approx(0)
    assert found["expected calibration error"].estimate == pytest.approx(0, abs=0.05)
    assert found["probability of the right one"].estimate == pytest.approx(0.7 * 0.7 + 0.03)
    sure = {f.measure: f for f in items.audit(Sure(0.97), made(100, 70))}
    assert sure["confidence above accuracy"].low > 0.15
    assert sure["expected calibration error"].estimate == pytest.approx(0.27, abs=0.02)


def test_groups_are_told_apart_and_together() -> None:
    every = made(20, 20, "easy") + made(20, 5, "hard")
    found = {f.item: f for f in items.audit(Sure(0.7), every) if f.measure == "accuracy"}
    assert {name: f.estimate for name, f in found.items()} == {
        "easy": 1.0, "hard": 0.25, "all": 0.625,
    }  # fmt: skip
    assert found["easy"].low < 0.9  # twenty right are no certainty
    assert found["hard"].at_chance


def test_clusters_are_the_units() -> None:
    every = [i._replace(cluster=str(n // 10)) for n, i in enumerate(made(100, 70))]
    assert {f.units for f in items.audit(Sure(0.7), every)} == {10}


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    rows = [{"prompt": "x", "choices": [" a", " b"], "answer": 1, "group": "g"}]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    assert items.read(path) == [Item("x", (" a", " b"), 1, "g", "line 1")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "an item is"),
        ("[]", "an item is"),
        ('{"prompt": "x", "choices": ["a", "b"]}', "an item is"),
        ('{"prompt": "", "choices": ["a", "b"], "answer": 0}', "prompt must be text"),
        ('{"prompt": "x", "choices": ["a"], "answer": 0}', "at least two different"),
        ('{"prompt": "x", "choices": ["a", "a"], "answer": 0}', "at least two different"),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": 2}', "from 0 to 1"),
        ('{"prompt": "x", "choices": ["a", "b"], "answer": true}', "from 0 to 1"),
    ],
)
def test_a_bad_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(BadValue, match=f"line 2: .*{said}"):
        items.read(path)


def test_no_file_and_no_items(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="no such file"):
        items.read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadValue, match="has no item"):
        items.read(tmp_path / "empty.jsonl")
