"""Plans of training runs: the published run, costs and their inverse, fewest GPUs, articles."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity_lib import articles, flops, footprint, gpus, plan, recipes, serving
from trinity_lib.articles import LARGE
from trinity_lib.config import BadValue
from trinity_lib.mesh import ParallelConfig
from trinity_lib.model import ModelConfig, count_parameters
from trinity_lib.plan import Cluster

MODEL = recipes.large().model
PUBLISHED = Cluster(gpu="B300", count=2048)
LAYOUT = ParallelConfig(replicate=16, shard=128, experts=8)


def large(**changes: object) -> plan.Plan:
    given: dict = {"tokens": 17e12, "micro_tokens": 8192, "length": 8192, **changes}
    return plan.make(MODEL, LAYOUT, PUBLISHED, **given)


def test_the_published_run() -> None:
    """1.33e24 operations by 6ND with N = 13B, 227 TFLOP/s a GPU, 1.62M GPU-hours."""
    operations = flops.six_nd(LARGE.active, LARGE.tokens)
    assert operations == pytest.approx(1.33e24, rel=0.01)
    rate = plan.implied_rate(operations, LARGE.gpus, LARGE.days)
    assert rate == pytest.approx(227e12, rel=0.01)
    assert rate / gpus.find("B300").bf16 == pytest.approx(0.101, abs=0.001)
    assert plan.implied_price(LARGE.dollars, LARGE.gpus, LARGE.days) == pytest.approx(
        20e6 / (2048 * 33 * 24)
    )


def test_the_default_efficiency_is_what_the_published_run_implies() -> None:
    operations = flops.per_token(MODEL, LARGE.length).training * LARGE.tokens
    rate = plan.implied_rate(operations, LARGE.gpus, LARGE.days)
    assert round(rate / gpus.find("B300").bf16, 3) == PUBLISHED.efficiency


def test_large_planned() -> None:
    found = large()
    assert found.held == (3_114_338_064, 3_114_338_064)
    assert found.counts == count_parameters(MODEL)
    assert found.cost.days == pytest.approx(33, rel=0.01)
    assert found.cost.gpu_hours == pytest.approx(1.62e6, rel=0.01)
    assert found.cost.tokens_per_second == pytest.approx(5.96e6, rel=0.01)
    assert found.cost.dollars == pytest.approx(found.cost.gpu_hours * 6.03)
    assert found.fits and found.peak.total == max(m.total for m in found.memory.values())
    assert found.memory == footprint.training(
        MODEL, LAYOUT, tokens=8192, length=8192, recompute=True
    )
    assert not large(micro_tokens=65_536, recompute=False).fits


def test_a_plan_in_words() -> None:
    text = plan.describe(large())
    for words in (
        "398,635,272,192 parameters, 13,371,672,576 active", "3,114,338,064 a rank",
        "2,048 in all", "33 days", "fits the 288 GB of a B300", "91.26 GFLOP a token", "$6.03",
    ):  # fmt: skip
        assert words in text
    crowded = plan.describe(large(micro_tokens=65_536, recompute=False))
    assert "does not fit the 288 GB" in crowded
    uneven = plan.make(
        recipes.toy().model, ParallelConfig(shard=3), Cluster(gpu="A100", count=3),
        tokens=1e9, micro_tokens=128, length=128,
    )  # fmt: skip
    assert f"{uneven.held[0]:,} to {uneven.held[1]:,} a rank" in plan.describe(uneven)


@given(
    efficiency=st.floats(0.01, 1),
    count=st.integers(1, 10_000),
    tokens=st.floats(1e6, 1e14),
    price=st.floats(0, 100),
)
def test_cost_and_its_inverse(
    efficiency: float, count: int, tokens: float, price: float
) -> None:
    cluster = Cluster(gpu="H100", count=count, price=price, efficiency=efficiency)
    found = plan.cost(cluster, 1e9, tokens)
    assert found.tokens_per_second * found.days * 86_400 == pytest.approx(tokens)
    assert found.gpu_hours == pytest.approx(count * found.days * 24)
    assert found.dollars == pytest.approx(found.gpu_hours * price)
    rate = plan.implied_rate(1e9 * tokens, count, found.days)
    assert rate == pytest.approx(efficiency * 989.4e12)
    if price:
        assert plan.implied_price(found.dollars, count, found.days) == pytest.approx(price)


def needed(model: ModelConfig, count: int, experts: int) -> int:
    moments = footprint.training(
        model,
        ParallelConfig(shard=count, experts=experts),
        tokens=8192,
        length=8192,
        recompute=True,
    )
    return footprint.peak(moments)[1].total


@pytest.mark.parametrize(
    ("gpu", "count"),
    [("A100", 128), ("H100", 128), ("H200", 56), ("B200", 40), ("B300", 24), ("L40S", 256)],
)
def test_fewest_gpus_that_train_large(gpu: str, count: int) -> None:
    kind = gpus.find(gpu)
    found = plan.least_gpus(MODEL, kind, micro_tokens=8192, length=8192)
    assert found.gpus == count
    assert found.bytes == needed(MODEL, count, found.experts) <= 0.9 * kind.memory
    fewer = [1, 2, 4, *range(8, min(count, 257), 8)]
    for each in fewer:
        for experts in (1, 2, 4, 8):
            if each % experts == 0:
                assert needed(MODEL, each, experts) > 0.9 * kind.memory


def test_no_number_of_small_gpus_trains_large() -> None:
    found = plan.least_gpus(MODEL, gpus.find("RTX 4090"), micro_tokens=8192, length=8192)
    assert found.gpus == 0 and found.bytes > 0.9 * 24e9
    fits = plan.least_gpus(
        recipes.nano().model, gpus.find("RTX 4090"), micro_tokens=4096, length=4096
    )
    assert fits.gpus > 1
    alone = plan.least_gpus(
        recipes.toy().model, gpus.find("RTX 4090"), micro_tokens=512, length=128
    )
    assert alone.gpus == alone.experts == 1


def test_machines_hold_eight() -> None:
    counts = {layout.ranks for layout in plan._layouts(4)}
    assert {1, 2, 4, 8, 16, 24} <= counts and not counts & {3, 5, 6, 7, 9, 12}
    assert {layout.experts for layout in plan._layouts(4)} == {1, 2, 3, 4}
    assert all(layout.ranks % layout.experts == 0 for layout in plan._layouts(4))
    assert max(counts) <= plan.MOST_GPUS


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Cluster(gpu="B301", count=1), "gpu is 'B301'; it must be one of A100 80GB"),
        (lambda: Cluster(gpu="B300", count=0), "gpus is 0; it must be at least 1"),
        (lambda: Cluster(gpu="B300", count=1, price=-1), "price is -1.0; it must be zero"),
        (
            lambda: Cluster(gpu="B300", count=1, efficiency=40),
            "efficiency is 40.0; it must be above 0, at most 1",
        ),
        (lambda: plan.cost(PUBLISHED, 1e9, 0), "tokens is 0; it must be above zero"),
        (lambda: plan.implied_rate(1e9, 1, 0), "days is 0; it must be above zero"),
        (lambda: plan.implied_price(1e9, 1, -1), "days is -1; it must be above zero"),
        (
            lambda: plan.make(
                MODEL, ParallelConfig(shard=8), PUBLISHED, tokens=1, micro_tokens=1, length=1
            ),
            "replicate x shard is 8; it must be replicate x shard = 2048, the GPUs there are",
        ),
    ],
)
def test_bad_values_are_named(call, sentence: str) -> None:
    with pytest.raises(BadValue) as error:
        call()
    assert sentence in str(error.value)


def claim(words: str) -> articles.Article:
    (found,) = [each for each in articles.every() if words in each.claim]
    return found


def test_the_active_share() -> None:
    article = claim("1.56%")
    assert article.said == round(100 * 4 / 256, 2)
    assert article.figure == pytest.approx(3.35, abs=0.005)
    assert "3.35%" in article.finding and "3.05%" in article.finding


def test_sixty_six_layers() -> None:
    assert claim("66 layers").figure == pytest.approx(442.67, abs=0.01)
    assert "398.6B" in claim("66 layers").finding


def test_one_48_gb_gpu() -> None:
    assert claim("fits a single").figure == pytest.approx(0.96, abs=0.005)
    assert "224 GB" in claim("fits a single").finding
    able = claim("host memory")
    bound = 80e9 / (4 * serving.expert(MODEL) * 4.5 / 8)
    assert 0.5 * bound < able.figure < bound


def test_like_a_dense_model() -> None:
    article = claim("50B dense")
    assert article.figure == flops.per_token(MODEL, 8192).forward / 2e9
    batch = articles.batch_that_reads(MODEL, 50e9)
    assert serving.read_parameters(MODEL, batch - 1) < 50e9
    assert serving.read_parameters(MODEL, batch) >= 50e9
    assert f"from {batch} sequences on" in article.finding


def total(**changes: object) -> int:
    return count_parameters(articles.variant(MODEL, **changes)).total


def test_shapes_of_600_and_700_billion() -> None:
    experts = articles.experts_for(MODEL, 600e9)
    assert total(experts=experts - 1) < 600e9 <= total(experts=experts)
    layers = articles.layers_for(MODEL, 600e9)
    assert total(num_layers=layers - 1) < 600e9 <= total(num_layers=layers)
    assert claim("XL").figure == total(experts=experts) / 1e9
    assert f"{experts} experts" in claim("XL").finding
    assert f"{layers} layers" in claim("XL").finding
    more = articles.variant(MODEL, experts=512)
    assert claim("512").figure == count_parameters(more).total / 1e9
    assert claim("512").figure == pytest.approx(790.06, abs=0.01)
    width = articles.expert_width_for(more, 700e9)
    apart = [
        abs(total(experts=512, expert_width=width + change) - 700e9) for change in (-16, 0, 16)
    ]
    assert width % 16 == 0 and min(apart) == apart[1]


@pytest.mark.parametrize("scale", ["toy", "mini", "large"])
def test_what_is_there_already_needs_no_more(scale: str) -> None:
    model = recipes.SCALES[scale]().model
    own = count_parameters(model).total
    assert articles.experts_for(model, own) == model.router.num_experts
    assert articles.layers_for(model, own) == model.num_layers
    assert articles.expert_width_for(model, own) == model.expert_width


def test_dollars() -> None:
    article = claim("$20M")
    assert article.figure == pytest.approx(2048 * 33 * 24 * 6.03 / 1e6)
    assert "$12.33" in article.finding and "1,622,016 GPU-hours" in article.finding


def test_every_claim_says_what_is_right() -> None:
    for article in articles.every():
        assert article.finding.endswith(".") and article.verdict and article.unit
        assert math.isfinite(article.said) and math.isfinite(article.figure)
        assert "  " not in article.finding
    names = [each.claim for each in articles.every()]
    assert len(set(names)) == len(names)


def test_variants_change_nothing_else() -> None:
    more = articles.variant(MODEL, experts=512)
    assert dataclasses.replace(more, router=MODEL.router) == MODEL
