"""Real MegaBlocks code, its kernels interpreted, against our experts and a float64 loop."""

import dataclasses
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trinity_lib import _megablocks, _standins
from trinity_lib.experts import Experts
from trinity_lib.routing import Router, RouterConfig, Routing

ROOT = Path(__file__).parent.parent.parent
quick = settings(deadline=None, derandomize=True, max_examples=60, database=None)


class Case(NamedTuple):
    """Tokens, choices, routing weights, and the three expert weights."""

    x: Tensor
    picks: Tensor
    weights: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


def case(T: int, E: int, K: int, D: int, hidden: int, chosen: str = "spread") -> Case:
    generator = torch.Generator().manual_seed(T + E + K + D)
    ranking = torch.rand(T, E, generator=generator)
    if chosen == "few":
        ranking[:, 1 : K + 1] += 10.0
    gate, up, down = torch.randn(3, E, hidden, D, generator=generator) * D**-0.5
    x = torch.randn(T, D, generator=generator)
    weights = torch.rand(T, K, generator=generator)
    return Case(x, ranking.topk(K).indices, weights, gate, up, down)


def by_torch(x: Tensor, picks: Tensor, weights: Tensor, *mlp: Tensor) -> Tensor:
    """`Experts` with the caller's weights."""
    E, hidden, D = mlp[0].shape
    experts = Experts(E, D, hidden)
    experts.backend = "torch"
    named = dict(zip(("gate_EFD", "up_EFD", "down_EFD"), mlp, strict=True))
    routing = Routing(torch.empty(len(x), E), picks, weights)
    return torch.func.functional_call(experts, named, (x, routing))


def by_loop(x: Tensor, picks: Tensor, weights: Tensor, *mlp: Tensor) -> Tensor:
    """Expert by expert."""
    y = torch.zeros_like(x)
    for e, (gate, up, down) in enumerate(zip(*mlp, strict=True)):
        token, choice = (picks == e).nonzero(as_tuple=True)
        inner = F.silu(x[token] @ gate.T) * (x[token] @ up.T)
        y = y.index_add(0, token, (inner @ down) * weights[token, choice, None])
    return y


def results(function: Callable[..., Tensor], given: Case, dtype: torch.dtype) -> list[Tensor]:
    """The output, and gradients to tokens, routing weights and the three expert weights."""
    x, picks, *rest = given
    x, *rest = (t.to(dtype).clone().requires_grad_() for t in (x, *rest))
    y = function(x, picks, *rest)
    gradients = torch.autograd.grad((y * slope(y)).sum(), (x, *rest))
    return [y.detach(), *gradients]


def slope(y: Tensor) -> Tensor:
    """A gradient that is different everywhere."""
    return torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(got[0].double(), expected[0].double(), atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        assert ours.shape == theirs.shape
        scale = theirs.abs().max() if theirs.numel() else 0.0
        assert not theirs.numel() or (ours - theirs).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize(
    ("T", "E", "K", "D", "hidden", "chosen"),
    [
        (17, 6, 2, 16, 8, "spread"),
        (17, 6, 2, 16, 8, "few"),  # four experts are idle, the first and the last among them
        (13, 4, 1, 16, 8, "few"),  # all tokens on one expert
        (13, 4, 1, 10, 7, "few"),
        (1, 6, 3, 16, 8, "spread"),
        (9, 1, 1, 10, 7, "spread"),  # experts * hidden < 128: its constructor would fail
        (9, 5, 2, 300, 132, "spread"),  # rows wider than a kernel's block
        *((9, 6, K, 10, 7, "spread") for K in range(1, 7)),
    ],
)
def test_megablocks_is_our_experts_and_the_loop(
    T: int, E: int, K: int, D: int, hidden: int, chosen: str
) -> None:
    it = case(T, E, K, D, hidden, chosen)
    got = results(_megablocks.forward, it, torch.float32)
    assert got[0].dtype == torch.float32 and got[0].abs().max() > 0.01
    assert_same(got, results(by_torch, it, torch.float32))
    assert_same(got, results(by_loop, it, torch.float64))


def test_no_tokens_is_no_rows_and_zero_gradients() -> None:
    it = case(0, 6, 2, 16, 8)
    got = results(_megablocks.forward, it, torch.float32)
    assert_same(got, results(by_torch, it, torch.float32))
    y, to_x, to_weights, *to_mlp = got
    assert y.shape == to_x.shape == (0, 16) and to_weights.shape == (0, 2)
    assert all(g.shape == (6, 8, 16) and not g.any() for g in to_mlp)


def test_an_idle_expert_gets_exactly_no_gradient() -> None:
    *_, gate, up, down = results(
        _megablocks.forward, case(17, 6, 2, 16, 8, "few"), torch.float32
    )
    for gradient in (gate, up, down):
        assert gradient[1:3].any() and not gradient[[0, 3, 4, 5]].any()


def test_the_order_of_choices_in_a_row_does_not_matter() -> None:
    it = case(11, 6, 4, 10, 7)
    order = torch.rand(it.picks.shape, generator=torch.Generator().manual_seed(0)).argsort(-1)
    mixed = it._replace(picks=it.picks.gather(1, order), weights=it.weights.gather(1, order))
    assert not torch.equal(mixed.picks, it.picks.sort(-1).values)
    plain, other = (results(_megablocks.forward, c, torch.float32) for c in (it, mixed))
    plain[2] = plain[2].gather(1, order)
    assert_same(other, plain)


def test_views_are_not_misread() -> None:
    """Strided tokens, choices and expert weights, and one routing weight for all."""
    it = case(9, 6, 2, 16, 8)
    plain = it._replace(weights=torch.full((9, 2), 0.5))
    views = Case(
        torch.stack([it.x, torch.full_like(it.x, torch.nan)], 2)[:, :, 0],
        torch.stack([it.picks, it.picks * 0 - 1], 2).int()[:, :, 0],
        torch.tensor(0.5).expand(9, 2),
        *(w.transpose(1, 2).contiguous().transpose(1, 2) for w in plain[3:]),
    )
    assert not any(t.is_contiguous() for t in views)
    assert torch.equal(_megablocks.forward(*views), _megablocks.forward(*plain))


def test_gradients_reach_the_masters_of_cast_weights() -> None:
    it = case(11, 5, 2, 16, 8)
    masters = [t.double().requires_grad_() for t in it[2:]]
    y = _megablocks.forward(it.x, it.picks, *(m.float() for m in masters))
    gradients = torch.autograd.grad((y * slope(y)).sum(), masters)
    expected = results(by_loop, it, torch.float64)[2:]
    for got, right in zip(gradients, expected, strict=True):
        assert got.dtype == torch.float64
        assert (got - right).abs().max() <= 1e-5 * right.abs().max()


def test_autocast_changes_nothing() -> None:
    it = case(11, 5, 2, 10, 7)
    plain = results(_megablocks.forward, it, torch.float32)
    inside = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: inside.append(torch.is_autocast_enabled("cpu"))
    )
    try:
        with torch.autocast("cpu", torch.bfloat16):
            cast = results(_megablocks.forward, it, torch.float32)
    finally:
        handle.remove()
    assert inside == [False, False]  # on CUDA stk's kernels would heed it
    assert all(torch.equal(a, b) for a, b in zip(cast, plain, strict=True))


def test_bfloat16_stays_so_under_fp32_routing_weights() -> None:
    it = case(11, 5, 2, 16, 8)
    y = _megablocks.forward(it.x.bfloat16(), *it[1:3], *(w.bfloat16() for w in it[3:]))
    assert y.dtype == torch.bfloat16  # the interpreter truncates: no more can be asked
    torch.testing.assert_close(y.float(), by_loop(*it), atol=0.06, rtol=0.06)


def test_it_is_deterministic_and_leaves_nothing_behind() -> None:
    moe, router = real("layers.moe"), real("layers.router")
    it, before = case(17, 7, 2, 16, 24), torch.get_rng_state()
    one, two = (results(_megablocks.forward, it, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not moe.get_load_balancing_loss() and not router._ROUTER_LOGITS
    module = _megablocks.layer(7, 16, 24, 2, torch.float32, torch.device("cpu"))
    assert all(p.is_meta for p in module.parameters())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("E", "hidden"), [(1, 7), (6, 8), (4, 256)])
def test_the_layer_is_shared_and_holds_no_memory(E: int, hidden: int) -> None:
    one, two = (_megablocks.layer(E, 16, hidden, 1, torch.bfloat16, "cpu") for _ in range(2))
    assert one is two and one.ffn_hidden_size == one.args.ffn_hidden_size == hidden
    shapes = {name: (p.shape, p.device.type, p.dtype) for name, p in one.named_parameters()}
    each = ((E * hidden, 16), "meta", torch.bfloat16)
    assert shapes == {f"mlp.{name}": each for name in ("w1", "v1", "w2")}


def test_what_computes_is_megablocks() -> None:
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(f"{type(module).__module__}.{type(module).__name__}")
    )
    try:
        _megablocks.forward(*case(5, 4, 2, 16, 8))
    finally:
        handle.remove()
    assert seen == [
        "megablocks.layers.glu.GroupedGLU",
        "megablocks.layers.dmoe.ParallelDroplessMLP",
    ]


def test_what_is_live_is_reported() -> None:
    info = _megablocks.info()
    assert _megablocks.unavailable("cpu") == ""
    assert (info["megablocks"], info["stk"]) == ("0.10.0", "0.7.1")
    assert info["triton"][0].isdigit() and info["kernels"] == "interpreted Triton"
    real = _standins.compiled("megablocks_ops")
    assert info["megablocks_ops"] == ("compiled" if real else "torch stand-in")


def test_what_it_cannot_compute_is_refused() -> None:
    it = case(5, 4, 2, 16, 8)
    assert "not torch.float64" in _megablocks.unavailable("cpu", torch.float64)
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        _megablocks.forward(it.x.double(), *it[1:])
    assert "meta" in _megablocks.unavailable("meta")
    with pytest.raises(RuntimeError, match="does not run on meta"):
        _megablocks.forward(*(t.to("meta") for t in it))
    if not torch.cuda.is_available():
        assert _megablocks.unavailable("cuda:0") == "torch sees no CUDA GPU"


def test_a_compiled_caller_leaves_it_uncompiled() -> None:
    it, traced = case(5, 4, 2, 16, 8), []

    def spy(graph: Any, _inputs: Any) -> Any:
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def caller(*tensors: Tensor) -> Tensor:
        return _megablocks.forward(*tensors) * 2

    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(caller, backend=spy)
        for _ in range(2):
            assert torch.equal(compiled(*it), _megablocks.forward(*it) * 2)
    assert any("mul" in name for name in traced) and not any("sort" in n for n in traced)


# MegaBlocks' own blocks around the same experts ---------------------------------------------


def real(name: str) -> Any:
    """A module of MegaBlocks, which can be imported only once the stand-ins are there."""
    _megablocks._load()
    return importlib.import_module(f"megablocks.{name}")


def arguments(E: int, K: int, D: int, hidden: int, **changes: Any) -> Any:
    """Its settings as we use them, on the CPU."""
    like = _megablocks.layer(E, D, hidden, K, torch.float32, "cpu").args
    keep = torch.nn.init.zeros_
    changes = {"init_method": keep, "output_layer_init_method": keep, **changes}
    return dataclasses.replace(like, device=torch.device("cpu"), **changes)


class AsMegaBlocks(torch.nn.Module):
    """Our router with what a MegaBlocks layer takes from its own."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.ours = router

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing = self.ours(x.view(-1, x.shape[-1]))
        return routing.scores_TE, routing.weights_TK, routing.experts_TK


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_a_whole_dmoe_is_our_router_and_our_experts(whose: str) -> None:
    E, K, D, hidden = 8, 3, 16, 20
    it = case(14, E, K, D, hidden)
    theirs = {"score": "softmax", "normalise": False}
    config = RouterConfig(num_experts=E, top_k=K, **(theirs if whose == "theirs" else {}))
    router = Router(config, D, layer=0)
    torch.nn.init.normal_(router.weight_ED, generator=torch.Generator().manual_seed(3))
    block = real("layers.dmoe").dMoE(arguments(E, K, D, hidden))
    with torch.no_grad():
        for name, weight in zip(("w1", "v1", "w2"), it[3:], strict=True):
            getattr(block.experts.mlp, name).copy_(weight.flatten(0, 1))
        block.router.layer.weight.copy_(router.weight_ED)
        if whose == "ours":
            router.bias_E.copy_(torch.linspace(-0.3, 0.3, E))  # selects, never weighs
            block.router = AsMegaBlocks(router)
    x = it.x.clone().requires_grad_()
    y = block(x.view(2, 7, D)).view(14, D)
    (y * slope(y)).sum().backward()
    matrix = router.weight_ED if whose == "ours" else block.router.layer.weight
    mlp = block.experts.mlp
    got = [y.detach(), x.grad, matrix.grad, *(w.grad for w in (mlp.w1, mlp.v1, mlp.w2))]

    x, router.weight_ED.grad = it.x.clone().requires_grad_(), None
    weights = [w.clone().requires_grad_() for w in it[3:]]
    routing = router(x)
    y = by_torch(x, routing.experts_TK, routing.weights_TK, *weights)
    (y * slope(y)).sum().backward()
    rest = (w.grad.flatten(0, 1) for w in weights)
    assert_same(got, [y.detach(), x.grad, router.weight_ED.grad, *rest])


def test_its_block_sparse_kernels_are_a_second_oracle() -> None:
    settings_ = arguments(2, 1, 128, 128)
    settings_.mlp_impl = "sparse"  # past its guard against newer tritons
    module = real("layers.dmoe").ParallelDroplessMLP(settings_)
    assert type(module.mlp) is real("layers.glu").SparseGLU
    it = case(6, 2, 1, 128, 128)

    def sparse(x: Tensor, picks: Tensor, weights: Tensor, *mlp: Tensor) -> Tensor:
        flat = (w.flatten(0, 1) for w in mlp)
        named = dict(zip(("mlp.w1", "mlp.v1", "mlp.w2"), flat, strict=True))
        return torch.func.functional_call(module, named, (x, None, weights, picks))

    expected = results(sparse, it, torch.float32)
    for got, right in zip(
        results(_megablocks.forward, it, torch.float32), expected, strict=True
    ):
        torch.testing.assert_close(got, right, atol=2e-5, rtol=2e-5)


def one_rank(rank: int, folder: Path, whole: Case, shares: list[int]) -> None:
    """Half the experts and a share of the tokens, in a process of its own."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=60), world_size=2, rank=rank)
    E, hidden, D = whole.gate.shape
    module = real("layers.dmoe").ParallelDroplessMLP(
        arguments(
            E,
            whole.picks.shape[1],
            D,
            hidden,
            moe_expert_model_parallelism=True,
            expert_parallel_group=dist.group.WORLD,
        )
    )
    x, picks, weights = (t.split(shares)[rank].clone() for t in whole[:3])
    local = [w.chunk(2)[rank].flatten(0, 1).clone() for w in whole[3:]]

    def parallel(x: Tensor, picks: Tensor, weights: Tensor, *mlp: Tensor) -> Tensor:
        named = dict(zip(("mlp.w1", "mlp.v1", "mlp.w2"), mlp, strict=True))
        return torch.func.functional_call(module, named, (x, None, weights, picks))

    torch.save(
        results(parallel, Case(x, picks, weights, *local), torch.float32), folder / f"{rank}.pt"
    )
    dist.destroy_process_group()


def test_its_expert_parallelism_over_two_ranks_is_our_experts(tmp_path: Path) -> None:
    whole, shares = case(12, 4, 2, 16, 32, "few"), [7, 5]  # the last expert is idle
    context = mp.spawn(one_rank, (tmp_path, whole, shares), nprocs=2, join=False)
    deadline = time.monotonic() + 90
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the two ranks did not finish"
    finally:
        for process in context.processes:
            process.kill()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    # `slope` begins anew on each rank, so the expected figures are made share by share.
    single = [
        results(
            by_torch, Case(*(t.split(shares)[r] for t in whole[:3]), *whole[3:]), torch.float32
        )
        for r in range(2)
    ]
    for got, expected in zip(ranks, single, strict=True):
        assert_same(got[:3], expected[:3])
    for i in (3, 4, 5):
        # Each rank holds its experts' gradients from both ranks' tokens, divided by the two
        # ranks: MegaBlocks counts on data parallelism to average, not add, the others'.
        got = torch.cat([r[i] for r in ranks])
        expected = (single[0][i] + single[1][i]).flatten(0, 1) / 2
        assert expected.any() and (got - expected).abs().max() <= 1e-5 * expected.abs().max()


# The stand-ins against brute force -----------------------------------------------------------

integers = st.sampled_from([torch.int16, torch.int32, torch.int64])
ends = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@quick
@given(st.lists(st.integers(0, 300), max_size=40), st.integers(1, 16), integers)
def test_sort_is_stable_on_the_low_bits(keys: list[int], bits: int, dtype: torch.dtype) -> None:
    x = torch.tensor(keys, dtype=dtype)
    out, iota = torch.empty_like(x), torch.empty_like(x)
    _standins.sort(x, bits, out, iota)
    order = sorted(range(len(keys)), key=lambda i: keys[i] % 2**bits)
    assert iota.tolist() == order and out.tolist() == [keys[i] for i in order]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_sort_by_all_bits_knows_signs(dtype: torch.dtype) -> None:
    x = torch.tensor([3, -1, 2, -5], dtype=dtype)
    out, iota = torch.empty_like(x), torch.empty_like(x)
    _standins.sort(x, 8 * dtype.itemsize, out, iota)
    assert out.tolist() == [-5, -1, 2, 3] and iota.tolist() == [3, 1, 2, 0]


@quick
@given(st.lists(st.integers(-2, 9), max_size=40), st.integers(1, 8), integers)
def test_histogram_counts_what_is_in_range(
    values: list[int], bins: int, dtype: torch.dtype
) -> None:
    x = torch.tensor(values, dtype=dtype)
    expected = [values.count(i) for i in range(bins)]
    got = _standins.histogram(x, bins)
    assert got.dtype == torch.int32 and got.tolist() == expected
    assert _standins.histogram(torch.stack([x, x]), bins).tolist() == [expected] * 2


@quick
@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), integers)
def test_cumulative_sums(values: list[int], dtype: torch.dtype) -> None:
    x = torch.tensor([values, values[::-1]], dtype=dtype)
    inclusive, exclusive = torch.empty_like(x), torch.empty_like(x)
    _standins.inclusive_cumsum(x, 1, inclusive)
    _standins.exclusive_cumsum(x, 1, exclusive)
    for row, with_it, without in zip(x, inclusive, exclusive, strict=True):
        sums = [sum(row[:i].tolist()) for i in range(len(values) + 1)]
        assert with_it.tolist() == sums[1:] and without.tolist() == sums[:-1]


@quick
@given(ends, st.integers(1, 3))
def test_indices_are_block_diagonal(blocks: list[int], columns: int) -> None:
    bins = torch.tensor(blocks).cumsum(0, dtype=torch.int32) * 128
    out = torch.empty(sum(blocks) * columns, dtype=torch.int16)
    _standins.indices(bins, 128, sum(blocks), columns, out)
    rows = [e for e, count in enumerate(blocks) for _ in range(count)]
    assert out.tolist() == [e * columns + c for e in rows for c in range(columns)]


@quick
@given(ends)
def test_replicate_and_its_backward(widths: list[int]) -> None:
    bins = torch.tensor(widths).cumsum(0, dtype=torch.int32)
    x = torch.arange(2 * len(widths)).view(2, -1)
    out = torch.empty(2, sum(widths), dtype=x.dtype)
    _standins.replicate_forward(x, bins, out)
    owner = [i for i, width in enumerate(widths) for _ in range(width)]
    assert out.tolist() == [[row[i] for i in owner] for row in x.tolist()]

    gradient = torch.arange(2.0 * sum(widths)).view(2, -1)
    back = torch.full((2, len(widths)), torch.nan)
    _standins.replicate_backward(gradient, bins, back)
    for row, sums in zip(gradient.tolist(), back.tolist(), strict=True):
        pairs = list(zip(owner, row, strict=True))
        assert sums == [sum(g for o, g in pairs if o == i) for i in range(len(widths))]


groups = st.lists(st.integers(0, 3), min_size=1, max_size=4)
widths = st.sampled_from([(16, 8), (10, 7), (8, 5)])


def products(sizes: list[int], a: Tensor, b: Tensor, trans_b: bool) -> Tensor:
    """Row by row, element by element."""
    owner = [e for e, size in enumerate(sizes) for _ in range(size)]
    w = b.transpose(1, 2) if trans_b else b
    rows = [(a[r][:, None] * w[e]).sum(0) for r, e in enumerate(owner)]
    return torch.stack(rows) if rows else a @ w[0]


@quick
@given(groups, widths, st.booleans())
def test_gmm_and_its_gradients(sizes: list[int], width: tuple[int, int], trans_b: bool) -> None:
    generator, (inner, outer) = torch.Generator().manual_seed(sum(sizes)), width
    shape = (outer, inner) if trans_b else (inner, outer)
    a = torch.randn(sum(sizes), inner, generator=generator).requires_grad_()
    b = torch.randn(len(sizes), *shape, generator=generator).requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    expected = products(sizes, *wide, trans_b)
    got = _standins.gmm_with_gradients(a, b, torch.tensor(sizes), trans_b)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    right = torch.autograd.grad((expected * slope(expected)).sum(), wide)
    grads = torch.autograd.grad((got * slope(got)).sum(), (a, b))
    for ours, theirs in zip(grads, right, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gmm_in_every_dtype_and_into_a_given_tensor(dtype: torch.dtype) -> None:
    a, b = torch.ones(5, 16, dtype=dtype), torch.ones(3, 16, 8, dtype=dtype)
    sizes, into = torch.tensor([2, 0, 3]), torch.empty(5, 8, dtype=dtype)
    assert _standins.gmm(a, b, sizes, c=into) is into and into.eq(16).all()
    grown = _standins.gmm(a, into, sizes, trans_a=True)
    assert grown.dtype == dtype and grown[:, 0, 0].tolist() == [32, 0, 48]


def test_an_expanded_gradient_and_autocast_do_not_trouble_gmm() -> None:
    for width in (16, 10):
        a, b = torch.rand(5, width, requires_grad=True), torch.rand(2, width, 8)
        _standins.gmm_with_gradients(a, b, torch.tensor([2, 3])).sum().backward()
        expected = b.sum(2)[[0, 0, 1, 1, 1]]
        torch.testing.assert_close(a.grad, expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert _standins.gmm(a, b, torch.tensor([2, 3])).dtype == torch.float32


def test_the_grouped_gemm_is_asked_for_what_it_is_sure_to_take() -> None:
    good = torch.zeros(4, 8)
    assert _standins.takes(good, good.bfloat16())
    assert not _standins.takes(good, torch.zeros(4, 7))
    assert not _standins.takes(good, good.double())
    assert not _standins.takes(torch.zeros(0, 8), good)
    assert not _standins.takes(torch.zeros(33)[1:].view(4, 8), good)
    for dtype, sure in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, False)):
        cuda = SimpleNamespace(
            is_cuda=True,
            dtype=dtype,
            shape=(4, 8),
            numel=lambda: 32,
            element_size=lambda: 2,
            data_ptr=lambda: 256,
        )
        assert _standins.takes(cuda, cuda) is sure


# In other processes: without the interpreter, and beside real modules ------------------------


def python(code: str, **environment: str) -> str:
    """What a new interpreter prints; TRITON_INTERPRET is unset unless given."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    ).stdout


def test_a_cpu_without_the_interpreter_is_a_clause_and_an_error() -> None:
    said = python(
        """
import sys, torch
from trinity_lib import _megablocks
clause = _megablocks.unavailable(torch.device("cpu"))
assert "TRITON_INTERPRET=1" in clause, clause
x, w, mlp = torch.ones(3, 8), torch.ones(3, 1), [torch.ones(2, 8, 8)] * 3
for _ in range(2):
    try:
        _megablocks.forward(x, torch.zeros(3, 1, dtype=torch.long), w, *mlp)
    except RuntimeError as error:
        assert clause in str(error), error
    else:
        raise SystemExit("it computed")
info = _megablocks.info()
assert info["kernels"] == "compiled Triton" and info["megablocks"] == "0.10.0", info
print([m for m in ("triton", "megablocks", "stk", "grouped_gemm") if m in sys.modules])
"""
    )
    assert said == "[]\n"  # and nothing of all this imported any of them


def test_a_variable_set_after_triton_was_imported_is_too_late() -> None:
    python(
        """
import os, triton
os.environ["TRITON_INTERPRET"] = "1"
from trinity_lib._megablocks import unavailable
assert "before triton is imported" in unavailable("cpu")
"""
    )


@pytest.mark.parametrize("absent", ["megablocks", "stk", "triton"])
def test_a_missing_package_is_named(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = _megablocks.importlib.util.find_spec
    monkeypatch.setattr(
        _megablocks.importlib.util, "find_spec", lambda n: None if n == absent else find(n)
    )
    _megablocks._missing.cache_clear()
    try:
        assert _megablocks.unavailable("cpu") == f"{absent} is not installed"
    finally:
        monkeypatch.undo()
        _megablocks._missing.cache_clear()


def test_real_modules_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "megablocks_ops.py").write_text("real = True\n")
    (tmp_path / "grouped_gemm").mkdir()
    (tmp_path / "grouped_gemm" / "__init__.py").write_text("backend = ops = None\n")
    for first in ("", "import megablocks_ops, grouped_gemm"):
        python(
            f"""
{first}
from trinity_lib import _megablocks, _standins
_standins.register()
assert _standins.compiled("megablocks_ops") and _standins.compiled("grouped_gemm")
import grouped_gemm, megablocks_ops
assert megablocks_ops.real and grouped_gemm.__file__.startswith({str(tmp_path)!r})
info = _megablocks.info()
assert info["megablocks_ops"] == "compiled", info
assert info["grouped_gemm"].startswith("compiled"), info
""",
            PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
        )


def test_a_broken_real_module_is_a_clause_and_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "megablocks_ops.py").write_text("raise ImportError('undefined symbol')\n")
    python(
        """
from trinity_lib._megablocks import unavailable
assert "undefined symbol" in unavailable("cpu"), unavailable("cpu")
""",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
        TRITON_INTERPRET="1",
    )


def test_its_kernels_compile_for_hopper(tmp_path: Path) -> None:
    said = python(
        """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trinity_lib._megablocks import _load

kernels = _load()
for kind in ("fp32", "bf16"):
    types = dict.fromkeys(("a", "b", "x", "grad", "wgrad"), "*" + kind) | {"weights": "*fp32"}
    for name in ("_padded_copy", "_padded_copy_wgrad"):
        kernel = getattr(kernels, name)
        config = kernel.configs[-1]
        constants = {"NUM_COLUMNS": 96, "TOP_K": 4, "A_TO_B": 0, "SCALE": 1, **config.kwargs}
        constants = {a: v for a, v in constants.items() if a in kernel.arg_names}
        signature = {a: types.get(a, "*i32") for a in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel.fn, signature, constants)
        options = {"num_warps": config.num_warps}
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert ".target sm_90" in built.asm["ptx"] and len(built.asm["cubin"]) > 1000
        print(name, len(kernel.configs))
""",
        TRITON_CACHE_DIR=str(tmp_path),
    )
    # a weight's gradient is summed in one order, whatever the clock says
    assert said.split("\n")[:2] == ["_padded_copy 5", "_padded_copy_wgrad 1"]
