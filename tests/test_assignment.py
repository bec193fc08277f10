"""Balancers that assign, against plain loops over sorted lists, and their properties."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from trinity_lib import assignment, balance, balancers
from trinity_lib.balance import BalanceConfig


class Routed(NamedTuple):
    scores_TE: Tensor
    experts_TK: Tensor


def build(method: str, num_experts: int, top_k: int, **settings: float) -> balance.Balancer:
    config = BalanceConfig(method=method, sequence_loss=0.0, **settings)
    return balancers.build(
        config, num_layers=1, num_experts=num_experts, top_k=top_k, vocab_size=50, seed=3
    )


def skewed(seed: int, tokens: int, num_experts: int, score: str = "sigmoid") -> Tensor:
    """Scores in which some experts are better for every token."""
    skew = torch.randn(num_experts, generator=torch.Generator().manual_seed(99)) * 0.5
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_experts, generator=generator) * 0.5 + skew
    return logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)


def begin(balancer: balance.Balancer, documents: Tensor) -> Tensor | None:
    return balancer.begin(torch.zeros_like(documents), documents)


def max_vio(experts: Tensor, num_experts: int) -> float:
    counts = torch.bincount(experts[experts >= 0], minlength=num_experts).double()
    return float(counts.max() / counts.mean() - 1)


SHAPES = st.tuples(st.integers(1, 40), st.integers(2, 9), st.integers(1, 4), st.integers(0, 99))


@hypothesis_settings(deadline=None)
@given(SHAPES)
def test_a_quantile_bias_leaves_the_even_number_of_margins_above(
    shape: tuple[int, int, int, int],
) -> None:
    """Minus the cut lies between the q-th and (q+1)-th largest margin, up to a bin."""
    tokens, num_experts, top_k, seed = shape
    top_k = min(top_k, num_experts - 1)
    scores = skewed(seed, tokens, num_experts)
    before = torch.linspace(-0.2, 0.2, num_experts)
    cuts = []
    for i in range(num_experts):
        margins = []
        for t in range(tokens):
            row = (scores[t] + before).tolist()
            margins.append(float(scores[t, i]) - sorted(row, reverse=True)[top_k])
        cuts.append(sorted(margins, reverse=True))
    counts = assignment.margin_counts(scores, before, top_k)
    assert counts.sum(-1).tolist() == [tokens] * num_experts
    bias = assignment.quantile_bias(counts.unsqueeze(0), top_k)[0]
    assert abs(float(bias.sum())) < 1e-9
    wanted = tokens * top_k / num_experts
    first = [-margins[max(0, math.ceil(wanted) - 1)] for margins in cuts]  # the q-th largest
    second = [-margins[math.floor(wanted)] for margins in cuts]  # the (q+1)-th
    for i, j in itertools.permutations(range(num_experts), 2):  # the mean is common to all
        assert float(bias[i] - bias[j]) <= second[i] - first[j] + 0.04


def test_a_quantile_bias_of_given_counts() -> None:
    """Two experts, top-1, eight tokens: the cut is where four margins are above."""
    width = math.asinh(assignment.REACH / assignment.FINE) * 2 / assignment.BINS
    counts = torch.zeros(1, 2, assignment.BINS, dtype=torch.int64)
    middle = assignment.BINS // 2
    counts[0, 0, middle], counts[0, 0, 0] = 4, 4
    counts[0, 1, middle + 100], counts[0, 1, 5] = 6, 2
    low, high = (assignment.FINE * math.sinh(width * n) for n in (100, 101))
    cuts = [0.0, low + (6 - 4) / 6 * (high - low)]
    mean = sum(cuts) / 2
    bias = assignment.quantile_bias(counts, 1)[0]
    assert bias.tolist() == pytest.approx([mean - c for c in cuts], abs=1e-12)


def test_margins_beyond_the_range_fall_into_the_end_bins() -> None:
    scores = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))
    counts = assignment.margin_counts(scores, torch.tensor([9.0, 9.0, -9.0]), 1)
    assert counts[:, 0].tolist() == [7, 7, 7]
    counts = assignment.margin_counts(scores, torch.full((3,), -9.0), 1)
    assert counts[:, -1].tolist() == [7, 7, 7]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("method", ["quantile", "bip", "sinkhorn", "expert_choice"])
def test_skewed_scores_are_balanced(method: str, score: str) -> None:
    """Well below what plain top-k does to the same scores, whichever makes the scores."""
    num_experts, top_k, tokens = 64, 4, 1024
    balancer = build(method, num_experts, top_k)
    documents = torch.zeros(4, tokens // 4, dtype=torch.long)
    valid = documents.flatten() >= 0
    for seed in range(8):
        scores = skewed(seed, tokens, num_experts, score)
        begin(balancer, documents)
        ranked = balancer.select(scores, 0)
        experts = ranked.topk(top_k).indices if ranked.is_floating_point() else ranked
        balancer.update(balancer.observe([Routed(scores, experts)], valid))
    plain = scores.topk(top_k).indices
    assert max_vio(experts, num_experts) < 0.1 * max_vio(plain, num_experts)
    if method in ("quantile", "bip"):  # inference goes by the bias
        biased = (scores + balancer.bias_LE[0]).topk(top_k).indices
        assert max_vio(biased, num_experts) < 0.1 * max_vio(plain, num_experts)
    else:
        assert not balancer.bias_LE.any()


@hypothesis_settings(deadline=None)
@given(SHAPES)
def test_bip_against_plain_loops(shape: tuple[int, int, int, int]) -> None:
    tokens, num_experts, top_k, seed = shape
    top_k = min(top_k, num_experts - 1)
    scores = skewed(seed, tokens, num_experts).double()
    start = torch.linspace(0, 0.3, num_experts, dtype=torch.float64)
    rows, q = scores.tolist(), start.tolist()
    for _ in range(3):
        paid = [
            sorted((s - c for s, c in zip(row, q, strict=True)), reverse=True) for row in rows
        ]
        p = [max(0.0, values[top_k]) for values in paid]
        places = top_k * tokens // num_experts
        for i in range(num_experts):
            column = sorted((rows[t][i] - p[t] for t in range(tokens)), reverse=True)
            q[i] = max(0.0, column[places])
    prices = assignment.bip_prices(scores, start, top_k, 3)
    assert prices.tolist() == pytest.approx(q, abs=1e-12)


def test_bip_keeps_the_mean_price_by_tokens() -> None:
    balancer = build("bip", 8, 2, iterations=3)
    documents = torch.zeros(1, 12, dtype=torch.long)
    documents[0, 8:] = -1
    total = 0
    parts = [(skewed(0, 12, 8), documents), (skewed(1, 12, 8), torch.zeros_like(documents))]
    for scores, documents_BS in parts:
        begin(balancer, documents_BS)
        routed = Routed(scores, balancer.select(scores, 0).topk(2).indices)
        total = total + balancer.observe([routed], documents_BS.flatten() >= 0)
    balancer.update(total)
    first = assignment.bip_prices(parts[0][0][:8], torch.zeros(8), 2, 3)
    second = assignment.bip_prices(parts[1][0], torch.zeros(8), 2, 3)
    assert torch.allclose(balancer.bias_LE[0], -(8 * first + 12 * second) / 20)
    begin(balancer, documents)
    third = skewed(2, 12, 8)  # begins with the prices kept
    prices = assignment.bip_prices(third[:8], -balancer.bias_LE[0], 2, 3)
    assert torch.allclose(balancer.select(third, 0), third - prices)


def test_sinkhorn_against_plain_loops() -> None:
    scores = skewed(0, 10, 4).double()
    plan = [[s / (1 - s) for s in row] for row in scores.tolist()]
    for _ in range(5):
        for i in range(4):
            column = sum(row[i] for row in plan)
            for row in plan:
                row[i] *= 2 * 10 / 4 / column
        plan = [[2 * x / sum(row) for x in row] for row in plan]
    result = assignment.sinkhorn_plan(scores, 2, 5)
    assert torch.allclose(result, torch.tensor(plan, dtype=torch.float64))
    settled = assignment.sinkhorn_plan(scores, 2, 200)
    assert settled.sum(-1).tolist() == pytest.approx([2.0] * 10)
    assert settled.sum(0).tolist() == pytest.approx([5.0] * 4)
    extreme = assignment.sinkhorn_plan(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), 1, 9)
    assert extreme.isfinite().all()


@hypothesis_settings(deadline=None)
@given(SHAPES)
def test_expert_choice_against_plain_loops(shape: tuple[int, int, int, int]) -> None:
    tokens, num_experts, top_k, seed = shape
    top_k = min(top_k, num_experts)
    scores = skewed(seed, tokens, num_experts)
    taken: list[list[int]] = [[] for _ in range(tokens)]
    places = math.ceil(top_k * tokens / num_experts)
    for i in range(num_experts):
        order = sorted(range(tokens), key=lambda t: -float(scores[t, i]))
        for t in order[:places]:
            taken[t].append(i)
    experts = assignment.expert_choice(scores, top_k)
    assert experts.shape[1] == max(map(len, taken)) and experts.dtype == torch.int64
    for t, own in enumerate(taken):
        best_first = sorted(own, key=lambda i: -float(scores[t, i]))
        padding = [-1] * (experts.shape[1] - len(own))
        assert experts[t].tolist() == best_first + padding
    routed = Routed(scores, experts)
    load = balance.load([routed], torch.ones(tokens, dtype=torch.bool))
    assert load.tolist() == [[places] * num_experts]


@pytest.mark.parametrize("method", ["quantile", "bip", "sinkhorn", "expert_choice"])
def test_padding_takes_nobodys_place(method: str) -> None:
    """What padding scores changes neither choices nor bias; without padding it is the same."""
    documents = torch.zeros(4, 8, dtype=torch.long)
    documents[:, 5:] = -1
    valid = documents.flatten() >= 0
    scores = skewed(0, 32, 8)
    other = torch.where(valid.unsqueeze(-1), scores, torch.linspace(1, 0, 8))
    results = []
    for values, mask in ((scores, documents), (other, documents), (scores[valid], None)):
        balancer = build(method, 8, 2)
        documents_BS = torch.zeros(4, 5, dtype=torch.long) if mask is None else mask
        begin(balancer, documents_BS)
        ranked = balancer.select(values, 0)
        if method == "expert_choice" and mask is not None:
            assert (ranked[~valid] == -1).all()
        experts = ranked.topk(2).indices if ranked.is_floating_point() else ranked
        balancer.update(
            balancer.observe([Routed(values, experts)], documents_BS.flatten() >= 0)
        )
        results.append((experts if mask is None else experts[valid], balancer.bias_LE))
    for experts, bias in results[1:]:
        assert torch.equal(experts, results[0][0]) and torch.equal(bias, results[0][1])


@pytest.mark.parametrize("method", ["quantile", "bip", "sinkhorn", "expert_choice"])
def test_a_micro_batch_of_padding_changes_nothing(method: str) -> None:
    balancer = build(method, 8, 2)
    came = balancer.bias_LE = torch.linspace(-0.2, 0.2, 8).view(1, 8)
    documents = torch.full((2, 8), -1)
    scores = skewed(0, 16, 8)
    begin(balancer, documents)
    ranked = balancer.select(scores, 0)
    assert len(ranked) == 16 and ranked.isfinite().all()
    experts = ranked.topk(2).indices if ranked.is_floating_point() else ranked
    balancer.update(balancer.observe([Routed(scores, experts)], documents.flatten() >= 0))
    assert torch.equal(balancer.bias_LE, came)


def test_dropout_drops_its_share_and_keeps_the_order_of_the_rest() -> None:
    balancer = build("dropout", 16, 2, rate=0.25)
    documents = torch.zeros(8, 50, dtype=torch.long)
    scores = skewed(0, 400, 16)
    begin(balancer, documents)
    ranked = balancer.select(scores, 0)
    dropped = ranked < -50
    assert abs(float(dropped.float().mean()) - 0.25) < 0.02
    assert torch.equal(ranked[~dropped], scores[~dropped])
    assert torch.allclose(ranked[dropped], scores[dropped] - 100, atol=1e-5)
    chosen = ranked.topk(2).indices
    assert not dropped.gather(1, chosen).any(), "two of sixteen were left everywhere"


def test_dropout_draws_from_nothing_but_its_seed_and_counts() -> None:
    documents = torch.zeros(1, 20, dtype=torch.long)
    scores = skewed(0, 20, 16)
    one, two = build("dropout", 16, 2, rate=0.5), build("dropout", 16, 2, rate=0.5)
    begin(one, documents)
    first = one.select(scores, 0)
    torch.rand(3)
    before = torch.get_rng_state()
    begin(two, documents)
    assert torch.equal(two.select(scores, 0), first)
    assert torch.equal(torch.get_rng_state(), before)
    begin(two, documents)
    assert not torch.equal(two.select(scores, 0), first)
    two.bias_LE = torch.zeros(2, 16)
    assert not torch.equal(two.select(scores, 0), two.select(scores, 1))
    none = build("dropout", 16, 2, rate=0.0)
    assert torch.equal(none.select(scores, 0), scores)


def test_a_token_whose_experts_are_all_dropped_still_gets_its_number() -> None:
    balancer = build("dropout", 8, 3, rate=0.99)
    scores = skewed(0, 200, 8)
    ranked = balancer.select(scores, 0)
    assert ranked.isfinite().all()
    experts = ranked.topk(3).indices
    assert all(len(set(row)) == 3 for row in experts.tolist())
    lost = (ranked < -50).all(-1)
    assert lost.any()
    assert torch.equal(experts[lost], scores[lost].topk(3).indices)


def test_hash_goes_by_token_ids_alone() -> None:
    config = BalanceConfig(method="hash")
    sizes = {"num_layers": 3, "num_experts": 16, "top_k": 4, "vocab_size": 50}
    balancer = balancers.build(config, **sizes, seed=1)
    tokens = torch.tensor([[7, 8, 7], [49, 0, 8]])
    documents = torch.tensor([[0, 0, 1], [0, -1, -1]])
    choices = balancer.begin(tokens, documents)
    assert choices.shape == (3, 6, 4) and choices.dtype == torch.int64
    assert torch.equal(choices, balancer.fixed(tokens))
    assert torch.equal(choices[:, 0], choices[:, 2]) and torch.equal(
        choices[:, 1], choices[:, 5]
    )
    assert not torch.equal(choices[0], choices[1])
    every = balancer.fixed(torch.arange(50))
    assert all(len(set(row)) == 4 for row in every.flatten(0, 1).tolist())
    assert every.min() >= 0 and every.max() == 15
    assert max_vio(every[0], 16) < 1.0
    assert torch.equal(balancers.build(config, **sizes, seed=1).fixed(tokens), choices)
    assert not torch.equal(balancers.build(config, **sizes, seed=2).fixed(tokens), choices)
