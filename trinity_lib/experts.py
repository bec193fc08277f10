"""Dropless experts: every token reaches every expert it chose, whatever the imbalance.

This module owns the expert weights, expert-first as MegaBlocks lays them out, and computes
with plain torch: sort rows by expert, one grouped matrix product per projection, weigh in
fp32, sum over the chosen experts.
"""

import importlib.metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity_lib.attention import Linear
from trinity_lib.routing import Routing


class SwiGLU(nn.Module):
    """Gated feed-forward network, `down(silu(gate(x)) * up(x))`: dense and shared experts."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """The routed experts of one layer: `num_experts` SwiGLUs of hidden width F."""

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.up_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's chosen experts, [T, D]."""
        T, K = routing.experts_TK.shape
        dtype, kind = x_TD.dtype, x_TD.device.type
        if torch.is_autocast_enabled(kind):  # the grouped GEMM does not heed autocast
            dtype = torch.get_autocast_dtype(kind)
        gate_EFD, up_EFD, down_EFD = (
            weight.to(dtype) for weight in (self.gate_EFD, self.up_EFD, self.down_EFD)
        )
        flat_R = routing.experts_TK.flatten()
        order_R = flat_R.argsort(stable=True)
        inverse_R = torch.empty_like(order_R).scatter_(
            0, order_R, torch.arange(T * K, device=order_R.device)
        )
        ends_E = torch.bincount(flat_R, minlength=self.gate_EFD.shape[0]).cumsum(0)

        x_RD = _Permute.apply(x_TD.to(dtype).repeat_interleave(K, dim=0), order_R, inverse_R)
        gate_RF = grouped_matmul(x_RD, gate_EFD.transpose(1, 2), ends_E)
        up_RF = grouped_matmul(x_RD, up_EFD.transpose(1, 2), ends_E)
        y_RD = grouped_matmul(F.silu(gate_RF) * up_RF, down_EFD, ends_E)
        y_TKD = _Permute.apply(y_RD, inverse_R, order_R).view(T, K, -1)

        weighted_TKD = y_TKD.to(routing.weights_TK.dtype) * routing.weights_TK.unsqueeze(-1)
        return weighted_TKD.to(x_TD.dtype).sum(1)


class _Permute(torch.autograd.Function):
    """Rows in another order; backward is the inverse order, a gather without atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


def grouped_matmul(x_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Rows of expert e, up to `ends_E[e]`, times that expert's matrix: [R, O].

    torch's grouped GEMM where it can (16-byte rows; no float64; no fp32 on CUDA), else a
    loop over experts.
    """
    if _grouped_gemm_takes(x_RI, weight_EIO):
        return F.grouped_mm(x_RI, weight_EIO, offs=ends_E.to(torch.int32))
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    pieces = zip(x_RI.split(sizes), weight_EIO.unbind(0), strict=True)
    return torch.cat([rows @ weight for rows, weight in pieces])


def _grouped_gemm_takes(x_RI: Tensor, weight_EIO: Tensor) -> bool:
    aligned = all(size * x_RI.element_size() % 16 == 0 for size in weight_EIO.shape[1:])
    known = x_RI.dtype in (torch.bfloat16, torch.float16)
    known = known or (x_RI.dtype == torch.float32 and not x_RI.is_cuda)
    return aligned and known and x_RI.shape[0] > 0


def backend_info() -> dict[str, str]:
    """What computes the experts here, for the run file."""
    try:
        megablocks = importlib.metadata.version("megablocks")
    except importlib.metadata.PackageNotFoundError:
        megablocks = "not installed"
    return {
        "backend": "torch",
        "grouped_gemm": "torch.nn.functional.grouped_mm; a loop over experts in float64, in "
        "fp32 on CUDA, and where widths are not multiples of 16 bytes",
        "megablocks_installed": megablocks,
    }
