"""Items with choices that a user brings as JSONL: right answers and calibration, of any model.

One record a line: `{"prompt": ..., "choices": [...], "answer": 0}`, and if wanted `"group"`
(figures are given for each) and `"cluster"` (items about one thing, resampled as one).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from trinity_lib import intervals
from trinity_lib.answers import finding
from trinity_lib.config import BadValue, Missing, first_line
from trinity_lib.forecasts import BINS, DECIMALS
from trinity_lib.intervals import Interval
from trinity_lib.subject import Finding, Subject

FAMILY = "items"
CALIBRATED_FROM = 20
"""Items from which on their calibration error is looked at."""
IN_BIN = 10
"""Items of a bin of confidence, at least."""
SHOWN = '{"prompt": text, "choices": [texts], "answer": number of the right one}'


class Item(NamedTuple):
    """A prompt with choices, one of them right."""

    prompt: str
    choices: tuple[str, ...]
    """As they stand after the prompt: with their leading blank, if they have one."""
    answer: int
    """Place of the right one, from 0."""
    group: str = "all"
    """What it is one of."""
    cluster: str = ""
    """What it is about; empty: nothing that another is."""


def read(path: Path) -> list[Item]:
    """The items of a file; BadValue names the line of one that cannot be used."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise Missing(f"{path}: there is no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"{path} cannot be read as UTF-8 text: {first_line(error)}.") from error
    found = [
        _item(line, f"{path}, line {number}", number)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise BadValue(f"{path} has no item; a line is {SHOWN}.")
    return found


def _item(line: str, where: str, number: int) -> Item:
    try:
        record: dict[str, Any] = json.loads(line)
        prompt, choices, answer = (record[key] for key in ("prompt", "choices", "answer"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadValue(f"{where}: an item is {SHOWN}.") from error
    if not isinstance(prompt, str) or not prompt:
        raise BadValue(f"{where}: prompt must be text, and not empty.")
    texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not texts or len(choices) < 2 or len(set(choices)) < len(choices):
        raise BadValue(f"{where}: choices must be at least two different texts.")
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    if not whole or not 0 <= answer < len(choices):
        raise BadValue(
            f"{where}: answer is {answer!r}; it must be from 0 to {len(choices) - 1}."
        )
    group, cluster = (_name(record, key) for key in ("group", "cluster"))
    return Item(prompt, tuple(choices), answer, group or "all", cluster or f"line {number}")


def _name(record: dict[str, Any], key: str) -> str:
    """Empty where it is missing or null."""
    value = record.get(key)
    return "" if value is None else str(value)


def audit(subject: Subject, items: Sequence[Item]) -> list[Finding]:
    """Accuracy beside chance, its confidence beside its accuracy, by group and of all.

    A choice's probability is normalised over the choices, by their whole log-probability and
    not by their length. The calibration error is there from `CALIBRATED_FROM` items on.
    """
    nats = subject.score([i.prompt for i in items], [i.choices for i in items])
    shares = [np.exp(each - np.logaddexp.reduce(each)) for each in nats]
    groups = dict.fromkeys(item.group for item in items)
    every = {group: [n for n, i in enumerate(items) if i.group == group] for group in groups}
    if len(every) > 1:
        every["all"] = list(range(len(items)))
    return [f for name, rows in every.items() for f in _group(name, rows, items, shares)]


def _group(
    name: str, rows: list[int], items: Sequence[Item], shares: list[np.ndarray]
) -> list[Finding]:
    chosen = [shares[n] for n in rows]
    answers = [items[n].answer for n in rows]
    clusters = [items[n].cluster or f"item {n}" for n in rows]
    right = np.array([s.argmax() == a for s, a in zip(chosen, answers, strict=True)], float)
    sure = np.array([s.max() for s in chosen])
    probability = np.array([s[a] for s, a in zip(chosen, answers, strict=True)])
    chance = float(np.mean([1 / len(items[n].choices) for n in rows]))
    nan = float("nan")
    found = [
        finding(FAMILY, name, "accuracy", _mean(right, clusters), nan, chance),
        finding(FAMILY, name, "probability of the right one", _mean(probability, clusters),
                nan, chance),
        finding(FAMILY, name, "confidence above accuracy", _mean(sure - right, clusters), nan,
                nan),
    ]  # fmt: skip
    if len(rows) >= CALIBRATED_FROM:
        error = calibration_error(sure, right, clusters)
        found.append(
            finding(FAMILY, name, "squared calibration error, debiased", error, nan, nan)
        )
    return found


def calibration_error(confidence: Any, correct: Any, clusters: Sequence[str]) -> Interval:
    """Squared calibration error in bins of equal mass, without the bias of drawn outcomes.

    All [item]; `correct` is 0 or 1. A bin's squared mean of confidence - correct, of products
    of different clusters alone: the error of Kumar et al. 2019 (arXiv 1909.10155, section 4),
    whose bias goes where a cluster's outcomes go together too. At most `forecasts.BINS` bins,
    of about `IN_BIN` items at least.

    Student's interval of the jackknife over clusters, in bins that stay. It is no narrower
    than it would be of a subject that is calibrated, whose rare errors may not have come, and
    reaches 0 at least, as no squared error is below. Infinite where clusters are too few; NaN
    where no bin has two.
    """
    sure = np.asarray(confidence, float)
    names, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    at = cluster, _bins(sure)
    sums_GB, sizes_GB, drawn_GB = np.zeros((3, len(names), at[1].max() + 1))
    np.add.at(sums_GB, at, sure - np.asarray(correct))
    np.add.at(sizes_GB, at, 1)
    np.add.at(drawn_GB, at, sure * (1 - sure))
    pairs_B, share_B = _pairs(sizes_GB), sizes_GB.sum(0)
    estimate = float(_pooled(_pairs(sums_GB), pairs_B, share_B))
    left_G = _pooled(_pairs(sums_GB, 1), _pairs(sizes_GB, 1), share_B - sizes_GB)
    units = len(names)
    if units < 2 or not np.isfinite(left_G).all():
        return Interval(estimate, -np.inf, np.inf, units)
    share_B = np.where(pairs_B > 0, share_B, 0)
    variance_B = 2 * _pairs(drawn_GB) / np.maximum(pairs_B, 1) ** 2
    calibrated = float((share_B**2 * variance_B).sum() / share_B.sum() ** 2)
    spread = max(float((units - 1) * left_G.var()), calibrated) ** 0.5
    half = float(stats.t.ppf((1 + intervals.LEVEL) / 2, units - 1)) * spread
    return Interval(estimate, estimate - half, max(0.0, estimate + half), units)


def _pairs(values_GB: np.ndarray, without: int = 0) -> np.ndarray:
    """Sum of products of different clusters, [bin]; without each cluster, [cluster, bin]."""
    total, squares = (x.sum(0) - without * x for x in (values_GB, values_GB**2))
    found: np.ndarray = total**2 - squares
    return found if without else found[0]


def _pooled(products: np.ndarray, pairs: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Mean product of the bins that have pairs, by their share; [..., bin] to [...]."""
    weight = np.where(pairs > 0, share, 0)
    mean = (weight * products / np.maximum(pairs, 1)).sum(-1)
    every = weight.sum(-1)
    return np.where(every > 0, mean / np.maximum(every, 1), np.nan)


def _bins(sure: np.ndarray) -> np.ndarray:
    """The bin of each, from 0; what is equally sure shares one."""
    most = max(1, min(BINS, len(sure) // IN_BIN))
    key = np.round(sure, DECIMALS)
    at = np.linspace(0, len(key), most, endpoint=False).astype(int)
    return np.searchsorted(np.unique(np.sort(key)[at]), key, side="right") - 1


def _mean(values: np.ndarray, clusters: Sequence[str]) -> Interval:
    """Student's, or the exact binomial one where all values are the same 0 or 1."""
    found = intervals.by_cluster(values, clusters)
    if set(found.mean) <= {0.0, 1.0} and len(set(found.mean)) == 1:
        return intervals.proportion(int(found.mean.sum()), len(found.mean))
    return intervals.mean(values, clusters)
