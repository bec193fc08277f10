"""Balancers against the published vector, plain loops and their own properties."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from trinity_lib import balance, balancers
from trinity_lib.balance import BalanceConfig

CONSTANTS = {"lam": 5e-4, "beta": 0.5, "kappa": 2.0}


class Routed(NamedTuple):
    scores_TE: Tensor
    experts_TK: Tensor


def build(config: BalanceConfig, num_layers: int, num_experts: int) -> balance.Balancer:
    return balancers.build(
        config, num_layers=num_layers, num_experts=num_experts, top_k=2, vocab_size=9, seed=0
    )


def by_hand(loads: list[float], steps: int) -> tuple[list[float], list[float]]:
    """SMEBU in scalar arithmetic, from equations 23-28."""
    count, mean = len(loads), sum(loads) / len(loads)
    bias, momentum = [0.0] * count, [0.0] * count
    for _ in range(steps):
        step = [5e-4 * math.tanh(2 * (mean - n) / mean) for n in loads]
        centre = sum(step) / count
        momentum = [0.5 * m + 0.5 * (d - centre) for m, d in zip(momentum, step, strict=True)]
        bias = [b + m for b, m in zip(bias, momentum, strict=True)]
    return bias, momentum


def test_smebu_reproduces_the_published_vector() -> None:
    load = torch.tensor([[4, 3, 1, 8]])
    bias = momentum = torch.zeros(1, 4, dtype=torch.float64)
    printed = [
        [-2.52024e-5, 9.03269e-5, 2.01085e-4, -2.66209e-4],
        [-6.30059e-5, 2.25817e-4, 5.02712e-4, -6.65523e-4],
    ]
    for steps, digits in enumerate(printed, 1):
        bias, momentum = balance.smebu(bias, momentum, load, **CONSTANTS)
        expected_bias, expected_momentum = by_hand([4, 3, 1, 8], steps)
        assert bias[0].tolist() == pytest.approx(expected_bias, abs=1e-12)
        assert momentum[0].tolist() == pytest.approx(expected_momentum, abs=1e-12)
        assert bias[0].tolist() == pytest.approx(digits, abs=1e-9)


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=64), st.integers(1, 5))
def test_smebu_steps_are_bounded_and_centred(loads: list[int], steps: int) -> None:
    load = torch.tensor([loads])
    bias = momentum = torch.zeros(1, len(loads), dtype=torch.float64)
    for _ in range(steps):
        before = bias
        bias, momentum = balance.smebu(bias, momentum, load, **CONSTANTS)
        assert (bias - before).abs().max() <= 2 * 5e-4
        assert abs(float(bias.sum())) < 1e-12
        assert bias.isfinite().all()
    if len(set(loads)) > 1:
        assert bias[0, loads.index(max(loads))] < bias[0, loads.index(min(loads))]


def test_smebu_is_pure_and_does_not_depend_on_the_batch() -> None:
    bias, momentum = torch.rand(2, 8), torch.rand(2, 8)
    copies = bias.clone(), momentum.clone()
    load = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    once = balance.smebu(bias, momentum, load, **CONSTANTS)
    scaled = balance.smebu(bias, momentum, 1024 * load, **CONSTANTS)
    assert torch.equal(bias, copies[0]) and torch.equal(momentum, copies[1])
    assert torch.allclose(once[0], scaled[0]) and once[0].dtype == torch.float32


def test_a_layer_without_tokens_keeps_its_direction() -> None:
    momentum = torch.tensor([[0.2, -0.2]])
    bias, after = balance.smebu(torch.zeros(1, 2), momentum, torch.zeros(1, 2), **CONSTANTS)
    assert torch.equal(after, 0.5 * momentum) and torch.equal(bias, after)


def test_sign_updates_are_centred() -> None:
    bias = balance.sign(torch.zeros(1, 4, dtype=torch.float64), torch.tensor([[4, 3, 1, 8]]),
                        gamma=1e-3)  # fmt: skip
    expected = torch.tensor([[-2.5e-4, 7.5e-4, 7.5e-4, -1.25e-3]], dtype=torch.float64)
    assert torch.allclose(bias, expected, atol=1e-15)


def test_sequence_loss_against_plain_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    B, S, E, K = 3, 7, 6, 2
    scores = torch.rand(B * S, E, generator=generator, dtype=torch.float64)
    experts = (scores + torch.rand(E, generator=generator)).topk(K).indices
    documents = torch.randint(0, 3, (B, S), generator=generator)
    documents[0, 5:] = -1
    total = 0.0
    for b in range(B):
        tokens = [b * S + s for s in range(S) if documents[b, s] >= 0]
        for i in range(E):
            f = E / (K * len(tokens)) * sum(int(i in experts[t]) for t in tokens)
            p = sum(float(scores[t, i] / scores[t].sum()) for t in tokens) / len(tokens)
            total += f * p
    assert float(balance.sequence_loss(Routed(scores, experts), documents)) == pytest.approx(
        total
    )


def test_sequence_loss_is_one_a_row_when_even_and_has_a_gradient() -> None:
    scores = torch.full((8, 4), 0.5, requires_grad=True)
    experts = torch.tensor([[0, 1], [2, 3]] * 4)
    documents = torch.zeros(2, 4, dtype=torch.long)
    loss = balance.sequence_loss(Routed(scores, experts), documents)
    assert float(loss.detach()) == pytest.approx(2.0)
    skewed = torch.tensor([[0, 1]] * 8)
    balance.sequence_loss(Routed(scores, skewed), documents).backward()
    assert (scores.grad[:, :2] > 0).all() and (scores.grad[:, 2:] < 0).all()


def test_loads_count_valid_tokens_once_per_choice() -> None:
    routing = [Routed(torch.rand(4, 5), torch.tensor([[0, 1], [1, 2], [4, 1], [3, 0]]))] * 2
    valid = torch.tensor([True, True, True, False])
    assert balance.load(routing, valid).tolist() == [[1, 3, 1, 0, 1]] * 2


def test_no_expert_is_counted_nowhere_and_changes_no_fraction() -> None:
    scores = torch.rand(4, 5)
    ragged = Routed(scores, torch.tensor([[0, 1, -1], [-1, -1, -1], [4, 1, 3], [3, 0, -1]]))
    valid = torch.tensor([True, True, True, False])
    assert balance.load([ragged], valid).tolist() == [[1, 2, 0, 1, 1]]
    assert balance.load([ragged], ~valid).tolist() == [[1, 0, 0, 1, 0]]
    assert balance.chosen(ragged).tolist() == [
        [1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 1, 0, 1, 1],
        [1, 0, 0, 1, 0],
    ]
    documents = torch.tensor([[0, 0, 0, -1]])
    share = (scores / scores.sum(-1, keepdim=True))[:3].mean(0)
    expected = float((torch.tensor([1.0, 2, 0, 1, 1]) * share).sum())
    assert float(balance.sequence_loss(ragged, documents)) == pytest.approx(expected)


@pytest.mark.parametrize("method", ["loss_free", "proportional"])
def test_uncentred_rules_against_plain_loops(method: str) -> None:
    rows = [[4, 3, 1, 8], [0, 0, 0, 0], [5, 5, 5, 5]]
    balancer = build(BalanceConfig(method=method, rate=0.5), 3, 4)
    for steps in (1, 2):
        balancer.update(torch.tensor(rows))
        for n, bias in zip(rows, balancer.bias_LE.tolist(), strict=True):
            mean = sum(n) / 4
            if method == "loss_free":
                step = [0.5 * ((mean > x) - (mean < x)) for x in n]
            else:
                step = [0.5 * (mean - x) / mean if mean else 0.0 for x in n]
            assert bias == pytest.approx([steps * d for d in step])
    assert not balancer.momentum_LE.any()


def test_smebu_without_centring_keeps_the_mean_step() -> None:
    config = BalanceConfig(method="smebu", rate=0.1, beta=0.5, kappa=2.0, centre=False)
    balancer = build(config, 1, 4)
    balancer.update(torch.tensor([[0, 0, 0, 8]]))
    step = [0.05 * math.tanh(2)] * 3 + [0.05 * math.tanh(-6)]
    assert balancer.bias_LE[0].tolist() == pytest.approx(step)
    assert abs(float(balancer.bias_LE.mean())) > 0.01


def test_none_never_moves_and_has_no_loss() -> None:
    none = build(BalanceConfig(method="none"), 2, 4)
    scores = torch.rand(3, 4)
    assert torch.equal(none.select(scores, 0), scores)
    none.bias_LE = torch.arange(8.0).view(2, 4)  # came with a checkpoint's weights
    assert torch.equal(none.select(scores, 1), scores + torch.arange(4.0, 8.0))
    none.bias_LE = torch.zeros(2, 4)
    none.update(torch.tensor([[9, 0, 0, 0]] * 2))
    assert not none.bias_LE.any()
    assert none.loss([], torch.zeros(1, 3, dtype=torch.long)) is None


@pytest.mark.parametrize("method", ["sign", "smebu", "loss_free", "proportional"])
def test_a_fixed_router_is_brought_to_balance(method: str) -> None:
    """Skewed scores, no learning: the bias alone must even the loads out."""
    balancer = build(BalanceConfig(method=method, rate=5e-3), 1, 8)
    generator = torch.Generator().manual_seed(0)
    skew = torch.linspace(0, 0.5, 8)
    for _ in range(300):
        scores = (torch.rand(512, 8, generator=generator) * 0.5 + skew).clamp(0, 1)
        experts = balancer.select(scores, 0).topk(2).indices
        load = balancer.observe([Routed(scores, experts)], torch.ones(512, dtype=torch.bool))
        balancer.update(load)
    assert load.max() / load.float().mean() < 1.35
    assert balancer.bias_LE[0, 0] > balancer.bias_LE[0, -1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "sing"}, "method is 'sing'; it must be one of none, switch, sequence, "),
        ({"rate": -1}, "balance.rate is -1.0"),
        ({"beta": 1.0}, "balance.beta is 1.0"),
        ({"kappa": 0}, "balance.kappa is 0.0"),
        ({"centre": 2}, "centre is 2; it must be true or false"),
        ({"iterations": 0}, "balance.iterations is 0; it must be from 1 to 1000"),
        ({"share": 0}, "balance.share is 0.0; it must be above 0, at most 1"),
        ({"share": 1.5}, "balance.share is 1.5"),
        ({"sequence_loss": -1}, "balance.sequence_loss is -1.0; it must be 0 or more"),
        (
            {"method": "dropout", "rate": 1},
            "balance.rate is 1.0; it must be below 1 where the method is dropout",
        ),
    ],
)
def test_bad_settings(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BalanceConfig(**changes)


def test_a_layer_without_tokens_leaves_the_others_alone() -> None:
    load = torch.tensor([[0, 0, 0, 0], [4, 3, 1, 8]])
    zero = torch.zeros(2, 4, dtype=torch.float64)
    bias, momentum = balance.smebu(zero, zero, load, **CONSTANTS)
    assert not bias[0].any() and not momentum[0].any()
    assert bias[1].tolist() == pytest.approx(by_hand([4, 3, 1, 8], 1)[0], abs=1e-12)
    signed = balance.sign(zero, load, gamma=1e-3)
    assert not signed[0].any() and signed[1, 3] < 0


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=64), st.data())
def test_sign_steps_are_bounded_and_the_bias_stays_centred(
    loads: list[int], data: st.DataObject
) -> None:
    bias = torch.zeros(1, len(loads), dtype=torch.float64)
    for _ in range(3):
        before, n = bias, data.draw(st.permutations(loads))
        bias = balance.sign(bias, torch.tensor([n]), gamma=1e-3)
        mean = sum(n) / len(n)
        raw = [1e-3 * ((mean > x) - (mean < x)) for x in n]
        step = [r - sum(raw) / len(raw) for r in raw]
        assert (bias - before)[0].tolist() == pytest.approx(step, abs=1e-12)
        assert abs(float(bias.sum())) < 1e-12


def test_a_long_fp32_run_does_not_drift() -> None:
    balancer = build(BalanceConfig(method="smebu"), 2, 16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        balancer.update(torch.randint(0, 1000, (2, 16), generator=generator))
    assert balancer.bias_LE.dtype == torch.float32 and balancer.bias_LE.abs().max() > 1e-3
    assert balancer.bias_LE.sum(-1).abs().max() < 1e-5


def test_a_balancer_is_its_function_with_the_configured_constants() -> None:
    config = BalanceConfig(method="smebu", rate=0.02, beta=0.25, kappa=3.0)
    balancer = build(config, 2, 4)
    load = torch.tensor([[4, 3, 1, 8], [2, 2, 6, 6]])
    bias = momentum = torch.zeros(2, 4)
    for _ in range(2):
        balancer.update(load)
        bias, momentum = balance.smebu(bias, momentum, load, lam=0.02, beta=0.25, kappa=3.0)
    assert torch.equal(balancer.bias_LE, bias) and torch.equal(balancer.momentum_LE, momentum)
    scores = torch.rand(3, 4)
    for layer in range(2):
        assert torch.equal(balancer.select(scores, layer), scores + bias[layer])
    signed = build(BalanceConfig(method="sign", rate=0.02), 2, 4)
    signed.update(load)
    assert torch.equal(signed.bias_LE, balance.sign(torch.zeros(2, 4), load, gamma=0.02))
    assert not signed.momentum_LE.any()


def test_no_gradient_flows_through_the_fraction() -> None:
    """The gradient is f times that of P alone, row by row; padding has none."""
    generator = torch.Generator().manual_seed(2)
    B, S, E, K = 2, 5, 6, 2
    scores = torch.rand(B * S, E, generator=generator, dtype=torch.float64, requires_grad=True)
    experts = scores.detach().topk(K).indices
    documents = torch.zeros(B, S, dtype=torch.long)
    documents[1, 3:] = -1
    balance.sequence_loss(Routed(scores, experts), documents).backward()
    for b, length in enumerate((5, 3)):
        rows = range(b * S, b * S + length)
        f = [
            E / (K * length) * sum(int(i in experts[t].tolist()) for t in rows)
            for i in range(E)
        ]
        for t in range(b * S, (b + 1) * S):
            s = scores[t].tolist()
            total = sum(s)
            inner = sum(fi * si for fi, si in zip(f, s, strict=True))
            expected = [(fi * total - inner) / total**2 / length for fi in f]
            if t not in rows:
                expected = [0.0] * E
            assert scores.grad[t].tolist() == pytest.approx(expected, abs=1e-12)


def test_the_loss_is_alpha_times_the_sum_over_layers_and_padding_rows_add_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    layers = []
    for _ in range(3):
        scores = torch.rand(8, 5, generator=generator)
        layers.append(Routed(scores, scores.topk(2).indices))
    documents = torch.tensor([[0, 0, 1, 1], [-1, -1, -1, -1]])
    balancer = build(BalanceConfig(sequence_loss=0.25), 3, 5)
    first = [balance.sequence_loss(Routed(s[:4], e[:4]), documents[:1]) for s, e in layers]
    assert float(balancer.loss(layers, documents)) == pytest.approx(0.25 * float(sum(first)))
    silent = build(BalanceConfig(sequence_loss=0), 3, 5)
    assert silent.loss(layers, documents) is None
