"""The whole model: initialisation, packing, recomputation, replay, splits of the batch."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from trinity_lib import balance, balancers, optim
from trinity_lib.attention import AttentionConfig, RMSNorm
from trinity_lib.balance import BalanceConfig
from trinity_lib.losses import token_loss
from trinity_lib.model import ModelConfig, Trinity, count_parameters
from trinity_lib.optim import OptimConfig
from trinity_lib.routing import RouterConfig


def balancer_of(config: BalanceConfig, model: ModelConfig) -> balance.Balancer:
    return balancers.build(
        config,
        num_layers=len(model.moe_layers),
        num_experts=model.router.num_experts,
        top_k=model.router.top_k,
        vocab_size=model.vocab_size,
        seed=0,
    )


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
                assert abs(float(p.detach().mean())) < 0.02 * sigma, name
                assert p.abs().max() > 2.9 * sigma, name
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
    balancer = balancer_of(BalanceConfig(rate=1e-2), config)
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
            {"num_dense_layers": 5},
            r"num_dense_layers is 5; it must be from 0 to num_layers \(4\)",
        ),
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1"),
    ],
)
def test_bad_settings(tiny_model: ModelConfig, changes: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(tiny_model, **changes)


def by_equations(model: Trinity, row: list[int], documents: list[int]) -> Tensor:
    """Logits [S, V] of one row, token by token and head by head, from named weights."""
    config, weights = model.config, dict(model.named_parameters())
    heads, dim = config.attention.num_heads, config.attention.head_dim
    group = heads // config.attention.num_kv_heads
    S = len(row)
    place = [s - documents.index(documents[s]) for s in range(S)]

    def norm(v: Tensor, name: str) -> Tensor:
        return v / (v.square().mean() + config.norm_eps).sqrt() * weights[f"{name}.weight_D"]

    def turn(v: Tensor, position: int) -> Tensor:
        """Each pair (i, i + half) as one complex number, turned."""
        half = dim // 2
        pairs = torch.complex(v[:half], v[half:])
        angle = position * config.attention.rope_theta ** (
            -torch.arange(half).double() * 2 / dim
        )
        pairs = pairs * torch.complex(angle.cos(), angle.sin())
        return torch.cat([pairs.real, pairs.imag])

    def swiglu(v: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        pre = gate @ v
        return down @ (pre / (1 + torch.exp(-pre)) * (up @ v))

    def dense(v: Tensor, name: str) -> Tensor:
        return swiglu(v, *(weights[f"{name}.{m}.weight"] for m in ("gate", "up", "down")))

    def attend(xs: list[Tensor], name: str, layer: int) -> list[Tensor]:
        everywhere = (layer + 1) % config.global_every == 0
        parts = {
            m: [(weights[f"{name}.{m}.weight"] @ x).view(-1, dim) for x in xs]
            for m in ("query", "key", "value", "gate")
        }
        outs = []
        for t in range(S):
            mixed = []
            for h in range(heads):
                seen = [
                    s
                    for s in range(t + 1)
                    if documents[s] == documents[t]
                    and (everywhere or s > t - config.attention.window)
                ]
                q = norm(parts["query"][t][h], f"{name}.query_norm")
                ks = [norm(parts["key"][s][h // group], f"{name}.key_norm") for s in seen]
                if not everywhere:
                    q = turn(q, place[t])
                    ks = [turn(k, place[s]) for k, s in zip(ks, seen, strict=True)]
                exps = [torch.exp(q @ k / math.sqrt(dim)) for k in ks]
                out = sum(
                    e * parts["value"][s][h // group] for e, s in zip(exps, seen, strict=True)
                )
                mixed.append(out / sum(exps) / (1 + torch.exp(-parts["gate"][t][h])))
            outs.append(weights[f"{name}.out.weight"] @ torch.cat(mixed))
        return outs

    def experts(v: Tensor, name: str, bias: list[float]) -> Tensor:
        scores = [1 / (1 + torch.exp(-(w @ v))) for w in weights[f"{name}.router.weight_ED"]]
        ranked = sorted(range(len(scores)), key=lambda e: -(float(scores[e]) + bias[e]))
        chosen = ranked[: config.router.top_k]
        total = sum(scores[e] for e in chosen)
        out = dense(v, f"{name}.shared")
        for e in chosen:
            gate, up, down = (weights[f"{name}.experts.{m}_EFD"][e] for m in MATRICES)
            share = config.router.route_scale * scores[e] / total
            out = out + share * swiglu(v, gate, up, down.T)
        return out

    hs = [weights["embedding.weight"][i] * math.sqrt(config.width) for i in row]
    for i in range(config.num_layers):
        name = f"blocks.{i}"
        us = attend([norm(h, f"{name}.attention_norm") for h in hs], f"{name}.attention", i)
        pairs = zip(hs, us, strict=True)
        hs = [h + norm(u, f"{name}.attention_post_norm") for h, u in pairs]
        xs = [norm(h, f"{name}.mlp_norm") for h in hs]
        if i < config.num_dense_layers:
            ys = [dense(x, f"{name}.dense") for x in xs]
        else:
            bias = model.routers()[i - config.num_dense_layers].bias_E.tolist()
            ys = [experts(x, name, bias) for x in xs]
        hs = [h + norm(y, f"{name}.mlp_post_norm") for h, y in zip(hs, ys, strict=True)]
    return torch.stack([weights["head.weight"] @ norm(h, "norm") for h in hs])


MATRICES = ("gate", "up", "down")


def test_the_whole_model_against_its_equations(tiny_model: ModelConfig) -> None:
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6, window=3)
    config = dataclasses.replace(tiny_model, attention=attention, num_shared_experts=2)
    model, row = built(config, dtype=torch.float64), tokens(config, 1, 9)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(3)
    documents = [0, 0, 0, 0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        got = model(row, torch.tensor([documents])).logits[0]
        expected = by_equations(model, row[0].tolist(), documents)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-9)


def test_a_documents_loss_reaches_no_other_documents_embeddings(
    tiny_model: ModelConfig,
) -> None:
    model = built(tiny_model)
    row = torch.arange(30)[None]
    documents = torch.tensor([[0] * 8 + [1] * 14 + [2] * 8])
    logits = model(row, documents).logits[:, 8:22]
    token_loss(logits, torch.full((1, 14), 99)).cross_entropy.backward()
    grad = model.embedding.weight.grad
    assert not grad[:8].any() and not grad[22:].any()
    assert (grad[8:22].abs().sum(-1) > 0).all()


def test_construction_is_filled_from_the_generator_alone(tiny_model: ModelConfig) -> None:
    filled = []
    for global_seed, seed in ((1, 5), (2, 5), (1, 6)):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            model = Trinity(tiny_model)
        for router in model.routers():
            router.bias_E.fill_(9.0)
        model.initialise(torch.Generator().manual_seed(seed))
        assert not any(router.bias_E.any() for router in model.routers())
        filled.append([p.detach() for p in model.parameters()])
    first, same, other = filled
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    drawn = [(a, b) for a, b in zip(first, other, strict=True) if a.dim() > 1]
    assert not any(torch.equal(a, b) for a, b in drawn)


def test_stored_biases_choose_what_the_balancer_would(tiny_model: ModelConfig) -> None:
    model, row = built(tiny_model), tokens(tiny_model, 2, 12)
    balancer = balancer_of(BalanceConfig(rate=0.5), tiny_model)
    plain = model(row, select=balancer.select)
    balancer.update(torch.arange(24).view(3, 8))
    steered = model(row, select=balancer.select)
    model.load_bias(balancer.bias_LE)
    stored = model(row)
    assert not torch.equal(plain.routing[0].experts_TK, steered.routing[0].experts_TK)
    assert torch.equal(steered.logits, stored.logits)
    for a, b in zip(steered.routing, stored.routing, strict=True):
        assert torch.equal(a.experts_TK, b.experts_TK)
    with pytest.raises(ValueError):
        model.load_bias(balancer.bias_LE[:2])


def test_a_replay_repeats_the_forward_pass(tiny_model: ModelConfig) -> None:
    model, row = built(tiny_model), tokens(tiny_model, 2, 12)
    first = model(row)
    picks = [r.experts_TK for r in first.routing]
    for router in model.routers():
        router.bias_E.normal_(generator=torch.Generator().manual_seed(1))
    assert not torch.equal(model(row).logits, first.logits)
    assert torch.equal(model(row, replay=picks).logits, first.logits)
    recomputed = model(row, replay=picks, recompute=True, hidden=True)
    assert torch.equal(recomputed.logits, first.logits) and len(recomputed.hidden) == 5
    assert first.hidden == ()


PUBLISHED = {
    "nano": ((1024, 56, 2, 3072, 256), (8, 2, 2048), (128, 8, 2.826)),
    "mini": ((2048, 32, 2, 6144, 1024), (32, 4, 2048), (128, 8, 2.826)),
    "large": ((3072, 60, 6, 12288, 3072), (48, 8, 4096), (256, 4, 2.448)),
}


def published(name: str) -> ModelConfig:
    """A released configuration, from the report's first table."""
    (width, layers, dense, dense_width, expert_width), attention, router = PUBLISHED[name]
    heads, kv_heads, window = attention
    return ModelConfig(
        vocab_size=200_192,
        width=width,
        num_layers=layers,
        num_dense_layers=dense,
        dense_width=dense_width,
        expert_width=expert_width,
        attention=AttentionConfig(
            num_heads=heads, num_kv_heads=kv_heads, head_dim=128, window=window
        ),
        router=RouterConfig(num_experts=router[0], top_k=router[1], route_scale=router[2]),
    )


@pytest.mark.parametrize(
    ("name", "total", "bias", "active", "local"),
    [
        ("nano", 6_119_996_416, 6_912, (0.614, 0.819, 1.024), 42),
        ("mini", 26_123_970_560, 3_840, (2.655, 3.065, 3.475), 24),
        ("large", 398_635_272_192, 13_824, (12.142, 12.757, 13.372), 45),
    ],
)
def test_released_sizes(
    name: str, total: int, bias: int, active: tuple[float, ...], local: int
) -> None:
    config = published(name)
    count = count_parameters(config)
    assert (count.total, count.expert_bias) == (total, bias)
    assert tuple(round(n / 1e9, 3) for n in count[2:]) == active
    layers = range(config.num_layers)
    assert sum(not config.is_global(i) for i in layers) == local
    assert config.is_global(3) and not config.is_global(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_depends_on_the_other_rows(tiny_model: ModelConfig, dtype: torch.dtype) -> None:
    model, rows = built(tiny_model, dtype=dtype), tokens(tiny_model, 3, 10)
    together = model(rows).logits
    alone = torch.cat([model(row[None]).logits for row in rows])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(together, alone, atol=tolerance, rtol=0)
    assert together.dtype == dtype


def test_no_token_sees_a_later_one(tiny_model: ModelConfig) -> None:
    model, rows = built(tiny_model), tokens(tiny_model, 1, 24)
    other = rows.clone()
    other[0, 15:] = (other[0, 15:] + 1) % tiny_model.vocab_size
    a, b = model(rows).logits, model(other).logits
    torch.testing.assert_close(a[:, :15], b[:, :15], atol=1e-5, rtol=0)
    assert (a[:, 15:] - b[:, 15:]).abs().amax(-1).min() > 1e-2
