"""Items that a user brings: what is asked of them, and what of a file cannot be used."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from trinity_lib import forecasts, items
from trinity_lib.config import BadValue, Missing
from trinity_lib.items import Item
from trinity_lib.subject import Finding


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
    error = found["squared calibration error, debiased"]
    assert error.estimate == pytest.approx(0, abs=0.01) and error.low < 0 < error.high
    assert found["probability of the right one"].estimate == pytest.approx(0.7 * 0.7 + 0.03)
    sure = {f.measure: f for f in items.audit(Sure(0.97), made(100, 70))}
    assert sure["confidence above accuracy"].low > 0.15
    error = sure["squared calibration error, debiased"]
    assert error.estimate == pytest.approx(0.27**2, abs=0.01) and error.low > 0.02


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


Drawn = tuple[np.ndarray, np.ndarray, list[str]]


def drawn(generator: np.random.Generator, clusters: int, each: int, over: float = 0) -> Drawn:
    """Confidence, outcomes and clusters; outcomes of one go together, at a rate `over` less."""
    count = clusters * each
    sure = np.repeat(generator.uniform(0.5, 0.9, clusters), each)
    sure = sure + generator.uniform(-0.05, 0.05, count)
    own, shared = generator.uniform(size=count), generator.uniform(size=clusters)
    luck = np.where(generator.uniform(size=count) < 0.7, np.repeat(shared, each), own)
    names = [str(n) for n in np.repeat(np.arange(clusters), each)]
    return sure, (luck < sure - over).astype(float), names


@pytest.mark.parametrize(("clusters", "each"), [(20, 1), (60, 1), (10, 6), (200, 1), (40, 5)])
def test_the_interval_of_a_calibrated_subject_covers_0(clusters: int, each: int) -> None:
    """In about 95% of 200 repeats: at least 92%, of which 95% has less in 2% of cases."""
    generator = np.random.default_rng(0)
    found = [items.calibration_error(*drawn(generator, clusters, each)) for _ in range(200)]
    estimates = np.array([f.estimate for f in found])
    assert sum(f.low <= 0 <= f.high for f in found) >= 184
    assert abs(estimates.mean()) < 3 * estimates.std() / 200**0.5


@pytest.mark.parametrize("low", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("count", [20, 60, 200])
def test_the_interval_covers_0_where_errors_are_too_rare_to_be_seen(
    count: int, low: float
) -> None:
    """Of a calibrated subject that is sure: most draws have no error at all."""
    generator = np.random.default_rng(0)
    names, covered = [str(n) for n in range(count)], 0
    for _ in range(200):
        sure = generator.uniform(low, (1 + low) / 2, count)
        right = (generator.uniform(size=count) < sure).astype(float)
        found = items.calibration_error(sure, right, names)
        covered += found.low <= 0 <= found.high
    assert covered >= 184


def test_the_calibration_error_of_one_that_is_too_sure_is_found() -> None:
    generator = np.random.default_rng(0)
    found = [items.calibration_error(*drawn(generator, 60, 5, 0.3)) for _ in range(100)]
    assert np.mean([f.estimate for f in found]) == pytest.approx(0.09, abs=0.01)
    assert sum(f.low <= 0.09 <= f.high for f in found) >= 90
    assert sum(f.low > 0 for f in found) >= 90


def test_the_calibration_error_is_that_of_kumar_where_items_are_their_own_clusters() -> None:
    generator = np.random.default_rng(3)
    sure = np.repeat([0.5, 0.6, 0.9], 20)  # alike in a bin, else their own variance counts
    right = (generator.uniform(size=60) < 0.7).astype(float)
    order = generator.permutation(60)
    names = [str(n) for n in range(60)]
    found = items.calibration_error(sure[order], right[order], names)
    assert found.estimate == pytest.approx(forecasts.squared_error(sure, right, 6))
    without = [
        items.calibration_error(np.delete(sure, n), np.delete(right, n), names[1:]).estimate
        for n in range(60)
    ]
    half = stats.t.ppf(0.975, 59) * (59 * np.var(without)) ** 0.5
    assert found.high - found.estimate == pytest.approx(half)
    assert found.estimate - found.low == pytest.approx(half)


def test_the_calibration_error_needs_items_and_clusters() -> None:
    def errors(asked: list[Item]) -> list[Finding]:
        found = items.audit(Sure(0.7), asked)
        return [f for f in found if f.measure == "squared calibration error, debiased"]

    assert errors(made(19, 9)) == [] and len(errors(made(20, 9))) == 1
    (one,) = errors([item._replace(cluster="one") for item in made(30, 20)])
    assert (one.low, one.high, one.units) == (-np.inf, np.inf, 1) and np.isnan(one.estimate)
    halves = [item._replace(cluster=str(n % 2)) for n, item in enumerate(made(30, 20))]
    (two,) = errors(halves)
    assert (two.low, two.high, two.units) == (-np.inf, np.inf, 2)


@pytest.mark.parametrize(
    "empty", [{}, {"cluster": None, "group": None}, {"cluster": "", "group": ""}]
)
def test_no_cluster_and_no_group_are_none_however_they_are_said(
    empty: dict, tmp_path: Path
) -> None:
    path = tmp_path / "items.jsonl"
    row = {"prompt": "x", "choices": ["a", "b"], "answer": 0}
    path.write_text(
        f"{json.dumps(row | empty)}\n{json.dumps(row | {'cluster': 0, 'group': 0})}\n"
    )
    first, second = items.read(path)
    assert (first.group, first.cluster) == ("all", "line 1")
    assert (second.group, second.cluster) == ("0", "0")


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
