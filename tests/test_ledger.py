"""Bytes alive, FLOP and traffic of operators that can be counted by hand."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from trinity_lib import ledger as module
from trinity_lib.ledger import Collective, Ledger, Traffic

ATEN = torch.ops.aten


@pytest.fixture(params=["real", "fake"])
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """An active one, over tensors with values or without."""
    made = Ledger({}, {}, lambda line: None)
    made.default = "working"
    if request.param == "real":
        with made:
            yield made
        return
    with FakeTensorMode(), made:
        yield made


def alive(ledger: Ledger) -> dict[str, int]:
    """What is alive now, by kind, without what is not."""
    found = ledger.peak(ledger.now, ledger.now)
    return {kind: size for kind, size in found.items() if size}


def test_what_lives_and_dies(ledger: Ledger) -> None:
    a = torch.empty(10)  # 40 bytes
    first = ledger.now
    b = torch.empty(5, dtype=torch.float64)  # 40
    c = torch.empty(3, dtype=torch.bfloat16)  # 6
    assert alive(ledger) == {"working": 86}
    del b
    assert alive(ledger) == {"working": 46}
    del a, c
    assert alive(ledger) == {}
    assert ledger.peak(0, ledger.now) == {"working": 86}
    assert ledger.peak(0, first) == {"working": 40}


def test_views_and_changes_in_place_take_no_memory(ledger: Ledger) -> None:
    a = torch.empty(4, 6)
    views = [a[1:], a.T, a.view(24), a.detach()]
    a.add_(1)
    del a
    assert alive(ledger) == {"working": 96}
    while views:
        assert alive(ledger) == {"working": 96}
        views.pop()
    assert alive(ledger) == {}


def test_kinds_are_given_and_changed(ledger: Ledger) -> None:
    a, b, c = (torch.empty(size) for size in (1, 2, 3))
    ledger.enter(a, "weights")
    ledger.enter_all([b, None, 3.0], "gradients")
    assert alive(ledger) == {"weights": 4, "gradients": 8, "working": 12}
    ledger.enter(b[:1])  # known, and of no other kind
    ledger.default = "later"
    d = torch.empty(4)
    ledger.rename(("working", "gradients"), "kept")
    assert alive(ledger) == {"weights": 4, "kept": 20, "later": 16}
    del a, b, c, d
    assert alive(ledger) == {}


def test_the_dead_keep_the_kind_they_had(ledger: Ledger) -> None:
    a = torch.empty(10)
    last = ledger.now
    del a
    b = torch.empty(1)
    ledger.rename(("working",), "kept")
    assert ledger.peak(0, last) == {"working": 40}
    assert alive(ledger) == {"kept": 4}
    del b


def test_the_peak_between_two_moments_counts_what_was_there(ledger: Ledger) -> None:
    a = torch.empty(100)
    del a
    b = torch.empty(5)
    begin = ledger.now
    c = torch.empty(7)
    ledger.enter(c, "other")
    del c
    d = torch.empty(2)
    end = ledger.now
    assert ledger.peak(begin, end) == {"working": 20, "other": 28}
    assert ledger.peak(0, end) == {"working": 400}
    assert sum(ledger.peak(end, end).values()) == 28
    del b, d


def test_storages_that_are_resized(ledger: Ledger) -> None:
    """As FSDP frees and fills again what it has gathered."""
    a = torch.empty(10)
    full = ledger.now
    a.untyped_storage().resize_(0)
    assert alive(ledger) == {}
    a.untyped_storage().resize_(80)
    a.untyped_storage().resize_(80)
    assert alive(ledger) == {"working": 80}
    assert ledger.peak(0, full) == {"working": 40}
    del a
    assert alive(ledger) == {}


def test_a_resized_storage_that_is_not_known_is_left_alone() -> None:
    resize, unknown = torch.UntypedStorage.resize_, torch.empty(10)
    with Ledger({}, {}, lambda line: None) as ledger:
        unknown.untyped_storage().resize_(80)
        assert ledger.now == 0
    assert torch.UntypedStorage.resize_ is resize


def test_flop_by_phase_and_operator(ledger: Ledger) -> None:
    a, b = torch.empty(3, 5), torch.empty(5, 7)
    ledger.phase = "forward"
    a @ b
    a @ b
    ledger.phase = "backward"
    torch.bmm(a.expand(2, 3, 5), b.expand(2, 5, 7))
    a + a
    assert ledger.flops == {
        ("forward", ATEN.mm): 2 * 2 * 3 * 5 * 7,
        ("backward", ATEN.bmm): 2 * 2 * 3 * 5 * 7,
    }


def test_formulas_workspaces_and_rules_are_asked() -> None:
    called = []
    ledger = Ledger(
        {ATEN.add: lambda a, b, out_val, **_: 10 * a.numel() + out_val.numel()},
        {ATEN.add: lambda a, b: 8 * a.numel()},
        lambda line: None,
    )
    ledger.default = "working"
    ledger.rules = {ATEN.add: lambda result, a, b: called.append((result, a, b))}
    with ledger:
        a, b = torch.ones(3), torch.ones(3)
        before = ledger.now
        c = a + b
    ((result, left, right),) = called
    assert result is c and left is a and right is b
    assert ledger.flops == {("", ATEN.add): 33}
    # its workspace is gone before its result is there
    assert ledger.peak(before + 1, ledger.now) == {"working": 24 + 24}
    assert alive(ledger) == {"working": 36}


def test_fake_tensors_of_another_mode_are_not_entered() -> None:
    with FakeTensorMode(), Ledger({}, {}, lambda line: None) as ledger:
        torch.empty(4)
        operators, now = ledger.operators, ledger.now
        with FakeTensorMode():
            torch.empty(4) @ torch.empty(4)
        assert (ledger.operators, ledger.now) == (operators, now)
    assert operators == 1


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Rank 0 of four, whom nobody answers."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def collect(group: dist.ProcessGroup) -> dict[str, Any]:
    """Of 12 fp32 numbers in all each."""
    twelve, three = torch.zeros(12), torch.zeros(3)
    return {
        "all-gather": lambda: group._allgather_base(twelve, three),
        "reduce-scatter": lambda: group._reduce_scatter_base(three, twelve),
        "all-reduce": lambda: dist.all_reduce(twelve, group=group),
        "all-to-all": lambda: dist.all_to_all_single(twelve, twelve.clone(), group=group),
    }


SENT = {"all-gather": 36, "reduce-scatter": 36, "all-reduce": 72, "all-to-all": 36}
"""Of 48 bytes over four ranks: three quarters, and for an all-reduce twice that."""


@pytest.mark.parametrize("kind", SENT)
def test_what_collectives_move(kind: str, group: dist.ProcessGroup) -> None:
    move = collect(group)[kind]
    with Ledger({}, {}, lambda line: None) as ledger:
        ledger.phase = "forward"
        move()
        move()
        ledger.phase = "step"
        move()
    collective, sent = Collective(kind, 4), SENT[kind]
    assert ledger.traffic == {
        ("forward", collective): Traffic(2, 96, 2 * sent),
        ("step", collective): Traffic(1, 48, sent),
    }


def test_uneven_exchanges_send_all_but_their_own(group: dist.ProcessGroup) -> None:
    given, taken = torch.zeros(10, 2), torch.zeros(6, 2)
    with Ledger({}, {}, lambda line: None) as ledger:
        dist.all_to_all_single(taken, given, [2, 2, 1, 1], [1, 4, 5, 0], group=group)
        dist.all_to_all_single(given, taken, [1, 4, 5, 0], [2, 2, 1, 1], group=group)
        nothing = torch.zeros(0, 2)
        dist.all_to_all_single(nothing, nothing.clone(), [0] * 4, [0] * 4, group=group)
    moved = ledger.traffic["", Collective("all-to-all", 4)]
    assert moved == Traffic(3, 80 + 48, (80 - 8) + (48 - 16))


def test_collectives_over_a_part_of_the_ranks(group: dist.ProcessGroup) -> None:
    pair = dist.new_group([0, 1])
    with Ledger({}, {}, lambda line: None) as ledger:
        dist.all_reduce(torch.zeros(3), group=pair)
    assert ledger.traffic == {("", Collective("all-reduce", 2)): Traffic(1, 12, 12)}


def test_it_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    ledger = Ledger({}, {}, said.append)
    ledger.phase = "forward"
    with ledger:
        torch.empty(1)
        assert said == []
        monkeypatch.setattr(module, "LINE_SECONDS", -1.0)
        torch.empty(1)
    assert said == ["  forward: 2 operators, 0 s"]
