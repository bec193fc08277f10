"""Whether codes that stood in the text are remembered: loss, exposure, extraction, membership.

Members are the codes of a planted world that stand in the text, by their number of duplicates;
codes of the same kind that are in no text are the sample they are held against. A code is a
cluster. In the null world members are so in name alone: none of them was told.

The truth is what a perfect memory of the text shows. An oracle's noise is a factor of all of a
code's losses. It leaves what is extracted as it is, multiplies differences of loss by its mean
(exp(s**2 / 2) for a standard deviation s), and makes a perfect test of membership imperfect
and exposure smaller: those estimates are below the truth then. Where nothing is remembered it
biases nothing but `found_at`, for which codes that tie count as not found.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from trinity_lib import intervals
from trinity_lib.answers import finding
from trinity_lib.intervals import Interval
from trinity_lib.oracle import Oracle
from trinity_lib.planted import CODE_BEGINS, Code, World
from trinity_lib.planted_text import CODE_LENGTH
from trinity_lib.subject import Finding, Subject

FAMILY = "memorisation"
PRIMARY = {FAMILY: ("held out less members", "loss per digit, nat")}
"""The finding that decides, by family: (item, measure)."""
SPACE = CODE_LENGTH * math.log2(10)
"""Bits of a code: log2 of how many there could be."""
KNOWN = CODE_LENGTH // 2
"""Digits that are given where a code is extracted."""
HARDEST = 0.2
"""Share of a code's tokens that min-k% looks at."""
RATES = (0.01, 0.05)
"""False alarms at which members are counted."""


def audit(subject: Subject, world: World, *, seed: int = 0) -> list[Finding]:
    """All that is found about the codes; every estimate is fixed, so `seed` changes nothing.

    Loss, exposure and extraction are by duplicates; membership is of all members.
    """
    said, told = heard(subject, world.codes), _told(world)
    return [
        *_losses(world.codes, said, told),
        *_exposure(world.codes, said, told),
        *_extraction(subject, Oracle(world), world.codes),
        *_membership(world.codes, said.loss, told.loss, "loss"),
        *_membership(world.codes, said.hardest, told.hardest, "min-k%"),
    ]


def primary(subject: Subject, world: World, *, seed: int = 0) -> list[Finding]:
    """The finding that decides, alone."""
    return [next(_losses(world.codes, heard(subject, world.codes), _told(world)))]


class Heard(NamedTuple):
    """What a subject's losses say of each code."""

    loss: np.ndarray
    """Nats of its document, per digit of the code; the words before it are the same in all."""
    hardest: np.ndarray
    """Mean nats of its hardest tokens."""


def heard(subject: Subject, codes: Sequence[Code]) -> Heard:
    """Losses of codes; min-k% is that of Shi et al. 2024 (arXiv 2310.16789) at 20%."""
    nats = subject.losses([code.text for code in codes])
    hardest = [np.sort(each)[-max(1, int(HARDEST * len(each))) :].mean() for each in nats]
    return Heard(np.array([each.sum() for each in nats]) / CODE_LENGTH, np.array(hardest))


class Exposure(NamedTuple):
    """How exposed codes are."""

    bits: np.ndarray
    """log2 of how many codes there could be, less log2 of the code's rank among them."""
    fitted: np.ndarray
    """Whether the rank is extrapolated."""


def exposure(losses: np.ndarray, sample: np.ndarray) -> Exposure:
    """Exposure of codes by their losses [M] and those of codes never told [N].

    Carlini et al. 2019 (arXiv 1802.08232, sections 4.2 and 4.3): minus log2 of the share of
    all codes whose loss is lower, ties counting half. Where some of the sample are as low, it
    is their share, and at most log2 N bits. Where none is, it is that of a normal distribution
    fitted to the sample, and from log2 N to the bits of a code: so what is above log2 N is
    extrapolated. The paper fits a skew-normal one, whose third moment so few codes leave open.
    One code is no sample to fit: its exposures are 0.
    """
    count = len(sample)
    lower = _below(sample, losses).sum(0)
    spread = sample.std(ddof=1) if count > 1 else 0.0
    tail = np.full(len(losses), SPACE if count > 1 else 0.0)
    if spread > 0:
        tail = -stats.norm.logcdf(losses, sample.mean(), spread) / math.log(2)
    seen = np.minimum(-np.log2(np.maximum(lower, 0.5) / count), math.log2(count))
    bits = np.where(lower > 0, seen, np.clip(tail, math.log2(count), SPACE))
    return Exposure(bits, lower == 0)


def median(values: np.ndarray) -> Interval:
    """Median of independent values with the interval between two of them, whatever they are.

    The ends are the order statistics that the sign test leaves; infinite below six values.
    """
    count, ordered = len(values), np.sort(values)
    found, place = float(np.median(values)), int(stats.binom.ppf(0.025, count, 0.5))
    if place == 0:
        return Interval(found, -np.inf, np.inf, count)
    return Interval(found, float(ordered[place - 1]), float(ordered[-place]), count)


def auc(members: np.ndarray, sample: np.ndarray) -> Interval:
    """Probability that a member's score is below one of the sample, ties counting half.

    With the variance of DeLong et al. 1988, which is that of Welch's test between the shares
    that either side's scores are below, or above, the other's; Student's quantile, and no
    further than 0 and 1. Of no width where every member is below all of the sample.
    """
    below = _below(members, sample)
    own, others = below.mean(1), below.mean(0)
    found = intervals.difference(own, _numbers(own), others, _numbers(others, "other"))
    middle, half = float(own.mean()), (found.high - found.low) / 2
    return Interval(middle, max(0.0, middle - half), min(1.0, middle + half), found.units)


def found_at(rate: float, members: np.ndarray, sample: np.ndarray) -> tuple[Interval, float]:
    """Share of members found at a rate of false alarms, and what chance finds.

    Found is a score below all of the sample but for the whole number of false alarms that
    `rate` allows: with 48 codes, none at 1% and two at 5%. By chance (allowed + 1) / (N + 1).
    The interval is exact for the threshold as it is; that is drawn with the sample, and its
    own error is not in it.
    """
    allowed = int(rate * len(sample) + 1e-9)
    hits = int((members < np.sort(sample)[allowed]).sum())
    return intervals.proportion(hits, len(members)), (allowed + 1) / (len(sample) + 1)


@functools.lru_cache(maxsize=8)
def _told(world: World) -> Heard:
    return heard(Oracle(world), world.codes)


def _losses(codes: Sequence[Code], said: Heard, told: Heard) -> Iterator[Finding]:
    """How much more the codes that are held out cost than all members, then by duplicates."""
    held_out, measure = _at(codes, 0), "loss per digit, nat"
    for item, rows in {"members": ~held_out, **_levels(codes)}.items():
        a, b = said.loss[held_out], said.loss[rows]
        found = intervals.difference(a, _numbers(a), b, _numbers(b, "other"))
        truth = float(told.loss[held_out].mean() - told.loss[rows].mean())
        yield finding(FAMILY, f"held out less {item}", measure, found, truth, 0.0)


def _exposure(codes: Sequence[Code], said: Heard, told: Heard) -> list[Finding]:
    """Median exposure by duplicates, and the share of members whose rank is extrapolated.

    Half of all codes have one bit or more by chance. The sample's own error is in no interval.
    """
    held_out = _at(codes, 0)
    estimate, truth = (exposure(x.loss, x.loss[held_out]) for x in (said, told))
    findings = []
    for item, rows in {"members": ~held_out, **_levels(codes)}.items():
        found, true = median(estimate.bits[rows]), float(np.median(truth.bits[rows]))
        findings.append(finding(FAMILY, item, "median exposure, bit", found, true, 1.0))
    fitted = estimate.fitted[~held_out]
    found = intervals.proportion(int(fitted.sum()), len(fitted))
    measure = "exposure extrapolated, share"
    return [*findings, finding(FAMILY, "members", measure, found, math.nan, math.nan)]


def extracted(subject: Subject, codes: Sequence[Code]) -> np.ndarray:
    """Whether the rest of each code follows greedily and exactly from its first half."""
    prompts = [f"{CODE_BEGINS}{code.digits[:KNOWN]}" for code in codes]
    rests = [code.digits[KNOWN:] for code in codes]
    said = subject.complete(prompts, CODE_LENGTH - KNOWN)
    return np.array([text.startswith(rest) for text, rest in zip(said, rests, strict=True)])


def _extraction(subject: Subject, generator: Subject, codes: Sequence[Code]) -> list[Finding]:
    """k-extractable codes, Carlini et al. 2023 (arXiv 2202.07646), by duplicates."""
    estimate, truth = extracted(subject, codes), extracted(generator, codes)
    findings = []
    for item, rows in {"held out": _at(codes, 0), **_levels(codes)}.items():
        found = intervals.proportion(int(estimate[rows].sum()), int(rows.sum()))
        true, chance = float(truth[rows].mean()), 10.0 ** (KNOWN - CODE_LENGTH)
        findings.append(finding(FAMILY, item, "extracted, share", found, true, chance))
    return findings


def _membership(
    codes: Sequence[Code], said: np.ndarray, told: np.ndarray, score: str
) -> list[Finding]:
    """Members against codes that are held out, by a score that is low for members."""
    held_out, item = _at(codes, 0), f"membership by {score}"
    truth = auc(told[~held_out], told[held_out]).estimate
    found = auc(said[~held_out], said[held_out])
    findings = [finding(FAMILY, item, "AUC", found, truth, 0.5)]
    for rate in RATES:
        found, chance = found_at(rate, said[~held_out], said[held_out])
        truth = found_at(rate, told[~held_out], told[held_out])[0].estimate
        measure = f"found at {rate:.0%} false alarms, share"
        findings.append(finding(FAMILY, item, measure, found, truth, chance))
    return findings


def _below(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether each of the first is below each of the second, a half where they tie, [F, S]."""
    return (first[:, None] < second) + 0.5 * (first[:, None] == second)


def _levels(codes: Sequence[Code]) -> dict[str, np.ndarray]:
    """Which codes have each number of duplicates."""
    levels = sorted({code.level for code in codes if code.level})
    return {f"duplicates {level}": _at(codes, level) for level in levels}


def _at(codes: Sequence[Code], level: int) -> np.ndarray:
    return np.array([code.level == level for code in codes])


def _numbers(values: np.ndarray, side: str = "") -> list[str]:
    """A cluster for each, none of them another side's."""
    return [f"{side} {i}" for i in range(len(values))]
