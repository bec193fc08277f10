"""Released checkpoints in and out, against transformers' own AFMoE."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from trinity_lib import afmoe, checkpoint, corpus, hub, recipes, tokenizer
from trinity_lib.attention import context
from trinity_lib.config import BadValue, Missing, Refusal, override
from trinity_lib.generate import generate
from trinity_lib.losses import token_loss
from trinity_lib.model import Trinity, count_parameters
from trinity_lib.run import RunConfig
from trinity_lib.train import train

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
    """AFMoE configurations of every kind, and a seed.

    Not the degenerate ones: below width 16 and with an epsilon of 1e-6 transformers' own
    implementations of the experts differ from each other by more than 1e-5.
    """
    layers, experts = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    kv = draw(st.sampled_from([1, 2, 3]))
    return {
        "vocab_size": draw(st.integers(20, 90)),
        "hidden_size": draw(st.integers(2, 8).map(lambda n: 8 * n)),
        "intermediate_size": draw(st.integers(8, 40)),
        "moe_intermediate_size": draw(st.integers(2, 6).map(lambda n: 4 * n)),
        "num_hidden_layers": layers,
        "num_dense_layers": draw(st.integers(0, layers)),
        "num_attention_heads": kv * draw(st.integers(1, 3)),
        "num_key_value_heads": kv,
        "head_dim": draw(st.sampled_from([4, 6, 8, 10, 24])),
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "num_shared_experts": draw(st.integers(0, 3)),
        "route_scale": draw(st.floats(0.5, 3)),
        "global_attn_every_n_layers": draw(st.integers(1, 4)),
        "layer_types": draw(kinds(layers)),
        # transformers' cache of a window of 1 keeps every position: [-window + 1:] is [0:]
        "sliding_window": draw(st.integers(2, 9)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-3])),
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
    config = transformers.AfmoeConfig(**settings)  # sdpa, its default
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
    derandomize=True,
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
            routing.experts_TK.sort(-1).values,
            expected.view_as(routing.experts_TK).sort(-1).values,
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
    mine = afmoe.views(holder)
    largest = max(
        float(p.grad.abs().max())
        for p in theirs.parameters()
        if p.grad is not None and p.numel()
    )
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


@settings(
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
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


@settings(
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
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


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
    "num_hidden_layers": 4, "num_dense_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2,
    "num_shared_experts": 1, "route_scale": 2.448, "sliding_window": 6, "mup_enabled": True,
    "eos_token_id": None, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that transformers wrote."""
    path = tmp_path_factory.mktemp("small")
    peer(SMALL).save_pretrained(path)
    return path


def test_a_head_dimension_may_be_odd_where_no_layer_has_positions(tmp_path: Path) -> None:
    config = afmoe.from_config(SMALL | {"layer_types": ["full_attention"] * 4, "head_dim": 7})
    model = hub.empty(config, "cpu", torch.float32)
    model.initialise(torch.Generator().manual_seed(0))
    hub.save(model, tmp_path / "odd")
    assert hub.load(tmp_path / "odd").config == config
    with pytest.raises(BadValue, match="head_dim is 7; it must be even, for RoPE"):
        afmoe.from_config(SMALL | {"head_dim": 7})


def test_packed_documents_compute_what_they_do_alone_and_transformers_do_not(
    folder: Path,
) -> None:
    ours, theirs = hub.load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    lengths = (9, 1, 14, 6)
    tokens = tokens_of(SMALL, 1, sum(lengths))
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    with torch.no_grad():
        alone = torch.cat([ours(part).logits for part in tokens.split(lengths, 1)], 1)
        assert_close(ours(tokens, documents).logits, alone)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        leaking = theirs(tokens, position_ids=positions).logits
    assert (leaking - alone).abs().max() > 0.1  # its masks never see position_ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_and_gains_stay_fp32(folder: Path, dtype: torch.dtype) -> None:
    exact, model = hub.load(folder), hub.load(folder, dtype=dtype)
    for name, tensor in model.state_dict().items():
        precise = "bias_E" in name or "weight_D" in name
        assert tensor.dtype == (torch.float32 if precise else dtype), name
        if precise:
            assert torch.equal(tensor, exact.state_dict()[name]), name
    assert model(tokens_of(SMALL)).logits.dtype == dtype


def test_a_checkpoint_in_bf16_loads_as_it_is_stored(tmp_path: Path) -> None:
    peer(SMALL).to(torch.bfloat16).save_pretrained(tmp_path)
    model = hub.load(tmp_path)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.norm.weight_D.dtype == model.routers()[0].bias_E.dtype == torch.float32


@pytest.mark.parametrize(
    ("score_func", "route_norm"), [("sigmoid", False), ("softmax", False), ("softmax", True)]
)
def test_scores_and_weights_that_transformers_ignores_are_honoured(
    folder: Path, tmp_path: Path, score_func: str, route_norm: bool
) -> None:
    changed = edit(folder, tmp_path, score_func=score_func, route_norm=route_norm)
    model = hub.load(changed)
    routing = model(tokens_of(SMALL)).routing[0]
    scores = torch.softmax if score_func == "softmax" else torch.sigmoid
    plain = hub.load(folder)
    hidden = plain(tokens_of(SMALL), hidden=True).hidden[1]
    block = plain.blocks[1]
    documents = torch.zeros_like(tokens_of(SMALL))
    shared = context(documents, plain.config.attention, torch.float32)
    mixed = block.attention(block.attention_norm(hidden), shared)
    x = block.mlp_norm(hidden + block.attention_post_norm(mixed)).flatten(0, 1)
    logits = x @ block.router.weight_ED.T
    expected = scores(logits, -1) if score_func == "softmax" else scores(logits)
    torch.testing.assert_close(routing.scores_TE, expected)
    chosen = expected.gather(1, routing.experts_TK)  # as vLLM has it: softmax never normalises
    torch.testing.assert_close(routing.weights_TK, chosen * 2.448)
    again = tmp_path / "again"
    hub.save(model, again)
    saved = json.loads((again / "config.json").read_text())
    assert saved["score_func"] == score_func and saved["route_norm"] is False
    assert hub.load(again).config == model.config


def edit(folder: Path, target: Path, **changes: object) -> Path:
    """A copy of a checkpoint with changed settings; None removes one."""
    copied = target / "edited"
    shutil.copytree(folder, copied)
    settings = json.loads((copied / "config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not None}
    (copied / "config.json").write_text(json.dumps(settings))
    return copied


def test_old_and_new_keys_mean_the_same(folder: Path, tmp_path: Path) -> None:
    old = edit(folder, tmp_path, rope_parameters=None, rope_theta=500.0, n_group=1,
               topk_group=1, load_balance_coeff=0.001)  # fmt: skip
    config = hub.read_config(old)
    assert config.attention.rope_theta == 500.0 and config.load_balance_coeff == 0.001
    saved = afmoe.config_json(config, torch.bfloat16)
    assert saved["rope_theta"] == saved["rope_parameters"]["rope_theta"] == 500.0
    assert saved["load_balance_coeff"] == 0.001 and saved["dtype"] == "bfloat16"
    assert (saved["n_group"], saved["topk_group"]) == (1, 1)
    assert afmoe.from_config(saved) == config


@pytest.mark.parametrize("scale", ["nano", "mini", "large"])
def test_the_published_models_have_the_released_names_and_config(scale: str) -> None:
    config = recipes.SCALES[scale]().model
    saved = afmoe.config_json(config, torch.bfloat16)
    assert afmoe.from_config(saved) == config
    with torch.device("meta"):
        views = afmoe.views(Trinity(config))
    assert sum(v.numel() for v in views.values()) == sum(count_parameters(config)[:2])
    experts, width, hidden = config.router.num_experts, config.width, config.expert_width
    last = f"model.layers.{config.num_layers - 1}.mlp.experts.{experts - 1}"
    assert views[f"{last}.down_proj.weight"].shape == (width, hidden)
    assert f"model.layers.{config.num_dense_layers - 1}.mlp.up_proj.weight" in views


def test_loading_needs_little_more_than_the_model(tmp_path: Path) -> None:
    """Peak memory of a process that loads 300 MB stays below 1.3 times that."""
    config = afmoe.from_config(SMALL | {"hidden_size": 512, "moe_intermediate_size": 256,
                                      "num_experts": 60, "vocab_size": 9000})  # fmt: skip
    model = hub.empty(config, "cpu", torch.float32)
    model.initialise(torch.Generator().manual_seed(0))
    hub.save(model, tmp_path / "big")
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert size > 250e6
    code = f"""
import re
from pathlib import Path
from trinity_lib import hub
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # else the peak is that of the process we left
before = peak()
model = hub.load({str(tmp_path / "big")!r})
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert 0.9 * size < int(out.stdout)
    assert int(out.stdout) < 1.3 * size


def test_ten_steps_of_training_from_a_released_checkpoint_are_read_by_transformers(
    tiny: RunConfig, tmp_path: Path, cache: Path
) -> None:
    values = afmoe.config_json(tiny.model, torch.float32) | {"seed": 5, "eos_token_id": None}
    peer(values).save_pretrained(tmp_path / "released")
    config = override(tiny, {"init": str(tmp_path / "released"), "name": "on"})
    with pytest.raises(BadValue, match="has no tokenizer.json: give tokenizer"):
        train(config, runs=tmp_path, cache=cache)
    tokenizer.of_corpus(corpus.procedural(0), 384, cache).save(tmp_path / "released")
    config = override(config, {"data.tokenizer": str(tmp_path / "released")})
    run = train(config, runs=tmp_path, cache=cache)
    assert run["train"].sizes["step"] == 10 and len(run.attrs["init_sha256"]) == 64
    for stage in ("truebase", "base"):
        folder = tmp_path / "on" / stage
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokens = tokens_of({"vocab_size": tiny.model.vocab_size, "seed": 1})
        with torch.no_grad():
            expected = theirs(tokens, labels=tokens).loss
            logits = checkpoint.load(folder)(tokens).logits
        targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -1)], dim=1)
        loss = token_loss(logits, targets)
        assert abs((loss.cross_entropy / loss.tokens).item() - expected.item()) <= 1e-5
        read = transformers.AutoTokenizer.from_pretrained(folder)
        text = "12 + 30 = 42 and Ada."
        ours = checkpoint.load_vocabulary(folder)
        assert read.encode(text) == ours.tokenizer.encode(text).ids
        assert (read.bos_token, read.eos_token) == (ours.begin, ours.end)


def test_transformers_generates_the_same_from_what_we_saved(
    folder: Path, tmp_path: Path
) -> None:
    model = hub.load(folder)
    hub.save(model, tmp_path / "ours", shard_bytes=30_000)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    prompt = tokens_of(SMALL, 1, 5)
    expected = theirs.generate(prompt, max_new_tokens=24, do_sample=False)
    assert torch.equal(generate(model, prompt, max_new_tokens=24), expected)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def rename(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.bias"] = tensors.pop("model.layers.1.mlp.expert_bias")
    save_file(tensors, folder / "model.safetensors")


def add(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.extra": torch.ones(2)}, folder / "model.safetensors")


def reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / "model.safetensors")


def integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")


def settings_of(**changes: object):
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def index_to_nowhere(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / hub.INDEX).write_text(json.dumps(index))


def torn_index(folder: Path) -> None:
    (folder / hub.INDEX).write_text('{"weight_map": 3}')


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "model.safetensors cannot be read: "),
        (rename, "lacks the tensor model.layers.1.mlp.expert_bias."),
        (add, "has a tensor that the model has not: model.extra."),
        (reshape, "model.norm.weight has shape [7]; its config.json asks for [32]."),
        (integers, "model.norm.weight is stored as I8; read are F64, F32, BF16, F16."),
        (settings_of(n_group=8), "n_group is 8; it must be 1."),
        (settings_of(topk_group=4), "topk_group is 4; it must be "),
        (settings_of(model_type="llama"), "model_type is 'llama'; it must be afmoe."),
        (settings_of(hidden_act="gelu"), "hidden_act is 'gelu'; it must be silu."),
        (settings_of(attention_dropout=0.1), "attention_dropout is 0.1; it must be 0."),
        (
            settings_of(score_func="relu"),
            "score_func is 'relu'; it must be sigmoid or softmax.",
        ),
        (
            settings_of(global_attn_every_n_layers=0),
            "global_attn_every_n_layers is 0; it must be at least 1.",
        ),
        (settings_of(hidden_size=None), "hidden_size is missing."),
        (settings_of(hidden_size="wide"), "hidden_size is 'wide'; it must be a whole number."),
        (
            settings_of(num_experts_per_tok=9),
            "top_k is 9; it must be from 1 to num_experts (8).",
        ),
        (
            settings_of(layer_types=["full_attention"]),
            "it must be one for each of the 4 layers",
        ),
        (
            settings_of(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
            "rope_type is 'yarn'; it must be default: RoPE is not rescaled.",
        ),
        (
            settings_of(quantization_config={"bits": 4}),
            "quantization_config is {'bits': 4}; it",
        ),
        (empty_folder, "is no checkpoint: it has no config.json."),
        (pickled, "holds pytorch_model.bin, which is a pickle; only safetensors are read."),
        (no_weights, "is no checkpoint: it has neither model.safetensors nor "),
        (no_json, "config.json is not JSON: "),
        (index_to_nowhere, "lacks model-00001-of-00002.safetensors, which "),
        (torn_index, "is not an index: "),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:30]),
)
def test_a_broken_checkpoint_is_one_sentence(
    folder: Path, tmp_path: Path, damage, sentence: str, capsys, monkeypatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    damage(broken)
    with pytest.raises(Refusal) as error:
        hub.load(broken)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr(sys, "argv", ["hub", str(broken)])
    with pytest.raises(SystemExit) as ended:
        hub.main()
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert shown.err.strip() == str(error.value) and not shown.out


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub(monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    unreached = LocalEntryNotFoundError("Got: ConnectError: no network\nAn error happened")
    unreached.__cause__ = ConnectionError("no network")
    unknown = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    unknown.args = ("404 Client Error.\nRepository Not Found",)
    for error, sentence in (
        (unreached, "could not be reached: no network."),
        (LocalEntryNotFoundError("not cached"), "could not be reached: not cached."),
        (unknown, "gives none of the name: 404 Client Error."),
        (OSError("the disk is full\nand more"), "did not give it: the disk is full."),
    ):

        def fails(name: str, *, error: Exception = error, **_: object) -> str:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
        with pytest.raises(Missing) as caught:
            hub.load("arcee-ai/x")
        about = "arcee-ai/x is no folder here, and the Hugging Face hub"
        assert str(caught.value) == f"{about} {sentence}"


def test_the_command_describes_a_checkpoint(folder: Path) -> None:
    words = [sys.executable, "-m", "trinity_lib.hub"]
    done = subprocess.run([*words, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count = count_parameters(hub.read_config(folder))
    assert f"{count.total:,}" in done.stdout and f"{count.active:,}" in done.stdout
    size = 4 * (count.total + count.expert_bias)
    assert f"{size:,} bytes" in done.stdout
    bias = hub.load(folder).routers()[0].bias_E
    assert f"{bias.mean():+.5f}" in done.stdout and f"{bias.max():+.5f}" in done.stdout
    done = subprocess.run([*words, "/nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "/nowhere is no checkpoint: it has no config.json."
