"""Both backends in bf16 on a GPU: errors, bits, waits, training.

Where a check means something on the CPU too, it runs there on what is there: the torch
backend, and beside it in training the C++ operator. MegaBlocks on the CPU: tests/interpreter.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.test_train import same
from trinity_lib import recipes
from trinity_lib.config import override
from trinity_lib.dropless import weigh
from trinity_lib.experts import Backend, Experts, use_backend
from trinity_lib.routing import Routing
from trinity_lib.run import RunConfig
from trinity_lib.train import train

# cuBLAS reads it once, at the first product of the process, whichever test makes that.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Backward has a thread of its own, whose first product makes torch say so.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no")

TENSORS = ("y", "dx", "dweights", "dgate", "dup", "ddown")
BF16 = 1e-2
"""Most that a tensor computed in bf16 may be off, relative in norm: about three roundings."""
AUTOCAST = 1.5e-2
"""The same where tokens and weights are rounded to bf16 first."""
FP32 = 1e-5
"""The same in fp32."""
HERE_AND_THERE = [
    pytest.param("cpu", ("torch",), id="cpu"),
    pytest.param("cuda", ("torch", "megablocks"), id="cuda", marks=pytest.mark.gpu),
]
SHAPES = [
    (1000, 16, 4, 256, 128, "spread"),
    (1000, 16, 4, 256, 128, "few"),  # twelve experts are idle, the first and the last included
    (1, 8, 2, 64, 32, "spread"),
    (257, 6, 3, 20, 12, "spread"),  # rows that torch's grouped GEMM does not take
]


class Case(NamedTuple):
    """Tokens, choices, routing weights, the three expert weights, and the output's gradient."""

    x: Tensor
    picks: Tensor
    weights: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    dy: Tensor

    def to(self, device: str, dtype: torch.dtype, routing: torch.dtype) -> "Case":
        """Elsewhere; routing weights keep a dtype of their own, choices always do."""
        moved = self._replace(**{k: t.to(device, dtype) for k, t in self._asdict().items()})
        weights = self.weights.to(device, routing)
        return moved._replace(picks=self.picks.to(device), weights=weights)


def case(T: int, E: int, K: int, D: int, hidden: int, chosen: str) -> Case:
    """In fp32 on the CPU, so that every device gets the same values."""
    generator = torch.Generator().manual_seed(T + E + K + D)
    ranking = torch.rand(T, E, generator=generator)
    if chosen == "few":
        ranking[:, 1 : K + 1] += 10.0
    gate, up = torch.randn(2, E, hidden, D, generator=generator) * D**-0.5
    down = torch.randn(E, hidden, D, generator=generator) * hidden**-0.5
    x, dy = torch.randn(2, T, D, generator=generator)
    weights = torch.rand(T, K, generator=generator)
    return Case(x, ranking.topk(K).indices, weights, gate, up, down, dy)


def computed(backend: Backend, it: Case) -> list[Tensor]:
    """`TENSORS` of `Experts`; nothing here waits for a GPU."""
    x, weights = (t.clone().requires_grad_() for t in (it.x, it.weights))
    num_experts, hidden, width = it.gate.shape
    with torch.device("meta"):
        experts = Experts(num_experts, width, hidden)
    experts.gate_EFD, experts.up_EFD, experts.down_EFD = map(nn.Parameter, it[3:6])
    use_backend(experts, backend)
    y = experts(x, Routing(it.weights, it.picks, weights))
    return [y.detach(), *torch.autograd.grad(y, (x, weights, *experts.parameters()), it.dy)]


def by_loop(it: Case) -> list[Tensor]:
    """`TENSORS`, expert by expert, in float64 from the very values of `it`."""
    it = it.to(str(it.x.device), torch.float64, torch.float64)
    leaves = [t.clone().requires_grad_() for t in (it.x, it.weights, it.gate, it.up, it.down)]
    x, weights, *mlp = leaves
    y = torch.zeros_like(x)
    for e, (gate, up, down) in enumerate(zip(*mlp, strict=True)):
        token, choice = (it.picks == e).nonzero(as_tuple=True)
        inner = F.silu(x[token] @ gate.T) * (x[token] @ up.T)
        y = y.index_add(0, token, (inner @ down) * weights[token, choice, None])
    return [y.detach(), *torch.autograd.grad(y, leaves, it.dy)]


def errors(got: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """How far each tensor is off, relative in norm."""
    pairs = zip(TENSORS, got, exact, strict=True)
    return {k: float((a.double() - b.double()).norm() / b.double().norm()) for k, a, b in pairs}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("device", "backends"), HERE_AND_THERE)
def test_bf16_is_near_a_float64_loop(
    device: str, backends: tuple[Backend, ...], shape: tuple, capsys: pytest.CaptureFixture
) -> None:
    it = case(*shape).to(device, torch.bfloat16, torch.float32)
    exact = by_loop(it)
    table = {backend: errors(computed(backend, it), exact) for backend in backends}
    with capsys.disabled() if device == "cuda" else contextlib.nullcontext():
        print(f"\nrelative errors against float64, {shape}")
        for name in TENSORS:
            print(f"  {name:9}", *(f"{b} {e[name]:.2e}  " for b, e in table.items()))
    assert all(e[name] <= BF16 for e in table.values() for name in TENSORS)


@pytest.mark.parametrize(("device", "backends"), HERE_AND_THERE)
def test_fp32_is_nearer(device: str, backends: tuple[Backend, ...]) -> None:
    it = case(*SHAPES[0]).to(device, torch.float32, torch.float32)
    exact = by_loop(it)
    for backend in backends:
        assert max(errors(computed(backend, it), exact).values()) <= FP32


@pytest.mark.parametrize(("device", "backends"), HERE_AND_THERE)
def test_an_idle_expert_gets_exactly_no_gradient(
    device: str, backends: tuple[Backend, ...]
) -> None:
    it = case(*SHAPES[1]).to(device, torch.bfloat16, torch.float32)
    for backend in backends:
        for gradient in computed(backend, it)[3:]:
            assert gradient[1:5].any(-1).any(-1).all()
            assert not gradient[[0, *range(5, 16)]].any()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_backends_agree_in_bf16(shape: tuple) -> None:
    it = case(*shape).to("cuda", torch.bfloat16, torch.float32)
    apart = errors(computed("megablocks", it), computed("torch", it))
    assert max(apart.values()) <= BF16, apart


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize(("device", "backends"), HERE_AND_THERE)
def test_two_runs_give_the_same_bits(
    device: str, backends: tuple[Backend, ...], shape: tuple
) -> None:
    it = case(*shape).to(device, torch.bfloat16, torch.float32)
    for backend in backends:
        with deterministic():
            first = computed(backend, it)
            for _ in range(3):
                again = computed(backend, it)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("device", "backends"), HERE_AND_THERE)
def test_autocast_computes_in_bf16_over_fp32_weights(
    device: str, backends: tuple[Backend, ...]
) -> None:
    it = case(*SHAPES[0]).to(device, torch.float32, torch.float32)
    exact = by_loop(it)
    for backend in backends:
        with torch.autocast(device, torch.bfloat16):
            got = computed(backend, it)
        assert all(t.dtype == torch.float32 for t in got)
        off = errors(got, exact)
        assert min(off.values()) > FP32 and max(off.values()) <= AUTOCAST, off


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_the_torch_backend_never_waits_for_the_gpu() -> None:
    it = case(*SHAPES[1]).to("cuda", torch.bfloat16, torch.float32)
    computed("torch", it)  # what waits once only, on first use
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        computed("torch", it)
        with pytest.raises(RuntimeError, match="synchronizing"):  # it would have been seen
            it.x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_weighing_stays_in_bf16_under_cuda_autocast() -> None:
    """There sums of bf16 are fp32 unless told otherwise, and backward would get fp32 rows.

    On tensors that only say they are on a GPU, so that no GPU is needed.
    """
    with FakeTensorMode():
        y_TKD = torch.empty(8, 4, 16, device="cuda", dtype=torch.bfloat16)
        weights_TK = torch.empty(8, 4, device="cuda")
        torch.set_autocast_enabled("cuda", True)  # the context manager asks for a GPU
        try:
            y_TD = weigh(y_TKD, weights_TK)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert y_TD.dtype == torch.bfloat16


def toy(tiny: RunConfig, device: str, steps: int) -> RunConfig:
    """The toy's model on the tests' own text, which is the same on every machine."""
    model = dataclasses.replace(recipes.toy().model, vocab_size=tiny.model.vocab_size)
    config = dataclasses.replace(tiny, model=model, device=device, evaluate_every=25)
    return recipes.with_steps(config, steps)


def trained(
    config: RunConfig, backend: Backend, name: str, runs: Path, cache: Path
) -> xr.DataTree:
    run = train(override(config, {"experts": backend, "name": name}), runs=runs, cache=cache)
    assert run.attrs["status"] == "complete"
    return run


@pytest.mark.parametrize(
    ("device", "backends"),
    [
        pytest.param("cpu", ("torch", "native"), id="cpu"),
        pytest.param("cuda", ("torch", "megablocks"), id="cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_toy_trains_alike_with_either_backend(
    tiny: RunConfig, tmp_path: Path, cache: Path, device: str, backends: tuple[Backend, ...]
) -> None:
    """The first loss is one forward pass apart; later ones grow apart where a top-k flips.

    Outputs rounded to bf16 on one side only moved the first by 6e-4, the last ten's mean by
    0.02 and any by 0.06 (CPU, two seeds).
    """
    config = toy(tiny, device, 50)
    one, other = (
        trained(config, b, b, tmp_path, cache)["train"]["loss"].values for b in backends
    )
    for loss in (one, other):
        assert loss[-10:].mean() < loss[:3].mean() - 0.5
    assert abs(one[0] - other[0]) <= 1e-2
    assert abs(one[-10:].mean() - other[-10:].mean()) <= 0.1
    assert np.abs(one - other).max() <= 0.2


@pytest.mark.parametrize(("device", "backends"), HERE_AND_THERE)
def test_a_toy_is_the_same_twice(
    tiny: RunConfig, tmp_path: Path, cache: Path, device: str, backends: tuple[Backend, ...]
) -> None:
    config = toy(tiny, device, 10)
    for backend in backends:
        names = (f"{backend}-{i}" for i in "ab")
        same(*(trained(config, backend, name, tmp_path, cache) for name in names))
