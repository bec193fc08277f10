"""Measures of biases and of routing over time, each with what chance gives. No torch.

Biases over time are [..., step, expert]; scores are [..., token, expert], zero or more, of
tokens that stay the same; a bias beside scores is [..., expert]. Leading axes, such as
layers, are kept. Scores and bias are added in the precision they come in, as the router does.
"""

from typing import Any, NamedTuple

import numpy as np


def bias_range(bias: Any) -> Any:
    """Highest less lowest bias, over the last axis, in units of the score."""
    return np.ptp(np.asarray(bias), axis=-1)


def bias_std(bias: Any) -> Any:
    """Standard deviation of the bias, over the last axis, in units of the score."""
    return np.std(np.asarray(bias, dtype=float), axis=-1)


def oscillation(bias: Any, window: int) -> Any:
    """Spread of a bias about its own line over the last `window` steps, mean of experts.

    The root mean square of the linearly detrended bias, in units of the score, [...]. 0 for
    a bias at rest or on its way. Not 0 by chance: independent steps of u, a random walk, come
    to about u * sqrt(window / 15) (the mean square of a detrended Brownian motion).
    """
    residual = _detrended(bias, window)
    return np.sqrt((residual**2).mean(-2)).mean(-1)


def sign_flip_rate(bias: Any, window: int) -> Any:
    """How often a bias turns round over the last `window` steps, share of its moves, [...].

    Of consecutive increments that both move, over all experts, the share of opposite sign:
    1/2 for independent steps, 1 for a relay that overshoots each time, 0 on the way
    somewhere, and 0 where nothing moves.
    """
    sign = np.sign(np.diff(np.asarray(bias, dtype=float)[..., -window:, :], axis=-2))
    product = sign[..., 1:, :] * sign[..., :-1, :]
    moves = (product != 0).sum((-2, -1))
    return (product < 0).sum((-2, -1)) / np.maximum(moves, 1)


def dominant_period(bias: Any, window: int) -> Any:
    """The period, in recorded steps, with most power in the last `window` of them, [...].

    From the spectra of the detrended biases, summed over experts: `window` / 1, / 2, ...
    down to 2. NaN where nothing is left beyond rounding. A random walk, which has no
    rhythm, puts most power in the longest periods: only shorter ones say something.
    """
    residual = _detrended(bias, window)
    power = (np.abs(np.fft.rfft(residual, axis=-2)) ** 2).sum(-1)[..., 1:]
    if not power.shape[-1]:
        return np.full(power.shape[:-1], np.nan)
    largest = np.abs(np.asarray(bias, dtype=float)).max((-2, -1))
    moves = np.abs(residual).max((-2, -1)) > 1e-6 * largest
    return np.where(moves, residual.shape[-2] / (1 + power.argmax(-1)), np.nan)


def _detrended(bias: Any, window: int) -> np.ndarray:
    """What the last steps of each bias leave of their least-squares line."""
    bias = np.asarray(bias, dtype=float)[..., -window:, :]
    bias = bias - bias.mean(-2, keepdims=True)
    time = np.arange(bias.shape[-2]) - (bias.shape[-2] - 1) / 2
    slope = np.tensordot(bias, time, axes=(-2, 0)) / max(time @ time, 1.0)
    return bias - time[:, None] * slope[..., None, :]


def override_fraction(scores: Any, bias: Any, top_k: int) -> Any:
    """Share of chosen slots that are not in the bias-free top-k, mean of tokens, [...].

    0 where the bias decides nothing; 1 - k/E where it decides as if by chance.
    """
    return _changed(_chosen(scores, bias, top_k), _chosen(scores, None, top_k))


def score_price(scores: Any, bias: Any, top_k: int) -> Any:
    """Scores of the chosen over scores of the bias-free top-k, both summed over tokens, [...].

    1 where balance costs no score. Choices by chance come to the mean score over the mean
    of the k best.
    """
    scores = np.asarray(scores)
    paid, best = (
        np.take_along_axis(scores, chosen, -1).sum((-2, -1), dtype=float)
        for chosen in (_chosen(scores, bias, top_k), _chosen(scores, None, top_k))
    )
    return np.where(best > 0, paid / np.where(best > 0, best, 1.0), 1.0)


class Churn(NamedTuple):
    """Share of chosen slots that changed, and what changed them, each [...]."""

    total: Any
    """Share of the slots chosen before that are not chosen after."""
    by_weights: Any
    """Changed by the scores while the bias is held."""
    by_bias: Any
    """Changed by the bias while the scores are held."""
    undone: Any
    """by_weights + by_bias - total, 0 or more: what one changed and the other undid."""


def churn(
    scores_before: Any, bias_before: Any, scores_after: Any, bias_after: Any, top_k: int
) -> Churn:
    """How many of the same tokens' choices changed: by the weights, and by the bias.

    With A(s, b) the top-k of s + b and d(A, B) the share of slots by which two choices
    differ, total = d(A(s, b), A(s', b')). There are two ways from before to after, through
    A(s', b) and through A(s, b'). Each part is the mean over both ways of its own step:

        by_weights = (d(A(s, b), A(s', b)) + d(A(s, b'), A(s', b'))) / 2
        by_bias    = (d(A(s', b), A(s', b')) + d(A(s, b), A(s, b'))) / 2

    Neither order is preferred. d is a metric, so the parts sum to the total or more, and
    `undone` is the excess: 0 where a slot never changes back. Where only one of the two
    moved, the other's part is 0. Two independent choices differ by 1 - k/E.
    """
    start = _chosen(scores_before, bias_before, top_k)
    weights_first = _chosen(scores_after, bias_before, top_k)
    bias_first = _chosen(scores_before, bias_after, top_k)
    end = _chosen(scores_after, bias_after, top_k)
    total = _changed(start, end)
    by_weights = (_changed(start, weights_first) + _changed(bias_first, end)) / 2
    by_bias = (_changed(weights_first, end) + _changed(start, bias_first)) / 2
    return Churn(total, by_weights, by_bias, by_weights + by_bias - total)


def _chosen(scores: Any, bias: Any, top_k: int) -> np.ndarray:
    """The top-k experts of every token, in no order, [..., token, k]."""
    ranked = np.asarray(scores)
    if bias is not None:
        ranked = ranked + np.asarray(bias)[..., None, :]
    last = ranked.shape[-1] - top_k
    return np.argpartition(ranked, last, axis=-1)[..., last:]


def _changed(one: np.ndarray, other: np.ndarray) -> Any:
    """Share of the slots by which two choices differ, mean of tokens, [...]."""
    common = (one[..., :, None] == other[..., None, :]).sum((-3, -2, -1))
    return 1.0 - common / (one.shape[-2] * one.shape[-1])


def router_entropy(scores: Any) -> Any:
    """Entropy of a token's normalised scores over ln E, mean of tokens, [...].

    How undecided the router is about each token: 1 where every score is the same, 0 where
    one expert has all of it. Says nothing of balance: see `mutual_information`.
    """
    return _entropy(_shares(scores)).mean(-1) / np.log(max(np.shape(scores)[-1], 2))


def mutual_information(scores: Any) -> Any:
    """What a token's scores tell about the expert, in bits, [...]: H(mean p) - mean H(p).

    p are a token's scores over their sum. 0 where all tokens score alike, constant scores
    among them, whatever the balance; at most log2 E. It is of the scores as they are: what
    noise puts into them counts, so compare with an untrained router, not with 0.
    """
    shares = _shares(scores)
    return (_entropy(shares.mean(-2)) - _entropy(shares).mean(-1)) / np.log(2)


def _shares(scores: Any) -> np.ndarray:
    scores = np.asarray(scores, dtype=float)
    total = scores.sum(-1, keepdims=True)
    even = 1 / scores.shape[-1]
    return np.where(total > 0, scores / np.where(total > 0, total, 1.0), even)


def _entropy(shares: np.ndarray) -> Any:
    return -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1)
