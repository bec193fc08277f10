"""Tokens over ranks: who gets which, how they come home, and one process's gradients."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import distributed
from trinity_lib import exchange, trace
from trinity_lib.exchange import Exchange
from trinity_lib.mesh import ParallelConfig, chunk
from trinity_lib.routing import Routing

WIDTH = 3


class Case(NamedTuple):
    """One layer, and how many tokens each of the ranks that share it has."""

    tokens: tuple[int, ...]
    num_experts: int
    top_k: int = 2
    only: int | None = None
    """The one expert that all tokens choose."""


CASES = {
    "four ranks": Case((5, 3, 9, 1), 8),
    "two ranks": Case((4, 6), 4),
    "uneven experts on two": Case((4, 6), 3),
    "uneven experts on four": Case((5, 3, 9, 1), 5),  # 2, 2, 1 and none
    "a rank without tokens": Case((5, 0, 9, 1), 6, 3),
    "no tokens at all": Case((0, 0, 0, 0), 6),
    "everything to one expert": Case((5, 3, 9, 2), 8, 1, only=3),
    "fewer experts than ranks": Case((4, 3, 2, 5), 2, 1),
}


class Layer(NamedTuple):
    """All ranks' tokens, one after another, and all experts' matrices."""

    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    matrices_EDD: Tensor
    dy_TD: Tensor


def layer(case: Case) -> Layer:
    generator = torch.Generator().manual_seed(3)
    T, K, E = sum(case.tokens), case.top_k, case.num_experts

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    experts_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K]
    if case.only is not None:
        experts_TK = torch.full((T, K), case.only)
    weights_TK = torch.rand(T, K, generator=generator, dtype=torch.float64)
    x_TD, dy_TD = numbers(T, WIDTH), numbers(T, WIDTH)
    return Layer(x_TD, experts_TK, weights_TK, numbers(E, WIDTH, WIDTH), dy_TD)


def seen_on_this_rank(case: Case, group: dist.ProcessGroup) -> dict[str, Any]:
    """Outputs, gradients, and what came to this rank's experts."""
    rank, whole = group.rank(), layer(case)
    at = sum(case.tokens[:rank]), sum(case.tokens[: rank + 1])
    x_TD, weights_TK = (
        part[at[0] : at[1]].clone().requires_grad_() for part in (whole.x_TD, whole.weights_TK)
    )
    span = chunk(case.num_experts, len(case.tokens), rank)
    own_EDD = distributed.rows_of(whole.matrices_EDD, span).clone().requires_grad_()
    came: dict[str, Any] = {}

    def compute(rows_RD: Tensor, alone: Routing) -> Tensor:
        came["rows"], came["local"] = rows_RD.tolist(), alone.experts_TK.flatten().tolist()
        came["ones"] = bool((alone.weights_TK == 1).all()) and alone.weights_TK.shape[1] == 1
        if not span.count:
            return rows_RD
        return (rows_RD.unsqueeze(1) @ own_EDD[alone.experts_TK.flatten()]).squeeze(1).tanh()

    routing = Routing(weights_TK, whole.experts_TK[at[0] : at[1]], weights_TK)
    y_TD = exchange.forward(x_TD, routing, Exchange(group, case.num_experts), compute)
    y_TD.backward(whole.dy_TD[at[0] : at[1]])
    grads = [x_TD.grad, weights_TK.grad]
    grads.append(own_EDD.grad if own_EDD.grad is not None else torch.zeros_like(own_EDD))
    names = ("x", "weights", "matrices")
    numbers = {n: g.numpy() for n, g in zip(names, grads, strict=True) if g is not None}
    return came | numbers | {"y": y_TD.detach().numpy()}


def bf16_comes_home(group: dist.ProcessGroup) -> bool:
    """Weighed in fp32, rounded once a choice, and summed as in one process."""
    generator = torch.Generator().manual_seed(group.rank())
    x_TD = torch.randn(7, 8, generator=generator).bfloat16()
    weights_TK = torch.rand(7, 3, generator=generator)
    experts_TK = torch.rand(7, 6, generator=generator).argsort(-1)[:, :3]
    routing = Routing(weights_TK, experts_TK, weights_TK)
    y_TD = exchange.forward(x_TD, routing, Exchange(group, 6), lambda rows, _: rows)
    weighed = [(x_TD.float() * weights_TK[:, k, None]).bfloat16() for k in range(3)]
    expected = torch.stack(weighed, 1).float().sum(1)
    return y_TD.dtype == torch.bfloat16 and bool((y_TD == expected.bfloat16()).all())


def every_case() -> tuple[dict[str, Any], bool]:
    """On four ranks, of which the first two and the last two are groups too."""
    dist.init_process_group("gloo")
    try:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        pair, world = pairs[dist.get_rank() // 2], dist.group.WORLD
        assert pair is not None and world is not None
        found = {
            name: seen_on_this_rank(case, pair if len(case.tokens) == 2 else world)
            for name, case in CASES.items()
        }
        return found, bf16_comes_home(world)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> list[tuple[dict[str, Any], bool]]:
    return distributed.run(every_case, 4)


def of_case(ranks: list[tuple[dict[str, Any], bool]], name: str) -> list[dict[str, Any]]:
    return [found[name] for found, _ in ranks][: len(CASES[name].tokens)]


def in_one_process(case: Case) -> dict[str, np.ndarray]:
    """Token by token, choice by choice."""
    whole = layer(case)
    x_TD, weights_TK, matrices_EDD = (
        p.clone().requires_grad_() for p in (whole.x_TD, whole.weights_TK, whole.matrices_EDD)
    )
    y_TD = torch.zeros_like(x_TD)
    for t in range(len(x_TD)):
        for k, e in enumerate(whole.experts_TK[t].tolist()):
            y_TD[t] = y_TD[t] + weights_TK[t, k] * (x_TD[t] @ matrices_EDD[e]).tanh()
    (y_TD * whole.dy_TD + 0 * x_TD).sum().backward()
    grads = {"x": x_TD.grad, "weights": weights_TK.grad, "matrices": matrices_EDD.grad}
    zeros = {"x": x_TD, "weights": weights_TK, "matrices": matrices_EDD}
    found = {n: torch.zeros_like(zeros[n]) if g is None else g for n, g in grads.items()}
    return {"y": y_TD.detach().numpy()} | {n: g.detach().numpy() for n, g in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_one_process(ranks: Any, name: str) -> None:
    """A rank's own tokens' and experts' alone, in float64; the rest has not left it."""
    found, expected = of_case(ranks, name), in_one_process(CASES[name])
    for each in ("y", "x", "weights", "matrices"):
        together = np.concatenate([rank[each] for rank in found])
        np.testing.assert_allclose(together, expected[each], rtol=0, atol=1e-12, err_msg=each)


@pytest.mark.parametrize("name", CASES)
def test_rows_arrive_at_their_experts_by_sender_then_expert_then_token(
    ranks: Any, name: str
) -> None:
    case = CASES[name]
    whole, size = layer(case), len(case.tokens)
    for rank, came in enumerate(of_case(ranks, name)):
        span = chunk(case.num_experts, size, rank)
        rows, local, begin = [], [], 0
        for tokens in case.tokens:
            for e in range(span.first, span.first + span.count):
                for t in range(begin, begin + tokens):
                    times = whole.experts_TK[t].tolist().count(e)
                    rows += [whole.x_TD[t].tolist()] * times
                    local += [e - span.first] * times
            begin += tokens
        assert came["rows"] == rows and came["local"] == local and came["ones"]


def test_both_pairs_see_the_same(ranks: Any) -> None:
    for name in ("two ranks", "uneven experts on two"):
        for here, there in ((0, 2), (1, 3)):
            assert ranks[here][0][name]["rows"] == ranks[there][0][name]["rows"]


def test_results_are_weighed_where_the_tokens_came_from(ranks: Any) -> None:
    assert all(fine for _, fine in ranks)


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_tokens_come_home_in_order_whatever_they_chose(alone: dist.ProcessGroup) -> None:
    @settings(deadline=None, max_examples=30)
    @given(
        T=st.integers(0, 12), E=st.integers(1, 5), K=st.integers(1, 4), seed=st.integers(0, 99)
    )
    def check(T: int, E: int, K: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x_TD = torch.randn(T, 2, generator=generator, dtype=torch.float64)
        experts_TK = torch.randint(E, (T, K), generator=generator)  # one may come twice
        weights_TK = torch.rand(T, K, generator=generator, dtype=torch.float64)
        seen: list[int] = []

        def compute(rows_RD: Tensor, routing: Routing) -> Tensor:
            seen.extend(routing.experts_TK.flatten().tolist())
            return rows_RD * (1 + routing.experts_TK)

        routing = Routing(weights_TK, experts_TK, weights_TK)
        y_TD = exchange.forward(x_TD, routing, Exchange(alone, E), compute)
        factors_T = (weights_TK * (1 + experts_TK)).sum(1)
        torch.testing.assert_close(y_TD, x_TD * factors_T[:, None])
        assert seen == sorted(experts_TK.flatten().tolist())

    check()


@pytest.mark.parametrize(("shard", "rows"), [(2, 12), (4, 12), (3, 10), (4, 2)])
def test_a_rehearsal_takes_equal_loads(shard: int, rows: int) -> None:
    """As many rows come as go, whatever was chosen, to every expert about as many."""
    parallel, local = ParallelConfig(shard=shard, experts=shard), []
    with trace.pretended(parallel) as layout:
        group = layout.expert.get_group("experts")
        ones_T1 = torch.ones(rows, 1)

        def compute(rows_RD: Tensor, routing: Routing) -> Tensor:
            local.extend(routing.experts_TK.flatten().tolist())
            return rows_RD

        routing = Routing(ones_T1, torch.zeros(rows, 1, dtype=torch.int64), ones_T1)
        y_TD = exchange.forward(
            torch.zeros(rows, WIDTH), routing, Exchange(group, 8, even=True), compute
        )
    most = chunk(8, shard, 0).count
    assert y_TD.shape == (rows, WIDTH) and len(local) == rows
    counts = np.bincount(local, minlength=most)
    assert len(counts) == most and counts.max() - counts.min() <= 1
