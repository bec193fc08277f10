"""Muon per matrix and per expert, groups, and schedules at points worked out by hand."""

import math

import pytest
import torch

from trinity_lib import optim
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.optim import Muon, OptimConfig, Phase, orthogonalise


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


def test_what_goes_to_which_optimiser(tiny_model: ModelConfig) -> None:
    model = Trinity(tiny_model)
    names = {id(p): n for n, p in model.named_parameters()}
    matrices, transposed, rest = ([names[id(p)] for p in part] for part in optim.split(model))
    assert len(matrices) + len(transposed) + len(rest) == len(names)
    assert all(n.endswith("down_EFD") for n in transposed) and len(transposed) == 3
    others = [n for n in rest if "norm" not in n]
    routers = [f"blocks.{i}.router.weight_ED" for i in (1, 2, 3)]
    assert sorted(others) == sorted(["embedding.weight", "head.weight", *routers])
    muon, adamw = optim.build(model, OptimConfig())
    assert isinstance(muon, Muon) and adamw.defaults["fused"]
    (only,) = optim.build(model, OptimConfig(optimizer="adamw"))
    assert sum(len(g["params"]) for g in only.param_groups) == len(names)


def test_rates_scale_every_group(tiny_model: ModelConfig) -> None:
    built = optim.build(Trinity(tiny_model), OptimConfig(muon_rate=0.02, adamw_rate=0.004))
    optim.set_rate(built, 0.25)
    assert {g["lr"] for o in built for g in o.param_groups} == {0.005, 0.001}


PHASES = (
    Phase(tokens=1000, batch=2, warmup=4),
    Phase(tokens=1000, batch=2),
    Phase(tokens=1000, batch=2, shape="cosine", end=0.1),
    Phase(tokens=1000, batch=2, shape="linear", end=0.0),
)


@pytest.mark.parametrize(
    ("phase", "step", "share"),
    [
        (0, 0, 0.25),
        (0, 2, 0.75),
        (0, 9, 1.0),
        (1, 5, 1.0),
        (2, 0, 1.0),
        (2, 5, 0.55),
        (2, 10, 0.1),
        (3, 0, 0.1),
        (3, 5, 0.05),
        (3, 10, 0.0),
    ],
)
def test_rates_at_points_worked_out_by_hand(phase: int, step: int, share: float) -> None:
    assert optim.rate(PHASES, phase, step, 10) == pytest.approx(share)


def test_steps_and_rows_of_a_growing_batch() -> None:
    phase = Phase(tokens=1000, batch=2, larger_batch=(400, 4))
    assert optim.phase_steps(Phase(tokens=1000, batch=2), 10) == 50
    assert optim.phase_steps(phase, 10) == 20 + 15
    rows = [optim.batch_rows(phase, s, 10) for s in range(35)]
    assert rows == [2] * 20 + [4] * 15 and sum(rows) * 10 == 1000


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": 0}, "phase.tokens is 0"),
        ({"batch": 0}, "phase.batch is 0"),
        ({"end": 1.5}, "phase.end is 1.5; it must be from 0 to 1"),
        ({"shape": "step"}, "shape is 'step'; it must be one of constant, linear, cosine"),
        ({"mixture": {"a": -1.0}}, "phase.mixture is"),
        ({"larger_batch": [2000, 4]}, "phase.larger_batch is"),
    ],
)
def test_bad_phases(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Phase(**{"tokens": 1000, "batch": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"muon_rate": -1}, "optim.muon_rate is -1.0; it must be above zero"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be one of muon, adamw"),
        ({"adamw_betas": (0.9, 1.0)}, "optim.adamw_betas is"),
        ({"clip": math.inf * 0}, "optim.clip is nan"),
    ],
)
def test_bad_settings(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        OptimConfig(**changes)
