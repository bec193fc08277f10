"""Checks that run on several processes, each a rank, in less time than their imports take.

Ranks are forked from one server that has imported all they need. What a rank returns comes
back, what it raises fails the test with its traceback, warnings are errors there too, and
none outlives its time.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch
import torch.distributed as dist

import trinity_lib.train  # noqa: F401 (what ranks need; the server imports it once)
from trinity_lib.attention import AttentionConfig
from trinity_lib.experts import live
from trinity_lib.failure import OTHERS_FAULT
from trinity_lib.mesh import ParallelConfig, Span
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.routing import RouterConfig

SECONDS = 120
"""For a check, on a busy machine."""
VICTIMS_SECONDS = 5
"""For the other ranks to notice that one has failed."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "h5netcdf", "hypothesis"])
live("auto", "cpu", torch.float32)  # the C++ operator is compiled and loaded before the fork


class Ranks:
    """Processes that run a check."""

    def __init__(self, check: Callable[..., Any], ranks: int, given: tuple[Any, ...]) -> None:
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")  # the server must not have threads: it forks
            for rank in range(ranks):
                ours, theirs = SERVER.Pipe(duplex=False)
                about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
                about |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": self.store.port}
                process = SERVER.Process(target=_rank, args=(theirs, about, check, given))
                process.start()
                theirs.close()
                self.processes.append(process)
                self.connections.append(ours)

    def until(self, seen: Callable[[], object], seconds: float = SECONDS) -> None:
        """Wait for something that the ranks do."""
        end = time.monotonic() + seconds
        while not seen():
            if time.monotonic() > end or not all(p.is_alive() for p in self.processes):
                self.results()
                raise AssertionError("the ranks ended before it was seen")
            time.sleep(0.005)

    def kill(self) -> None:
        """SIGKILL for all."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def results(self, seconds: float = SECONDS) -> list[Any]:
        """What every rank returned."""
        end = time.monotonic() + seconds
        found: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while len(found) + len(failures) < len(self.processes) and time.monotonic() < end:
            silent = {c: i for i, c in enumerate(self.connections) if i not in found | failures}
            for connection in wait(list(silent), timeout=0.5):
                rank = silent[connection]  # type: ignore[index]
                try:
                    raised, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    self.processes[rank].join()
                    code = self.processes[rank].exitcode
                    raised, value = True, f"rank {rank} ended with exit code {code}"
                (failures if raised else found)[rank] = value
            if failures:
                end = min(end, time.monotonic() + VICTIMS_SECONDS)
        missing = set(range(len(self.processes))) - set(found) - set(failures)
        if failures or missing:
            pytest.fail(_report(failures, missing), pytrace=False)
        return [found[rank] for rank in range(len(found))]


@contextlib.contextmanager
def started(check: Callable[..., Any], ranks: int, *given: Any) -> Iterator[Ranks]:
    """`check(*given)` on every rank; all are gone afterwards."""
    running = Ranks(check, ranks, given)
    try:
        yield running
    finally:
        running.kill()


def run(check: Callable[..., Any], ranks: int, *given: Any) -> list[Any]:
    """What `check(*given)`, a function of a module, returns on every rank."""
    with started(check, ranks, *given) as running:
        return running.results()


def _report(failures: dict[int, str], missing: set[int]) -> str:
    """All failures, victims of others last."""
    order = sorted(failures, key=lambda r: any(word in failures[r] for word in OTHERS_FAULT))
    lines = [f"----- rank {rank}\n{failures[rank]}" for rank in order]
    if missing:
        lines.append(f"----- nothing came from ranks {sorted(missing)}")
    return "\n".join(lines)


def _rank(
    connection: Connection, about: dict[str, int], check: Callable[..., Any], given: Any
) -> None:
    """Be a rank, as torchrun would start it."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    os.environ |= {name: str(value) for name, value in about.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        answer = False, check(*given)
    except BaseException:
        answer = True, traceback.format_exc()
    connection.send(answer)
    connection.close()


LAYOUTS = {
    "replicas": ParallelConfig(replicate=2),
    "shards": ParallelConfig(shard=2),
    "experts": ParallelConfig(shard=2, experts=2),
    "four replicas": ParallelConfig(replicate=4),
    "four shards": ParallelConfig(shard=4),
    "replicas of shards": ParallelConfig(replicate=2, shard=2),
    "replicas of experts": ParallelConfig(replicate=2, shard=2, experts=2),
    "sharded experts": ParallelConfig(shard=4, experts=2),
    "four expert ranks": ParallelConfig(shard=4, experts=4),
}
"""Every way to lay two or four ranks out."""


def small(num_experts: int = 5, **changes: Any) -> ModelConfig:
    """A model of which nothing divides by the ranks: 383 tokens, 60 wide, gains of 6."""
    given: dict[str, Any] = {
        "vocab_size": 383,
        "width": 32,
        "num_layers": 3,
        "num_dense_layers": 1,
        "dense_width": 61,
        "expert_width": 16,
        "global_every": 3,
        "attention": AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=6, window=8),
        "router": RouterConfig(num_experts=num_experts, top_k=2, route_scale=2.0),
    }
    return ModelConfig(**(given | changes))


def drawn(config: ModelConfig, seed: int = 0) -> Trinity:
    """One process's whole model with weights, and biases, that only it has."""
    model = Trinity(config)
    model.initialise(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    shape = len(config.moe_layers), config.router.num_experts
    model.load_bias(0.1 * torch.randn(shape, generator=generator))
    return model


def rows_of(whole: torch.Tensor, span: Span) -> torch.Tensor:
    """The rows of a tensor that a rank holds."""
    return whole[span.first : span.first + span.count]
