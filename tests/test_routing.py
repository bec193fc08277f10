"""The bias selects and never weighs; scores are fp32; a replay is held to."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from trinity_lib.routing import Router, RouterConfig


def router(bias: list[float] | None = None) -> Router:
    built = Router(RouterConfig(num_experts=5, top_k=2, route_scale=2.448), 8, 0)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(built.weight_ED, std=0.5, generator=generator)
    if bias:
        built.bias_E.copy_(torch.tensor(bias))
    return built


X = torch.randn(7, 8, generator=torch.Generator().manual_seed(1))


def test_weights_are_the_chosen_scores_normalised_and_scaled() -> None:
    plain = router()
    with torch.no_grad():
        routing = plain(X)
    scores = 1 / (1 + torch.exp(-(X @ plain.weight_ED.detach().T)))
    torch.testing.assert_close(routing.scores_TE, scores)
    for t in range(7):
        best = sorted(range(5), key=lambda e: -float(scores[t, e]))[:2]
        assert routing.experts_TK[t].tolist() == best
        expected = scores[t, best] / scores[t, best].sum() * 2.448
        torch.testing.assert_close(routing.weights_TK[t], expected)
    torch.testing.assert_close(routing.weights_TK.sum(-1), torch.full((7,), 2.448))


def test_the_bias_selects_and_never_weighs() -> None:
    biased = router([0, 0, 0, 5.0, -5.0])
    routing = biased(X)
    assert (routing.experts_TK[:, 0] == 3).all() and not (routing.experts_TK == 4).any()
    scores = router()(X).scores_TE
    torch.testing.assert_close(routing.scores_TE, scores)
    chosen = scores.gather(-1, routing.experts_TK)
    expected = chosen / chosen.sum(-1, keepdim=True) * 2.448
    torch.testing.assert_close(routing.weights_TK, expected)


def test_a_balancers_choice_replaces_the_stored_bias() -> None:
    routing = router([0, 0, 0, 5.0, 0])(X, select=lambda scores, layer: -scores)
    assert torch.equal(routing.experts_TK, router()(X).scores_TE.topk(2, largest=False).indices)


def test_a_replay_is_held_to_and_weighs_by_its_own_scores() -> None:
    picks = torch.tensor([[4, 0]] * 7)
    routing = router()(X, experts_TK=picks)
    assert torch.equal(routing.experts_TK, picks)
    chosen = routing.scores_TE[:, [4, 0]]
    torch.testing.assert_close(routing.weights_TK, chosen / chosen.sum(-1, True) * 2.448)


def test_scores_are_fp32_in_a_bf16_model_and_float64_in_a_float64_one() -> None:
    half = router().to(torch.bfloat16)
    scores = half(X.bfloat16()).scores_TE
    assert scores.dtype == torch.float32
    exact = (X.bfloat16().double() @ half.weight_ED.double().T).sigmoid()
    torch.testing.assert_close(scores.double(), exact, atol=1e-6, rtol=0)
    assert router().double()(X.double()).scores_TE.dtype == torch.float64


def test_no_gradient_reaches_the_selection_and_one_reaches_the_scores() -> None:
    built = router()
    built(X).weights_TK[:, 0].sum().backward()
    assert built.weight_ED.grad.abs().sum() > 0 and not built.bias_E.requires_grad


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_experts": 0, "top_k": 1}, "num_experts is 0; it must be at least 1"),
        ({"num_experts": 4, "top_k": 5}, r"top_k is 5; it must be from 1 to num_experts \(4\)"),
        ({"num_experts": 4, "top_k": 0}, "top_k is 0"),
        ({"num_experts": 4, "top_k": 1, "route_scale": 0}, "route_scale is 0.0"),
    ],
)
def test_bad_settings(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RouterConfig(**settings)


@hypothesis_settings(deadline=None)
@given(
    st.lists(st.floats(-3, 3), min_size=5, max_size=5),
    st.integers(1, 5),
    st.floats(0.1, 8),
    st.integers(0, 99),
)
def test_weights_are_the_biased_choices_own_scores(
    bias: list[float], top_k: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    built = Router(RouterConfig(num_experts=5, top_k=top_k, route_scale=scale), 8, 0).double()
    torch.nn.init.normal_(built.weight_ED, generator=generator)
    built.bias_E.copy_(torch.tensor(bias))
    x = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        routing = built(x)
    for t in range(4):
        scores = [1 / (1 + float(torch.exp(-(x[t] @ w)))) for w in built.weight_ED.detach()]
        ranked = [s + b for s, b in zip(scores, built.bias_E.tolist(), strict=True)]
        chosen = routing.experts_TK[t].tolist()
        assert len(set(chosen)) == top_k
        left = [ranked[e] for e in range(5) if e not in chosen]
        assert min(ranked[e] for e in chosen) >= max(left, default=-10.0) - 1e-12
        total = sum(scores[e] for e in chosen)
        expected = [scale * scores[e] / total for e in chosen]
        assert routing.weights_TK[t].tolist() == pytest.approx(expected, rel=1e-9)
        assert sum(routing.weights_TK[t].tolist()) == pytest.approx(scale, rel=1e-9)


def test_autocast_does_not_reach_the_scores() -> None:
    plain = router()
    with torch.no_grad():
        outside = plain(X)
        with torch.autocast("cpu", torch.bfloat16):
            inside = plain(X)
    assert inside.scores_TE.dtype == inside.weights_TK.dtype == torch.float32
    assert torch.equal(inside.scores_TE, outside.scores_TE)


def test_scores_that_vanish_give_finite_weights() -> None:
    plain = router()
    with torch.no_grad():
        plain.weight_ED.fill_(-1000.0)
        routing = plain(torch.ones(2, 8))
    assert not routing.scores_TE.any() and torch.equal(routing.weights_TK, torch.zeros(2, 2))


def test_the_layer_number_reaches_the_balancer() -> None:
    seen = []
    built = Router(RouterConfig(num_experts=5, top_k=2), 8, 7)
    torch.nn.init.normal_(built.weight_ED, generator=torch.Generator().manual_seed(0))
    built(X, select=lambda scores, layer: seen.append((layer, scores.requires_grad)) or scores)
    assert seen == [(7, True)]
