"""Gated grouped-query attention: sliding window with RoPE, or global without position."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity_lib.config import check, require


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
    window_B1SS: Tensor
    """The same, within the window."""
    cos_BSC: Tensor
    """RoPE cosines [B, S, C]."""
    sin_BSC: Tensor
    """RoPE sines [B, S, C]."""


class Linear(nn.Linear):
    """torch's, without a bias unless asked and without values: `initialise` gives them.

    torch's own values come from the global generator, and on the meta device it imports
    150 MB of packages to draw them.
    """

    def __init__(self, fan_in: int, fan_out: int, bias: bool = False) -> None:
        super().__init__(fan_in, fan_out, bias=bias)

    def reset_parameters(self) -> None:
        """Draw nothing."""


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
        normed = F.rms_norm(x.to(precise), x.shape[-1:], eps=self.eps)
        return (normed * self.weight_D.to(precise)).to(x.dtype)


def context(documents_BS: Tensor, config: AttentionConfig, dtype: torch.dtype) -> Context:
    """Masks and rotary tables of packed rows: documents do not see each other.

    `documents_BS` numbers the documents of each row; a position counts from the start of
    its document, so a packed document is computed as it would be alone.
    """
    S = documents_BS.shape[1]
    index_S = torch.arange(S, device=documents_BS.device)
    same_BSS = documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)
    distance_SS = index_S.unsqueeze(1) - index_S.unsqueeze(0)
    everything_BSS = same_BSS & (distance_SS >= 0)
    window_BSS = everything_BSS & (distance_SS < config.window)
    cos_BSC, sin_BSC = rotary(positions(documents_BS), config, dtype)
    return Context(everything_BSS.unsqueeze(1), window_BSS.unsqueeze(1), cos_BSC, sin_BSC)


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


class Memory:
    """One layer's keys and values, preallocated; a sliding layer's is a ring of its window."""

    def __init__(self, batch: int, room: int, config: AttentionConfig, like: Tensor) -> None:
        shape = (batch, config.num_kv_heads, room, config.head_dim)
        self.keys_BHPC, self.values_BHPC = like.new_zeros(shape), like.new_zeros(shape)
        self.room, self.seen = room, 0

    def extend(self, k_BHSC: Tensor, v_BHSC: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values; those to attend to: a prompt's own, or all that is held."""
        S = k_BHSC.shape[2]
        kept = min(S, self.room)
        slots = torch.arange(self.seen + S - kept, self.seen + S, device=k_BHSC.device)
        self.keys_BHPC[:, :, slots % self.room] = k_BHSC[:, :, -kept:]
        self.values_BHPC[:, :, slots % self.room] = v_BHSC[:, :, -kept:]
        self.seen += S
        if self.seen == S:
            return k_BHSC, v_BHSC
        held = min(self.seen, self.room)
        return self.keys_BHPC[:, :, :held], self.values_BHPC[:, :, :held]

    def positions(self) -> Tensor:
        """The position each held slot will have once the next token is kept."""
        held = min(self.seen + 1, self.room)
        slot_P = torch.arange(held, device=self.keys_BHPC.device)
        return self.seen - (self.seen - slot_P) % self.room


def decode_context(
    starts_B: Tensor, everything: Memory | None, window: Memory | None,
    config: AttentionConfig, dtype: torch.dtype,
) -> Context:  # fmt: skip
    """What one more token of each row may see; `starts_B` is where the row's tokens begin.

    Every held slot of a ring is within the window, so that padding alone is masked.
    """
    seen = next(m.seen for m in (everything, window) if m is not None)
    masks = [
        (memory.positions() >= starts_B.unsqueeze(1))[:, None, None] if memory else None
        for memory in (everything, window)
    ]
    none = torch.ones(len(starts_B), 1, 1, 1, dtype=torch.bool, device=starts_B.device)
    everything_B11P, window_B11P = (none if mask is None else mask for mask in masks)
    cos_B1C, sin_B1C = rotary((seen - starts_B).unsqueeze(1), config, dtype)
    return Context(everything_B11P, window_B11P, cos_B1C, sin_B1C)


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
        q_BHSC = self.query_norm(self.query(x_BSD).view(split)).transpose(1, 2)
        k_BHSC = self.key_norm(self.key(x_BSD).view(split)).transpose(1, 2)
        v_BHSC = self.value(x_BSD).view(split).transpose(1, 2)
        if not self.is_global:
            q_BHSC = rotate(q_BHSC, context.cos_BSC, context.sin_BSC)
            k_BHSC = rotate(k_BHSC, context.cos_BSC, context.sin_BSC)
        if memory is not None:
            k_BHSC, v_BHSC = memory.extend(k_BHSC, v_BHSC)
        mask_B1SS = context.everything_B1SS if self.is_global else context.window_B1SS
        mixed_BHSC = F.scaled_dot_product_attention(
            q_BHSC, k_BHSC, v_BHSC, attn_mask=mask_B1SS, enable_gqa=True
        )
        mixed_BSD = mixed_BHSC.transpose(1, 2).reshape(B, S, -1)
        return self.out(mixed_BSD * self.gate(x_BSD).sigmoid())
