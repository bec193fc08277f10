"""What `kernels` measures: its settings, and how a notebook's parameters become them."""

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch

from trinity_lib import launch, recipes
from trinity_lib.config import BadValue, check, convert, require
from trinity_lib.preflight import memory
from trinity_lib.run import require_common

Backend = Literal["torch", "native", "megablocks"]
Device = Literal["cpu", "cuda"]
SHAPES = {"cpu": "toy", "cuda": "mini"}
TOKENS = {"cpu": (32, 256, 1024), "cuda": (1024, 8192, 32_768)}
"""What is measured where nothing else is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """What is measured: one expert layer, and how often."""

    shape: str
    """Name of the scale whose layer it is."""
    width: int
    """Model width D."""
    expert_width: int
    """Hidden width F of an expert."""
    num_experts: int
    """Experts in the layer."""
    top_k: int
    """Experts a token takes."""
    tokens: tuple[int, ...]
    """Numbers of tokens."""
    backends: tuple[Backend, ...] = get_args(Backend)
    """Backends to measure; torch, which speeds are compared with, is one."""
    repetitions: int = 15
    """Timed repetitions of each pass."""
    seed: int = 0
    """Seed of weights, tokens and routings."""
    device: Device = "cpu"
    """Where: fp32 on the CPU and bf16 on CUDA, as in training."""
    threads: int = 1
    """CPU threads."""
    name: str = ""
    """Name of the run; empty: kernels, shape, configuration hash and time."""

    def __post_init__(self) -> None:
        check(self)
        require_common(self.name, self.seed, self.threads)
        for name in ("width", "expert_width", "num_experts", "top_k"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        right = f"at most num_experts ({self.num_experts})"
        require(self.top_k <= self.num_experts, "top_k", self.top_k, right)
        fits = bool(self.tokens) and all(1 <= t <= 10_000_000 for t in self.tokens)
        require(fits, "tokens", _listed(self.tokens), "numbers from 1 to 10,000,000")
        for name in ("tokens", "backends"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), name, _listed(values), "named once each")
        right = "a list with torch in it, which the others are compared with"
        require("torch" in self.backends, "backends", _listed(self.backends), right)
        fits = 2 <= self.repetitions <= 10_000
        require(fits, "repetitions", self.repetitions, "from 2, for a spread, to 10,000")
        if self.device == "cuda":
            right = "cpu: this machine has no CUDA GPU"
            require(torch.cuda.is_available(), "device", "cuda", right)

    @property
    def dtype(self) -> torch.dtype:
        """What the layer multiplies in."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def layer(self) -> dict[str, Any]:
        """What `agreement.layer` takes."""
        return {
            "num_experts": self.num_experts,
            "width": self.width,
            "hidden": self.expert_width,
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
        }


def configure(
    *,
    shape: str = "",
    tokens: str = "",
    backends: str = "torch, native, megablocks",
    repetitions: int = 15,
    seed: int = 0,
    device: str = "",
    threads: int | None = None,
    name: str = "",
) -> KernelsConfig:
    """What a notebook's parameters ask to be measured; empty takes what suits the machine.

    A Refusal, one sentence, for a parameter that is unknown to this call (papermill only
    warns of it), of another type or out of range, or a layer that memory cannot hold.
    """
    launch.refuse_unknown(inspect.signature(configure).parameters)
    own = "cuda" if torch.cuda.is_available() else "cpu"
    place: Device = convert(Device, device or own, "device")
    shape = convert(str, shape, "shape") or SHAPES[place]
    require(shape in recipes.SCALES, "shape", shape, f"one of {', '.join(recipes.SCALES)}")
    recipe = recipes.SCALES[shape]()
    counts = [convert(int, t, "tokens") for t in launch.listed(tokens)]
    threads = convert(int | None, threads, "threads")
    config = KernelsConfig(
        shape=shape,
        width=recipe.model.width,
        expert_width=recipe.model.expert_width,
        num_experts=recipe.model.router.num_experts,
        top_k=recipe.model.router.top_k,
        tokens=tuple(sorted(counts)) or TOKENS[place],
        backends=tuple(convert(Backend, each, "backends") for each in launch.listed(backends)),
        repetitions=repetitions,
        seed=seed,
        device=place,
        threads=recipe.threads if threads is None else threads,
        name=name,
    )
    require_memory(config)
    return config


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))


def require_memory(config: KernelsConfig) -> None:
    """BadValue unless weights, a gradient of them per backend, and the largest batch fit."""
    size = config.dtype.itemsize
    one = config.width * config.expert_width
    rows = max(config.tokens) * config.top_k
    needed = size * 3 * config.num_experts * one * (1 + len(config.backends))
    needed += size * rows * 3 * (config.width + config.expert_width) + 8 * 6 * one
    there, what = memory(config.device)
    if needed > there:
        raise BadValue(
            f"shape {config.shape!r} with {max(config.tokens):,} tokens needs "
            f"{needed / 1e9:,.0f} GB for weights and gradients; this machine has "
            f"{there / 1e9:,.0f} GB of {what}: take a smaller shape, or fewer tokens or "
            "backends."
        )


def describe(config: KernelsConfig) -> str:
    """One line on what is about to be measured."""
    return (
        f"{config.shape}: {config.num_experts} experts of {config.width} x "
        f"{config.expert_width}, top-{config.top_k}, {_listed(config.tokens)} tokens, "
        f"{str(config.dtype).removeprefix('torch.')} on {config.device}, "
        f"{_listed(config.backends)}"
    )
