"""The expert backends on this machine: agreement with float64, and speed, as a run file.

python -m trinity_lib.kernels --config F          # KernelsConfig as JSON
"""

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from trinity_lib import agreement, interpreted, loads
from trinity_lib.agreement import QUANTITIES, ROUTINGS, Batch, Errors
from trinity_lib.allocator import keep_memory
from trinity_lib.config import Refusal, from_file, one_sentence, to_json
from trinity_lib.experts import Experts, backend_info, unavailable
from trinity_lib.interpreted import Case
from trinity_lib.kernels_config import KernelsConfig, require_memory
from trinity_lib.progress import counted
from trinity_lib.record import Claim, Writer, open_run, provenance
from trinity_lib.routing import Routing
from trinity_lib.run import fresh_name
from trinity_lib.schema import TABLES
from trinity_lib.train import RUNS, reproducible

DIRECTIONS = ("forward", "forward+backward")
"""Forward is without gradients, as in evaluation."""
GROUPS = ("agreement", "speed")
"""What a run that measures kernels holds."""
DENSE = {"cpu": 768, "cuda": 8192}
"""Side of the square matrices whose product is the yardstick of speed."""


def measure(config: KernelsConfig, *, runs: Path = RUNS) -> xr.DataTree:
    """Measure and return the run, which is also a file in `runs`.

    A backend that cannot compute here is left out, and the run says why. The same seed on
    the same machine gives the same errors to the bit. Raises Taken where the run's name is
    taken.
    """
    if not config.name:
        name = fresh_name(f"kernels-{config.shape}", config)
        config = dataclasses.replace(config, name=name)
    require_memory(config)
    claim = Claim(runs / config.name)
    try:
        writer = Writer(claim.folder, _attributes(config), _coordinates(config), claim=claim)
    except BaseException:
        claim.release()
        raise
    try:
        with reproducible(config.threads, config.device):
            _fill(config, writer)
        return open_run(writer.close("complete"))
    except BaseException as error:
        reason = (
            str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
        )
        writer.close("failed", reason)
        raise


def _attributes(config: KernelsConfig) -> dict[str, Any]:
    text = to_json(config)
    cuda = config.device == "cuda"
    return {
        **provenance(),
        "name": config.name,
        "scale": config.shape,
        "seed": config.seed,
        "config": text,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "device": config.device,
        "device_name": torch.cuda.get_device_name() if cuda else "",
        "threads": config.threads,
        "dtype": str(config.dtype).removeprefix("torch."),
        "epsilon": torch.finfo(config.dtype).eps,
        "experts_backend": backend_info("auto", config.device, config.dtype),
        "allocator": "torch's CUDA allocator" if cuda else keep_memory(),
        "not_measured": {},
        "not_timed": {},
    }


def _coordinates(config: KernelsConfig) -> dict[str, Any]:
    return {
        "backend": list(config.backends),
        "tokens": list(config.tokens),
        "routing": list(ROUTINGS),
        "quantity": list(QUANTITIES),
        "direction": list(DIRECTIONS),
        "repetition": np.arange(config.repetitions),
    }


def _fill(config: KernelsConfig, writer: Writer) -> None:
    """Measure case by case; what is measured is on the disk after each."""
    tables = _empty(config, writer.coordinates)
    here, missing = _available(config)
    writer.annotate(not_measured=missing)
    experts = agreement.layer(**config.layer)
    cases: list[Case | None] = [(t, routing) for t in config.tokens for routing in ROUTINGS]
    if _elsewhere(config, "megablocks"):
        cases.append(None)
    for case in counted(cases, config.name, "case"):
        if case is None:
            _measure_elsewhere(config, tables, writer)
        else:
            _measure_case(config, tables, experts, case, here)
        for name, table in tables.items():
            writer.table(name, {key: table[key].values for key in TABLES[name]})
        writer.flush()


def _elsewhere(config: KernelsConfig, backend: str) -> bool:
    """Whether another process measures it: on a CPU MegaBlocks' kernels are interpreted."""
    return backend == "megablocks" and backend in config.backends and config.device == "cpu"


def _empty(config: KernelsConfig, labels: dict[str, Any]) -> dict[str, xr.Dataset]:
    tables = {}
    for group in GROUPS:
        variables = TABLES[group]
        used = {d: labels[d] for v in variables.values() for d in v.dims}
        empty = {
            name: (v.dims, np.full([len(labels[d]) for d in v.dims], np.nan))
            for name, v in variables.items()
        }
        tables[group] = xr.Dataset(empty, used)
    for tokens in config.tokens:
        forward = 6.0 * config.width * config.expert_width * config.top_k * tokens
        each = [forward, 3 * forward]  # backward is twice forward
        tables["speed"]["flops"].loc[{"tokens": tokens}] = each
    return tables


def _available(config: KernelsConfig) -> tuple[list[str], dict[str, str]]:
    """Backends that compute in this process, and why others cannot."""
    here: list[str] = []
    missing: dict[str, str] = {}
    for backend in config.backends:
        if _elsewhere(config, backend):
            continue
        if clause := unavailable(backend, config.device, config.dtype):
            missing[backend] = clause
        else:
            here.append(backend)
    return here, missing


def _measure_case(
    config: KernelsConfig,
    tables: dict[str, xr.Dataset],
    experts: Experts,
    case: Case,
    backends: list[str],
) -> None:
    given = agreement.batch(experts, case[0], config.top_k, case[1], config.seed)
    _note(tables, {case: agreement.between(experts, given, backends)})
    at = {"tokens": case[0], "routing": case[1]}
    count_E = given.experts_TK.flatten().bincount(minlength=config.num_experts)
    tables["agreement"]["max_vio"].loc[at] = float(loads.max_vio(count_E.cpu().numpy()))
    size, seconds = DENSE[config.device], tables["speed"]["seconds"]
    square = torch.ones(size, size, device=config.device, dtype=config.dtype)
    for repetition in range(-1, config.repetitions):  # the first warms up
        dense = 2.0 * size**3 / _timed(lambda: square @ square, config.device)
        turn = repetition % len(backends)  # nobody always goes first
        for backend in backends[turn:] + backends[:turn]:
            passes = _passes(experts, given, backend)
            times = [_timed(work, config.device) for work in passes]
            if repetition >= 0:
                seconds.loc[{**at, "backend": backend, "repetition": repetition}] = times
        if repetition >= 0:
            tables["speed"]["dense_rate"].loc[{**at, "repetition": repetition}] = dense


def _measure_elsewhere(
    config: KernelsConfig, tables: dict[str, xr.Dataset], writer: Writer
) -> None:
    slow = "its kernels are interpreted here, and an interpreter's time says nothing"
    writer.annotate(not_timed={"megablocks": slow})
    found, about = interpreted.errors(config)
    _note(tables, found)
    if found:
        writer.annotate(interpreted_backend=about)
    else:
        missing = writer.attributes["not_measured"]
        writer.annotate(not_measured={**missing, "megablocks": about})


def _note(tables: dict[str, xr.Dataset], found: Mapping[Case, Errors]) -> None:
    error = tables["agreement"]["error"]
    for (tokens, routing), by_backend in found.items():
        for backend, errors in by_backend.items():
            at = {"tokens": tokens, "routing": routing, "backend": backend}
            error.loc[at] = [errors[quantity] for quantity in QUANTITIES]


def _passes(experts: Experts, given: Batch, backend: str) -> tuple[Callable[[], object], ...]:
    """What is timed, one for each direction."""

    def forward() -> None:
        experts.backend = backend  # type: ignore[assignment]
        with torch.no_grad():
            experts(given.x_TD, Routing(given.dy_TD, given.experts_TK, given.weights_TK))

    return forward, lambda: agreement.compute(experts, given, backend)


def _timed(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    """Measure as a configuration file says and print the run's path."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--config", type=Path, required=True, help="KernelsConfig as JSON")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of run files")
    given = parser.parse_args()
    with one_sentence():
        config = from_file(KernelsConfig, given.config)
        run = measure(config, runs=given.runs)
        print(given.runs / f"{run.attrs['name']}.nc")


if __name__ == "__main__":
    main()
