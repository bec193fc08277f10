"""Measures of expert loads, each with its floor: what chance alone gives. No torch."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

DEAD_SHARE = 0.01
"""An expert under this share of the mean load is dead."""
STARVED_SHARE = 0.1
"""An expert under this share of the mean load is starved."""
ENOUGH_TOKENS = 100
"""Mean tokens per expert a window must hold before an expert may be called dead."""


def max_vio(load: Any) -> Any:
    """Highest over mean load, less 1, over the last axis; 0 where nothing was routed.

    Wang et al. 2024 (arXiv 2408.15664), equation 4.
    """
    return _over_mean(load, np.max) - 1.0


def min_vio(load: Any) -> Any:
    """1 less lowest over mean load, over the last axis; 0 where nothing was routed."""
    return 1.0 - _over_mean(load, np.min)


def _over_mean(load: Any, measure: Callable, empty: float = 1.0) -> Any:
    load = np.asarray(load, dtype=float)
    mean = load.mean(-1)
    return np.where(mean > 0, measure(load, axis=-1) / np.where(mean > 0, mean, 1.0), empty)


def load_entropy(load: Any) -> Any:
    """Entropy of the loads in nats, over the last axis; 0 where nothing was routed."""
    load = np.asarray(load, dtype=float)
    total = load.sum(-1, keepdims=True)
    share = load / np.where(total > 0, total, 1.0)
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)


def effective_experts(load: Any) -> Any:
    """exp of the load entropy: as many evenly used experts would have it."""
    return np.exp(load_entropy(load))


def dead_fraction(load: Any, share: float = DEAD_SHARE) -> Any:
    """Share of experts with less than `share` of the mean load, over the last axis.

    0 where nothing was routed: no load, no evidence.
    """
    return _under(load, share).mean(-1)


def _under(load: Any, share: float) -> np.ndarray:
    load = np.asarray(load, dtype=float)
    return load < share * load.mean(-1, keepdims=True)


def starved_fraction(load: Any, share: float = STARVED_SHARE) -> Any:
    """Share of experts with less than a tenth of the mean load, over the last axis.

    Dead experts are starved as well. Uniform routing of 100 tokens an expert has none.
    """
    return dead_fraction(load, share)


def cv(load: Any) -> Any:
    """Standard deviation over mean load, over the last axis; 0 where nothing was routed."""
    return _over_mean(load, np.std, empty=0.0)


def gini(load: Any) -> Any:
    """Gini coefficient of the loads, over the last axis; 0 where nothing was routed.

    0 is an even load, (E - 1) / E all of it on one of E experts.
    """
    load = np.sort(np.asarray(load, dtype=float), axis=-1)
    experts, total = load.shape[-1], load.sum(-1)
    weighted = (load * (2 * np.arange(1, experts + 1) - experts - 1)).sum(-1)
    return weighted / (experts * np.where(total > 0, total, 1.0))


def over_experts(function: Callable[[Any], Any], load: xr.DataArray) -> xr.DataArray:
    """A measure of loads, applied along dimension `expert`."""
    return xr.apply_ufunc(function, load, input_core_dims=[["expert"]])


class Chance(NamedTuple):
    """What a measure comes to when every token picks distinct experts at random."""

    mean: float
    """Its mean: the measure's floor."""
    deviation: float
    """Standard deviation of one batch about the mean."""
    error: float
    """Standard error of `mean`, which comes from finitely many draws."""


@functools.cache
def chance(
    tokens: int,
    num_experts: int,
    top_k: int,
    statistic: Callable[[Any], Any] = max_vio,
    seed: int = 0,
) -> Chance:
    """What a measure comes to when every token picks `top_k` distinct experts at random.

    Balance cannot be better than chance: a measure counts only beyond its floor.
    Simulated, exact about distinctness, with more draws where they are cheap.
    """
    found = np.asarray(statistic(_uniform_loads(tokens, num_experts, top_k, seed)))
    deviation = float(np.std(found, ddof=1))
    return Chance(float(np.mean(found)), deviation, deviation / len(found) ** 0.5)


@functools.lru_cache(maxsize=4)  # several measures are asked about the same batches
def _uniform_loads(tokens: int, num_experts: int, top_k: int, seed: int) -> np.ndarray:
    """Loads of batches in which every token picks at random, [draw, expert]."""
    draws = max(32, min(512, 2**23 // (tokens * top_k)))
    generator = np.random.default_rng(seed)
    loads = np.zeros((draws, num_experts))
    for draw in range(draws):
        for start in range(0, tokens, 4096):
            some = min(4096, tokens - start)
            chosen = _distinct(generator, some, num_experts, top_k)
            loads[draw] += np.bincount(chosen.ravel(), minlength=num_experts)
    loads.flags.writeable = False
    return loads


def sampling_floor(
    tokens: int,
    num_experts: int,
    top_k: int,
    statistic: Callable[[Any], Any] = max_vio,
    seed: int = 0,
) -> float:
    """The mean of `chance`: what perfectly uniform routing of a batch would show."""
    return chance(tokens, num_experts, top_k, statistic, seed).mean


def excess_max_vio(load: Any, tokens: int, top_k: int) -> Any:
    """MaxVio less its sampling floor, over the last axis; 0 is as even as chance.

    `tokens` is how many were routed into each load. Comparable between numbers of
    experts, top-k and batch sizes. `chance` has the spread of one batch about 0 and the
    standard error of the floor. Where nothing was routed it is less than 0 by the floor.
    """
    load = np.asarray(load)
    return max_vio(load) - sampling_floor(tokens, load.shape[-1], top_k)


def atom_floor(p_max: Any, num_experts: int, top_k: int) -> Any:
    """The least MaxVio of a router that sends equal inputs to equal experts.

    max(0, p_max * E / k - 1), where `p_max` is the share of the commonest input: whichever
    k experts take it hold at least that share of the tokens, and no bias can split it.
    """
    return np.maximum(0.0, np.asarray(p_max) * num_experts / top_k - 1.0)


def atom_floor_of(token_ids: Any, num_experts: int, top_k: int) -> float:
    """The atom floor where a router sees token ids alone, as before any attention.

    Later layers see a token's context, which splits the atom: for those it is no bound.
    """
    count = np.unique(np.asarray(token_ids), return_counts=True)[1]
    return float(
        atom_floor(count.max() / count.sum() if count.size else 0.0, num_experts, top_k)
    )


def _distinct(
    generator: np.random.Generator, tokens: int, num_experts: int, top_k: int
) -> np.ndarray:
    """Distinct experts of every token, [tokens, top_k], every set as likely as any other."""
    if top_k * (top_k - 1) > num_experts:  # most draws would repeat an expert
        keys = generator.random((tokens, num_experts), dtype=np.float32)
        return np.argpartition(keys, top_k - 1, axis=1)[:, :top_k]
    chosen = np.sort(generator.integers(num_experts, size=(tokens, top_k)), axis=1)
    while (repeats := (chosen[:, 1:] == chosen[:, :-1]).any(axis=1)).any():
        again = generator.integers(num_experts, size=(int(repeats.sum()), top_k))
        chosen[repeats] = np.sort(again, axis=1)
    return chosen


def ever_dead(load: Any, share: float = DEAD_SHARE) -> Any:
    """Share of experts dead at one recorded step or another; load is [..., step, expert].

    As of every measure of death over time, a step's load is summed over a trailing window
    long enough to tell (`metrics.rolling_load`): else chance kills, and a warning says so.
    """
    return _dead(load, share).any(-2).mean(-1)


def time_to_death(load: Any, share: float = DEAD_SHARE) -> Any:
    """Recorded steps before each expert was first dead, [..., expert]; NaN: never dead.

    `load` is [..., step, expert]; 0 is dead from the first window on.
    """
    dead = _dead(load, share)
    return np.where(dead.any(-2), dead.argmax(-2), np.nan)


def rescue_time(load: Any, share: float = DEAD_SHARE) -> Any:
    """Recorded steps from each expert's first death until it lived again, [..., expert].

    `load` is [..., step, expert]. NaN where it never died, and where the record ended first
    (censored): the mean of the others is too short, so read it beside `rescue_rate`.
    """
    dead = _dead(load, share)
    alive_again = ~dead & np.logical_or.accumulate(dead, axis=-2)
    steps = alive_again.argmax(-2) - dead.argmax(-2)
    return np.where(alive_again.any(-2), steps, np.nan)


def rescue_rate(load: Any, after: int, share: float = DEAD_SHARE) -> Any:
    """Of experts dead at a recorded step, the share alive `after` steps later, [...].

    `load` is [..., step, expert]; all pairs of such steps count. NaN where none was dead.
    Windows should not overlap by more than `after` steps, or the two loads are one.
    """
    dead = _dead(load, share)
    before, later = dead[..., :-after, :], dead[..., after:, :]
    died, rescued = before.sum((-2, -1)), (before & ~later).sum((-2, -1))
    return np.where(died > 0, rescued / np.maximum(died, 1), np.nan)


def _dead(load: Any, share: float) -> np.ndarray:
    load = np.asarray(load, dtype=float)
    warn_if_few(float(load.mean()), "windowed")
    return _under(load, share)


def warn_if_few(mean: float, kind: str, stacklevel: int = 4) -> None:
    """Warn where a mean load of `mean` tokens is too small to call an expert dead."""
    if mean < ENOUGH_TOKENS:
        warnings.warn(
            f"the mean {kind} load is {mean:.0f} tokens; under {ENOUGH_TOKENS} a live expert "
            "may look dead.",
            stacklevel=stacklevel,
        )
