"""A model over ranks: its first weights, gradients and files are one process's."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import distributed
from tests.distributed import LAYOUTS, drawn, rows_of, small
from trinity_lib import hub, muon, parallel
from trinity_lib.losses import token_loss
from trinity_lib.mesh import joined
from trinity_lib.model import ModelConfig, Trinity

ROWS, LENGTH = 4, 12


def tokens(vocab_size: int) -> Tensor:
    """Two micro-batches of four rows."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(vocab_size, (2, ROWS, LENGTH), generator=generator)


def backward(model: Any, rows_BS: Tensor, recompute: bool) -> None:
    output = model(rows_BS, recompute=recompute)
    token_loss(output.logits, rows_BS.roll(-1, 1)).cross_entropy.backward()


def one_process(config: ModelConfig) -> Trinity:
    model = drawn(config).double()
    for router in model.routers():
        router.bias_E = router.bias_E.float()
    return model


def gradients_agree(layout_name: str, config: ModelConfig, recompute: bool) -> float:
    """Worst difference of this rank's gradients, norm included, from one process's."""
    with joined(LAYOUTS[layout_name], "cpu") as layout:
        assert layout is not None
        sharded = parallel.shard(config, layout, dtype=torch.float64)
        parallel.initialise(sharded, torch.Generator().manual_seed(0))
        whole = one_process(config)
        sharded.model.load_bias(torch.stack([r.bias_E for r in whole.routers()]))
        every = dict(whole.named_parameters())
        for name, piece in sharded.pieces.items():
            assert torch.equal(piece.rows, rows_of(every[name].detach(), piece.span)), name
        held = sum(piece.rows.numel() for piece in sharded.pieces.values())
        total = sum(p.numel() for p in whole.parameters())
        if layout.config.replicate == 1:
            assert held < 0.8 * total  # no rank holds the model
        every_MBS = tokens(config.vocab_size)
        for number, rows_BS in enumerate(every_MBS):
            mine_BS = rows_BS.chunk(layout.ranks)[layout.rank]
            sharded.model.set_requires_all_reduce(number == 1)  # type: ignore[operator]
            backward(sharded.model, mine_BS, recompute)
            backward(whole, rows_BS, False)
        parallel.gradients(sharded)
        worst = 0.0
        for name, piece in sharded.pieces.items():
            grad = every[name].grad
            assert grad is not None
            scale = grad.abs().max().clamp(min=1e-12)
            theirs = rows_of(grad, piece.span)
            if len(theirs):
                assert piece.rows.grad is not None, name
                worst = max(worst, float((piece.rows.grad - theirs).abs().max() / scale))
        norm = parallel.clip(sharded, 1.0)
        expected = nn.utils.clip_grad_norm_(whole.parameters(), 1.0)
        worst = max(worst, abs(float(norm / expected) - 1))
        for name, piece in sharded.pieces.items():
            if piece.span.count:
                clipped = rows_of(every[name].grad, piece.span)  # type: ignore[arg-type]
                torch.testing.assert_close(piece.rows.grad, clipped)
        return worst


@pytest.mark.parametrize(
    ("layout", "experts", "recompute"),
    [
        ("replicas", 5, False),
        ("experts", 5, True),
        ("replicas of experts", 5, False),
        ("sharded experts", 6, True),
        ("four expert ranks", 5, False),  # 2, 2, 1 and none
    ],
)
def test_gradients_are_those_of_one_process(layout: str, experts: int, recompute: bool) -> None:
    given = (layout, small(experts), recompute)
    worst = distributed.run(gradients_agree, LAYOUTS[layout].ranks, *given)
    assert max(worst) < 1e-12


def owners_agree(layout_name: str, count: int) -> None:
    """`count` matrices, some with fewer rows than ranks, orthogonalised by turns."""
    with joined(LAYOUTS[layout_name], "cpu") as layout:
        assert layout is not None
        config = small(num_experts=4)
        sharded = parallel.shard(config, layout)
        owners = parallel.Owners(sharded)
        generator = torch.Generator().manual_seed(2)
        shapes = [torch.Size(s) for s in ((7, 5), (2, 9), (3, 3), (8, 4), (5, 11))[:count]]
        whole = [torch.randn(shape, generator=generator) for shape in shapes]
        parts = [rows_of(m, layout.rows(len(m))) for m in whole]
        for i in range(0, count, owners.ranks):
            some = slice(i, i + owners.ranks)
            got = owners.apply(parts[some], shapes[some], muon.orthogonalise)
            for update, matrix in zip(got, whole[some], strict=True):
                expected = rows_of(muon.orthogonalise(matrix), layout.rows(len(matrix)))
                assert torch.equal(update, expected)


@pytest.mark.parametrize(("layout", "count"), [("shards", 3), ("four shards", 5)])
def test_whole_matrices_are_made_by_turns(layout: str, count: int) -> None:
    distributed.run(owners_agree, LAYOUTS[layout].ranks, layout, count)


def saved_and_loaded(layout_name: str, config: ModelConfig, folder: Path) -> None:
    """Export the ranks' model in several files; read it back into other ranks' rows."""
    with joined(LAYOUTS[layout_name], "cpu") as layout:
        assert layout is not None
        sharded = parallel.shard(config, layout)
        parallel.initialise(sharded, torch.Generator().manual_seed(0))
        whole = drawn(config)
        sharded.model.load_bias(torch.stack([r.bias_E for r in whole.routers()]))
        hub.save(sharded, folder, shard_bytes=40_000)
        again = parallel.shard(config, layout)
        hub.load(folder, into=again)
        for name, piece in again.pieces.items():
            assert torch.equal(piece.rows, sharded.pieces[name].rows), name
        for mine, theirs in zip(again.model.routers(), whole.routers(), strict=True):
            assert torch.equal(mine.bias_E, theirs.bias_E)


@pytest.mark.parametrize("layout", ["replicas of experts", "four expert ranks"])
def test_an_export_holds_every_ranks_experts(layout: str, tmp_path: Path) -> None:
    config, folder = small(), tmp_path / "exported"
    distributed.run(saved_and_loaded, 4, layout, config, folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 4
    read, whole = hub.load(folder), drawn(config)
    for (name, mine), theirs in zip(read.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    from transformers import AfmoeForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AfmoeForCausalLM.from_pretrained(folder).eval()
    some_BS = tokens(config.vocab_size)[0]
    with torch.no_grad():
        logits = theirs(some_BS).logits
        torch.testing.assert_close(read(some_BS).logits, logits, atol=1e-4, rtol=1e-4)


def mixed_policy() -> tuple[set[torch.dtype], float]:
    """bf16 products: dtypes of gradients, and the norm's distance from one process's."""
    config = small(num_experts=4)
    with joined(LAYOUTS["experts"], "cpu") as layout:
        assert layout is not None
        sharded = parallel.shard(config, layout, products=torch.bfloat16)
        parallel.initialise(sharded, torch.Generator().manual_seed(0))
        rows_BS = tokens(config.vocab_size)[0]
        seen = []
        router = sharded.model.routers()[0]
        router.register_forward_hook(lambda m, _, out: seen.append(m.weight_ED.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            backward(sharded.model, rows_BS.chunk(2)[layout.rank], True)
        parallel.gradients(sharded)
        kinds = {p.rows.grad.dtype for p in sharded.pieces.values() if p.rows.grad is not None}
        whole = Trinity(config)
        whole.initialise(torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            backward(whole, rows_BS, False)
        expected = nn.utils.clip_grad_norm_(whole.parameters(), 1e9)
        norm = parallel.clip(sharded, 1e9)
        return kinds | set(seen), abs(float(norm / expected) - 1)


def test_products_are_bf16_and_what_must_be_precise_is() -> None:
    for kinds, off in distributed.run(mixed_policy, 2):
        assert kinds == {torch.float32}
        assert off < 0.02
