"""One optimiser step of the real sharded model, with tensors that have shapes and no values.

Rank 0 of a run, as at its second step: first the optimisers' step, so that their state is
there, then forward and backward of a step's first micro-batch, where a rank has several, and
of its last. Routing has no values either: every expert rank is sent as many rows.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from trinity_lib import guise, operators, optim, parallel
from trinity_lib.balance import BalanceConfig, Balancer
from trinity_lib.config import BadValue
from trinity_lib.experts import use_backend
from trinity_lib.footprint import Memory, Moment
from trinity_lib.ledger import Collective, Ledger, Traffic
from trinity_lib.losses import token_loss
from trinity_lib.mesh import Layout, ParallelConfig
from trinity_lib.model import Trinity
from trinity_lib.parallel import Sharded
from trinity_lib.routing import Routing
from trinity_lib.run import RunConfig
from trinity_lib.session import new_balancer

Direction = Literal["forward", "backward", "step"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "step")
MOMENTS: tuple[Literal["forward"] | Moment, ...] = (
    "forward", "loss", "block", "embedding", "step",
)  # fmt: skip
"""`footprint`'s, and the whole of forward."""
EARLY = "first micro-batch"
"""The phase of a first micro-batch."""
OPERATORS = ("products", "attention", "experts")
"""Matrix products, attention's scores and sums of values, and the routed experts."""
PRODUCTS = torch.bfloat16
"""What matrices are gathered and multiplied in on CUDA (`preflight.products_dtype`)."""


class Trace(NamedTuple):
    """What a rank would allocate, compute and send."""

    memory: dict[str, Memory]
    """Bytes where a moment of a step is fullest, by moment."""
    flops: Mapping[tuple[str, str], int]
    """Of one micro-batch, and of the optimisers, by direction and operator."""
    traffic: dict[Collective, Traffic]
    """Of a whole optimiser step."""
    operators: int
    """How many were dispatched."""
    balance: str
    """The balancer's method: the run's, or `none` where that one looks at values."""


@contextlib.contextmanager
def pretended(config: ParallelConfig) -> Iterator[Layout]:
    """Rank 0 among ranks that are not there; nothing it sends arrives.

    BadValue inside a process group.
    """
    if dist.is_initialized():
        raise BadValue("a rehearsal is started alone; this process is a rank already.")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.ranks)
    try:
        yield Layout(config, "cpu")
    finally:
        dist.destroy_process_group()


def shard(config: RunConfig, layout: Layout) -> Sharded:
    """The run's model over its ranks, on the meta device, as it would be on CUDA."""
    dtype = getattr(torch, config.dtype)
    return parallel.shard(
        config.model, layout, dtype=dtype, products=PRODUCTS, even=True, device="meta"
    )


def step(config: RunConfig, sharded: Sharded, rows: int, say: Callable[[str], object]) -> Trace:
    """Trace a step whose micro-batches have `rows` rows; `sharded` is used up."""
    ledger = Ledger(operators.FORMULAS, operators.WORKSPACES, say)
    ledger.rules = operators.rules(
        ledger, rows * config.data.sequence_length, config.model.vocab_size
    )
    begins: dict[str, int] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), guise.Guise():
        sharded = faked(sharded)
        balancer = _balancer(config, sharded.layout)
        with ledger:
            ledger.enter_all(sharded.weights.values(), "weights")
            optimizers = _optimise(config, sharded, ledger, begins)
            _micro_batches(config, sharded, balancer, rows, ledger, begins)
            begins["end"] = ledger.now
        del optimizers  # their state was to be there until now
    return _result(config, ledger, begins, balancer.config.method)


def _balancer(config: RunConfig, layout: Layout) -> Balancer:
    """The run's, or none where it looks at values."""
    config = replace(config, device="cpu")
    balancer = new_balancer(config, layout)
    router, layers = config.model.router, len(config.model.moe_layers)
    documents_BS = torch.zeros(1, router.num_experts, dtype=torch.int64)
    scores_TE = torch.empty(router.num_experts, router.num_experts, requires_grad=True)
    try:
        balancer.begin(documents_BS, documents_BS)
        ranked = balancer.select(scores_TE.detach(), 0)
        if ranked.is_floating_point():
            ranked = ranked.topk(router.top_k).indices
        balancer.loss([Routing(scores_TE, ranked, scores_TE)] * layers, documents_BS)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return new_balancer(replace(config, balance=BalanceConfig(method="none")), layout)
    return balancer


def faked(sharded: Sharded) -> Sharded:
    """The same with fake tensors where it had none: FSDP wants a device that computes."""
    model = sharded.model.to_empty(device="cpu")
    use_backend(model, "torch", PRODUCTS)
    parameters = dict(model.named_parameters())
    pieces = {
        name: piece._replace(
            parameter=parameters[name],
            rows=parameters[name].to_local().detach(),  # type: ignore[attr-defined]
        )
        for name, piece in sharded.pieces.items()
    }
    return Sharded(model, sharded.layout, pieces)


def _optimise(
    config: RunConfig, sharded: Sharded, ledger: Ledger, begins: dict[str, int]
) -> list[torch.optim.Optimizer]:
    """The optimisers' step on gradients that are there, and what ranks sum before it."""
    ledger.phase, ledger.default = "step", "stepping"
    for piece in sharded.pieces.values():
        piece.parameter.grad = torch.empty_like(piece.parameter)
    parallel.gradients(sharded)
    ledger.enter_all((p.rows.grad for p in sharded.pieces.values()), "gradients")
    begins["step"] = ledger.now
    layout, model = sharded.layout, config.model
    loads = 2 * len(model.moe_layers) * model.router.num_experts
    layout.sum(torch.empty(loads, dtype=torch.int64))  # as `step._together` does
    layout.sum(torch.empty(4 + config.micro_batches, dtype=torch.float64))
    parallel.clip(sharded, config.optim.clip)
    owners = parallel.Owners(sharded)
    optimizers = optim.build(sharded.model, config.optim, sharded.weights, owners)
    for optimizer in optimizers:
        optimizer.step()
        for state in optimizer.state.values():
            ledger.enter_all(state.values(), "optimizer")
    return optimizers


def _micro_batches(
    config: RunConfig,
    sharded: Sharded,
    balancer: Balancer,
    rows: int,
    ledger: Ledger,
    begins: dict[str, int],
) -> None:
    """A step's first micro-batch, where a rank has several, and its last."""
    begins["early"] = ledger.now
    parallel.forget_gradients(sharded)
    model: Any = sharded.model
    if _times(config) > 1:
        model.set_requires_all_reduce(False)
        _micro_batch(config, sharded.model, balancer, rows, ledger, (EARLY, EARLY))
        ledger.rename(("working", "unreduced"), "gradients")  # nothing else outlives it
        model.set_requires_all_reduce(True)
    _notice(sharded.model, ledger, begins)
    begins["forward"] = ledger.now
    _micro_batch(config, sharded.model, balancer, rows, ledger, ("forward", "backward"))
    parallel.gradients(sharded)
    ledger.enter_all((p.rows.grad for p in sharded.pieces.values()), "gradients")


def _micro_batch(
    config: RunConfig,
    model: Trinity,
    balancer: Balancer,
    rows: int,
    ledger: Ledger,
    phases: tuple[str, str],
) -> None:
    """Forward and backward, as `step._micro_batch` does them."""
    ledger.phase, ledger.default = phases[0], "working"
    tokens_BS = torch.zeros(rows, config.data.sequence_length, dtype=torch.int64)
    documents_BS, targets_BS = torch.zeros_like(tokens_BS), torch.zeros_like(tokens_BS)
    chosen_LTK = balancer.begin(tokens_BS, documents_BS)
    with torch.autocast("cpu", PRODUCTS):
        output = model(
            tokens_BS,
            documents_BS,
            select=balancer.select,
            replay=None if chosen_LTK is None else chosen_LTK.unbind(),
            recompute=config.recompute,
        )
    loss = token_loss(output.logits, targets_BS)
    objective = loss.cross_entropy + config.z_loss * loss.z
    balance_loss = balancer.loss(output.routing, documents_BS)
    if balance_loss is not None:
        objective = objective + balance_loss / rows
    ledger.rename(("working", "exchange"), "kept")
    ledger.phase = phases[1]
    guise.backward(objective)


def _times(config: RunConfig) -> int:
    """Micro-batches of a rank in a step."""
    return config.micro_batches // config.parallel.ranks


def _notice(model: Trinity, ledger: Ledger, begins: dict[str, int]) -> None:
    """Note when the blocks are done, when their backward begins, and when it is done."""

    def noted(moment: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            begins.setdefault(moment, ledger.now)

        return note

    def after_blocks(_: Any, inputs: tuple[Tensor, ...]) -> None:
        noted("loss")()
        inputs[0].register_hook(noted("block"))

    def before_blocks(_: Any, inputs: tuple[Tensor, ...]) -> None:
        if "loss" not in begins:  # else it is computed again
            inputs[0].register_hook(noted("embedding"))

    model.norm.register_forward_pre_hook(after_blocks)
    model.blocks[0].register_forward_pre_hook(before_blocks)


def _result(
    config: RunConfig, ledger: Ledger, begins: Mapping[str, int], balance: str
) -> Trace:
    order = ("step", "early", "forward", "loss", "block", "embedding", "end")  # as they came
    after = dict(itertools.pairwise(order))
    memory: dict[str, Memory] = {}
    for moment in MOMENTS:
        found = ledger.peak(begins[moment], begins[after[moment]])
        memory[moment] = Memory(**{kind: found.get(kind, 0) for kind in Memory._fields})
    flops: Counter[tuple[str, str]] = Counter()
    for (phase, operator), operations in ledger.flops.items():
        flops[phase, operators.KINDS.get(operator, "products")] += operations
    return Trace(memory, flops, _of_a_step(config, ledger.traffic), ledger.operators, balance)


def _of_a_step(
    config: RunConfig, traffic: Mapping[tuple[str, Collective], Traffic]
) -> dict[Collective, Traffic]:
    """What a rank moves in all of a step; all micro-batches but the last are as the first."""
    found: dict[Collective, Traffic] = {}
    for (phase, collective), moved in traffic.items():
        times = _times(config) - 1 if phase == EARLY else 1
        before = found.get(collective, Traffic(0, 0, 0))
        pairs = zip(before, moved, strict=True)
        found[collective] = Traffic(*(old + times * new for old, new in pairs))
    return found
