"""What is said of Trinity Large in public, beside the figure that its shapes give.

Facts of the run: technical report, table 1 and section 3 (17T tokens, 2,048 B300); the
vendor's blog of 27 January 2026 as quoted elsewhere (33 days; about $20M for four models in
six months, salaries and data included). Neither days nor dollars are in the report.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from trinity_lib import flops, gpus, plan, recipes, serving
from trinity_lib.model import ModelConfig


class Published(NamedTuple):
    """What is published of Large and of the run that trained it."""

    active: float = 13e9
    """Active parameters, rounded by the vendor."""
    tokens: float = 17e12
    """Tokens trained."""
    gpus: int = 2048
    """B300s."""
    days: float = 33.0
    """Of the main run; that all of them were its own is assumed."""
    dollars: float = 20e6
    """For four models in six months, everything included."""
    length: int = 8192
    """Tokens of a packed row."""


LARGE = Published()
GPU = "B300"
ACTIVE = {"nano": 1e9, "mini": 3e9, "large": LARGE.active}
"""Active parameters as the model cards round them."""


class Article(NamedTuple):
    """One claim."""

    claim: str
    """What is said."""
    said: float
    """Its number."""
    figure: float
    """The number that the shapes give."""
    unit: str
    """Of both."""
    verdict: str
    """In a word or two."""
    finding: str
    """What is right, in a sentence or two."""


def variant(model: ModelConfig, *, experts: int | None = None, **changes: Any) -> ModelConfig:
    """A model of another shape: so many routed experts, other settings of `ModelConfig`."""
    if experts is not None:
        changes["router"] = dataclasses.replace(model.router, num_experts=experts)
    return dataclasses.replace(model, **changes)


def experts_for(model: ModelConfig, parameters: float) -> int:
    """Routed experts a layer with which a model has at least so many parameters."""
    one, two = (_total(variant(model, experts=model.router.top_k + i)) for i in (0, 1))
    return model.router.top_k + max(0, math.ceil((parameters - one) / (two - one)))


def layers_for(model: ModelConfig, parameters: float) -> int:
    """Layers with which it has, the dense ones as they are."""
    least = model.num_dense_layers + 1
    one, two = (_total(variant(model, num_layers=least + i)) for i in (0, 1))
    return least + max(0, math.ceil((parameters - one) / (two - one)))


def expert_width_for(model: ModelConfig, parameters: float, multiple: int = 16) -> int:
    """The expert width, a multiple of so many, with which it comes nearest."""
    one, two = (_total(variant(model, expert_width=multiple * i)) for i in (1, 2))
    return multiple * max(1, 1 + round((parameters - one) / (two - one)))


def batch_that_reads(model: ModelConfig, parameters: float) -> int:
    """Sequences decoded together from which a step reads at least so many parameters."""
    batch = 1
    while serving.read_parameters(model, batch) < parameters and batch < 2**16:
        batch += 1
    return batch


def every() -> list[Article]:
    """The claims, in the order in which figures show them."""
    model = recipes.large().model
    return [
        _share(model), _layers(model), _one_gpu(model), _offloaded(model),
        _like_fifty(model), _larger(model), _more_experts(model), _dollars(),
    ]  # fmt: skip


def _share(model: ModelConfig) -> Article:
    counts, router = serving.counted(model), model.router
    both = 100 * counts.active_with_embeddings / counts.total
    alone = 100 * counts.active / counts.total
    return Article(
        "only 1.56% of parameters are active",
        1.56,
        both,
        "%",
        "another quantity",
        f"{100 * router.top_k / router.num_experts:.2f}% is the routing fraction, "
        f"{router.top_k} of {router.num_experts} experts. Attention, dense layers, shared "
        f"experts and head are always active: {counts.active_with_embeddings / 1e9:.2f}B of "
        f"{counts.total / 1e9:.1f}B, {both:.2f}%; without both embeddings {alone:.2f}%.",
    )


def _layers(model: ModelConfig) -> Article:
    taller = variant(model, num_layers=66)
    return Article(
        "66 layers, 60 of them with experts",
        398.6,
        _total(taller) / 1e9,
        "B parameters",
        "wrong",
        f"60 layers, 6 of them dense, have {_total(model) / 1e9:.1f}B parameters, as "
        f"released; 66 with 60 of experts would have {_total(taller) / 1e9:.1f}B.",
    )


def _one_gpu(model: ModelConfig) -> Article:
    card = gpus.find("L40S")
    bits = serving.bits_that_fit(model, card)
    four = serving.weight_bytes(_total(model), serving.PRECISIONS["4-bit"])
    return Article(
        "quantised, it fits a single 48 GB GPU",
        serving.PRECISIONS["4-bit"],
        bits,
        "bits a weight",
        "wrong",
        f"{_total(model) / 1e9:.1f}B parameters in {card.memory / 1e9:.0f} GB are "
        f"{bits:.2f} bits a weight, beside no cache and no context; at 4 bits with their "
        f"scales they are {four / 1e9:.0f} GB.",
    )


def _offloaded(model: ModelConfig) -> Article:
    bits = serving.PRECISIONS["4-bit"]
    desktop, server = (
        serving.offload(model, gpus.find("L40S"), bits, LARGE.length, speed)
        for speed in (serving.DESKTOP, serving.SERVER)
    )
    return Article(
        "on one 48 GB GPU, with experts in host memory",
        bits,
        desktop.tokens_per_second,
        "tokens/s at most",
        "with conditions",
        f"{desktop.resident / 1e9:.0f} GB stay on the GPU in bf16 (all but the routed experts, "
        f"and {LARGE.length:,} tokens of cache); {desktop.experts / 1e9:.0f} GB of experts at "
        f"{bits} bits lie in the host, and the GPU has room for {desktop.cached:.0%} of them. "
        f"One sequence gets at most {desktop.tokens_per_second:.0f} tokens/s from a desktop's "
        f"80 GB/s and {server.tokens_per_second:.0f} from a server's 400.",
    )


def _like_fifty(model: ModelConfig) -> Article:
    counts, fifty = serving.counted(model), 50e9
    batch = batch_that_reads(model, fifty)
    work = flops.per_token(model, LARGE.length).forward / 2e9
    return Article(
        "it runs like a 50B dense model",
        50.0,
        work,
        "B parameters' work",
        "no such number",
        f"A token of an {LARGE.length:,}-token document costs what {work:.1f}B dense "
        f"parameters would, attention included; memory is that of {counts.total / 1e9:.0f}B. "
        f"A decoding step reads {counts.active_with_head / 1e9:.1f}B parameters for one "
        f"sequence, 50B from {batch} sequences on (uniform routing), nearly all from some "
        "hundreds.",
    )


def _larger(model: ModelConfig) -> Article:
    goal = 600e9
    experts, layers = experts_for(model, goal), layers_for(model, goal)
    wide, tall = variant(model, experts=experts), variant(model, num_layers=layers)
    return Article(
        "a Trinity XL at 600B",
        600.0,
        _total(wide) / 1e9,
        "B parameters",
        "possible",
        f"Large's shape reaches it with {experts} experts a layer "
        f"({_total(wide) / 1e9:.1f}B, {_active(wide):.1f}B active) or {layers} layers "
        f"({_total(tall) / 1e9:.1f}B, {_active(tall):.1f}B active): more experts cost memory "
        f"alone, more layers work as well.",
    )


def _more_experts(model: ModelConfig) -> Article:
    more = variant(model, experts=512)
    width = expert_width_for(more, 700e9)
    thin = variant(more, expert_width=width)
    return Article(
        "4 of 512 experts at 700B",
        700.0,
        _total(more) / 1e9,
        "B parameters",
        "another shape",
        f"Large with 512 experts has {_total(more) / 1e9:.1f}B parameters, "
        f"{_active(more):.1f}B active. 700B ask for narrower experts: {width:,} instead of "
        f"{model.expert_width:,} give {_total(thin) / 1e9:.1f}B, {_active(thin):.1f}B active.",
    )


def _dollars() -> Article:
    price = gpus.KINDS[GPU].price
    all_of_it = plan.implied_price(LARGE.dollars, LARGE.gpus, LARGE.days)
    hours = LARGE.dollars / all_of_it
    return Article(
        "$20M for the 33-day run",
        LARGE.dollars / 1e6,
        hours * price / 1e6,
        "M dollars",
        "another quantity",
        f"$20M is said of four models in six months, everything included. The run took "
        f"{hours:,.0f} GPU-hours: ${hours * price / 1e6:.1f}M at an assumed ${price:.2f}; all "
        f"of the $20M would be ${all_of_it:.2f} for each.",
    )


def _total(model: ModelConfig) -> int:
    return serving.counted(model).total


def _active(model: ModelConfig) -> float:
    return serving.counted(model).active_with_embeddings / 1e9
