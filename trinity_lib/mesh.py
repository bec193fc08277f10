"""Which ranks hold what: replicas, shards, and ranks that share a layer's experts.

Two meshes over the same ranks. Dense weights: [replicate, shard]. Experts: [replicate,
experts, expert_shard], where `experts` neighbouring ranks exchange tokens and each layer's
experts are split over them first, then over the rest of the shard group.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from trinity_lib import disk
from trinity_lib.config import check, require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is laid out over ranks; one rank each way is a run without ranks."""

    replicate: int = 1
    """Groups of ranks that each hold the whole model."""
    shard: int = 1
    """Ranks of such a group, over which its weights and optimiser state are split (FSDP)."""
    experts: int = 1
    """Ranks of a shard group that share a layer's experts and exchange tokens (EP)."""

    def __post_init__(self) -> None:
        check(self)
        for name in ("replicate", "shard", "experts"):
            value = getattr(self, name)
            require(1 <= value <= 2**20, name, value, "at least 1, at most 1,048,576")
        divides = self.shard % self.experts == 0
        require(divides, "experts", self.experts, f"a divisor of shard ({self.shard})")

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.replicate * self.shard

    @property
    def expert_shard(self) -> int:
        """Ranks over which one expert rank's experts are split."""
        return self.shard // self.experts


class Span(NamedTuple):
    """Rows of a tensor that a rank holds."""

    first: int
    count: int  # type: ignore[assignment]  # hides tuple's method


def chunk(total: int, parts: int, part: int) -> Span:
    """What part number `part` of `parts` gets of `total` rows, as torch.chunk would cut.

    All get as many but the last ones, which may get fewer or none.
    """
    size = -(-total // parts)
    first = min(part * size, total)
    return Span(first, min(size, total - first))


class Layout:
    """The ranks of a live run: this process's place among them, and who talks to whom.

    BadValue where the run wants another number of ranks than torchrun started.
    """

    def __init__(self, config: ParallelConfig, device: str) -> None:
        world = dist.get_world_size()
        right = f"{world}, the processes that were started"
        require(config.ranks == world, "replicate x shard", config.ranks, right)
        self.config, self.rank, self.ranks = config, dist.get_rank(), world
        every = torch.arange(world)
        dense = every.view(config.replicate, config.shard)
        self.dense = DeviceMesh(device, dense, mesh_dim_names=("replicate", "shard"))
        tokens_swap = every.view(config.replicate, config.expert_shard, config.experts)
        names = ("replicate", "experts", "expert_shard")
        self.expert = DeviceMesh(device, tokens_swap.transpose(1, 2), mesh_dim_names=names)
        self.device = device
        # Objects and checkpoints go over the CPU; a rank may wait while another tokenises.
        self.control = dist.new_group(backend=_control(), timeout=timedelta(days=1))
        # What a thread of its own sends meanwhile must not come between those.
        self.background = dist.new_group(backend=_control(), timeout=timedelta(days=1))

    def rows(self, total: int) -> Span:
        """The rows this rank holds of a dense parameter."""
        return chunk(total, self.config.shard, self.rank % self.config.shard)

    def experts(self, total: int) -> Span:
        """The experts this rank computes with, before they are split further."""
        return chunk(total, self.config.experts, self.rank % self.config.experts)

    def held_experts(self, total: int) -> Span:
        """The experts this rank keeps between steps: a part of those it computes with."""
        mine = self.experts(total)
        index = self.rank % self.config.shard // self.config.experts
        part = chunk(mine.count, self.config.expert_shard, index)
        return Span(mine.first + part.first, part.count)

    def holder(self, expert: int, total: int, near: int) -> int:
        """The rank that keeps an expert, in the replica of rank `near`."""
        c = self.config
        part = expert // chunk(total, c.experts, 0).count
        mine = chunk(total, c.experts, part)
        index = (expert - mine.first) // chunk(mine.count, c.expert_shard, 0).count
        return near // c.shard * c.shard + index * c.experts + part

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' tensors, in place."""
        dist.all_reduce(tensor)
        return tensor

    def shared(self, value: Any) -> Any:
        """Rank 0's value, on every rank; anything that can be pickled."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=self.control)
        return values

    def replace_folder(self, folder: Path, write: Callable[[Path], object]) -> None:
        """Write a folder together, whole or not at all; every rank calls it."""
        temporary = Path(self.shared(str(disk.beside(folder))))
        if self.rank == 0:
            disk.new_folder(temporary)
        dist.barrier(self.control)
        write(temporary)
        dist.barrier(self.control)
        if self.rank == 0:
            disk.put(temporary, folder)
        dist.barrier(self.control)

    @contextlib.contextmanager
    def leaders_first(self) -> Iterator[None]:
        """One process of every machine does it before the others, for whom it is then there."""
        leader = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if not leader:
            dist.barrier(self.control)
        yield
        if leader:
            dist.barrier(self.control)


@contextlib.contextmanager
def joined(config: ParallelConfig, device: str) -> Iterator[Layout | None]:
    """This process's place among the ranks torchrun started; None where there is one alone.

    BadValue where a run of several ranks is not started by torchrun.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == config.ranks == 1:
        yield None
        return
    right = f"{world}, the processes that were started (torchrun)"
    require(config.ranks == world, "replicate x shard", config.ranks, right)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        yield Layout(config, device)
    finally:
        dist.destroy_process_group()


def _control() -> str:
    """gloo, except in a rehearsal, where no process answers."""
    return "fake" if dist.get_backend() == "fake" else "gloo"
