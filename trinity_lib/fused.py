# mypy: allow-untyped-defs
# Kernels take pointers, which have no types.
"""Row kernels of the torch backend on CUDA, in Triton: one pass where torch takes many.

For a layer of Large at 32k tokens each pass over the routed rows moves 0.8 GB; eager torch
takes about 70 of them forward and backward, these kernels about 19. No atomics, every sum in
a fixed order. Rounding is MegaBlocks': a row is weighed in fp32, rounded, then summed over K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def invert(order_R: Tensor) -> Tensor:
    """The inverse permutation."""
    inverse_R, R = torch.empty_like(order_R), len(order_R)
    _invert[(triton.cdiv(R, BLOCK),)](order_R, inverse_R, R, BLOCK)
    return inverse_R


def gather(x_TD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    """The token of every row, in the order of experts: [R, D]."""
    rows_RD = x_TD.new_empty(len(order_R), x_TD.shape[1])
    _gather[(len(order_R),)](x_TD, order_R, rows_RD, x_TD.shape[1], top_k, BLOCK)
    return rows_RD


def swiglu(gate_RF: Tensor, up_RF: Tensor) -> Tensor:
    """silu(gate) * up."""
    hidden_RF, size = torch.empty_like(gate_RF), gate_RF.numel()
    _swiglu[(triton.cdiv(size, BLOCK),)](gate_RF, up_RF, hidden_RF, size, BLOCK)
    return hidden_RF


def swiglu_backward(
    gate_RF: Tensor, up_RF: Tensor, dhidden_RF: Tensor, weights_TK: Tensor, order_R: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate and up; weight * silu(gate) * up; gradients of the weights [T, K].

    `dhidden_RF` is <dy, down>, before weighting; it becomes the third result, in place.
    """
    dgate_RF, dup_RF = torch.empty_like(gate_RF), torch.empty_like(up_RF)
    dweights_TK = torch.empty_like(weights_TK)
    _swiglu_backward[(len(gate_RF),)](
        gate_RF, up_RF, dhidden_RF, weights_TK, order_R, dgate_RF, dup_RF, dweights_TK,
        gate_RF.shape[1], BLOCK,
    )  # fmt: skip
    return dgate_RF, dup_RF, dhidden_RF, dweights_TK


def combine(
    y_RD: Tensor,
    inverse_R: Tensor,
    top_k: int,
    weights_TK: Tensor | None = None,
    other_RD: Tensor | None = None,
) -> Tensor:
    """Each token's sum over its rows of `y_RD` (plus `other_RD`), weighed if asked: [T, D]."""
    T, D = len(inverse_R) // top_k, y_RD.shape[1]
    sums_TD = y_RD.new_empty(T, D)
    _combine[(T, triton.cdiv(D, BLOCK))](
        y_RD,
        y_RD if other_RD is None else other_RD,
        inverse_R,
        y_RD if weights_TK is None else weights_TK,
        sums_TD,
        D,
        top_k,
        other_RD is not None,
        weights_TK is not None,
        BLOCK,
    )
    return sums_TD


@triton.jit
def _invert(order, inverse, R, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(order + i, i < R, 0)
    tl.store(inverse + row, i.to(inverse.dtype.element_ty), i < R)


@triton.jit
def _gather(x, order, rows, D, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(order + row) // K
    for start in range(0, D, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(rows + row * D + i, tl.load(x + token * D + i, i < D, 0), i < D)


@triton.jit
def _swiglu(gate, up, hidden, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, i < size, 0).to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(hidden.dtype.element_ty).to(tl.float32)
    u = tl.load(up + i, i < size, 0).to(tl.float32)
    tl.store(hidden + i, (silu * u).to(hidden.dtype.element_ty), i < size)


@triton.jit
def _swiglu_backward(
    gate, up, hidden, weights, order, dgate, dup, dweights, F, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(order + row)
    w = tl.load(weights + slot).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, F, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = row * F + i
        g = tl.load(gate + at, i < F, 0).to(tl.float32)
        u = tl.load(up + at, i < F, 0).to(tl.float32)
        d = tl.load(hidden + at, i < F, 0).to(tl.float32)
        s = 1 / (1 + tl.exp(-g))
        h = g * s * u
        total += d * h
        d *= w
        kind = dgate.dtype.element_ty
        tl.store(dgate + at, (d * u * s * (1 + g * (1 - s))).to(kind), i < F)
        tl.store(dup + at, (d * g * s).to(kind), i < F)
        tl.store(hidden + at, (w * h).to(kind), i < F)
    tl.store(dweights + slot, tl.sum(total).to(dweights.dtype.element_ty))


@triton.jit
def _combine(
    y, other, inverse, weights, sums, D,
    K: tl.constexpr, TWO: tl.constexpr, WEIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        row = tl.load(inverse + token * K + k)
        value = tl.load(y + row * D + i, i < D, 0).to(tl.float32)
        if TWO:
            value += tl.load(other + row * D + i, i < D, 0).to(tl.float32)
        if WEIGH:
            value *= tl.load(weights + token * K + k).to(tl.float32)
        if TWO or WEIGH:
            value = value.to(y.dtype.element_ty).to(tl.float32)
        total += value
    tl.store(sums + token * D + i, total.to(sums.dtype.element_ty), i < D)
