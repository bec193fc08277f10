"""Which optimiser has what, at which rate, and schedules at points worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trinity_lib import optim
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.muon import Muon, orthogonalise
from trinity_lib.optim import OptimConfig, Phase


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
        ({"clip": math.inf * 0}, "clip is nan; it must be a finite number"),
    ],
)
def test_bad_settings(changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        OptimConfig(**changes)


def test_a_step_of_the_built_optimisers_has_every_matrixs_own_rate(
    tiny_model: ModelConfig,
) -> None:
    """Fans as the layers use them: the down projection's are those of its transpose."""
    model = Trinity(tiny_model)
    model.initialise(torch.Generator().manual_seed(0))
    muon, adamw = optim.build(model, OptimConfig(muon_rate=0.01, adamw_rate=0.002))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for i, p in enumerate(model.parameters()):
        p.grad = random(*p.shape, seed=i)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    muon.step()
    adamw.step()
    D, hidden, dense = 32, 16, 64
    factors = {
        "attention.query": 1.0,  # 32 -> 32
        "attention.key": 1.0,  # 32 -> 16
        "dense.gate": math.sqrt(dense / D),
        "dense.down": 1.0,
        "shared.down": math.sqrt(D / hidden),
        "experts.gate_EFD": 1.0,
        "experts.up_EFD": 1.0,
        "experts.down_EFD": math.sqrt(D / hidden),
    }
    checked = set()
    for name, p in model.named_parameters():
        change = p.detach() - before[name]
        matching = [key for key in factors if key in name and "norm" not in name]
        if matching:
            checked |= set(matching)
            # the first gradient through Nesterov momentum is the gradient, scaled
            expected = -0.01 * factors[matching[0]] * orthogonalise(grads[name])
            torch.testing.assert_close(change, expected, atol=2e-5, rtol=1e-2)
        elif name.split(".")[0] in ("embedding", "head", "norm") or "norm" in name:
            expected = -0.002 * grads[name].sign()  # AdamW's first step
            torch.testing.assert_close(change, expected, atol=2e-6, rtol=1e-3)
    assert checked == set(factors)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_parameter_is_in_one_group_and_gains_do_not_decay(
    tiny_model: ModelConfig, optimizer: str
) -> None:
    model = Trinity(tiny_model)
    built = optim.build(model, OptimConfig(optimizer=optimizer, weight_decay=0.1))
    assert len(built) == (2 if optimizer == "muon" else 1)
    seen = [id(p) for o in built for g in o.param_groups for p in g["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    for group in (g for o in built for g in o.param_groups):
        dims = {p.dim() for p in group["params"]}
        assert group["weight_decay"] == (0.0 if dims == {1} else 0.1)


@pytest.mark.parametrize(
    ("phase", "step", "share"),
    [
        # cosine from 1 to 0.2 over 8 steps, a quarter of the way: 0.2 + 0.8 (1 + cos 45)/2
        (0, 2, 0.2 + 0.4 * (1 + math.sqrt(0.5))),
        (0, 4, 0.6),
        # constant keeps the cosine's end; two warm-up steps start at half of it
        (1, 0, 0.1),
        (1, 1, 0.2),
        (1, 7, 0.2),
        # linear from 0.2 to 0.6, with a warm-up on top: (0.2 + 0.4 * 2/8) * 3/4
        (2, 2, 0.225),
        (2, 6, 0.5),
        # cosine down from the line's end
        (3, 0, 0.6),
        (3, 4, 0.3),
    ],
)
def test_rates_carry_across_phases(phase: int, step: int, share: float) -> None:
    phases = (
        Phase(tokens=80, batch=1, shape="cosine", end=0.2),
        Phase(tokens=80, batch=1, warmup=2, end=0.9),
        Phase(tokens=80, batch=1, shape="linear", end=0.6, warmup=4),
        Phase(tokens=80, batch=1, shape="cosine", end=0.0),
    )
    assert optim.rate(iter(phases), phase, step, 8) == pytest.approx(share, abs=1e-12)


@hypothesis_settings(deadline=None)
@given(
    st.integers(1, 5000),
    st.integers(1, 9),
    st.integers(1, 40),
    st.none() | st.tuples(st.floats(0, 1), st.integers(1, 20)),
)
def test_steps_cover_a_phases_tokens_and_no_step_is_spare(
    tokens: int, batch: int, length: int, larger: tuple[float, int] | None
) -> None:
    grows = None
    if larger is not None and 0 < int(larger[0] * tokens) < tokens:
        grows = (int(larger[0] * tokens), larger[1])
    phase = Phase(tokens=tokens, batch=batch, larger_batch=grows)
    steps = optim.phase_steps(phase, length)
    sizes = [optim.batch_rows(phase, s, length) * length for s in range(steps)]
    assert sum(sizes) >= tokens > sum(sizes[:-1])
    seen = 0
    for size in sizes:
        assert size == (batch if grows is None or seen < grows[0] else grows[1]) * length
        seen += size
