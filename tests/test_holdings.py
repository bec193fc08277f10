"""Parameters by kind on every rank of a model small enough to count by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distributed import small
from trinity_lib import footprint, parallel, trace
from trinity_lib.attention import AttentionConfig
from trinity_lib.holdings import KINDS, Held, count_held
from trinity_lib.mesh import ParallelConfig
from trinity_lib.model import ModelConfig, Trinity


def held(config: ModelConfig, **layout: int) -> Held:
    split = ParallelConfig(**layout)
    with trace.pretended(split) as ranks:
        sharded = parallel.shard(config, ranks, device="meta")
        return count_held(sharded, split)


def by_kind(numbers: np.ndarray) -> dict[str, int]:
    return dict(zip(KINDS, numbers.tolist(), strict=True))


WHOLE = {
    "embedding": 383 * 32,
    "head": 383 * 32,
    # three layers; queries 3 x 6, keys and values 6, a gate like the queries, and out
    "attention": 3 * (18 + 6 + 6 + 18 + 18) * 32,
    "dense": 3 * 61 * 32,
    "router": 2 * 5 * 32,
    "shared": 2 * 3 * 16 * 32,
    "experts": 2 * 5 * 3 * 16 * 32,
    # four of a layer's width 32 and two of a head's 6; the last
    "norms": 3 * (4 * 32 + 2 * 6) + 32,
}


def test_the_whole_is_counted_by_hand() -> None:
    found = held(small(), shard=2)
    assert by_kind(found.whole) == WHOLE
    with torch.device("meta"):
        assert found.whole.sum() == sum(p.numel() for p in Trinity(small()).parameters())


def test_two_expert_ranks_by_hand() -> None:
    """383 tokens are 192 and 191 rows, 61 are 31 and 30, 5 experts 3 and 2."""
    found = held(small(), shard=2, experts=2)
    expected = []
    for tokens, dense, experts in ((192, 31, 3), (191, 30, 2)):
        expected.append(
            WHOLE
            | {
                "embedding": tokens * 32,
                "head": tokens * 32,
                "attention": WHOLE["attention"] // 2,
                # gate and up [61, 32] by their rows, down [32, 61] by its
                "dense": 2 * dense * 32 + 16 * 61,
                "router": 2 * experts * 32,
                "shared": WHOLE["shared"] // 2,
                "experts": 2 * experts * 3 * 16 * 32,
                "norms": WHOLE["norms"] // 2,
            }
        )
    assert [by_kind(numbers) for numbers in found.every] == expected
    assert by_kind(found.rank_0) == expected[0]


def test_experts_are_split_over_expert_ranks_first() -> None:
    """5 over two are 3 and 2; those over two more ranks 2 and 1, 1 and 1; ranks alternate."""
    found = held(small(), shard=4, experts=2)
    each = 2 * 3 * 16 * 32
    experts = found.every[:, KINDS.index("experts")]
    assert experts.tolist() == [2 * each, 1 * each, 1 * each, 1 * each]
    alone = held(small(), shard=4)  # every rank computes with all: 2, 2, 1 and none
    assert alone.every[:, KINDS.index("experts")].tolist() == [2 * each, 2 * each, each, 0]
    assert alone.whole.tolist() == found.whole.tolist()


@pytest.mark.parametrize("replicate", [2, 3])
def test_replicas_hold_the_same_again(replicate: int) -> None:
    one, more = held(small(), shard=2), held(small(), shard=2, replicate=replicate)
    for mine, theirs in zip(more, one, strict=True):
        assert mine.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"tied": True}, "head"),
        ({"num_shared_experts": 0}, "shared"),
        ({"num_dense_layers": 0}, "dense"),
    ],
)
def test_what_a_model_has_not_is_zero(changes: dict[str, Any], kind: str) -> None:
    found = held(small(**changes), shard=2)
    numbers = by_kind(found.whole)
    assert numbers[kind] == 0 and all(n > 0 for k, n in numbers.items() if k != kind)


def test_biases_are_their_projections() -> None:
    biased = AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=6, window=8, bias=True)
    found = held(small(attention=biased), shard=2)
    more = 3 * (18 + 6 + 6 + 32)
    assert by_kind(found.whole) == WHOLE | {"attention": WHOLE["attention"] + more}


@settings(max_examples=12, deadline=None)
@given(
    experts=st.integers(2, 7),
    ranks=st.integers(1, 4),
    rest=st.integers(1, 3),
    tied=st.booleans(),
)
def test_every_row_has_one_holder(experts: int, ranks: int, rest: int, tied: bool) -> None:
    config = small(experts, tied=tied)
    layout = ParallelConfig(shard=ranks * rest, experts=ranks)
    found = held(config, shard=layout.shard, experts=layout.experts)
    assert found.every.sum(0).tolist() == found.whole.tolist()
    assert found.every[0].tolist() == found.rank_0.tolist()
    assert found.every.sum(1).tolist() == footprint.held(config, layout).tolist()
