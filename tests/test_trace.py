"""One step traced: against the plan, against torch's own tracker, and leaving no trace."""

import dataclasses
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

from trinity_lib import footprint, native, operators, recipes, trace
from trinity_lib.config import BadValue, override
from trinity_lib.ledger import Collective, Ledger
from trinity_lib.mesh import ParallelConfig
from trinity_lib.run import RunConfig
from trinity_lib.trace import Trace


def tiny(parallel: ParallelConfig, times: int = 2, **changes: Any) -> RunConfig:
    """Two layers, one row in a micro-batch, `times` micro-batches a rank."""
    config = recipes.toy()
    batch = parallel.ranks * times
    phases = tuple(dataclasses.replace(phase, batch=batch) for phase in config.phases)
    changes = {"model.num_layers": 2, **changes}
    return override(
        config, {"parallel": parallel, "micro_batches": batch, "phases": phases, **changes}
    )


def traced(config: RunConfig) -> Trace:
    with trace.pretended(config.parallel) as layout:
        return trace.step(config, trace.shard(config, layout), 1, lambda line: None)


def planned(config: RunConfig) -> dict[Any, footprint.Memory]:
    length = config.data.sequence_length
    return footprint.training(
        config.model, config.parallel, tokens=length, length=length, recompute=config.recompute
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("layout", [(1, 2, 1), (1, 2, 2), (2, 4, 2), (1, 3, 3)])
def test_memory_is_about_what_is_planned(layout: tuple[int, int, int], recompute: bool) -> None:
    parallel = ParallelConfig(replicate=layout[0], shard=layout[1], experts=layout[2])
    config = tiny(parallel, recompute=recompute)
    found, expected = traced(config).memory, planned(config)
    for moment in ("loss", "block"):
        assert found[moment].total == pytest.approx(expected[moment].total, rel=0.15)
    for part in ("weights", "gradients", "optimizer"):
        here, there = (getattr(each["loss"], part) for each in (found, expected))
        # padding, and the counters of AdamW's steps, are not planned
        assert here == pytest.approx(there, rel=0.02)


def test_activations_are_kept_as_planned() -> None:
    config = tiny(ParallelConfig(shard=2), **{"balance.method": "none", "model.num_layers": 4})
    found, expected = traced(config).memory["loss"], planned(config)["loss"]
    assert found.kept == pytest.approx(expected.kept, rel=0.01)
    assert found.logits == expected.logits


def test_one_micro_batch_has_no_gradients_before_backward() -> None:
    memory = traced(tiny(ParallelConfig(replicate=2, shard=2), times=1)).memory
    assert memory["loss"].gradients == 0
    assert memory["embedding"].gradients > 0.8 * memory["loss"].weights


def test_collectives_are_those_of_the_layout() -> None:
    parallel = ParallelConfig(replicate=2, shard=4, experts=2)
    few, more = (traced(tiny(parallel, times=times)).traffic for times in (2, 3))
    weights = 4 * footprint.held(tiny(parallel).model, parallel).max()
    replicas = Collective("all-reduce", 2)
    assert few[replicas].bytes == more[replicas].bytes == weights  # once a step
    exchange = Collective("all-to-all", 2)
    # one MoE layer, there and back, forward and backward
    assert (few[exchange].calls, more[exchange].calls) == (2 * 4, 3 * 4)
    rows = 128 * 4 * 64 * 2
    assert few[exchange].bytes == 8 * rows
    assert few[exchange].sent == few[exchange].bytes // 2  # half stay
    assert few[Collective("all-reduce", 8)].calls == 3  # counts, losses, gradient norm


def test_operations_are_counted_by_torch_formulas() -> None:
    config = tiny(ParallelConfig(shard=2, experts=2))
    flops = traced(config).flops
    tokens, width, hidden, chosen = 128, 64, 32, 4
    assert flops["forward", "experts"] == tokens * chosen * 3 * 2 * width * hidden
    for name in ("experts", "products"):
        assert flops["backward", name] == 2 * flops["forward", name]
    assert flops["step", "products"] > 0


def test_the_optimisers_products_are_those_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not this machine, which only pretends, has the C++ operator for Muon."""
    config = tiny(ParallelConfig(shard=2))
    here = traced(config).flops["step", "products"]
    monkeypatch.setattr(native, "missing", lambda: "it is left out")
    assert here == traced(config).flops["step", "products"] > 0


@pytest.mark.parametrize("method", ["smebu", "hash", "quantile", "global", "expert_choice"])
def test_a_balancer_that_looks_at_values_is_left_out(method: str) -> None:
    found = traced(tiny(ParallelConfig(shard=2), **{"balance.method": method}))
    assert found.balance == ("none" if method in ("global", "expert_choice") else method)


def test_torch_tracks_the_same_peak() -> None:
    """Of forward and backward, as the CPU would compute them: no guise, no workspaces."""
    config = tiny(ParallelConfig(replicate=2, shard=2, experts=2))
    tokens = torch.zeros(1, 128, dtype=torch.int64)

    def run(tracker: Any) -> Any:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with trace.pretended(config.parallel) as layout:
            whole = trace.shard(config, layout)
            with mode:
                sharded = trace.faked(whole)
                tracker = tracker(sharded)
                with tracker:
                    with torch.autocast("cpu", torch.bfloat16):
                        logits = sharded.model(mode.from_tensor(tokens)).logits
                    logits.float().logsumexp(-1).sum().backward()
        return tracker

    def ledger(sharded: Any) -> Ledger:
        made = Ledger({}, {}, lambda line: None)
        made.enter_all(sharded.weights.values(), "weights")
        made.enter_all(sharded.model.buffers(), "weights")
        return made

    ours, theirs = run(ledger), run(lambda sharded: FSDPMemTracker(sharded.model))
    (device,) = theirs.get_tracker_snapshot("peak").values()
    assert sum(ours.peak(0, ours.now).values()) == pytest.approx(device["Total"], rel=0.01)


def test_nothing_is_left_behind() -> None:
    resize, state = torch.UntypedStorage.resize_, torch.get_rng_state()
    traced(tiny(ParallelConfig(shard=2)))
    assert not dist.is_initialized()
    assert torch.UntypedStorage.resize_ is resize
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.empty(1).is_cuda
    assert torch.nn.functional.rms_norm(torch.ones(2), (2,)).tolist() == pytest.approx([1, 1])


def test_a_rank_does_not_rehearse() -> None:
    parallel = ParallelConfig(shard=2)
    with (
        trace.pretended(parallel),
        pytest.raises(BadValue, match="a rank already"),
        trace.pretended(parallel),
    ):
        pass
    assert not dist.is_initialized()


def test_moments_and_parts_are_the_plans() -> None:
    assert set(get_args(footprint.Moment)) == set(trace.MOMENTS) - {"forward"}
    assert set(operators.KINDS.values()) | {"products"} == set(trace.OPERATORS)
