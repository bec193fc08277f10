"""Text to tokens on disk, and what a run is given of both.

Everything is numpy; the training loop turns a `Batch` into tensors.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from trinity_lib import corpus, disk, tokenizer
from trinity_lib.config import BadValue, check, require
from trinity_lib.planted import WorldConfig
from trinity_lib.progress import counted
from trinity_lib.sources import HUB, Files, Hub, Source, Texts, held_out
from trinity_lib.tokenizer import Vocabulary

IGNORE = -1
"""Target of a position with nothing to predict; document of padding."""
AT_ONCE, CHARACTERS = 64, 1_000_000
"""Documents tokenised together, and characters of them, at most."""
MOST_OPEN = 10_000_000
LARGEST_UNKNOWN = 0.01
"""Share of unknown tokens above which a run says so."""
STREAM_LIMIT = 100_000
"""Documents of a stream that are read for validation or a tokenizer, at most."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from, rows, and the order of documents."""

    corpus: Literal["embedded", "procedural", "registered", "planted"] = "embedded"
    """`embedded`: this Python's standard library and procedural text; `procedural`: the latter
    alone; `registered`: code and prose of the former, and a register that has to be stored;
    `planted`: a world with known truth."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """The world of `planted`."""
    sources: tuple[Source, ...] = ()
    """The user's own text, in place of `corpus`; a domain each."""
    tokenizer: str = ""
    """A tokenizer.json or its folder; empty trains one on the text."""
    validation_share: int = 10
    """One part in this many of the user's text is held out."""
    sequence_length: int
    """Tokens in a packed row."""
    rsdb: int = 0
    """Documents RSDB keeps open (it holds up to twice as many); 0 packs one after another."""
    validation_rows: int = 32
    """Packed rows evaluated per domain, at most."""

    def __post_init__(self) -> None:
        check(self)
        length, share = self.sequence_length, self.validation_share
        require(length >= 2, "data.sequence_length", length, "at least 2")
        require(share >= 2, "data.validation_share", share, "at least 2")
        open_ones = 0 <= self.rsdb <= MOST_OPEN
        right = f"0 (off) or a number of documents up to {MOST_OPEN:,}"
        require(open_ones, "data.rsdb", self.rsdb, right)
        rows = self.validation_rows
        require(rows >= 1, "data.validation_rows", rows, "at least 1")
        names = [source.name for source in self.sources]
        require(len(set(names)) == len(names), "data.sources", names, "sources of unlike names")


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


class Streamed(NamedTuple):
    """A training domain that is tokenised as it arrives."""

    hub: Hub
    """Where documents come from."""
    vocabulary: Vocabulary
    """What makes tokens of them."""
    share: int
    """One document in this many is validation's, and is passed over."""


class Batch(NamedTuple):
    """Packed rows. Every token of a document is an input once and a target at most once."""

    tokens_BS: np.ndarray
    """Inputs, int64."""
    targets_BS: np.ndarray
    """The next token of the same document, in this row or not; IGNORE at a document's end."""
    documents_BS: np.ndarray
    """Number of the piece of document within the row, int64; IGNORE for padding."""


class Loaded(NamedTuple):
    """The data of a run, before its order."""

    vocabulary: Vocabulary
    """The tokenizer and its marks."""
    train: dict[str, Documents | Streamed]
    """Training documents by domain."""
    validation: dict[str, Documents]
    """Held-out documents by domain."""
    sha256: str
    """Hash of the text (of a stream: its address)."""
    warnings: tuple[str, ...]
    """What the run should report."""

    @property
    def summary(self) -> str:
        """Documents and tokens by split and domain, as JSON for the run file."""
        sizes: dict[str, dict[str, list[int] | str]] = {"train": {}, "validation": {}}
        for split, domains in (("train", self.train), ("validation", self.validation)):
            for name, each in domains.items():
                if isinstance(each, Documents):
                    sizes[split][name] = [len(each), len(each.tokens)]
                else:
                    sizes[split][name] = "streamed"
        return json.dumps(sizes)


def load(config: DataConfig, vocab_size: int, cache: Path) -> Loaded:
    """Read, tokenise (once, into `cache`) and split what a run trains on.

    Raises Missing and BadValue for files that are not there, are no text, hold nothing, or
    need more than `vocab_size` entries.
    """
    local = tuple(s for s in config.sources if not s.path.startswith(HUB))
    hubs = {s.name: Hub(s) for s in config.sources if s.path.startswith(HUB)}
    texts: Texts | None = None
    if local:
        texts = Files(local, config.validation_share)
    elif not hubs:
        if config.corpus == "procedural":
            texts = corpus.procedural(0)
        elif config.corpus == "planted":
            texts = corpus.planted(config.world)
        else:
            make = corpus.embedded if config.corpus == "embedded" else corpus.registered
            texts = make(cache)
    warnings = list(texts.warnings) if texts else []
    share = config.validation_share
    address = "".join(f"{h.source.path} {h.source.field} {share}\n" for h in hubs.values())
    digest = hashlib.sha256(address.encode() + (texts.sha256.encode() if texts else b""))
    sha256 = digest.hexdigest() if hubs else texts.sha256 if texts else ""
    vocabulary = _vocabulary(config, vocab_size, texts, hubs, cache)
    if vocabulary.end is None:
        warnings.append(
            "the tokenizer has no end mark that is known by its name: documents are told "
            "apart by masks alone, and a model trained on them cannot end one."
        )
    train: dict[str, Documents | Streamed] = {}
    validation: dict[str, Documents] = {}
    if texts:
        made = tokenised(texts, vocabulary, cache)
        train |= made["train"]
        validation |= made["validation"]
    for name, hub in hubs.items():
        train[name] = streamed = Streamed(hub, vocabulary, config.validation_share)
        validation[name] = _streamed_validation(streamed, config)
    warnings += _unknown(validation, vocabulary)
    order = [s.name for s in config.sources] or list(train)
    return Loaded(
        vocabulary,
        {name: train[name] for name in order},
        {name: validation[name] for name in order},
        sha256,
        tuple(warnings),
    )


def _vocabulary(
    config: DataConfig,
    vocab_size: int,
    texts: Texts | None,
    hubs: Mapping[str, Hub],
    cache: Path,
) -> Vocabulary:
    if config.tokenizer:
        vocabulary = tokenizer.load(Path(config.tokenizer))
        if vocabulary.size > vocab_size:
            raise BadValue(
                f"tokenizer {config.tokenizer} has {vocabulary.size:,} entries; the model's "
                f"vocabulary is {vocab_size:,}."
            )
        return vocabulary
    if texts is None:
        right = "the path of a tokenizer.json, where all text is streamed"
        require(False, "tokenizer", config.tokenizer, right)
        raise AssertionError
    return tokenizer.of_corpus(texts, vocab_size, cache)


def _unknown(validation: Mapping[str, Documents], vocabulary: Vocabulary) -> list[str]:
    """A warning for every domain that the tokenizer does not cover."""
    found: list[str] = []
    if vocabulary.unknown is None:
        return found
    for name, documents in validation.items():
        share = float((documents.tokens == vocabulary.unknown).mean()) if len(documents) else 0
        if share > LARGEST_UNKNOWN:
            found.append(
                f"{share:.0%} of the validation tokens of {name!r} are unknown to the tokenizer"
            )
    return found


def _streamed_validation(domain: Streamed, config: DataConfig) -> Documents:
    """The first held-out documents of a stream, enough for the rows that are evaluated."""
    enough = config.validation_rows * config.sequence_length
    pieces: list[np.ndarray] = []
    found = 0
    known = counted(domain.hub.documents(), "reading the stream's validation", "document")
    for number, text in enumerate(known):
        if found >= enough or number == STREAM_LIMIT:
            break
        if text.strip() and held_out(text, domain.share):
            (tokens,) = domain.vocabulary.encode([text])
            pieces.append(tokens)
            found += len(tokens)
    lengths = np.array([len(p) for p in pieces], dtype=np.int64)
    return Documents(np.concatenate([np.zeros(0, np.int32), *pieces]), lengths.cumsum())


def tokenised(
    texts: Texts, vocabulary: Vocabulary, cache: Path
) -> dict[str, dict[str, Documents]]:
    """Split -> domain -> documents, mapped from a folder of `cache` made once."""
    marks = f"{vocabulary.begin} {vocabulary.end} {vocabulary.sha256}"
    known_by = hashlib.sha256(marks.encode()).hexdigest()
    folder = cache / f"tokenised-{texts.sha256[:12]}-{known_by[:12]}"
    stems = [f"{split}-{domain}" for split in corpus.SPLITS for domain in texts.domains]
    if folder.exists() and not all(_whole(folder / stem) for stem in stems):
        print(f"the tokens in {folder} are damaged: made again", flush=True)
        disk.remove_folder(folder)
    if not folder.exists():
        disk.remove_dead(folder)
        temporary = disk.of_this_process(folder)
        temporary.mkdir(parents=True)
        try:
            _tokenise(texts, vocabulary, temporary)
            disk.sync_folder(temporary)
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process finished the same work first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return {
        split: {domain: _mapped(folder / f"{split}-{domain}") for domain in texts.domains}
        for split in corpus.SPLITS
    }


def _tokenise(texts: Texts, vocabulary: Vocabulary, folder: Path) -> None:
    """Write every domain's tokens and ends, a few documents at a time."""
    waiting: dict[str, list[str]] = {
        f"{split}-{domain}": [] for split in corpus.SPLITS for domain in texts.domains
    }
    with contextlib.ExitStack() as stack:
        files = {
            name: tuple(
                stack.enter_context((folder / f"{name}.{kind}").open("wb"))
                for kind in ("tokens", "lengths")
            )
            for name in waiting
        }
        for split, domain, text in counted(texts.read(), "tokenising", "document"):
            name = f"{split}-{domain}"
            waiting[name].append(text)
            many = len(waiting[name]) == AT_ONCE or sum(map(len, waiting[name])) > CHARACTERS
            if many:
                _write(files[name], vocabulary, waiting[name])
                waiting[name] = []
        for name, left in waiting.items():
            _write(files[name], vocabulary, left)


def _write(files: tuple[IO[bytes], ...], vocabulary: Vocabulary, texts: list[str]) -> None:
    documents = [tokens for tokens in vocabulary.encode(texts) if len(tokens)]
    tokens, lengths = files
    for document in documents:
        tokens.write(document.tobytes())
    lengths.write(np.array([len(d) for d in documents], dtype=np.int64).tobytes())


def _whole(stem: Path) -> bool:
    """Whether a domain's files are there and agree with each other."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("tokens", "lengths")]
    if not all(file.is_file() for file in files) or files[1].stat().st_size % 8:
        return False
    total = int(np.fromfile(files[1], dtype=np.int64).sum())
    return files[0].stat().st_size == 4 * total


def _mapped(stem: Path) -> Documents:
    tokens = stem.with_name(f"{stem.name}.tokens")
    lengths = np.fromfile(stem.with_name(f"{stem.name}.lengths"), dtype=np.int64)
    if not len(lengths):
        return Documents(np.zeros(0, np.int32), lengths)
    return Documents(np.memmap(tokens, dtype=np.int32, mode="r"), lengths.cumsum())


def target_text(batch: Batch, vocabulary: Vocabulary) -> bytes:
    """The text that the batch's targets spell, as UTF-8 (marks spell nothing)."""
    rows = [row[row != IGNORE].tolist() for row in batch.targets_BS]
    return "".join(vocabulary.decode(rows)).encode()
