"""Text to tokens on disk, and what a run is given of both."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.test_tokenizer import foreign
from trinity_lib import corpus, data, rows, tokenizer
from trinity_lib.config import BadValue
from trinity_lib.data import DataConfig, Documents, Streamed
from trinity_lib.sources import Source

TEXTS = ["x = 12\n", "def f(a):\n    return a + 345\n", "The café is in Zürich.\n"] * 20


def folder_of_text(folder: Path, documents: int = 40) -> Path:
    folder.mkdir()
    for i in range(documents):
        (folder / f"{i}.txt").write_text(
            f"Document {i} says: {'the cat sat. ' * (1 + i % 7)}\n"
        )
    return folder


def config(*sources: Source, **settings: object) -> DataConfig:
    return DataConfig(sources=sources, sequence_length=16, validation_rows=2, **settings)


def test_tokenised_text_is_the_text_and_is_made_once(tmp_path: Path) -> None:
    source = corpus.procedural(0)
    vocabulary = tokenizer.of_corpus(source, 384, tmp_path)
    first = data.tokenised(source, vocabulary, tmp_path)
    (folder,) = tmp_path.glob("tokenised-*")
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = data.tokenised(source, vocabulary, tmp_path)
    assert stamps == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    for split, domains in first.items():
        for domain, documents in domains.items():
            np.testing.assert_array_equal(documents.tokens, again[split][domain].tokens)
            texts = source.documents[split][domain]
            assert len(documents) == len(texts)
            for i in (0, len(texts) // 2, len(texts) - 1):
                ids = documents.document(i)
                assert vocabulary.decode([ids.tolist()]) == [texts[i]]
                assert vocabulary.tokenizer.id_to_token(int(ids[0])) == tokenizer.BEGIN
                assert vocabulary.tokenizer.id_to_token(int(ids[-1])) == tokenizer.END


def test_target_text_is_the_text() -> None:
    vocabulary = tokenizer.train(TEXTS, 300)
    pieces = vocabulary.encode(TEXTS[:4])
    ends = np.cumsum([len(p) for p in pieces])
    batch = rows.validation("a", Documents(np.concatenate(pieces), ends), ends[-1], 1)
    spelled = data.target_text(batch, vocabulary)
    assert len(spelled) == sum(len(t.encode()) for t in TEXTS[:4])


def test_a_users_folder_becomes_a_domain(tmp_path: Path) -> None:
    source = Source(name="cats", path=str(folder_of_text(tmp_path / "cats")))
    loaded = data.load(config(source), 270, tmp_path / "cache")
    assert list(loaded.train) == list(loaded.validation) == ["cats"]
    assert not loaded.warnings and loaded.vocabulary.size == 270
    train, validation = loaded.train["cats"], loaded.validation["cats"]
    assert isinstance(train, Documents)
    assert len(train) + len(validation) == 40 and len(validation) >= 2
    assert json.loads(loaded.summary)["train"]["cats"] == [len(train), len(train.tokens)]


def test_a_foreign_tokenizer_without_marks_is_reported(tmp_path: Path) -> None:
    source = Source(name="cats", path=str(folder_of_text(tmp_path / "cats")))
    file = tmp_path / "tokenizer.json"
    foreign().save(str(file))
    loaded = data.load(config(source, tokenizer=str(file)), 5, tmp_path / "cache")
    assert "no end mark" in loaded.warnings[0]
    assert "validation tokens of 'cats' are unknown to the tokenizer" in loaded.warnings[1]
    with pytest.raises(BadValue, match="has 5 entries; the model's vocabulary is 4"):
        data.load(config(source, tokenizer=str(file)), 4, tmp_path / "cache")


def test_a_stream_beside_files_keeps_the_order_of_the_configuration(tmp_path: Path) -> None:
    cats = folder_of_text(tmp_path / "cats")
    (tmp_path / "hub").mkdir()
    lines = (json.dumps({"body": f"the {i} th cat sat"}) + "\n" for i in range(100))
    (tmp_path / "hub" / "a.jsonl").write_text("".join(lines))
    sources = (
        Source(name="hub", path=f"hf://{tmp_path / 'hub'}", field="body"),
        Source(name="cats", path=str(cats)),
    )
    loaded = data.load(config(*sources), 270, tmp_path / "cache")
    assert list(loaded.train) == ["hub", "cats"]
    assert isinstance(loaded.train["hub"], Streamed)
    assert len(loaded.validation["hub"].tokens) >= 2 * 16
    assert json.loads(loaded.summary)["train"]["hub"] == "streamed"
    alone = config(sources[0])
    with pytest.raises(BadValue, match="tokenizer is ''; it must be .* where all text is"):
        data.load(alone, 270, tmp_path / "cache")


def test_changed_text_is_another_corpus(tmp_path: Path) -> None:
    folder = folder_of_text(tmp_path / "cats")
    source = Source(name="cats", path=str(folder))
    before = data.load(config(source), 270, tmp_path / "cache").sha256
    assert data.load(config(source), 270, tmp_path / "cache").sha256 == before
    (folder / "0.txt").write_text("Another document.\n")
    assert data.load(config(source), 270, tmp_path / "cache").sha256 != before


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sequence_length": 1}, "data.sequence_length is 1; it must be at least 2"),
        ({"rsdb": -1}, "data.rsdb is -1; it must be 0"),
        ({"rsdb": 10**9}, "data.rsdb is 1000000000; it must be 0 .* up to 10,000,000"),
        ({"validation_share": 1}, "data.validation_share is 1; it must be at least 2"),
        ({"validation_rows": 0}, "data.validation_rows is 0; it must be at least 1"),
        ({"sources": [{"name": "a", "path": "x"}] * 2}, "it must be sources of unlike names"),
        (
            {"sources": [{"name": "a/b", "path": "x"}]},
            "source.name is 'a/b'; it must be letters",
        ),
    ],
)
def test_settings_out_of_range_are_one_sentence(settings: dict, sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        DataConfig(**{"sequence_length": 8, **settings})


def test_damaged_tokens_are_made_again(tmp_path: Path, capsys) -> None:
    source = Source(name="cats", path=str(folder_of_text(tmp_path / "cats")))
    first = data.load(config(source), 270, tmp_path / "cache").train["cats"]
    assert isinstance(first, Documents)
    kept = np.array(first.tokens)
    for content in (kept[: len(kept) // 2].tobytes(), b""):
        (file,) = (tmp_path / "cache").glob("tokenised-*/train-cats.tokens")
        file.unlink()
        file.write_bytes(content)
        again = data.load(config(source), 270, tmp_path / "cache").train["cats"]
        assert isinstance(again, Documents)
        np.testing.assert_array_equal(again.tokens, kept)
        assert "are damaged: made again" in capsys.readouterr().out
