"""Activations of models small enough to add up by hand; against autograd: test_footprint."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_lib import activations
from trinity_lib.attention import AttentionConfig
from trinity_lib.model import ModelConfig
from trinity_lib.routing import RouterConfig

D, DENSE, HIDDEN, E, K = 10, 7, 6, 5, 2
"""Widths of the model, of its dense layer and of an expert; experts, and a token's."""
HEADS, SHARED, HEAD = 3, 1, 4
"""Query heads, key heads, and their width."""


def model(window: int = 16, top_k: int = K, **changes: Any) -> ModelConfig:
    """One dense layer, then two with experts; the last attends to everything."""
    given: dict[str, Any] = {
        "vocab_size": 300,
        "width": D,
        "num_layers": 3,
        "num_dense_layers": 1,
        "dense_width": DENSE,
        "expert_width": HIDDEN,
        "global_every": 3,
        "attention": AttentionConfig(
            num_heads=HEADS, num_kv_heads=SHARED, head_dim=HEAD, window=window
        ),
        "router": RouterConfig(num_experts=E, top_k=top_k),
    }
    return ModelConfig(**(given | changes))


def attention(keys: int, repeats: int) -> int:
    """Of a layer whose queries see rows of so many keys, laid out so often."""
    precise = [
        1,  # the root of the norm before
        D, 1,  # the norm behind: what it is given, and its root
        HEADS * HEAD, SHARED * HEAD,  # queries and keys before their norms
        HEADS, SHARED,  # those norms' roots
        HEADS,  # the log-sum of each query
    ]  # fmt: skip
    half = [
        4 * D,  # the normed input of four projections
        HEADS * HEAD,  # queries
        2 * repeats * HEADS * HEAD,  # keys and values of all heads
        keys,  # the mask
        3 * HEADS * HEAD,  # the output, the gate, their product
    ]
    return 4 * sum(precise) + 2 * sum(half)


def dense(hidden: int) -> int:
    return 2 * (D + D + 4 * hidden)


NORMS = 4 * (D + 1 + D + 1)
"""Around what follows attention: an input and a root, before and behind."""
ROUTER = 4 * (D + E) + 8 * K + 8 * K + 4
EXPERTS = 2 * (D + 2 * K * HIDDEN) + 8 * 2 * K
EXCHANGED = 2 * 2 * K * HIDDEN + 8 * 2 * K + K * (2 * D + 4 * D + 2 * 8 + 4)


def test_attention_by_hand() -> None:
    config = model()
    for layer in range(3):
        assert activations.kept_by_attention(config, 12, layer) == attention(12, 1)


def test_windows_in_blocks_lay_keys_out_twice() -> None:
    """Blocks of 32 queries see 64 keys: over 200 tokens less than all, over 100 not."""
    config = model()
    assert activations.kept_by_attention(config, 200, 0) == attention(64, 2)
    assert activations.kept_by_attention(config, 200, 2) == attention(200, 1)  # global
    assert activations.kept_by_attention(config, 64, 0) == attention(64, 1)
    wide = model(window=50)
    assert activations.kept_by_attention(wide, 200, 1) == attention(100, 2)


def test_a_dense_layer_by_hand() -> None:
    assert activations.kept_by_dense(D, DENSE) == dense(DENSE) == 2 * 2 * 10 + 4 * 2 * 7


def test_experts_by_hand() -> None:
    assert activations.kept_by_experts(model(), False) == ROUTER + EXPERTS
    assert activations.kept_by_experts(model(), True) == ROUTER + EXCHANGED


def test_blocks_by_hand() -> None:
    parts = attention(12, 1) + NORMS
    blocks = activations.kept_by_blocks(model(), 12, False)
    sparse = parts + ROUTER + EXPERTS + dense(HIDDEN)
    assert blocks == (parts + dense(DENSE), sparse, sparse)
    for shared in (0, 2, 3):
        config = model(num_shared_experts=shared)
        extra = dense(shared * HIDDEN) if shared else 0
        kept = activations.kept_by_block(config, 1, 12, True)
        assert kept == parts + ROUTER + EXCHANGED + extra


def test_a_model_by_hand() -> None:
    inputs = 4 * D * (3 + 1) + 4 + 2 * D  # three blocks', the last's output, its normed copy
    tables = 12 + 12 + 2 * 4 * HEAD  # two masks of bytes, cosines, sines
    blocks = sum(activations.kept_by_blocks(model(), 12, False))
    kept = activations.kept(model(), 12, recompute=False, exchanged=False)
    assert kept == inputs + tables + blocks
    routing = 2 * (4 * E + (8 + 4) * K)  # of two layers
    for exchanged in (False, True):
        again = activations.kept(model(), 12, recompute=True, exchanged=exchanged)
        assert again == inputs + tables + routing


@pytest.mark.parametrize(("length", "mask"), [(12, 12), (200, 64)])
def test_masks_that_layers_share(length: int, mask: int) -> None:
    """Where every layer attends to everything there is one."""

    def context(config: ModelConfig) -> int:
        kept = activations.kept(config, length, recompute=True, exchanged=False)
        return kept - (4 * D * 4 + 4 + 2 * D) - 2 * (4 * E + 12 * K)

    assert context(model()) == length + mask + 8 * HEAD
    assert context(model(global_every=1)) == 2 * length + 8 * HEAD


def test_gradients_in_flight_are_of_the_widest_operator() -> None:
    queries = 5 * 2 * HEADS * HEAD  # 120
    routed = 4 * 2 * K * (D + HIDDEN)  # 256
    assert activations.moving(model()) == routed > queries
    assert activations.moving(model(dense_width=99)) == 4 * 2 * 99
    assert activations.moving(model(num_shared_experts=9)) == 4 * 2 * 9 * HIDDEN
    heads = AttentionConfig(num_heads=9, num_kv_heads=1, head_dim=HEAD, window=16)
    assert activations.moving(model(attention=heads)) == 5 * 2 * 9 * HEAD
    only = model(num_dense_layers=3, top_k=E)
    assert activations.moving(only) == queries  # no experts, however many are chosen


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 400),
    window=st.integers(1, 80),
    top_k=st.integers(1, E),
    exchanged=st.booleans(),
)
def test_recomputing_and_one_rank_keep_less(
    length: int, window: int, top_k: int, exchanged: bool
) -> None:
    config = model(window, top_k)
    kept = activations.kept(config, length, recompute=False, exchanged=exchanged)
    assert isinstance(kept, int)
    again = activations.kept(config, length, recompute=True, exchanged=exchanged)
    assert 0 < again < kept
    here, there = (activations.kept_by_experts(config, flag) for flag in (False, True))
    assert there - here == top_k * (6 * D + 20) - 2 * D > 0
    blocks = activations.kept_by_blocks(config, length, exchanged)
    each = [activations.kept_by_block(config, i, length, exchanged) for i in range(3)]
    assert list(blocks) == each


def test_wider_models_keep_more() -> None:
    config = model()
    for name in ("width", "dense_width", "expert_width", "num_layers"):
        wider = dataclasses.replace(config, **{name: getattr(config, name) + 1})
        kept = [
            activations.kept(c, 12, recompute=False, exchanged=True) for c in (config, wider)
        ]
        assert kept[1] > kept[0], name
