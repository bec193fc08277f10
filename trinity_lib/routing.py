"""The router: fp32 scores, a selection the balancer may steer, weights it may not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from trinity_lib.config import check, require
from trinity_lib.linear import products

Select = Callable[[Tensor, int], Tensor]
"""(scores_TE, MoE layer) -> ranking_TE, or experts_TK (-1: none): a balancer's `select`."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How many experts there are, how many a token takes, and the scale of their sum."""

    num_experts: int
    """Routed experts in a layer."""
    top_k: int
    """Routed experts a token takes."""
    route_scale: float = 1.0
    """Factor on the routing weights."""
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    """What makes affinities of router logits; Trinity's is the sigmoid."""
    normalise: bool = True
    """Whether a token's routing weights are divided by their sum; never under softmax."""

    def __post_init__(self) -> None:
        check(self)
        fits = 1 <= self.num_experts <= 1_000_000
        require(fits, "num_experts", self.num_experts, "at least 1, at most 1,000,000")
        in_range = 1 <= self.top_k <= self.num_experts
        require(in_range, "top_k", self.top_k, f"from 1 to num_experts ({self.num_experts})")
        require(self.route_scale > 0, "route_scale", self.route_scale, "above zero")
        allowed = not (self.normalise and self.score == "softmax")
        require(allowed, "normalise", self.normalise, "false where the score is softmax")


class Routing(NamedTuple):
    """One layer's routing of one micro-batch. Balancers and metrics are functions of it."""

    scores_TE: Tensor
    """Affinities, fp32 (float64 in a float64 model), with their graph."""
    experts_TK: Tensor
    """Chosen experts, int64, best first."""
    weights_TK: Tensor
    """What each chosen expert's output is multiplied by; normalised, sums to route_scale."""
    ragged: bool = False
    """Whether tokens may have unlike numbers of experts: -1, of weight 0, fills up."""


class Router(nn.Module):
    """Sigmoid top-k router with a selection-only bias (technical report, equations 16-18).

    The matrix product, the sigmoid and the weights are fp32 whatever the model's dtype.
    `bias_E` is what released checkpoints call `expert_bias`; the trainer keeps it equal
    to the balancer's.
    """

    bias_E: Tensor
    native = True
    """Whether the C++ operator may be used."""

    def __init__(self, config: RouterConfig, width: int, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.weight_ED = nn.Parameter(torch.empty(config.num_experts, width))
        self.register_buffer("bias_E", torch.zeros(config.num_experts))

    def forward(
        self, x_TD: Tensor, select: Select | None = None, experts_TK: Tensor | None = None
    ) -> Routing:
        """Route tokens by `select`, by the stored bias, or to given experts (a replay)."""
        precise = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            weight_ED = self.weight_ED.to(precise)
            (logits_TE,) = products(x_TD.to(precise), weight_ED, few=self.native)
            sigmoid = self.config.score == "sigmoid"
            scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(-1)
        ragged = False
        if experts_TK is None:
            with torch.no_grad():
                ranked = select(scores_TE, self.layer) if select else scores_TE + self.bias_E
                ragged = not ranked.is_floating_point()
                experts_TK = ranked if ragged else ranked.topk(self.config.top_k, -1).indices
        weights_TK = scores_TE.gather(-1, experts_TK.clamp(min=0) if ragged else experts_TK)
        if ragged:
            weights_TK = weights_TK * (experts_TK >= 0)
        if self.config.normalise:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routing(scores_TE, experts_TK, weights_TK * self.config.route_scale, ragged)
