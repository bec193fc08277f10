"""The AFMoE architecture as released: names of tensors, keys of config.json.

One list of names, `places`, serves reading and writing: every released tensor is a view of a
parameter, so that experts are split and stacked without a copy of the whole.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trinity_lib.attention import AttentionConfig
from trinity_lib.config import BadValue, convert, require
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.routing import RouterConfig

SLIDING, FULL = "sliding_attention", "full_attention"
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
)
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("afmoe", None),
    "hidden_act": ("silu", "swish", None),
    "attention_dropout": (0, None),
    "n_group": (1, None),
    "topk_group": (1, None),
    "num_expert_groups": (1, None),
    "num_limited_groups": (1, None),
    "quantization_config": (None,),
}
"""Keys of a config.json that this library knows one meaning of, the plainest value first."""


class Place(NamedTuple):
    """Where a released tensor is kept: a parameter or bias, or one expert's part of one."""

    name: str
    """Of the parameter or buffer."""
    expert: int | None = None
    """Which entry of its first axis; None: all of it."""
    transposed: bool = False
    """Whether it is stored transposed."""

    def view(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The released tensor, as a view of what holds it."""
        whole = tensors[self.name].detach()
        part = whole if self.expert is None else whole[self.expert]
        return part.T if self.transposed else part


def views(model: Trinity) -> dict[str, Tensor]:
    """Every released tensor's name, and the view of a parameter that it is."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: place.view(tensors) for name, place in places(model.config).items()}


def places(config: ModelConfig) -> dict[str, Place]:
    """Every released tensor's name, and where it is kept."""
    found = {"model.embed_tokens.weight": Place("embedding.weight")}
    for i in range(config.num_layers):
        for name, place in _block(config, i):
            ours = f"blocks.{i}.{place.name}"
            found[f"model.layers.{i}.{name}"] = place._replace(name=ours)
    found["model.norm.weight"] = Place("norm.weight_D")
    if not config.tied:
        found["lm_head.weight"] = Place("head.weight")
    return found


def _block(config: ModelConfig, layer: int) -> Iterator[tuple[str, Place]]:
    yield "input_layernorm.weight", Place("attention_norm.weight_D")
    yield "post_attention_layernorm.weight", Place("attention_post_norm.weight_D")
    yield "pre_mlp_layernorm.weight", Place("mlp_norm.weight_D")
    yield "post_mlp_layernorm.weight", Place("mlp_post_norm.weight_D")
    for theirs, ours in (
        ("q_proj", "query"),
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("o_proj", "out"),
        ("gate_proj", "gate"),
    ):
        yield f"self_attn.{theirs}.weight", Place(f"attention.{ours}.weight")
        if config.attention.bias and ours != "gate":
            yield f"self_attn.{theirs}.bias", Place(f"attention.{ours}.bias")
    yield "self_attn.q_norm.weight", Place("attention.query_norm.weight_D")
    yield "self_attn.k_norm.weight", Place("attention.key_norm.weight_D")
    if layer not in config.moe_layers:
        yield from _feed_forward("mlp", "dense")
        return
    yield "mlp.router.gate.weight", Place("router.weight_ED")
    yield "mlp.expert_bias", Place("router.bias_E")
    if config.num_shared_experts:
        yield from _feed_forward("mlp.shared_experts", "shared")
    for e in range(config.router.num_experts):
        yield f"mlp.experts.{e}.gate_proj.weight", Place("experts.gate_EFD", e)
        yield f"mlp.experts.{e}.up_proj.weight", Place("experts.up_EFD", e)
        yield f"mlp.experts.{e}.down_proj.weight", Place("experts.down_EFD", e, True)


def _feed_forward(theirs: str, ours: str) -> Iterator[tuple[str, Place]]:
    for name in ("gate", "up", "down"):
        yield f"{theirs}.{name}_proj.weight", Place(f"{ours}.{name}.weight")


def from_config(values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from AFMoE's keys, the older and the newer; defaults are transformers'."""
    for key in REQUIRED:
        if values.get(key) is None:
            raise BadValue(f"{key} is missing.")
        convert(int, values[key], key)
    for key, known in FIXED.items():
        right = "left out" if known[0] is None else str(known[0])
        require(values.get(key) in known, key, values.get(key), right)
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    every = convert(
        int, _or(values, "global_attn_every_n_layers", 4), "global_attn_every_n_layers"
    )
    require(every >= 1, "global_attn_every_n_layers", every, "at least 1")
    kinds = tuple(values.get("layer_types") or ())
    if kinds == tuple(SLIDING if (i + 1) % every else FULL for i in range(layers)):
        kinds = ()
    score = _or(values, "score_func", "sigmoid")
    require(score in ("sigmoid", "softmax"), "score_func", score, "sigmoid or softmax")
    return ModelConfig(
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_layers=layers,
        num_dense_layers=_or(values, "num_dense_layers", 1),
        dense_width=values["intermediate_size"],
        expert_width=values["moe_intermediate_size"],
        num_shared_experts=_or(values, "num_shared_experts", 2),
        global_every=every,
        layer_types=kinds,
        norm_eps=_or(values, "rms_norm_eps", 1e-5),
        tied=_or(values, "tie_word_embeddings", False),
        scale_embedding=_or(values, "mup_enabled", False),
        max_positions=_or(values, "max_position_embeddings", 16_384),
        load_balance_coeff=values.get("load_balance_coeff"),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=_or(values, "num_key_value_heads", heads),
            head_dim=_or(values, "head_dim", 128),
            window=_or(values, "sliding_window", 1024),
            rope_theta=_theta(values),
            bias=_or(values, "attention_bias", False),
        ),
        router=RouterConfig(
            num_experts=values["num_experts"],
            top_k=values["num_experts_per_tok"],
            route_scale=_or(values, "route_scale", 1.0),
            score=score,
            normalise=score == "sigmoid" and _or(values, "route_norm", True),
        ),
    )


def _or(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    return default if value is None else value


def _theta(values: Mapping[str, Any]) -> float:
    """RoPE's base from either spelling; BadValue where positions are rescaled."""
    new, old = values.get("rope_parameters") or {}, values.get("rope_scaling") or {}
    kind = new.get("rope_type") or old.get("rope_type") or old.get("type") or "default"
    if kind != "default":
        raise BadValue(f"rope_type is {kind!r}; it must be default: RoPE is not rescaled.")
    return _or(new, "rope_theta", _or(values, "rope_theta", 10_000.0))


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """AFMoE's config.json, with the keys of old readers and of new ones."""
    attention, router = config.attention, config.router
    kinds = [FULL if config.is_global(i) else SLIDING for i in range(config.num_layers)]
    return {
        "architectures": ["AfmoeForCausalLM"],
        "model_type": "afmoe",
        "attention_bias": attention.bias,
        "attention_dropout": 0.0,
        "dtype": str(dtype).removeprefix("torch."),
        "global_attn_every_n_layers": config.global_every,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.dense_width,
        "layer_types": kinds,
        "load_balance_coeff": config.load_balance_coeff,
        "max_position_embeddings": config.max_positions,
        "moe_intermediate_size": config.expert_width,
        "mup_enabled": config.scale_embedding,
        "n_group": 1,
        "num_attention_heads": attention.num_heads,
        "num_dense_layers": config.num_dense_layers,
        "num_expert_groups": 1,
        "num_experts": router.num_experts,
        "num_experts_per_tok": router.top_k,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": attention.num_kv_heads,
        "num_limited_groups": 1,
        "num_shared_experts": config.num_shared_experts,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": attention.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "rope_theta": attention.rope_theta,
        "route_norm": router.normalise,
        "route_scale": router.route_scale,
        "score_func": router.score,
        "sliding_window": attention.window,
        "tie_word_embeddings": config.tied,
        "topk_group": 1,
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
