"""The corpus's own tokenizer, and tokenizer.json files from elsewhere."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from trinity_lib import corpus, tokenizer
from trinity_lib.config import BadValue, Missing

TEXTS = ["x = 12\n", "def f(a):\n    return a + 345\n", "The café is in Zürich.\n"] * 20


def foreign(specials: tuple[str, ...] = ()) -> Tokenizer:
    """A word-level tokenizer as another project might have made it."""
    words = ["[UNK]", "the", "a", "cat", "sat", *specials]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if specials:
        made.add_special_tokens(list(specials))
    return made


def test_digits_are_isolated_and_text_round_trips() -> None:
    vocabulary = tokenizer.train(TEXTS, 300)
    for text, ids in zip(TEXTS[:3], vocabulary.encode(TEXTS[:3]), strict=True):
        assert vocabulary.decode([ids.tolist()]) == [text]
        begin, *_, end = (vocabulary.tokenizer.id_to_token(i) for i in ids)
        assert (begin, end) == (tokenizer.BEGIN, tokenizer.END)
    assert vocabulary.tokenizer.encode("345").tokens == ["3", "4", "5"]
    assert vocabulary.tokenizer.encode("a 12").tokens[-2:] == ["1", "2"]


def test_the_same_texts_give_the_same_tokenizer() -> None:
    assert tokenizer.train(TEXTS, 300).sha256 == tokenizer.train(TEXTS, 300).sha256


def test_a_corpus_keeps_its_tokenizer(tmp_path: Path) -> None:
    first = tokenizer.of_corpus(corpus.procedural(0), 384, tmp_path)
    (file,) = tmp_path.iterdir()
    stamp = file.stat().st_mtime_ns
    again = tokenizer.of_corpus(corpus.procedural(0), 384, tmp_path)
    assert (first.sha256, first.size) == (again.sha256, 384)
    assert file.stat().st_mtime_ns == stamp


def test_a_vocabulary_the_text_cannot_yield_is_refused(cache: Path) -> None:
    with pytest.raises(BadValue, match="vocab_size is 500000; it must be at most"):
        tokenizer.of_corpus(corpus.procedural(0), 500_000, cache)


def test_a_vocabulary_without_room_for_bytes_and_marks_is_refused(tmp_path: Path) -> None:
    fewest = tokenizer.FEWEST
    assert tokenizer.train(["a"], 5).size == fewest
    right = f"vocab_size is {fewest - 1}; it must be at least {fewest}, for single bytes"
    with pytest.raises(BadValue, match=right):
        tokenizer.of_corpus(corpus.procedural(0), fewest - 1, tmp_path)
    assert not list(tmp_path.iterdir())
    assert tokenizer.of_corpus(corpus.procedural(0), fewest, tmp_path).size == fewest


def test_a_saved_vocabulary_comes_back(tmp_path: Path) -> None:
    made = tokenizer.train(TEXTS, 300)
    made.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        again = tokenizer.load(path)
        assert (again.sha256, again.begin, again.end) == (made.sha256, made.begin, made.end)


@pytest.mark.parametrize(
    ("specials", "begin", "end"),
    [
        ((), None, None),
        (("<|endoftext|>",), None, "<|endoftext|>"),
        (("<s>", "</s>"), "<s>", "</s>"),
        (("[CLS]", "[SEP]", "</s>"), "[CLS]", "</s>"),
    ],
)
def test_marks_are_found_by_their_usual_names(
    tmp_path: Path, specials: tuple, begin: str | None, end: str | None
) -> None:
    foreign(specials).save(str(tmp_path / "tokenizer.json"))
    vocabulary = tokenizer.load(tmp_path)
    assert (vocabulary.begin, vocabulary.end) == (begin, end)
    (ids,) = vocabulary.encode(["the cat sat"])
    assert len(ids) == 3 + (begin is not None) + (end is not None)


def test_the_settings_beside_it_name_the_marks(tmp_path: Path) -> None:
    foreign(("<s>", "</s>", "<stop>")).save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": {"content": "<stop>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = tokenizer.load(tmp_path)
    assert (vocabulary.begin, vocabulary.end) == (None, "<stop>")


def test_a_foreign_tokenizers_own_marks_and_limits_are_switched_off(tmp_path: Path) -> None:
    made = foreign(("<s>", "</s>"))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 5), ("</s>", 6)]
    )
    made.enable_truncation(2)
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    (ids,) = tokenizer.load(tmp_path).encode(["the cat sat the cat"])
    assert ids.tolist() == [5, 1, 3, 4, 1, 3, 6]


def test_size_is_the_highest_id_and_one(tmp_path: Path) -> None:
    words = {"[UNK]": 0, "the": 7}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.load(tmp_path).size == 8


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="tokenizer is '.*none.json'; there is no such file"):
        tokenizer.load(tmp_path / "none.json")
    file = tmp_path / "tokenizer.json"
    for content in ("not json", "{}", '{"model": {"type": "BPE"}}'):
        file.write_text(content)
        with pytest.raises(BadValue, match="is not a tokenizer.json") as error:
            tokenizer.load(file)
        assert "\n" not in str(error.value)
    foreign().save(str(file))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(BadValue, match="tokenizer_config.json is not JSON"):
        tokenizer.load(file)


def test_a_mark_that_is_spelled_out_in_a_text_is_text(tmp_path: Path) -> None:
    made = tokenizer.train([*TEXTS, "a <|end|> b"], 300)
    made.save(tmp_path)
    for vocabulary in (made, tokenizer.load(tmp_path)):
        (ids,) = vocabulary.encode(["a <|end|> b"])
        assert vocabulary.decode([ids.tolist()]) == ["a <|end|> b"]
        assert list(ids).count(vocabulary.tokenizer.token_to_id(tokenizer.END)) == 1
