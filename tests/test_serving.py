"""Inference: cache against the model's own, GPUs, bounds, offload."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_lib import gpus, recipes, serving
from trinity_lib.config import BadValue
from trinity_lib.model import Trinity

LARGE, TOY = recipes.large().model, recipes.toy().model
B300, CARD = gpus.find("B300"), gpus.find("L40S")


def test_weights_of_large() -> None:
    total = serving.counted(LARGE).total
    assert serving.weight_bytes(total, 16) == 797_270_544_384 == 2 * 398_635_272_192
    assert serving.weight_bytes(total, 4.5) == pytest.approx(224.2e9, rel=1e-3)


def test_cache_of_large() -> None:
    """240 KiB a token where every layer keeps everything; windows of 4,096 in 45 of 60."""
    assert serving.cache_bytes(LARGE, 1, windows=False) == 240 * 1024
    assert serving.cache_bytes(LARGE, 4096) == 4096 * 240 * 1024
    token = 2 * 8 * 128 * 2
    long = serving.cache_bytes(LARGE, 131_072, batch=3)
    assert long == 3 * token * (15 * 131_072 + 45 * 4096)


@pytest.mark.parametrize("room", [1, 20, 32, 33, 100])
def test_the_cache_is_the_models(room: int) -> None:
    with torch.device("meta"):
        model = Trinity(TOY).bfloat16()
        cache = model.cache(torch.zeros(2, dtype=torch.int64), room)
    held = sum(
        x.nbytes for memory in cache.memories for x in (memory.keys_BHPC, memory.values_BHPC)
    )
    assert serving.cache_bytes(TOY, room, batch=2) == held


@pytest.mark.parametrize(
    ("gpu", "bits", "count"),
    [
        ("H100", 16, 12),
        ("H200", 8, 4),
        ("B300", 4.5, 1),
        ("L40S", 4.5, 6),
        ("RTX 4090", 16, 38),
    ],
)
def test_fewest_gpus_of_large(gpu: str, bits: float, count: int) -> None:
    kind = gpus.find(gpu)
    assert serving.least_gpus(LARGE, kind, bits, 32_768) == count
    stored = 398_635_272_192 * bits / 8 + serving.cache_bytes(LARGE, 32_768)
    assert (count - 1) * 0.9 * kind.memory < stored <= count * 0.9 * kind.memory


@settings(max_examples=40)
@given(bits=st.floats(0.5, 32), context=st.integers(1, 10**6), batch=st.integers(1, 64))
def test_more_to_store_never_needs_fewer(bits: float, context: int, batch: int) -> None:
    count = serving.least_gpus(LARGE, B300, bits, context, batch)
    assert serving.least_gpus(LARGE, B300, bits + 1, context, batch) >= count
    assert serving.least_gpus(LARGE, B300, bits, context + 1000, batch) >= count
    assert serving.least_gpus(LARGE, B300, bits, context, batch + 1) >= count


def test_bits_on_one_48_gb_gpu() -> None:
    bits = serving.bits_that_fit(LARGE, CARD)
    assert bits == pytest.approx(0.96, abs=0.005)
    assert serving.weight_bytes(serving.counted(LARGE).total, bits) == pytest.approx(48e9)


def test_one_sequence_is_bound_by_what_it_reads() -> None:
    read = 2 * 12_756_682_752 + serving.cache_bytes(LARGE, 1000)
    assert serving.decoding(LARGE, B300, 16, 1000) == pytest.approx(8e12 / read)
    four = serving.decoding(LARGE, B300, 16, 1000, gpus=4)
    assert four == pytest.approx(4 * serving.decoding(LARGE, B300, 16, 1000))


def test_experts_that_a_batch_uses() -> None:
    assert serving.distinct_experts(LARGE, 1) == 4
    for batch, distinct in ((8, 30.3), (64, 162.6), (256, 251.5)):
        assert serving.distinct_experts(LARGE, batch) == pytest.approx(distinct, abs=0.05)
    assert serving.read_parameters(LARGE, 1) == serving.counted(LARGE).active_with_head
    embedding = LARGE.vocab_size * LARGE.width
    whole = serving.counted(LARGE).total - embedding
    assert serving.read_parameters(LARGE, 10_000) == pytest.approx(whole)


def test_experts_in_host_memory() -> None:
    """6.12B routed parameters a token: at 4.25 bits 24.6 tokens/s from 80 GB/s."""
    assert 4 * serving.expert(LARGE) == pytest.approx(6.12e9, rel=2e-3)
    for bandwidth, bound in ((80e9, 24.6), (400e9, 123.0), (50e9, 15.4)):
        found = serving.offload(LARGE, CARD, 4.25, 8192, bandwidth)
        assert found.host_bound == pytest.approx(bound, rel=0.005)
    assert found.experts == pytest.approx(208e9, rel=0.001)
    rest = serving.counted(LARGE).total - 256 * serving.expert(LARGE)
    assert found.resident == 2 * rest + serving.cache_bytes(LARGE, 8192)


def test_offload_adds_what_waits_for_one_another() -> None:
    found = serving.offload(LARGE, CARD, 4.5, 1000, 80e9)
    room = 0.9 * 48e9 - found.resident
    assert found.cached == pytest.approx(room / found.experts)
    active = 4 * serving.expert(LARGE) * 4.5 / 8
    assert found.read == pytest.approx(active * (1 - found.cached))
    others = 2 * (serving.counted(LARGE).active_with_head - 4 * serving.expert(LARGE))
    on_gpu = others + serving.cache_bytes(LARGE, 1000) + found.cached * active
    seconds = on_gpu / 864e9 + found.read / 80e9
    assert found.tokens_per_second == pytest.approx(1 / seconds)


def test_offload_where_nothing_fits_and_where_everything_does() -> None:
    small = dataclasses.replace(CARD, memory=10 * gpus.GB)
    nothing = serving.offload(LARGE, small, 4.5, 1000, 80e9)
    assert nothing.tokens_per_second == 0 and nothing.cached < 0
    everything = serving.offload(TOY, CARD, 16, 100, 80e9)
    assert everything.cached == 1 and everything.read == 0
    assert everything.tokens_per_second == pytest.approx(serving.decoding(TOY, CARD, 16, 100))
    dense = dataclasses.replace(TOY, num_dense_layers=4)
    assert math.isinf(serving.offload(dense, CARD, 16, 100, 80e9).host_bound)


@settings(max_examples=40)
@given(bits=st.floats(1, 16), bandwidth=st.floats(1e9, 1e12))
def test_offload_stays_under_its_bounds(bits: float, bandwidth: float) -> None:
    found = serving.offload(LARGE, CARD, bits, 1000, bandwidth)
    assert found.tokens_per_second <= bandwidth / found.read * (1 + 1e-9)
    faster = serving.offload(LARGE, CARD, bits, 1000, 2 * bandwidth)
    assert found.tokens_per_second < faster.tokens_per_second


def test_hosts_are_read_at_their_own_rate() -> None:
    fetched, desktop, server = serving.hosts(CARD).values()
    assert fetched < 32e9 < desktop < 89.6e9 < server < 460.8e9


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: serving.weight_bytes(10, 0), "bits is 0; it must be above zero"),
        (lambda: serving.cache_bytes(TOY, -1), "context is -1; it must be zero or more"),
        (lambda: serving.cache_bytes(TOY, 1, batch=-2), "batch is -2; it must be zero or more"),
        (lambda: serving.usable(CARD, 1), "headroom is 1; it must be from 0 up to 1"),
        (
            lambda: serving.offload(TOY, CARD, 4, 10, 0),
            "host_bandwidth is 0; it must be above zero",
        ),
    ],
)
def test_bad_values_are_named(call, sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        call()
