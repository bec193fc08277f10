"""Dropless experts: every token reaches every expert it chose, whatever the imbalance.

This module owns the expert weights, expert-first as MegaBlocks lays them out, and offers
backends that compute the same: sort rows by expert, one matrix product per expert and
projection, weigh in fp32, sum over the chosen experts.

    torch        grouped matrix products of torch; everywhere, and the reference
    native       one expert per thread in a C++ operator; fp32 on the CPU
    megablocks   MegaBlocks' own dropless layer; CUDA, or Triton's interpreter

    python -m trinity_lib.experts          # what is live here
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trinity_lib import _megablocks, dropless, exchange, native, onednn
from trinity_lib.config import Missing, require
from trinity_lib.dropless import weigh
from trinity_lib.exchange import Exchange
from trinity_lib.linear import Linear, project
from trinity_lib.routing import Router, Routing

Backend = Literal["auto", "torch", "native", "megablocks"]
"""`auto`: megablocks on CUDA, native for fp32 on the CPU, torch where those are missing."""

GATHERED, GATHERED_EAGERLY = 64, 8
"""Decoding: up to so many chosen experts, compiled or not, their weights are gathered."""


class SwiGLU(nn.Module):
    """Gated feed-forward network, `down(silu(gate(x)) * up(x))`: dense and shared experts."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis."""
        gate, up = project(x, self.gate, self.up)
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """The routed experts of one layer: `num_experts` SwiGLUs of hidden width F."""

    backend: Backend = "auto"
    exchange: Exchange | None = None
    """Set where other ranks hold a part of the experts; then the weights are this rank's."""

    def __init__(self, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.up_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The weighted sum of each token's chosen experts, [T, D]."""
        dtype, kind = x_TD.dtype, x_TD.device.type
        if torch.is_autocast_enabled(kind):  # grouped products do not heed autocast
            dtype = torch.get_autocast_dtype(kind)
        x = x_TD.to(dtype)
        weights = [w.to(dtype) for w in (self.gate_EFD, self.up_EFD, self.down_EFD)]
        backend = live(self.backend, kind, dtype)
        with torch.autocast(kind, enabled=False):
            if self.exchange is None:
                y = self._compute(backend, x.contiguous(), routing, weights)
            else:

                def local(rows: Tensor, alone: Routing) -> Tensor:
                    return self._compute(backend, rows, alone, weights)

                y = exchange.forward(x, routing, self.exchange, local)
        return y.to(x_TD.dtype)

    def _compute(
        self, backend: str, x: Tensor, routing: Routing, weights: list[Tensor]
    ) -> Tensor:
        experts_TK, weights_TK = routing.experts_TK, routing.weights_TK
        if not len(weights[0]):  # more ranks than experts
            return x
        if backend == "megablocks":
            return _megablocks.forward(x, experts_TK, weights_TK, *weights)
        if backend == "native":
            return torch.ops.trinity_native.experts(x, *weights, experts_TK, weights_TK)[0]
        compiling, learning = torch.compiler.is_compiling(), torch.is_grad_enabled()
        few = experts_TK.numel() <= (GATHERED if compiling else GATHERED_EAGERLY)
        if few and not learning:
            return _gathered(x, routing, *weights)
        operator: Callable[..., tuple[Tensor, ...]] = dropless.forward
        if not compiling and not learning:
            operator = dropless.compute  # the same, without the cost of being an operator
        return operator(x, *weights, experts_TK, weights_TK)[0]


def use_backend(model: nn.Module, backend: Backend, dtype: torch.dtype | None = None) -> None:
    """Have every `Experts` of a model compute with `backend`; `auto` is what they begin with.

    `dtype` is what they multiply in, where autocast makes it another than the weights'.
    Raises BadValue for a backend there is not, Missing for one that cannot compute there.
    """
    choices = get_args(Backend)
    require(backend in choices, "experts", backend, f"one of {', '.join(choices)}")
    for module in model.modules():
        if isinstance(module, Experts):
            weight = module.gate_EFD
            live(backend, weight.device.type, dtype or weight.dtype)
            module.backend = backend
        elif isinstance(module, Linear | Router):
            module.native = backend in ("auto", "native")


@torch.compiler.assume_constant_result
def live(backend: Backend, device: str, dtype: torch.dtype) -> str:
    """The backend that computes: `torch`, `native` or `megablocks`.

    Raises Missing where one that is asked for by name cannot.
    """
    if backend == "torch" or (backend == "auto" and device not in ("cpu", "cuda")):
        return "torch"
    wanted = backend
    if backend == "auto":
        wanted = "megablocks" if device == "cuda" else "native"
    missing = unavailable(wanted, device, dtype)
    if not missing:
        return wanted
    if backend == "auto":
        return "torch"
    raise Missing(f"experts is {backend!r}, which cannot compute here: {missing}.")


def unavailable(backend: str, device: str, dtype: torch.dtype) -> str:
    """Why a backend cannot compute there, in a clause; "" where it can."""
    if backend == "torch":
        return ""
    if backend == "megablocks":
        return _megablocks.unavailable(device, dtype)
    if device != "cpu" or dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        return f"it takes float32 on the CPU, not {name} on {device}"
    return _native()


@functools.cache
def _native() -> str:
    missing = native.missing()
    if not missing:
        dropless.differentiable("trinity_native")
    return missing


def backend_info(
    backend: Backend = "auto", device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, str]:
    """What computes the experts on this machine, for the run file; loads what it names."""
    missing = _native()
    return {
        "backend": live(backend, device, dtype),
        "asked_for": backend,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "grouped_gemm": "torch.nn.functional.grouped_mm; a loop over experts in float64, in "
        "fp32 on CUDA, and where widths are not multiples of 16 bytes",
        "native": missing or "compiled",
        "dense_products": onednn.what(device, dtype),
        "megablocks": _megablocks.unavailable(device, dtype) or "available",
        **{f"megablocks_{key}": value for key, value in _megablocks.info().items()},
    }


def _gathered(x: Tensor, routing: Routing, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The experts of a few tokens, over copies of the chosen weights."""
    chosen_TK, x_T1D1 = routing.experts_TK, x[:, None, :, None]
    hidden_TKF1 = F.silu(gate[chosen_TK] @ x_T1D1) * (up[chosen_TK] @ x_T1D1)
    y_TKD = (hidden_TKF1.mT @ down[chosen_TK]).squeeze(2)
    return weigh(y_TKD, routing.weights_TK)


def main() -> None:
    """Print what is live here, as JSON."""
    cuda = torch.cuda.is_available()
    info = backend_info("auto", *(("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)))
    json.dump(info, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
