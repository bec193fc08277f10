"""How good probabilities are: calibration errors, proper scores, and the best temperature.

Outcomes are 0 or 1, or their probabilities where those are known: expectations then stand where
outcomes would be drawn. No torch.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq

from trinity_lib.config import require

BINS = 15
"""Of equal mass."""
SAME = 1e-9
"""An inverse temperature no higher is none."""
DECIMALS = 9
"""Of a probability; what differs by less is the same."""
STEEPEST = 2.0**20
"""Highest inverse temperature that is looked for."""


class Decomposition(NamedTuple):
    """Parts of a Brier score of yes-or-no forecasts (Murphy 1973).

    Their reliability - resolution + uncertainty is the score of each bin's mean forecast.
    """

    reliability: float
    """Mean squared difference of a bin's forecast and its frequency; 0 if calibrated."""
    resolution: float
    """Variance of frequencies between bins; the more, the better bins are told apart."""
    uncertainty: float
    """Variance of the outcome itself."""


def ece(confidence: Any, correct: Any, bins: int = BINS) -> float:
    """Expected calibration error in bins of equal mass: mean |confidence - accuracy| of bins.

    Both [question]; `correct` is 0 or 1, or the probability of being right where that is
    known. In probability. The plug-in estimate, which outcomes that are drawn raise.
    """
    said, right, count = _binned(confidence, correct, bins)
    return float((count * np.abs(said - right)).sum() / count.sum())


def squared_error(confidence: Any, correct: Any, bins: int = BINS) -> float:
    """Squared calibration error in bins of equal mass, of outcomes 0 or 1, without bias.

    Takes from each bin the variance of its own mean (Kumar et al. 2019, section 4); below 0 by
    chance. At least two questions a bin.
    """
    said, right, count = _binned(confidence, correct, bins)
    require(
        count.min() >= 2, "bins", bins, f"at most {int(count.sum()) // 2}, half the answers"
    )
    each = (said - right) ** 2 - right * (1 - right) / (count - 1)
    return float((count * each).sum() / count.sum())


def brier(probability: Any, truth: Any) -> np.ndarray:
    """Expected Brier score under the truth, summed over answers: [..., answer] to [...].

    sum (p - q)^2 + q (1 - q); of a drawn outcome where the truth is 0 or 1.
    """
    p, q = np.asarray(probability, float), np.asarray(truth, float)
    return ((p - q) ** 2 + q * (1 - q)).sum(-1)


def decomposition(forecast: Any, outcome: Any, bins: int = BINS) -> Decomposition:
    """Reliability, resolution and uncertainty of yes-or-no forecasts, [event].

    `outcome` is 0 or 1, or its probability where that is known.
    """
    said, right, count = _binned(forecast, outcome, bins)
    share, base = count / count.sum(), float(np.mean(outcome))
    return Decomposition(
        float((share * (said - right) ** 2).sum()),
        float((share * (right - base) ** 2).sum()),
        base * (1 - base),
    )


def nll(nats: Any, truth: Any) -> np.ndarray:
    """Expected negative log-likelihood under the truth, nats: [..., answer] to [...]."""
    q = np.asarray(truth, float)
    return -np.where(q > 0, q * np.where(q > 0, nats, 0.0), 0.0).sum(-1)


def divergence(nats: Any, truth: Any) -> np.ndarray:
    """KL(truth || model), nats: what `nll` is above the truth's entropy."""
    q = np.asarray(truth, float)
    return nll(nats, q) - nll(np.log(q, out=np.zeros_like(q), where=q > 0), q)


def fit_temperature(nats: Any, truth: Any) -> float:
    """What log-probabilities, [question, answer], are best divided by (Guo et al. 2017).

    Least expected negative log-likelihood under the truth, of outcomes where it is 0 or 1. 2
    for a calibrated subject whose log-probabilities were doubled. Infinite where the
    likeliest answers are not likelier; NaN where all answers are alike. -inf: no answer.
    """
    return temperature(inverse_temperature(np.asarray(nats, float), np.asarray(truth, float)))


def temperature(inverse: float) -> float:
    """Of an inverse; infinite where that is not above 0."""
    return np.inf if inverse <= SAME else 1 / inverse


def inverse_temperature(nats: np.ndarray, truth: np.ndarray) -> float:
    """Where a draw's mean log-probability is the truth's; NaN where all answers are alike."""
    if (curvature(nats, 0.0) < SAME**2).all():
        return float("nan")

    def excess(inverse: float) -> float:
        return float(gradient(nats, truth, inverse).sum())

    low, high = -1.0, 1.0
    while excess(low) > 0 and low > -STEEPEST:
        low *= 2
    while excess(high) < 0 and high < STEEPEST:
        high *= 2
    if excess(high) <= 0:
        return high
    return low if excess(low) >= 0 else float(brentq(excess, low, high, xtol=1e-13))


def gradient(nats: np.ndarray, truth: np.ndarray, inverse: float) -> np.ndarray:
    """Of the expected negative log-likelihood by the inverse temperature, [...]."""
    probability, own = _tempered(nats, inverse)
    return ((probability - truth) * own).sum(-1)


def curvature(nats: np.ndarray, inverse: float) -> np.ndarray:
    """The second derivative, the variance of a draw's log-probability, [...]."""
    probability, own = _tempered(nats, inverse)
    centre = (probability * own).sum(-1, keepdims=True)
    return (probability * (own - centre) ** 2).sum(-1)


def _tempered(nats: np.ndarray, inverse: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities at an inverse temperature, and log-probabilities with 0 for no answer."""
    possible = np.isfinite(nats)
    own = np.where(possible, nats, 0.0)
    scaled = np.where(possible, inverse * own, -np.inf)
    weight = np.exp(scaled - scaled.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True), own


def _binned(said: Any, right: Any, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of both and counts, in bins of equal mass by the first.

    Rows that say the same share a bin, so that their order does not count; bins are fewer
    where many do.
    """
    first, second = np.asarray(said, float), np.asarray(right, float)
    require(bins >= 1, "bins", bins, "at least 1")
    need = f"as of what is said, {first.shape}, and not empty"
    require(first.size > 0 and first.shape == second.shape, "outcomes", second.shape, need)
    key = np.round(first, DECIMALS)
    order = np.argsort(key, kind="stable")
    key = key[order]
    even = np.linspace(0, len(key), min(bins, len(key)), endpoint=False).astype(int)
    edges = np.unique(np.searchsorted(key, key[even]))
    count = np.diff(np.append(edges, len(key)))
    means = [np.add.reduceat(x[order], edges) / count for x in (first, second)]
    return means[0], means[1], count
