"""Trinity: embedding, sandwich-normed blocks, an untied head (the AFMoE architecture)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trinity_lib import initial, onednn
from trinity_lib.attention import (
    Attention,
    AttentionConfig,
    Context,
    Memory,
    RMSNorm,
    context,
    decode_context,
)
from trinity_lib.config import check, require
from trinity_lib.experts import Experts, SwiGLU
from trinity_lib.linear import Linear
from trinity_lib.routing import Router, RouterConfig, Routing, Select


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a model. Defaults are what Nano, Mini and Large share."""

    vocab_size: int
    """Rows of the embedding and of the head."""
    width: int
    """Model width D."""
    num_layers: int
    """Transformer layers, the dense ones included."""
    num_dense_layers: int
    """Leading layers whose feed-forward network is dense."""
    dense_width: int
    """Hidden width of the dense layers' SwiGLU."""
    expert_width: int
    """Hidden width F of one expert."""
    num_shared_experts: int = 1
    """Experts every token takes; they form one SwiGLU of that many times expert_width."""
    global_every: int = 4
    """Layer i (from 0) is global where (i + 1) is a multiple of this, else sliding-window."""
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] = ()
    """Every layer's kind, where `global_every` does not say it."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    tied: bool = False
    """Whether the head is the embedding."""
    scale_embedding: bool = True
    """Whether the embedding is multiplied by sqrt(width) (muP)."""
    max_positions: int = 131_072
    """Longest context a served model promises; nothing here depends on it."""
    load_balance_coeff: float | None = None
    """Balancing rate that a released configuration names; nothing here depends on it."""
    attention: AttentionConfig
    """Heads and window."""
    router: RouterConfig
    """Routed experts."""

    def __post_init__(self) -> None:
        check(self)
        sizes = ("vocab_size", "width", "num_layers", "global_every")
        for field in (*sizes, "dense_width", "expert_width"):
            value = getattr(self, field)
            fits = 1 <= value <= 2**24
            require(fits, field, value, "at least 1, at most 16,777,216")
        fits = 0 <= self.num_dense_layers <= self.num_layers
        right = f"from 0 to num_layers ({self.num_layers})"
        require(fits, "num_dense_layers", self.num_dense_layers, right)
        all_of_them = len(self.layer_types) in (0, self.num_layers)
        right = f"one for each of the {self.num_layers} layers, or none"
        require(all_of_them, "layer_types", self.layer_types, right)
        even = self.attention.head_dim % 2 == 0 or all(
            map(self.is_global, range(self.num_layers))
        )
        require(even, "head_dim", self.attention.head_dim, "even, for RoPE")
        require(self.max_positions >= 1, "max_positions", self.max_positions, "at least 1")
        enough = self.num_shared_experts >= 0
        require(enough, "num_shared_experts", self.num_shared_experts, "zero or more")
        require(self.norm_eps > 0, "norm_eps", self.norm_eps, "above zero")

    @property
    def moe_layers(self) -> range:
        """Indices of the layers with experts."""
        return range(self.num_dense_layers, self.num_layers)

    def is_global(self, layer: int) -> bool:
        """Whether a layer sees the whole document (and no position)."""
        if self.layer_types:
            return self.layer_types[layer] == "full_attention"
        return (layer + 1) % self.global_every == 0


class Output(NamedTuple):
    """What a forward pass returns."""

    logits: Tensor
    """Next-token logits, [B, S, V], in the model's dtype."""
    routing: tuple[Routing, ...]
    """One per MoE layer, in layer order, over T = B*S tokens."""
    hidden: tuple[Tensor, ...]
    """Residual stream [B, S, D]: embedding, then after each layer; empty unless asked for."""


class Cache(NamedTuple):
    """What decoding has seen so far; `Trinity.cache` makes one, `forward` fills it."""

    starts_B: Tensor
    """Where each row's tokens begin, behind its padding."""
    seen: Tensor
    """Positions seen, padding included, 0-d int64."""
    memories: tuple[Memory, ...]
    """Keys and values of every layer."""


class Block(nn.Module):
    """One layer: attention, then experts or a dense network, each between two norms.

    h += norm2(f(norm1(h))): the depth-scaled sandwich norm, whose second gain starts at
    1/sqrt(number of layers) (technical report, section 2.3).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        depth_gain = config.num_layers**-0.5
        self.attention_norm = RMSNorm(width, eps)
        self.attention = Attention(config.attention, width, eps, config.is_global(layer))
        self.attention_post_norm = RMSNorm(width, eps, depth_gain)
        self.mlp_norm = RMSNorm(width, eps)
        self.mlp_post_norm = RMSNorm(width, eps, depth_gain)
        self.is_moe = layer in config.moe_layers
        self.dense = self.router = self.experts = self.shared = None
        if not self.is_moe:
            self.dense = SwiGLU(width, config.dense_width)
            return
        self.router = Router(config.router, width, layer - config.num_dense_layers)
        self.experts = Experts(config.router.num_experts, width, config.expert_width)
        if config.num_shared_experts:
            self.shared = SwiGLU(width, config.num_shared_experts * config.expert_width)

    def forward(
        self,
        h_BSD: Tensor,
        context: Context,
        select: Select | None = None,
        experts_TK: Tensor | None = None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """The layer's output and, with experts, its routing."""
        mixed_BSD = self.attention(self.attention_norm(h_BSD), context, memory)
        h_BSD = h_BSD + self.attention_post_norm(mixed_BSD)
        x_BSD = self.mlp_norm(h_BSD)
        routing = None
        if self.dense is not None:
            y_BSD = self.dense(x_BSD)
        else:
            y_BSD, routing = self._sparse(x_BSD, select, experts_TK)
        return h_BSD + self.mlp_post_norm(y_BSD), routing

    def _sparse(
        self, x_BSD: Tensor, select: Select | None, experts_TK: Tensor | None
    ) -> tuple[Tensor, Routing]:
        assert self.router is not None and self.experts is not None
        x_TD = x_BSD.flatten(0, 1)
        routing = taken = self.router(x_TD, select, experts_TK)
        if routing.ragged:  # an empty place weighs nothing, whichever expert fills it
            taken = routing._replace(experts_TK=routing.experts_TK.clamp(min=0))
        y_BSD = self.experts(x_TD, taken).view_as(x_BSD)
        return (y_BSD if self.shared is None else y_BSD + self.shared(x_BSD)), routing


class Trinity(nn.Module):
    """The whole model; `initialise` fills it from a seeded generator."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        values = torch.empty(config.vocab_size, config.width)  # else they would be drawn
        self.embedding = nn.Embedding(config.vocab_size, config.width, _weight=values)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = None
        if not config.tied:
            self.head = Linear(config.width, config.vocab_size)

    def forward(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        *,
        select: Select | None = None,
        replay: Sequence[Tensor] | None = None,
        hidden: bool = False,
        recompute: bool = False,
        cache: Cache | None = None,
        last: bool = False,
    ) -> Output:
        """Logits, routing and, if asked, hidden states of packed rows.

        `documents_BS` numbers each row's documents (below 0: padding); without it a row is
        one document. `select` is a balancer's; without it the stored biases choose.
        `replay` gives every MoE layer's experts_TK instead. `recompute` keeps no
        activations inside blocks and computes them again in backward. `cache` keeps keys
        and values: of prompts, padded on the left, where `documents_BS` is given (once), of
        one more token of each row where it is not. `last` gives the logits of the last
        position alone.
        """
        if replay is not None and len(replay) != len(self.config.moe_layers):
            raise ValueError(
                f"replay has {len(replay)} layers; the model has "
                f"{len(self.config.moe_layers)} MoE layers."
            )
        h_BSD = self.embedding(tokens_BS)
        if self.config.scale_embedding:
            h_BSD = h_BSD * math.sqrt(self.config.width)
        shared = self._context(tokens_BS, documents_BS, cache, h_BSD.dtype)
        states, routings = [h_BSD], []
        for i, block in enumerate(self.blocks):
            moe = i - self.config.num_dense_layers
            experts_TK = replay[moe] if replay is not None and moe >= 0 else None
            if recompute:
                h_BSD, routing = checkpoint(
                    block, h_BSD, shared, select, experts_TK, use_reentrant=False
                )
            else:
                memory = None if cache is None else cache.memories[i]
                h_BSD, routing = block(h_BSD, shared, select, experts_TK, memory)
            if routing is not None:
                routings.append(routing)
            if hidden:
                states.append(h_BSD)
        if cache is not None:
            cache.seen.add_(tokens_BS.shape[1])
        h_BSD = self.norm(h_BSD)
        h_BSD = h_BSD[:, -1:] if last else h_BSD
        if self.head is None:
            logits_BSV = onednn.linear(h_BSD, self.embedding.weight)
        else:
            logits_BSV = self.head(h_BSD)
        return Output(logits_BSV, tuple(routings), tuple(states) if hidden else ())

    def cache(self, starts_B: Tensor, room: int) -> Cache:
        """An empty cache for `room` positions a row; sliding layers keep their window."""
        config, like = self.config.attention, self.embedding.weight
        memories = tuple(
            Memory(
                len(starts_B),
                room if self.config.is_global(i) else min(room, config.window),
                config,
                like,
            )
            for i in range(self.config.num_layers)
        )
        return Cache(starts_B, starts_B.new_zeros(()), memories)

    def _context(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None,
        cache: Cache | None,
        dtype: torch.dtype,
    ) -> Context:
        attention = self.config.attention
        if cache is None or documents_BS is not None:
            if documents_BS is None:
                documents_BS = torch.zeros_like(tokens_BS)
            return context(documents_BS, attention, dtype)
        one = tokens_BS.shape[1] == 1
        require(one, "tokens_BS", list(tokens_BS.shape), "[B, 1] where a cache goes on")
        kinds = {self.config.is_global(i): m for i, m in enumerate(cache.memories)}
        return decode_context(
            cache.starts_B, cache.seen, kinds.get(True), kinds.get(False), attention, dtype
        )

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, in layer order."""
        return [module for module in self.modules() if isinstance(module, Router)]

    @torch.no_grad()
    def load_bias(self, bias_LE: Tensor) -> None:
        """Store the balancer's selection biases, which travel with the weights."""
        for router, bias_E in zip(self.routers(), bias_LE, strict=True):
            router.bias_E.copy_(bias_E)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Matrices from TruncNormal(0, 0.25/D) cut at 3 sigma, gains as built, biases zero.

        Technical report, section 2.4: sigma = 0.5/sqrt(D) for every matrix, no scaling of
        residual outputs. Gains of QK-norm and the final norm are not published: 1.
        """
        seed = initial.seed_of(generator)
        for name, parameter in self.named_parameters():
            self.initialise_rows(name, parameter, seed)
        for router in self.routers():
            router.bias_E.zero_()

    @torch.no_grad()
    def initialise_rows(
        self, name: str, rows: Tensor, seed: int, *, first: int = 0, total: int | None = None
    ) -> None:
        """`initialise` for rows `first` on of one parameter, which has `total` rows."""
        if name.endswith(".bias"):
            rows.zero_()
        elif rows.dim() == 1:
            norm: Any = self.get_submodule(name.rpartition(".")[0])
            rows.fill_(float(torch.tensor(norm.initial_gain)))  # fp32, as all are drawn
        else:
            sigma = 0.5 / math.sqrt(self.config.width)
            initial.draw(rows, name, seed=seed, sigma=sigma, first=first, total=total)


class ParameterCount(NamedTuple):
    """Parameters of a model; "active" is what one token uses."""

    total: int
    """All trainable parameters; expert biases are not among them."""
    expert_bias: int
    """Selection biases, one per routed expert and MoE layer."""
    active: int
    """One token's, without embedding and head."""
    active_with_head: int
    """With the head."""
    active_with_embeddings: int
    """With the embedding and the head."""


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count on the meta device: no memory is allocated, whatever the size."""
    with torch.device("meta"):
        model = Trinity(config)
    total = sum(p.numel() for p in model.parameters())
    bias = sum(router.bias_E.numel() for router in model.routers())
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    routed = sum(p.numel() for module in experts for p in module.parameters())
    per_choice = routed // config.router.num_experts
    embedding = model.embedding.weight.numel()
    head = embedding  # of the same shape, tied or not
    apart = embedding if config.tied else embedding + head
    active = total - routed + per_choice * config.router.top_k - apart
    return ParameterCount(total, bias, active, active + head, active + apart)
