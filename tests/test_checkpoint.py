"""Checkpoint folders: whole or refused, and nothing pickled."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trinity_lib import checkpoint, tokenizer
from trinity_lib.checkpoint import State
from trinity_lib.config import BadValue, Missing
from trinity_lib.model import ModelConfig, Trinity

PACKAGE = Path(checkpoint.__file__).parent


@pytest.fixture
def model(tiny_model: ModelConfig) -> Trinity:
    made = Trinity(tiny_model)
    made.initialise(torch.Generator().manual_seed(0))
    made.load_bias(torch.arange(24.0).view(3, 8))
    return made


def save(folder: Path, model: Trinity, step: int = 7) -> Path:
    facts = {"step": step, "losses": [0.1, 1e-300], "big": 2**100}
    state = State(facts, {"a": torch.arange(3), "b": torch.tensor(2.5, dtype=torch.float64)})
    checkpoint.save(folder, model, tokenizer.train(["some text"] * 3, 258), "{}", state)
    return folder


def test_everything_comes_back_to_the_bit(model: Trinity, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", model)
    again = checkpoint.load(folder)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    state = checkpoint.load_state(folder)
    assert state.facts == {"step": 7, "losses": [0.1, 1e-300], "big": 2**100}
    assert torch.equal(state.tensors["a"], torch.arange(3)) and state.tensors["b"] == 2.5
    assert checkpoint.load_vocabulary(folder).end == tokenizer.END
    assert checkpoint.verify(folder)["step"] == 7


def test_tensors_come_back_aligned(model: Trinity, tmp_path: Path) -> None:
    """As mapped from the file they are not, and matrix products would round differently."""
    folder = save(tmp_path / "a", model)
    again = [*checkpoint.load(folder).state_dict().values()]
    again += checkpoint.load_state(folder).tensors.values()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in again)


def test_weights_of_any_dtype_keep_it(model: Trinity, tmp_path: Path) -> None:
    again = checkpoint.load(save(tmp_path / "a", model.to(torch.bfloat16)))
    assert again.embedding.weight.dtype == torch.bfloat16


def test_an_older_checkpoint_of_the_name_is_replaced(model: Trinity, tmp_path: Path) -> None:
    save(tmp_path / "a", model, 1)
    save(tmp_path / "a", model, 2)
    assert checkpoint.verify(tmp_path / "a")["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_newest_is_the_one_of_the_highest_step(model: Trinity, tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for name, step in (("step-00000006", 6), ("truebase", 8), ("step-00000009", 9)):
        save(tmp_path / name, model, step)
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000009"
    checkpoint.rotate(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000009", "truebase"]


def rewrite(folder: Path, change) -> None:
    """Change the weights and the manifest with them, as a tool of another's might."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = checkpoint.described(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("model.norm.weight"), "a lacks the tensor model.norm.weight"),
        (
            lambda t: t.update(extra=torch.ones(1)),
            "a has a tensor that the model has not: extra",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            r"model.norm.weight has shape \[5\]; its config.json asks for \[32\]",
        ),
    ],
)
def test_weights_that_are_not_the_configurations_are_refused(
    model: Trinity, tmp_path: Path, change, sentence: str
) -> None:
    folder = save(tmp_path / "a", model)
    rewrite(folder, change)
    with pytest.raises(BadValue, match=sentence):
        checkpoint.load(folder)


def test_a_folder_that_is_none_is_refused(model: Trinity, tmp_path: Path) -> None:
    with pytest.raises(Missing, match="is no checkpoint: it has no config.json"):
        checkpoint.load(tmp_path)
    folder = save(tmp_path / "a", model)
    for content, sentence in (
        ("{", "config.json is damaged|has .* bytes and was written with"),
        ("", "config.json has 0 bytes and was written with"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(BadValue, match=sentence):
            checkpoint.load(folder)


def test_nothing_is_pickled(model: Trinity, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", model)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    for path in PACKAGE.glob("*.py"):
        code = path.read_text()
        for word in (
            "import pickle",
            "torch.load(",
            "torch.save(",
            "allow_pickle=True",
            "dill",
        ):
            assert word not in code, f"{path.name}: {word}"
