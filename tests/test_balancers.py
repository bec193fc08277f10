"""What holds for every balancer, by its name."""

from typing import NamedTuple, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from trinity_lib import balancers
from trinity_lib.balance import BalanceConfig, Balancer

METHODS = get_args(get_type_hints(BalanceConfig)["method"])
MOVING = {"loss_free", "sign", "proportional", "smebu", "quantile", "bip"}
L, B, S, E, K, V = 2, 4, 16, 12, 2, 40


class Routed(NamedTuple):
    scores_TE: Tensor
    experts_TK: Tensor


class Part(NamedTuple):
    tokens_BS: Tensor
    documents_BS: Tensor
    scores_LTE: Tensor


def build(method: str, **settings: float) -> Balancer:
    config = BalanceConfig(method=method, **{"rate": 0.05, **settings})
    return balancers.build(config, num_layers=L, num_experts=E, top_k=K, vocab_size=V, seed=5)


def part(seed: int) -> Part:
    generator = torch.Generator().manual_seed(seed)
    documents_BS = torch.zeros(B, S, dtype=torch.long)
    documents_BS[0, 9:] = -1
    scores = torch.rand(L, B * S, E, generator=generator) * torch.linspace(0.2, 1, E)
    return Part(torch.randint(0, V, (B, S), generator=generator), documents_BS, scores)


def routed(balancer: Balancer, given: Part) -> list[Routed]:
    """What a forward does."""
    fixed = balancer.begin(given.tokens_BS, given.documents_BS)
    routing = []
    for layer, scores in enumerate(given.scores_LTE):
        ranked = balancer.select(scores, layer) if fixed is None else fixed[layer]
        experts = ranked.topk(K).indices if ranked.is_floating_point() else ranked
        routing.append(Routed(scores, experts))
    return routing


def step(balancer: Balancer, parts: list[Part]) -> list[Tensor]:
    """What an optimiser step does; everything that came of it."""
    statistics: Tensor | int = 0
    found = []
    for given in parts:
        routing = routed(balancer, given)
        loss = balancer.loss(routing, given.documents_BS)
        found += [r.experts_TK for r in routing] + ([] if loss is None else [loss])
        observed = balancer.observe(routing, given.documents_BS.flatten() >= 0)
        assert len(observed) == L
        statistics = observed + statistics
    balancer.update(statistics)
    return found


def test_every_method_has_a_class() -> None:
    assert tuple(sorted(METHODS)) == tuple(sorted(balancers.BALANCERS))
    for method in METHODS:
        balancer = build(method)
        assert balancer.bias_LE.shape == balancer.momentum_LE.shape == (L, E)
        assert balancer.bias_LE.dtype == balancer.momentum_LE.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_balancer_goes_on_to_the_bit(method: str) -> None:
    through, stopped = build(method), build(method)
    for seed in range(3):
        for balancer in (through, stopped):
            step(balancer, [part(seed), part(seed + 10)])
    state = {name: tensor.clone() for name, tensor in stopped.state().items()}
    assert {"bias", "momentum"} <= set(state)
    resumed = build(method)
    resumed.load_state(state)
    for seed in range(3, 6):
        parts = [part(seed), part(seed + 10)]
        before, after = step(through, parts), step(resumed, parts)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    ends = zip(through.state().values(), resumed.state().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in ends)


@pytest.mark.parametrize("method", METHODS)
def test_selection_changes_nothing_and_can_be_repeated(method: str) -> None:
    balancer, given = build(method), part(0)
    step(balancer, [part(1)])
    balancer.begin(given.tokens_BS, given.documents_BS)
    before = {name: tensor.clone() for name, tensor in balancer.state().items()}
    first = [balancer.select(s, i) for i, s in enumerate(given.scores_LTE)]
    again = [balancer.select(s, i) for i, s in enumerate(given.scores_LTE)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(balancer.state()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "method", ["loss_free", "sign", "proportional", "smebu", "quantile", "phi"]
)
def test_statistics_add_up_over_micro_batches(method: str) -> None:
    """The same choices, whole or split, give the same update."""
    given = part(2)
    start = build(method)
    step(start, [part(1)])
    ends = []
    for pieces in (1, 2, 4):
        balancer = build(method)
        balancer.load_state(start.state())
        routing = routed(balancer, given)
        statistics: Tensor | int = 0
        for rows in torch.arange(B * S).chunk(pieces):
            share = [Routed(r.scores_TE[rows], r.experts_TK[rows]) for r in routing]
            valid = given.documents_BS.flatten()[rows] >= 0
            statistics = balancer.observe(share, valid) + statistics
        balancer.update(statistics)
        ends.append(balancer.state())
    for end in ends[1:]:
        for name, value in end.items():
            exact = method != "phi"
            assert torch.allclose(value, ends[0][name], rtol=0, atol=0 if exact else 1e-7)
    moved = "average" if method == "phi" else "bias"
    assert not torch.equal(ends[0][moved], start.state()[moved])


@pytest.mark.parametrize("method", METHODS)
def test_the_sequence_wise_loss_stands_beside_every_method_but_two(method: str) -> None:
    given = part(3)
    losses = []
    for weight in (0.0, 0.5, 1.0):
        balancer = build(method, sequence_loss=weight)
        loss = balancer.loss(routed(balancer, given), given.documents_BS)
        losses.append(0.0 if loss is None else float(loss))
    alone, half, whole = losses
    if method in ("none", "sequence"):
        assert alone == half == whole
        return
    assert whole - alone == pytest.approx(2 * (half - alone), rel=1e-4) and whole > alone
    if method not in ("switch", "global", "phi"):
        assert alone == 0


@pytest.mark.parametrize("method", sorted(set(METHODS) - MOVING))
def test_a_bias_that_came_with_the_weights_stays(method: str) -> None:
    balancer = build(method)
    came = torch.arange(float(L * E)).view(L, E)
    balancer.bias_LE = came.clone()
    step(balancer, [part(4), part(5)])
    assert torch.equal(balancer.bias_LE, came) and not balancer.momentum_LE.any()


def test_only_hash_has_choices_before_any_score() -> None:
    for method in METHODS:
        fixed = build(method).fixed(torch.zeros(B, S, dtype=torch.long))
        assert (fixed is not None) == (method == "hash")
