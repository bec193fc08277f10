"""The torch backend's operator: rows sorted by expert, a grouped product a projection.

Forward and backward are one operator each, so that nothing of width D is kept for the
R = T*K rows, and compilers need not look inside. The C++ operator of `native.cpp` has the
same signature.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_matmul(x_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of expert e, up to `ends_E[e]`, times that expert's matrix: [R, O].

    torch's grouped GEMM where it can (16-byte rows; no float64; no fp32 on CUDA), else a
    loop over experts.
    """
    if _grouped_gemm_takes(x_RI, *weight_EIO.shape[1:]):
        return F.grouped_mm(x_RI, weight_EIO, offs=ends_E)
    pieces = zip(x_RI.split(_sizes(ends_E)), weight_EIO.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in pieces])


def grouped_outer(a_RI: Tensor, b_RO: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows of a, transposed, times its rows of b: [E, I, O]; idle experts 0."""
    if _grouped_gemm_takes(a_RI, a_RI.shape[1], b_RO.shape[1]):
        return F.grouped_mm(a_RI.t(), b_RO, offs=ends_E)
    sizes = _sizes(ends_E)
    pieces = zip(a_RI.split(sizes), b_RO.split(sizes), strict=True)
    return torch.stack([a.t() @ b for a, b in pieces])


def _sizes(ends_E: Tensor) -> list[int]:
    return ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()


def _grouped_gemm_takes(rows: Tensor, *widths: int) -> bool:
    aligned = all(width * rows.element_size() % 16 == 0 for width in widths)
    known = rows.dtype in (torch.bfloat16, torch.float16)
    known = known or (rows.dtype == torch.float32 and not rows.is_cuda)
    return aligned and known and rows.shape[0] > 0


def compute(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, experts: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs [T, D], and what backward needs.

    That is the gate's and up's projections [R, F] of rows in expert order, that order and
    its inverse [R], and where each expert's rows end [E].
    """
    T, K = experts.shape
    keys_R = experts.flatten()
    keys_R = keys_R.to(torch.int16) if len(gate) < 2**15 else keys_R  # fewer passes to sort
    sorted_R, order_R = keys_R.sort(stable=True)
    every_E = torch.arange(len(gate), device=x.device, dtype=keys_R.dtype)
    # bincount would wait for the GPU
    ends_E = torch.searchsorted(sorted_R, every_E, right=True, out_int32=True)
    if _one_pass(x):
        from trinity_lib import fused

        inverse_R = fused.invert(order_R)
        x_RD = fused.gather(x, order_R, K)
    else:
        rows_R = torch.arange(T * K, device=x.device)
        inverse_R = torch.empty_like(order_R).scatter_(0, order_R, rows_R)
        x_RD = x[order_R // K]
    gate_RF = grouped_matmul(x_RD, gate.mT, ends_E)
    up_RF = grouped_matmul(x_RD, up.mT, ends_E)
    if _one_pass(x):
        y_RD = grouped_matmul(fused.swiglu(gate_RF, up_RF), down, ends_E)
        y_TD = fused.combine(y_RD, inverse_R, K, weights.contiguous())
    else:
        y_RD = grouped_matmul(F.silu(gate_RF) * up_RF, down, ends_E)
        y_TD = weigh(y_RD[inverse_R].view(T, K, x.shape[1]), weights)
    return y_TD, gate_RF, up_RF, order_R, inverse_R, ends_E


forward = torch.library.custom_op("trinity::experts", compute, mutates_args=())


def _one_pass(x: Tensor) -> bool:
    """Whether the row kernels of `fused` compute what surrounds the products."""
    return x.is_cuda and x.dtype != torch.float64 and len(x) > 0


@torch.library.custom_op("trinity::experts_backward", mutates_args=())
def backward(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor,
    gate_RF: Tensor, up_RF: Tensor, order: Tensor, inverse: Tensor, ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, gate, up, down and of the routing weights.

    A routing weight's is <dy, hidden @ down> = <dy @ down.T, hidden>, so that outputs need
    not be kept.
    """
    if _one_pass(x):
        return _backward_in_one_pass(
            dy, x, gate, up, down, weights, gate_RF, up_RF, order, inverse, ends
        )
    T, K = weights.shape
    token_R = order // K
    x_RD, dy_RD = x[token_R], dy[token_R]
    silu_RF = F.silu(gate_RF)
    hidden_RF = silu_RF * up_RF
    dhidden_RF = grouped_matmul(dy_RD, down.mT, ends)
    precise = weights.dtype
    dweights_R = (dhidden_RF.to(precise) * hidden_RF.to(precise)).sum(-1)
    weights_R1 = weights.flatten()[order].unsqueeze(1)
    dhidden_RF = (dhidden_RF * weights_R1).to(x.dtype)
    dgate_RF = torch.ops.aten.silu_backward(dhidden_RF * up_RF, gate_RF)
    dup_RF = dhidden_RF * silu_RF
    ddown = grouped_outer((hidden_RF * weights_R1).to(x.dtype), dy_RD, ends)
    dgate, dup = grouped_outer(dgate_RF, x_RD, ends), grouped_outer(dup_RF, x_RD, ends)
    dx_RD = grouped_matmul(dgate_RF, gate, ends) + grouped_matmul(dup_RF, up, ends)
    dx = dx_RD[inverse].view(T, K, x.shape[1]).sum(1)
    return dx, dgate, dup, ddown, dweights_R[inverse].view(T, K)


def _backward_in_one_pass(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor,
    gate_RF: Tensor, up_RF: Tensor, order: Tensor, inverse: Tensor, ends: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from trinity_lib import fused

    K = weights.shape[1]
    x_RD, dy_RD = fused.gather(x, order, K), fused.gather(dy, order, K)
    dhidden_RF = grouped_matmul(dy_RD, down.mT, ends)
    dgate_RF, dup_RF, hidden_RF, dweights = fused.swiglu_backward(
        gate_RF, up_RF, dhidden_RF, weights.contiguous(), order
    )
    ddown = grouped_outer(hidden_RF, dy_RD, ends)
    dgate, dup = grouped_outer(dgate_RF, x_RD, ends), grouped_outer(dup_RF, x_RD, ends)
    dx_RD, other_RD = grouped_matmul(dgate_RF, gate, ends), grouped_matmul(dup_RF, up, ends)
    return fused.combine(dx_RD, inverse, K, other_RD=other_RD), dgate, dup, ddown, dweights


def _shapes(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, experts: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    """What `experts` returns, without values: for compilers."""
    R, (E, F_, _) = experts.numel(), gate.shape
    projected = (x.new_empty(R, F_), x.new_empty(R, F_))
    order = (
        experts.new_empty(R),
        experts.new_empty(R),
        experts.new_empty(E, dtype=torch.int32),
    )
    return (torch.empty_like(x), *projected, *order)


def _backward_shapes(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (x, gate, up, down, weights))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x, gate, up, down, _, weights = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, gate, up, down, weights, *output[1:])


def differentiable(namespace: str) -> None:
    """Tell torch the shapes and the gradient of `namespace`'s operators."""

    def gradient(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        operator = getattr(torch.ops, namespace).experts_backward
        dx, dgate, dup, ddown, dweights = operator(dy.contiguous(), *ctx.saved_tensors)
        return dx, dgate, dup, ddown, None, dweights

    torch.library.register_fake(f"{namespace}::experts")(_shapes)
    torch.library.register_fake(f"{namespace}::experts_backward")(_backward_shapes)
    torch.library.register_autograd(f"{namespace}::experts", gradient, setup_context=_save)


def weigh(y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
    """Each token's weighted sum over its chosen experts, [T, D], weighed in fp32."""
    precise = torch.promote_types(y_TKD.dtype, weights_TK.dtype)
    return (
        (y_TKD.to(precise) * weights_TK.unsqueeze(-1)).to(y_TKD.dtype).sum(1, dtype=y_TKD.dtype)
    )


differentiable("trinity")
