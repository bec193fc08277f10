"""Text to rows of tokens: a tokenizer, document packing, one global order of rows.

Everything is numpy; the training loop turns a `Batch` into tensors.
"""

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trinity_lib.config import check, require
from trinity_lib.corpus import Corpus

IGNORE = -1
"""Target of a position with nothing to predict; document of padding."""
BEGIN, END = "<|begin|>", "<|end|>"
SAMPLE_BYTES = 4_000_000
"""Training text the tokenizer is trained on, at most."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from, rows, and the order of documents."""

    corpus: Literal["embedded", "procedural"] = "embedded"
    """`embedded`: this Python's standard library and procedural text; or the latter alone."""
    sequence_length: int
    """Tokens in a packed row."""
    rsdb: int = 0
    """Documents RSDB keeps open (it holds up to twice as many); 0 packs one after another."""
    validation_rows: int = 32
    """Packed rows evaluated per domain, at most."""

    def __post_init__(self) -> None:
        check(self)
        length = self.sequence_length
        require(length >= 2, "data.sequence_length", length, "at least 2")
        require(self.rsdb >= 0, "data.rsdb", self.rsdb, "0 (off) or a number of documents")
        rows = self.validation_rows
        require(rows >= 1, "data.validation_rows", rows, "at least 1")


class Documents(NamedTuple):
    """Tokenised documents of one domain, end to end."""

    tokens: np.ndarray
    """All tokens, int32."""
    ends: np.ndarray
    """Where each document ends in `tokens`, int64."""

    def __len__(self) -> int:
        """How many documents."""
        return len(self.ends)

    def document(self, index: int) -> np.ndarray:
        """Tokens of one document, begin and end marks included."""
        start = self.ends[index - 1] if index else 0
        return self.tokens[start : self.ends[index]]


class Batch(NamedTuple):
    """Packed rows. Every token of a document is an input once and a target at most once."""

    tokens_BS: np.ndarray
    """Inputs, int64."""
    targets_BS: np.ndarray
    """The next token of the same document, in this row or not; IGNORE at a document's end."""
    documents_BS: np.ndarray
    """Number of the piece of document within the row, int64; IGNORE for padding."""


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with isolated digits; the same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_for(corpus: Corpus, vocab_size: int, cache: Path) -> Tokenizer:
    """The corpus's own tokenizer of `vocab_size` entries, trained once and cached.

    Raises ValueError where the text does not yield that many entries.
    """
    file = cache / f"tokenizer-{vocab_size}-{corpus.sha256[:12]}.json"
    if file.exists():
        return Tokenizer.from_file(str(file))
    print(f"training a tokenizer of {vocab_size} entries, once: {file}", flush=True)
    tokenizer = train_tokenizer(_sample(corpus), vocab_size)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at most {tokenizer.get_vocab_size()}, "
            "what this corpus yields, and at least 258."
        )
    cache.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    tokenizer.save(str(temporary))
    os.replace(temporary, file)
    return tokenizer


def _sample(corpus: Corpus) -> list[str]:
    """Training documents, an equal share of SAMPLE_BYTES from every domain."""
    texts = []
    for documents in corpus.documents["train"].values():
        left = SAMPLE_BYTES // len(corpus.documents["train"])
        for i in random.Random(0).sample(range(len(documents)), len(documents)):
            texts.append(documents[i])
            left -= len(documents[i])
            if left <= 0:
                break
    return texts


def sha256(tokenizer: Tokenizer) -> str:
    """SHA-256 of a tokenizer's JSON."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def tokenised(
    corpus: Corpus, tokenizer: Tokenizer, cache: Path
) -> dict[str, dict[str, Documents]]:
    """Split -> domain -> tokenised documents, cached under corpus and tokenizer."""
    folder = cache / f"tokens-{corpus.sha256[:12]}-{sha256(tokenizer)[:12]}"
    if not folder.exists():
        temporary = folder.with_name(f"{folder.name}.{os.getpid()}.{time.time_ns()}")
        temporary.mkdir(parents=True)
        for split, domains in corpus.documents.items():
            for domain, texts in domains.items():
                documents = tokenise(texts, tokenizer)
                np.save(temporary / f"{split}-{domain}.tokens.npy", documents.tokens)
                np.save(temporary / f"{split}-{domain}.ends.npy", documents.ends)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(temporary)  # another process finished the same work first
    return {
        split: {
            domain: Documents(
                np.load(folder / f"{split}-{domain}.tokens.npy"),
                np.load(folder / f"{split}-{domain}.ends.npy"),
            )
            for domain in domains
        }
        for split, domains in corpus.documents.items()
    }


def tokenise(texts: Sequence[str], tokenizer: Tokenizer) -> Documents:
    """Each text as begin mark, tokens, end mark."""
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    pieces = [[begin, *e.ids, end] for e in tokenizer.encode_batch(list(texts))]
    lengths = np.array([len(p) for p in pieces], dtype=np.int64)
    flat = [np.asarray(p, dtype=np.int32) for p in pieces]
    return Documents(np.concatenate(flat or [np.zeros(0, np.int32)]), lengths.cumsum())


class Stream:
    """An endless order of documents over domains, by a mixture of token shares.

    The domain furthest behind its share comes next, so that the mixture holds at every
    moment; a domain's documents come in a seeded shuffle, a fresh one every epoch.
    """

    def __init__(self, domains: Mapping[str, Documents], seed: int) -> None:
        self.domains = dict(domains)
        self.random = {name: np.random.default_rng([seed, i]) for i, name in enumerate(domains)}
        self.order = {name: np.zeros(0, np.int64) for name in domains}
        self.taken = dict.fromkeys(domains, 0)
        self.epoch = dict.fromkeys(domains, 0)
        self.issued = dict.fromkeys(domains, 0)
        self.mixture: dict[str, float] = {}

    def mix(self, mixture: Mapping[str, float]) -> None:
        """Set the shares; ValueError names a domain there is none of."""
        for name in mixture:
            right = f"made of {', '.join(self.domains)}"
            require(name in self.domains, "mixture", name, right)
        positive = {name: share for name, share in mixture.items() if share > 0}
        total = sum(positive.values())
        self.mixture = {name: share / total for name, share in positive.items()}
        self.issued = dict.fromkeys(self.domains, 0)

    def next(self) -> np.ndarray:
        """Tokens of the next document."""
        name = min(self.mixture, key=lambda n: self.issued[n] / self.mixture[n])
        if self.taken[name] == len(self.order[name]):
            self.order[name] = self.random[name].permutation(len(self.domains[name]))
            self.taken[name] = 0
            self.epoch[name] += 1
        tokens = self.domains[name].document(int(self.order[name][self.taken[name]]))
        self.taken[name] += 1
        self.issued[name] += len(tokens)
        return tokens


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
        self.open: list[tuple[np.ndarray, int]] = []

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
                self.open += [
                    (self.stream.next(), 0)
                    for _ in range(max(1, 2 * self.rsdb) - len(self.open))
                ]
            chosen = int(self.random.integers(len(self.open))) if self.rsdb else 0
            tokens, head = self.open[chosen]
            stop = min(len(tokens), head + self.length - filled)
            place(batch, row, filled, piece, tokens, head, stop)
            filled += stop - head
            piece += 1
            if stop == len(tokens):
                self.open.pop(chosen)
            else:
                self.open[chosen] = (tokens, stop)


def place(
    batch: Batch, row: int, at: int, piece: int, tokens: np.ndarray, head: int, stop: int
) -> None:
    """Copy `tokens[head:stop]` into a row at position `at`, with targets and piece number."""
    where = slice(at, at + stop - head)
    batch.tokens_BS[row, where] = tokens[head:stop]
    batch.documents_BS[row, where] = piece
    targets = tokens[head + 1 : stop + 1]
    batch.targets_BS[row, at : at + len(targets)] = targets


def validation_rows(documents: Documents, length: int, rows: int, seed: int) -> Batch:
    """The first `rows` full rows of a domain's shuffled validation documents.

    ValueError where there is not one full row.
    """
    rows = min(rows, len(documents.tokens) // length)
    if rows == 0:
        raise ValueError(
            f"a validation domain has {len(documents.tokens)} tokens; it needs at least "
            f"one row of {length}."
        )
    stream = Stream({"validation": documents}, seed)
    stream.mix({"validation": 1.0})
    return Rows(stream, length, 0, seed).batch(rows)


def target_bytes(batch: Batch, tokenizer: Tokenizer) -> bytes:
    """The text that the batch's targets spell, as UTF-8 (marks spell nothing)."""
    rows = [row[row != IGNORE].tolist() for row in batch.targets_BS]
    return "".join(tokenizer.decode_batch(rows, skip_special_tokens=True)).encode()


def describe(documents: Mapping[str, Mapping[str, Documents]]) -> str:
    """Documents and tokens by split and domain, as JSON for the run file."""
    sizes = {
        split: {name: [len(d), len(d.tokens)] for name, d in domains.items()}
        for split, domains in documents.items()
    }
    return json.dumps(sizes)
