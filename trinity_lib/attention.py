"""Gated grouped-query attention: sliding window with RoPE, or global without position."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity_lib.config import check, require
from trinity_lib.linear import Linear, project

SMALLEST_BLOCK = 32
"""Queries of one block of sliding attention, where the window is not wider."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Heads, and what a sliding-window layer sees."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key and value heads, each shared by num_heads / num_kv_heads query heads."""
    head_dim: int
    """Width of a head; num_heads * head_dim need not equal the model's width."""
    window: int
    """Positions a sliding-window layer sees, its own included."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (sliding-window layers alone have position)."""
    bias: bool = False
    """Whether query, key, value and output projections have biases; Trinity's have none."""

    def __post_init__(self) -> None:
        check(self)
        require(self.num_heads >= 1, "num_heads", self.num_heads, "at least 1")
        shared = self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0
        right = f"a divisor of num_heads ({self.num_heads})"
        require(shared, "num_kv_heads", self.num_kv_heads, right)
        require(self.head_dim >= 1, "head_dim", self.head_dim, "at least 1")
        require(self.window >= 1, "window", self.window, "at least 1")
        require(self.rope_theta > 0, "rope_theta", self.rope_theta, "above zero")


class Context(NamedTuple):
    """What attention needs to know of a batch, computed once and shared by all layers."""

    everything_B1SS: Tensor
    """Query may see key: same document, not later."""
    window: Tensor
    """The same, within the window: [B, 1, S, S], or [N, 1, W, 2W] for `in_blocks`."""
    cos_BSC: Tensor
    """RoPE cosines [B, S, C]."""
    sin_BSC: Tensor
    """RoPE sines [B, S, C]."""
    seen: Tensor | None = None
    """When decoding: the new token's position, counted from its row's start, 0-d int64."""


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain, computed in fp32 or better."""

    def __init__(self, width: int, eps: float, gain: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.initial_gain = gain
        self.weight_D = nn.Parameter(torch.full((width,), gain))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        precise = torch.promote_types(x.dtype, torch.float32)
        gain_D = self.weight_D.to(precise)
        return F.rms_norm(x.to(precise), x.shape[-1:], gain_D, self.eps).to(x.dtype)


def context(documents_BS: Tensor, config: AttentionConfig, dtype: torch.dtype) -> Context:
    """Masks and rotary tables of packed rows: documents do not see each other.

    `documents_BS` numbers the documents of each row; a position counts from the start of
    its document, so a packed document is computed as it would be alone.
    """
    S = documents_BS.shape[1]
    index_S = torch.arange(S, device=documents_BS.device)
    same_BSS = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    distance_SS = index_S.unsqueeze(1) - index_S.unsqueeze(0)
    everything_B1SS = (same_BSS & (distance_SS >= 0)).unsqueeze(1)
    block = max(config.window, SMALLEST_BLOCK)
    if 2 * block * -(-S // block) * block < S**2:
        window = _window_in_blocks(documents_BS, config.window, block)
    else:
        window = everything_B1SS & (distance_SS < config.window)
    return Context(everything_B1SS, window, *rotary(positions(documents_BS), config, dtype))


def _window_in_blocks(documents_BS: Tensor, window: int, block: int) -> Tensor:
    """Which of its own and the previous block's keys each query sees, [N, 1, W, 2W]."""
    missing = -documents_BS.shape[1] % block
    own_BNW = F.pad(documents_BS, (0, missing), value=-2).unflatten(1, (-1, block))
    before_BNW = F.pad(own_BNW[:, :-1], (0, 0, 1, 0), value=-3)
    same_BNWP = own_BNW.unsqueeze(3) == torch.cat([before_BNW, own_BNW], 2).unsqueeze(2)
    index = torch.arange(2 * block, device=documents_BS.device)
    distance_WP = index[block:].unsqueeze(1) - index
    seen_BNWP = same_BNWP & (distance_WP >= 0) & (distance_WP < window)
    return seen_BNWP.flatten(0, 1).unsqueeze(1)


def positions(documents_BS: Tensor) -> Tensor:
    """Each token's position within its document, [B, S] int64."""
    index_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    starts_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    starts_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return index_S - torch.where(starts_BS, index_S, 0).cummax(1).values


def rotary(
    positions_BS: Tensor, config: AttentionConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, C] in the rotate-half convention (Su et al. 2021)."""
    precise = torch.promote_types(dtype, torch.float32)
    half = torch.arange(0, config.head_dim, 2, device=positions_BS.device, dtype=precise)
    # As transformers computes them: another order of operations moves late positions.
    frequencies = 1.0 / config.rope_theta ** (half / config.head_dim)
    angles = positions_BS.unsqueeze(-1).to(precise) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHSC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    """Apply RoPE to queries or keys."""
    left, right = x_BHSC.chunk(2, dim=-1)
    turned_BHSC = torch.cat([-right, left], dim=-1)
    return x_BHSC * cos_BSC.unsqueeze(1) + turned_BHSC * sin_BSC.unsqueeze(1)


def in_blocks(q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, mask_N1WP: Tensor) -> Tensor:
    """Sliding attention over blocks of W queries and the 2W keys they may see, [B, H, S, C].

    Its cost and its mask grow with S*W instead of S*S. N is B times the blocks of a row, W
    the window or a little more.
    """
    B, _, S, _ = q_BHSC.shape
    block = mask_N1WP.shape[-2]

    def blocks(x_BHSC: Tensor) -> Tensor:
        padded = F.pad(x_BHSC, (0, 0, 0, -S % block))
        return padded.unflatten(2, (-1, block)).transpose(1, 2)

    def with_previous(x_BHSC: Tensor) -> Tensor:
        own = blocks(x_BHSC)
        before = F.pad(own[:, :-1], (0, 0) * 3 + (1, 0))
        return torch.cat([before, own], 3).flatten(0, 1)

    pairs = (with_previous(k_BHSC), with_previous(v_BHSC))
    mixed = _attend(blocks(q_BHSC).flatten(0, 1), *pairs, mask_N1WP)
    return mixed.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, :S]


def _attend(q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, mask: Tensor) -> Tensor:
    if q_BHSC.is_cuda:  # of CUDA's kernels, those that take a mask take no shared heads
        sharing = q_BHSC.shape[1] // k_BHSC.shape[1]
        k_BHSC, v_BHSC = (x.repeat_interleave(sharing, 1) for x in (k_BHSC, v_BHSC))
    return F.scaled_dot_product_attention(
        q_BHSC, k_BHSC, v_BHSC, attn_mask=mask, enable_gqa=not q_BHSC.is_cuda
    )


class Memory:
    """One layer's keys and values, preallocated; a sliding layer's is a ring of its window.

    Its shape never changes and its slots are found by tensors, so that a compiled step of
    decoding serves every position.
    """

    def __init__(self, batch: int, room: int, config: AttentionConfig, like: Tensor) -> None:
        shape = (batch, config.num_kv_heads, room, config.head_dim)
        self.keys_BHPC, self.values_BHPC = like.new_zeros(shape), like.new_zeros(shape)
        self.room = room

    def fill(self, k_BHSC: Tensor, v_BHSC: Tensor) -> None:
        """Keep a prompt's keys and values, the last `room` of them."""
        S = k_BHSC.shape[2]
        kept = min(S, self.room)
        slots = torch.arange(S - kept, S, device=k_BHSC.device) % self.room
        self.keys_BHPC[:, :, slots] = k_BHSC[:, :, -kept:]
        self.values_BHPC[:, :, slots] = v_BHSC[:, :, -kept:]

    def append(self, k_BH1C: Tensor, v_BH1C: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Keep one more token's, at position `seen`; everything held, empty slots too."""
        slot = (seen % self.room).reshape(1)
        self.keys_BHPC.index_copy_(2, slot, k_BH1C)
        self.values_BHPC.index_copy_(2, slot, v_BH1C)
        return self.keys_BHPC, self.values_BHPC

    def visible(self, starts_B: Tensor, seen: Tensor) -> Tensor:
        """Which slots position `seen` may attend to, [B, 1, 1, P]; not padding, not empty ones.

        A slot holds the latest position that maps to it; in a ring those are the window.
        """
        slot_P = torch.arange(self.room, device=starts_B.device)
        held_P = seen - (seen - slot_P) % self.room
        return (held_P >= starts_B.unsqueeze(1))[:, None, None]


def decode_context(
    starts_B: Tensor, seen: Tensor, everything: Memory | None, window: Memory | None,
    config: AttentionConfig, dtype: torch.dtype,
) -> Context:  # fmt: skip
    """What one more token of each row, at position `seen` (0-d int64), may attend to.

    `starts_B` is where a row's tokens begin, behind its padding.
    """
    some = everything or window
    assert some is not None
    everything_B11P = (everything or some).visible(starts_B, seen)
    window_B11P = (window or some).visible(starts_B, seen)
    cos_B1C, sin_B1C = rotary((seen - starts_B).unsqueeze(1), config, dtype)
    return Context(everything_B11P, window_B11P, cos_B1C, sin_B1C, seen)


class Attention(nn.Module):
    """One attention layer (technical report, equations 1-14).

    QK-norm per head before RoPE; the output gate is computed from the same normed input
    and applied before the output projection; a global layer has no position at all.
    """

    def __init__(
        self, config: AttentionConfig, width: int, eps: float, is_global: bool
    ) -> None:
        super().__init__()
        self.config = config
        self.is_global = is_global
        inner = config.num_heads * config.head_dim
        shared = config.num_kv_heads * config.head_dim
        self.query = Linear(width, inner, bias=config.bias)
        self.key = Linear(width, shared, bias=config.bias)
        self.value = Linear(width, shared, bias=config.bias)
        self.gate = Linear(width, inner)
        self.out = Linear(inner, width, bias=config.bias)
        self.query_norm = RMSNorm(config.head_dim, eps)
        self.key_norm = RMSNorm(config.head_dim, eps)

    def forward(
        self, x_BSD: Tensor, context: Context, memory: "Memory | None" = None
    ) -> Tensor:
        """Attend over `x_BSD`, already normed, and what `memory` holds; returns [B, S, D]."""
        B, S, _ = x_BSD.shape
        split = (B, S, -1, self.config.head_dim)
        query, key, value, gate = project(x_BSD, self.query, self.key, self.value, self.gate)
        q_BHSC = self.query_norm(query.view(split)).transpose(1, 2)
        k_BHSC = self.key_norm(key.view(split)).transpose(1, 2)
        v_BHSC = value.view(split).transpose(1, 2)
        if not self.is_global:
            q_BHSC = rotate(q_BHSC, context.cos_BSC, context.sin_BSC)
            k_BHSC = rotate(k_BHSC, context.cos_BSC, context.sin_BSC)
        if memory is not None and context.seen is not None:
            k_BHSC, v_BHSC = memory.append(k_BHSC, v_BHSC, context.seen)
        elif memory is not None:
            memory.fill(k_BHSC, v_BHSC)
        mask = context.everything_B1SS if self.is_global else context.window
        if mask.shape[-2] == S:
            mixed_BHSC = _attend(q_BHSC, k_BHSC, v_BHSC, mask)
        else:
            mixed_BHSC = in_blocks(q_BHSC, k_BHSC, v_BHSC, mask)
        mixed_BSD = mixed_BHSC.transpose(1, 2).reshape(B, S, -1)
        return self.out(mixed_BSD * gate.sigmoid())
