"""Attention against loops over heads and positions written from the equations."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from trinity_lib.attention import Attention, AttentionConfig, context, positions

CONFIG = AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=4, window=3, rope_theta=100.0)


def layer(is_global: bool) -> Attention:
    built = Attention(CONFIG, 10, 1e-5, is_global).double()
    generator = torch.Generator().manual_seed(3)
    for p in built.parameters():
        torch.nn.init.normal_(p, std=0.6, generator=generator)
    return built


def norm(v: Tensor, gain: Tensor) -> Tensor:
    return v / torch.sqrt(v.pow(2).mean() + 1e-5) * gain


def turn(v: Tensor, position: int) -> Tensor:
    """Rotate-half RoPE: coordinate i is paired with coordinate i + half."""
    out, half = v.clone(), len(v) // 2
    for i in range(half):
        angle = position * 100.0 ** (-2 * i / len(v))
        a, b = v[i], v[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


def by_loop(built: Attention, x: Tensor, documents: list[int]) -> Tensor:
    """One row, head by head and position by position."""
    S, dim = len(x), CONFIG.head_dim
    place = [s - documents.index(documents[s]) for s in range(S)]
    mixed = torch.zeros(S, CONFIG.num_heads * dim, dtype=x.dtype)
    for h in range(CONFIG.num_heads):
        j = h * CONFIG.num_kv_heads // CONFIG.num_heads
        own, shared = slice(h * dim, (h + 1) * dim), slice(j * dim, (j + 1) * dim)
        qs = [norm(built.query.weight[own] @ x[s], built.query_norm.weight_D) for s in range(S)]
        ks = [norm(built.key.weight[shared] @ x[s], built.key_norm.weight_D) for s in range(S)]
        if not built.is_global:
            qs = [turn(q, place[s]) for s, q in enumerate(qs)]
            ks = [turn(k, place[s]) for s, k in enumerate(ks)]
        for t in range(S):
            seen = [
                s for s in range(t + 1)
                if documents[s] == documents[t] and (built.is_global or t - s < CONFIG.window)
            ]  # fmt: skip
            weights = torch.stack([qs[t] @ ks[s] / math.sqrt(dim) for s in seen]).softmax(0)
            values = torch.stack([built.value.weight[shared] @ x[s] for s in seen])
            mixed[t, own] = weights @ values
    return (mixed * torch.sigmoid(x @ built.gate.weight.T)) @ built.out.weight.T


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("documents", [[0] * 9, [0, 0, 1, 1, 1, 1, 1, 2, 2]])
def test_against_the_equations(is_global: bool, documents: list[int]) -> None:
    built = layer(is_global)
    x = torch.randn(9, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    numbered = torch.tensor([documents])
    got = built(x[None], context(numbered, CONFIG, torch.float64))[0]
    torch.testing.assert_close(got, by_loop(built, x, documents), atol=1e-12, rtol=1e-10)


def test_positions_count_from_each_documents_start() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, -1, -1]])
    assert positions(documents).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]


def test_the_window_counts_the_token_itself() -> None:
    shared = context(torch.zeros(1, 6, dtype=torch.long), CONFIG, torch.float32)
    assert shared.window.sum(-1).flatten().tolist() == [1, 2, 3, 3, 3, 3]
    assert shared.everything_B1SS.sum(-1).flatten().tolist() == [1, 2, 3, 4, 5, 6]


@hypothesis_settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    st.integers(1, 40),
    st.integers(0, 30),
)
def test_blocks_of_a_window_are_the_whole_mask(
    lengths: list[int], window: int, padding: int
) -> None:
    """Rows of any length and packing, also no multiple of a block, and with padding."""
    config = dataclasses.replace(CONFIG, window=window)
    flat = [d for d, length in enumerate(lengths) for _ in range(length)]
    documents = torch.tensor([[-1] * padding + flat, flat + [-1] * padding])
    generator = torch.Generator().manual_seed(len(flat))
    shape = (2, documents.shape[1], 10)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    built = Attention(config, 10, 1e-5, is_global=False).double()
    for p in built.parameters():
        torch.nn.init.normal_(p, std=0.6, generator=generator)
    shared = context(documents, config, torch.float64)
    near = torch.arange(shape[1])[:, None] - torch.arange(shape[1]) < window
    whole = shared._replace(window=shared.everything_B1SS & near)
    results = []
    for seen in (shared, whole):
        y = built(x, seen)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, gradient))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-10)


def test_long_rows_are_attended_to_in_blocks() -> None:
    config = dataclasses.replace(CONFIG, window=32)
    long = context(torch.zeros(2, 100, dtype=torch.long), config, torch.float32)
    assert long.window.shape == (2 * 4, 1, 32, 64)
    short = context(torch.zeros(2, 64, dtype=torch.long), config, torch.float32)
    assert short.window.shape == (2, 1, 64, 64)


def test_no_gradient_crosses_a_documents_edge() -> None:
    for is_global in (False, True):
        x = torch.randn(1, 8, 10, dtype=torch.float64, requires_grad=True)
        documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
        out = layer(is_global)(x, context(documents, CONFIG, torch.float64))
        out[0, 3:6].square().sum().backward()
        touched = x.grad[0].abs().sum(-1) > 0
        assert touched.tolist() == [False] * 3 + [True] * 3 + [False] * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_heads": 5}, r"num_kv_heads is 2; it must be a divisor of num_heads \(5\)"),
        ({"head_dim": 0}, "head_dim is 0; it must be at least 1"),
        ({"window": 0}, "window is 0; it must be at least 1"),
    ],
)
def test_bad_settings(changes: dict, sentence: str) -> None:
    settings = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 4, "window": 3}
    with pytest.raises(ValueError, match=sentence):
        AttentionConfig(**{**settings, **changes})


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_positions_and_masks_of_any_packing(lengths: list[int]) -> None:
    flat = [d for d, length in enumerate(lengths) for _ in range(length)]
    place = [i for length in lengths for i in range(length)]
    documents = torch.tensor([flat])
    assert positions(documents).tolist() == [place]
    shared = context(documents, CONFIG, torch.float32)
    for t, (own, at) in enumerate(zip(flat, place, strict=True)):
        row = [int(s <= t and flat[s] == own) for s in range(len(flat))]
        assert shared.everything_B1SS[0, 0, t].int().tolist() == row
        near = [int(r and t - s <= 2) for s, r in enumerate(row)]
        assert shared.window[0, 0, t].int().tolist() == near
        angles = [at * 100.0 ** (-i / 2) for i in (0, 1, 0, 1)]
        cos, sin = shared.cos_BSC[0, t].tolist(), shared.sin_BSC[0, t].tolist()
        assert cos == pytest.approx([math.cos(a) for a in angles], abs=1e-6)
        assert sin == pytest.approx([math.sin(a) for a in angles], abs=1e-6)


@pytest.mark.parametrize("is_global", [False, True])
def test_a_packed_document_attends_as_it_would_alone(is_global: bool) -> None:
    built, lengths = layer(is_global).float(), [4, 1, 6]
    x = torch.randn(1, 11, 10, generator=torch.Generator().manual_seed(6))
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = built(x, context(documents, CONFIG, torch.float32))
    alone = [
        built(part, context(torch.zeros(1, part.shape[1]), CONFIG, torch.float32))
        for part in x.split(lengths, dim=1)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=0)


def test_only_local_layers_know_positions() -> None:
    """Swapping two earlier tokens is invisible to a global layer's last query."""
    x = torch.randn(1, 3, 10, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    swapped = x[:, [1, 0, 2]]
    here = context(torch.zeros(1, 3, dtype=torch.long), CONFIG, torch.float64)
    last = {g: (layer(g)(x, here) - layer(g)(swapped, here))[0, 2] for g in (False, True)}
    assert last[True].abs().max() < 1e-12 and last[False].abs().max() > 1e-3
