"""Real MegaBlocks behind one function: its `ParallelDroplessMLP` over weights we own.

The only module that imports MegaBlocks, and only inside functions: without it, or on a CPU
without Triton's interpreter, `unavailable` says why, and nothing here computes in its place.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trinity_lib import _standins
from trinity_lib.config import first_line

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What MegaBlocks computes in; its Triton kernels would round float64 to fp32."""


def unavailable(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Why MegaBlocks cannot compute on that device here, in a clause; "" where it can.

    Imports Triton and MegaBlocks only where nothing else stands in the way.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"MegaBlocks does not run on {kind}"
    if dtype not in DTYPES:
        return f"MegaBlocks computes in float32, bfloat16 and float16, not {dtype}"
    if missing := _missing():
        return f"{missing} is not installed"
    if kind == "cpu" and not _interpreted():
        return (
            "on a CPU MegaBlocks' Triton kernels need TRITON_INTERPRET=1 in the environment "
            "before triton is imported"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    if kind == "cuda" and _interpreted():
        return "TRITON_INTERPRET is set, and GPU kernels would be interpreted on the host"
    return _broken()


def info() -> dict[str, str]:
    """The versions, and which of MegaBlocks' compiled parts are real, for the run file."""
    packages = {"megablocks": "megablocks", "stk": "stanford-stk", "triton": "triton"}
    ops = _standins.compiled("megablocks_ops")
    gemm = _standins.compiled("grouped_gemm")
    return {
        **{name: _version(package) for name, package in packages.items()},
        "megablocks_ops": "compiled" if ops else "torch stand-in",
        "grouped_gemm": f"compiled {_version('grouped_gemm')}"
        if gemm
        else "torch.nn.functional.grouped_mm stand-in",
        "kernels": "interpreted Triton" if _interpreted() else "compiled Triton",
    }


@functools.lru_cache(maxsize=64)
def layer(
    num_experts: int,
    width: int,
    hidden: int,
    top_k: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.nn.Module:
    """A `megablocks.layers.dmoe.ParallelDroplessMLP` of this size, on the meta device.

    It holds no memory and no state, so every layer of this size can share it; its weights
    are w1 (gate), v1 (up) and w2 (down). RuntimeError, with the clause, where MegaBlocks is
    `unavailable`.
    """
    if reason := unavailable(device, dtype):
        raise RuntimeError(f"MegaBlocks cannot compute: {reason}.")
    _load()
    from megablocks.layers import arguments, dmlp_registry, dmoe

    settings = arguments.Arguments(
        hidden_size=width,
        # its constructor takes log2(experts * hidden // 128), also where that is 0
        ffn_hidden_size=max(hidden, -(-128 // num_experts)),
        bias=False,
        return_bias=False,
        activation_fn=F.silu,
        moe_num_experts=num_experts,
        moe_top_k=top_k,
        moe_loss_weight=0,  # anything else gathers tensors in a list of the module's
        moe_zloss_weight=0,
        mlp_type="glu",
        mlp_impl="grouped",
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        device=torch.device("meta"),  # where initialisation draws no random numbers
    )
    module: Any = dmoe.ParallelDroplessMLP(settings)
    if settings.ffn_hidden_size != hidden:
        settings.ffn_hidden_size = module.ffn_hidden_size = hidden
        module.mlp = dmlp_registry.get(settings)
    return module


def forward(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EFD: Tensor,
) -> Tensor:
    """The weighted sum of each token's chosen experts [T, D], computed by MegaBlocks.

    x and the three expert weights have one dtype, which autocast does not change; routing
    weights may be fp32 beside it, but their gradient is rounded to x's dtype. Gradients
    reach all five. `torch.compile` leaves it as it is. Errors: see `layer`.
    """
    arguments = (x_TD, experts_TK, weights_TK, gate_EFD, up_EFD, down_EFD)
    if torch.compiler.is_compiling():  # only then: `disable` takes a second, imports triton
        return torch.compiler.disable(_forward)(*arguments)
    return _forward(*arguments)


def _forward(x: Tensor, experts: Tensor, weights: Tensor, *mlp: Tensor) -> Tensor:
    num_experts, hidden, width = mlp[0].shape
    module = layer(num_experts, width, hidden, experts.shape[1], x.dtype, x.device)
    # Its kernels go by pointers and would misread any stride without a word.
    x, experts, weights, gate, up, down = (t.contiguous() for t in (x, experts, weights, *mlp))
    parameters = {"mlp.w1": gate, "mlp.v1": up, "mlp.w2": down}
    with torch.autocast(x.device.type, enabled=False):
        return torch.func.functional_call(
            module, parameters, (x, None, weights, experts), strict=True
        )


@functools.cache
def _load() -> ModuleType:
    """MegaBlocks' kernels, imported over stand-ins where its compiled parts are missing."""
    _standins.register()
    with warnings.catch_warnings():
        # it calls torch.jit.script while it is imported
        warnings.simplefilter("ignore", DeprecationWarning)
        kernels = importlib.import_module("megablocks.backend.kernels")
    # Triton picks among configurations by the clock. The interpreter has none to ask. On a
    # GPU the block's width is the order in which a routing weight's gradient is summed, so
    # that two runs would differ in their last bits: that kernel has one configuration
    # everywhere. The others copy, and give the same bits whichever is picked.
    for name, kernel in vars(kernels).items():
        if hasattr(kernel, "configs") and (_interpreted() or name.endswith("_wgrad")):
            kernel.configs = kernel.configs[-1:]
    return kernels


@functools.cache
def _broken() -> str:
    try:
        _load()
    except Exception as error:  # whatever an import of an unmaintained package may raise
        return f"MegaBlocks cannot be imported ({type(error).__name__}: {first_line(error)})"
    return ""


@functools.cache
def _missing() -> str:
    packages = ("megablocks", "stk", "triton")
    return next((name for name in packages if importlib.util.find_spec(name) is None), "")


def _interpreted() -> bool:
    """Whether Triton interprets its kernels, which it settles when it is imported."""
    language: Any = sys.modules.get("triton.language")
    if language is not None:
        return type(language.zeros).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
