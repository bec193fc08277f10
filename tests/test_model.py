"""The whole model: initialisation, packing, recomputation, replay, splits of the batch."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from trinity_lib import balance, optim
from trinity_lib.attention import RMSNorm
from trinity_lib.balance import BalanceConfig
from trinity_lib.losses import token_loss
from trinity_lib.model import ModelConfig, Trinity, count_parameters
from trinity_lib.optim import OptimConfig


def built(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Trinity:
    """A model away from its defaults: random gains and biases."""
    model = Trinity(config)
    generator = torch.Generator().manual_seed(seed)
    model.initialise(generator)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.2 * torch.randn(p.shape, generator=generator))
        for router in model.routers():
            router.bias_E.normal_(std=0.05, generator=generator)
    return model.to(dtype)


def tokens(config: ModelConfig, B: int, S: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (B, S), generator=generator)


def test_a_packed_document_is_computed_as_it_is_alone(tiny_model: ModelConfig) -> None:
    model, row = built(tiny_model), tokens(tiny_model, 1, 50)
    lengths = [7, 1, 25, 17]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(row, documents).logits[0]
    alone = [model(part[None]).logits[0] for part in row[0].split(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=0)
    together = model(row).logits[0]
    assert (together[7:] - packed[7:]).abs().max() > 1e-2


def test_padding_changes_nothing(tiny_model: ModelConfig) -> None:
    model, row = built(tiny_model), tokens(tiny_model, 1, 20)
    padded = torch.cat([row, torch.zeros(1, 6, dtype=torch.long)], 1)
    documents = torch.tensor([[0] * 20 + [-1] * 6])
    torch.testing.assert_close(model(padded, documents).logits[:, :20], model(row).logits)


def test_initialisation_is_the_reports(tiny_model: ModelConfig) -> None:
    config = dataclasses.replace(tiny_model, width=256, vocab_size=2048)
    model = Trinity(config)
    before = torch.get_rng_state()
    model.initialise(torch.Generator().manual_seed(5))
    assert torch.equal(before, torch.get_rng_state())
    sigma = 0.5 / math.sqrt(256)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            assert p.abs().max() <= 3 * sigma, name
            if p.numel() > 20_000:
                assert p.detach().std().item() == pytest.approx(0.9866 * sigma, rel=0.03), name
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            gain = 1 / math.sqrt(4) if "post_norm" in name else 1.0
            assert torch.allclose(module.weight_D, torch.tensor(gain)), name
    again = Trinity(config)
    again.initialise(torch.Generator().manual_seed(5))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layers_follow_the_pattern(tiny_model: ModelConfig) -> None:
    model = Trinity(dataclasses.replace(tiny_model, num_layers=8, num_dense_layers=2))
    assert [b.attention.is_global for b in model.blocks] == [False, False, False, True] * 2
    assert [b.dense is not None for b in model.blocks] == [True] * 2 + [False] * 6
    assert [r.layer for r in model.routers()] == list(range(6))


def test_the_embedding_is_scaled_and_the_residual_adds_up(tiny_model: ModelConfig) -> None:
    model, row = built(tiny_model), tokens(tiny_model, 1, 5)
    states = model(row, hidden=True).hidden
    assert len(states) == 5
    expected = model.embedding.weight[row] * math.sqrt(tiny_model.width)
    torch.testing.assert_close(states[0], expected)
    block = model.blocks[0]
    shared_in = states[0]
    from trinity_lib.attention import context

    here = context(torch.zeros_like(row), tiny_model.attention, torch.float32)
    h = shared_in + block.attention_post_norm(
        block.attention(block.attention_norm(shared_in), here)
    )
    h = h + block.mlp_post_norm(block.dense(block.mlp_norm(h)))
    torch.testing.assert_close(states[1], h)
    torch.testing.assert_close(model(row).logits, model.head(model.norm(states[-1])))


def test_the_shared_expert_is_added_unscaled(tiny_model: ModelConfig) -> None:
    block = built(tiny_model).blocks[1]
    x = torch.randn(1, 6, tiny_model.width)
    y, routing = block._sparse(x, None, None)
    expected = block.shared(x)[0] + block.experts(x[0], routing)
    torch.testing.assert_close(y[0], expected)


def test_recomputation_counts_nothing_twice(tiny_model: ModelConfig) -> None:
    row = tokens(tiny_model, 2, 24)
    results = []
    for recompute in (False, True):
        model = built(tiny_model)
        output = model(row, recompute=recompute)
        loss = token_loss(output.logits, row).cross_entropy
        loss.backward()
        load = balance.load(output.routing, torch.ones(48, dtype=torch.bool))
        grads = [p.grad for p in model.parameters()]
        results.append([loss.detach(), load, *grads])
    assert int(results[0][1].sum()) == 48 * 2 * 3
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_replay_of_the_wrong_depth_is_refused(tiny_model: ModelConfig) -> None:
    with pytest.raises(ValueError, match="replay has 1 layers; the model has 3 MoE layers"):
        built(tiny_model)(tokens(tiny_model, 1, 4), replay=[torch.zeros(4, 2)])


def steps(
    config: ModelConfig, micro_batches: int, optimizer: str, replay: list | None = None
) -> tuple[list[float], list[Tensor], list[Tensor], list]:
    """Twenty float64 steps over the same global batches; losses, counts, state, choices."""
    model = built(config, dtype=torch.float64)
    balancer = balance.build(BalanceConfig(rate=1e-2), 3, config.router.num_experts)
    optimizers = optim.build(model, OptimConfig(optimizer=optimizer, muon_rate=1e-2))
    losses, counts, states, choices = [], [], [], []
    for step in range(20):
        batch, size = tokens(config, 4, 16, seed=step), 4 // micro_batches
        total, load, picked = (
            0.0,
            torch.zeros(3, config.router.num_experts, dtype=torch.long),
            [],
        )
        for i in range(0, 4, size):
            part = batch[i : i + size]
            given = None
            if replay is not None:
                given = [layer[i * 16 : (i + size) * 16] for layer in replay[step]]
            output = model(part, select=balancer.select, replay=given)
            documents = torch.zeros_like(part)
            loss = token_loss(output.logits, part).cross_entropy / batch.numel()
            (loss + balancer.loss(output.routing, documents) / 4).backward()
            total += float(loss.detach())
            load += balancer.observe(output.routing, torch.ones(part.numel(), dtype=torch.bool))
            picked.append([r.experts_TK for r in output.routing])
        for each in optimizers:
            each.step()
            each.zero_grad()
        balancer.update(load)
        losses.append(total)
        counts.append(load)
        states.append(torch.stack([balancer.bias_LE, balancer.momentum_LE]))
        choices.append([torch.cat(layer) for layer in zip(*picked, strict=True)])
    return losses, counts, states, choices


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_any_split_of_the_batch_is_the_same_run(
    tiny_model: ModelConfig, optimizer: str
) -> None:
    whole = steps(tiny_model, 1, optimizer)
    assert whole[0][-1] < whole[0][0]
    for micro_batches in (2, 4):
        free = steps(tiny_model, micro_batches, optimizer)
        assert free[0] == pytest.approx(whole[0], abs=1e-9)
        replayed = steps(tiny_model, micro_batches, optimizer, replay=whole[3])
        for kind in (1, 2):
            for a, b in zip(whole[kind], replayed[kind], strict=True):
                assert torch.equal(a, b)


def test_counting_allocates_nothing_and_matches_a_real_model(tiny_model: ModelConfig) -> None:
    count = count_parameters(tiny_model)
    model = Trinity(tiny_model)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.expert_bias == 3 * 8
    idle = 3 * (8 - 2) * 3 * 16 * 32
    assert count.active_with_embeddings == count.total - idle
    assert count.active_with_head - count.active == 384 * 32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"num_dense_layers": 4},
            r"num_dense_layers is 4; it must be from 0 to num_layers - 1",
        ),
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1"),
    ],
)
def test_bad_settings(tiny_model: ModelConfig, changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(tiny_model, **changes)
