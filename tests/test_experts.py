"""Dropless experts against a loop over tokens, outputs and all three kinds of gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_lib import experts as module
from trinity_lib.experts import Experts, backend_info
from trinity_lib.routing import Routing


def by_loop(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Token by token, choice by choice."""
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for k in range(routing.experts_TK.shape[1]):
            e = int(routing.experts_TK[t, k])
            inner = F.silu(experts.gate_EFD[e] @ x[t]) * (experts.up_EFD[e] @ x[t])
            row = row + routing.weights_TK[t, k] * (inner @ experts.down_EFD[e])
        rows.append(row)
    return torch.stack(rows)


def case(T: int, E: int, K: int, D: int, hidden: int, dtype: torch.dtype, chosen: str) -> tuple:
    generator = torch.Generator().manual_seed(T + E + K + D)
    experts = Experts(E, D, hidden).to(dtype)
    for p in experts.parameters():
        torch.nn.init.normal_(p, std=D**-0.5, generator=generator)
    x = torch.randn(T, D, generator=generator, dtype=dtype)
    ranking = torch.rand(T, E, generator=generator)
    if chosen == "few":
        ranking[:, :K] += 10.0
    picks = ranking.topk(K).indices
    weights = torch.rand(T, K, generator=generator, dtype=dtype)
    return experts, x, picks, weights


@pytest.mark.parametrize(
    ("T", "E", "K", "D", "hidden", "dtype", "chosen"),
    [
        (17, 6, 2, 16, 8, torch.float32, "spread"),
        (17, 6, 2, 16, 8, torch.float32, "few"),
        (1, 5, 5, 16, 8, torch.float32, "spread"),
        (9, 1, 1, 16, 8, torch.float32, "spread"),
        (17, 6, 3, 10, 7, torch.float32, "spread"),
        (17, 6, 2, 16, 8, torch.float64, "few"),
        (17, 32, 4, 12, 5, torch.float64, "spread"),
    ],
)
def test_outputs_and_gradients_are_the_loops(
    T: int, E: int, K: int, D: int, hidden: int, dtype: torch.dtype, chosen: str
) -> None:
    experts, x, picks, weights = case(T, E, K, D, hidden, dtype, chosen)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12}
    results = []
    for function in (by_loop, Experts.forward):
        x_, weights_ = x.clone().requires_grad_(), weights.clone().requires_grad_()
        experts.zero_grad()
        y = function(experts, x_, Routing(torch.empty(T, E), picks, weights_))
        (y * torch.arange(y.numel(), dtype=dtype).view_as(y).cos()).sum().backward()
        grads = [p.grad.clone() for p in experts.parameters()]
        results.append([y.detach(), x_.grad, weights_.grad, *grads])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **{"rtol": 1e-10, **tolerance})


def test_an_idle_expert_gets_exactly_no_gradient() -> None:
    experts, x, picks, weights = case(17, 6, 2, 16, 8, torch.float32, "few")
    experts(x, Routing(torch.empty(17, 6), picks, weights)).square().sum().backward()
    assert experts.gate_EFD.grad[0].abs().max() > 0
    assert not experts.gate_EFD.grad[2:].any() and not experts.down_EFD.grad[2:].any()


def test_the_grouped_gemm_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = F.grouped_mm
    monkeypatch.setattr(
        module.F, "grouped_mm", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    for D, dtype, expected in (
        (16, torch.float32, 3),
        (10, torch.float32, 0),
        (16, torch.float64, 0),
    ):
        calls.clear()
        experts, x, picks, weights = case(5, 4, 2, D, 8, dtype, "spread")
        experts(x, Routing(torch.empty(5, 4), picks, weights))
        assert len(calls) == expected


def test_a_plain_sum_backward_works() -> None:
    """torch's grouped GEMM refuses an expanded gradient; the module must not."""
    experts, x, picks, weights = case(5, 4, 2, 16, 8, torch.float32, "spread")
    experts(x, Routing(torch.empty(5, 4), picks, weights)).sum().backward()
    assert experts.up_EFD.grad.isfinite().all()


def test_what_computes_is_reported() -> None:
    info = backend_info()
    assert info["backend"] == "torch" and info["megablocks_installed"] == "0.10.0"


def test_autocast_reaches_the_grouped_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, x, picks, weights = case(17, 6, 2, 16, 8, torch.float32, "spread")
    routing = Routing(torch.empty(17, 6), picks, weights)
    exact, seen = experts(x, routing), []
    real = F.grouped_mm
    monkeypatch.setattr(
        module.F,
        "grouped_mm",
        lambda a, b, **k: seen.append((a.dtype, b.dtype)) or real(a, b, **k),
    )
    with torch.autocast("cpu", torch.bfloat16):
        half = experts(x, routing)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 3 and half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.1, rtol=0.1)
    assert not torch.equal(half, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_tokens_on_one_expert_are_that_expert(dtype: torch.dtype) -> None:
    experts, x, _, _ = case(13, 4, 1, 16, 8, dtype, "spread")
    weights = torch.linspace(0.5, 2, 13, dtype=dtype)[:, None].requires_grad_()
    picks = torch.full((13, 1), 2)
    y = experts(x, Routing(torch.empty(13, 4), picks, weights))
    gate, up, down = (p[2] for p in experts.parameters())
    inner = F.silu(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(y, weights * (inner @ down), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    idle = [0, 1, 3]
    assert all(p.grad[2].any() and not p.grad[idle].any() for p in experts.parameters())


def test_the_order_of_tokens_and_of_choices_does_not_matter() -> None:
    experts, x, picks, weights = case(11, 6, 3, 10, 7, torch.float64, "spread")
    scores = torch.empty(11, 6)
    y = experts(x, Routing(scores, picks, weights))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    turned = experts(x[order], Routing(scores, picks[order].flip(1), weights[order].flip(1)))
    torch.testing.assert_close(turned, y[order], atol=1e-12, rtol=0)


def test_the_output_keeps_the_models_dtype_and_is_weighed_in_fp32() -> None:
    experts, x, picks, weights = case(9, 4, 2, 16, 8, torch.bfloat16, "spread")
    y = experts(x, Routing(torch.empty(9, 4), picks, weights.float()))
    assert y.dtype == torch.bfloat16
    exact = by_loop(experts.double(), x.double(), Routing(None, picks, weights.double()))
    torch.testing.assert_close(y.double(), exact.detach(), atol=0.06, rtol=0.06)


def test_a_dense_network_is_its_equation() -> None:
    dense = module.SwiGLU(6, 4).double()
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate, up, down = (p.detach() for p in dense.parameters())
    pre = x @ gate.T
    expected = (pre / (1 + torch.exp(-pre)) * (x @ up.T)) @ down.T
    torch.testing.assert_close(dense(x).detach(), expected)
