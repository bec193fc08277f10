"""What a trace is told: FLOP and workspaces by hand, and the kinds of tensors."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from trinity_lib import dropless, onednn, operators
from trinity_lib.ledger import Ledger

T, K, E, F_, D = 7, 2, 3, 5, 4
EXPERTS, BACKWARD = torch.ops.trinity.experts, torch.ops.trinity.experts_backward


def experts(
    dtype: torch.dtype = torch.float32, num_experts: int = E, tokens: int = T
) -> tuple[Tensor, ...]:
    """Arguments of the experts' operator."""
    x = torch.zeros(tokens, D, dtype=dtype)
    weights = [torch.zeros(num_experts, F_, D, dtype=dtype) for _ in range(3)]
    chosen = torch.arange(tokens * K).view(tokens, K) % max(1, num_experts)
    return x, *weights, chosen, torch.ones(tokens, K)


def backwards(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, gate, up, down, chosen, weights = arguments
    rest = dropless.compute(x, gate, up, down, chosen, weights)[1:]
    return torch.zeros_like(x), x, gate, up, down, weights, *rest


def recorded(*calls: tuple[Any, tuple[Tensor, ...]]) -> Ledger:
    ledger = Ledger(operators.FORMULAS, operators.WORKSPACES, lambda line: None)
    with ledger:
        for operator, arguments in calls:
            operator(*arguments)
    return ledger


def test_the_experts_products_are_three_a_row_and_twice_that_back() -> None:
    given = experts()
    ledger = recorded((EXPERTS, given), (BACKWARD, backwards(given)))
    product = 2 * T * K * F_ * D
    assert ledger.flops["", EXPERTS] == 3 * product
    assert ledger.flops["", BACKWARD] == 6 * product


def test_they_are_what_torch_counts_of_the_products_themselves() -> None:
    """Widths that the grouped GEMM does not take: one product an expert, each counted."""
    given = experts(torch.float64)
    back = backwards(given)
    for operator, formula, compute, arguments in (
        (EXPERTS, "forward", dropless.compute, given),
        (BACKWARD, "backward", dropless.backward._init_fn, back),
    ):
        with FlopCounterMode(display=False) as counted:
            compute(*arguments)
        total = operators.FORMULAS[operator](*arguments, out_val=None)
        assert counted.get_total_flops() == total, formula


def test_a_rank_without_experts_computes_nothing() -> None:
    x, gate, up, down, chosen, weights = experts(num_experts=0)
    assert operators.FORMULAS[EXPERTS](x, gate, up, down, chosen, weights, out_val=None) == 0
    back = operators.FORMULAS[BACKWARD](x, x, gate, up, down, weights, out_val=None)
    assert back == 0


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_workspaces_by_hand(dtype: torch.dtype, size: int) -> None:
    given = experts(dtype)
    x, gate, up, down, _, weights = given
    rows = T * K
    # rows in order and results, of width D; hidden
    assert operators.WORKSPACES[EXPERTS](*given) == rows * (D + D + F_) * size
    # rows, their gradients in and two out; gate's, up's, hidden and its gradient
    found = operators.WORKSPACES[BACKWARD](x, x, gate, up, down, weights)
    assert found == rows * (4 * D + 4 * F_) * size


def test_a_workspace_counts_in_the_peak_and_is_gone() -> None:
    given = experts()
    ledger = Ledger(operators.FORMULAS, operators.WORKSPACES, lambda line: None)
    with ledger:
        results = EXPERTS(*given)
    workspace, now = T * K * (2 * D + F_) * 4, ledger.now
    assert sum(ledger.peak(0, 2).values()) == workspace
    stays = sum(r.untyped_storage().nbytes() for r in results)
    assert sum(ledger.peak(now, now).values()) == stays


def test_kinds_and_formulas_name_the_same_experts() -> None:
    assert set(operators.WORKSPACES) == {EXPERTS, BACKWARD} < set(operators.KINDS)
    assert set(operators.FORMULAS) == {EXPERTS, BACKWARD, torch.ops.trinity.product}
    assert {operators.KINDS[o] for o in operators.WORKSPACES} == {"experts"}


def test_a_product_through_onednn_counts_as_any_other() -> None:
    x, matrix = torch.randn(128, 256), torch.randn(128, 256)
    ledger = Ledger(operators.FORMULAS, operators.WORKSPACES, lambda line: None)
    with ledger:
        onednn.linear(x, matrix)
        x @ matrix.t()
    one, other = ledger.flops.values()
    assert one == other == 2 * 128 * 256 * 128


def watched(tokens: int = 6, vocabulary: int = 10) -> Ledger:
    ledger = Ledger(operators.FORMULAS, operators.WORKSPACES, lambda line: None)
    ledger.rules = operators.rules(ledger, tokens, vocabulary)
    ledger.default = "working"
    return ledger


def kinds(ledger: Ledger) -> dict[str, int]:
    """Bytes alive by kind."""
    return {k: n for k, n in ledger.peak(ledger.now, ledger.now).items() if n}


def test_logits_are_told_by_their_number() -> None:
    """Their product, what is cast, and what the loss makes of them; no others."""
    with watched() as ledger:
        h, head = torch.zeros(6, 4), torch.zeros(4, 10)
        made = [h @ head]
        made += [made[0].bfloat16(), made[0].log_softmax(-1), made[0].exp()]
        small = [torch.zeros(6, 4) @ torch.zeros(4, 9), torch.zeros(6, 9).exp()]
    assert len(made) == 4 and len(small) == 2
    found = kinds(ledger)
    assert found["logits"] == 240 + 120 + 240 + 240
    assert set(found) == {"logits", "working"}


@pytest.fixture
def group() -> Any:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_what_is_gathered_reduced_and_exchanged(group: Any) -> None:
    with watched() as ledger:
        whole, part = torch.zeros(8), torch.zeros(4)
        group._allgather_base(whole, part)
        assert kinds(ledger) == {"gathered": 32, "working": 16}
        unreduced, gradient = torch.zeros(20), torch.zeros(10)
        group._reduce_scatter_base(gradient, unreduced)
        assert kinds(ledger) == {
            "gathered": 32, "working": 16, "unreduced": 80, "gradients": 40,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "kind"), [("forward", "exchange"), ("backward", "exchange"), ("step", "working")]
)
def test_only_tokens_are_exchanged_not_muons_matrices(
    phase: str, kind: str, group: Any
) -> None:
    with watched() as ledger:
        ledger.phase = phase
        sent, received = torch.zeros(6), torch.zeros(6)
        dist.all_to_all_single(received, sent, group=group)
    assert kinds(ledger) == {kind: 48}


def test_what_fsdp_copies(group: Any) -> None:
    fsdp = torch.ops.fsdp
    with watched() as ledger:
        buffer, rows = torch.zeros(12), [torch.zeros(6)]
        mine, every = fsdp.all_gather_copy_in(rows, buffer, [6], 6, 0)
        assert mine.numel() == 6 and every.numel() == 12
        assert kinds(ledger) == {"gathered": 48, "working": 24}
        whole = torch.zeros(2, 6)
        fsdp.split_with_sizes_copy(every.view(2, 6), [6], dim=1, out=[whole])
        assert kinds(ledger) == {"gathered": 96, "working": 24}
        gradients, flat = [torch.zeros(4, 3)], torch.zeros(2, 6)
        fsdp.chunk_cat(gradients, 0, 2, out=flat)
        assert kinds(ledger) == {"gathered": 96, "working": 24, "unreduced": 96}
