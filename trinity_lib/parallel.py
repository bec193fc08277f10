"""A model spread over ranks: FSDP2 for its weights, whole experts to expert ranks.

Every block is a group of its own, its experts another on the experts' mesh. What a rank keeps
between steps are `Piece`s: rows of parameters, on which optimisers and checkpoints work.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from trinity_lib import initial
from trinity_lib.afmoe import Place
from trinity_lib.attention import RMSNorm
from trinity_lib.exchange import Exchange
from trinity_lib.experts import Experts
from trinity_lib.mesh import Layout, Span, chunk
from trinity_lib.model import Block, ModelConfig, Trinity
from trinity_lib.routing import Router


class Piece(NamedTuple):
    """What this rank holds of a parameter."""

    parameter: nn.Parameter
    """FSDP's, whose gradient is to be had after backward."""
    rows: Tensor
    """This rank's rows: the parameter's own memory."""
    span: Span
    """Which rows of the whole they are."""
    shape: torch.Size
    """Of the whole parameter."""
    mesh: DeviceMesh
    """The mesh it is split over, by its last axes."""

    def distributed(self, rows: Tensor) -> DTensor:
        """Rows like this piece's (its own, or a momentum's) as a part of the whole."""
        placements = [Replicate()] + [Shard(0)] * (self.mesh.ndim - 1)
        strides = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            rows.detach(), self.mesh, placements, run_check=False, shape=self.shape,
            stride=strides,
        )  # fmt: skip


class Sharded(NamedTuple):
    """A model over ranks, and this rank's pieces of it."""

    model: Trinity
    layout: Layout
    pieces: dict[str, Piece]

    @property
    def weights(self) -> dict[str, Tensor]:
        """This rank's rows of every parameter."""
        return {name: piece.rows for name, piece in self.pieces.items()}

    def fetch(self, place: Place, writer: int) -> Tensor | None:
        """A released tensor on rank `writer`, None elsewhere; all ranks must call it.

        An expert goes from its holder to the writer; a dense matrix is gathered.
        """
        here = self.layout.rank == writer
        piece = self.pieces.get(place.name)
        if piece is None:  # a bias, which every rank has
            return self.model.get_buffer(place.name) if here else None
        if place.expert is None:
            whole = piece.distributed(piece.rows).full_tensor()
            return whole if here else None
        holder = self.layout.holder(place.expert, piece.shape[0], writer)
        held = None
        if self.layout.rank == holder:
            held = piece.rows[place.expert - piece.span.first]
            if not here:
                dist.send(held.contiguous(), writer)
        elif here:
            held = piece.rows.new_empty(piece.shape[1:])
            dist.recv(held, holder)
        if held is None or not here:
            return None
        return held.T if place.transposed else held

    def wanted(self, place: Place) -> tuple[Tensor, Span | None] | None:
        """Where a released tensor goes here, and which of its rows; None where none does."""
        piece = self.pieces.get(place.name)
        if piece is None:
            return self.model.get_buffer(place.name), None
        if place.expert is None:
            return (piece.rows, piece.span) if piece.span.count else None
        index = place.expert - piece.span.first
        if not 0 <= index < piece.span.count:
            return None
        held = piece.rows[index]
        return (held.T if place.transposed else held), None


def shard(
    config: ModelConfig,
    layout: Layout,
    *,
    dtype: torch.dtype = torch.float32,
    products: torch.dtype | None = None,
    even: bool = False,
    device: str | None = None,
) -> Sharded:
    """A model without values, of which every rank has memory for its own rows alone.

    `products` is what matrices are gathered and multiplied in, where not in `dtype`: norms
    and routers stay in `dtype`, gradients are summed in it. `even`: see `Exchange`; on the
    `device` "meta" there is no memory at all.
    """
    with torch.device("meta"):
        model = Trinity(config).to(dtype)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    group = layout.expert.get_group("experts")
    for module in model.modules():
        if isinstance(module, Experts) and layout.config.experts > 1:
            _cut(module, layout, Exchange(group, config.router.num_experts, even))
    _fully_shard(model, layout, dtype, products)
    model.to_empty(device=device or layout.device)
    for router in model.routers():
        router.bias_E = router.bias_E.float().zero_()
    return Sharded(model, layout, _pieces(model, layout, shapes))


def initialise(sharded: Sharded, generator: torch.Generator) -> None:
    """The weights that `Trinity.initialise` draws in one process: each rank its own rows."""
    seed = initial.seed_of(generator)
    for name, piece in sharded.pieces.items():
        if len(piece.rows):
            first, total = piece.span.first, piece.shape[0]
            sharded.model.initialise_rows(name, piece.rows, seed, first=first, total=total)


def gradients(sharded: Sharded) -> None:
    """Hand every piece its rows of the gradient that FSDP has summed over ranks."""
    for piece in sharded.pieces.values():
        grad = piece.parameter.grad
        piece.rows.grad = None if grad is None else grad.to_local()  # type: ignore[attr-defined]


def forget_gradients(sharded: Sharded) -> None:
    """Drop this step's gradients."""
    for piece in sharded.pieces.values():
        piece.parameter.grad = piece.rows.grad = None


def clip(sharded: Sharded, most: float) -> Tensor:
    """Scale gradients down to a global norm of `most`, as torch's clip_grad_norm_ does.

    Returns the norm before. Every replica counts once.
    """
    grads = [p.rows.grad for p in sharded.pieces.values() if p.rows.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads)).double()
    square = sharded.layout.sum(norms.square().sum()) / sharded.layout.config.replicate
    norm = square.sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, factor.to(grads[0].dtype))
    return norm


class Owners:
    """Whole matrices by turns: each rank of a shard group gets one of those that come together.

    For what cannot be done on rows alone, Muon's orthogonalisation; experts are whole already.
    """

    def __init__(self, sharded: Sharded) -> None:
        layout = sharded.layout
        self.group = layout.dense.get_group("shard")
        self.layout, self.ranks = layout, layout.config.shard
        self.shapes = {id(p.rows): p.shape for p in sharded.pieces.values()}

    def shape(self, rows: Tensor) -> torch.Size:
        """Of the whole parameter that `rows` are this rank's part of."""
        return self.shapes[id(rows)]

    def apply(
        self, parts: Sequence[Tensor], shapes: Sequence[torch.Size], whole: Any
    ) -> list[Tensor]:
        """`whole(matrix)` of at most `ranks` matrices given by rows, and its rows here."""
        mine = dist.get_rank(self.group)
        send = [part.numel() for part in parts] + [0] * (self.ranks - len(parts))
        receive = [0] * self.ranks
        if mine < len(parts):
            rows, width = shapes[mine]
            receive = [chunk(rows, self.ranks, r).count * width for r in range(self.ranks)]
        flat = torch.cat([part.flatten() for part in parts])
        matrix = self._exchanged(flat, send, receive)
        if mine < len(parts):
            matrix = whole(matrix.view(shapes[mine])).flatten()
        back = self._exchanged(matrix, receive, send)
        pieces = back.split(send)[: len(parts)]
        return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]

    def _exchanged(self, flat: Tensor, send: list[int], receive: list[int]) -> Tensor:
        result = flat.new_empty(sum(receive))
        dist.all_to_all_single(result, flat, receive, send, group=self.group)
        return result


def _cut(module: Experts, layout: Layout, exchange: Exchange) -> None:
    """Leave a layer the experts that this rank computes with."""
    module.exchange = exchange
    count = layout.experts(exchange.num_experts).count
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.new_empty(count, *parameter.shape[1:])))


def _fully_shard(
    model: Trinity, layout: Layout, dtype: torch.dtype, products: torch.dtype | None
) -> None:
    replicated = layout.config.replicate > 1
    dense = layout.dense if replicated else layout.dense["shard"]
    names = ("replicate", "expert_shard") if replicated else "expert_shard"
    experts = layout.expert[names]
    precise = MixedPrecisionPolicy(cast_forward_inputs=False)
    mixed = products not in (None, dtype)
    policy = precise
    if mixed:
        policy = MixedPrecisionPolicy(products, dtype, cast_forward_inputs=False)
    for block in model.blocks:
        assert isinstance(block, Block)
        if block.experts is not None:
            fully_shard(block.experts, mesh=experts, mp_policy=policy)
        if mixed:
            kept: list[nn.Module] = [
                m for m in block.modules() if isinstance(m, RMSNorm | Router)
            ]
            fully_shard(kept, mesh=dense, mp_policy=precise)
        fully_shard(block, mesh=dense, mp_policy=policy)
    if mixed:
        fully_shard([model.norm], mesh=dense, mp_policy=precise)
    if model.head is not None:
        fully_shard(model.embedding, mesh=dense, mp_policy=precise)
        fully_shard(model, mesh=dense, mp_policy=policy)
    else:  # the head is the embedding, which stays precise
        fully_shard(model, mesh=dense, mp_policy=precise)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _pieces(
    model: Trinity, layout: Layout, shapes: Mapping[str, torch.Size]
) -> dict[str, Piece]:
    found = {}
    for name, parameter in model.named_parameters():
        shape = shapes[name]
        of_experts = len(shape) == 3
        span = layout.held_experts(shape[0]) if of_experts else layout.rows(shape[0])
        rows = parameter.to_local()  # type: ignore[attr-defined]
        assert len(rows) == span.count, f"{name}: {len(rows)} rows, not {span.count}"
        mesh = layout.expert if of_experts else layout.dense
        found[name] = Piece(parameter, rows.detach(), span, shape, mesh)
    return found
