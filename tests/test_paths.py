"""Lines between models: their ends, brute force, and inputs that stay as they are."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.test_stage_routing import rows_of
from trinity_lib import paths
from trinity_lib.config import BadValue
from trinity_lib.data import IGNORE, Batch
from trinity_lib.losses import token_loss
from trinity_lib.model import ModelConfig, Trinity

CHANGE = [("before", "after")]


def model_of(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> Trinity:
    model = Trinity(config)
    generator = torch.Generator().manual_seed(seed)
    model.initialise(generator)
    for router in model.routers():
        router.bias_E.normal_(std=0.1, generator=generator)
    return model.to(dtype)


@pytest.fixture
def models(tiny_model: ModelConfig) -> dict[str, Trinity]:
    return {n: model_of(tiny_model, i) for i, n in enumerate(("before", "after", "third"))}


def plain_loss(model: Trinity, rows: Batch) -> float:
    with torch.no_grad():
        output = model(torch.from_numpy(rows.tokens_BS), torch.from_numpy(rows.documents_BS))
    found = token_loss(output.logits, torch.from_numpy(rows.targets_BS))
    return float(found.cross_entropy / found.tokens)


def test_the_line_ends_at_the_models(models: dict[str, Trinity]) -> None:
    first, second = models["before"], models["after"]
    for alpha, end in ((0.0, first), (1.0, second)):
        there = end.state_dict()
        here = paths.between(first, second, alpha)
        assert set(here) == set(there) and any("bias_E" in name for name in here)
        assert all(torch.equal(here[name], there[name]) for name in there)
    rows = rows_of(0, count=11)
    found = paths.along(models, CHANGE, rows)
    assert found["alpha"].values.tolist() == [-0.5, 0, 0.25, 0.5, 0.75, 1, 1.5]
    ends = found["loss"].sel(change="before -> after", alpha=[0, 1]).values
    assert ends == pytest.approx([plain_loss(first, rows), plain_loss(second, rows)], rel=1e-6)


def test_between_the_ends_weights_and_biases_are_mixed(models: dict[str, Trinity]) -> None:
    first, second = models["before"], models["after"]
    rows = rows_of(1)
    told: list[str] = []
    found = paths.along(
        models, CHANGE, rows, alphas=(0, 0.25, 1), extend=(1.5,), progress=told.append
    )
    for alpha in (0.25, 1.5):
        mixed = copy.deepcopy(first)
        ends = second.state_dict()
        mixed.load_state_dict(
            {n: (1 - alpha) * w + alpha * ends[n] for n, w in first.state_dict().items()}
        )
        here = float(found["loss"].sel(alpha=alpha).squeeze())
        assert here == pytest.approx(plain_loss(mixed, rows), rel=1e-6)
    assert told[1] == "path: before -> after, alpha 0.25" and len(told) == 4
    one = found["loss"].isel(change=0)
    chord = 0.75 * one.sel(alpha=0) + 0.25 * one.sel(alpha=1)
    above = max(0.0, float(one.sel(alpha=0.25) - chord))
    assert float(found["barrier"][0]) == pytest.approx(above)


def test_equal_models_have_no_barrier(models: dict[str, Trinity]) -> None:
    found = paths.along(
        {"before": models["before"], "after": copy.deepcopy(models["before"])},
        CHANGE,
        rows_of(0),
    )
    np.testing.assert_allclose(found["loss"], float(found["loss"][0, 0]), rtol=1e-6)
    assert float(found["barrier"][0]) == pytest.approx(0, abs=1e-6)


def test_a_barrier_is_above_the_chord_and_inside() -> None:
    assert paths.barrier([-0.5, 0, 0.5, 1, 1.5], [9, 1, 3, 3, 9]) == pytest.approx(1)
    assert paths.barrier([0, 0.25, 0.5, 1], [2, 1, 2.5, 4]) == 0
    assert paths.barrier([0, 0.25, 1], [1, 2, 3]) == pytest.approx(0.5)
    assert paths.barrier([0, 1], [2, 1]) == 0
    with pytest.raises(KeyError):
        paths.barrier([0, 0.5], [1, 1])


def test_models_with_permuted_units_have_a_barrier(models: dict[str, Trinity]) -> None:
    """The same function at both ends and another between: what a barrier is of.

    The order of experts and of hidden units is free; averaging does not know it.
    """
    first = models["before"]
    with torch.no_grad():  # logits of some size, so that the function between shows
        first.head.weight.mul_(20)
    second = copy.deepcopy(first)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for block in second.blocks:
            if block.router is None:
                continue
            order = torch.randperm(8, generator=generator)
            for weight in (*block.experts.parameters(), block.router.weight_ED):
                weight.copy_(weight[order])
            block.router.bias_E.copy_(block.router.bias_E[order])
    rows = rows_of(2)
    logits = first(torch.from_numpy(rows.tokens_BS), torch.from_numpy(rows.documents_BS)).logits
    likeliest = logits.argmax(-1).numpy()
    rows = rows._replace(targets_BS=np.where(rows.targets_BS == IGNORE, IGNORE, likeliest))
    found = paths.along({"before": first, "after": second}, CHANGE, rows)
    low, high = found["loss"].sel(alpha=[0, 1]).isel(change=0).values
    assert low == pytest.approx(high, rel=1e-4)
    assert float(found["barrier"][0]) > 0.1


def test_nothing_that_is_given_changes(models: dict[str, Trinity]) -> None:
    rows = rows_of(3)
    kept = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    held = {name: [p.data_ptr() for p in model.parameters()] for name, model in models.items()}
    tokens = [part.copy() for part in rows]
    paths.along(models, [("before", "after"), ("after", "third")], rows)
    vector = paths.task_vector(models["before"], models["after"])
    before = {name: tensor.clone() for name, tensor in vector.items()}
    paths.edited(models["third"], vector, 0.5)
    paths.tasks(models, [("before", "after", "third")], {"all": rows})
    bad = paths.between(models["before"], models["after"], 0.5)
    bad["head.weight"] = bad["head.weight"][:, :3]
    with pytest.raises(RuntimeError):  # also when a forward pass fails
        paths.loss(models["before"], rows, bad)
    for name, model in models.items():
        assert [p.data_ptr() for p in model.parameters()] == held[name]
        assert all(torch.equal(w, kept[name][key]) for key, w in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in vector.items())
    assert all((a == b).all() for a, b in zip(rows, tokens, strict=True))


def test_task_vectors_add_and_take_away(models: dict[str, Trinity]) -> None:
    vector = paths.task_vector(models["before"], models["after"])
    there = models["after"].state_dict()
    back = paths.edited(models["before"], vector, 1.0).state_dict()
    start = paths.edited(models["after"], vector, -1.0).state_dict()
    for name, weight in models["before"].state_dict().items():
        torch.testing.assert_close(back[name], there[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(start[name], weight, rtol=0, atol=1e-6)
    rows = {"one": rows_of(4), "two": rows_of(5)}
    found = paths.tasks(models, [("before", "after", "third")], rows, scales=(-1, 0, 0.5))
    assert found["task"].values.tolist() == ["third + (after - before)"]
    for scale in (-1, 0, 0.5):
        edited = paths.edited(models["third"], vector, scale)
        for domain, each in rows.items():
            here = float(found["loss"].sel(scale=scale, domain=domain).squeeze())
            assert here == pytest.approx(plain_loss(edited, each), rel=1e-6)


def test_a_change_may_be_scaled_on_its_own_ends(models: dict[str, Trinity]) -> None:
    sums = [("before", "after", "before"), ("before", "after", "after")]
    rows = rows_of(4)
    loss = paths.tasks(models, sums, {"all": rows}, scales=(-1, 0, 1))["loss"].squeeze()
    first, second = (plain_loss(models[name], rows) for name in ("before", "after"))
    assert loss[0, 1:].values == pytest.approx([first, second], rel=1e-5)
    assert loss[1, :2].values == pytest.approx([first, second], rel=1e-5)
    with pytest.raises(BadValue, match="arithmetic is 'x'; it must be of stages before, after"):
        paths.tasks(models, [("before", "after", "x")], {"all": rows})


def test_steps_below_bf16_are_kept_between(tiny_model: ModelConfig) -> None:
    first = model_of(tiny_model, 0, torch.bfloat16)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.head.weight.mul_(1.0625)
    here = paths.between(first, second, 0.5)["head.weight"]
    assert here.dtype == torch.float32
    torch.testing.assert_close(here, first.head.weight.float() * 1.03125, rtol=1e-2, atol=0)
    assert paths.loss(first, rows_of(0), paths.between(first, second, 0.0)) == pytest.approx(
        paths.loss(first, rows_of(0))
    )


def test_what_cannot_be_mixed_is_refused(models: dict, tiny_model: ModelConfig) -> None:
    rows, first = rows_of(0), models["before"]
    with pytest.raises(BadValue, match="alphas is .0, 0.5.; it must be from 0 to 1, both"):
        paths.along(models, CHANGE, rows, alphas=[0, 0.5])
    with pytest.raises(BadValue, match="extend is .0.5.; it must be below 0 or above 1"):
        paths.along(models, CHANGE, rows, extend=[0.5])
    other = model_of(replace(tiny_model, vocab_size=400), 0)
    with pytest.raises(BadValue, match=r"embedding.weight has shape \[384, 32\] in one"):
        paths.between(first, other, 0.5)
    scaled = replace(tiny_model, router=replace(tiny_model.router, route_scale=3.0))
    with pytest.raises(BadValue, match="settings differ: router.route_scale is 3.0 and was 2"):
        paths.task_vector(first, model_of(scaled, 0))
    paths.task_vector(first, model_of(replace(tiny_model, max_positions=99), 0))
    vector = paths.task_vector(first, first)
    with pytest.raises(BadValue, match="embedding.weight differs in shape between the task"):
        paths.added(other, vector, 1.0)
    nothing = rows._replace(targets_BS=np.full_like(rows.targets_BS, IGNORE))
    with pytest.raises(BadValue, match="of tokens with a next one to predict"):
        paths.loss(first, nothing)
