"""Routing of stages: hand counts, plain loops, padding that counts for nothing."""

import copy

import numpy as np
import pytest
import torch

from trinity_lib import stage_routing
from trinity_lib.config import BadValue
from trinity_lib.data import IGNORE, Batch
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.stage_routing import Look

CHANGE = [("before", "after")]


def rows_of(seed: int, count: int = 6, length: int = 24, highest: int = 384) -> Batch:
    """Rows of two documents each; the last quarter of every other row is padding."""
    rng = np.random.default_rng(seed)
    tokens_BS = rng.integers(highest, size=(count, length))
    documents_BS = np.tile(np.arange(length) >= length // 3, (count, 1)).astype(np.int64)
    targets_BS = np.roll(tokens_BS, -1, 1)
    targets_BS[:, [length // 3 - 1, -1]] = IGNORE
    for part in (targets_BS, documents_BS):
        part[::2, -(length // 4) :] = IGNORE
    return Batch(tokens_BS, targets_BS, documents_BS)


@pytest.fixture(scope="module")
def model(tiny_model: ModelConfig) -> Trinity:
    model = Trinity(tiny_model)
    generator = torch.Generator().manual_seed(0)
    model.initialise(generator)
    for router in model.routers():
        router.bias_E.normal_(std=0.02, generator=generator)
    return model


def test_equal_stages_route_alike(model: Trinity) -> None:
    rows = rows_of(0)
    routing, change = stage_routing.routing({"before": model, "after": model}, rows, CHANGE)
    assert (change["saturation"] == 1).all() and (change["chance"] == 2 / 8).all()
    assert (change["divergence"] == 0).all() and (change["load_divergence"] == 0).all()
    for name in ("load", "effective", "token_information"):
        np.testing.assert_array_equal(
            routing[name].sel(stage="before"), routing[name].sel(stage="after")
        )
    assert np.isnan(routing["label_information"]).all()
    assert routing["layer"].values.tolist() == [1, 2, 3]
    assert change["change"].values.tolist() == ["before -> after"]


def test_a_permuted_router_by_hand(model: Trinity) -> None:
    """Experts 0 and 1 change places in the last layer: their tokens move, no others'."""
    other = copy.deepcopy(model)
    swap = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    router = other.blocks[3].router
    with torch.no_grad():
        router.weight_ED.copy_(router.weight_ED[swap])
        router.bias_E.copy_(router.bias_E[swap])
    rows = rows_of(1)
    models = {"before": model, "after": other}
    routing, change = stage_routing.routing(models, rows, CHANGE)
    chosen = stage_routing.look(model, rows).experts_LPK[2]
    common = 0
    for one in map(set, chosen.tolist()):
        common += len(one & {int(swap[e]) for e in one})
    expected = common / chosen.size
    assert 0.25 < expected < 1
    found = change["saturation"].isel(change=0).values
    assert found == pytest.approx([1, 1, expected])
    before, after = (routing["load"].sel(stage=s, layer=3).values for s in models)
    np.testing.assert_array_equal(after, before[swap.numpy()])
    count = np.bincount(chosen.ravel(), minlength=8)
    p, q = (np.array([(c + 0.5) / (count.sum() + 4) for c in each]) for each in (
        count, count[swap.numpy()]))  # fmt: skip
    kl = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(change["load_divergence"].isel(change=0, layer=2)) == pytest.approx(kl)
    scores = stage_routing.look(model, rows).scores_LPE[2].astype(float)
    share = scores / scores.sum(1, keepdims=True)
    expected = [sum(a * np.log(a / b)) for a, b in zip(share, share[:, swap], strict=True)]
    divergence = float(change["divergence"].isel(change=0, layer=2))
    assert divergence == pytest.approx(np.mean(expected), rel=1e-5)


def test_loads_are_counts_of_valid_tokens(model: Trinity) -> None:
    rows = rows_of(2, count=11)  # more than are run at once
    routing = stage_routing.routing({"before": model, "after": model}, rows, CHANGE)[0]
    valid = rows.documents_BS.ravel() >= 0
    output = model(torch.from_numpy(rows.tokens_BS), torch.from_numpy(rows.documents_BS))
    for layer, routed in enumerate(output.routing):
        chosen = routed.experts_TK.numpy()[valid]
        load = np.bincount(chosen.ravel(), minlength=8) / (valid.sum() * 2 / 8)
        np.testing.assert_allclose(routing["load"][0, layer], load)
        share = load[load > 0] / load.sum()
        effective = np.exp(-(share * np.log(share)).sum())
        assert float(routing["effective"][0, layer]) == pytest.approx(effective)


def test_padding_counts_for_nothing(model: Trinity) -> None:
    rows = rows_of(3)
    other = rows.tokens_BS.copy()
    other[rows.documents_BS < 0] = 7
    more = ((0, 2), (0, 5))  # whole rows of padding, and longer ones
    longer = Batch(
        np.pad(other, more), *(np.pad(part, more, constant_values=IGNORE) for part in rows[1:])
    )
    labels = np.array([0, 0, 1, 1, 2, 2])
    models = {"before": model, "after": model}
    one = stage_routing.routing(models, rows, CHANGE, labels=labels)
    two = stage_routing.routing(models, longer, CHANGE, labels=np.append(labels, [-1, -1]))
    for name in ("load", "effective", "token_information"):
        np.testing.assert_allclose(one[0][name], two[0][name], atol=1e-12)
    np.testing.assert_allclose(one[1]["saturation"], two[1]["saturation"])


def made(experts_LPK: np.ndarray, experts: int) -> Look:
    scores = np.full((*experts_LPK.shape[:2], experts), 0.5, dtype=np.float32)
    return Look(tuple(range(len(experts_LPK))), scores, experts_LPK)


def plain(tokens_BS: np.ndarray) -> Batch:
    return Batch(tokens_BS, tokens_BS, np.zeros_like(tokens_BS))


def test_experts_of_a_label_or_of_a_token_tell_it() -> None:
    rng = np.random.default_rng(0)
    tokens_BS = rng.integers(4, size=(40, 50))
    labels = np.arange(40) % 4
    by_label = np.repeat(labels, 50)[None, :, None]
    by_token = tokens_BS.reshape(1, -1, 1)
    nothing = rng.integers(4, size=(1, 2000, 1))
    looks = {
        name: made(each, 4)
        for name, each in (("label", by_label), ("token", by_token), ("none", nothing))
    }
    found = stage_routing.described(
        looks, plain(tokens_BS), [("label", "token")], labels=labels, nulls=50
    )[0].isel(layer=0)
    # by chance labels of 40 rows tell rows' own experts some of theirs
    assert float(found["label_information"].sel(stage="label")) == pytest.approx(1.85, abs=0.1)
    assert float(found["token_information"].sel(stage="token")) == pytest.approx(2, abs=0.01)
    for stage, name in (
        ("label", "token"),
        ("token", "label"),
        ("none", "token"),
        ("none", "label"),
    ):
        assert abs(float(found[f"{name}_information"].sel(stage=stage))) < 0.01, (stage, name)


def test_rows_with_experts_of_their_own_tell_no_label() -> None:
    """Tokens of a row go together; permuted one by one they would seem to tell the label."""
    beyond = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        own = rng.integers(8, size=12)  # each row has one expert, whatever its label
        looks = {"a": made(np.repeat(own, 30)[None, :, None], 8)}
        looks["b"] = looks["a"]
        labels = rng.permutation(np.arange(12) % 2)
        tokens = plain(rng.integers(9, size=(12, 30)))
        found = stage_routing.described(looks, tokens, [("a", "b")], labels=labels)[0]
        beyond.append(float(found["label_information"][0, 0]))
    error = np.std(beyond, ddof=1) / 30**0.5
    assert abs(np.mean(beyond)) < 2.5 * error


def test_chance_is_that_of_the_earlier_choices() -> None:
    rng = np.random.default_rng(0)

    def chosen(count: int) -> np.ndarray:
        return np.argsort(rng.random((1, 4000, 16)), -1)[..., :count]

    looks = {"few": made(chosen(2), 16), "many": made(chosen(6), 16)}
    rows = plain(rng.integers(9, size=(80, 50)))
    changes = [("few", "many"), ("many", "few")]
    found = stage_routing.described(looks, rows, changes, nulls=2)[1]
    assert found["chance"].values.ravel().tolist() == [2 / 16, 6 / 16]
    np.testing.assert_allclose(found["saturation"], found["chance"], atol=0.015)


def test_divergences() -> None:
    one, two = np.array([0.2, 0.6]), np.array([1.0, 1.0])  # sums do not matter
    expected = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    assert stage_routing.divergence(one, two) == pytest.approx(expected)
    assert stage_routing.divergence(two, one) != pytest.approx(expected)
    assert np.isfinite(stage_routing.divergence(one, np.array([0.0, 1.0])))
    assert stage_routing.load_divergence([0, 9], [9, 0]) == pytest.approx(0.9 * np.log(19))


def test_what_cannot_be_compared_is_refused(model: Trinity, tiny_model: ModelConfig) -> None:
    from dataclasses import replace

    rows = rows_of(0)
    other = Trinity(replace(tiny_model, router=replace(tiny_model.router, num_experts=4)))
    other.initialise(torch.Generator().manual_seed(0))
    with pytest.raises(BadValue, match="before has layers, tokens and experts .* must have"):
        stage_routing.routing({"before": model, "after": other}, rows, CHANGE)
    with pytest.raises(BadValue, match="it must be below vocab_size"):
        stage_routing.look(model, rows_of(0, highest=900))
    with pytest.raises(BadValue, match="of tokens, not all padding"):
        stage_routing.look(model, rows._replace(documents_BS=np.full((6, 24), IGNORE)))
    with pytest.raises(BadValue, match="labels' shape is .3,.; it must be one a row"):
        stage_routing.routing({"before": model, "after": model}, rows, CHANGE, labels=[0, 1, 2])
    with pytest.raises(BadValue, match="num_dense_layers is 4"):
        stage_routing.look(Trinity(replace(tiny_model, num_dense_layers=4)), rows)
