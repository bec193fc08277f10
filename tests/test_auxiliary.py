"""Balancing losses against plain loops, and what they count over."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from trinity_lib import auxiliary, balance, balancers
from trinity_lib.balance import BalanceConfig

L, B, S, E, K = 2, 3, 5, 6, 2


class Routed(NamedTuple):
    scores_TE: Tensor
    experts_TK: Tensor


def build(method: str, **settings: float) -> balance.Balancer:
    config = BalanceConfig(method=method, **{"sequence_loss": 0.0, **settings})
    return balancers.build(config, num_layers=L, num_experts=E, top_k=K, vocab_size=9, seed=0)


def routing_of(seed: int, rows: int = B) -> list[Routed]:
    generator = torch.Generator().manual_seed(seed)
    routing = []
    for _ in range(L):
        scores = torch.rand(rows * S, E, generator=generator, dtype=torch.float64)
        scores = (scores * torch.linspace(0.3, 1, E)).requires_grad_()
        routing.append(Routed(scores, scores.detach().topk(K).indices))
    return routing


def padded(rows: int = B) -> Tensor:
    documents = torch.zeros(rows, S, dtype=torch.long)
    documents[0, 3:] = -1
    return documents


def counts_of(routed: Routed, valid: list[bool]) -> list[int]:
    taken = [routed.experts_TK[t].tolist() for t in range(len(valid)) if valid[t]]
    return [sum(i in chosen for chosen in taken) for i in range(E)]


def shares_of(routed: Routed, valid: list[bool]) -> list[float]:
    rows = [routed.scores_TE[t].tolist() for t in range(len(valid)) if valid[t]]
    return [sum(row[i] / sum(row) for row in rows) / len(rows) for i in range(E)]


def by_hand(counts: list[list[int]], shares: list[list[float]]) -> float:
    total = 0.0
    for n, p in zip(counts, shares, strict=True):
        total += sum(E * a / sum(n) * b for a, b in zip(n, p, strict=True))
    return total


def test_switch_against_plain_loops() -> None:
    routing, documents = routing_of(0), padded()
    valid = (documents.flatten() >= 0).tolist()
    counts = [counts_of(r, valid) for r in routing]
    expected = 0.25 * B * by_hand(counts, [shares_of(r, valid) for r in routing])
    assert build("switch", rate=0.25).loss(routing, documents).item() == pytest.approx(expected)


@pytest.mark.parametrize("method", ["switch", "sequence", "global"])
def test_an_even_load_costs_the_weight_a_row_and_layer(method: str) -> None:
    scores = torch.full((6, 6), 0.5)
    even = Routed(scores, torch.tensor([[0, 1], [2, 3], [4, 5]] * 2))
    loss = build(method, rate=0.01).loss([even] * L, torch.zeros(2, 3, dtype=torch.long))
    assert float(loss) == pytest.approx(0.01 * 2 * L)


def test_no_gradient_flows_through_what_is_counted() -> None:
    """The gradient is f times that of P alone; padding has none."""
    routing, documents = routing_of(1), padded()
    valid = documents.flatten() >= 0
    build("switch", rate=1.0).loss(routing, documents).backward()
    for routed in routing:
        n = counts_of(routed, valid.tolist())
        f = torch.tensor([E * x / sum(n) for x in n], dtype=torch.float64)
        total = routed.scores_TE.detach().sum(-1, keepdim=True)
        share = routed.scores_TE.detach() / total
        expected = B / int(valid.sum()) * (f - (f * share).sum(-1, keepdim=True)) / total
        assert torch.allclose(routed.scores_TE.grad, expected * valid.unsqueeze(-1))


def test_global_counts_the_micro_batches_so_far() -> None:
    balancer = build("global", rate=0.5)
    parts = [routing_of(2, rows=2), routing_of(3, rows=2)]
    documents = torch.zeros(2, S, dtype=torch.long)
    valid = [True] * (2 * S)
    so_far = [[0] * E for _ in range(L)]
    for _ in range(2):  # the second step counts anew
        statistics = torch.zeros(L, E, dtype=torch.int64)
        so_far = [[0] * E for _ in range(L)]
        for routing in parts:
            own = [counts_of(r, valid) for r in routing]
            pairs = zip(so_far, own, strict=True)
            so_far = [[a + b for a, b in zip(x, y, strict=True)] for x, y in pairs]
            expected = 0.5 * 2 * by_hand(so_far, [shares_of(r, valid) for r in routing])
            assert balancer.loss(routing, documents).item() == pytest.approx(expected)
            observed = balancer.observe(routing, torch.tensor(valid))
            assert observed.tolist() == own
            statistics += observed
        balancer.update(statistics)
    assert not balancer.bias_LE.any()


def test_one_micro_batch_of_global_is_switch_and_two_are_not() -> None:
    documents = torch.zeros(B, S, dtype=torch.long)
    wide, local = build("global", rate=0.5), build("switch", rate=0.5)
    first, second = routing_of(4), routing_of(5)
    assert torch.equal(wide.loss(first, documents), local.loss(first, documents))
    wide.observe(first, documents.flatten() >= 0)
    assert not torch.isclose(wide.loss(second, documents), local.loss(second, documents))


def test_sequence_is_the_sequence_wise_loss_alone() -> None:
    routing, documents = routing_of(6), padded()
    alone = balance.sequence_losses(0.3, routing, documents)
    for beside in (0.0, 0.7):
        loss = build("sequence", rate=0.3, sequence_loss=beside).loss(routing, documents)
        assert torch.equal(loss, alone)
    assert build("sequence", rate=0.0).loss(routing, documents) is None


def test_phi_against_plain_loops() -> None:
    balancer = build("phi", rate=0.2, share=0.25)
    documents = padded()
    valid = (documents.flatten() >= 0).tolist()
    average = [[1 / E] * E for _ in range(L)]
    for seed in range(3):
        routing = routing_of(seed)
        shares = [shares_of(r, valid) for r in routing]
        expected = sum(
            0.2 * B * p * math.log(m)
            for means, averages in zip(shares, average, strict=True)
            for p, m in zip(means, averages, strict=True)
        )
        assert balancer.loss(routing, documents).item() == pytest.approx(expected, rel=1e-6)
        balancer.update(balancer.observe(routing, torch.tensor(valid)))
        for layer, means in enumerate(shares):
            pairs = zip(average[layer], means, strict=True)
            average[layer] = [0.75 * m + 0.25 * p for m, p in pairs]
            assert balancer.state()["average"][layer].tolist() == pytest.approx(
                average[layer], rel=1e-6
            )


def test_phi_pushes_down_what_was_above_average() -> None:
    balancer = build("phi", rate=1.0, share=1.0)
    routing, documents = routing_of(7), torch.zeros(B, S, dtype=torch.long)
    balancer.update(balancer.observe(routing, documents.flatten() >= 0))
    balancer.loss(routing, documents).backward()
    for routed, average in zip(routing, balancer.state()["average"], strict=True):
        slope = routed.scores_TE.grad.sum(0)
        assert slope[average.argmax()] > 0 > slope[average.argmin()]


def test_a_layer_without_tokens_keeps_its_average_and_dead_experts_stay_finite() -> None:
    balancer = build("phi", rate=1.0, share=1.0)
    routing = routing_of(8)
    none = torch.zeros(B * S, dtype=torch.bool)
    balancer.update(balancer.observe(routing, none))
    assert torch.equal(balancer.state()["average"], torch.full((L, E), 1 / E))
    dead = Routed(routing[0].scores_TE.detach() * torch.tensor([1.0] * (E - 1) + [0.0]),
                  routing[0].experts_TK)  # fmt: skip
    balancer.update(balancer.observe([dead] * L, ~none))
    assert balancer.state()["average"][0, -1] == 0
    assert balancer.loss(routing, torch.zeros(B, S, dtype=torch.long)).isfinite()


def test_a_micro_batch_of_padding_costs_nothing() -> None:
    routing, documents = routing_of(9), torch.full((B, S), -1)
    for method in ("switch", "global", "phi"):
        loss = build(method, rate=1.0).loss(routing, documents)
        loss.backward()
        assert loss.item() == 0
    assert not any(r.scores_TE.grad.any() for r in routing)
    assert not auxiliary.mean_shares(routing, documents.flatten() >= 0).any()
