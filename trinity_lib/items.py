"""Items with choices that a user brings as JSONL: right answers and calibration, of any model.

One record a line: `{"prompt": ..., "choices": [...], "answer": 0}`, and if wanted `"group"`
(figures are given for each) and `"cluster"` (items about one thing, resampled as one).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trinity_lib import calibration, intervals
from trinity_lib.answers import finding
from trinity_lib.config import BadValue, Missing, first_line
from trinity_lib.subject import Finding, Subject

FAMILY = "items"
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
    group, cluster = str(record.get("group", "all")), str(record.get("cluster", ""))
    return Item(prompt, tuple(choices), answer, group, cluster or f"line {number}")


def audit(subject: Subject, items: Sequence[Item], *, seed: int = 0) -> list[Finding]:
    """Accuracy beside chance, its confidence beside its accuracy, by group and of all.

    A choice's probability is normalised over the choices, by their whole log-probability and
    not by their length.
    """
    nats = subject.score([i.prompt for i in items], [i.choices for i in items])
    shares = [np.exp(each - np.logaddexp.reduce(each)) for each in nats]
    groups = dict.fromkeys(item.group for item in items)
    every = {group: [n for n, i in enumerate(items) if i.group == group] for group in groups}
    if len(every) > 1:
        every["all"] = list(range(len(items)))
    return [f for name, rows in every.items() for f in _group(name, rows, items, shares, seed)]


def _group(
    name: str, rows: list[int], items: Sequence[Item], shares: list[np.ndarray], seed: int
) -> list[Finding]:
    chosen = [shares[n] for n in rows]
    answers = [items[n].answer for n in rows]
    clusters = [items[n].cluster or f"item {n}" for n in rows]
    right = np.array([s.argmax() == a for s, a in zip(chosen, answers, strict=True)], float)
    sure = np.array([s.max() for s in chosen])
    probability = np.array([s[a] for s, a in zip(chosen, answers, strict=True)])
    chance = float(np.mean([1 / len(items[n].choices) for n in rows]))
    error = intervals.bootstrap(lambda at: calibration.ece(sure[at], right[at]), clusters, seed)
    nan = float("nan")
    return [
        finding(FAMILY, name, "accuracy", _mean(right, clusters), nan, chance),
        finding(FAMILY, name, "probability of the right one", _mean(probability, clusters),
                nan, chance),
        finding(FAMILY, name, "confidence above accuracy", _mean(sure - right, clusters), nan,
                nan),
        finding(FAMILY, name, "expected calibration error", error, nan, nan),
    ]  # fmt: skip


def _mean(values: np.ndarray, clusters: Sequence[str]) -> intervals.Interval:
    """Student's, or the exact binomial one where all values are the same 0 or 1."""
    found = intervals.by_cluster(values, clusters)
    if set(found.mean) <= {0.0, 1.0} and len(set(found.mean)) == 1:
        return intervals.proportion(int(found.mean.sum()), len(found.mean))
    return intervals.mean(values, clusters)
