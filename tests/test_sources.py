"""The user's own text: what is read, how it is split, and every way it can be wrong."""

import json
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_lib import sources
from trinity_lib.config import BadValue, Missing
from trinity_lib.sources import Files, Hub, Source

TEXTS = [f"Document {i}.\nIt says {'a word ' * (1 + i % 9)}\n" for i in range(60)]


def jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts))
    return path


def files(path: Path | str, field: str = "text", share: int = 10) -> Files:
    return Files([Source(name="own", path=str(path), field=field)], share)


def read(corpus: Files) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "validation": []}
    for split, domain, text in corpus.read():
        assert domain == "own"
        found[split].append(text)
    return found


def test_every_kind_of_file_gives_its_documents(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    (folder / "deep").mkdir(parents=True)
    for i, text in enumerate(TEXTS[:20]):
        (folder / "deep" / f"{i:02d}.txt").write_text(text)
    jsonl(folder / "a.jsonl", TEXTS[20:40])
    pd.DataFrame({"id": 1, "text": [*TEXTS[40:], "", None, "  "]}).to_parquet(
        folder / "b.parquet"
    )
    (folder / "notes.md").write_text("not read")
    found = read(files(folder))
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)
    some = Source(name="own", path=str(folder / "**" / "1?.txt"))
    assert [path.stem for path in sources.files_of(some)] == [str(i) for i in range(10, 20)]


def test_bytes_are_text_as_written(tmp_path: Path) -> None:
    """A byte-order mark goes; line ends, blank lines and letters stay."""
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffZürich\r\n\r\n 日本\n".encode())
    assert list(sources.texts_in(file, "text")) == ["Zürich\r\n\r\n 日本\n"]
    lines = tmp_path / "a.jsonl"
    lines.write_text('\n{"text": "a\\u00e9\\n"}\n\n{"text": ""}\n{"text": null}\n{"text": "b"}')
    assert list(sources.texts_in(lines, "text")) == ["aé\n", "b"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text("abc \n", min_size=1, max_size=60), min_size=1, max_size=60))
def test_the_split_loses_nothing_and_never_tears_equal_documents(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = jsonl(tmp_path_factory.mktemp("split") / "a.jsonl", texts)
    whole = [text for text in texts if text.strip()]
    if not whole:
        with pytest.raises(BadValue, match="it holds no text"):
            read(files(path))
        return
    found = read(files(path))
    if sorted(found["train"] + found["validation"]) == sorted(whole):
        assert not set(found["train"]) & set(found["validation"])
    else:  # the end of each document
        joined = "".join(text for split in ("train", "validation") for text in found[split])
        kept = sum(len(t) for t in whole) - len(joined)
        assert 0 <= kept <= sum(2 * (len(t) // 10) for t in whole)
        assert all(any(w.startswith(t) for w in whole) for t in found["train"])
        assert all(any(w.endswith(t) for w in whole) for t in found["validation"])
        assert all(t.strip() for t in found["validation"])


def test_about_a_tenth_of_the_text_is_held_out(tmp_path: Path) -> None:
    found = read(files(jsonl(tmp_path / "a.jsonl", TEXTS)))
    held = sum(map(len, found["validation"])) / sum(map(len, TEXTS))
    assert 0.1 <= held <= 0.2
    alone = tmp_path / "book.txt"
    alone.write_text("line of the book\n" * 1000)
    found = read(files(alone))
    assert [len(texts) for texts in found.values()] == [1, 1]
    assert 0.09 < len(found["validation"][0]) / len(alone.read_text()) < 0.11
    assert found["train"][0] + found["validation"][0] == alone.read_text()


def test_the_order_and_the_names_of_files_change_no_split(tmp_path: Path) -> None:
    for name, texts in (("a", TEXTS), ("b", TEXTS[::-1])):
        (tmp_path / name).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / name / f"{i}.txt").write_text(text)
    first, second = (read(files(tmp_path / name)) for name in "ab")
    assert set(first["validation"]) == set(second["validation"])


def test_a_sample_is_a_seedless_part_of_the_training_text(tmp_path: Path) -> None:
    corpus = files(jsonl(tmp_path / "a.jsonl", TEXTS))
    training = read(corpus)["train"]
    assert sorted(corpus.sample(10**6)) == sorted(training)
    some = corpus.sample(400)
    assert some == corpus.sample(400) and set(some) <= set(training)
    assert 200 < sum(map(len, some)) <= 400
    assert len(corpus.sample(1)) == 1


def test_the_hash_is_of_content_field_and_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    moved = jsonl(tmp_path / "b.jsonl", TEXTS)
    assert files(path).sha256 == files(moved).sha256
    assert len({files(path).sha256, files(path, "id").sha256, files(path, share=5).sha256}) == 3


@pytest.mark.parametrize(
    ("text", "names", "weights"),
    [
        ("books", ["books"], [(1.0,)]),
        ("books/", ["books"], [(1.0,)]),
        ("books/*.txt=2", ["books"], [(2.0,)]),
        ("books/**/1.txt = 1:2:3.5", ["1"], [(1.0, 2.0, 3.5)]),
        ("books, code.jsonl=3", ["books", "code"], [(1.0,), (3.0,)]),
        ("code.jsonl, deep/code.jsonl", ["code", "code-2"], [(1.0,), (1.0,)]),
        ("hf://owner/some data:en=2", ["en"], [(2.0,)]),
        ("hf://owner/name", ["name"], [(1.0,)]),
        ("two words.txt", ["two-words"], [(1.0,)]),
        ("lr=fast/1.txt", ["1"], [(1.0,)]),
        ("lr=fast, lr=fast/*.txt=2", ["lr-fast", "lr-fast-2"], [(1.0,), (2.0,)]),
    ],
)
def test_a_line_of_sources_is_understood(
    tmp_path: Path, text: str, names: list, weights: list
) -> None:
    there = ("books/1.txt", "code.jsonl", "deep/code.jsonl", "two words.txt", "lr=fast/1.txt")
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, given_weights = sources.parse(text, "text", [tmp_path])
    assert [source.name for source in found] == names == list(given_weights)
    assert list(given_weights.values()) == weights
    for source in found:
        assert source.path.startswith("hf://") or Path(source.path).is_absolute()


def test_paths_are_looked_for_in_order(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").touch()
    (tmp_path / "b" / "y.txt").touch()
    (x, y), _ = sources.parse("x.txt, y.txt", "text", [tmp_path / "a", tmp_path / "b"])
    assert (x.path, y.path) == (str(tmp_path / "a/x.txt"), str(tmp_path / "b/y.txt"))
    (absolute,), _ = sources.parse(str(tmp_path / "b/y.txt"), "text", [tmp_path / "a"])
    assert absolute.path == str(tmp_path / "b/y.txt")


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("none.txt", Missing, "data is 'none.txt'; nothing is there \\(looked in "),
        ("none/*.txt", Missing, "data is 'none/\\*.txt'; nothing is there"),
        (" , ", BadValue, "data is ' , '; it must be files, folders, globs or hf:// datasets"),
        ("x.txt=1..2", BadValue, "data is 'x.txt=1..2'; its weight '1..2' must be a number"),
        ("x.txt=1::2", BadValue, "data is 'x.txt=1::2'; its weight '1::2' must be a num"),
        ("x.txt=two", BadValue, "its weight 'two' must be a number above zero, in plain digi"),
        ("x.txt = -2", BadValue, "data is 'x.txt = -2'; its weight '-2' must be a number abov"),
        ("*.txt=1:-2", BadValue, r"data is '\*.txt=1:-2'; its weight '1:-2' must be"),
        ("x.txt=", BadValue, "data is 'x.txt='; its weight '' must be"),
        ("y.txt=two", Missing, "data is 'y.txt=two'; nothing is there"),
        ("=two", Missing, "data is '=two'; nothing is there"),
        ("x\ny.txt", Missing, "data is 'x.ny.txt'; nothing is there"),
        ("x" * 5000, Missing, "it is no path: "),
        ("~no-such-user/x.txt", Missing, "it is no path: "),
    ],
)
def test_a_line_that_is_not_understood_is_refused(
    tmp_path: Path, text: str, error: type, sentence: str
) -> None:
    (tmp_path / "x.txt").touch()
    with pytest.raises(error, match=sentence):
        sources.parse(text, "text", [tmp_path])


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"caf\xe9", r"a.txt is not UTF-8 text: byte 3 is 0xe9"),
        ("a.txt", b"\x89PNG\r\n\x1a\n", r"a.txt is not UTF-8 text: byte 0 is 0x89"),
        ("a.txt", b"null \0 byte", r"a.txt is not text: it holds a zero byte"),
        ("a.txt", b"", "it holds no text"),
        ("a.txt", b" \n\t\n", "it holds no text"),
        ("a.jsonl", b"", "it holds no text"),
        ("a.jsonl", GOOD + b"{broken", r"a.jsonl, line 2, is not JSON"),
        (
            "a.jsonl",
            GOOD + b"[1]",
            r"a.jsonl, line 2, is not a JSON object with a field 'text'",
        ),
        ("a.jsonl", b'{"body": "x", "id": 1}', r"line 1, has no field 'text'; .* body, id"),
        ("a.jsonl", b"{}", r"line 1, has no field 'text'; its fields are none"),
        ("a.jsonl", b'{"text": 7}', r"line 1, holds no text in 'text' but 7"),
        ("a.jsonl", b'{"text": "\xff"}', r"line 1, is not UTF-8 text: byte 10 is 0xff"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl, line 1, is not JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a.jsonl has a document that is not Unicode"),
        ("a.parquet", b"PAR1 not really", r"a.parquet is not a Parquet file that can be read"),
        ("a.parquet", b"", r"a.parquet is not a Parquet file that can be read"),
    ],
)
def test_content_that_cannot_be_used_is_one_sentence(
    tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadValue, match=sentence) as error:
        read(files(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_parquet_without_the_field_or_with_another_type_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"body": ["x"], "id": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        BadValue, match="a.parquet has no field 'text'; its fields are body, id"
    ):
        read(files(tmp_path / "a.parquet"))
    with pytest.raises(BadValue, match="a.parquet holds no text in 'id' but 1"):
        read(files(tmp_path / "a.parquet", "id"))
    assert read(files(tmp_path / "a.parquet", "body"))["train"] == ["x"]


def test_files_of_another_kind_are_refused_by_name_and_passed_over_in_folders(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    for path in (tmp_path / "a.png", tmp_path / "*"):
        with pytest.raises(BadValue, match="a.png'; it must be a .txt, .jsonl, .parquet file"):
            files(path)
    with pytest.raises(Missing, match="it holds no .txt, .jsonl, .parquet file"):
        files(tmp_path)


def test_a_folder_streams_like_a_dataset_of_the_hub(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS, "body")
    hub = Hub(Source(name="own", path=f"hf://{tmp_path}", field="body"))
    documents = hub.documents()
    assert [next(documents) for _ in range(7)] == TEXTS[:7]
    state = json.loads(json.dumps(hub.state()))
    assert list(documents) == TEXTS[7:]
    assert list(hub.documents(state)) == TEXTS[7:]
    assert list(hub.documents()) == TEXTS


def test_a_stream_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="none'; it cannot be streamed: Couldn't find any data"):
        Hub(Source(name="own", path=f"hf://{tmp_path / 'none'}"))
    jsonl(tmp_path / "a.jsonl", TEXTS, "body")
    with pytest.raises(BadValue, match="has no field 'text'; its fields are id, body"):
        Hub(Source(name="own", path=f"hf://{tmp_path}"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.jsonl").write_text("")
    with pytest.raises(BadValue, match="it (holds no document|cannot be streamed)"):
        Hub(Source(name="own", path=f"hf://{tmp_path / 'b'}"))
