"""AFMoE checkpoints in and out: config.json and safetensors, as released.

One list of names, `views`, serves both directions: every released tensor is a view of a
parameter, so that experts are split and stacked without a copy of the whole.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trinity_lib import disk
from trinity_lib.attention import AttentionConfig, RMSNorm
from trinity_lib.config import BadValue, Missing, first_line, one_sentence
from trinity_lib.model import ModelConfig, Trinity, count_parameters
from trinity_lib.routing import RouterConfig
from trinity_lib.tokenizer import Vocabulary

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest shard that `save` writes unless told otherwise."""
AT_ONCE = 256 * 10**6
"""Bytes read before a file is closed, so that its mapped pages are given back."""
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
    "model_type": ("afmoe",),
    "hidden_act": (None, "silu", "swish"),
    "attention_dropout": (None, 0, 0.0),
    "n_group": (None, 1),
    "topk_group": (None, 1),
    "num_expert_groups": (None, 1),
    "num_limited_groups": (None, 1),
    "quantization_config": (None,),
}
"""Keys of a config.json that this library knows one meaning of."""


class Stored(NamedTuple):
    """A checkpoint folder whose names, shapes and files have been checked."""

    config: ModelConfig
    """The model's shape."""
    files: dict[str, Path]
    """Which file holds a tensor."""
    dtypes: dict[str, torch.dtype]
    """What a tensor is stored in."""
    shapes: dict[str, tuple[int, ...]]
    """And its shape."""

    def bytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize


def views(model: Trinity) -> dict[str, Tensor]:
    """Every released tensor's name, and the view of a parameter that it is."""
    found: dict[str, Tensor] = {"model.embed_tokens.weight": model.embedding.weight}
    for i, block in enumerate(model.blocks):
        found |= {f"model.layers.{i}.{name}": view for name, view in _block(block)}
    found["model.norm.weight"] = model.norm.weight_D
    if model.head is not None:
        found["lm_head.weight"] = model.head.weight
    return {name: view.detach() for name, view in found.items()}


def _block(block: Any) -> Iterator[tuple[str, Tensor]]:
    yield "input_layernorm.weight", block.attention_norm.weight_D
    yield "post_attention_layernorm.weight", block.attention_post_norm.weight_D
    yield "pre_mlp_layernorm.weight", block.mlp_norm.weight_D
    yield "post_mlp_layernorm.weight", block.mlp_post_norm.weight_D
    attention = block.attention
    for theirs, ours in (
        ("q_proj", attention.query),
        ("k_proj", attention.key),
        ("v_proj", attention.value),
        ("o_proj", attention.out),
        ("gate_proj", attention.gate),
    ):
        yield f"self_attn.{theirs}.weight", ours.weight
        if ours.bias is not None:
            yield f"self_attn.{theirs}.bias", ours.bias
    yield "self_attn.q_norm.weight", attention.query_norm.weight_D
    yield "self_attn.k_norm.weight", attention.key_norm.weight_D
    if block.dense is not None:
        yield from _feed_forward("mlp", block.dense)
        return
    yield "mlp.router.gate.weight", block.router.weight_ED
    yield "mlp.expert_bias", block.router.bias_E
    if block.shared is not None:
        yield from _feed_forward("mlp.shared_experts", block.shared)
    experts = block.experts
    for e in range(len(experts.gate_EFD)):
        yield f"mlp.experts.{e}.gate_proj.weight", experts.gate_EFD[e]
        yield f"mlp.experts.{e}.up_proj.weight", experts.up_EFD[e]
        yield f"mlp.experts.{e}.down_proj.weight", experts.down_EFD[e].T


def _feed_forward(prefix: str, network: Any) -> Iterator[tuple[str, Tensor]]:
    for name in ("gate", "up", "down"):
        yield f"{prefix}.{name}_proj.weight", getattr(network, name).weight


def load(
    folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> Trinity:
    """The model of a released checkpoint: a folder, or OWNER/NAME on the Hugging Face hub.

    Weights come in `dtype`, by default what they are stored in; selection biases and norm
    gains are fp32 in any case, because bf16 would round a whole SMEBU step away. Tensors are
    read one after another into the model, so that memory stays near the model's own size.
    Raises Missing where there is no checkpoint, BadValue naming a tensor that is missing, too
    many or misshapen, or a setting this library has no meaning for.
    """
    folder = _local(folder)
    stored = inspect(folder)
    main = stored.dtypes["model.embed_tokens.weight"] if dtype is None else dtype
    model = empty(stored.config, device, main)
    targets = views(model)
    for file, names in _by_file(stored):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in names:
                    if name in targets:
                        targets[name].copy_(tensors.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise BadValue(f"{file} cannot be read: {first_line(error)}.") from error
    return model


def empty(config: ModelConfig, device: str, dtype: torch.dtype) -> Trinity:
    """A model without values: biases and gains fp32 (or better), all else in `dtype`."""
    with torch.device("meta"):
        model = Trinity(config).to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight_D = nn.Parameter(module.weight_D.to(precise))
    for router in model.routers():
        router.bias_E = router.bias_E.to(precise)
    return model.to_empty(device=device)


def save(
    model: Trinity,
    folder: str | Path,
    *,
    tokenizer: Vocabulary | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the released layout: config.json, one tensor an expert, shards with an index.

    The folder is written whole or not at all. Tensors keep the model's dtypes.
    """
    if shard_bytes < 1:
        raise BadValue(f"shard_bytes is {shard_bytes}; it must be at least 1.")
    disk.replace_folder(
        Path(folder),
        lambda temporary: write(model, temporary, tokenizer=tokenizer, shard_bytes=shard_bytes),
    )


def write(
    model: Trinity,
    folder: Path,
    *,
    tokenizer: Vocabulary | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The files of `save`, into a folder that is there."""
    _write_weights(model, folder, shard_bytes)
    settings = config_json(model.config, model.embedding.weight.dtype)
    if tokenizer is not None:
        tokenizer.save(folder)
        settings |= tokenizer.ids
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _write_weights(model: Trinity, folder: Path, shard_bytes: int) -> None:
    """One file, or shards of at most `shard_bytes` and their index."""
    every = views(model)
    for i, block in enumerate(model.blocks):
        if block.is_moe and block.shared is None:  # as transformers has them
            every |= _no_shared(f"model.layers.{i}.mlp.shared_experts", model)
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, view in every.items():
        size = view.numel() * view.element_size()
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = view
        filled += size
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = WEIGHTS
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: view.cpu().contiguous() for key, view in shard.items()}
        (folder / name).touch()  # with the user's own permissions, which save_file narrows
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(view.numel() * view.element_size() for view in every.values())
        about = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(about, indent=2, sort_keys=True))


def _no_shared(prefix: str, model: Trinity) -> dict[str, Tensor]:
    like, width = model.embedding.weight, model.config.width
    shapes = {"gate": (0, width), "up": (0, width), "down": (width, 0)}
    return {f"{prefix}.{k}_proj.weight": like.new_empty(shape) for k, shape in shapes.items()}


def inspect(folder: Path) -> Stored:
    """Check a checkpoint folder by its configuration and file headers; nothing is loaded."""
    config = read_config(folder)
    files = _files(folder)
    dtypes, shapes = {}, {}
    for file in sorted(set(files.values())):
        for name, dtype, shape in _header(file):
            if files.get(name) == file:
                dtypes[name], shapes[name] = dtype, shape
            elif name not in files:
                files[name], dtypes[name], shapes[name] = file, dtype, shape
    with torch.device("meta"):
        expected = {name: tuple(view.shape) for name, view in views(Trinity(config)).items()}
    for name, shape in expected.items():
        if name not in shapes:
            raise BadValue(f"{folder} lacks the tensor {name}.")
        if shapes[name] != shape:
            raise BadValue(
                f"{folder}: {name} has shape {list(shapes[name])}; its {CONFIG} asks for "
                f"{list(shape)}."
            )
    for name, shape in shapes.items():
        tied = config.tied and name == "lm_head.weight"
        if name not in expected and 0 not in shape and not tied:
            raise BadValue(f"{folder} has a tensor that the model has not: {name}.")
    return Stored(config, files, dtypes, shapes)


def read_config(folder: Path) -> ModelConfig:
    """The model's shape by its config.json; BadValue for a setting without a meaning here."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Missing(f"{folder} is no checkpoint: it has no {CONFIG}.") from error
    except (OSError, ValueError) as error:
        raise BadValue(f"{folder / CONFIG} is not JSON: {first_line(error)}.") from error
    if not isinstance(values, dict):
        raise BadValue(f"{folder / CONFIG} is not a JSON object.")
    try:
        return from_config(values)
    except ValueError as error:
        raise BadValue(f"{folder / CONFIG}: {error}") from error


def from_config(values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig from AFMoE's keys, the older and the newer; defaults are transformers'."""
    for key in REQUIRED:
        if values.get(key) is None:
            raise BadValue(f"{key} is missing.")
    for key, known in FIXED.items():
        if values.get(key) not in known and (key != "model_type" or key in values):
            right = " or ".join(map(str, known))
            raise BadValue(f"{key} is {values[key]!r}; it must be {right}.")
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    every = _or(values, "global_attn_every_n_layers", 4)
    kinds = tuple(values.get("layer_types") or ())
    if kinds == tuple(SLIDING if (i + 1) % every else FULL for i in range(layers)):
        kinds = ()
    score = _or(values, "score_func", "sigmoid")
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


def _local(folder: str | Path) -> Path:
    """A folder as it is; OWNER/NAME through huggingface_hub's snapshot download."""
    path = Path(folder)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        return path
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(str(folder), allow_patterns=patterns))
    except Exception as error:  # the package and the network raise all sorts
        raise Missing(
            f"There is no folder {folder}, and the Hugging Face hub gives none of the name: "
            f"{first_line(error)}."
        ) from error


def _files(folder: Path) -> dict[str, Path]:
    """Tensor -> file by the index, or the one file's tensors."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            files = {name: folder / file for name, file in index.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadValue(f"{folder / INDEX} is not an index: {first_line(error)}.") from error
        for file in sorted(set(files.values())):
            if not file.is_file():
                raise Missing(f"{folder} lacks {file.name}, which {INDEX} lists.")
        return files
    if (folder / WEIGHTS).is_file():
        return {name: folder / WEIGHTS for name, _, _ in _header(folder / WEIGHTS)}
    if pickled := sorted(p.name for p in folder.glob("*.bin")):
        raise BadValue(
            f"{folder} holds {pickled[0]}, which is a pickle; only safetensors are read."
        )
    raise Missing(f"{folder} is no checkpoint: it has neither {WEIGHTS} nor {INDEX}.")


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""What weights may be stored in, by safetensors' names."""


def _header(file: Path) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of a file's tensors; BadValue where it is cut short."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                part = tensors.get_slice(name)
                if (dtype := DTYPES.get(part.get_dtype())) is None:
                    raise BadValue(
                        f"{file}: {name} is stored as {part.get_dtype()}; read are "
                        f"{', '.join(DTYPES)}."
                    )
                yield name, dtype, tuple(part.get_shape())
    except (SafetensorError, OSError) as error:
        raise BadValue(f"{file} cannot be read: {first_line(error)}.") from error


def _by_file(stored: Stored) -> Iterator[tuple[Path, list[str]]]:
    """Names in groups of one file and at most AT_ONCE bytes."""
    for file in sorted(set(stored.files.values())):
        group: list[str] = []
        size = 0
        for name in (n for n, f in stored.files.items() if f == file):
            group.append(name)
            size += stored.bytes(name)
            if size > AT_ONCE:
                yield file, group
                group, size = [], 0
        if group:
            yield file, group


def main() -> None:
    """Print what a checkpoint is: configuration, parameters, bytes, selection biases."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", help="an AFMoE checkpoint, or OWNER/NAME on the hub")
    given = parser.parse_args()
    with one_sentence():
        print(describe(_local(given.folder)))


def describe(folder: Path) -> str:
    """The text of `main`; weights other than selection biases are not read."""
    stored = inspect(folder)
    count = count_parameters(stored.config)
    sizes: dict[torch.dtype, int] = {}
    for name, dtype in stored.dtypes.items():
        sizes[dtype] = sizes.get(dtype, 0) + stored.bytes(name)
    lines = [
        json.dumps(config_json(stored.config, stored.dtypes["model.embed_tokens.weight"])),
        f"parameters          {count.total:>19,}",
        f"  expert biases     {count.expert_bias:>19,}",
        f"  active            {count.active:>19,}  (one token, no embedding, no head)",
        f"  with head         {count.active_with_head:>19,}",
        f"  with embeddings   {count.active_with_embeddings:>19,}",
        *(
            f"{str(dtype):20}{size:>19,} bytes"
            for dtype, size in sorted(sizes.items(), key=str)
        ),
        "layer    mean bias     std     lowest    highest",
    ]
    for layer in stored.config.moe_layers:
        name = f"model.layers.{layer}.mlp.expert_bias"
        with safe_open(stored.files[name], framework="pt") as tensors:
            bias_E = tensors.get_tensor(name).double()
        figures = (bias_E.mean(), bias_E.std(unbiased=False), bias_E.min(), bias_E.max())
        lines.append(f"{layer:>5}  " + "  ".join(f"{float(each):+9.5f}" for each in figures))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
