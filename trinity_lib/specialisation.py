"""Measures of what experts are for, each with its null. No torch.

Choices are the experts of every token, [token, choice], -1 for none; labels are one number a
token, such as its id or its domain, [token], -1 for none. Overlaps, co-activation, domain and
vocabulary specialisation are those of OLMoE (arXiv 2409.02060, section 5).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


def uniform_share(num_experts: int, top_k: int) -> float:
    """k / E: what choices by chance give of `saturation` and of `domain_specialisation`."""
    return top_k / num_experts


def uniform_pair(num_experts: int, top_k: int) -> float:
    """(k - 1) / (E - 1): what choices by chance give of `co_activation`, off its diagonal."""
    return (top_k - 1) / (num_experts - 1)


def saturation(choices: Any, choices_end: Any) -> float:
    """Share of the final choices of the same tokens that were made already, in any order.

    Router saturation of OLMoE: the mean over tokens of |E_t & E_T| / k. By chance k / E.
    0 where nothing was chosen at the end.
    """
    before, end = np.asarray(choices), np.asarray(choices_end)
    common = ((before[:, :, None] == end[:, None, :]) & (end >= 0)[:, None, :]).sum()
    return float(common / max((end >= 0).sum(), 1))


def co_activation(choices: Any, num_experts: int, olmoe_compat: bool = False) -> np.ndarray:
    """Of the tokens of expert i, the share that expert j took as well: N_ij / N_i, [E, E].

    The diagonal is 0, as is the row of an expert that was never chosen; other rows sum to
    k - 1. By chance (k - 1) / (E - 1). `olmoe_compat` counts neighbours in rank alone, as
    OLMoE's released script does (`more_itertools.pairwise`), against its paper: choices
    must then be best first, and chance gives 2 / k of that.
    """
    chosen = np.asarray(choices)
    width = chosen.shape[1]
    first, second = np.nonzero(~np.eye(width, dtype=bool))
    if olmoe_compat:
        near = np.abs(first - second) == 1
        first, second = first[near], second[near]
    one, other = chosen[:, first], chosen[:, second]
    both = (one >= 0) & (other >= 0)
    cells = one[both].astype(np.int64) * num_experts + other[both]
    pairs = np.bincount(cells, minlength=num_experts**2).reshape(num_experts, num_experts)
    load = np.bincount(chosen[chosen >= 0], minlength=num_experts)
    return pairs / np.maximum(load, 1)[:, None]


def domain_specialisation(choices: Any, domains: Any, num_experts: int) -> np.ndarray:
    """Share of each domain's tokens that each expert took: N_iD / N_D, [E, D].

    Columns sum to k. By chance k / E for every expert and domain; 0 where a domain has no
    token. D is the highest domain number plus 1.
    """
    domains = np.asarray(domains)
    tokens = np.bincount(domains[domains >= 0])
    expert, domain = _slots(choices, domains)
    cells = expert * len(tokens) + domain
    count = np.bincount(cells, minlength=num_experts * len(tokens))
    return count.reshape(num_experts, -1) / np.maximum(tokens, 1)


def vocabulary_specialisation(choices: Any, tokens: Any, min_count: int = 10) -> float:
    """How much of a token id its favourite expert takes, mean of ids: max_i N_ix / N_x.

    Over ids seen at least `min_count` times (OLMoE's mean takes all, and an id seen once
    scores 1); NaN where there is none. OLMoE counts top-1: pass `choices[:, :1]`. Chance is
    far above k / E, being the highest of E small counts: see `null`.
    """
    tokens = np.asarray(tokens)
    ids, seen = np.unique(tokens[tokens >= 0], return_counts=True)
    ids, seen = ids[seen >= min_count], seen[seen >= min_count]
    if not len(ids):
        return float("nan")
    pairs = _joint(*_slots(choices, np.where(np.isin(tokens, ids), tokens, -1)))
    highest = np.zeros(len(ids))
    np.maximum.at(highest, np.searchsorted(ids, pairs.label), pairs.times)
    return float((highest / seen).mean())


class Information(NamedTuple):
    """What a label tells about an expert."""

    bits: float
    """Mutual information per choice, in bits."""
    percent: float
    """The same in percent of the label's own entropy; 0 where that is 0."""
    label_bits: float
    """Entropy of the label, in bits."""


def information(choices: Any, labels: Any) -> Information:
    """Mutual information of a choice's expert and its token's label, after Miller-Madow.

    H(expert) + H(label) - H(expert, label) over all choices, each entropy raised by
    (m - 1) / 2N nats for its m values seen among N choices (Miller 1955). Where each label
    has its own k experts it is at most log2(E / k). About 0 by chance for few labels; many
    rare ones leave some bias, and it may fall below 0: compare with `null`.
    """
    expert, label = _slots(choices, labels)
    if not len(expert):
        return Information(0.0, 0.0, 0.0)
    label_bits = _bits(np.unique(label, return_counts=True)[1])
    expert_bits = _bits(np.unique(expert, return_counts=True)[1])
    bits = expert_bits + label_bits - _bits(_joint(expert, label).times)
    return Information(bits, 100 * bits / label_bits if label_bits else 0.0, label_bits)


def _bits(count: np.ndarray) -> float:
    """Entropy of counts, none of them 0, in bits, with the Miller-Madow correction."""
    share = count / count.sum()
    nats = -(share * np.log(share)).sum() + (len(count) - 1) / (2 * count.sum())
    return float(nats / np.log(2))


class Null(NamedTuple):
    """A measure beside what it comes to when labels mean nothing."""

    value: float
    """The measure."""
    mean: float
    """Its mean over permuted labels: what chance gives."""
    deviation: float
    """Its standard deviation over permuted labels."""
    z: float
    """(value - mean) / deviation; 0 where permuting changes nothing."""


def null(
    function: Callable[[Any, Any], float],
    choices: Any,
    labels: Any,
    draws: int,
    generator: np.random.Generator,
) -> Null:
    """`function(choices, labels)` beside `draws` permutations of the labels across tokens.

    Loads, the experts that go together, and the frequencies of labels stay as they are:
    only which token has which label is left to chance. The mean's standard error is
    deviation / sqrt(draws).
    """
    labels = np.asarray(labels)
    value = float(function(choices, labels))
    by_chance = [float(function(choices, generator.permutation(labels))) for _ in range(draws)]
    mean, deviation = float(np.mean(by_chance)), float(np.std(by_chance, ddof=1))
    same = deviation <= 1e-9 * abs(mean)  # but for rounding
    return Null(value, mean, deviation, 0.0 if same else (value - mean) / deviation)


class _Joint(NamedTuple):
    label: np.ndarray
    times: np.ndarray


def _slots(choices: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Expert and label of every choice that has both."""
    chosen = np.asarray(choices).astype(np.int64)
    label = np.broadcast_to(np.asarray(labels)[:, None], chosen.shape)
    both = (chosen >= 0) & (label >= 0)
    return chosen[both], label[both]


def _joint(expert: np.ndarray, label: np.ndarray) -> _Joint:
    """Every (label, expert) that occurs, and how often: never a table of all that could."""
    width = int(expert.max(initial=0)) + 1
    cells, times = np.unique(label.astype(np.int64) * width + expert, return_counts=True)
    return _Joint(cells // width, times)
