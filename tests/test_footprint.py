"""Bytes on a rank: against torch.chunk, the optimisers' own count, and what autograd saves."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks

from trinity_lib import activations, footprint, optim, recipes
from trinity_lib.attention import AttentionConfig, Context, context
from trinity_lib.config import BadValue
from trinity_lib.exchange import Exchange
from trinity_lib.experts import use_backend
from trinity_lib.footprint import Memory
from trinity_lib.mesh import ParallelConfig
from trinity_lib.model import Block, ModelConfig, Trinity
from trinity_lib.routing import RouterConfig

LARGE = recipes.large().model
CLUSTER = ParallelConfig(replicate=16, shard=128, experts=8)


def model(experts: int = 6, top_k: int = 2, window: int = 40, **changes: object) -> ModelConfig:
    """Small, every size another number."""
    sizes = {
        "vocab_size": 101,
        "width": 64,
        "num_layers": 4,
        "num_dense_layers": 2,
        "dense_width": 80,
        "expert_width": 48,
        "global_every": 2,
    }
    return ModelConfig(
        **{**sizes, **changes},
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, window=window),
        router=RouterConfig(num_experts=experts, top_k=top_k),
    )


def test_large_on_its_cluster() -> None:
    held = footprint.held(LARGE, CLUSTER)
    assert held.tolist() == [3_114_338_064] * 128
    assert held.sum() == 398_635_272_192


def test_six_experts_over_four_ranks() -> None:
    alone = [
        w.numbers // 6 for w in footprint.weights(model()) if w.of_experts and w.block == 2
    ]
    with_experts = footprint.held(model(), ParallelConfig(shard=4, experts=4))
    without = footprint.held(model(experts=2), ParallelConfig(shard=4, experts=4))
    routers = 2 * 64 * (np.array([2, 2, 2, 0]) - np.array([1, 1, 0, 0]))
    more = with_experts - without - routers
    # 6 over 4 is 2, 2, 2, 0; 2 over 4 is 1, 1, 0, 0; two MoE layers
    assert (more / (2 * sum(alone))).tolist() == [1, 1, 2, 0]


def chunked(config: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Parameters of each rank, by chunking meta tensors as FSDP and `parallel` do."""
    with torch.device("meta"):
        whole = Trinity(config)

    def part(x: torch.Tensor, parts: int, number: int) -> torch.Tensor:
        pieces = x.chunk(parts)
        return pieces[number] if number < len(pieces) else x[:0]

    found = []
    for rank in range(parallel.shard):
        mine = 0
        for name, p in whole.named_parameters():
            if "_EFD" in name:
                p = part(p, parallel.experts, rank % parallel.experts)
                if len(p):
                    p = part(p, parallel.expert_shard, rank // parallel.experts)
                mine += p.numel()
            else:
                mine += part(p, parallel.shard, rank).numel()
        found.append(mine)
    return found


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(2, 13),
    ranks=st.integers(1, 6),
    rest=st.integers(1, 5),
    replicate=st.integers(1, 3),
)
def test_every_rank_holds_what_torch_would_give_it(
    experts: int, ranks: int, rest: int, replicate: int
) -> None:
    config = model(experts=experts)
    parallel = ParallelConfig(replicate=replicate, shard=ranks * rest, experts=ranks)
    held = footprint.held(config, parallel)
    assert held.tolist() == chunked(config, parallel)
    with torch.device("meta"):
        assert held.sum() == sum(p.numel() for p in Trinity(config).parameters())


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_state_is_what_optimisers_make(kind: footprint.Optimizer) -> None:
    config = model()
    whole = Trinity(config)
    built = optim.build(whole, optim.OptimConfig(optimizer=kind))
    for p in whole.parameters():
        p.grad = torch.zeros_like(p)
    state = 0
    for optimizer in built:
        optimizer.step()
        tensors = [x for each in optimizer.state.values() for x in each.values()]
        state += sum(x.nbytes for x in tensors if x.dim() > 0)
    found = footprint.training(
        config, ParallelConfig(), tokens=8, length=8, recompute=False, optimizer=kind
    )
    for memory in found.values():
        assert memory.optimizer == state
        assert memory.weights == memory.gradients == sum(p.nbytes for p in whole.parameters())
    assert (found["step"].stepping > 0) == (kind == "muon")


def half(config: ModelConfig) -> Trinity:
    """With matrices in bf16, as FSDP gathers them; autocast then copies no weight."""
    whole = Trinity(config)
    whole.initialise(torch.Generator().manual_seed(0))
    use_backend(whole, "torch")
    precise = {w.name for w in footprint.weights(config) if w.precise}
    for name, p in whole.named_parameters():
        if name not in precise:
            p.data = p.data.bfloat16()
    return whole


def saved(block: Block, shared: Context, length: int) -> int:
    """Bytes that autograd saves of a block: not its input, its weights and the context."""
    h_BSD = torch.randn(1, length, 64, requires_grad=True)
    tensors: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda t: t):
        block(h_BSD, shared)
    known = [h_BSD, *block.parameters(), *(x for x in shared if x is not None)]
    others = {x.untyped_storage().data_ptr() for x in known}
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in stores.items() if place not in others)


def on_the_cpu(config: ModelConfig, length: int, layer: int) -> int:
    """Bytes a token that a CPU keeps and CUDA does not: norms' results; less: shared heads."""
    queries, shared = 64, 32
    block, window = max(config.attention.window, 32), not config.is_global(layer)
    twice = 2 if window and 2 * block * -(-length // block) * block < length**2 else 1
    return 4 * 4 * config.width + 4 * (queries + shared) - 2 * 2 * twice * (queries - shared)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


CASES = [(model(), 32), (model(window=8), 128), (model(num_shared_experts=0, top_k=3), 32)]


@pytest.mark.parametrize("case", CASES, ids=["rows", "windows in blocks", "no shared experts"])
@pytest.mark.parametrize("exchanged", [False, True], ids=["", "exchanged"])
def test_a_block_keeps_what_autograd_saves(
    case: tuple[ModelConfig, int], exchanged: bool, group: dist.ProcessGroup
) -> None:
    """To the byte, but for where each expert's rows end (an int32 an expert)."""
    config, length = case
    shared = context(torch.zeros(1, length, dtype=torch.int64), config.attention, torch.float32)
    for layer, block in enumerate(half(config).blocks):
        assert isinstance(block, Block)
        experts = 0
        if block.experts is not None:
            block.experts.exchange = Exchange(group, 6) if exchanged else None
            experts = 4 * 6
        ours = activations.kept_by_block(config, layer, length, exchanged)
        ours += on_the_cpu(config, length, layer)
        assert saved(block, shared, length) == length * ours + experts


def test_a_whole_model_keeps_its_blocks_inputs_and_masks() -> None:
    config, length = model(), 32
    blocks = activations.kept_by_blocks(config, length, False)
    kept = activations.kept(config, length, recompute=False, exchanged=False)
    residuals = 4 * 64 * (4 + 1)
    assert kept == sum(blocks) + residuals + (4 + 2 * 64) + 2 * length + 2 * 4 * 16
    less = activations.kept(config, length, recompute=True, exchanged=False)
    assert kept - less == sum(blocks) - 2 * (4 * 6 + 12 * 2)


def sizes(config: ModelConfig, parts: int) -> tuple[list[int], list[int]]:
    """Each block's whole bytes on the first expert rank of so many, and its numbers."""
    with torch.device("meta"):
        whole = Trinity(config)
    gathered, numbers = [], []
    for block in whole.blocks:
        count = size = 0
        for name, p in block.named_parameters():
            share = p.chunk(parts)[0].numel() if "_EFD" in name else p.numel()
            precise = "norm" in name or "router" in name
            size += share * (4 if precise else 2)
            count += share
        gathered.append(size)
        numbers.append(count)
    return gathered, numbers


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_whole_while_a_block_is_computed(tied: bool) -> None:
    config = model(tied=tied)
    found = footprint.training(
        config, ParallelConfig(shard=8, experts=4), tokens=16, length=8, recompute=True
    )
    gathered, numbers = sizes(config, 4)
    table = 101 * 64
    head = 4 * table if tied else 2 * table
    ahead = max(a + b for a, b in itertools.pairwise([*gathered, 0]))
    assert found["block"].gathered == head + ahead
    # bf16 gradients, but of what is gathered in fp32, and all of them in fp32 to be summed
    summed = max(8 * n - g for n, g in zip(numbers, gathered, strict=True))
    assert found["block"].unreduced == head + summed
    assert found["loss"].gathered == head
    assert found["embedding"].gathered == head + (0 if tied else 4 * table)
    assert found["embedding"].unreduced == (8 if tied else 14) * table
    assert found["loss"].logits == 10 * 16 * 101
    assert found["block"].exchange == 2 * 2 * 2 * 64 * 16  # two rows of every choice in flight


def test_one_rank_alone_gathers_nothing() -> None:
    config = model()
    found = footprint.training(config, ParallelConfig(), tokens=16, length=8, recompute=False)
    matrices = [w for w in footprint.weights(config) if w.block >= 0 and not w.precise]
    assert found["block"].gathered == 2 * (sum(w.numbers for w in matrices) + 101 * 64)
    assert found["block"].exchange == 0
    assert found["embedding"].unreduced == found["embedding"].gathered - 2 * 101 * 64 == 0


@pytest.mark.parametrize("scale", recipes.SCALES)
def test_moments_are_sums_and_the_peak_is_one_of_them(scale: str) -> None:
    found = footprint.training(
        recipes.SCALES[scale]().model,
        ParallelConfig(shard=8, experts=4),
        tokens=4096,
        length=4096,
        recompute=True,
    )
    moment, peak = footprint.peak(found)
    assert peak is found[moment] and peak.total == max(sum(m) for m in found.values())
    assert set(found) == {"loss", "block", "embedding", "step"}
    assert all(value >= 0 for memory in found.values() for value in memory)
    assert all(isinstance(value, int) for memory in found.values() for value in memory)


def most(config: ModelConfig, parallel: ParallelConfig, **changes: object) -> Memory:
    """The peak of a run, 64 recomputed tokens at once if nothing else is said."""
    given: dict = {"tokens": 64, "length": 32, "recompute": True, **changes}
    return footprint.peak(footprint.training(config, parallel, **given))[1]


@settings(max_examples=40, deadline=None)
@given(shard=st.integers(2, 60), more=st.integers(1, 60), experts=st.integers(2, 9))
def test_more_shards_never_need_more(shard: int, more: int, experts: int) -> None:
    config = model(experts=experts)
    few, many = (ParallelConfig(shard=n) for n in (shard, shard + more))
    assert most(config, many).total <= most(config, few).total


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 500), more=st.integers(1, 500), recompute=st.booleans())
def test_more_tokens_need_more(tokens: int, more: int, recompute: bool) -> None:
    parallel = ParallelConfig(shard=4, experts=2)
    few, many = (
        footprint.training(model(), parallel, tokens=n, length=32, recompute=recompute)
        for n in (tokens, tokens + more)
    )
    for moment in ("loss", "block"):
        assert many[moment].total > few[moment].total


@pytest.mark.parametrize("scale", recipes.SCALES)
def test_recomputing_saves_memory(scale: str) -> None:
    config = recipes.SCALES[scale]().model
    parallel = ParallelConfig(shard=8, experts=2)
    short, long = (
        most(config, parallel, recompute=flag, tokens=4096, length=4096)
        for flag in (True, False)
    )
    assert short.total < long.total


@pytest.mark.parametrize("field", ["tokens", "length"])
def test_bad_values_are_named(field: str) -> None:
    given: dict = {"tokens": 8, "length": 8, "recompute": True, field: 0}
    with pytest.raises(BadValue, match=f"{field} is 0; it must be at least 1"):
        footprint.training(model(), ParallelConfig(), **given)


def test_weights_are_those_of_the_model() -> None:
    config = dataclasses.replace(model(), tied=True)
    with torch.device("meta"):
        whole = Trinity(config)
    found = footprint.weights(config)
    assert [(w.name, w.shape) for w in found] == [
        (name, tuple(p.shape)) for name, p in whole.named_parameters()
    ]
    assert {w.block for w in found} == {-1, 0, 1, 2, 3}
