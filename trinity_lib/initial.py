"""First weights that do not depend on who draws them: every piece has a generator of its own.

A rank that holds a part of a model draws that part alone, and all ranks together have the
weights that one process would have drawn.
"""

import hashlib

import torch
from torch import Tensor, nn

ROWS = 4096
"""Rows of a matrix that are drawn together; of experts, one at a time."""


def seed_of(generator: torch.Generator) -> int:
    """One number drawn from a generator, from which every piece's seed is made."""
    return int(torch.randint(2**62, (), generator=generator))


def draw(
    rows: Tensor,
    name: str,
    *,
    seed: int,
    sigma: float,
    first: int = 0,
    total: int | None = None,
) -> None:
    """Fill rows `first` on, of a parameter with `total`, from TruncNormal(0, sigma), 3 sigma.

    Drawn in fp32 on the CPU, whatever `rows` are and wherever they lie. `rows` is 2-D, or
    3-D for experts (first axis).
    """
    total = len(rows) if total is None else total
    height = 1 if rows.dim() == 3 else ROWS
    last = first + len(rows)
    assert last <= total, f"rows {first} to {last} of {total}"
    for begin in range(first - first % height, last, height):
        end = min(begin + height, total)
        piece = torch.empty(end - begin, *rows.shape[1:])
        key = hashlib.sha256(f"{seed}/{name}/{begin}".encode()).digest()
        generator = torch.Generator().manual_seed(
            int.from_bytes(key[:8], "little", signed=True)
        )
        nn.init.trunc_normal_(piece, std=sigma, a=-3 * sigma, b=3 * sigma, generator=generator)
        low, high = max(begin, first), min(end, last)
        rows[low - first : high - first].copy_(piece[low - begin : high - begin])
