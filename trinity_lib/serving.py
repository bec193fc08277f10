"""Inference before anything is loaded: bytes of weights and KV cache, and speed at most.

Speeds are bounds of memory traffic for one sequence (batch 1): every weight that a token
uses is read once, and every key and value it sees. No decoder is faster; few reach half.
"""

import functools
import math
from typing import NamedTuple

from trinity_lib.config import require
from trinity_lib.gpus import GPU
from trinity_lib.model import ModelConfig, count_parameters

PRECISIONS = {"bf16": 16.0, "fp8": 8.0, "4-bit": 4.5, "3-bit": 3.5, "2-bit": 2.5}
"""Bits a weight, scales included: blocks of 16 to 32 weights with a scale of 8 to 16 bits."""
CACHE_BYTES = 2
"""Bytes of a cached number: bf16, at every precision of the weights."""
HEADROOM = 0.1
"""Share of a GPU's memory left to the CUDA context, communication and fragmentation."""
DESKTOP, SERVER = 80e9, 400e9
"""Bytes per second at which a host reads its own memory, as assumed: two channels of
DDR5-5600 (89.6e9 on paper), twelve of DDR5-4800 (460.8e9)."""
FETCHED = 0.8
"""Share of PCIe's rate that copies reach, as assumed."""


def weight_bytes(parameters: float, bits: float) -> float:
    """Bytes of parameters stored at `bits` each."""
    require(bits > 0, "bits", bits, "above zero")
    return parameters * bits / 8


def cache_bytes(
    config: ModelConfig, context: int, *, batch: int = 1, windows: bool = True
) -> int:
    """Bytes of keys and values of `batch` sequences of `context` tokens, bf16.

    With `windows` a sliding layer keeps its window alone (`Trinity.cache` does); without, all
    layers keep everything, as servers do that hold every layer in the same blocks.
    """
    require(context >= 0, "context", context, "zero or more")
    require(batch >= 0, "batch", batch, "zero or more")
    heads = config.attention
    slots = sum(
        min(context, heads.window) if windows and not config.is_global(i) else context
        for i in range(config.num_layers)
    )
    return batch * slots * 2 * heads.num_kv_heads * heads.head_dim * CACHE_BYTES


def usable(gpu: GPU, headroom: float = HEADROOM) -> float:
    """Bytes of a GPU that weights, cache and activations may take."""
    require(0 <= headroom < 1, "headroom", headroom, "from 0 up to 1")
    return gpu.memory * (1 - headroom)


def least_gpus(config: ModelConfig, gpu: GPU, bits: float, context: int, batch: int = 1) -> int:
    """GPUs over which weights and cache fit, evenly divided."""
    stored = weight_bytes(counted(config).total, bits)
    stored += cache_bytes(config, context, batch=batch)
    return max(1, math.ceil(stored / usable(gpu)))


def bits_that_fit(config: ModelConfig, gpu: GPU, headroom: float = 0.0) -> float:
    """Bits a weight at which all of them fit one GPU, beside no cache at all."""
    return 8 * usable(gpu, headroom) / counted(config).total


def decoding(config: ModelConfig, gpu: GPU, bits: float, context: int, gpus: int = 1) -> float:
    """Tokens per second of one sequence at most, its weights divided over `gpus`.

    A token reads the active weights with the head, a row of the embedding, and the cache.
    """
    active = counted(config).active_with_head
    read = weight_bytes(active, bits) + cache_bytes(config, context)
    return gpus * gpu.bandwidth / read


def distinct_experts(config: ModelConfig, batch: int) -> float:
    """Experts of a layer that `batch` tokens use, expected if routing were uniform."""
    experts, chosen = config.router.num_experts, config.router.top_k
    return experts * (1 - (1 - chosen / experts) ** batch)


def read_parameters(config: ModelConfig, batch: int) -> float:
    """Parameters that one step of decoding `batch` sequences reads, uniform routing assumed."""
    more = distinct_experts(config, batch) - config.router.top_k
    return counted(config).active_with_head + more * expert(config)


class Offload(NamedTuple):
    """Decoding with routed experts in the host's memory, one sequence."""

    resident: float
    """Bytes that must stay on the GPU: all that is no routed expert, and the cache."""
    experts: float
    """Bytes of all routed experts."""
    cached: float
    """Share of them for which the GPU has room left, 0 to 1; below 0 not even the rest fits."""
    read: float
    """Bytes of experts that a token takes from the host, uniform use of experts assumed."""
    host_bound: float
    """Tokens per second if the host's bandwidth were all that takes time and no expert were
    cached."""
    tokens_per_second: float
    """At most: host and GPU one after the other, as a layer's experts wait for its router;
    0 where what is resident does not fit."""


def hosts(gpu: GPU) -> dict[str, float]:
    """Ways to use experts in host memory, and the bytes per second at which they are read."""
    return {
        "fetched over PCIe": FETCHED * gpu.host,
        "computed on a desktop": DESKTOP,
        "computed on a server": SERVER,
    }


def offload(
    config: ModelConfig, gpu: GPU, bits: float, context: int, host_bandwidth: float,
    resident_bits: float = 16.0,
) -> Offload:  # fmt: skip
    """What one GPU and a host's memory can do; the rest of the model at `resident_bits`."""
    require(host_bandwidth > 0, "host_bandwidth", host_bandwidth, "above zero")
    counts = counted(config)
    chosen = config.router.top_k * expert(config)
    routed = config.router.num_experts * expert(config)
    cache = cache_bytes(config, context)
    resident = weight_bytes(counts.total - routed, resident_bits) + cache
    stored, active = weight_bytes(routed, bits), weight_bytes(chosen, bits)
    room = usable(gpu) - resident
    cached = min(1.0, room / stored) if stored else 1.0
    share = max(0.0, cached)
    on_gpu = weight_bytes(counts.active_with_head - chosen, resident_bits) + cache
    seconds = (on_gpu + share * active) / gpu.bandwidth + (1 - share) * active / host_bandwidth
    return Offload(
        resident=resident,
        experts=stored,
        cached=cached,
        read=(1 - share) * active,
        host_bound=host_bandwidth / active if active else math.inf,
        tokens_per_second=0.0 if room < 0 else 1 / seconds,
    )


def expert(config: ModelConfig) -> int:
    """Parameters of one expert of every MoE layer, so of one of a token's choices."""
    return len(config.moe_layers) * 3 * config.width * config.expert_width


counted = functools.lru_cache(maxsize=64)(count_parameters)
"""`count_parameters`, once for each model."""
