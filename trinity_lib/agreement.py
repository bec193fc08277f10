"""One expert layer, what it is given, and how far what it computes lies from float64.

The float64 side is a loop over experts that shares no code with any backend.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trinity_lib.experts import Experts
from trinity_lib.routing import Routing

ROUTINGS = ("balanced", "random", "collapsed")
"""Every expert equally often; drawn; all but one token in twenty on the same K experts."""
QUANTITIES = (
    "output",
    "token gradient",
    "routing weight gradient",
    "expert weight gradient",
)
STRAY = 0.05
"""Share of tokens that a collapsed routing leaves to chance."""

Errors = dict[str, dict[str, float]]
"""Relative errors by backend and quantity."""


class Batch(NamedTuple):
    """What a layer is given, forward and backward."""

    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    """Routing weights, fp32 at least."""
    dy_TD: Tensor
    """Gradient of the output."""


class Results(NamedTuple):
    """What a layer computes: its output, and the gradients of all it is made of."""

    y_TD: Tensor
    dx_TD: Tensor
    dweights_TK: Tensor
    dgate_EFD: Tensor
    dup_EFD: Tensor
    ddown_EFD: Tensor


def layer(
    num_experts: int, width: int, hidden: int, seed: int, device: str, dtype: torch.dtype
) -> Experts:
    """Experts whose normal weights keep the scale of what passes through."""
    generator = _generator(device, seed, 0, 0)
    with torch.device("meta"):
        experts = Experts(num_experts, width, hidden)
    for name, fan_in in (("gate_EFD", width), ("up_EFD", width), ("down_EFD", hidden)):
        weight_EFD = torch.empty(num_experts, hidden, width, device=device, dtype=dtype)
        weight_EFD.normal_(std=fan_in**-0.5, generator=generator)
        setattr(experts, name, nn.Parameter(weight_EFD))
    return experts


def batch(experts: Experts, tokens: int, top_k: int, routing: str, seed: int) -> Batch:
    """Tokens, choices, routing weights that sum to 1, and a gradient, all by the seed.

    Whatever else is measured, the same seed, number of tokens and routing give the same.
    """
    num_experts, _, width = experts.gate_EFD.shape
    device = experts.gate_EFD.device
    generator = _generator(device.type, seed, tokens, 1 + ROUTINGS.index(routing))
    x_TD, dy_TD = (
        experts.gate_EFD.new_empty(tokens, width).normal_(generator=generator) for _ in "xy"
    )
    experts_TK = _choices(tokens, num_experts, top_k, routing, generator)
    weights_TK = torch.rand(tokens, top_k, device=device, generator=generator) + 0.1
    return Batch(x_TD, experts_TK, weights_TK / weights_TK.sum(1, keepdim=True), dy_TD)


def _choices(
    tokens: int, num_experts: int, top_k: int, routing: str, generator: torch.Generator
) -> Tensor:
    """Chosen experts [T, K], different ones for each token."""
    device = generator.device
    ranking_TE = torch.rand(tokens, num_experts, device=device, generator=generator)
    if routing == "balanced":
        order_T = torch.randperm(tokens, device=device, generator=generator)
        names_E = torch.randperm(num_experts, device=device, generator=generator)
        turn_TK = torch.arange(tokens * top_k, device=device).view(tokens, top_k)
        return names_E[turn_TK[order_T] % num_experts]
    if routing == "collapsed":
        stays_T = torch.rand(tokens, device=device, generator=generator) >= STRAY
        ranking_TE[:, :top_k] += stays_T[:, None].float()
    return ranking_TE.topk(top_k).indices


def between(experts: Experts, given: Batch, backends: Sequence[str]) -> Errors:
    """How far each backend's results lie from float64."""
    results = {backend: compute(experts, given, backend) for backend in backends}
    return errors(experts, given, results)


def compute(experts: Experts, given: Batch, backend: Any) -> Results:
    """A backend's output and gradients."""
    experts.backend = backend
    x_TD, weights_TK = (t.detach().requires_grad_() for t in (given.x_TD, given.weights_TK))
    y_TD = experts(x_TD, Routing(x_TD, given.experts_TK, weights_TK))
    leaves = (x_TD, weights_TK, experts.gate_EFD, experts.up_EFD, experts.down_EFD)
    return Results(y_TD.detach(), *torch.autograd.grad(y_TD, leaves, given.dy_TD))


def errors(experts: Experts, given: Batch, results: Mapping[str, Results]) -> Errors:
    """Each result's relative error by quantity: norm of the difference over float64's norm.

    inf where a result is not finite. One expert at a time is in float64, so that a layer
    of any size needs little more than its own memory.
    """
    like = (given.dy_TD, given.x_TD, given.weights_TK)
    y_TD, dx_TD, dweights_TK = (torch.zeros_like(t, dtype=torch.float64) for t in like)
    apart = dict.fromkeys(results, 0.0)
    size = 0.0
    for expert in range(len(experts.gate_EFD)):
        token, choice = (given.experts_TK == expert).nonzero(as_tuple=True)
        y_RD, dx_RD, dweights_R, *grads = _expert(experts, given, expert, token, choice)
        y_TD[token] += y_RD
        dx_TD[token] += dx_RD
        dweights_TK[token, choice] = dweights_R
        size += sum(_squares(grad) for grad in grads)
        for name, result in results.items():
            pairs = zip(result[3:], grads, strict=True)
            apart[name] += sum(_squares(got[expert] - grad) for got, grad in pairs)
    found = {}
    for name, result in results.items():
        pairs = zip(result, (y_TD, dx_TD, dweights_TK), strict=False)
        shares = [_squares(got - grad) / _squares(grad) for got, grad in pairs]
        shares.append(apart[name] / size)
        roots = [share**0.5 if np.isfinite(share) else float("inf") for share in shares]
        found[name] = dict(zip(QUANTITIES, roots, strict=True))
    return found


def _expert(
    experts: Experts, given: Batch, expert: int, token: Tensor, choice: Tensor
) -> tuple[Tensor, ...]:
    """One expert in float64: its share of outputs, and gradients of all that went in.

    Those of its tokens, their routing weights, and its gate, up and down.
    """
    weights = (w[expert] for w in (experts.gate_EFD, experts.up_EFD, experts.down_EFD))
    inputs = (given.x_TD[token], given.weights_TK[token, choice], *weights)
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    x_RD, weights_R, gate_FD, up_FD, down_FD = leaves
    gate_RF = x_RD @ gate_FD.T
    hidden_RF = gate_RF * torch.sigmoid(gate_RF) * (x_RD @ up_FD.T)
    y_RD = (hidden_RF @ down_FD) * weights_R[:, None]
    return y_RD.detach(), *torch.autograd.grad(y_RD, leaves, given.dy_TD[token].double())


def _squares(t: Tensor) -> float:
    return float(t.double().square().sum())


def _generator(device: str, *seeds: int) -> torch.Generator:
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]))
