"""Cached decoding against decoding without a cache, and sampling against its definition."""

import pytest
import torch
from torch import Tensor

from trinity_lib.attention import AttentionConfig
from trinity_lib.config import BadValue
from trinity_lib.generate import generate, pick, prefill, stream
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.routing import RouterConfig


def model(window: int = 5, global_every: int = 2, seed: int = 0) -> Trinity:
    config = ModelConfig(
        vocab_size=50,
        width=32,
        num_layers=4,
        num_dense_layers=1,
        dense_width=64,
        expert_width=16,
        global_every=global_every,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=window),
        router=RouterConfig(num_experts=6, top_k=2, route_scale=2.0),
    )
    made = Trinity(config)
    made.initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return made


def prompt(batch: int = 3, length: int = 8) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(1))


def uncached(built: Trinity, tokens: Tensor, mask: Tensor, new: int) -> Tensor:
    for _ in range(new):
        logits = built(tokens, mask - 1).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return tokens


@pytest.mark.parametrize("window", [1, 2, 5, 8, 9, 100])
@pytest.mark.parametrize("global_every", [1, 2, 9])
@torch.no_grad()
def test_the_cache_changes_nothing_past_several_windows(window: int, global_every: int) -> None:
    built, tokens = model(window, global_every), prompt()
    mask = torch.ones_like(tokens)
    mask[1, :3], mask[2, :7] = 0, 0
    expected = uncached(built, tokens, mask, 30)
    assert torch.equal(generate(built, tokens, mask_BS=mask, max_new_tokens=30), expected)


@torch.no_grad()
def test_cached_logits_are_the_uncached_ones() -> None:
    built, tokens = model(), prompt(2, 25)
    logits, cache = prefill(built, tokens[:, :7], None, 18)
    torch.testing.assert_close(logits, built(tokens[:, :7]).logits[:, -1], atol=1e-5, rtol=1e-5)
    whole = built(tokens).logits
    for at in range(7, 25):
        step = built(tokens[:, at : at + 1], cache=cache).logits[:, -1]
        torch.testing.assert_close(step, whole[:, at], atol=2e-5, rtol=1e-5)


def test_sliding_layers_keep_their_window_and_no_more() -> None:
    built = model(window=5, global_every=2)
    cache = built.cache(torch.zeros(2, dtype=torch.int64), 40)
    assert [m.keys_BHPC.shape[2] for m in cache.memories] == [5, 40, 5, 40]


def test_streamed_tokens_are_the_generated_ones() -> None:
    built = model()
    whole = generate(built, prompt(), max_new_tokens=9)
    streamed = list(stream(built, prompt(), max_new_tokens=9))
    assert torch.equal(torch.stack(streamed, 1), whole[:, 8:])
    assert torch.equal(whole[:, :8], prompt()) and whole.dtype == torch.int64
    assert torch.equal(generate(built, prompt(), max_new_tokens=0), prompt())


def test_rows_that_stopped_go_on_with_padding() -> None:
    built = model()
    free = generate(built, prompt(), max_new_tokens=12)[:, 8:]
    stop = int(free[0, 4])
    held = generate(built, prompt(), max_new_tokens=12, stop=[stop], pad=49)[:, 8:]
    for row, expected in zip(held.tolist(), free.tolist(), strict=True):
        until = expected.index(stop) + 1 if stop in expected else 12
        assert row == expected[:until] + [49] * (12 - until)
    alone = list(stream(built, prompt()[:1], max_new_tokens=12, stop=[stop]))
    assert len(alone) == free[0].tolist().index(stop) + 1
    filled = generate(built, prompt()[:1], max_new_tokens=12, stop=[stop])
    assert filled.shape == (1, 20) and filled[0, -1] == stop


def test_the_same_generator_draws_the_same() -> None:
    built = model()
    drawn = [
        generate(built, prompt(), max_new_tokens=20, temperature=1.5,
                 generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


LOGITS = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.015625, 0.00390625, 0.00390625]),
        ({"temperature": 1.0, "top_k": 2}, [2, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 9}, [0.5, 0.25, 0.125, 0.0625, 0.0625]),
        ({"temperature": 1.0, "top_p": 0.6}, [2, 1, 0, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.4}, [1, 0, 0, 0, 0]),
        ({"temperature": 1.0, "min_p": 0.2}, [4, 2, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.8, "min_p": 0.6}, [1, 0, 0, 0, 0]),
    ],
)
def test_sampling_follows_its_definition(options: dict, expected: list) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = pick(LOGITS.expand(40_000, 5), **options, generator=generator)
    share = torch.bincount(drawn, minlength=5) / 40_000
    right = torch.tensor(expected, dtype=torch.float32) / sum(expected)
    assert ((share == 0) == (right == 0)).all()
    torch.testing.assert_close(share, right, atol=0.012, rtol=0)


def test_greedy_is_the_largest() -> None:
    assert pick(LOGITS.expand(2, 5)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be zero or more"),
        ({"temperature": -0.1}, "temperature is -0.1; it must be zero"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0, at most 1"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be from 0 to 1"),
        ({"top_k": -1}, "top_k is -1; it must be zero"),
        ({"mask_BS": torch.ones(2, 8)}, r"mask_BS is \[2, 8\]; it must be of shape \[3, 8\]"),
        (
            {"mask_BS": torch.tensor([[1] * 7 + [0]] * 3)},
            "it must be 0 for padding on the left",
        ),
        ({"tokens_BS": torch.zeros(0, 4)}, r"tokens_BS is \[0, 4\]; it must be of shape"),
    ],
)
def test_bad_options_are_one_sentence(options: dict, sentence: str) -> None:
    arguments = {"tokens_BS": prompt(), "max_new_tokens": 3, **options}
    with pytest.raises(BadValue, match=sentence):
        generate(model(), **arguments)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, compiling
def test_compiled_decoding_draws_the_same_tokens_from_every_model() -> None:
    """Two models and two batches in turn: a step must never be the one of another."""
    built = [model(), model(window=3, seed=2)]
    prompts = [prompt(2, 8), prompt(2, 8)]
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    expected = [
        uncached(m, tokens, mask, 9)[:, 8:] for m, tokens in zip(built, prompts, strict=True)
    ]
    streams = [
        stream(m, tokens, mask_BS=mask, max_new_tokens=9, compiled=True)
        for m, tokens in zip(built, prompts, strict=True)
    ]
    drawn = [torch.stack(tokens, 1) for tokens in zip(*zip(*streams, strict=True), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
    one = generate(built[0], prompts[0][:1], max_new_tokens=9, compiled=True)
    assert torch.equal(one, generate(built[0], prompts[0][:1], max_new_tokens=9))
