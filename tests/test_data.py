"""Tokenizer, packing, RSDB and the one order of rows."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_lib import corpus, data
from trinity_lib.data import IGNORE, Documents, Rows, Stream

TEXTS = ["x = 12\n", "def f(a):\n    return a + 345\n", "The café is in Zürich.\n"] * 20


def numbered(lengths: list[int]) -> Documents:
    """Documents whose tokens are all different: 0, 1, 2, ..."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return Documents(np.arange(ends[-1], dtype=np.int32), ends)


def rows_of(lengths: list[int], length: int, rsdb: int, seed: int = 0) -> Rows:
    stream = Stream({"a": numbered(lengths)}, seed)
    stream.mix({"a": 1.0})
    return Rows(stream, length, rsdb, seed)


def test_the_tokenizer_isolates_digits_and_round_trips() -> None:
    tokenizer = data.train_tokenizer(TEXTS, 300)
    for text in TEXTS[:3]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("345").tokens == ["3", "4", "5"]
    assert tokenizer.encode("a 12").tokens[-2:] == ["1", "2"]


def test_the_tokenizer_is_the_same_every_time() -> None:
    first = data.train_tokenizer(TEXTS, 300)
    assert first.to_str() == data.train_tokenizer(TEXTS, 300).to_str()


def test_a_vocabulary_the_text_cannot_yield_is_refused(cache: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 500000; it must be at most"):
        data.tokenizer_for(corpus.procedural(0), 500_000, cache)


def test_tokenised_text_is_cached_unchanged(tmp_path: Path) -> None:
    source = corpus.procedural(0)
    tokenizer = data.tokenizer_for(source, 384, tmp_path)
    first = data.tokenised(source, tokenizer, tmp_path)
    again = data.tokenised(source, tokenizer, tmp_path)
    for split, domains in first.items():
        for domain, documents in domains.items():
            np.testing.assert_array_equal(documents.tokens, again[split][domain].tokens)
            text = source.documents[split][domain][0]
            ids = documents.document(0)
            assert tokenizer.decode(ids.tolist(), skip_special_tokens=True) == text
            assert tokenizer.id_to_token(int(ids[0])) == data.BEGIN
            assert tokenizer.id_to_token(int(ids[-1])) == data.END


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(2, 24),
    st.integers(0, 6),
    st.integers(0, 5),
)
def test_no_token_is_lost_and_targets_stay_in_their_document(
    lengths: list[int], length: int, rsdb: int, seed: int
) -> None:
    rows = rows_of(lengths, length, rsdb, seed)
    ends = set((np.cumsum(lengths) - 1).tolist())
    total = sum(lengths)
    seen = np.zeros(total, dtype=int)
    count = -(-3 * total // length)
    batch = rows.batch(count)
    for token, target in zip(batch.tokens_BS.flat, batch.targets_BS.flat, strict=True):
        seen[token] += 1
        assert target == (IGNORE if token in ends else token + 1)
    held = np.zeros(total, dtype=int)
    for tokens, head in rows.open:
        held[tokens[head:]] += 1
    epochs = rows.stream.epoch["a"]
    pending = rows.stream.order["a"][rows.stream.taken["a"] :]
    for document in pending:
        held[rows.stream.domains["a"].document(int(document))] += 1
    np.testing.assert_array_equal(seen + held, epochs)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=30), st.integers(0, 6))
def test_pieces_are_runs_of_one_document(lengths: list[int], rsdb: int) -> None:
    batch = rows_of(lengths, 16, rsdb).batch(8)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for tokens, pieces in zip(batch.tokens_BS, batch.documents_BS, strict=True):
        assert pieces[0] == 0 and set(np.diff(pieces)) <= {0, 1}
        for piece in range(pieces[-1] + 1):
            part = tokens[pieces == piece]
            assert len(set(owner[part])) == 1
            assert (np.diff(part) == 1).all()


def test_without_rsdb_documents_follow_one_another() -> None:
    rows = rows_of([5, 7, 9], 4, 0)
    flat = rows.batch(21).tokens_BS.flatten()
    order = np.random.default_rng([0, 0])
    documents = numbered([5, 7, 9])
    expected: list[int] = []
    while len(expected) < len(flat):
        for i in order.permutation(3):
            expected += documents.document(int(i)).tolist()
    np.testing.assert_array_equal(flat, expected[: len(flat)])


def test_rsdb_follows_its_definition() -> None:
    """Random open document, from its read head, refill to twice the size when down to it."""
    size, length, lengths = 3, 8, [5, 11, 2, 17, 8, 3, 9, 20]
    got = rows_of(lengths, length, size, seed=4).batch(30).tokens_BS
    stream = Stream({"a": numbered(lengths)}, 4)
    stream.mix({"a": 1.0})
    choose = np.random.default_rng([4, 1_000_003])
    buffer: list[list[int]] = []
    for row in got:
        expected: list[int] = []
        while len(expected) < length:
            if len(buffer) <= size:
                while len(buffer) < 2 * size:
                    buffer.append(stream.next().tolist())
            document = buffer[int(choose.integers(len(buffer)))]
            taken = document[: length - len(expected)]
            del document[: len(taken)]
            expected += taken
            buffer = [b for b in buffer if b]
        assert row.tolist() == expected


def test_the_mixture_holds_at_every_moment() -> None:
    domains = {"a": numbered([10] * 50), "b": numbered([40] * 50)}
    stream = Stream(domains, 0)
    stream.mix({"a": 3.0, "b": 1.0})
    issued = {"a": 0, "b": 0}
    for _ in range(200):
        before = dict(stream.issued)
        stream.next()
        issued = {k: issued[k] + stream.issued[k] - before[k] for k in issued}
        assert abs(issued["a"] - 3 * issued["b"]) <= 120
    with pytest.raises(ValueError, match="'c'; it must be made of a, b"):
        stream.mix({"c": 1.0})


def test_the_same_seed_gives_the_same_rows_and_another_does_not() -> None:
    lengths = [7, 30, 11, 5, 16, 9] * 5
    first = rows_of(lengths, 16, 4, seed=1).batch(12).tokens_BS
    np.testing.assert_array_equal(first, rows_of(lengths, 16, 4, seed=1).batch(12).tokens_BS)
    assert (first != rows_of(lengths, 16, 4, seed=2).batch(12).tokens_BS).any()


def test_rows_do_not_depend_on_how_they_are_asked_for() -> None:
    lengths = [7, 30, 11, 5, 16, 9] * 5
    whole = rows_of(lengths, 16, 4).batch(12).tokens_BS
    parts = rows_of(lengths, 16, 4)
    pieces = [parts.batch(n).tokens_BS for n in (1, 4, 7)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_target_bytes_are_the_text() -> None:
    tokenizer = data.train_tokenizer(TEXTS, 300)
    documents = data.tokenise(TEXTS[:4], tokenizer)
    batch = data.validation_rows(documents, len(documents.tokens), 1, 0)
    spelled = data.target_bytes(batch, tokenizer)
    assert len(spelled) == sum(len(t.encode()) for t in TEXTS[:4])


def test_too_little_validation_text_is_refused() -> None:
    with pytest.raises(ValueError, match="has 3 tokens; it needs at least one row of 64"):
        data.validation_rows(numbered([3]), 64, 4, 0)
