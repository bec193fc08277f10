"""First weights: any part is the whole's, in any order; their spread is the report's."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from trinity_lib.initial import ROWS, draw, seed_of
from trinity_lib.mesh import chunk
from trinity_lib.model import ModelConfig, Trinity

SIGMA = 0.02
TALL = 2 * ROWS + 905


def drawn(
    *shape: int, name: str = "w", seed: int = 7, first: int = 0, total: int | None = None
) -> Tensor:
    rows = torch.full(shape, torch.nan)
    draw(rows, name, seed=seed, sigma=SIGMA, first=first, total=total)
    return rows


def drawn_again(shape: tuple[int, ...], name: str, seed: int) -> Tensor:
    """By numbers drawn until all lie within 3 sigma, of one piece with a known generator."""
    height = 1 if len(shape) == 3 else 4096
    pieces = []
    for begin in range(0, shape[0], height):
        digest = hashlib.sha256(f"{seed}/{name}/{begin}".encode()).digest()
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        size = min(height, shape[0] - begin), *shape[1:]
        piece = torch.zeros(size).normal_(0, SIGMA, generator=generator)
        while (outside := piece.abs() > torch.tensor(3 * SIGMA)).any():
            other = torch.zeros(size).normal_(0, SIGMA, generator=generator)
            piece = torch.where(outside, other, piece)
        pieces.append(piece)
    return torch.cat(pieces)


@pytest.fixture(scope="module")
def tall() -> Tensor:
    return drawn(TALL, 3)


@pytest.mark.parametrize("shape", [(5, 4), (ROWS, 2), (ROWS + 1, 2), (TALL, 3), (4, 6, 5)])
def test_every_piece_has_a_generator_of_its_own(shape: tuple[int, ...]) -> None:
    for name, seed in (("blocks.0.dense.up", 3), ("w", 2**62 - 1)):
        assert torch.equal(drawn(*shape, name=name, seed=seed), drawn_again(shape, name, seed))


@settings(deadline=None, max_examples=40)
@given(first=st.integers(0, TALL), count=st.integers(0, TALL))
def test_any_rows_of_a_matrix_are_those_of_the_whole(
    tall: Tensor, first: int, count: int
) -> None:
    count = min(count, TALL - first)
    part = drawn(count, 3, first=first, total=TALL)
    assert torch.equal(part, tall[first : first + count])


@pytest.mark.parametrize("first", [0, 1, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, TALL - 1])
@pytest.mark.parametrize("count", [1, 2, ROWS, TALL])
def test_ends_at_and_beside_a_pieces_ends(tall: Tensor, first: int, count: int) -> None:
    count = min(count, TALL - first)
    part = drawn(count, 3, first=first, total=TALL)
    assert torch.equal(part, tall[first : first + count])


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7, 11])
@pytest.mark.parametrize("shape", [(TALL, 3), (5, 6, 4), (13, 2)])
def test_uneven_parts_make_up_the_whole_in_any_order(
    shape: tuple[int, ...], parts: int
) -> None:
    total, *rest = shape
    found: dict[int, Tensor] = {}
    for rank in reversed(range(parts)):
        span = chunk(total, parts, rank)
        found[rank] = drawn(span.count, *rest, first=span.first, total=total)
    together = torch.cat([found[rank] for rank in range(parts)])
    assert torch.equal(together, drawn(*shape))


def test_experts_are_drawn_one_at_a_time_and_none_is_anothers() -> None:
    every = drawn(6, 5, 4)
    assert torch.equal(every[2:3], drawn(1, 5, 4, first=2, total=6))
    assert torch.equal(every[:4], drawn(4, 5, 4))  # their number is no part of it
    assert len({tuple(e.flatten().tolist()) for e in every}) == 6


def test_names_seeds_and_pieces_give_other_numbers(tall: Tensor) -> None:
    pieces = [tall[:100], tall[ROWS : ROWS + 100], tall[2 * ROWS : 2 * ROWS + 100]]
    others = [drawn(100, 3, name="v"), drawn(100, 3, seed=8), drawn(100, 3, seed=77, name="")]
    flat = torch.stack([piece.flatten() for piece in (*pieces, *others)])
    correlation = torch.corrcoef(flat) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(300)


@pytest.mark.parametrize("shape", [(300, 300), (30, 100, 30)])
def test_spread_and_cut_are_the_reports(shape: tuple[int, ...]) -> None:
    """TruncNormal(0, sigma^2) within 3 sigma (technical report, section 2.3)."""
    numbers = drawn(*shape).flatten().double().numpy()
    assert np.abs(numbers).max() <= 3 * SIGMA * (1 + 1e-6)
    assert np.abs(numbers).max() > 2.95 * SIGMA
    density = math.exp(-4.5) / math.sqrt(2 * math.pi)
    inside = math.erf(3 / math.sqrt(2))
    spread = SIGMA * math.sqrt(1 - 6 * density / inside)  # 0.98658 sigma
    assert spread == pytest.approx(0.98658 * SIGMA, rel=1e-4)
    assert numbers.std() == pytest.approx(spread, rel=4 / math.sqrt(2 * numbers.size))
    assert abs(numbers.mean()) < 4 * spread / math.sqrt(numbers.size)
    assert stats.kstest(numbers / SIGMA, stats.truncnorm(-3, 3).cdf).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_numbers_are_fp32s_whatever_they_are_kept_in(dtype: torch.dtype) -> None:
    rows = torch.empty(7, 5, dtype=dtype)
    draw(rows, "w", seed=7, sigma=SIGMA)
    assert torch.equal(rows, drawn(7, 5).to(dtype))


def test_a_views_memory_is_filled_and_nothing_beside_it() -> None:
    whole = torch.zeros(9, 8)
    draw(whole[2:6, 1:6], "w", seed=7, sigma=SIGMA, first=3, total=11)
    assert torch.equal(whole[2:6, 1:6], drawn(11, 5)[3:7])
    whole[2:6, 1:6] = 0
    assert not whole.any()


def test_no_other_generator_is_used() -> None:
    state = torch.get_rng_state()
    drawn(5, 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_come_from_the_generator() -> None:
    first, again = (torch.Generator().manual_seed(3) for _ in range(2))
    seeds = [seed_of(first) for _ in range(50)]
    assert seeds == [seed_of(again) for _ in range(50)]
    assert len(set(seeds)) == 50 and all(0 <= seed < 2**62 for seed in seeds)
    assert max(seeds) > 2**60


def test_a_models_matrices_are_drawn_by_name_with_half_over_the_root_of_width(
    tiny_model: ModelConfig,
) -> None:
    model = Trinity(tiny_model)
    model.initialise(torch.Generator().manual_seed(4))
    seed = seed_of(torch.Generator().manual_seed(4))
    sigma = 0.5 / math.sqrt(32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            expected = torch.empty_like(parameter)
            draw(expected, name, seed=seed, sigma=sigma)
            assert torch.equal(parameter, expected), name
        elif name.endswith("post_norm.weight_D"):  # the depth-scaled sandwich's second
            assert torch.equal(parameter, torch.full_like(parameter, 1 / math.sqrt(4)))
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
