"""Where SMEBU's loop with a router begins to swing, and the step size that follows.

Near balance the loads answer a bias linearly, dv = -J db, and J is the Laplacian of the graph
in which experts compete for tokens: `jacobian`. Along an eigenvector of eigenvalue S, SMEBU
is b += m, m = beta m - (1 - beta) g b with the loop gain g = lambda kappa S. Its
characteristic polynomial z^2 - (1 + beta - (1 - beta) g) z + beta leaves the unit circle at
z = -1, a bias that swings from step to step, where g = 2 (1 + beta) / (1 - beta). The largest
S crosses first and sets the bound.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from trinity_lib import balance
from trinity_lib.config import BadValue, require
from trinity_lib.simulate import Routed, named

PUSH = 0.03
"""Violation, root mean square, that a measurement starts from: tanh is linear there."""
LARGEST = 4.0
"""Largest over mean eigenvalue of J, rounded up: 2.4 to 3.9 in nine layers of toy runs."""
FEWEST = 30
"""Consecutive recorded steps that tell a slope."""


class Suggestion(NamedTuple):
    """A step size for SMEBU, and what it rests on."""

    rate: float
    """lambda: `lower`, or half of `upper` where that is less."""
    lower: float
    """lambda that closes the gap within the wanted steps, gap / (steps (1 + tanh kappa))."""
    upper: float
    """lambda at which the loads begin to swing, 2 (1 + beta) / ((1 - beta) kappa slope)."""
    slope: float
    """Largest slope of a violation against the bias, over layers, per unit of the score."""
    gap: float
    """How far apart biases must lie, over layers, in units of the score."""


def jacobian(scores_TE: Tensor, bias_E: Tensor, top_k: int, step: float) -> Tensor:
    """J_ij = -dv_i / db_j of top-k loads, [E, E], float64, per unit of the score.

    The exact finite differences of `step`, forward and backward averaged, in one pass:
    raising b_j takes from its k-th expert every token whose k-th rank is less than `step`
    above j, and lowering b_j loses a token to its (k+1)-th expert likewise. So columns sum to
    zero; J is symmetric but for the finite tokens.
    """
    ranked_TE = scores_TE + bias_E
    experts = ranked_TE.shape[-1]
    best = ranked_TE.topk(top_k + 1)
    last_T1, next_T1 = best.values[:, -2:-1], best.values[:, -1:]
    rises = (ranked_TE < last_T1) & (ranked_TE + step > last_T1)
    falls = (ranked_TE >= last_T1) & (ranked_TE - step < next_T1)
    pairs = [
        best.indices[token, place] * experts + expert
        for (token, expert), place in ((rises.nonzero().T, -2), (falls.nonzero().T, -1))
    ]
    flow_EE = torch.bincount(torch.cat(pairs), minlength=experts**2).view(experts, experts)
    mean = len(scores_TE) * top_k / experts
    return (flow_EE.sum(0).diag() - flow_EE).double() / (2 * step * mean)


def eigenvalues(jacobian_EE: Tensor) -> Tensor:
    """Eigenvalues S of the symmetric part of J, ascending, without the zero of b + constant."""
    return torch.linalg.eigvalsh(_even(jacobian_EE))[1:]


def _even(jacobian_EE: Tensor) -> Tensor:
    return (jacobian_EE + jacobian_EE.T) / 2


def bound(slope: Any, *, beta: Any, kappa: float) -> Any:
    """lambda at which SMEBU begins to swing: 2 (1 + beta) / ((1 - beta) kappa slope)."""
    return 2 * (1 + beta) / ((1 - beta) * kappa * slope)


class Place(NamedTuple):
    """Where a setting of SMEBU lies."""

    stable: bool
    text: str
    """Markdown that says so, with the gain, the bound and lambda at it."""


def where(rate: float, slope: float, *, beta: float, kappa: float) -> Place:
    """Where lambda = `rate` lies beside the bound, of a router of that slope."""
    most = float(bound(slope, beta=beta, kappa=kappa))
    stable = rate < most
    verdict = (
        "below it: pushed off balance, loads come back"
        if stable
        else "**beyond it: loads swing**"
    )
    return Place(
        stable,
        f"Loop gain λκS = {rate:g} × {kappa:g} × {slope:.1f} = **{rate * kappa * slope:.2g}**; "
        f"stable below 2(1+β)/(1-β) = **{2 * (1 + beta) / (1 - beta):.2g}**, "
        f"that is λ = {most:.2g}. This λ is at {rate / most:.0%} of the bound, {verdict}.",
    )


def balanced(scores_TE: Tensor, top_k: int, steps: int = 200) -> Tensor:
    """The bias [E] at which these tokens load experts evenly: SMEBU's, its step shrinking."""
    bias_LE = scores_TE.new_zeros(1, scores_TE.shape[-1])
    momentum_LE = torch.zeros_like(bias_LE)
    scale = float(scores_TE.std())
    for rate in np.geomspace(scale / 2, scale / 1000, steps):
        load_LE = loads_of(scores_TE, bias_LE, top_k)
        bias_LE, momentum_LE = balance.smebu(
            bias_LE, momentum_LE, load_LE, lam=rate, beta=0.0, kappa=2.0
        )
    return bias_LE[0]


def loads_of(scores_TE: Tensor, bias_LE: Tensor, top_k: int) -> Tensor:
    """Loads [L, E] of the same tokens under L biases."""
    ranked = [(scores_TE + bias_E).topk(top_k, sorted=False).indices for bias_E in bias_LE]
    rows = [Routed(scores_TE, experts_TK) for experts_TK in ranked]
    return balance.load(rows, torch.ones(len(scores_TE), dtype=torch.bool))


def population(tokens: int, experts: int, *, spread: float, noise: float, seed: int) -> Tensor:
    """Scores [T, E] of tokens spread evenly (Sobol): loads are nearly smooth in the bias."""
    generator = torch.Generator().manual_seed(seed)
    popularity_E = spread * torch.randn(experts, generator=generator)
    drawn_TE = torch.quasirandom.SobolEngine(experts, scramble=True, seed=seed).draw(tokens)
    normal_TE = torch.special.ndtri(drawn_TE.clamp(1e-6, 1 - 1e-6))
    return (4 * (popularity_E + noise * normal_TE)).sigmoid()


class Plant(NamedTuple):
    """A router at balance: what the swing of a bias meets."""

    scores_TE: Tensor
    """Tokens that stay the same."""
    bias_E: Tensor
    """The bias that balances them."""
    top_k: int
    slope: float
    """Largest eigenvalue of J."""
    mode_E: Tensor
    """Its eigenvector, of length 1."""


def plant(scores_TE: Tensor, top_k: int, step: float) -> tuple[Plant, dict[str, float]]:
    """The router at balance; and slope, its error by halves, the smallest beside it."""
    bias_E = balanced(scores_TE, top_k)
    values_E, vectors_EE = torch.linalg.eigh(_even(jacobian(scores_TE, bias_E, top_k, step)))
    halves = [
        float(eigenvalues(jacobian(half_TE, bias_E, top_k, step))[-1])
        for half_TE in scores_TE.chunk(2)
    ]
    figures = {
        "slope": float(values_E[-1]),
        "slope_error": abs(halves[0] - halves[1]) / 2,
        "slope_smallest": float(values_E[1]),
    }
    return Plant(scores_TE, bias_E, top_k, figures["slope"], vectors_EE[:, -1]), figures


def growth(
    plant: Plant, gain_N: np.ndarray, beta_N: np.ndarray, *, kappa: float, steps: int
) -> np.ndarray:
    """Swing after `steps` over swing before, for N settings of SMEBU at once.

    The bias is off balance by the mode of the largest eigenvalue, and moves as in the middle
    of a period-two oscillation (m = 2 b), so that little but that mode is stirred. Settings
    are rows of one bias; the swing is the root mean square, its last four steps' mean.
    """
    experts = len(plant.bias_E)
    push_E = (PUSH * math.sqrt(experts) / plant.slope * plant.mode_E).to(plant.bias_E)
    rate_N1: Any = torch.tensor(gain_N / (kappa * plant.slope)).to(push_E).unsqueeze(-1)
    beta_N1: Any = torch.tensor(beta_N).to(push_E).unsqueeze(-1)
    bias_NE = (plant.bias_E + push_E).repeat(len(gain_N), 1)
    momentum_NE = 2 * push_E.repeat(len(gain_N), 1)
    late = []
    for _ in range(steps):
        load_NE = loads_of(plant.scores_TE, bias_NE, plant.top_k)
        bias_NE, momentum_NE = balance.smebu(
            bias_NE, momentum_NE, load_NE, lam=rate_N1, beta=beta_N1, kappa=kappa
        )
        late.append((bias_NE - plant.bias_E).norm(dim=-1))
    return (torch.stack(late[-4:]).mean(0) / push_E.norm()).numpy()


def stability(
    *,
    betas: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9),
    gains: Sequence[float] = tuple(np.geomspace(0.5, 80, 12)),
    kappa: float = 2.0,
    experts: int = 8,
    top_k: int = 2,
    tokens: int = 2**14,
    steps: int = 80,
    spread: float = 0.1,
    noise: float = 0.1,
    seed: int = 0,
) -> xr.Dataset:
    """Where SMEBU's loop with a router begins to swing, measured, beside the bound.

    A balanced router is pushed and left to SMEBU at every beta and lambda; a setting is
    unstable where the swing is larger after `steps` than before. Between the last stable and
    the first unstable of `gains` (lambda kappa S) the boundary is bisected to under 1%.

    Over `beta`: boundary, bound (lambda); over `beta`, `gain`: growth of the swing.
    Attributes: slope (S), slope_error, slope_smallest. BadValue where no boundary is within
    `gains`.
    """
    scores_TE = population(tokens, experts, spread=spread, noise=noise, seed=seed)
    router, figures = plant(scores_TE, top_k, step=noise / 20)

    def grown(gain_N: np.ndarray, beta_N: np.ndarray) -> np.ndarray:
        return growth(router, gain_N, beta_N, kappa=kappa, steps=steps)

    beta_N, gain_G = np.array(betas, float), np.array(gains, float)
    settings = np.meshgrid(beta_N, gain_G, indexing="ij")
    growth_NG = grown(settings[1].ravel(), settings[0].ravel()).reshape(settings[0].shape)
    boundary_N = _bisected(grown, beta_N, gain_G, growth_NG > 1) / (kappa * router.slope)
    bound_N = bound(router.slope, beta=beta_N, kappa=kappa)
    data = {
        "boundary": named("beta", boundary_N, "lambda where loads begin to swing, measured"),
        "bound": named("beta", bound_N, "2 (1 + beta) / ((1 - beta) kappa S)"),
        "growth": named(("beta", "gain"), growth_NG, f"swing after {steps} steps over before"),
    }
    axes = {
        "beta": named("beta", beta_N, "momentum beta"),
        "gain": named("gain", gain_G, "loop gain lambda kappa S"),
    }
    return xr.Dataset(data, axes, {**figures, "kappa": kappa, "steps": steps})


def _bisected(
    grown: Callable[[np.ndarray, np.ndarray], np.ndarray],
    beta_N: np.ndarray,
    gain_G: np.ndarray,
    grows_NG: np.ndarray,
) -> np.ndarray:
    """The gain at which growth sets in, for every beta."""
    inside = bool(grows_NG[:, -1].all()) and not grows_NG[:, 0].any()
    require(inside, "gains", (gain_G[0], gain_G[-1]), "stable at first, unstable at last")
    first_N = grows_NG.argmax(-1)
    low_N, high_N = gain_G[first_N - 1], gain_G[first_N]
    while (high_N / low_N).max() > 1.01:
        middle_N = np.sqrt(low_N * high_N)
        grows_N = grown(middle_N, beta_N) > 1
        low_N, high_N = np.where(grows_N, low_N, middle_N), np.where(grows_N, middle_N, high_N)
    return np.sqrt(low_N * high_N)


def suggest_lambda(
    source: Any,
    tokens_BS: Tensor | None = None,
    *,
    steps: int = 100,
    beta: float = 0.5,
    kappa: float = 2.0,
) -> Suggestion:
    """A lambda for SMEBU that brings experts back within `steps` and does not swing.

    From a model and a batch of its tokens: the bias that balances each MoE layer's scores of
    them gives the gap (its range) and, there, the slope (J's largest eigenvalue, which few
    tokens overstate). It assumes that the batch is typical and scores stay as they are.

    From a run (`record.open_run`): the mean slope is regressed, see `observed_slope`, and
    the largest taken to be four times that; the gap is the widest range of the bias so far,
    which is too small where the run never came to balance. It assumes that popularities
    wander without a trend. In toy runs of SMEBU both came within a quarter of what the
    model's own scores say; under sign, whose bias chatters, the slope was half.

    Noise grows with lambda, so the least that meets the target is taken, up to half of what
    swings. BadValue where a run does not tell.
    """
    require(steps >= 1, "steps", steps, "1 or more")
    if isinstance(source, xr.DataTree):
        slope, gap = _of_run(source)
    else:
        require(tokens_BS is not None, "tokens_BS", tokens_BS, "a batch, beside a model")
        with torch.no_grad():
            routing = source(tokens_BS).routing
        figures = [_of_scores(r.scores_TE.float(), r.experts_TK.shape[-1]) for r in routing]
        slope, gap = np.max(figures, axis=0)
    upper = float(bound(slope, beta=beta, kappa=kappa))
    lower = float(gap / (steps * (1 + math.tanh(kappa))))
    return Suggestion(min(lower, upper / 2), lower, upper, float(slope), float(gap))


def _of_scores(scores_TE: Tensor, top_k: int) -> tuple[float, float]:
    """(slope, gap) of one layer's scores."""
    bias_E = balanced(scores_TE, top_k)
    step = float(scores_TE.std(0).mean()) / 10
    slope = float(eigenvalues(jacobian(scores_TE, bias_E, top_k, step))[-1])
    return slope, float(bias_E.max() - bias_E.min())


def _of_run(run: xr.DataTree) -> tuple[float, float]:
    """(slope, gap) of a run's /routing."""
    if "routing" not in run.children:
        raise BadValue("The run has no /routing group, so its counts and biases are not known.")
    routing = run.children["routing"].to_dataset()
    gapless = bool((np.diff(routing["step"].values) == 1).all())
    if not gapless or routing.sizes["step"] < FEWEST:
        raise BadValue(
            f"The run records {routing.sizes['step']} steps of /routing; at least {FEWEST} "
            "without gaps (record_every 1) are needed to tell a slope."
        )
    slopes_L = observed_slope(routing["count"].values, routing["bias"].values)
    if not (slopes_L > 0).any():
        raise BadValue("The run's biases hardly move, so they do not tell a slope.")
    gap = float(np.ptp(routing["bias"].values, axis=-1).max())
    return LARGEST * float(slopes_L[slopes_L > 0].max()), gap


def observed_slope(count: Any, bias: Any) -> np.ndarray:
    """J's mean eigenvalue by layer, [layer], from consecutive steps [step, layer, expert].

    Changes in violation are regressed on changes in the bias that caused them, with the
    changes in bias a step earlier as instrument: an ordinary regression overstates the slope
    severalfold, because the bias answers the very sampling noise that the next change takes
    back. The bias after a step is what the next step's counts saw. NaN where it rests.
    """
    count, bias = np.asarray(count, float), np.asarray(bias, float)
    v = 1 - count / np.maximum(count.mean(-1, keepdims=True), 1e-9)
    answer, cause = np.diff(v, axis=0)[2:], np.diff(bias, axis=0)
    instrument, cause = cause[:-2], cause[1:-1]
    moved = (instrument * cause).sum((0, -1))
    return -(instrument * answer).sum((0, -1)) / np.where(moved == 0, np.nan, moved)


@functools.lru_cache(maxsize=64)
def slope_of(experts: int, top_k: int, spread: float = 0.1, noise: float = 0.1) -> float:
    """J's largest eigenvalue for a router of `simulate` as it is built; within a tenth."""
    scores_TE = population(4096, experts, spread=spread, noise=noise, seed=0)
    bias_E = balanced(scores_TE, top_k, steps=60)
    return float(eigenvalues(jacobian(scores_TE, bias_E, top_k, noise / 10))[-1])
