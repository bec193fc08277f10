"""Packing, RSDB, the one order of rows, and its state."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_lib import rows, tokenizer
from trinity_lib.attention import AttentionConfig, context
from trinity_lib.config import BadValue
from trinity_lib.data import IGNORE, Batch, Documents, Streamed
from trinity_lib.rows import Live, Rows, Shuffled, Stream
from trinity_lib.sources import Hub, Source, held_out

ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4, window=5)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def numbered(lengths: list[int], first: int = 0) -> Documents:
    """Documents whose tokens are all different: first, first + 1, ..."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return Documents(np.arange(first, first + ends[-1], dtype=np.int32), ends)


def rows_of(lengths: list[int], length: int, rsdb: int, seed: int = 0) -> Rows:
    stream = Stream({"a": numbered(lengths)}, seed)
    stream.mix({"a": 1.0})
    return Rows(stream, length, rsdb, seed)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(2, 24), st.integers(0, 6), st.integers(0, 5))
def test_no_token_is_lost_and_targets_stay_in_their_document(
    lengths: list[int], length: int, rsdb: int, seed: int
) -> None:
    order = rows_of(lengths, length, rsdb, seed)
    ends = set((np.cumsum(lengths) - 1).tolist())
    total = sum(lengths)
    seen = np.zeros(total, dtype=int)
    batch = order.batch(-(-3 * total // length))
    for token, target in zip(batch.tokens_BS.flat, batch.targets_BS.flat, strict=True):
        seen[token] += 1
        assert target == (IGNORE if token in ends else token + 1)
    held = np.zeros(total, dtype=int)
    for each in order.open:
        held[each.tokens[each.head :]] += 1
    feed = order.stream.feeds["a"]
    assert isinstance(feed, Shuffled)
    for document in feed.order[feed.taken :]:
        held[feed.documents.document(int(document))] += 1
    np.testing.assert_array_equal(seen + held, feed.epoch)


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


@settings(deadline=None, max_examples=30)
@given(LENGTHS, st.integers(0, 6))
def test_no_token_sees_across_a_documents_edge(lengths: list[int], rsdb: int) -> None:
    batch = rows_of(lengths, 16, rsdb).batch(4)
    seen = context(torch.from_numpy(batch.documents_BS), ATTENTION, torch.float32)
    owner = np.repeat(np.arange(len(lengths)), lengths)[batch.tokens_BS]
    for mask in (seen.everything_B1SS, seen.window):
        row, query, key = (i.numpy() for i in torch.where(mask.squeeze(1)))
        np.testing.assert_array_equal(owner[row, query], owner[row, key])
        assert (batch.tokens_BS[row, query] >= batch.tokens_BS[row, key]).all()


def test_without_rsdb_documents_follow_one_another() -> None:
    flat = rows_of([5, 7, 9], 4, 0).batch(21).tokens_BS.flatten()
    order = np.random.default_rng([0, 0])
    documents = numbered([5, 7, 9])
    expected: list[int] = []
    while len(expected) < len(flat):
        for i in order.permutation(3):
            expected += documents.document(int(i)).tolist()
    np.testing.assert_array_equal(flat, expected[: len(flat)])


@settings(deadline=None, max_examples=60)
@given(LENGTHS, st.integers(2, 24), st.integers(1, 6), st.integers(0, 9))
def test_rsdb_follows_its_definition(
    lengths: list[int], length: int, size: int, seed: int
) -> None:
    """Random open document, from its read head, refill to twice the size when down to it."""
    got = rows_of(lengths, length, size, seed).batch(30).tokens_BS
    stream = Stream({"a": numbered(lengths)}, seed)
    stream.mix({"a": 1.0})
    choose = np.random.default_rng([seed, 1_000_003])
    buffer: list[list[int]] = []
    for row in got:
        expected: list[int] = []
        while len(expected) < length:
            if len(buffer) <= size:
                while len(buffer) < 2 * size:
                    buffer.append(stream.next().tokens.tolist())
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
    with pytest.raises(BadValue, match="'c'; it must be made of a, b"):
        stream.mix({"c": 1.0})


def test_a_domain_without_text_cannot_have_a_share() -> None:
    nothing = Documents(np.zeros(0, np.int32), np.zeros(0, np.int64))
    stream = Stream({"a": numbered([4]), "b": nothing}, 0)
    stream.mix({"a": 1.0, "b": 0.0})
    with pytest.raises(BadValue, match="mixture is 'b'; it must be a domain with training"):
        stream.mix({"a": 1.0, "b": 0.1})


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


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_of_a_batch_are_its_rows_in_order(parts: int) -> None:
    whole = rows_of([7, 30, 11, 5, 16, 9] * 5, 16, 4).batch(6)
    shares = [rows.share_of(whole, part, parts) for part in range(parts)]
    for name in Batch._fields:
        together = np.concatenate([getattr(share, name) for share in shares])
        np.testing.assert_array_equal(together, getattr(whole, name))
    with pytest.raises(
        BadValue, match="parts is 4; it must be a divisor of the batch's 6 rows"
    ):
        rows.share_of(whole, 0, 4)


def resumed(order: Rows, fresh: Callable[[], Rows]) -> Rows:
    """A new order put where another stands, its state having been through a file's JSON."""
    facts, tokens, ends = order.state()
    again = fresh()
    again.restore(json.loads(json.dumps(facts)), tokens.copy(), ends.copy())
    return again


@settings(deadline=None, max_examples=60)
@given(
    LENGTHS,
    LENGTHS,
    st.integers(2, 24),
    st.integers(0, 6),
    st.integers(0, 40),
    st.integers(0, 5),
)
def test_a_resumed_order_goes_on_with_the_same_rows(
    first: list[int], second: list[int], length: int, rsdb: int, before: int, seed: int
) -> None:
    def fresh() -> Rows:
        domains = {"a": numbered(first), "b": numbered(second, first=10_000)}
        stream = Stream(domains, seed)
        stream.mix({"a": 2.0, "b": 1.0})
        return Rows(stream, length, rsdb, seed)

    whole = fresh()
    for _ in range(before):
        whole.batch(1)
    again = resumed(whole, fresh)
    for one, other in zip(whole.batch(30), again.batch(30), strict=True):
        np.testing.assert_array_equal(one, other)
    assert again.stream.epoch == whole.stream.epoch


def hub(folder: Path, texts: list[str], share: int = 10) -> Streamed:
    """A stream through `datasets` over local files, as over the network."""
    folder.mkdir(exist_ok=True)
    half = len(texts) // 2
    for i, part in enumerate((texts[:half], texts[half:])):
        lines = (json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{i}.jsonl").write_text("".join(lines))
    source = Source(name="hub", path=f"hf://{folder}")
    return Streamed(Hub(source), tokenizer.train(["some text of it"] * 3, 258), share)


TEXTS = [f"document number {i} of the stream" for i in range(150)]


def test_a_stream_gives_its_training_documents_in_order_again_and_again(tmp_path: Path) -> None:
    streamed = hub(tmp_path / "hub", TEXTS)
    live = Live(streamed)
    training = [text for text in TEXTS if not held_out(text, 10)]
    assert 100 < len(training) < 150
    decode = streamed.vocabulary.decode
    got = decode([live.next()[1].tolist() for _ in range(len(training) + 5)])
    assert got == training + training[:5]
    assert live.epoch == 2


@pytest.mark.parametrize("before", [0, 1, 63, 64, 65, 130, 140, 300])
def test_a_resumed_stream_goes_on_with_the_same_documents(tmp_path: Path, before: int) -> None:
    live = Live(hub(tmp_path / "hub", TEXTS))
    for _ in range(before):
        live.next()
    state = json.loads(json.dumps(live.state()))
    expected = [live.next()[1].tolist() for _ in range(200)]
    again = Live(hub(tmp_path / "hub", TEXTS))
    again.restore(state)
    assert [again.next()[1].tolist() for _ in range(200)] == expected
    assert again.state()["epoch"] == live.epoch


def test_a_resumed_state_can_be_saved_again(tmp_path: Path) -> None:
    live = Live(hub(tmp_path / "hub", TEXTS))
    for _ in range(70):
        live.next()
    again = Live(hub(tmp_path / "hub", TEXTS))
    again.restore(json.loads(json.dumps(live.state())))
    assert again.state() == live.state()


def test_a_stream_of_held_out_documents_alone_is_refused(tmp_path: Path) -> None:
    kept = [text for text in TEXTS if held_out(text, 10)]
    live = Live(hub(tmp_path / "hub", kept))
    with pytest.raises(BadValue, match="the stream holds no training text"):
        live.next()


def test_too_little_validation_text_is_refused() -> None:
    with pytest.raises(BadValue, match="'a' is 3 tokens; it needs at least one row of 64"):
        rows.validation("a", numbered([3]), 64, 4)
