"""Released checkpoints in and out, against transformers' own AFMoE."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trinity_lib import hub
from trinity_lib.config import BadValue, Missing
from trinity_lib.generate import generate
from trinity_lib.losses import token_loss
from trinity_lib.model import Trinity

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")


def kinds(layers: int) -> st.SearchStrategy:
    kind = st.sampled_from(["sliding_attention", "full_attention"])
    return st.none() | st.lists(kind, min_size=layers, max_size=layers)


@st.composite
def configurations(draw) -> dict:
    """An AFMoE configuration of every shape that the released class allows, and a seed."""
    layers, experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    kv = draw(st.sampled_from([1, 2, 3]))
    return {
        "vocab_size": draw(st.integers(20, 90)),
        "hidden_size": draw(st.integers(1, 6).map(lambda n: 8 * n)),
        "intermediate_size": draw(st.integers(1, 40)),
        "moe_intermediate_size": draw(st.integers(1, 5).map(lambda n: 4 * n)),
        "num_hidden_layers": layers,
        "num_dense_layers": draw(st.integers(0, layers)),
        "num_attention_heads": kv * draw(st.integers(1, 3)),
        "num_key_value_heads": kv,
        "head_dim": draw(st.sampled_from([2, 6, 8, 10, 24])),
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "num_shared_experts": draw(st.integers(0, 3)),
        "route_scale": draw(st.floats(0.5, 3)),
        "global_attn_every_n_layers": draw(st.integers(1, 4)),
        "layer_types": draw(kinds(layers)),
        # transformers' cache of a window of 1 keeps every position: [-window + 1:] is [0:]
        "sliding_window": draw(st.integers(2, 9)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "mup_enabled": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": draw(st.sampled_from([100.0, 1e4, 1e6])),
        },
        "eos_token_id": None,
        "seed": draw(st.integers(0, 2**20)),
    }


def peer(values: dict):
    """transformers' model with random weights, gains and biases, so that nothing hides."""
    settings = {k: v for k, v in values.items() if k != "seed"}
    config = transformers.AfmoeConfig(**settings, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(values["seed"])
        model = transformers.AfmoeForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif "expert_bias" in name:
                    parameter.normal_(std=0.2)
                else:
                    parameter.normal_(std=0.7 / max(1, parameter.shape[-1]) ** 0.5)
    return model


def tokens_of(values: dict, batch: int = 2, length: int = 23) -> Tensor:
    generator = torch.Generator().manual_seed(values["seed"])
    return torch.randint(values["vocab_size"], (batch, length), generator=generator)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    excess = (ours - theirs).abs() / theirs.abs().clamp(min=1)
    assert excess.max() <= 1e-5, f"logits differ by {excess.max():.1e}"



@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(configurations())
def test_a_checkpoint_of_transformers_computes_the_same(
    tmp_path_factory: pytest.TempPathFactory, values: dict
) -> None:
    theirs = peer(values)
    folder = tmp_path_factory.mktemp("peer")
    theirs.save_pretrained(folder)
    ours = hub.load(folder)
    tokens = tokens_of(values)
    moe = range(values["num_dense_layers"], values["num_hidden_layers"])
    outputs = theirs(tokens, labels=tokens, output_router_logits=bool(moe))
    result = ours(tokens)
    assert_close(result.logits, outputs.logits)
    for routing, layer, logits in zip(
        result.routing, moe, outputs.router_logits or (), strict=True
    ):
        bias = theirs.model.layers[layer].mlp.expert_bias
        expected = (logits.sigmoid() + bias).topk(values["num_experts_per_tok"]).indices
        assert torch.equal(
            routing.experts_TK.sort(-1).values, expected.view_as(routing.experts_TK).sort(-1).values
        )
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -1)], dim=1)
    loss = token_loss(result.logits, targets)
    mean = loss.cross_entropy / loss.tokens
    assert abs(mean.item() - outputs.loss.item()) <= 1e-6 * max(1, outputs.loss.item())
    outputs.loss.backward()
    mean.backward()
    compare_gradients(ours, theirs)
    greedy = theirs.generate(tokens[:, :9], max_new_tokens=14, do_sample=False)
    assert torch.equal(generate(ours, tokens[:, :9], max_new_tokens=14), greedy)


def compare_gradients(ours: Trinity, theirs) -> None:
    """Every gradient within 1e-4 of its tensor's largest (or of a thousandth of all)."""
    holder = copy.deepcopy(ours)
    for parameter, source in zip(holder.parameters(), ours.parameters(), strict=True):
        parameter.data = torch.zeros_like(source) if source.grad is None else source.grad
    mine = hub.views(holder)
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad or not parameter.numel():
            continue
        for key, gradient in split(name, parameter.grad):
            scale = gradient.abs().max().clamp(min=1e-3 * largest)
            error = (mine[key] - gradient).abs().max() / scale
            assert error <= 1e-4, f"gradient of {key} differs by {error:.1e}"


def split(name: str, gradient: Tensor) -> Iterator[tuple[str, Tensor]]:
    """transformers fuses experts in memory; their released names and parts."""
    prefix, _, last = name.rpartition(".")
    if last == "gate_up_proj":
        for e, both in enumerate(gradient):
            gate, up = both.chunk(2)
            yield f"{prefix}.{e}.gate_proj.weight", gate
            yield f"{prefix}.{e}.up_proj.weight", up
    elif last == "down_proj":
        for e, down in enumerate(gradient):
            yield f"{prefix}.{e}.down_proj.weight", down
    else:
        yield name, gradient


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(configurations(), st.integers(1, 12))
def test_left_padded_batches_agree_where_the_mask_is_one(
    tmp_path_factory: pytest.TempPathFactory, values: dict, padding: int
) -> None:
    theirs = peer(values)
    folder = tmp_path_factory.mktemp("peer")
    theirs.save_pretrained(folder)
    ours = hub.load(folder)
    tokens = tokens_of(values, length=15)
    mask = torch.ones_like(tokens)
    mask[1, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    outputs = theirs(tokens, attention_mask=mask, position_ids=positions)
    result = ours(tokens, mask - 1)
    keep = mask.bool()
    assert_close(result.logits[keep], outputs.logits[keep])
    drawn = theirs.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(generate(ours, tokens, mask_BS=mask, max_new_tokens=12), drawn)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(configurations(), st.sampled_from([2_000, 10**9]))
def test_what_is_saved_is_what_transformers_reads(
    tmp_path_factory: pytest.TempPathFactory, values: dict, shard_bytes: int
) -> None:
    folder, again = (tmp_path_factory.mktemp(name) for name in ("theirs", "ours"))
    peer(values).save_pretrained(folder)
    ours = hub.load(folder)
    hub.save(ours, again, shard_bytes=shard_bytes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32)
    tokens = tokens_of(values)
    assert_close(ours(tokens).logits, theirs(tokens).logits)
    copied = hub.load(again)
    assert copied.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, copied.state_dict()[name]), name
    assert ((again / hub.INDEX).exists()) == (len(list(again.glob("*.safetensors"))) > 1)
