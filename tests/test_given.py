"""Checkpoints that a user brings: written by transformers, with and without what they need."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from tokenizers import AddedToken

from tests import chained, conversing
from trinity_lib import (
    audit,
    card,
    chat,
    corpus,
    given,
    hub,
    items,
    lm_tasks,
    planted,
    tokenizer,
    truebase,
    truebase_config,
)
from trinity_lib.config import BadValue, Missing, Refusal
from trinity_lib.data import IGNORE
from trinity_lib.subject import Finding
from trinity_lib.tokenizer import Vocabulary
from trinity_lib.truebase_config import TruebaseConfig

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
GROUPS = ("weight_drift", "expert_drift", "stage_routing", "routing_change", "functional",
          "path")  # fmt: skip
TEXTS = (
    ["the bird sings of the river " * 30, "a short one"],
    [f"{n} + {n} = {2 * n}\n" * 4 for n in range(9)],
)


def released(folder: Path, noise: float, **changes: int) -> Path:
    """A tiny AFMoE checkpoint as transformers writes it: one model and some noise."""
    values = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48,
              "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_dense_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
              "num_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8}  # fmt: skip
    config = transformers.AfmoeConfig(**values | changes)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AfmoeForCausalLM(config)
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    conversing.vocabulary().save(folder)
    return folder


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("given")
    noises = {"truebase": 0.0, "base": 0.01, "instruct": 0.02}
    return {stage: released(place / stage, noise) for stage, noise in noises.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Items and texts."""
    place = tmp_path_factory.mktemp("files")
    asked = [
        {"prompt": f"{a} + {b} =", "choices": [f" {a + b}", f" {a + b + 3}"], "answer": 0,
         "group": "small" if a < 3 else "large"}
        for a in range(6) for b in range(3)
    ]  # fmt: skip
    texts = [
        {"text": text, "domain": domain}
        for domain, own in zip(("prose", "sums"), TEXTS, strict=True)
        for text in own
    ]
    return {
        "items": conversing.jsonl(place / "items.jsonl", asked),
        "texts": conversing.jsonl(place / "texts.jsonl", texts),
    }


def settings(folders: dict[str, Path], **changes: object) -> TruebaseConfig:
    at = tuple((stage, str(folder)) for stage, folder in folders.items())
    return TruebaseConfig(**{"checkpoints": at, "name": "mine"} | changes)  # type: ignore[arg-type]


def copied(triple: dict[str, Path], place: Path) -> dict[str, Path]:
    return {s: Path(shutil.copytree(folder, place / s)) for s, folder in triple.items()}


def look(config: TruebaseConfig, cache: Path) -> given.Given:
    return given.look(config, cache, lambda _: None)


def test_a_released_triple_is_asked_and_compared(
    triple: dict[str, Path], files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    tree = truebase.run(settings(triple, **files), runs=tmp_path, cache=cache)
    assert tree.attrs["status"] == "complete"
    assert set(tree.children) == {"findings", *GROUPS}
    found = chained.table(tree)
    assert set(found["of_stage"]) == set(triple) and set(found["family"]) == {"items"}
    assert set(found["item"]) == {"small", "large", "all"}
    assert (found["model_seed"] == -1).all() and (found["asked_as"] == "text").all()
    assert tree["functional"].domain.values.tolist() == ["prose", "sums"]
    changes = ["truebase -> base", "base -> instruct", "truebase -> instruct"]
    assert tree["path"].change.values.tolist() == changes
    assert (tree["path"].alpha.values != -0.5).any()
    assert (tree["weight_drift"]["moved"] >= 0).all()
    assert float(tree["weight_drift"]["moved"].max()) > 0
    left_out = json.loads(tree.attrs["left_out"])
    assert set(audit.FAMILIES) <= set(left_out) and lm_tasks.FAMILY in left_out
    assert items.FAMILY not in left_out and all(left_out.values())
    assert "relearning" in " ".join(left_out)
    hashes = json.loads(tree.attrs["checkpoints_sha256"])
    for stage, folder in triple.items():
        made = card.read(tmp_path / "mine" / "cards" / stage / card.JSON)
        assert card.verify(made, folder) == [] and made["not-asked"] == left_out
        assert set(made["data"]) == {"items", "texts"} and not made["run"]
        assert hashes[stage] == made["checkpoint"]["weights"]


def test_the_same_checkpoints_give_the_same(
    triple: dict[str, Path], files: dict[str, str], cache: Path
) -> None:
    config = settings(triple, **files)
    one, other = look(config, cache), look(config, cache)
    assert chained.alike(one.said["base"], other.said["base"])
    assert all(one.groups[name].identical(other.groups[name]) for name in GROUPS)
    read = settings(triple, reader="transformers", **files)
    for stage, said in look(read, cache).said.items():
        assert chained.alike(one.said[stage], said, within=1e-4)


def test_one_without_a_tokenizer_is_read_with_anothers_and_not_asked(
    triple: dict[str, Path], files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    bare = copied(triple, tmp_path)
    (bare["base"] / tokenizer.FILE).unlink()
    found = look(settings(bare, **files), cache)
    whole = look(settings(triple, **files), cache)
    for name, group in whole.groups.items():
        xr.testing.assert_identical(found.groups[name], group)
    assert found.said["base"] == [] and found.said["truebase"] and found.said["instruct"]
    lacks = "the folder has no tokenizer.json"
    assert found.left_out["questions to base"] == lacks
    assert found.left_out["tokenizer of base"].startswith(lacks)
    assert "questions to truebase" not in found.left_out


def test_without_any_tokenizer_rows_are_random_and_that_is_said(
    triple: dict[str, Path], files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    bare = copied(triple, tmp_path)
    for folder in bare.values():
        (folder / tokenizer.FILE).unlink()
    found = look(settings(bare, **files), cache)
    assert list(found.groups["functional"]["domain"].values) == ["random tokens"]
    assert {"routing_change", "path", "weight_drift"} <= set(found.groups)
    assert "random tokens" in found.left_out["texts"]
    assert not any(found.said.values())


def test_a_tokenizer_that_is_too_large_for_its_model_is_not_used(
    triple: dict[str, Path], files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    small = released(tmp_path / "small", 0.0, vocab_size=300)
    found = look(settings({"small": small}, **files), cache)
    why = found.left_out["questions to small"]
    assert why == "its tokenizer has 384 entries and the model 300"


def test_tokenizers_that_read_differently_share_no_rows(
    triple: dict[str, Path], files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    mixed = copied(triple, tmp_path)
    tokenizer.train(corpus.procedural(1).sample(20_000), 300).save(mixed["instruct"])
    found = look(settings(mixed, **files), cache)
    assert set(found.groups) == {"weight_drift", "expert_drift"} and found.said["instruct"]
    why = "the checkpoints' tokenizers read the texts differently"
    assert found.left_out["routing, predictions, paths"] == why


def test_other_shapes_are_not_compared(
    triple: dict[str, Path], files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    other = released(tmp_path / "other", 0.0, num_experts=5)
    found = look(settings({"one": triple["base"], "other": other}, **files), cache)
    assert found.groups == {} and found.said["one"] and found.said["other"]
    why = "other is another model than one: router.num_experts is 5 and was 6"
    assert found.left_out["comparisons"] == why


def test_dense_models_are_compared_but_for_routing(
    files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    noises = (("a", 0.0), ("b", 0.01), ("c", 0.02))
    dense = {n: released(tmp_path / n, noise, num_dense_layers=3) for n, noise in noises}
    tree = truebase.run(settings(dense, **files), runs=tmp_path / "runs", cache=cache)
    assert set(tree.children) == {"findings", "weight_drift", "functional", "path"}
    left_out = json.loads(tree.attrs["left_out"])
    assert left_out["routing"] == "the models have no experts" and "comparisons" not in left_out
    changes = ["a -> b", "b -> c", "a -> c"]
    for name in ("weight_drift", "functional", "path"):
        assert tree[name].change.values.tolist() == changes
    ends = tree["path"]["loss"].sel(alpha=[0.0, 1.0]).values
    assert ends[0, 1] == ends[1, 0] and ends[2].tolist() == [ends[0, 0], ends[1, 1]]
    assert (tree["functional"]["divergence"] > 0).all()


def test_another_vocabulary_leaves_routing_to_be_compared(
    triple: dict[str, Path], files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    """A vocabulary that is padded, as when marks of turns are added: on texts."""
    padded = released(tmp_path / "padded", 0.01, vocab_size=400)
    found = look(settings({"one": triple["truebase"], "other": padded}, **files), cache)
    assert set(found.groups) == {"stage_routing", "routing_change"}
    why = "other is another model than one: vocab_size is 400 and was 384"
    assert [found.left_out[each] for each in ("weights", "predictions", "paths")] == [why] * 3
    assert not {"comparisons", "routing", "texts"} & set(found.left_out)
    small = {"one": triple["truebase"], "small": released(tmp_path / "s", 0.0, vocab_size=300)}
    found = look(settings(small, **files), cache)
    assert set(found.groups) == {"stage_routing", "routing_change"}
    assert "routing" not in found.left_out
    (tmp_path / "long.txt").write_text(TEXTS[0][0])
    config = settings(small, texts=str(tmp_path / "long.txt"))
    rows = given._rows(small, given._texts(config, cache), 0, left_out := {})
    assert rows is not None and list(rows) == ["random tokens"]
    assert rows["random tokens"].tokens_BS.max() < 300
    assert "tokens that one of the models lacks" in left_out["texts"]


def test_the_same_routing_is_found_beside_another_vocabulary(
    triple: dict[str, Path], files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    """Of a stage whose vocabulary is padded without a change to any other weight."""
    padded = tmp_path / "padded"
    model = transformers.AutoModelForCausalLM.from_pretrained(triple["instruct"])
    model.resize_token_embeddings(400, mean_resizing=False)
    model.save_pretrained(padded)
    conversing.vocabulary().save(padded)
    whole = look(settings({s: triple[s] for s in ("base", "instruct")}, **files), cache)
    found = look(settings({"base": triple["base"], "instruct": padded}, **files), cache)
    for name in ("stage_routing", "routing_change"):
        xr.testing.assert_allclose(found.groups[name], whole.groups[name])


def test_a_setting_that_changes_no_shape_leaves_weights_and_predictions(
    triple: dict[str, Path], files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    pairs = (
        ({"sliding_window": 4}, ("paths",)),
        ({"num_experts_per_tok": 3}, ("routing", "paths")),
    )
    for change, barred in pairs:
        other = released(tmp_path / next(iter(change)), 0.01, **change)
        found = look(settings({"one": triple["base"], "other": other}, **files), cache)
        assert [each for each in given.COMPARED if each in found.left_out] == list(barred)
        expected = set(GROUPS) - {"path"}
        if "routing" in barred:
            expected -= {"stage_routing", "routing_change"}
        assert set(found.groups) == expected
        assert found.groups["expert_drift"]["load"].isnull().all() == ("routing" in barred)


def test_checkpoints_may_be_named_as_releases_are(
    triple: dict[str, Path], files: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    named = {"Trinity-Mini-v1.5": triple["base"], "10T": triple["instruct"]}
    tree = truebase.run(settings(named, **files), runs=tmp_path, cache=cache)
    assert tree.attrs["status"] == "complete"
    assert tree["path"].change.values.tolist() == ["Trinity-Mini-v1.5 -> 10T"]
    assert (tmp_path / "mine" / "cards" / "Trinity-Mini-v1.5" / card.JSON).is_file()


def test_one_checkpoint_alone_with_nothing_to_ask(
    triple: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    one = settings({"raw": triple["truebase"]})
    tree = truebase.run(one, runs=tmp_path, cache=cache)
    assert set(tree.children) == {"findings"} and tree["findings"].sizes["finding"] == 0
    left_out = json.loads(tree.attrs["left_out"])
    assert left_out["comparisons"] == "one checkpoint was given"
    assert {items.FAMILY, lm_tasks.FAMILY, *audit.FAMILIES} <= set(left_out)
    made = card.read(tmp_path / "mine" / "cards" / "raw" / card.JSON)
    assert made["findings"] == [] and card.verify(made, triple["truebase"]) == []


def test_models_that_do_not_fit_are_compared_as_files(
    triple: dict[str, Path],
    files: dict[str, str],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(given.preflight, "memory", lambda _: (1000, "memory"))
    monkeypatch.setattr(hub, "load", None)
    found = look(settings(triple, **files), cache)
    assert set(found.groups) == {"weight_drift", "expert_drift"}
    assert not any(found.said.values())
    assert "this machine has 0 GB" in found.left_out["questions, routing, predictions"]


def test_a_known_world_is_asked_about(
    triple: dict[str, Path], tmp_path: Path, cache: Path
) -> None:
    """In conversations too, but for an association that turns of ChatML cannot be asked."""
    world = planted.world(chained.WORLD)
    config = settings(
        {"raw": triple["truebase"]}, world_file=str(planted.write(world, tmp_path))
    )
    found = look(config, cache)
    families = {f.family for how, f in found.said["raw"] if how == "text"}
    assert families == set(audit.FAMILIES) and not families & set(found.left_out)
    talked = {f.family for how, f in found.said["raw"] if how == "chat"}
    assert talked == {"association", "instruction"}
    assert "conversations with raw" not in found.left_out


@pytest.mark.parametrize("kind", ["no end", "chatml"])
def test_conversations_that_cannot_be_are_named(
    triple: dict[str, Path],
    tmp_path: Path,
    cache: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(audit, "run", lambda *_, **__: [])
    folder = copied({"raw": triple["truebase"]}, tmp_path)["raw"]
    made = tokenizer.Tokenizer.from_str(conversing.vocabulary().tokenizer.to_str())
    if kind == "chatml":  # in place of two of its entries: the model has no more rows
        made = tokenizer.train(corpus.procedural(0).sample(20_000), 382).tokenizer
        made.add_special_tokens([AddedToken(mark, special=True) for mark in chat.CHATML])
    Vocabulary(made, None, tokenizer.END if kind == "chatml" else None).save(folder)
    world = planted.world(chained.WORLD)
    config = settings({"raw": folder}, world_file=str(planted.write(world, tmp_path)))
    found = look(config, cache)
    families = {f.family for how, f in found.said["raw"] if how == "chat"}
    assert families == set()
    why = found.left_out["conversations with raw"]
    assert ("a text cannot spell" if kind == "chatml" else "no end mark") in why


def test_a_long_text_is_all_there(triple: dict[str, Path], tmp_path: Path, cache: Path) -> None:
    """A file without domains, in rows that leave no token out but what is beyond them."""
    text = "".join(f"line {n} of a text\n" for n in range(90))
    (tmp_path / "text.txt").write_text(text)
    config = settings(triple, texts=str(tmp_path / "text.txt"))
    texts = given._texts(config, cache)
    assert texts == {"text": [text]}
    left_out: dict[str, str] = {}
    rows = given._rows(triple, texts, 0, left_out)
    assert rows is not None and left_out == {} and list(rows) == ["text"]
    batch = rows["text"]
    tokens = conversing.vocabulary().encode([text])[0]
    inside = batch.documents_BS >= 0
    np.testing.assert_array_equal(batch.tokens_BS[inside], tokens)
    assert 3 < len(inside) <= given.ROWS
    asked = batch.targets_BS != IGNORE
    assert asked.sum() == len(tokens) - len(inside)
    longer = given._rows(triple, {"text": [text * 9]}, 0, left_out)
    assert longer is not None and len(longer["text"].tokens_BS) == given.ROWS


def test_the_embedded_text_stands_in(
    triple: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = {name: [f"{name} {n}" for n in range(40)] for name in ("code", "prose", "facts")}
    made = corpus.Corpus({"train": {}, "validation": held_out}, "", "")
    monkeypatch.setattr(corpus, "embedded", lambda _: made)
    texts = given._texts(settings(triple), cache)
    assert texts == {name: held_out[name][: given.ROWS] for name in given.EMBEDDED}
    assert given._texts(settings({"one": triple["base"]}), cache) == {}


def test_tasks_are_tried_before_questions_are_asked(
    triple: dict[str, Path],
    files: dict[str, str],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[tuple] = []
    finding = Finding("lm_eval", "mine", "acc", np.nan, 0.5, 0.4, 0.6, np.nan, 9)
    monkeypatch.setattr(lm_tasks, "evaluate", lambda *a: called.append(a) or [finding])
    one = {"raw": triple["base"]}
    config = settings(one, items=files["items"], tasks=("mine",), limit=9)
    found = look(config, cache)
    assert called == [(triple["base"], ("mine",), 9, "cpu")]
    assert found.said["raw"][0] == ("text", finding) and len(found.said["raw"]) > 1
    assert lm_tasks.FAMILY not in found.left_out

    def refused(*_: object) -> list[Finding]:
        raise BadValue("tasks are mine; lm_eval cannot run them here: no such task.")

    monkeypatch.setattr(lm_tasks, "evaluate", refused)
    monkeypatch.setattr(hub, "load", None)
    with pytest.raises(BadValue, match="tasks are mine"):
        look(config, cache)


BAD = [
    ("items", "items.jsonl", '{"prompt": "a"}\n', "line 1: an item is"),
    (
        "items",
        "items.jsonl",
        '{"prompt": "a", "choices": ["b"], "answer": 0}\n',
        "at least two",
    ),
    ("texts", "texts.jsonl", '{"words": "a"}\n', "line 1: a record is"),
    ("texts", "texts.jsonl", '{"text": "a"}\n\n{"text": ""}\n', "line 3: text and domain must"),
    ("texts", "text.txt", " \n", "has no text"),
    ("texts", "none.txt", None, "none.txt cannot be read as UTF-8 text"),
    ("items", "none.jsonl", None, "there is no such file"),
    ("world_file", "none.json", None, "none.json cannot be read"),
    ("world_file", "world.json", "{}", "is no planted world"),
]


@pytest.mark.parametrize(("field", "name", "content", "match"), BAD)
def test_a_bad_file_is_refused_before_anything_is_computed(
    triple: dict[str, Path],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    name: str,
    content: str | None,
    match: str,
) -> None:
    monkeypatch.setattr(hub, "load", None)
    if content is not None:
        (tmp_path / name).write_text(content)
    config = settings(triple, **{field: str(tmp_path / name)})
    runs = tmp_path / "runs"
    with pytest.raises(Refusal, match=match) as caught:
        truebase.run(config, runs=runs, cache=cache)
    assert "\n" not in str(caught.value)
    assert not (runs / "mine").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "misshapen"])
def test_a_bad_folder_is_refused_and_leaves_nothing(
    triple: dict[str, Path], tmp_path: Path, cache: Path, kind: str
) -> None:
    folder = tmp_path / "folder"
    if kind == "empty":
        folder.mkdir()
    if kind == "misshapen":
        shutil.copytree(triple["base"], folder)
        content = json.loads((folder / hub.CONFIG).read_text())
        (folder / hub.CONFIG).write_text(json.dumps(content | {"hidden_size": 64}))
    config, runs = settings(triple | {"mine": folder}), tmp_path / "runs"
    for _ in range(2):
        with pytest.raises((BadValue, Missing), match="folder") as caught:
            truebase.run(config, runs=runs, cache=cache)
        assert "\n" not in str(caught.value) and "live process" not in str(caught.value)
    assert not (runs / "mine").exists()


def test_a_folder_that_was_replaced_is_known_by_its_new_hash(
    triple: dict[str, Path],
    files: dict[str, str],
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut off, the folder replaced, and run again."""
    folder = copied({"raw": triple["truebase"]}, tmp_path)["raw"]
    config = settings({"raw": folder}, items=files["items"])
    with monkeypatch.context() as patch:
        patch.setattr(truebase, "_write", None)
        with pytest.raises(TypeError):
            truebase.run(config, runs=tmp_path / "runs", cache=cache)
    shutil.copytree(triple["base"], folder, dirs_exist_ok=True)
    tree = truebase.run(config, runs=tmp_path / "runs", cache=cache)
    made = card.read(tmp_path / "runs" / "mine" / "cards" / "raw" / card.JSON)
    hashes = json.loads(tree.attrs["checkpoints_sha256"])
    assert hashes == {"raw": made["checkpoint"]["weights"]}


def test_a_stage_of_a_chain_can_be_given(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, cache: Path
) -> None:
    """A checkpoint of ours, with its run's card and its world."""
    study = chained.study(tmp_path_factory.getbasetemp())
    config = settings({"mine": study.folders["debiased"]}, world_file=str(study.runs / "tiny"))
    tree = truebase.run(config, runs=tmp_path, cache=cache)
    expected = chained.of_stage(study.tree, "debiased")
    assert chained.alike(chained.of_stage(tree, "mine"), expected)
    made = card.read(tmp_path / "mine" / "cards" / "mine" / card.JSON)
    assert made["run"]["name"] == "tiny-0-debiased"
    assert made["data"]["world"] == study.tree.attrs["world_sha256"]
    assert truebase_config.named(config).name == "mine"
