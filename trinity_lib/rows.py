"""The one global order of packed rows: which document comes next, and how rows are filled.

Ranks take their shares of it; its state is small, and resumes it exactly.
"""

import hashlib
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from trinity_lib.config import BadValue, require
from trinity_lib.data import AT_ONCE, IGNORE, Batch, Documents, Streamed
from trinity_lib.sources import held_out


class Shuffled:
    """A domain's documents in a seeded shuffle, a fresh one every epoch."""

    def __init__(self, documents: Documents, generator: np.random.Generator) -> None:
        self.documents, self.generator = documents, generator
        self.before = generator.bit_generator.state
        self.order = np.zeros(0, np.int64)
        self.taken = self.epoch = 0

    def next(self) -> tuple[int, np.ndarray]:
        """Number and tokens of the next document."""
        if self.taken == len(self.order):
            self._shuffle()
        index = int(self.order[self.taken])
        self.taken += 1
        return index, self.documents.document(index)

    def _shuffle(self) -> None:
        self.before = self.generator.bit_generator.state
        self.order = self.generator.permutation(len(self.documents))
        self.taken, self.epoch = 0, self.epoch + 1

    def state(self) -> dict[str, Any]:
        """What `restore` needs, for JSON."""
        return {"epoch": self.epoch, "taken": self.taken, "generator": self.before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken."""
        self.generator.bit_generator.state = state["generator"]
        self.epoch = state["epoch"] - 1
        if state["epoch"] == 0:
            self.epoch = 0
            return
        self._shuffle()
        self.taken = state["taken"]


class Live:
    """A streamed domain's documents in the stream's own order, again and again.

    Documents are read a few at a time, so that they are tokenised together; the state is
    where the stream stood before the last few.
    """

    def __init__(self, streamed: Streamed) -> None:
        self.streamed = streamed
        self.ready: list[np.ndarray] = []
        self.taken = self.epoch = self.found = 0
        self.before = self.after = streamed.hub.start
        self.texts = streamed.hub.documents()

    def next(self) -> tuple[int, np.ndarray]:
        """-1 and the next document's tokens; BadValue where the stream has none to train on."""
        while self.taken == len(self.ready):
            self.epoch = max(1, self.epoch)
            if self._read():
                continue
            if not self.found:
                path = self.streamed.hub.source.path
                raise BadValue(f"data is {path!r}; the stream holds no training text.")
            self.epoch, self.found = self.epoch + 1, 0
            self.after = self.streamed.hub.start
            self.texts = self.streamed.hub.documents()
        self.taken += 1
        return -1, self.ready[self.taken - 1]

    def _read(self) -> bool:
        """Tokenise the next few documents; whether the stream had any."""
        texts = list(itertools.islice(self.texts, AT_ONCE))
        self.before, self.after = self.after, self.streamed.hub.state()
        share = self.streamed.share
        kept = [text for text in texts if text.strip() and not held_out(text, share)]
        self.ready = [t for t in self.streamed.vocabulary.encode(kept) if len(t)]
        self.taken = 0
        self.found += len(self.ready)
        return bool(texts)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, for JSON."""
        names = ("epoch", "taken", "found", "before", "after")
        return {name: getattr(self, name) for name in names} | {"ready": self._digest()}

    def _digest(self) -> str:
        """Hash of the last few documents, "" before the first: a stream may have changed."""
        every = b"".join(tokens.tobytes() + b"|" for tokens in self.ready)
        return hashlib.sha256(every).hexdigest() if self.ready else ""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken; the last few documents are read again.

        BadValue where they are others than they were.
        """
        self.after = state["before"]
        self.texts = self.streamed.hub.documents(self.after)
        if state["ready"]:
            self._read()
        if self._digest() != state["ready"]:
            path = self.streamed.hub.source.path
            raise BadValue(f"data is {path!r}; the stream has changed since the checkpoint.")
        self.before, self.after = state["before"], state["after"]
        self.epoch, self.taken, self.found = (state[n] for n in ("epoch", "taken", "found"))


class Open(NamedTuple):
    """A document that rows are filled from."""

    tokens: np.ndarray
    """Its tokens."""
    head: int
    """How many of them are read."""
    domain: str
    """Where it comes from."""
    number: int
    """Its number there; -1 where it came from a stream."""


class Stream:
    """An endless order of documents over domains, by a mixture of token shares.

    The domain furthest behind its share comes next, so that the mixture holds at every
    moment.
    """

    def __init__(self, domains: Mapping[str, Documents | Streamed], seed: int) -> None:
        self.feeds: dict[str, Shuffled | Live] = {}
        for i, (name, each) in enumerate(domains.items()):
            if isinstance(each, Documents):
                self.feeds[name] = Shuffled(each, np.random.default_rng([seed, i]))
            else:
                self.feeds[name] = Live(each)
        self.issued = dict.fromkeys(domains, 0)
        self.mixture: dict[str, float] = {}

    @property
    def epoch(self) -> dict[str, int]:
        """Epochs begun, by domain."""
        return {name: feed.epoch for name, feed in self.feeds.items()}

    def mix(self, mixture: Mapping[str, float]) -> None:
        """Set the shares; BadValue names a domain there is none of, or nothing of."""
        for name, share in mixture.items():
            right = f"made of {', '.join(self.feeds)}"
            require(name in self.feeds, "mixture", name, right)
            feed = self.feeds[name]
            empty = isinstance(feed, Shuffled) and not len(feed.documents)
            require(not (share and empty), "mixture", name, "a domain with training text")
        # In the feeds' order, not the mapping's: JSON sorts keys, and ties go to the first.
        positive = {name: mixture[name] for name in self.feeds if mixture.get(name, 0) > 0}
        total = sum(positive.values())
        self.mixture = {name: share / total for name, share in positive.items()}
        self.issued = dict.fromkeys(self.feeds, 0)

    def next(self) -> "Open":
        """The next document, unread."""
        name = min(self.mixture, key=lambda n: self.issued[n] / self.mixture[n])
        number, tokens = self.feeds[name].next()
        self.issued[name] += len(tokens)
        return Open(tokens, 0, name, number)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, for JSON."""
        feeds = {name: feed.state() for name, feed in self.feeds.items()}
        return {"feeds": feeds, "issued": self.issued, "mixture": self.mixture}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken."""
        for name, feed in self.feeds.items():
            feed.restore(state["feeds"][name])
        self.issued, self.mixture = dict(state["issued"]), dict(state["mixture"])


class Rows:
    """The one global order of packed rows.

    With `rsdb` 0 documents are packed one after another. Otherwise they go through a
    Random Sequential Document Buffer (technical report, section 3.3.2): a row is filled
    from the read head of a uniformly random open document until the row is full or the
    document ends, then from another; the buffer holds up to 2 * rsdb documents and is
    refilled when `rsdb` are left. No token is dropped.
    """

    def __init__(self, stream: Stream, sequence_length: int, rsdb: int, seed: int) -> None:
        self.stream, self.length, self.rsdb = stream, sequence_length, rsdb
        self.random = np.random.default_rng([seed, 1_000_003])
        self.open: list[Open] = []

    def batch(self, rows: int) -> Batch:
        """The next `rows` rows."""
        shape = (rows, self.length)
        batch = Batch(*(np.full(shape, IGNORE, dtype=np.int64) for _ in Batch._fields))
        for row in range(rows):
            self._fill(batch, row)
        return batch

    def _fill(self, batch: Batch, row: int) -> None:
        filled = piece = 0
        while filled < self.length:
            if len(self.open) <= self.rsdb:
                missing = max(1, 2 * self.rsdb) - len(self.open)
                self.open += [self.stream.next() for _ in range(missing)]
            chosen = int(self.random.integers(len(self.open))) if self.rsdb else 0
            tokens, head = self.open[chosen][:2]
            stop = min(len(tokens), head + self.length - filled)
            place(batch, row, filled, piece, tokens, head, stop)
            filled += stop - head
            piece += 1
            if stop == len(tokens):
                self.open.pop(chosen)
            else:
                self.open[chosen] = self.open[chosen]._replace(head=stop)

    def state(self) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
        """(facts for JSON, unread tokens of streamed open documents, where each ends).

        Other open documents are in the facts, by number and read head.
        """
        unread = [each.tokens[each.head :] for each in self.open if each.number < 0]
        ends = np.array([len(tokens) for tokens in unread], dtype=np.int64).cumsum()
        facts = {
            "stream": self.stream.state(),
            "generator": self.random.bit_generator.state,
            "open": [[each.domain, each.number, each.head] for each in self.open],
        }
        return facts, np.concatenate([np.zeros(0, np.int32), *unread]), ends

    def restore(self, facts: Mapping[str, Any], tokens: np.ndarray, ends: np.ndarray) -> None:
        """Stand where `state` was taken: the next row is the one that would have come."""
        self.stream.restore(facts["stream"])
        self.random.bit_generator.state = facts["generator"]
        streamed = iter(np.split(tokens, ends[:-1]))
        self.open = []
        for domain, number, head in facts["open"]:
            feed = self.stream.feeds[domain]
            if isinstance(feed, Shuffled):
                self.open.append(Open(feed.documents.document(number), head, domain, number))
            else:
                self.open.append(Open(next(streamed), 0, domain, number))


def share_of(batch: Batch, part: int, parts: int) -> Batch:
    """Part number `part` of a global batch's rows, in order: a rank's, or a micro-batch."""
    rows = len(batch.tokens_BS)
    require(rows % parts == 0, "parts", parts, f"a divisor of the batch's {rows} rows")
    here = slice(part * rows // parts, (part + 1) * rows // parts)
    return Batch(*(array[here] for array in batch))


def place(
    batch: Batch, row: int, at: int, piece: int, tokens: np.ndarray, head: int, stop: int
) -> None:
    """Copy `tokens[head:stop]` into a row at position `at`, with targets and piece number."""
    where = slice(at, at + stop - head)
    batch.tokens_BS[row, where] = tokens[head:stop]
    batch.documents_BS[row, where] = piece
    targets = tokens[head + 1 : stop + 1]
    batch.targets_BS[row, at : at + len(targets)] = targets


def validation(domain: str, documents: Documents, length: int, rows: int) -> Batch:
    """The first `rows` full rows of a domain's shuffled validation documents.

    BadValue where there is not one full row.
    """
    rows = min(rows, len(documents.tokens) // length)
    if rows == 0:
        raise BadValue(
            f"the validation text of {domain!r} is {len(documents.tokens)} tokens; it needs at "
            f"least one row of {length}: give more text."
        )
    stream = Stream({domain: documents}, 0)
    stream.mix({domain: 1.0})
    return Rows(stream, length, 0, 0).batch(rows)
