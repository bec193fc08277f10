"""Tensors of the CPU that pass for CUDA's, so that fake ones take the kernels a GPU would.

Where there is no GPU, torch makes no fake tensors of one that FSDP could be given. What
CUDA does otherwise in this model stands here: it fuses norms, it attends with the kernel
that takes masks, and Muon orthogonalises in bf16.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Guise(TorchFunctionMode):
    """While it is active tensors say that they are CUDA's, and CUDA's operators stand in."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the stand-in, where there is one."""
        return _STAND_INS.get(func, func)(*args, **(kwargs or {}))


def backward(loss: Tensor) -> None:
    """`loss.backward()` under the guise, which torch's own sets aside; blocks recompute."""
    torch.autograd.graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (),
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip


def _attention(
    q_BHSC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, *, attn_mask: Tensor, enable_gqa: bool
) -> Tensor:
    """What CUDA runs where a mask is given: its mask becomes a bias, which is kept."""
    assert not enable_gqa, "CUDA's kernels that take a mask take no shared heads"
    q, k, v = (_lower(x) for x in (q_BHSC, k_BHSC, v_BHSC))
    bias = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype)
    shape = *q.shape[:-1], k.shape[-2]
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return operator(q, k, v, bias.expand(shape), compute_log_sumexp=True)[0]


def _lower(x: Tensor) -> Tensor:
    """As autocast would have it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _Norm(torch.autograd.Function):
    """CUDA's fused norm, which keeps its input and the roots; of fake tensors, the shapes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> Tensor:
    return _Norm.apply(x, weight)


def _yes(*_: Any) -> bool:
    return True


_IS_CUDA: Any = torch.Tensor.is_cuda
_STAND_INS: dict[Any, Callable] = {
    _IS_CUDA.__get__: _yes,
    F.scaled_dot_product_attention: _attention,
    F.rms_norm: _rms_norm,
}
