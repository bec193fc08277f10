"""Contestants timed in turn in one process, so that a busy machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleave(
    contestants: Mapping[str, Callable[[], object]], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of every repetition, after two that do not count: the heap must find its size."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(-2, repetitions):
        for name, work in contestants.items():
            begun = time.perf_counter()
            work()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def speedups(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """How many times faster than the baseline: median and range over repetitions.

    Beside them the ratio of the two fastest repetitions, which other processes disturb
    least, and the median milliseconds.
    """
    table = {}
    for name, times in seconds.items():
        ratios = [b / t for t, b in zip(times, seconds[baseline], strict=True)]
        table[name] = {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "greatest": max(ratios),
            "of_fastest": min(seconds[baseline]) / min(times),
            "milliseconds": 1e3 * statistics.median(times),
        }
    return table


def show(title: str, table: Mapping[str, Mapping[str, float]]) -> None:
    print(f"\n{title}", flush=True)
    for name, row in table.items():
        spread = (
            f"({row['least']:.2f} to {row['greatest']:.2f}; fastest {row['of_fastest']:.2f})"
        )
        milliseconds = f"{row['milliseconds']:9.2f} ms"
        print(f"  {name:28} x {row['median']:5.2f}  {spread:36} {milliseconds}", flush=True)


def product_rate(size: int = 1536, repetitions: int = 5) -> float:
    """GFLOP/s of an fp32 matrix product of this process: the fastest of a few."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    seconds = interleave({"product": lambda: a @ b}, repetitions)["product"]
    return 2 * size**3 / min(seconds) / 1e9


def rounded(value: object) -> object:
    """The same nested dictionaries with short numbers, for a line of JSON."""
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def fastest(seconds: Mapping[str, list[float]], prefix: str) -> str:
    """The contestant of that prefix with the least median."""
    rivals = [name for name in seconds if name.startswith(prefix)]
    return min(rivals, key=lambda name: statistics.median(seconds[name]))
