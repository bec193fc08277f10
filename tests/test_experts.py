"""Dropless experts against a loop over tokens, outputs and all three kinds of gradients.

MegaBlocks' backend has its own process: tests/interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_lib import dropless
from trinity_lib import experts as module
from trinity_lib.config import BadValue, Missing
from trinity_lib.experts import Experts, backend_info, use_backend
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
    nothing = sum(p.sum() for p in experts.parameters()) * 0.0 + x * 0.0
    return torch.stack(rows) if rows else nothing * routing.weights_TK.sum()


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
        (0, 6, 2, 16, 8, torch.float32, "spread"),
        (900, 3, 2, 24, 70, torch.float32, "few"),
        (90, 4, 2, 300, 45, torch.float32, "spread"),
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
    backends = ("torch", "native") if dtype == torch.float32 else ("torch",)
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"atol": 1e-12}
    results = []
    for backend in (None, *backends):
        function = by_loop if backend is None else Experts.forward
        experts.backend = backend or "torch"
        x_, weights_ = x.clone().requires_grad_(), weights.clone().requires_grad_()
        experts.zero_grad()
        y = function(experts, x_, Routing(torch.empty(T, E), picks, weights_))
        (y * torch.arange(y.numel(), dtype=dtype).view_as(y).cos()).sum().backward()
        grads = [p.grad.clone() for p in experts.parameters()]
        results.append([y.detach(), x_.grad, weights_.grad, *grads])
    for result in results[1:]:
        for expected, got in zip(results[0], result, strict=True):
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
        dropless.F, "grouped_mm", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    for D, dtype, expected in (
        (16, torch.float32, 3),
        (10, torch.float32, 0),
        (16, torch.float64, 0),
    ):
        calls.clear()
        experts, x, picks, weights = case(5, 4, 2, D, 8, dtype, "spread")
        use_backend(experts, "torch")
        experts(x, Routing(torch.empty(5, 4), picks, weights))
        assert len(calls) == expected


def test_a_plain_sum_backward_works() -> None:
    """torch's grouped GEMM refuses an expanded gradient; the module must not."""
    experts, x, picks, weights = case(5, 4, 2, 16, 8, torch.float32, "spread")
    experts(x, Routing(torch.empty(5, 4), picks, weights)).sum().backward()
    assert experts.up_EFD.grad.isfinite().all()


def test_what_computes_is_reported() -> None:
    info = backend_info()
    assert info["backend"] == "native" and info["native"] == "compiled"
    assert info["megablocks_megablocks"] == "0.10.0"
    assert "TRITON_INTERPRET=1" in info["megablocks"]
    assert info["dense_products"].startswith("oneDNN")
    assert backend_info("torch")["backend"] == "torch"
    printed = subprocess.run(
        [sys.executable, "-m", "trinity_lib.experts"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(printed.stdout)["backend"] == "native"


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("T", "E", "K"), [(1500, 5, 2), (200, 1, 1)])
def test_the_native_bits_do_not_depend_on_threads(threads: int, T: int, E: int, K: int) -> None:
    """Loads from idle to several blocks of rows, so that every kind of task is there."""
    experts, x, picks, weights = case(T, E, K, 192, 70, torch.float32, "few")
    picks[:300, -1] = 3 % E
    use_backend(experts, "native")
    before, results = torch.get_num_threads(), []
    for count in (1, threads):
        torch.set_num_threads(count)
        experts.zero_grad()
        x_ = x.clone().requires_grad_()
        y = experts(x_, Routing(torch.empty(0), picks, weights))
        y.square().sum().backward()
        results.append([y.detach(), x_.grad, *(p.grad for p in experts.parameters())])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert E == 1 or not results[0][2][4].any()


def test_native_and_torch_agree_to_rounding() -> None:
    experts, x, picks, weights = case(512, 16, 4, 64, 32, torch.float32, "spread")
    results = []
    for backend in ("torch", "native"):
        use_backend(experts, backend)
        experts.zero_grad()
        weights_ = weights.clone().requires_grad_()
        y = experts(x, Routing(torch.empty(0), picks, weights_))
        y.square().sum().backward()
        results.append([y.detach(), weights_.grad, *(p.grad for p in experts.parameters())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_nan_stays_a_nan(backend: str) -> None:
    """The trainer's guard must see it."""
    experts, x, picks, weights = case(9, 4, 2, 16, 8, torch.float32, "spread")
    use_backend(experts, backend)
    x[3, 5] = torch.nan
    y = experts(x, Routing(torch.empty(0), picks, weights))
    assert y[3].isnan().all() and not y[:3].isnan().any()


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_compiled_caller_sees_the_same(backend: str) -> None:
    experts, x, picks, weights = case(17, 6, 2, 16, 8, torch.float32, "spread")
    use_backend(experts, backend)

    def loss(x: Tensor, weights: Tensor) -> Tensor:
        return experts(x.tanh(), Routing(x, picks, weights)).square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        experts.zero_grad()
        x_, weights_ = x.clone().requires_grad_(), weights.clone().requires_grad_()
        function(x_, weights_).backward()
        results.append(
            [x_.grad, weights_.grad, *(p.grad.clone() for p in experts.parameters())]
        )
    torch.testing.assert_close(results[0], results[1])


def test_few_rows_without_gradients_gather_their_weights() -> None:
    """Decoding of a few tokens takes another path; it must be the same function."""
    experts, x, picks, weights = case(5, 6, 3, 10, 7, torch.float32, "spread")
    use_backend(experts, "torch")
    routing = Routing(torch.empty(0), picks, weights)
    with torch.no_grad():
        few = experts(x, routing)
    torch.testing.assert_close(few, experts(x, routing).detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("backend", "dtype", "kind", "sentence"),
    [
        ("native", torch.float64, Missing, "takes float32 on the CPU, not float64 on cpu"),
        ("megablocks", torch.float32, Missing, "TRITON_INTERPRET=1"),
        ("fast", torch.float32, BadValue, "experts is 'fast'; it must be"),
    ],
)
def test_a_backend_that_is_not_there_is_refused(
    backend: str, dtype: torch.dtype, kind: type, sentence: str
) -> None:
    experts = Experts(4, 16, 8).to(dtype)
    with pytest.raises(kind, match=sentence):
        use_backend(experts, backend)
    assert experts.backend == "auto"


def test_without_the_operator_the_fallback_says_so(tmp_path: Path) -> None:
    """No compiler, and nothing compiled earlier: torch computes, and the reason is named."""
    environment = os.environ | {
        "CXX": "no-such-compiler",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
    }
    printed = subprocess.run(
        [sys.executable, "-m", "trinity_lib.experts"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    info = json.loads(printed.stdout)
    assert info["backend"] == "torch" and "no-such-compiler" in info["native"]


def test_autocast_reaches_the_grouped_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, x, picks, weights = case(17, 6, 2, 16, 8, torch.float32, "spread")
    routing = Routing(torch.empty(17, 6), picks, weights)
    exact, seen = experts(x, routing), []
    real = F.grouped_mm
    monkeypatch.setattr(
        dropless.F,
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
    generator = torch.Generator().manual_seed(1)
    for p in dense.parameters():
        torch.nn.init.normal_(p, generator=generator)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gate, up, down = (p.detach() for p in dense.parameters())
    pre = x @ gate.T
    expected = (pre / (1 + torch.exp(-pre)) * (x @ up.T)) @ down.T
    torch.testing.assert_close(dense(x).detach(), expected)
