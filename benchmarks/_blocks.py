"""MoE blocks that compute the same from one set of weights, ours and its peers', and parts.

What benchmarks/layer.py times; run by itself it does nothing.
"""

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity_lib import _megablocks
from trinity_lib.config import Missing
from trinity_lib.experts import Experts, SwiGLU, use_backend
from trinity_lib.model import ModelConfig
from trinity_lib.routing import Router, Routing

SKEW = 0.25
"""Spread of what experts' logits are offset by, beside a token's own spread of 1."""
CHECKED = 256
"""Tokens whose outputs are compared."""


class Weights(NamedTuple):
    """One layer's, which all contestants compute with."""

    router_ED: Tensor
    gate_EFD: Tensor
    up_EFD: Tensor
    down_EFD: Tensor
    shared: tuple[Tensor, Tensor, Tensor]
    """Gate, up and down, as torch's Linear holds them."""


class Contestant(NamedTuple):
    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    """Tokens [T, D] to outputs [T, D]."""
    route: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Tokens to the experts they choose and their weights, both [T, K]."""


def draw(model: ModelConfig, device: str, dtype: torch.dtype) -> Weights:
    """Random weights; the router's first column is the offset of each expert's logit."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.empty(shape, device=device, dtype=dtype)
        return values.normal_(std=shape[-1] ** -0.5, generator=generator)

    E, D, hidden = model.router.num_experts, model.width, model.expert_width
    wide = hidden * model.num_shared_experts
    router_ED = normal(E, D)
    router_ED[:, 0].normal_(std=SKEW, generator=generator)
    gate, up = normal(E, hidden, D), normal(E, hidden, D)
    down = normal(E, hidden, D).mul_((D / hidden) ** 0.5)
    return Weights(
        router_ED, gate, up, down, (normal(wide, D), normal(wide, D), normal(D, wide))
    )


def tokens(model: ModelConfig, count: int, like: Tensor) -> Tensor:
    """Random tokens whose first feature, 1, reads the router's offsets."""
    generator = torch.Generator(like.device).manual_seed(count)
    x_TD = torch.empty(count, model.width, device=like.device, dtype=like.dtype)
    x_TD.normal_(generator=generator)[:, 0] = 1
    return x_TD


def hold(module: nn.Module, **weights: Tensor) -> None:
    """Have a module compute with given weights, without a copy."""
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight))


def ours(model: ModelConfig, w: Weights, backend: Any) -> Contestant:
    block = nn.Module()
    with torch.device("meta"):
        router = Router(model.router, model.width, layer=0)
        experts = Experts(model.router.num_experts, model.width, model.expert_width)
        shared = SwiGLU(model.width, len(w.shared[0]))
    block.router, block.experts, block.shared = router, experts, shared
    router.bias_E = torch.zeros(model.router.num_experts, device=w.router_ED.device)
    hold(router, weight_ED=w.router_ED)
    hold(experts, gate_EFD=w.gate_EFD, up_EFD=w.up_EFD, down_EFD=w.down_EFD)
    for linear, weight in zip((shared.gate, shared.up, shared.down), w.shared, strict=True):
        hold(linear, weight=weight)
    use_backend(block, backend)
    return Contestant(
        block, lambda x: experts(x, router(x)) + shared(x), lambda x: router(x)[1:3]
    )


def megablocks(model: ModelConfig, w: Weights) -> Contestant:
    """Stock MegaBlocks: its dMoE with its own router and shared expert."""
    device, dtype, r = w.gate_EFD.device, w.gate_EFD.dtype, model.router
    if reason := _megablocks.unavailable(device, dtype):
        raise Missing(reason)
    like: Any = _megablocks.layer(
        r.num_experts, model.width, model.expert_width, r.top_k, dtype, device
    )
    arguments = dataclasses.replace(
        like.args,
        moe_normalize_expert_weights=1,
        shared_expert=True,
        shared_expert_hidden_size=len(w.shared[0]),
        fc_kwargs={"dtype": dtype},
    )
    block = importlib.import_module("megablocks.layers.dmoe").dMoE(arguments)
    flat = [weight.flatten(0, 1) for weight in w[1:4]]
    hold(block.experts.mlp, **dict(zip(("w1", "v1", "w2"), flat, strict=True)))
    hold(block.router.layer, weight=w.router_ED)
    for name, weight in zip(("gate_proj", "up_proj", "down_proj"), w.shared, strict=True):
        hold(getattr(block.shared_expert, name), weight=weight)
    return Contestant(block, lambda x: block(x[None])[0], lambda x: block.router(x)[1:][::-1])


def transformers(model: ModelConfig, w: Weights) -> Contestant:
    """AFMoE's block over torch's grouped GEMM; its layout of the experts is a copy."""
    try:
        from transformers.models.afmoe import configuration_afmoe, modeling_afmoe
    except ImportError as error:
        raise Missing(f"transformers is not installed ({error})") from error
    config = configuration_afmoe.AfmoeConfig(
        hidden_size=model.width,
        moe_intermediate_size=model.expert_width,
        num_experts=model.router.num_experts,
        num_experts_per_tok=model.router.top_k,
        num_shared_experts=model.num_shared_experts,
        route_scale=model.router.route_scale,
        experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        block = modeling_afmoe.AfmoeSparseMoeBlock(config)
    hold(block.experts, gate_up_proj=torch.cat([w.gate_EFD, w.up_EFD], 1))
    hold(block.experts, down_proj=w.down_EFD.mT.contiguous())
    hold(block.router.gate, weight=w.router_ED)
    for name, weight in zip(("gate_proj", "up_proj", "down_proj"), w.shared, strict=True):
        hold(getattr(block.shared_experts, name), weight=weight)
    bias_E = torch.zeros(config.num_experts, device=w.router_ED.device)
    block.expert_bias = nn.Parameter(bias_E, requires_grad=False)
    return Contestant(
        block,
        lambda x: block(x[None])[0],
        lambda x: block.router(x[None], block.expert_bias)[1:][::-1],
    )


CONTESTANTS: dict[str, Callable[[ModelConfig, Weights], Contestant]] = {
    "ours, torch": partial(ours, backend="torch"),
    "ours, megablocks": partial(ours, backend="megablocks"),
    "MegaBlocks dMoE": megablocks,
    "transformers grouped_mm": transformers,
}


def exact(w: Weights, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Expert by expert, in fp32."""
    gate, up, down = (weight.float() for weight in w.shared)
    x_TD = x_TD.float()
    y_TD = (F.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T
    for e in range(len(w.gate_EFD)):
        token, choice = (experts_TK == e).nonzero(as_tuple=True)
        gate, up, down = (weight[e].float() for weight in w[1:4])
        inner = F.silu(x_TD[token] @ gate.T) * (x_TD[token] @ up.T)
        y_TD[token] += (inner @ down) * weights_TK[token, choice, None].float()
    return y_TD


@torch.no_grad()
def error(contestant: Contestant, w: Weights, x_TD: Tensor) -> float:
    """Of a contestant's outputs, relative, given the choices and weights of its own router."""
    some = slice(None, None, max(1, len(x_TD) // CHECKED))
    choices = (each[some] for each in contestant.route(x_TD))
    expected = exact(w, x_TD[some], *choices)
    return float((contestant.forward(x_TD)[some].float() - expected).norm() / expected.norm())


class Job(NamedTuple):
    call: Callable[[], object]
    flops: float = 0.0


def jobs(contestant: Contestant, x_TD: Tensor, dy_TD: Tensor, flops: float) -> dict[str, Job]:
    """A contestant's forward, as in training, and the same with backward."""
    x_TD = x_TD.detach().requires_grad_()

    def both() -> None:
        x_TD.grad = None
        contestant.module.zero_grad(set_to_none=True)
        contestant.forward(x_TD).backward(dy_TD)

    return {
        "forward": Job(lambda: contestant.forward(x_TD), flops),
        "forward+backward": Job(both, 3 * flops),
    }


def parts(model: ModelConfig, w: Weights, x: Tensor, routing: Routing) -> dict[str, list[Job]]:
    """What the torch backend is made of, a part at a time: [forward, forward+backward]."""
    (T, D), K, E = x.shape, model.router.top_k, len(w.gate_EFD)

    def order() -> tuple[Tensor, Tensor, Tensor]:
        sorted_R, order_R = routing.experts_TK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(sorted_R, torch.arange(E, device=x.device), right=True)
        rows_R = torch.arange(T * K, device=x.device)
        return order_R, torch.empty_like(order_R).scatter_(0, order_R, rows_R), ends_E.int()

    order_R, inverse_R, ends_E = order()
    x_RD = x[order_R // K]
    hidden_RF = x.new_zeros(T * K, model.expert_width).normal_()

    def permute() -> None:
        ordered_R, back_R, _ = order()
        y_TKD = x[ordered_R // K][back_R].view(T, K, D)
        (y_TKD * routing.weights_TK.unsqueeze(-1)).to(x.dtype).sum(1)  # weighed in fp32

    def permute_both() -> None:
        permute()
        x[order_R // K], x[order_R // K], x_RD[inverse_R].view(T, K, D).sum(1)

    def products() -> None:
        F.grouped_mm(x_RD, w.gate_EFD.mT, offs=ends_E)
        F.grouped_mm(x_RD, w.up_EFD.mT, offs=ends_E)
        F.grouped_mm(hidden_RF, w.down_EFD, offs=ends_E)

    def products_both() -> None:
        products()
        F.grouped_mm(x_RD, w.down_EFD.mT, offs=ends_E)
        F.grouped_mm(hidden_RF, w.gate_EFD, offs=ends_E)
        F.grouped_mm(hidden_RF, w.up_EFD, offs=ends_E)
        for _ in range(3):
            F.grouped_mm(hidden_RF.t(), x_RD, offs=ends_E)

    flops = 6.0 * hidden_RF.numel() * D
    grouped = [Job(products, flops), Job(products_both, 3 * flops)]
    both = [Job(permute), Job(permute_both)]
    return {"permutation alone": both, "grouped products alone": grouped}


def part_jobs(model: ModelConfig, w: Weights, x: Tensor, dy: Tensor) -> dict[str, list[Job]]:
    """`parts`, and the router and the shared expert, each by itself."""
    whole: Any = ours(model, w, "torch").module
    with torch.no_grad():
        routing = whole.router(x)
    weights = torch.ones_like(routing.weights_TK)
    router = Contestant(whole.router, lambda x: whole.router(x).weights_TK, whole.router)
    shared = Contestant(whole.shared, whole.shared, whole.router)
    per_token = 6.0 * model.width * len(w.shared[0])
    alone = {
        "router alone": jobs(router, x, weights, 2.0 * len(x) * w.router_ED.numel()),
        "shared expert alone": jobs(shared, x, dy, per_token * len(x)),
    }
    rows = {name: list(each.values()) for name, each in alone.items()}
    return rows | parts(model, w, x, routing)
