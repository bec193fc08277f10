"""Muon: singular values, momentum, rates by shape, and idle, whole and split matrices."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from trinity_lib import native, onednn
from trinity_lib.muon import NEWTON_SCHULZ, Muon, orthogonalise


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 32), (48, 16), (5, 24, 32), (7, 12, 20)])
def test_singular_values_are_near_one(shape: tuple[int, ...]) -> None:
    values = torch.linalg.svdvals(orthogonalise(random(*shape)))
    assert values.min() > 0.5 and values.max() < 1.3
    exact = torch.linalg.svd(random(*shape), full_matrices=False)
    polar = exact.U @ exact.Vh
    cosine = torch.nn.functional.cosine_similarity(
        polar.flatten(-2), orthogonalise(random(*shape)).flatten(-2), dim=-1
    )
    assert cosine.min() > 0.97


def moved(p: torch.Tensor, grads: list[torch.Tensor], **settings: object) -> torch.Tensor:
    """How far Muon moves a parameter over these gradients."""
    parameter = torch.nn.Parameter(p.clone())
    group = {"params": [parameter], "transposed": settings.pop("transposed", False)}
    muon = Muon([group], 0.1, **settings)
    for grad in grads:
        parameter.grad = grad.clone()
        muon.step()
    return parameter.detach() - p


def test_every_expert_is_orthogonalised_on_its_own() -> None:
    grads = [
        random(5, 24, 16, seed=s) * torch.logspace(-3, 3, 5)[:, None, None] for s in (1, 2)
    ]
    together = moved(torch.zeros(5, 24, 16), grads)
    for e in range(5):
        alone = moved(torch.zeros(24, 16), [g[e] for g in grads])
        torch.testing.assert_close(together[e], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "transposed", "factor"),
    [
        ((64, 16), False, 2.0),
        ((16, 64), False, 1.0),
        ((3, 64, 16), False, 2.0),
        ((3, 16, 64), True, 2.0),
        ((3, 64, 16), True, 1.0),
    ],
)
def test_the_rate_follows_fan_out_over_fan_in(
    shape: tuple[int, ...], transposed: bool, factor: float
) -> None:
    step = moved(torch.zeros(shape), [random(*shape)], transposed=transposed)
    expected = -0.1 * factor * orthogonalise(random(*shape))
    torch.testing.assert_close(step, expected, atol=1e-5, rtol=1e-3)


def test_momentum_is_nesterovs() -> None:
    first, second = random(8, 8, seed=1), random(8, 8, seed=2)
    buffer = 0.05 * first
    one = -0.1 * orthogonalise(0.05 * first + 0.95 * buffer)
    buffer = 0.95 * buffer + 0.05 * second
    two = -0.1 * orthogonalise(0.05 * second + 0.95 * buffer)
    torch.testing.assert_close(moved(torch.zeros(8, 8), [first, second]), one + two, atol=1e-5,
                               rtol=1e-4)  # fmt: skip


def test_an_idle_expert_rests_or_moves_as_told() -> None:
    both, one = random(2, 8, 8, seed=1), random(2, 8, 8, seed=2)
    one[1] = 0
    before = moved(torch.zeros(2, 8, 8), [both])
    rests = moved(torch.zeros(2, 8, 8), [both, one])
    assert torch.equal(rests[1], before[1]) and not torch.equal(rests[0], before[0])
    moves = moved(torch.zeros(2, 8, 8), [both, one], idle_experts="move")
    length = (moves - before)[1].norm() / (moves - before)[0].norm()
    assert 0.8 < length < 1.2
    again = moved(torch.zeros(2, 8, 8), [both, one, both])
    without = moved(torch.zeros(2, 8, 8), [both, both])
    torch.testing.assert_close(again[1], without[1])


def test_weight_decay_is_decoupled() -> None:
    p = random(8, 8, seed=5)
    plain, decayed = (moved(p, [random(8, 8)], weight_decay=w) for w in (0.0, 0.5))
    torch.testing.assert_close(decayed - plain, -0.1 * 0.5 * p, atol=1e-6, rtol=1e-4)


def test_matrices_only() -> None:
    with pytest.raises(ValueError, match="Muon takes matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], 0.1)


@pytest.mark.parametrize("shape", [(8, 32), (64, 16), (5, 12, 40), (5, 40, 12)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_well_conditioned_matrices_become_orthogonal(
    shape: tuple[int, ...], scale: float
) -> None:
    values = torch.linalg.svdvals(orthogonalise(scale * random(*shape, seed=3)))
    assert values.min() > 0.6 and values.max() < 1.2


def by_quintic(singular: float, steps: int) -> float:
    for _ in range(steps):
        singular = 3.4445 * singular - 4.7750 * singular**3 + 2.0315 * singular**5
    return singular


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(2, 9), st.integers(0, 99))
def test_orthogonalisation_maps_singular_values_alone(
    steps: int, rows: int, columns: int, seed: int
) -> None:
    matrix = random(rows, columns, seed=seed).double()
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    length = math.sqrt(sum(float(x) ** 2 for x in values))
    mapped = torch.tensor([by_quintic(float(x) / (length + 1e-7), steps) for x in values])
    expected = u @ torch.diag(mapped.double()) @ v
    torch.testing.assert_close(orthogonalise(matrix, steps), expected, atol=1e-6, rtol=0)


def test_an_idle_experts_momentum_is_untouched_or_decays() -> None:
    both, one = random(3, 8, 4, seed=1), random(3, 8, 4, seed=2)
    one[1] = 0
    for idle, factor in (("rest", 1.0), ("move", 0.95)):
        p = torch.nn.Parameter(random(3, 8, 4, seed=3))
        muon = Muon([p], 0.1, idle_experts=idle, weight_decay=0.5)
        p.grad = both.clone()
        muon.step()
        before, weights = muon.state[p]["momentum"].clone(), p.detach().clone()
        p.grad = one.clone()
        muon.step()
        after = muon.state[p]["momentum"]
        torch.testing.assert_close(after[1], factor * before[1])
        torch.testing.assert_close(after[[0, 2]], 0.95 * before[[0, 2]] + 0.05 * one[[0, 2]])
        assert torch.equal(p.detach()[1], weights[1]) is (idle == "rest")
        assert not torch.equal(p.detach()[0], weights[0])


def rotated(values: Sequence[float], rows: int, columns: int) -> Tensor:
    """A float64 matrix with these singular values."""
    left, _ = torch.linalg.qr(random(rows, len(values), seed=1).double())
    right, _ = torch.linalg.qr(random(columns, len(values), seed=2).double())
    return left @ torch.diag(torch.tensor(values).double()) @ right.T


def test_coefficients_and_band_are_the_published_ones() -> None:
    """Jordan et al. 2024: singular values end between about 0.7 and 1.2 after five steps."""
    assert NEWTON_SCHULZ == (3.4445, -4.7750, 2.0315)
    values = [0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.6, 0.53]
    shares = np.array(values) / np.linalg.norm(values)
    assert shares.min() > 0.029
    for shape in ((8, 8), (8, 20), (20, 8)):
        after = torch.linalg.svdvals(orthogonalise(rotated(values, *shape)))[:8]
        assert after.min() > 0.67 and after.max() < 1.21
    slope = NEWTON_SCHULZ[0] ** 5  # of a value too small for five steps
    tiny = torch.linalg.svdvals(orthogonalise(rotated([1.0, 1e-6], 4, 4)))[1]
    assert float(tiny) == pytest.approx(slope * 1e-6, rel=1e-4)


def test_what_has_no_direction_does_not_move() -> None:
    assert torch.equal(orthogonalise(torch.zeros(3, 4, 6)), torch.zeros(3, 4, 6))
    still = torch.nn.Parameter(random(4, 6))
    Muon([still], 0.1, weight_decay=0.5).step()  # it has no gradient
    assert torch.equal(still, random(4, 6))


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 99))
def test_it_commutes_with_transposes_and_scales(rows: int, columns: int, seed: int) -> None:
    matrix = random(rows, columns, seed=seed).double()
    once = orthogonalise(matrix)
    torch.testing.assert_close(orthogonalise(matrix.T), once.T, atol=1e-9, rtol=0)
    torch.testing.assert_close(orthogonalise(-1e4 * matrix), -once, atol=1e-5, rtol=0)


def test_a_down_projections_rate_is_its_transposes() -> None:
    """Stored [E, F, D], used as D x F: the same step as of the transpose, as stored."""
    grads = [random(3, 16, 64, seed=s) for s in (1, 2, 3)]
    down = moved(torch.zeros(3, 16, 64), grads, transposed=True)
    usual = moved(torch.zeros(3, 64, 16), [g.mT for g in grads])
    torch.testing.assert_close(down, usual.mT, atol=1e-5, rtol=1e-4)


def test_all_experts_idle_changes_nothing() -> None:
    p, idle = random(3, 4, 6), torch.zeros(3, 4, 6)
    change = moved(p, [random(3, 4, 6, seed=1), idle, idle], weight_decay=0.5)
    once = moved(p, [random(3, 4, 6, seed=1)], weight_decay=0.5)
    assert torch.equal(change, once)


class Halves(NamedTuple):
    """A rank with the upper halves of matrices; at a first step it knows the lower ones."""

    lower: list[Tensor]
    """Gradients of the other rank's halves."""
    together: list[int]
    """How many matrices came at once."""

    @property
    def ranks(self) -> int:
        return 2

    def shape(self, rows: Tensor) -> torch.Size:
        return torch.Size((2 * rows.shape[0], rows.shape[1]))

    def apply(
        self,
        parts: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        whole: Callable[[Tensor], Tensor],
    ) -> list[Tensor]:
        """What the first step's look ahead is of a gradient: g * (1 - b) * (1 + b)."""
        first = sum(self.together)
        self.together.append(len(parts))
        found = []
        for part, shape, lower in zip(parts, shapes, self.lower[first:], strict=False):
            matrix = torch.cat([part, (1 - 0.95) * (1 + 0.95) * lower])
            assert matrix.shape == shape
            found.append(whole(matrix)[: len(part)].clone())
        return found


def test_rows_of_matrices_move_as_the_whole_would() -> None:
    """By turns of two, at the rate of the whole's shape; experts are whole already."""
    shapes = [(8, 12), (32, 4), (6, 6), (4, 20), (18, 2)]
    grads = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    halves = Halves([g.chunk(2)[1] for g in grads], [])
    upper = [torch.nn.Parameter(torch.ones_like(g.chunk(2)[0])) for g in grads]
    experts = torch.nn.Parameter(torch.ones(2, 8, 4))
    for p, grad in zip(upper, grads, strict=True):
        p.grad = grad.chunk(2)[0].clone()
    experts.grad = random(2, 8, 4, seed=9)
    before = [*upper[:3], experts, *upper[3:]]
    Muon(before, 0.1, weight_decay=0.5, owners=halves).step()
    assert halves.together == [2, 2, 1]
    for p, grad in zip(upper, grads, strict=True):
        expected = 1 + moved(torch.ones_like(grad), [grad], weight_decay=0.5)
        torch.testing.assert_close(p.detach(), expected.chunk(2)[0], atol=1e-5, rtol=1e-4)
    alone = 1 + moved(torch.ones(2, 8, 4), [random(2, 8, 4, seed=9)], weight_decay=0.5)
    torch.testing.assert_close(experts.detach(), alone)


def test_momentum_is_what_a_checkpoint_takes_along() -> None:
    grads = [random(2, 8, 4, seed=s) for s in (1, 2, 3)]
    at_once = moved(torch.zeros(2, 8, 4), grads)
    p = torch.nn.Parameter(torch.zeros(2, 8, 4))
    muon = Muon([p], 0.1)
    for grad in grads:
        resumed = Muon([p], 0.1)
        resumed.load_state_dict(muon.state_dict())
        muon, p.grad = resumed, grad.clone()
        muon.step()
    assert torch.equal(p.detach(), at_once)


@pytest.mark.skipif(bool(native.missing()), reason="there is no C++ compiler")
@pytest.mark.parametrize("idle", ["rest", "move"])
@pytest.mark.parametrize(
    "shape", [(5, 24, 40), (3, 40, 24), (2, 300, 13), (4, 1, 9), (0, 4, 4)]
)
def test_the_operator_takes_the_same_steps(
    shape: tuple[int, ...], idle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C++ and torch, over gradients of which some are idle and one is no whole tensor."""
    grads = [random(*shape, seed=s) for s in range(3)] + [random(*shape).mT.contiguous().mT]
    for i in range(min(2, shape[0])):
        grads[1 + i][i] = 0
    how: dict = {"idle_experts": idle, "weight_decay": 0.3, "transposed": True}
    calls = []
    real = torch.ops.trinity_native.muon
    monkeypatch.setattr(
        torch.ops.trinity_native, "muon", lambda *a: calls.append(a[0].shape) or real(*a)
    )
    found = moved(random(*shape, seed=9), grads, **how)
    assert calls == [shape] * 4
    monkeypatch.setattr(native, "missing", lambda: "it is left out")
    expected = moved(random(*shape, seed=9), grads, **how)
    assert len(calls) == 4
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(bool(native.missing()), reason="there is no C++ compiler")
def test_the_operator_is_sound() -> None:
    """What it says of what it changes, its fake and its registration."""
    tensors = [random(3, 8, 12, seed=s) for s in range(3)]
    settings = (0.95, 0.1, 0.0, 5, True, NEWTON_SCHULZ)
    opcheck(torch.ops.trinity_native.muon.default, (*tensors, *settings))
    with pytest.raises(RuntimeError, match="one shape"):
        torch.ops.trinity_native.muon(tensors[0], tensors[1][:2], tensors[2], *settings)


@pytest.mark.skipif(bool(native.missing()), reason="there is no C++ compiler")
def test_the_operators_bits_do_not_depend_on_threads() -> None:
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            grads = [random(7, 24, 40, seed=s) for s in (1, 2)]
            results.append(moved(random(7, 24, 40), grads))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("operator", [True, False])
def test_a_gradient_that_is_no_number_is_not_hidden(operator: bool) -> None:
    grad = random(3, 8, 4)
    grad[1, 2, 3] = float("nan")
    p = torch.nn.Parameter(random(3, 8, 4, seed=1))
    muon, p.grad = Muon([p], 0.1, native=operator), grad
    muon.step()
    assert p.detach()[1].isnan().all() and p.detach()[[0, 2]].isfinite().all()
    assert muon.state[p]["momentum"][1, 2, 3].isnan()


@pytest.mark.parametrize("operator", [True, False])
def test_a_backward_through_weights_that_moved_is_refused(operator: bool) -> None:
    p = torch.nn.Parameter(random(3, 8, 4))
    x = random(3, 8, 4, seed=1).requires_grad_()
    y = (p * x).sum()
    p.grad = random(3, 8, 4, seed=2)
    Muon([p], 0.1, native=operator).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_large_matrices_are_multiplied_through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.ops.trinity.product
    monkeypatch.setattr(
        torch.ops.trinity, "product", lambda *pair: calls.append(len(pair[0])) or real(*pair)
    )
    found = orthogonalise(random(176, 192))
    assert calls == [176] * 15
    monkeypatch.setattr(onednn, "AVAILABLE", False)
    torch.testing.assert_close(found, orthogonalise(random(176, 192)), atol=1e-5, rtol=1e-4)
