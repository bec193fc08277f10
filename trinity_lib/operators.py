"""What a trace must be told of operators: what their tensors are, and what hides in them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed.fsdp  # noqa: F401  whose operators are named below
from torch import Tensor

import trinity_lib.dropless  # noqa: F401  whose operators are named below
import trinity_lib.onednn  # noqa: F401
from trinity_lib.ledger import Ledger


def rules(ledger: Ledger, tokens: int, vocabulary: int) -> dict[Any, Callable[..., None]]:
    """Which tensors of an operator are of a kind of their own, by operator."""

    def whole_weights(result: Any, *args: Any, out: Sequence[Tensor] = ()) -> None:
        ledger.enter_all([*(result or ()), *out], "gathered")

    def gathering(_: Any, whole: Tensor, *args: Any) -> None:
        ledger.enter(whole, "gathered")

    def whole_gradients(_: Any, parts: Sequence[Tensor], *args: Any, out: Tensor) -> None:
        ledger.enter_all([*parts, out], "unreduced")

    def reducing(_: Any, part: Tensor, whole: Tensor, *args: Any) -> None:
        ledger.enter(part, "gradients")
        ledger.enter(whole, "unreduced")

    def exchanging(_: Any, received: Tensor, sent: Tensor, *args: Any) -> None:
        if ledger.phase != "step":  # there it is Muon's matrices
            ledger.enter_all([received, sent], "exchange")

    def logits(result: Tensor, *args: Any, **kwargs: Any) -> None:
        if result.numel() == tokens * vocabulary:
            ledger.enter(result, "logits")

    aten, c10d, fsdp = torch.ops.aten, torch.ops.c10d, torch.ops.fsdp
    return {
        fsdp.all_gather_copy_in: whole_weights,
        fsdp.split_with_sizes_copy: whole_weights,
        c10d._allgather_base_: gathering,
        fsdp.chunk_cat: whole_gradients,
        c10d._reduce_scatter_base_: reducing,
        c10d.alltoall_base_: exchanging,
        **dict.fromkeys([aten.mm, aten._to_copy, aten._log_softmax, aten.exp], logits),
    }


def _product_flop(a: Tensor, b: Tensor, **kwargs: Any) -> int:
    return 2 * a.numel() * len(b)


def _experts_flop(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, experts: Tensor, *_: Any, **kwargs: Any
) -> int:
    """Three products for every row."""
    return 6 * experts.numel() * gate[0].numel() if len(gate) else 0


def _experts_backward_flop(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor,
    *_: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Six: for the gradients of rows and of weights."""
    return 12 * weights.numel() * gate[0].numel() if len(gate) else 0


def _experts_workspace(
    x: Tensor, gate: Tensor, up: Tensor, down: Tensor, experts: Tensor, *_: Any
) -> int:
    """On CUDA (`dropless.compute`): rows in order, hidden, results."""
    width = 2 * x.shape[1] + gate.shape[1]
    return experts.numel() * width * x.element_size()


def _experts_backward_workspace(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor, *_: Any
) -> int:
    """On CUDA: rows and their gradients, two of each; hidden, and gradients of all three."""
    width = 4 * x.shape[1] + 4 * gate.shape[1]
    return weights.numel() * width * x.element_size()


_ATEN, _PRODUCT = torch.ops.aten, torch.ops.trinity.product
_EXPERTS, _EXPERTS_BACKWARD = torch.ops.trinity.experts, torch.ops.trinity.experts_backward
KINDS = {
    _ATEN._scaled_dot_product_efficient_attention: "attention",
    _ATEN._scaled_dot_product_efficient_attention_backward: "attention",
    _EXPERTS: "experts",
    _EXPERTS_BACKWARD: "experts",
}
"""What operators are counted under, where not under products."""
FORMULAS: dict[Any, Callable[..., int]] = {
    _PRODUCT: _product_flop,
    _EXPERTS: _experts_flop,
    _EXPERTS_BACKWARD: _experts_backward_flop,
}
"""FLOP of operators that torch's flop counter does not know, given their arguments."""
WORKSPACES: dict[Any, Callable[..., int]] = {
    _EXPERTS: _experts_workspace,
    _EXPERTS_BACKWARD: _experts_backward_workspace,
}
"""Bytes that operators allocate and free within themselves, given their arguments."""
