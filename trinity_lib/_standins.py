"""Torch stand-ins for the two compiled modules that MegaBlocks needs.

`megablocks_ops` (seven functions) and `grouped_gemm` are CUDA extensions that cannot be built
everywhere. What follows them here runs on any device; MegaBlocks' own Python and Triton code
then runs unmodified. Facts: csrc/*.h of megablocks 0.10.0, grouped_gemm 0.3.0.
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class StandIn(ModuleType):
    """A module that was made here, and that no file holds."""


def compiled(name: str) -> bool:
    """Whether the real module of that name is imported, or could be."""
    module = sys.modules.get(name)
    if module is not None:
        return not isinstance(module, StandIn)
    return importlib.util.find_spec(name) is not None


def register() -> None:
    """Put a stand-in into `sys.modules` for each of the two that is not there for real."""
    if not compiled("megablocks_ops"):
        _put("megablocks_ops", {function.__name__: function for function in OPS})
    if not compiled("grouped_gemm"):
        backend = _put("grouped_gemm.backend", {"gmm": gmm})
        ops = _put("grouped_gemm.ops", {"gmm": gmm_with_gradients})
        _put("grouped_gemm", {"backend": backend, "ops": ops})


def _put(name: str, content: dict[str, Any]) -> StandIn:
    module = StandIn(name, __doc__)
    # without a spec, importlib.util.find_spec(name) raises
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """Stable sort of integers x [N] by their low `end_bit` bits, and where each came from."""
    whole = end_bit >= 8 * x.element_size()
    order = torch.sort(x if whole else x & ((1 << end_bit) - 1), stable=True).indices
    x_out.copy_(x[order])
    iota_out.copy_(order)


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """How often each of 0 .. num_bins-1 occurs in [N] or in each row of [B, N]; int32.

    What is out of range is not counted. By sorting: no atomics and no wait for the device.
    """
    edges = torch.arange(num_bins + 1, dtype=x.dtype, device=x.device)
    edges = edges.expand(*x.shape[:-1], -1).contiguous()
    below = torch.searchsorted(x.contiguous().sort(-1).values, edges)
    return below.diff(dim=-1).to(torch.int32)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Sums up to and with each element, in x's own dtype."""
    out.copy_(x.cumsum(dim, dtype=x.dtype))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Sums up to each element and without it, in x's own dtype."""
    out.copy_(x.cumsum(dim, dtype=x.dtype) - x)


def indices(padded_bins: Tensor, block_size: int, rows: int, columns: int, out: Tensor) -> None:
    """Block columns of a block-diagonal matrix: row of blocks r of expert e has e's columns.

    `padded_bins` [E] are the ends of the experts' rows, multiples of `block_size`; out is
    [rows * columns].
    """
    starts = torch.arange(rows, dtype=padded_bins.dtype, device=out.device) * block_size
    experts = torch.searchsorted(padded_bins, starts, right=True)
    column = torch.arange(columns, device=out.device)
    out.copy_((experts[:, None] * columns + column).flatten())


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """Column i of x [B, E], as often as bin i is wide; `bins` [E] are the bins' ends."""
    out.copy_(x.repeat_interleave(_widths(bins), dim=1, output_size=out.shape[1]))


def replicate_backward(gradient: Tensor, bins: Tensor, out: Tensor) -> None:
    """The sum of the gradient [B, N] over each bin, [B, E]."""
    experts = torch.arange(len(bins), device=bins.device)
    owner = experts.repeat_interleave(_widths(bins), output_size=gradient.shape[1])
    out.zero_().index_add_(1, owner, gradient)


OPS = (
    sort,
    histogram,
    inclusive_cumsum,
    exclusive_cumsum,
    indices,
    replicate_forward,
    replicate_backward,
)
"""What `megablocks_ops` holds."""


def _widths(bins: Tensor) -> Tensor:
    return bins.diff(prepend=bins.new_zeros(1))


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """`grouped_gemm.backend.gmm`: one matrix product for each group of rows.

    a [R, I] times b [E, I, O] (`trans_b`: [E, O, I]) is [R, O]; with `trans_a`, a [R, I] and
    b [R, O] give [E, I, O]. `batch_sizes` [E] are the groups' rows, on the CPU. Like the real
    one it does not heed autocast, and fills `c` where that is given.
    """
    a, b = a.contiguous(), b.contiguous()
    with torch.autocast(a.device.type, enabled=False):
        if takes(a, b):
            ends = batch_sizes.cumsum(0, dtype=torch.int32).to(a.device, non_blocking=True)
            left, right = a.t() if trans_a else a, b.transpose(-2, -1) if trans_b else b
            out = F.grouped_mm(left, right, offs=ends)
        else:
            out = _loop(a, b, batch_sizes.tolist(), trans_a, trans_b)
    return out if c is None else c.copy_(out)


def takes(*operands: Tensor) -> bool:
    """Whether torch's grouped GEMM computes these contiguous operands: see the conditions."""
    kinds = (torch.bfloat16,) if operands[0].is_cuda else HALVES_AND_FLOAT
    return all(
        t.dtype in kinds
        and t.numel() > 0
        and t.shape[-1] * t.element_size() % 16 == 0  # rows, and where they begin, as the
        and t.data_ptr() % 16 == 0  # tensor memory accelerator reads them
        for t in operands
    )


HALVES_AND_FLOAT = (torch.bfloat16, torch.float16, torch.float32)
"""What the grouped GEMM computes on a CPU; on CUDA it is certain for bfloat16 alone."""


def _loop(a: Tensor, b: Tensor, sizes: Sequence[int], trans_a: bool, trans_b: bool) -> Tensor:
    if trans_a:
        pairs = zip(a.split(sizes), b.split(sizes), strict=True)
        return torch.stack([left.t() @ right for left, right in pairs])
    right_sides = (b.transpose(1, 2) if trans_b else b).unbind(0)
    return torch.cat([x @ w for x, w in zip(a.split(sizes), right_sides, strict=True)])


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool) -> Tensor:
        ctx.save_for_backward(a, b, batch_sizes)
        ctx.trans_b = trans_b
        return gmm(a, b, batch_sizes, trans_b=trans_b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        a, b, batch_sizes = ctx.saved_tensors
        to_a = to_b = None
        if ctx.needs_input_grad[0]:
            to_a = gmm(gradient, b, batch_sizes, trans_b=not ctx.trans_b)
        if ctx.needs_input_grad[1]:
            left, right = (gradient, a) if ctx.trans_b else (a, gradient)
            to_b = gmm(left, right, batch_sizes, trans_a=True)
        return to_a, to_b, None, None


def gmm_with_gradients(
    a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False
) -> Tensor:
    """`grouped_gemm.ops.gmm`: `gmm` of a [R, I] and b [E, I, O], with gradients to both."""
    return _GroupedGemm.apply(a, b, batch_sizes, trans_b)
