"""Text to tokens: a byte-level BPE of the corpus's own, or a tokenizer.json from elsewhere."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trinity_lib import disk
from trinity_lib.config import BadValue, Missing, first_line, require
from trinity_lib.corpus import Corpus
from trinity_lib.sources import Texts

BEGIN, END = "<|begin|>", "<|end|>"
BEGINS = (BEGIN, "<|begin_of_text|>", "<|startoftext|>", "<bos>", "<s>", "[BOS]", "[CLS]")
"""Names of begin marks, in the order they are looked for."""
ENDS = (END, "<|end_of_text|>", "<|endoftext|>", "<eos>", "</s>", "[EOS]", "[SEP]")
"""Names of end marks."""
FEWEST = 256 + len((BEGIN, END))
"""Entries of the smallest tokenizer that is trained: single bytes and the marks."""
SAMPLE_CHARACTERS = 4_000_000
"""Training text the tokenizer is trained on, about at most."""
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and the marks put around every document."""

    tokenizer: Tokenizer
    """Encodes without special tokens of its own."""
    begin: str | None
    """Mark before a document, or None."""
    end: str | None
    """Mark after a document, or None."""

    @property
    def size(self) -> int:
        """Embedding rows it needs: the highest id and one."""
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def ids(self) -> dict[str, int | None]:
        """The marks' tokens, as a model's config.json names them."""
        marks = {"bos_token_id": self.begin, "eos_token_id": self.end}
        return {
            key: None if mark is None else self.tokenizer.token_to_id(mark)
            for key, mark in marks.items()
        }

    @property
    def unknown(self) -> int | None:
        """The token that stands for what the tokenizer does not know, if it has one."""
        token = getattr(self.tokenizer.model, "unk_token", None)
        return None if token is None else self.tokenizer.token_to_id(token)

    @property
    def sha256(self) -> str:
        """Hash of the tokenizer's JSON."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each text's tokens between the marks, int32."""
        before, after = (
            [] if mark is None else [self.tokenizer.token_to_id(mark)]
            for mark in (self.begin, self.end)
        )
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array([*before, *e.ids, *after], dtype=np.int32) for e in encoded]

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text that tokens spell; marks spell nothing."""
        return self.tokenizer.decode_batch(rows, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and the marks as transformers names them."""
        self.tokenizer.save(str(folder / FILE))
        names = {"bos_token": self.begin, "eos_token": self.end}
        names["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / SETTINGS).write_text(json.dumps(names))


def load(path: str | Path) -> Vocabulary:
    """A tokenizer.json, or the one in a folder, as `data` needs it.

    Marks are what `tokenizer_config.json` beside it names, else the first of the usual
    names it has. Missing where there is no file, BadValue where it is no tokenizer.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise Missing(f"tokenizer is {str(path)!r}; there is no such file.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing narrower
        raise BadValue(
            f"tokenizer {file} is not a tokenizer.json: {first_line(error)}."
        ) from error
    tokenizer.encode_special_tokens = True  # a mark spelled out in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    named = _named(file.with_name(SETTINGS))
    found = []
    for key, usual in (("bos_token", BEGINS), ("eos_token", ENDS)):
        names = (named[key],) if key in named else usual
        has = (n for n in names if n is not None and tokenizer.token_to_id(n) is not None)
        found.append(next(has, None))
    return Vocabulary(tokenizer, *found)


def _named(file: Path) -> dict[str, str | None]:
    """bos_token and eos_token of a tokenizer_config.json, as far as it has them."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        names = {key: settings[key] for key in ("bos_token", "eos_token") if key in settings}
    except (ValueError, TypeError) as error:
        raise BadValue(f"{file} is not JSON with a mapping: {first_line(error)}.") from error
    return {key: _content(value) for key, value in names.items()}


def _content(mark: Any) -> str | None:
    name = mark.get("content") if isinstance(mark, dict) else mark
    if name is not None and not isinstance(name, str):
        raise BadValue(f"{SETTINGS} names {name!r} as a mark; it must be text.")
    return name


def train(texts: Sequence[str], vocab_size: int, words: Sequence[str] = ()) -> Vocabulary:
    """Byte-level BPE with isolated digits; the same texts give the same tokenizer.

    Each of `words`, where a blank precedes it, is one token.
    """
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
    if words:
        tokenizer = _with_words(tokenizer, vocab_size, words)
    tokenizer.encode_special_tokens = True  # a mark spelled out in a text is text
    return Vocabulary(tokenizer, BEGIN, END)


def _with_words(tokenizer: Tokenizer, vocab_size: int, words: Sequence[str]) -> Tokenizer:
    """The same with whole words in place of the last merges, as many as they need."""
    content = json.loads(tokenizer.to_str())
    vocab, merges = content["model"]["vocab"], content["model"]["merges"]
    whole = dict.fromkeys(f"\u0120{word}" for word in words)  # how byte-level BPE spells blanks
    size = len(vocab)
    while size and size + sum(vocab.get(word, size) >= size for word in whole) > vocab_size:
        size -= 1
    kept = {token: number for token, number in vocab.items() if number < size}
    if any(byte not in kept for byte in pre_tokenizers.ByteLevel.alphabet()):
        raise BadValue(
            f"vocab_size is {vocab_size}; it must be at least {FEWEST + len(whole)}, for "
            f"single bytes and {len(whole)} whole words."
        )
    for word in whole:
        kept.setdefault(word, len(kept))
    content["model"] |= {
        "vocab": kept,
        "merges": [
            pair for pair in merges if "".join(pair) in kept and vocab["".join(pair)] < size
        ],
        "ignore_merges": True,
    }
    return Tokenizer.from_str(json.dumps(content))


def of_corpus(corpus: Texts, vocab_size: int, cache: Path) -> Vocabulary:
    """The corpus's own tokenizer of `vocab_size` entries, trained once and cached.

    Raises BadValue where the text does not yield that many entries; a corpus with words to be
    held whole may yield fewer.
    """
    words = corpus.words if isinstance(corpus, Corpus) else ()
    if not words:  # else training knows how many they take
        right = f"at least {FEWEST}, for single bytes and two marks"
        require(vocab_size >= FEWEST, "vocab_size", vocab_size, right)
    file = cache / f"tokenizer-{vocab_size}-{corpus.sha256[:12]}.json"
    if file.exists():
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.encode_special_tokens = True
        return Vocabulary(tokenizer, BEGIN, END)
    print(f"training a tokenizer of {vocab_size} entries, once: {file}", flush=True)
    vocabulary = train(corpus.sample(SAMPLE_CHARACTERS), vocab_size, words)
    if vocabulary.size != vocab_size and not words:  # whole words leave rows over
        raise BadValue(
            f"vocab_size is {vocab_size}; it must be at most {vocabulary.size}, what this "
            "text yields."
        )
    cache.mkdir(parents=True, exist_ok=True)
    disk.replace(file, lambda path: vocabulary.tokenizer.save(str(path)))
    return vocabulary
