"""A router alone, on synthetic scores that drift: no model, thousands of steps a second.

    popularity p_i(t), a random walk;  score s_ti = sigmoid(4 (p_i + noise z_ti)), z normal

so that popularities, noise, drift and biases are all in units of the score. What moves the
bias is the balancers' own code. Nothing learns here: a real router also feeds the experts it
likes, which makes collapse worse than any drift. One core does some 1,400 steps of SMEBU a
second with 64 experts, top-4 and 512 tokens a step, and 3,000 with 32, top-2 and 256.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from trinity_lib import balance, balancers, dynamics, loads
from trinity_lib.balance import BalanceConfig, Balancer
from trinity_lib.config import check, require

STEERING = (
    "none", "loss_free", "sign", "proportional", "smebu",
    "quantile", "bip", "sinkhorn", "expert_choice", "dropout",
)  # fmt: skip
"""Balancers that work on a router alone: losses need a model to teach, hashes token ids."""
RIVALS = ("sign", "loss_free", "proportional", "quantile", "none")
"""Of these, what is quick and trains what inference does: beside SMEBU in `beside`."""


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """The router, the scores it sees, and the balancer."""

    balance: BalanceConfig = BalanceConfig(rate=1e-2)
    """The balancer; one that acts on the router itself."""
    experts: int = 64
    """Experts of the router."""
    top_k: int = 4
    """Experts a token takes."""
    tokens: int = 512
    """Tokens in a step."""
    steps: int = 400
    """Balancer steps."""
    spread: float = 0.1
    """Standard deviation of the experts' first popularities, in units of the score."""
    noise: float = 0.1
    """Standard deviation of a token's own preferences, in units of the score."""
    drift: float = 0.0
    """Standard deviation of a popularity's random walk in one step, in units of the score."""
    shift: int = 0
    """Step before which all popularities are dealt anew; 0 is never."""
    keep: int = 5
    """Steps between records of every expert's count and bias."""
    seed: int = 0
    """Seed of popularities and tokens, the same for every balancer."""

    def __post_init__(self) -> None:
        check(self)
        steers = self.balance.method in STEERING
        right = f"one that moves a router alone: {', '.join(STEERING)}"
        require(steers, "balance.method", self.balance.method, right)
        require(2 <= self.experts <= 4096, "experts", self.experts, "from 2 to 4096")
        fits = 1 <= self.top_k < self.experts
        require(fits, "top_k", self.top_k, f"at least 1, below experts ({self.experts})")
        for name, least in {"tokens": 1, "steps": 1, "keep": 1, "shift": 0, "seed": 0}.items():
            require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        for name in ("spread", "noise", "drift"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")


class Routed(NamedTuple):
    """What a balancer reads of a layer's routing."""

    scores_TE: Tensor
    experts_TK: Tensor


def simulate(config: SimulationConfig) -> xr.Dataset:
    """Every step's balance, and thinned counts and biases, of one router under one balancer.

    Over `step`: max_vio, effective_experts, dead, bias_std, bias_range, popularity_std. Over
    `kept` (steps that are recorded) and `expert`: count, bias. Counts of a step are those that
    the bias before it caused; biases are those after it. `dead` is over a trailing window of
    100 tokens an expert, its length the attribute `window`. The same config gives the same
    bits. Sampling noise alone shows the MaxVio that is the attribute `floor`.
    """
    generator = torch.Generator().manual_seed(config.seed)
    balancer = _built(config.balance, 1, config.experts, config.top_k, config.seed)
    popularity_E = config.spread * torch.randn(config.experts, generator=generator)
    noise_TE = torch.empty(config.tokens, config.experts)
    counts, biases, spreads = [], [], []
    for step in range(1, config.steps + 1):
        walk_E = torch.randn(config.experts, generator=generator)
        popularity_E = popularity_E + config.drift * walk_E
        if step == config.shift:
            popularity_E = config.spread * torch.randn(config.experts, generator=generator)
        noise_TE.normal_(generator=generator)
        scores_TE = noise_TE.mul_(4 * config.noise).add_(4 * popularity_E).sigmoid()
        counts.append(advance(balancer, [scores_TE], config.top_k)[0])
        biases.append(balancer.bias_LE[0])
        spreads.append(popularity_E.std())
    series = torch.stack(counts).numpy(), torch.stack(biases).numpy()
    return _recorded(config, *series, torch.stack(spreads).numpy())


def beside(
    rival: str,
    rate: float,
    *,
    lam: float,
    kappa: float,
    beta: float,
    shift: bool = False,
    steps: int = 120,
    **router: Any,
) -> tuple[xr.Dataset, xr.Dataset]:
    """SMEBU and a rival with step size `rate` on the same tokens; `shift` is half-way.

    `router` are further settings of `SimulationConfig`.
    """
    smebu = BalanceConfig(method="smebu", rate=lam, kappa=kappa, beta=beta)
    other = BalanceConfig(method=rival, rate=rate)  # type: ignore[arg-type]
    when = steps // 2 if shift else 0
    first, second = (
        simulate(SimulationConfig(balance=b, steps=steps, shift=when, keep=2, **router))
        for b in (smebu, other)
    )
    return first, second


def _built(config: BalanceConfig, layers: int, experts: int, top_k: int, seed: int) -> Balancer:
    return balancers.build(
        config, num_layers=layers, num_experts=experts, top_k=top_k, vocab_size=1, seed=seed
    )


@torch.no_grad()
def advance(balancer: Balancer, scores: Sequence[Tensor], top_k: int) -> Tensor:
    """What a training step does with a balancer, layer by layer; the loads [L, E]."""
    documents_BS = torch.zeros(1, len(scores[0]), dtype=torch.int64)
    balancer.begin(documents_BS, documents_BS)
    routing = []
    for layer, scores_TE in enumerate(scores):
        ranked = balancer.select(scores_TE, layer)
        if ranked.is_floating_point():
            ranked = ranked.topk(top_k, sorted=False).indices
        routing.append(Routed(scores_TE, ranked))
    valid_T = documents_BS[0] == 0
    balancer.update(balancer.observe(routing, valid_T))
    return balance.load(routing, valid_T)


def _recorded(
    config: SimulationConfig, count: np.ndarray, bias: np.ndarray, spread: np.ndarray
) -> xr.Dataset:
    """The Dataset of counts and biases, both [step, expert]."""
    mean = config.tokens * config.top_k / config.experts
    window = min(config.steps, math.ceil(loads.ENOUGH_TOKENS / mean))
    total = np.pad(count.cumsum(0), ((window, 0), (0, 0)))
    kept = slice(config.keep - 1, None, config.keep)
    step, kinds = np.arange(1, config.steps + 1), ("kept", "expert")
    data = {
        "max_vio": named("step", loads.max_vio(count), "MaxVio: highest / mean load, less 1"),
        "effective_experts": named(
            "step", loads.effective_experts(count), "exponential of the load entropy", "expert"
        ),
        "dead": named(
            "step",
            loads.dead_fraction(total[window:] - total[:-window]),
            f"share of dead experts over {window} steps",
        ),
        "bias_std": named("step", dynamics.bias_std(bias), "standard deviation of the bias"),
        "bias_range": named("step", dynamics.bias_range(bias), "highest less lowest bias"),
        "popularity_std": named("step", spread, "standard deviation of the popularities"),
        "count": named(kinds, count[kept], "tokens routed to the expert", "token"),
        "bias": named(kinds, bias[kept], "selection bias after the step"),
    }
    axes = {
        "step": named("step", step, "balancer step"),
        "kept": named("kept", step[kept], "recorded balancer step"),
        "expert": named("expert", np.arange(config.experts), "expert"),
    }
    floor = loads.sampling_floor(config.tokens, config.experts, config.top_k)
    about = {"method": config.balance.method, "rate": config.balance.rate}
    return xr.Dataset(data, axes, {**about, "floor": floor, "window": window})


def named(dims: Any, values: Any, long_name: str, units: str = "1") -> tuple:
    """A variable of a Dataset, as xarray takes it."""
    return dims, values, {"long_name": long_name, "units": units}


def recovery(
    *,
    methods: Sequence[str] = ("smebu", "sign"),
    gaps: Sequence[float] = (0.1, 0.2, 0.3, 0.4),
    rate: float = 5e-3,
    kappa: float = 2.0,
    beta: float = 0.5,
    experts: int = 64,
    top_k: int = 2,
    tokens: int = 2048,
    noise: float = 0.01,
    seed: int = 0,
) -> xr.Dataset:
    """Steps until dead experts are back, by score gap, beside the prediction.

    `collapse`: 2k hot experts take all tokens, and the gap to the dead closes at
    lambda (1 + tanh kappa) a step, sign at 2u, whatever the centring. `one dead`: all others
    are balanced and do not come down, so it closes at lambda tanh kappa, sign at u: about
    half as fast. Back is half of the mean load (of all dead experts together). `noise`, of
    tokens, is small beside the gaps; momentum adds its lag, beta / (1 - beta) steps.

    Over balancer, case, gap: steps (NaN where twice the predicted steps were too few),
    predicted.
    """
    speed = {"smebu": (1 + math.tanh(kappa), math.tanh(kappa)), "sign": (2.0, 1.0)}
    for method in methods:
        require(method in speed, "methods", method, "smebu or sign")
    cases = [(gap, dead) for dead in (experts - 2 * top_k, 1) for gap in gaps]
    measured, predicted = [], []
    for method in methods:
        closes = np.repeat(speed[method], len(gaps)) * rate
        predicted.append(np.array([gap for gap, _ in cases]) / closes)
        config = BalanceConfig(method=method, rate=rate, kappa=kappa, beta=beta)  # type: ignore[arg-type]
        balancer = _built(config, len(cases), experts, top_k, seed)
        limit = math.ceil(2 * predicted[-1].max())
        measured.append(_returned(balancer, cases, tokens, noise, limit))
    shape = len(methods), 2, len(gaps)
    kinds = ("balancer", "case", "gap")
    data = {
        "steps": named(kinds, np.reshape(measured, shape), "steps until back", "step"),
        "predicted": named(kinds, np.reshape(predicted, shape), "gap / closing speed", "step"),
    }
    axes = {
        "balancer": list(methods),
        "case": ["collapse", "one dead"],
        "gap": named("gap", np.array(gaps, float), "score gap of the dead"),
    }
    return xr.Dataset(data, axes, {"rate": rate, "kappa": kappa, "beta": beta})


def _returned(
    balancer: Balancer,
    cases: Sequence[tuple[float, int]],
    tokens: int,
    noise: float,
    limit: int,
) -> np.ndarray:
    """The steps until the first `dead` experts, `gap` below, are back; a layer a case."""
    sizes = balancer.sizes
    generator = torch.Generator().manual_seed(sizes.seed)
    level_LE = torch.full((len(cases), sizes.num_experts), 0.5)
    for level_E, (gap, dead) in zip(level_LE, cases, strict=True):
        level_E[:dead] -= gap
    back_L = np.full(len(cases), np.nan)
    half = tokens * sizes.top_k / sizes.num_experts / 2
    for number in range(1, limit + 1):
        noise_TE = noise * torch.randn(tokens, sizes.num_experts, generator=generator)
        load_LE = advance(balancer, list(noise_TE + level_LE[:, None]), sizes.top_k)
        for layer, (_, dead) in enumerate(cases):
            if np.isnan(back_L[layer]) and float(load_LE[layer, :dead].float().mean()) > half:
                back_L[layer] = number - 1
        if not np.isnan(back_L).any():
            break
    return back_L


def noise(
    *,
    methods: Sequence[str] = ("smebu", "sign"),
    tokens: Sequence[int] = (128, 512, 2048, 8192),
    rate: float = 5e-3,
    experts: int = 16,
    top_k: int = 2,
    steps: int = 300,
    seed: int = 0,
) -> xr.Dataset:
    """What a balancer adds to sampling noise at equilibrium, by tokens a step.

    All experts are equally popular, so the right bias is 0. Over the second half of `steps`:
    jitter, the spread of the bias, and excess, MaxVio less the floor of uniform routing.
    The same rate is lambda of SMEBU and u of sign, the speed of both far from balance. SMEBU
    steps by what it sees and comes to rest as tokens grow; sign always steps by u. So the
    ratio of the two grows with tokens; the difference of their excesses hardly does.
    """
    jitter, excess = [], []
    for method in methods:
        for count in tokens:
            config = SimulationConfig(
                balance=BalanceConfig(method=method, rate=rate),  # type: ignore[arg-type]
                experts=experts, top_k=top_k, tokens=count, steps=steps, spread=0.0, seed=seed,
            )  # fmt: skip
            late = simulate(config).isel(step=slice(steps // 2, None))
            jitter.append(float(late["bias_std"].mean()))
            excess.append(float(late["max_vio"].mean()) - late.attrs["floor"])
    shape, kinds = (len(methods), len(tokens)), ("balancer", "tokens")
    data = {
        "jitter": named(kinds, np.reshape(jitter, shape), "spread of the bias at equilibrium"),
        "excess": named(kinds, np.reshape(excess, shape), "MaxVio less its sampling floor"),
    }
    axes = {
        "balancer": list(methods),
        "tokens": named("tokens", list(tokens), "tokens a step", "token"),
    }
    return xr.Dataset(data, axes, {"rate": rate, "experts": experts, "top_k": top_k})
