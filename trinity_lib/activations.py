"""Bytes of activations that training keeps, a token, from what autograd saves.

Under bf16 autocast over fp32 weights, with the torch backend of the experts and CUDA's fused
norms (elsewhere a norm also keeps its fp32 result before the gain).
"""

import functools

from trinity_lib.attention import SMALLEST_BLOCK
from trinity_lib.model import ModelConfig

FULL, HALF, LONG = 4, 2, 8
"""Bytes of an fp32, of a bf16 and of an int64 number."""


def kept(config: ModelConfig, length: int, *, recompute: bool, exchanged: bool) -> int:
    """Bytes a token between forward and backward, in documents of `length` tokens.

    Every block's fp32 input, the last one's output and its normed bf16 copy for the head;
    masks and rotary tables, which layers share; and what blocks keep, or, where they are
    recomputed, the routing that they hand out. `exchanged`: experts lie on several ranks.
    """
    inputs = FULL * config.width * (config.num_layers + 1) + FULL + HALF * config.width
    inside = sum(kept_by_blocks(config, length, exchanged))
    if recompute:
        scores, choices = config.router.num_experts, config.router.top_k
        inside = len(config.moe_layers) * (FULL * scores + (LONG + FULL) * choices)
    return inputs + _context(config, length) + inside


@functools.lru_cache(maxsize=64)
def kept_by_blocks(config: ModelConfig, length: int, exchanged: bool) -> tuple[int, ...]:
    """Bytes a token that each block keeps, its input left out."""
    layers = range(config.num_layers)
    return tuple(kept_by_block(config, i, length, exchanged) for i in layers)


def kept_by_attention(config: ModelConfig, length: int, layer: int) -> int:
    """Bytes a token that a layer's attention keeps for backward, its input left out.

    The norms' fp32 inputs and roots; a bf16 copy of the normed input for each of four
    projections; queries and keys in fp32 before their norms; what attention itself keeps:
    bf16 queries, keys and values repeated to every head (twice as many keys in windows by
    blocks), the mask as a bf16 bias, the log-sum of each query, the output; the gate's
    sigmoid and the gated output.
    """
    heads, width = config.attention, config.width
    queries, shared = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    reach, repeats = _reach(config, length, layer)
    norms = FULL + (FULL * width + FULL) + FULL * (queries + shared)
    norms += FULL * (heads.num_heads + heads.num_kv_heads)
    attended = HALF * queries * (1 + 2 * repeats) + HALF * reach + FULL * heads.num_heads
    return norms + 4 * HALF * width + attended + 3 * HALF * queries


def kept_by_dense(width: int, hidden: int) -> int:
    """Bytes a token that a SwiGLU keeps: two copies of its input; gate, SiLU, up, product."""
    return 2 * HALF * width + 4 * HALF * hidden


def kept_by_experts(config: ModelConfig, exchanged: bool) -> int:
    """Bytes a token that router and experts keep.

    The router's fp32 input and scores, choices and weights; the experts' bf16 input, gates
    and ups of every chosen expert, their order there and back. With an exchange the input
    is a row for each choice, and results stay in fp32 to be weighed.
    """
    choices, width = config.router.top_k, config.width
    router = FULL * width + FULL * config.router.num_experts + 2 * LONG * choices + FULL
    experts = 2 * HALF * choices * config.expert_width + 2 * LONG * choices
    if exchanged:
        rows = (HALF + FULL) * width + 2 * LONG + FULL
        return router + experts + choices * rows
    return router + experts + HALF * width


def kept_by_block(config: ModelConfig, layer: int, length: int, exchanged: bool) -> int:
    """Bytes a token that a block keeps, its input left out."""
    width = config.width
    kept = kept_by_attention(config, length, layer)
    kept += (FULL * width + FULL) + (FULL * width + FULL)
    if layer not in config.moe_layers:
        return kept + kept_by_dense(width, config.dense_width)
    kept += kept_by_experts(config, exchanged)
    if config.num_shared_experts:
        kept += kept_by_dense(width, config.num_shared_experts * config.expert_width)
    return kept


def moving(config: ModelConfig) -> int:
    """Bytes a token of gradients in flight in the widest of a block's operators.

    Experts: rows and their gradients (four of the model's width), and of gate, up, hidden
    and its gradient; SwiGLU: four of its width; attention: queries, keys, values, output,
    gate.
    """
    heads, choices = config.attention, config.router.top_k
    queries = heads.num_heads * heads.head_dim
    each = [5 * HALF * queries]
    if config.moe_layers:
        each.append(4 * HALF * choices * (config.width + config.expert_width))
        each.append(4 * HALF * config.num_shared_experts * config.expert_width)
    if config.num_dense_layers:
        each.append(4 * HALF * config.dense_width)
    return max(each)


def _context(config: ModelConfig, length: int) -> int:
    """Bytes a token of what all layers share: two masks, cosines and sines."""
    windows = [i for i in range(config.num_layers) if not config.is_global(i)]
    window = _reach(config, length, windows[0])[0] if windows else length
    return length + window + 2 * FULL * config.attention.head_dim


def _reach(config: ModelConfig, length: int, layer: int) -> tuple[int, int]:
    """Keys of a mask's row, and how often keys are laid out (`attention.in_blocks`)."""
    block = max(config.attention.window, SMALLEST_BLOCK)
    in_blocks = 2 * block * -(-length // block) * block < length**2
    return (2 * block, 2) if in_blocks and not config.is_global(layer) else (length, 1)
