"""Operations of one token, exactly, from the shapes of the matrices it meets.

A product of a row with a matrix of n parameters is 2n operations: a multiplication and an
addition each. Counted are matrix products and attention; norms, SwiGLU's own products,
sigmoids and the softmax are not (under 1% in the published models), and an embedding is
looked up.
"""

from typing import NamedTuple

from trinity_lib.model import ModelConfig


class Flops(NamedTuple):
    """Forward operations of one token, FLOP, by what they are for."""

    projections: float
    """Attention's queries, keys, values, gate and output."""
    attention: float
    """Scores, and the sum of values: 4 x heads x head_dim for every key a query sees."""
    dense: float
    """SwiGLUs of the dense layers."""
    routed: float
    """The chosen experts."""
    shared: float
    """Shared experts."""
    router: float
    """A score for every expert."""
    head: float
    """A logit for every entry of the vocabulary."""

    @property
    def forward(self) -> float:
        """All of them."""
        return float(sum(self))

    @property
    def training(self) -> float:
        """With backward, which is twice forward: a product for each factor's gradient.

        What recomputation repeats is not counted, as usual where efficiency is quoted (MFU).
        """
        return 3 * self.forward


def per_token(config: ModelConfig, length: int) -> Flops:
    """A token's operations, averaged over the positions of a document of `length` tokens."""
    heads = config.attention
    inner, shared = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    layers, moe, width = config.num_layers, len(config.moe_layers), config.width
    keys = sum(
        seen(length, None if config.is_global(i) else heads.window) for i in range(layers)
    )
    expert = 6 * width * config.expert_width
    return Flops(
        projections=2 * layers * width * (3 * inner + 2 * shared),
        attention=4 * inner * keys,
        dense=6 * config.num_dense_layers * width * config.dense_width,
        routed=moe * config.router.top_k * expert,
        shared=moe * config.num_shared_experts * expert,
        router=2 * moe * width * config.router.num_experts,
        head=2 * width * config.vocab_size,
    )


def seen(length: int, window: int | None) -> float:
    """Keys that a query sees, itself included, on average over a document's positions.

    Position t (from 1) sees t keys, or `window` where that is less:
    sum of min(t, w) = w(w+1)/2 + (length-w)w for w = min(window, length).
    """
    reach = length if window is None else min(window, length)
    return (reach * (reach + 1) / 2 + (length - reach) * reach) / length


def six_nd(parameters: float, tokens: float) -> float:
    """The usual estimate of a training run, FLOP: six for every active parameter and token.

    Attention's scores are left out (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    """
    return 6.0 * parameters * tokens
