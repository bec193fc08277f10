"""One full MoE layer of Trinity on one GPU, ours beside its peers': speed, memory, agreement.

    python benchmarks/layer.py                                     # Large, Mini and Nano
    python benchmarks/layer.py --layers large --tokens 32768 --profile
    python benchmarks/layer.py --rehearse                          # the program, on a CPU

Router, permutation, experts, weighting and shared expert are inside the timing, in bf16 with
bf16 gradients, on random data and uneven loads. Every contestant is first compared with a
loop over experts in fp32. Repetitions take turns with a dense matrix product, whose rate in
the same turns is what shares are of. FLOPs a token: 6DF for each routed and shared expert and
2DE for the router; with backward three times that. The last line is one JSON object.
"""

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _blocks import (
    CONTESTANTS,
    Contestant,
    Job,
    Weights,
    draw,
    error,
    jobs,
    ours,
    part_jobs,
    tokens,
)
from torch import Tensor, nn

from trinity_lib import recipes
from trinity_lib.config import Missing, first_line
from trinity_lib.experts import backend_info
from trinity_lib.loads import max_vio
from trinity_lib.model import ModelConfig

TOKENS = (8192, 16_384, 32_768, 65_536)
DENSE = 8192
"""Side of the dense product's matrices."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Most that outputs may differ from the fp32 loop, relative in norm."""
CALLS = 3
"""Timed calls of a contestant in its turn, queued back to back after one that is not timed."""
MODES = ("forward", "forward+backward")
Key = tuple[str, str]
"""Who, and which mode."""


def milliseconds(call: Callable[[], object], device: str) -> tuple[list[float], int]:
    """What each call took, and the most bytes held on top of those held before."""
    if device == "cpu":
        call()
        clock = [time.perf_counter()]
        for _ in range(CALLS):
            call()
            clock.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in itertools.pairwise(clock)], 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(CALLS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)], peak


def forget(modules: list[nn.Module]) -> None:
    """Free gradients and cached memory, so that no contestant lives on another's."""
    for module in modules:
        module.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.empty_cache()


class Result(NamedTuple):
    ms: list[float]
    peak: int


def take_turns(
    table: dict[Key, Job], modules: list[nn.Module], device: str, rounds: int
) -> tuple[dict[Key, Result], dict[str, str]]:
    """Every job's times, a few a round, and why some have none."""
    results = {key: Result([], 0) for key in table}
    dropped: dict[str, str] = {}
    for _, (key, job) in itertools.product(range(rounds), table.items()):
        if key not in results:
            continue
        try:
            ms, peak = milliseconds(job.call, device)
            results[key] = Result(results[key].ms + ms, max(peak, results[key].peak))
        except RuntimeError as failure:  # out of memory among them
            dropped[", ".join(key)] = f"{type(failure).__name__}: {first_line(failure)}"
            del results[key]
        forget(modules)
    return results, dropped


def profile(call: Callable[[], object], device: str) -> str:
    """The kernels that one call spends most time in."""
    call()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiled:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    order = f"self_{device}_time_total"
    return profiled.key_averages().table(order, row_limit=15, max_name_column_width=60)


def contestants(
    model: ModelConfig, w: Weights, x_TD: Tensor
) -> tuple[dict[str, Contestant], dict[str, str], dict[str, float]]:
    """Those that can be built and compute what they should, why not the others, and errors."""
    built, dropped, errors = {}, {}, {}
    for name, build in CONTESTANTS.items():
        try:
            contestant = build(model, w)
            errors[name] = error(contestant, w, x_TD)
        except Missing as failure:
            dropped[name] = first_line(failure)
            continue
        except Exception as failure:  # a peer's defect must not cost the others' figures
            dropped[name] = f"{type(failure).__name__}: {first_line(failure)}"
            continue
        if errors[name] <= TOLERANCE[x_TD.dtype]:
            built[name] = contestant
        else:
            dropped[name] = f"its outputs are off by {errors[name]:.2e}"
    forget([])
    return built, dropped, errors


def dense_job(like: Tensor) -> Job:
    side = DENSE if like.is_cuda else like.shape[1]
    a, b = torch.randn(2, side, side, device=like.device, dtype=like.dtype)
    return Job(lambda: a @ b, 2.0 * side**3)


def case(
    model: ModelConfig, w: Weights, built: dict[str, Contestant], x: Tensor, given: Any
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All rows of one layer at one number of tokens."""
    device, D, hidden = x.device.type, model.width, model.expert_width
    active = model.router.top_k + model.num_shared_experts
    flops = len(x) * (6.0 * D * hidden * active + 2.0 * w.router_ED.numel())
    dy = torch.randn_like(x)
    table = {("dense product", ""): dense_job(x)}
    for name, contestant in built.items():
        for mode, job in jobs(contestant, x, dy, flops).items():
            table[name, mode] = job
    for name, pair in part_jobs(model, w, x, dy).items():
        table |= {(name, mode): job for mode, job in zip(MODES, pair, strict=True)}
    modules = [contestant.module for contestant in built.values()]
    results, dropped = take_turns(table, modules, device, given.rounds)
    rate = {key: table[key].flops / statistics.median(r.ms) / 1e9 for key, r in results.items()}
    dense = rate["dense product", ""]
    rows = [
        {
            "who": who,
            "mode": mode,
            "ms": [round(f(result.ms), 4) for f in (statistics.median, min, max)],
            "tflops": round(rate[who, mode], 3),
            "share": round(rate[who, mode] / dense, 4),
            "peak_gb": round(result.peak / 1e9, 3),
        }
        for (who, mode), result in results.items()
    ]
    if given.profile:
        for who, mode in results:
            if who in built and mode == MODES[1]:
                print(f"\n{who}, {mode}:\n{profile(table[who, mode].call, device)}")
                forget(modules)
    return rows, dropped


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'':26}{'':18}{'ms':>10} {'(min to max)':^23} {'TFLOP/s':>8} {'share':>6} {'GB':>6}"
    )
    for row in rows:
        middle, low, high = row["ms"]
        rate = f"{row['tflops']:8.1f} {row['share']:6.1%}" if row["tflops"] else " " * 15
        spread = f"({low:.3f} to {high:.3f})"
        print(
            f"{row['who']:26}{row['mode']:18}{middle:10.3f} {spread:^23} {rate} "
            f"{row['peak_gb']:6.2f}"
        )


def measure(name: str, model: ModelConfig, given: Any) -> list[dict[str, Any]]:
    """Print and return what one layer's contestants do at every number of tokens."""
    device = "cpu" if given.rehearse else "cuda"
    w = draw(model, device, torch.float32 if given.rehearse else torch.bfloat16)
    built, lacking, errors = contestants(model, w, tokens(model, given.tokens[0], w.gate_EFD))
    for who, why in lacking.items():
        print(f"{name}: {who} is left out: {why}")
    for who, off in errors.items():
        allowed = TOLERANCE[w.gate_EFD.dtype]
        print(f"{name}: {who} is within {off:.1e} of the fp32 loop ({allowed:.0e} allowed)")
    cases = []
    for count in given.tokens:
        x = tokens(model, count, w.gate_EFD)
        router: Any = ours(model, w, "torch")
        with torch.no_grad():
            chosen = router.route(x)[0].flatten()
        load = torch.bincount(chosen, minlength=model.router.num_experts).tolist()
        print(f"\n{name}, {count:,} tokens, MaxVio {max_vio(load):.2f}")
        rows, dropped = case(model, w, built, x, given)
        show(rows)
        for who, why in dropped.items():
            print(f"{who}: {why}")
        facts = {"layer": name, "tokens": count, "max_vio": round(float(max_vio(load)), 3)}
        cases.append(facts | {"rows": rows, "left_out": lacking | dropped, "errors": errors})
    return cases


def rehearsed(model: ModelConfig) -> ModelConfig:
    """A layer small enough for Triton's interpreter, of the toy's router."""
    router = dataclasses.replace(model.router, num_experts=8)
    return dataclasses.replace(model, expert_width=model.width, router=router)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    scales = ("large", "mini", "nano")
    parser.add_argument("--layers", nargs="+", choices=scales, default=scales)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--profile", action="store_true", help="print the slowest kernels")
    parser.add_argument("--rehearse", action="store_true", help="tiny, fp32, on the CPU")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.rehearse:
        given.tokens, layers = [64], {"toy": rehearsed(recipes.toy().model)}
    elif torch.cuda.is_available():
        layers = {name: recipes.SCALES[name]().model for name in given.layers}
    else:
        print("benchmarks/layer.py needs a CUDA GPU and torch sees none: nothing was measured.")
        return
    cases = []
    for name, model in layers.items():
        cases += measure(name, model, given)
        forget([])
    device = ("cpu", torch.float32) if given.rehearse else ("cuda", torch.bfloat16)
    machine = "cpu" if given.rehearse else torch.cuda.get_device_name()
    about = {"machine": machine, "rounds": given.rounds, "calls": CALLS}
    print(json.dumps({**about, "experts": backend_info("auto", *device), "cases": cases}))


if __name__ == "__main__":
    main()
