"""Who holds what: against torch.chunk, by brute force, and on live ranks."""

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests import distributed
from trinity_lib import disk
from trinity_lib.config import BadValue
from trinity_lib.mesh import Layout, ParallelConfig, Span, chunk, joined


@settings(deadline=None)
@given(st.integers(0, 70), st.integers(1, 12))
def test_chunks_are_torchs(total: int, parts: int) -> None:
    cut = list(torch.arange(total).chunk(parts)) if total else []
    cut += [torch.zeros(0)] * (parts - len(cut))
    for part, rows in enumerate(cut):
        span = chunk(total, parts, part)
        assert span.count == len(rows)
        assert not span.count or span.first == int(rows[0])
    assert sum(chunk(total, parts, part).count for part in range(parts)) == total


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"replicate": 0}, "replicate is 0; it must be at least 1"),
        ({"shard": 0}, "shard is 0; it must be at least 1"),
        ({"shard": 2**21}, "shard is 2097152; it must be .* at most 1,048,576"),
        ({"experts": -1}, "experts is -1; it must be at least 1"),
        ({"shard": 6, "experts": 4}, r"experts is 4; it must be a divisor of shard \(6\)"),
        ({"experts": 2}, r"experts is 2; it must be a divisor of shard \(1\)"),
        ({"shard": "two"}, "shard is 'two'"),
    ],
)
def test_bad_layouts(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        ParallelConfig(**changes)


def test_ranks_follow_from_the_layout() -> None:
    config = ParallelConfig(replicate=3, shard=8, experts=2)
    assert (config.ranks, config.expert_shard) == (24, 4)
    assert ParallelConfig().ranks == 1


@pytest.mark.parametrize(
    ("world", "config", "started"),
    [
        ("2", ParallelConfig(), 1),
        ("1", ParallelConfig(shard=2), 2),
        ("4", ParallelConfig(replicate=2), 2),
    ],
)
def test_ranks_that_do_not_match_the_processes_are_refused(
    monkeypatch: pytest.MonkeyPatch, world: str, config: ParallelConfig, started: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    sentence = f"replicate x shard is {started}; it must be {world}, the processes that were"
    with pytest.raises(BadValue, match=sentence), joined(config, "cpu"):
        pass
    assert not dist.is_initialized()


def test_one_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(ParallelConfig(), "cpu") as layout:
        assert layout is None and not dist.is_initialized()


@pytest.fixture
def pretended() -> Iterator[Any]:
    """Layouts as a rank of any number sees them; no process answers."""

    def layout(config: ParallelConfig, rank: int) -> Layout:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=config.ranks)
        return Layout(config, "cpu")

    yield layout
    if dist.is_initialized():
        dist.destroy_process_group()


CONFIGS = [
    ParallelConfig(),
    ParallelConfig(replicate=3),
    ParallelConfig(shard=4),
    ParallelConfig(replicate=2, shard=4, experts=2),
    ParallelConfig(shard=6, experts=3),
    ParallelConfig(replicate=2, shard=6, experts=6),
    ParallelConfig(shard=12, experts=3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_row_has_one_holder_in_every_replica(
    pretended: Any, config: ParallelConfig
) -> None:
    layouts = [pretended(config, rank) for rank in range(config.ranks)]
    for total in (1, 2, 3, 5, 7, 8, 12, 13, 31):
        for first in range(0, config.ranks, config.shard):
            replica = range(first, first + config.shard)
            rows: list[int] = []
            held: dict[int, int] = {}
            for rank in replica:
                span = layouts[rank].rows(total)
                rows += range(span.first, span.first + span.count)
                mine, kept = layouts[rank].experts(total), layouts[rank].held_experts(total)
                for expert in range(kept.first, kept.first + kept.count):
                    assert mine.first <= expert < mine.first + mine.count
                    assert expert not in held
                    held[expert] = rank
            assert rows == list(range(total))
            assert sorted(held) == list(range(total))
            asking = layouts[first]  # any rank can tell
            for near, expert in itertools.product(replica, range(total)):
                assert asking.holder(expert, total, near) == held[expert]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_groups_are_those_ranks_that_share(pretended: Any, config: ParallelConfig) -> None:
    """Ranks that exchange tokens are neighbours, and hold all experts between them."""
    c = config
    for rank in range(c.ranks):
        layout = pretended(c, rank)

        def group(mesh: Any, name: str) -> list[int]:
            return dist.get_process_group_ranks(mesh.get_group(name))

        first, within = rank // c.shard * c.shard, rank % c.shard
        assert group(layout.dense, "shard") == list(range(first, first + c.shard))
        same = list(range(within, c.ranks, c.shard))
        assert group(layout.dense, "replicate") == same
        assert group(layout.expert, "replicate") == same
        swap = rank // c.experts * c.experts
        assert group(layout.expert, "experts") == list(range(swap, swap + c.experts))
        alike = list(range(first + rank % c.experts, first + c.shard, c.experts))
        assert group(layout.expert, "expert_shard") == alike


def test_a_layout_of_another_size_than_the_group_is_refused(pretended: Any) -> None:
    pretended(ParallelConfig(shard=4), 0)
    with pytest.raises(BadValue, match="replicate x shard is 2; it must be 4, the processes"):
        Layout(ParallelConfig(shard=2), "cpu")


def conversation(folder: Path) -> dict[str, Any]:
    with joined(ParallelConfig(replicate=2, shard=2, experts=2), "cpu") as layout:
        assert layout is not None
        counts = torch.tensor([2**60 + layout.rank, layout.rank])  # no float64 holds it
        found: dict[str, Any] = {
            "sum": layout.sum(counts).tolist(),
            "in place": counts.tolist(),
            "shared": layout.shared({"from": layout.rank}),
            "gathered": layout.gathered([layout.rank, "x" * layout.rank]),
            "experts": layout.experts(5),
        }

        def write(temporary: Path) -> None:
            found["hidden"] = temporary.name.startswith(".")
            (temporary / f"rank-{layout.rank}").write_text("new")

        layout.replace_folder(folder, write)
        found["files"] = sorted(path.name for path in folder.iterdir())
        with layout.leaders_first():
            time.sleep(0.05 * (layout.rank == 0))
            found["first"] = (folder / "made").exists()
            (folder / "made").touch()
    assert not dist.is_initialized()
    return found


def test_ranks_talk(tmp_path: Path) -> None:
    folder = tmp_path / "together"
    disk.new_folder(folder)
    (folder / "old").touch()
    results = distributed.run(conversation, 4, folder)
    for rank, found in enumerate(results):
        assert found["sum"] == found["in place"] == [4 * 2**60 + 6, 6]
        assert found["shared"] == {"from": 0}
        assert found["gathered"] == [[0, ""], [1, "x"], [2, "xx"], [3, "xxx"]]
        assert found["experts"] == [Span(0, 3), Span(3, 2)][rank % 2]
        assert found["hidden"]
        assert found["files"] == [f"rank-{r}" for r in range(4)]
        assert found["first"] is (rank > 0)  # only LOCAL_RANK 0 finds nothing done
    assert [path.name for path in tmp_path.iterdir()] == ["together"]


def refused() -> str:
    with pytest.raises(BadValue) as error, joined(ParallelConfig(shard=4), "cpu"):
        pass
    return str(error.value)


def test_under_torchrun_every_rank_says_what_does_not_match() -> None:
    sentences = distributed.run(refused, 2)
    right = "it must be 2, the processes that were started (torchrun)."
    assert sentences == [f"replicate x shard is 4; {right}"] * 2


def fails(rank: str) -> None:
    import os

    with joined(ParallelConfig(shard=2), "cpu") as layout:
        assert layout is not None
        if os.environ["RANK"] == rank:
            raise ValueError(f"what rank {rank} has to say")
        layout.sum(torch.ones(1))


def warns() -> None:
    import warnings

    warnings.warn("a warning is an error", stacklevel=1)


def test_what_ranks_raise_is_shown() -> None:
    """The harness of these tests: the rank that failed first, before those that missed it."""
    with pytest.raises(pytest.fail.Exception) as error:
        distributed.run(fails, 2, "1")
    first, _, second = str(error.value).partition("rank 0\n")
    assert "ValueError: what rank 1 has to say" in first and "closed by peer" in second
    with pytest.raises(pytest.fail.Exception, match="UserWarning: a warning is an error"):
        distributed.run(warns, 1)
