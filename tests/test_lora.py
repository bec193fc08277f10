"""Adapters: nothing at first, W + (alpha/r) B A after, and plain weights in the end."""

import builtins
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import conversing
from trinity_lib import hub, lora
from trinity_lib.config import BadValue, Missing
from trinity_lib.experts import Backend, use_backend
from trinity_lib.generate import generate
from trinity_lib.lora import LINEAR, LoraConfig
from trinity_lib.model import ModelConfig, Trinity

pytest.importorskip("peft")
EVERY = ("attention", "experts", "router", "shared", "dense")
TOKENS = torch.randint(384, (2, 20), generator=torch.Generator().manual_seed(1))


def adapted(shape: ModelConfig, *on: str, rank: int = 3) -> tuple[Trinity, dict, LoraConfig]:
    """A model whose adapters are at their start."""
    made = conversing.model(shape)
    config = LoraConfig(on=on or EVERY, rank=rank, alpha=5.0)  # type: ignore[arg-type]
    return made, lora.attach(made, config, seed=7), config


def stir(found: dict[str, Tensor]) -> None:
    """Adapters as if they had been trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in found.values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("part", [*EVERY, "all"])
def test_the_first_forward_is_unchanged(tiny_model: ModelConfig, part: str) -> None:
    plain = conversing.model(tiny_model)
    made, _, _ = adapted(tiny_model, *(() if part == "all" else (part,)))
    assert torch.equal(plain(TOKENS).logits, made(TOKENS).logits)


@pytest.mark.parametrize("part", [*EVERY, "all"])
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_merged_weights_compute_the_same(
    tiny_model: ModelConfig, part: str, backend: Backend
) -> None:
    made, found, _ = adapted(tiny_model, *(() if part == "all" else (part,)))
    use_backend(made, backend)
    stir(found)
    before = made(TOKENS)
    names = {name for name, _ in conversing.model(tiny_model).named_parameters()}
    lora.merge(made)
    after = made(TOKENS)
    assert {name for name, _ in made.named_parameters()} == names
    assert all(parameter.requires_grad for parameter in made.parameters())
    assert (before.logits - after.logits).abs().max() < 2e-5
    plain = conversing.model(tiny_model)(TOKENS)
    assert (plain.logits - after.logits).abs().max() > 1e-3


def test_every_merged_weight_is_the_equation_s(tiny_model: ModelConfig) -> None:
    """W + (alpha/r) B A, expert by expert, whoever multiplied it."""
    plain = dict(conversing.model(tiny_model).named_parameters())
    made, found, config = adapted(tiny_model)
    stir(found)
    pairs = {
        n.removesuffix(".A"): (p, found[f"{n[:-1]}B"]) for n, p in found.items() if n[-1] == "A"
    }
    kept = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in pairs.items()}
    lora.merge(made)
    merged = dict(made.named_parameters())
    scale = config.alpha / config.rank
    for name, (a, b) in kept.items():
        own = name if name in merged else f"{name}.weight"
        if a.dim() == 2:
            expected = plain[own] + scale * (b @ a)
        else:
            expected = torch.stack(
                [w + scale * (b[e] @ a[e]) for e, w in enumerate(plain[own])]
            )
        assert torch.allclose(merged[own], expected, atol=1e-6), name
        del merged[own]
    assert all(torch.equal(value, plain[name]) for name, value in merged.items())


def test_only_adapters_learn_and_all_of_them_do(tiny_model: ModelConfig) -> None:
    made, found, config = adapted(tiny_model)
    assert {id(p) for p in made.parameters() if p.requires_grad} == {
        id(p) for p in found.values()
    }
    stir(found)
    made(TOKENS).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in found.values())
    assert all(p.grad is None for p in made.parameters() if not p.requires_grad)
    blocks, moe = tiny_model.num_layers, len(tiny_model.moe_layers)
    assert len(found) == 2 * (5 * blocks + 3 * (blocks - moe) + moe * (3 + 1 + 3))
    experts = found["blocks.1.experts.gate_EFD.A"]
    assert experts.shape == (tiny_model.router.num_experts, config.rank, tiny_model.width)


def test_linear_layers_are_peft_s(tiny_model: ModelConfig) -> None:
    """Our wrapper's output is peft's own layer's, called alone."""
    from peft.tuners.lora.layer import Linear as Theirs

    made, found, _ = adapted(tiny_model, "attention")
    stir(found)
    x = torch.randn(3, tiny_model.width, generator=torch.Generator().manual_seed(3))
    layers = [m for m in made.modules() if isinstance(m, Theirs)]
    assert len(layers) == 5 * tiny_model.num_layers
    for layer in layers:
        if layer.in_features == tiny_model.width:
            assert torch.allclose(layer(x), x @ layer.weight.T, atol=1e-6)


def test_adapters_are_drawn_from_their_seed_alone(tiny_model: ModelConfig) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    _, first, _ = adapted(tiny_model)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    _, second, _ = adapted(tiny_model)
    assert all(torch.equal(first[name], second[name]) for name in first)
    a = torch.cat(
        [p.flatten() * (3 * p.shape[-1]) ** 0.5 for n, p in first.items() if n[-1] == "A"]
    )
    assert abs(float(a.detach().std()) - 1) < 0.05  # of peft's variance, 1/(3 fan_in)


def test_decoding_heeds_adapters(tiny_model: ModelConfig) -> None:
    made, found, _ = adapted(tiny_model)
    stir(found)
    with_adapters = generate(made, TOKENS, max_new_tokens=6)
    lora.merge(made)
    assert torch.equal(with_adapters, generate(made, TOKENS, max_new_tokens=6))


def test_a_merged_model_is_saved_as_an_ordinary_one(
    tiny_model: ModelConfig, tmp_path: Path
) -> None:
    made, found, _ = adapted(tiny_model)
    stir(found)
    lora.merge(made)
    hub.save(made, tmp_path / "merged")
    again = hub.load(tmp_path / "merged")
    assert torch.equal(again(TOKENS).logits, made(TOKENS).logits)
    assert vars(made).keys() == vars(again).keys()
    assert type(made.blocks[1].experts) is type(again.blocks[1].experts)
    lora.attach(made, LoraConfig(), seed=1)  # the next stage's


def test_a_part_that_is_not_there_is_refused(tiny_model: ModelConfig) -> None:
    import dataclasses

    bare = dataclasses.replace(tiny_model, num_dense_layers=0, num_shared_experts=0)
    for part in ("dense", "shared"):
        with pytest.raises(
            BadValue, match=f"lora_on is router, {part}; the model has no {part}"
        ):
            adapted(bare, "router", part)


def test_without_peft_only_linear_layers_are_refused(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name == "trinity_lib" and "_peft" in (args[2] or ()):  # type: ignore[operator]
            raise ImportError("no peft")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    adapted(tiny_model, "experts", "router")
    with pytest.raises(Missing, match="need the package peft"):
        adapted(tiny_model, "experts", "attention")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"on": ()}, "lora.on is .*; it must be at least one part"),
        ({"on": ("head",)}, "lora.* is 'head'; it must be one of attention, experts, router"),
        ({"on": ("router", "router")}, "lora.on is .*; it must be parts named once each"),
        ({"rank": 0}, "lora.rank is 0; it must be at least 1"),
        ({"alpha": 0}, "lora.alpha is 0.0; it must be above zero"),
        ({"rate": -1}, "lora.rate is -1.0; it must be above zero"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence.replace("lora.* is", ".* is")):
        LoraConfig(**settings)


def test_patterns_name_modules_that_are_there(tiny_model: ModelConfig) -> None:
    import re

    names = [name for name, _ in conversing.model(tiny_model).named_modules()]
    for pattern in LINEAR.values():
        assert any(re.fullmatch(rf"blocks\.\d+\.{pattern}", name) for name in names)
