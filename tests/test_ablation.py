"""An expert is gone while it is to be gone, and what that does is told beside the others."""

import copy

import numpy as np
import pytest
import torch

from tests import conversing
from trinity_lib import ablation
from trinity_lib.ablation import Ablation, Mode
from trinity_lib.config import BadValue
from trinity_lib.model import ModelConfig, Trinity

TOKENS_BS = torch.randint(0, 384, (3, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def loss(model: Trinity) -> float:
    logits = model(TOKENS_BS).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.mT, TOKENS_BS[:, 1:]))


def same(model: Trinity, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


@pytest.fixture
def model(tiny_model: ModelConfig) -> Trinity:
    """Expert 3 of layer 2 is chosen by no token."""
    made = conversing.model(tiny_model)
    made.blocks[2].router.bias_E[3] = -5.0  # scores are below 1
    return made


def test_rerouted_tokens_take_their_next_best(model: Trinity) -> None:
    before = model(TOKENS_BS).routing[1]
    bias_E = model.blocks[2].router.bias_E.clone()
    with ablation.without(model, 2, 5) as changed:
        after = changed(TOKENS_BS).routing[1]
    assert torch.equal(before.scores_TE, after.scores_TE)  # nothing before it has moved
    ranking_TE = (before.scores_TE + bias_E).argsort(-1, descending=True)
    for ranking, taken in zip(ranking_TE.tolist(), after.experts_TK.tolist(), strict=True):
        ranking.remove(5)
        assert taken == ranking[:2]
    assert torch.equal(model(TOKENS_BS).routing[1].experts_TK, before.experts_TK)


def test_a_zeroed_expert_keeps_its_tokens_and_adds_nothing(model: Trinity) -> None:
    other = copy.deepcopy(model)
    other.blocks[2].experts.down_EFD.data[5] = 0
    before = model(TOKENS_BS)
    with ablation.without(model, 2, 5, "zero") as changed:
        found = changed(TOKENS_BS)
    assert torch.equal(found.logits, other(TOKENS_BS).logits)
    assert not torch.equal(found.logits, before.logits)
    assert torch.equal(found.routing[1].experts_TK, before.routing[1].experts_TK)


@pytest.mark.parametrize("mode", ["reroute", "zero"])
def test_the_model_is_whole_again_after_an_exception(model: Trinity, mode: Mode) -> None:
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="stop"), ablation.without(model, 1, 0, mode):
        assert not same(model, state)
        raise RuntimeError("stop")
    assert same(model, state)
    calls = []

    def stops(asked: Trinity) -> float:
        calls.append(asked(TOKENS_BS))
        if len(calls) == 3:
            raise RuntimeError("stop")
        return 0.0

    with pytest.raises(RuntimeError, match="stop"):
        ablation.effects(model, {"stops": stops}, mode=mode)
    assert same(model, state)
    assert not any(router._forward_hooks for router in model.routers())


@pytest.mark.parametrize("mode", ["reroute", "zero"])
def test_effects_are_differences_and_of_unused_experts_exactly_0(
    model: Trinity, mode: Mode
) -> None:
    calls = []

    def counted(asked: Trinity) -> float:
        calls.append(None)
        return loss(asked)

    found = ablation.effects(model, {"loss": counted}, mode=mode)
    routing = model(TOKENS_BS).routing
    chosen_LE = [torch.bincount(r.experts_TK.flatten(), minlength=8).numpy() for r in routing]
    assert np.array_equal(found.used_MLE[0], np.array(chosen_LE) / TOKENS_BS.numel())
    assert len(calls) == 1 + np.count_nonzero(chosen_LE) <= 24
    assert found.layers == (1, 2, 3) and found.whole_M[0] == loss(model)
    unused = 0
    for number, layer in enumerate(found.layers):
        for expert in range(8):
            with ablation.without(model, layer, expert, mode):
                apart = loss(model) - found.whole_M[0]
            assert found.effect_MLE[0, number, expert] == apart
            if not found.used_MLE[0, number, expert]:
                assert apart == 0
                unused += 1
    assert unused >= 1 and found.used_MLE[0, 1, 3] == 0


def test_an_expert_without_output_changes_nothing_when_zeroed(model: Trinity) -> None:
    model.blocks[3].experts.down_EFD.data[2] = 0
    found = ablation.effects(model, {"loss": loss}, mode="zero")
    assert found.effect_MLE[0, 2, 2] == 0 < found.used_MLE[0, 2, 2]
    assert np.count_nonzero(found.effect_MLE) == np.count_nonzero(found.used_MLE) - 1


def test_an_expert_that_carries_a_planted_answer_stands_out(model: Trinity) -> None:
    """One expert writes towards a token; all others whisper."""
    expert = int(model(TOKENS_BS).routing[1].experts_TK[5, 0])
    with torch.no_grad():
        for layer in (1, 2, 3):
            model.blocks[layer].experts.down_EFD.mul_(0.02)
        model.blocks[2].experts.down_EFD[expert] = model.head.weight[7] * 3

    def says_7(asked: Trinity) -> float:
        return float(asked(TOKENS_BS).logits.log_softmax(-1)[0, 5, 7])

    for mode in ("reroute", "zero"):
        found = ablation.effects(model, {"says 7": says_7, "loss": loss}, mode=mode)
        assert found.rank_MLE[0, 1, expert] == 1 and abs(found.z_MLE[0, 1, expert]) > 10


def test_rank_and_z_are_among_the_experts_used() -> None:
    effect = np.array([[[0.0, -4.0, 1.0], [2.0, 1.0, 0.0]]])
    used = np.array([[[0.0, 1.0, 1.0], [0.5, 0.5, 1.0]]])
    found = Ablation(("m",), (1, 2), np.zeros(1), effect, used)
    right = [[[np.nan, 1, 3.5], [2, 3.5, 5]]]
    assert np.array_equal(found.rank_MLE, right, equal_nan=True)
    others = np.array([1.0, 2.0, 1.0, 0.0])
    assert found.z_MLE[0, 0, 1] == pytest.approx((-4 - others.mean()) / others.std(ddof=1))
    assert np.isnan(found.z_MLE[0, 0, 0]) and np.isfinite(found.z_MLE).sum() == 5
    alike = found._replace(effect_MLE=np.ones((1, 2, 3)))
    assert np.isnan(alike.z_MLE).all() and np.nanmax(alike.rank_MLE) == 3
    alone = found._replace(used_MLE=np.array([[[0, 1.0, 1.0], [0, 0, 0]]]))
    assert np.isnan(alone.z_MLE).all()


def test_stages_stand_side_by_side(model: Trinity) -> None:
    one = ablation.effects(model, {"loss": loss, "more": lambda m: 2 * loss(m)})
    group = ablation.dataset({"base": one, "instruct": one})
    assert group.effect.dims == ("ablated", "measure", "layer", "expert")
    assert group.layer.values.tolist() == [1, 2, 3]
    at = group.effect.sel(ablated="base", layer=2, expert=5)
    assert at.sel(measure="more").item() == pytest.approx(2 * at.sel(measure="loss").item())
    assert np.allclose(group.used.sum("expert"), 2)
    with pytest.raises(BadValue, match="same measures and experts"):
        ablation.dataset({"a": one, "b": one._replace(measures=("loss", "less"))})


def test_what_is_no_expert_is_refused(model: Trinity, tiny_model: ModelConfig) -> None:
    for layer, expert, mode, match in (
        (0, 0, "reroute", "layer is 0"),
        (4, 0, "zero", "layer is 4"),
        (1, 8, "zero", "expert is 8"),
        (1, -1, "zero", "expert is -1"),
        (1, 0, "mute", "mode is 'mute'"),
    ):
        with pytest.raises(BadValue, match=match), ablation.without(model, layer, expert, mode):
            pass
    with pytest.raises(BadValue, match="measures is 0"):
        ablation.effects(model, {})
    with pytest.raises(BadValue, match="measure deaf is 'without a token'"):
        ablation.effects(model, {"deaf": lambda _: 1.0})
    with pytest.raises(BadValue, match="measure odd is nan"):
        ablation.effects(model, {"odd": lambda m: float("nan") * loss(m)})
