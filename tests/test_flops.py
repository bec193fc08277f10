"""Operations of a token: by hand, by counting masks, and by torch's own counter."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trinity_lib import flops, recipes
from trinity_lib.attention import context
from trinity_lib.experts import use_backend
from trinity_lib.model import ModelConfig, Trinity, count_parameters

LARGE = recipes.large().model


def test_large_by_hand() -> None:
    """Attention sees 4,096.5 keys in 15 layers and 3,072.25 in 45, in rows of 8,192."""
    found = flops.per_token(LARGE, 8192)
    assert found.routed == 54 * 4 * 3 * 2 * 3072 * 3072
    assert found.shared == found.routed / 4
    assert found.dense == 6 * 3 * 2 * 3072 * 12_288
    assert found.router == 54 * 2 * 3072 * 256
    assert found.head == 2 * 3072 * 200_192
    assert found.projections == 60 * 2 * 3072 * (6144 + 1024 + 1024 + 6144 + 6144)
    assert found.attention == 4 * 6144 * (15 * 4096.5 + 45 * 3072.25)
    assert found.training == 3 * sum(found)


@pytest.mark.parametrize("scale", recipes.SCALES)
def test_products_are_two_for_every_active_matrix_parameter(scale: str) -> None:
    """All but attention's scores is twice the active parameters, norms' gains aside."""
    model = recipes.SCALES[scale]().model
    found = flops.per_token(model, 64)
    gains = model.num_layers * (4 * model.width + 2 * model.attention.head_dim) + model.width
    active = count_parameters(model).active_with_head - gains
    assert found.forward - found.attention == 2 * active


@given(length=st.integers(1, 80), window=st.integers(1, 90))
def test_keys_are_counted_as_masks_show_them(length: int, window: int) -> None:
    each = [min(t, window) for t in range(1, length + 1)]
    assert flops.seen(length, window) == pytest.approx(sum(each) / length)
    assert flops.seen(length, None) == (length + 1) / 2


def test_keys_are_those_of_the_models_masks() -> None:
    config = dataclasses.replace(recipes.toy().model.attention, window=7)
    masks = context(torch.zeros(1, 24, dtype=torch.int64), config, torch.float32)
    assert flops.seen(24, None) == float(masks.everything_B1SS.sum()) / 24
    assert flops.seen(24, 7) == float(masks.window.sum()) / 24


def small(**changes: object) -> ModelConfig:
    return dataclasses.replace(
        recipes.toy().model, num_layers=3, global_every=2, num_dense_layers=1, **changes
    )


@pytest.mark.parametrize(
    "config",
    [small(), small(tied=True), small(num_shared_experts=0)],
    ids=["", "tied", "few"],
)
@pytest.mark.parametrize("length", [8, 30])
def test_torch_counts_the_same(config: ModelConfig, length: int) -> None:
    """Its counter takes attention for full: every query times every key of the mask."""
    model = Trinity(config).double()
    model.initialise(torch.Generator().manual_seed(0))
    use_backend(model, "torch")
    tokens_BS = torch.arange(2 * length).view(2, length)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(tokens_BS)
    ours = flops.per_token(config, length)
    heads = config.attention
    full = 4 * heads.num_heads * heads.head_dim * length * config.num_layers
    counted = counter.get_total_flops()
    assert counted == 2 * length * (ours.forward - ours.attention + full)


@settings(max_examples=30)
@given(length=st.integers(1, 300), more=st.integers(1, 50))
def test_a_longer_document_costs_no_less(length: int, more: int) -> None:
    model = recipes.toy().model
    shorter, longer = (flops.per_token(model, n) for n in (length, length + more))
    assert longer.attention >= shorter.attention
    assert longer._replace(attention=0) == shorter._replace(attention=0)


def test_six_nd_of_the_published_run() -> None:
    assert flops.six_nd(13e9, 17e12) == pytest.approx(1.33e24, rel=0.01)
