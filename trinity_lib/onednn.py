"""fp32 matrix products on the CPU through oneDNN, at twice the speed on AMD's CPUs.

torch ships both libraries and gives fp32 products to MKL, which keeps to 256-bit
instructions on CPUs that are not Intel's; oneDNN takes 512 bits wherever they are
(LOG.md has the rates).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 2**22
"""Multiplications from which it is worth the call's 10 to 20 us."""
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
"""Whether this torch was built with oneDNN, and offers the operator (its own, not public)."""


def linear(x: Tensor, matrix_NK: Tensor) -> Tensor:
    """`F.linear`, through oneDNN where the product is large, fp32, and on the CPU.

    Derivatives are autograd's alone there: torch.func's transforms do not pass.
    """
    if not takes(x, matrix_NK):
        return F.linear(x, matrix_NK)
    y = torch.ops.trinity.product(x.reshape(-1, x.shape[-1]), matrix_NK)
    return y.view(*x.shape[:-1], len(matrix_NK))


def what(device: str, dtype: torch.dtype) -> str:
    """Which library computes dense products of a device and dtype, for the run file."""
    if device != "cpu" or dtype != torch.float32:
        return "torch's choice"
    if not AVAILABLE:
        return "torch's BLAS: this torch does not offer oneDNN's fp32 products"
    return "oneDNN where they are large, torch's BLAS elsewhere"


def takes(x: Tensor, matrix_NK: Tensor) -> bool:
    """Whether `linear` goes through oneDNN.

    Never under autocast, nor within `torch.backends.mkldnn.flags(enabled=False)`.
    """
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not _enabled():
        return False
    plain = x.dtype == matrix_NK.dtype == torch.float32
    fits = matrix_NK.dim() == 2 and x.shape[-1] == matrix_NK.shape[1]
    return plain and fits and x.numel() * len(matrix_NK) >= LEAST


@torch.compiler.assume_constant_result
def _enabled() -> bool:
    return AVAILABLE and bool(torch.backends.mkldnn.enabled)


torch.library.define("trinity::product", "(Tensor a_MK, Tensor b_NK) -> Tensor")


@torch.library.impl("trinity::product", "CPU")
def _product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a times b transposed, [M, N]; a is copied where its rows are not contiguous.

    The operator is what torch.compile makes of linear layers for inference.
    """
    return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, None, "none", [], "")


@torch.library.register_fake("trinity::product")
def _shape(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    return a_MK.new_empty(len(a_MK), len(b_NK))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    a_MK, b_NK = inputs
    of_a, of_b = ctx.needs_input_grad[:2]
    ctx.save_for_backward(a_MK if of_b else None, b_NK if of_a else None)
    ctx.narrow = len(b_NK) <= a_MK.shape[1]


def _gradient(ctx: Any, d_MN: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a_MK, b_NK = ctx.saved_tensors
    product, (da, db) = torch.ops.trinity.product, (None, None)
    if ctx.needs_input_grad[0]:
        da = product(d_MN, b_NK.t())
    if ctx.needs_input_grad[1]:  # a transposed first argument is copied: the smaller one
        d_NM, a_KM = d_MN.t(), a_MK.t()
        db = product(d_NM, a_KM) if ctx.narrow else product(a_KM, d_NM).t()
    return da, db


torch.library.register_autograd("trinity::product", _gradient, setup_context=_save)
