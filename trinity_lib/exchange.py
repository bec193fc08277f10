"""Expert parallelism: tokens travel to the rank that holds their expert, and back.

One all-to-all each way around whatever computes the local experts. Rows arrive sorted by
expert; results are weighed where the tokens came from, in the order of one process.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trinity_lib.dropless import weigh
from trinity_lib.mesh import chunk
from trinity_lib.routing import Routing

Compute = Callable[[Tensor, Routing], Tensor]
"""Rows [R, D] and their local experts [R, 1] -> rows [R, D]."""


class Exchange(NamedTuple):
    """How one layer's experts are spread over ranks."""

    group: dist.ProcessGroup
    """The ranks that share them; rank i has the i-th chunk of experts."""
    num_experts: int
    """Of the whole layer."""
    even: bool = False
    """Take equal loads instead of counting them: for a trace of tensors without values."""


def forward(x_TD: Tensor, routing: Routing, exchange: Exchange, compute: Compute) -> Tensor:
    """The weighted sum of each token's chosen experts [T, D], wherever those are."""
    T, K = routing.experts_TK.shape
    sorted_R, order_R = routing.experts_TK.flatten().sort(stable=True)
    send, receive, local_R = _splits(sorted_R, exchange)
    rows_RD = _AllToAll.apply(x_TD[order_R // K], send, receive, exchange.group)
    ones_R1 = routing.weights_TK.new_ones(len(rows_RD), 1)
    alone = Routing(ones_R1, local_R.unsqueeze(1), ones_R1)
    y_RD = compute(rows_RD, alone)
    back_RD = _AllToAll.apply(y_RD, receive, send, exchange.group)
    place_R = torch.empty_like(order_R).scatter_(
        0, order_R, torch.arange(T * K, device=order_R.device)
    )
    return weigh(back_RD[place_R].view(T, K, x_TD.shape[1]), routing.weights_TK)


def _splits(sorted_R: Tensor, exchange: Exchange) -> tuple[list[int], list[int], Tensor]:
    """Rows sent to and received from every rank, and the local expert of each received."""
    ranks = exchange.group.size()
    most = chunk(exchange.num_experts, ranks, 0).count
    if exchange.even:
        counts = [chunk(len(sorted_R), ranks, rank).count for rank in range(ranks)]
        rows = torch.arange(len(sorted_R), device=sorted_R.device)
        return counts, counts, rows % most
    sent = torch.bincount(sorted_R, minlength=ranks * most).view(ranks, most)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=exchange.group)
    both = torch.stack([sent.sum(1), got.sum(1)]).tolist()  # the host waits here, once
    every = torch.arange(most, device=got.device).repeat(ranks)
    return both[0], both[1], every.repeat_interleave(got.flatten())


class _AllToAll(torch.autograd.Function):
    """Rows to other ranks; backward sends gradients the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _sent(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _sent(dy, ctx.receive, ctx.send, ctx.group), None, None, None


def _sent(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    y = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(y, x.contiguous(), receive, send, group=group)
    return y
