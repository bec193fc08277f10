"""Muon: momentum orthogonalised, one matrix at a time, whole experts by batches."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from trinity_lib import native, onednn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic coefficients of Jordan et al. 2024 (kellerjordan.github.io/posts/muon)."""


class Owners(Protocol):
    """Ranks that hold a matrix by rows, and make it whole on one of them for a moment."""

    @property
    def ranks(self) -> int:
        """How many, and so how many matrices come together."""

    def shape(self, rows: Tensor) -> torch.Size:
        """Of the whole matrix that a parameter's rows belong to."""

    def apply(
        self,
        parts: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        whole: Callable[[Tensor], Tensor],
    ) -> list[Tensor]:
        """`whole` of each matrix, in rows again."""


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz; a 3-D weight is a batch of matrices.

    Each expert is orthogonalised on its own. The rate of a matrix is lr times
    sqrt(max(1, fan_out/fan_in)) (technical report, section 3.3). A group's `transposed`
    says its matrices are stored [.., fan_in, fan_out] (the experts' down projection).
    Where a parameter is this rank's rows of a matrix, `owners` makes it whole for a moment.
    `native`: whether batches in fp32 on the CPU may go through the C++ operator, whose
    results are the same to rounding.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        momentum: float = 0.95,
        steps: int = 5,
        weight_decay: float = 0.0,
        idle_experts: str = "rest",
        owners: Owners | None = None,
        native: bool = True,
    ) -> None:
        self.owners, self.native = owners, native
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "steps": steps,
            "weight_decay": weight_decay,
            "idle_experts": idle_experts,
            "transposed": False,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() not in (2, 3):
                    raise ValueError(f"Muon takes matrices; a parameter has shape {p.shape}.")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            split = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.owners is not None and p.dim() == 2:
                    split.append(p)
                    continue
                if self.native and _native_takes(p):
                    self._step_natively(p, group)
                    continue
                ahead, moved = self._averaged(p, group)
                update = orthogonalise(ahead, group["steps"])
                _apply(p, p.shape, update, moved, group)
            if self.owners is not None:
                self._step_together(split, group, self.owners)

    def _step_natively(self, p: Tensor, group: dict[str, Any]) -> None:
        """The same for a batch of matrices, one per thread in a C++ operator."""
        lr, momentum = group["lr"], self._momentum(p)
        torch.ops.trinity_native.muon(
            p,
            p.grad,
            momentum,
            group["momentum"],
            lr * _shape_factor(p.shape, group),
            lr * group["weight_decay"],
            group["steps"],
            group["idle_experts"] == "rest",
            NEWTON_SCHULZ,
        )
        # Else a backward through values that are gone would go unnoticed.
        torch.autograd.graph.increment_version((p, momentum))

    def _step_together(
        self, split: Sequence[Tensor], group: dict[str, Any], owners: Owners
    ) -> None:
        for i in range(0, len(split), owners.ranks):
            some = split[i : i + owners.ranks]
            shapes = [owners.shape(p) for p in some]
            updates = owners.apply(
                [self._averaged(p, group)[0] for p in some],
                shapes,
                lambda matrix: orthogonalise(matrix, group["steps"]),
            )
            for p, shape, update in zip(some, shapes, updates, strict=True):
                _apply(p, shape, update, None, group)

    def _averaged(self, p: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Nesterov's look ahead of the momentum, which moves; which matrices of a batch do."""
        assert p.grad is not None
        buffer, beta = self._momentum(p), group["momentum"]
        moved = _matrices_with_gradient(p.grad, group["idle_experts"])
        averaged = buffer.lerp(p.grad, 1 - beta)
        buffer.copy_(averaged if moved is None else torch.where(moved, averaged, buffer))
        return p.grad.lerp(averaged, beta), moved

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        return state["momentum"]


def _native_takes(p: Tensor) -> bool:
    # A rehearsal's tensors are on the CPU and say otherwise: `guise`.
    here = p.device.type == "cpu" and not p.is_cuda
    fits = here and p.dim() == 3 and p.dtype == torch.float32 and p.is_contiguous()
    return fits and not native.missing()


def _apply(
    p: Tensor,
    shape: Sequence[int],
    update: Tensor,
    moved: Tensor | None,
    group: dict[str, Any],
) -> None:
    lr = group["lr"]
    change = update.mul_(lr * _shape_factor(shape, group))
    change.add_(p, alpha=lr * group["weight_decay"])
    p.sub_(change if moved is None else change.mul_(moved))


def _shape_factor(shape: Sequence[int], group: dict[str, Any]) -> float:
    fan_out, fan_in = shape[-2:]
    if group["transposed"]:
        fan_out, fan_in = fan_in, fan_out
    return math.sqrt(max(1.0, fan_out / fan_in))


def _matrices_with_gradient(grad: Tensor | None, idle_experts: str) -> Tensor | None:
    """Which of a batch of matrices have any gradient, [E, 1, 1]; None where all move."""
    if grad is None or grad.dim() == 2 or idle_experts == "move":
        return None
    return (grad != 0).any(-1, keepdim=True).any(-2, keepdim=True)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: singular values near 1.

    Newton-Schulz over the last two axes, batched over the first; fp32 (float64 for
    float64) on the CPU, where bf16 is slow, and bf16 on CUDA.
    """
    a, b, c = NEWTON_SCHULZ
    dtype = torch.bfloat16 if matrices.is_cuda else matrices.dtype
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = _times(x, x)
        x = a * x + _times(b * gram + c * _times(gram, gram), x.mT)
    return (x.mT if tall else x).to(matrices.dtype)


def _times(left: Tensor, right: Tensor) -> Tensor:
    """left times right transposed."""
    return onednn.linear(left, right) if left.dim() == 2 else left @ right.mT
