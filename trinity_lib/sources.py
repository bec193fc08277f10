"""The user's own text: .txt, .jsonl and .parquet files, or a streamed Hugging Face dataset.

Files are read anew on every pass, so that memory stays small whatever their size. A tenth of
every source's text (one part in `share`) is held out for validation before anything else.
"""

import contextlib
import hashlib
import heapq
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import escape, glob
from pathlib import Path
from typing import Any

from trinity_lib.config import BadValue, Missing, check, first_line, require
from trinity_lib.corpus import Corpus
from trinity_lib.progress import counted

SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB = "hf://"
FEW = 20
"""A source of fewer documents gives the end of each to validation, not whole documents."""
LARGEST_SHARE = 1 / 3
"""So does one whose held-out documents would be more of its text than this."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of documents: a domain of the run."""

    name: str
    """Name of the domain."""
    path: str
    """A file, a folder, a glob, or hf://OWNER/DATASET[:CONFIGURATION]."""
    field: str = "text"
    """The field that holds the text, where documents have fields."""

    def __post_init__(self) -> None:
        check(self)
        plain = re.fullmatch(r"[\w.-]+", self.name) is not None
        require(plain, "source.name", self.name, "letters, digits, dots and dashes")


def parse(
    text: str, field: str, looked_in: Iterable[Path]
) -> tuple[tuple[Source, ...], dict[str, tuple[float, ...]]]:
    """Sources and their weights from "a.jsonl=3, books/*.txt=1:2:2, hf://owner/name".

    A weight is a share of tokens: one for the whole run, or one a phase between colons;
    without any it is 1. Relative paths are looked for in each folder of `looked_in`, the
    first first. Raises BadValue and, where a path matches nothing, Missing.
    """
    sources: list[Source] = []
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(.+?)\s*(?:=\s*([\d.:\s]+))?", part, re.DOTALL)
        assert match is not None
        path, numbers = match[1].strip(), (match[2] or "1").split(":")
        name = _name(path, {source.name for source in sources})
        try:
            weights[name] = tuple(float(number) for number in numbers)
        except ValueError as error:
            raise _bad_weight(part, match[2]) from error
        located = path if path.startswith(HUB) else _place(path, looked_in)
        sources.append(Source(name=name, path=located, field=field))
    require(bool(sources), "data", text, "files, folders, globs or hf:// datasets")
    return tuple(sources), weights


def _name(path: str, taken: set[str]) -> str:
    """A domain's name: the file's stem, or the last folder before a wildcard."""
    parts = [p for p in re.split(r"[/:]", path) if p and not set(p) & set("*?[")]
    stem = parts[-1] if parts else "text"
    stem = re.sub(r"[^\w.-]+", "-", stem.removesuffix(Path(stem).suffix)).strip("-.") or "text"
    numbered = (f"{stem}-{i}" for i in itertools.count(2))
    return next(name for name in itertools.chain([stem], numbered) if name not in taken)


def _bad_weight(part: str, weight: str) -> BadValue:
    return BadValue(
        f"data is {part!r}; its weight {weight.strip()!r} must be a number above zero, in "
        "plain digits, or one for each phase, as in 1:2:2."
    )


def _place(path: str, folders: Iterable[Path]) -> str:
    """`_locate`; BadValue where what is before the last "=" is there, though the whole is not.

    A path may itself hold "=", so that what follows one is a bad weight only then.
    """
    try:
        return _locate(path, folders)
    except Missing:
        before, _, weight = path.rpartition("=")
        with contextlib.suppress(Missing):
            if before.strip() and _locate(before.strip(), folders):
                raise _bad_weight(path, weight) from None
        raise


def _locate(path: str, folders: Iterable[Path]) -> str:
    """The absolute form of a path or glob that matches something."""
    try:
        wanted = Path(path).expanduser()
        tried = [folder / wanted for folder in folders]
        for candidate in tried:
            if candidate.exists() or _matches(candidate):
                return str(candidate)
    except (OSError, RuntimeError) as error:  # too long for a name; no such user
        raise Missing(f"data is {path!r:.80}; it is no path: {first_line(error)}.") from error
    places = " or ".join(dict.fromkeys(str(c.parent) for c in tried))
    raise Missing(f"data is {path!r}; nothing is there (looked in {places}).")


def _matches(path: Path) -> list[str]:
    """Files of a glob; a folder above the first wildcard is taken as it is written."""
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    for plain in range(len(parts), first - 1, -1):
        top = Path(*parts[:plain]) if plain else Path()
        if top.is_dir():
            return glob(str(Path(escape(str(top)), *parts[plain:])), recursive=True)
    return glob(str(path), recursive=True)


def files_of(source: Source) -> list[Path]:
    """The files of a local source, sorted.

    A folder gives every .txt, .jsonl and .parquet below it; a file or a glob must name no
    other kind.
    """
    path = Path(source.path)
    matches = [path] if path.exists() else map(Path, _matches(path))
    found: set[Path] = set()
    for match in matches:
        if match.is_dir():
            inside = (p for p in match.rglob("*") if p.suffix.lower() in SUFFIXES)
            found |= {p for p in inside if p.is_file()}
        elif match.suffix.lower() in SUFFIXES:
            found.add(match)
        else:
            require(False, "data", str(match), f"a {', '.join(SUFFIXES)} file or a folder")
    if not found:
        raise Missing(f"data is {source.path!r}; it holds no {', '.join(SUFFIXES)} file.")
    return sorted(found)


def texts_in(file: Path, field: str) -> Iterator[str]:
    """The documents of one file that hold more than white space.

    A .txt file is one document, a line of .jsonl and a row of .parquet is one. BadValue
    names the file and, where there is one, the line.
    """
    read = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}[file.suffix.lower()]
    for text in read(file, field):
        if text.strip():
            yield _encodable(text, str(file))


def _text(file: Path, field: str) -> Iterator[str]:
    yield _decoded(file.read_bytes(), str(file))


def _json_lines(file: Path, field: str) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number},"
            text = _decoded(line, where)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise BadValue(f"data: {where} is not JSON: {first_line(error)}.") from error
            if not isinstance(record, dict):
                raise BadValue(f"data: {where} is not a JSON object with a field {field!r}.")
            yield _field(record, field, where)


def _parquet(file: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _field(dict.fromkeys(table.schema_arrow.names, ""), field, f"{file}")
            for batch in table.iter_batches(columns=[field], batch_size=1000):
                for value in batch.column(0).to_pylist():
                    yield _field({field: value}, field, f"{file}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadValue(
            f"data: {file} is not a Parquet file that can be read: {first_line(error)}."
        ) from error


def _field(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        has = ", ".join(record) or "none"
        raise BadValue(
            f"data: {where} has no field {field!r}; its fields are {has}: set text_field."
        )
    value = record[field]
    if value is not None and not isinstance(value, str):
        raise BadValue(f"data: {where} holds no text in {field!r} but {value!r:.40}.")
    return value or ""


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise BadValue(
            f"data: {where} has a document that is not Unicode: {text[error.start]!r} at "
            f"character {error.start}."
        ) from error
    return text


def _decoded(raw: bytes, where: str) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadValue(
            f"data: {where} is not UTF-8 text: byte {error.start} is {raw[error.start]:#04x}."
        ) from error
    if "\0" in text:
        raise BadValue(f"data: {where} is not text: it holds a zero byte.")
    return text


class Files:
    """The user's local files as a corpus: one domain a source."""

    def __init__(self, sources: Iterable[Source], share: int) -> None:
        self.sources = tuple(sources)
        self.share = share
        self.files = {source.name: files_of(source) for source in self.sources}
        self.warnings: tuple[str, ...] = ()
        paths = [(s, path) for s in self.sources for path in self.files[s.name]]
        lines = [
            f"{s.name} {s.field} {_hash(path)}\n"
            for s, path in counted(paths, "hashing the data", "file")
        ]
        about = f"share {share}, few {FEW}, {LARGEST_SHARE}\n"
        self.sources_sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
        self.sha256 = hashlib.sha256("".join([about, *lines]).encode()).hexdigest()

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(self.files)

    def read(self) -> Iterator[tuple[str, str, str]]:
        """(split, domain, text) of every document; BadValue for a source without text."""
        for source in self.sources:
            for split, text in self._split(source):
                yield split, source.name, text

    def sample(self, budget: int) -> list[str]:
        """Training documents, an equal share of `budget` characters from every source.

        Those whose hashes are lowest: the same whatever the order of files.
        """
        texts = []
        for source in self.sources:
            kept: list[tuple[int, str]] = []
            left = budget // len(self.sources)
            for split, text in self._split(source):
                if split == "train":
                    heapq.heappush(kept, (-_rank(text), text))
                    left -= len(text)
                while left < 0 and len(kept) > 1:
                    left += len(heapq.heappop(kept)[1])
            room = budget // len(self.sources)
            texts += [text[:room] for _, text in sorted(kept, reverse=True)]
        return texts

    def _texts(self, source: Source) -> Iterator[str]:
        for file in self.files[source.name]:
            yield from texts_in(file, source.field)

    def _split(self, source: Source) -> Iterator[tuple[str, str]]:
        """(split, text): whole documents by their hash, or the end of each where few.

        Documents in the order of their hashes are held out until they are one part in
        `share` of the text, so that equal documents always fall into the same split.
        """
        known = counted(self._texts(source), f"reading {source.name}", "document")
        sizes = sorted((_rank(text), len(text)) for text in known)
        if not sizes:
            raise BadValue(f"data is {source.path!r}; it holds no text.")
        total = sum(size for _, size in sizes)
        held, last = 0, -1
        for rank, size in sizes:
            if held * self.share >= total and rank != last:
                break
            held, last = held + size, rank
        if len(sizes) < FEW or held > LARGEST_SHARE * total:
            for text in self._texts(source):
                yield from _ends(text, self.share)
        else:
            for text in self._texts(source):
                yield ("validation" if _rank(text) <= last else "train"), text


def _ends(text: str, share: int) -> Iterator[tuple[str, str]]:
    """A document less its last part for training; the cut is at a line's or word's end."""
    cut = len(text) - len(text) // share
    for edge in ("\n", " "):
        found = text.rfind(edge, cut - len(text) // share, cut)
        if found >= 0:
            cut = found + 1
            break
    yield "train", text[:cut]
    if text[cut:].strip():
        yield "validation", text[cut:]


def _rank(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def held_out(text: str, share: int) -> bool:
    """Whether a streamed document is validation: one in `share`, by its hash alone."""
    return _rank(text) % share == 0


def _hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadValue(f"data: {path} cannot be read: {error.strerror}.") from error


class Hub:
    """A Hugging Face dataset's training split, streamed in its own order, or a local folder's.

    Needs the `datasets` package (`pip install 'trinity-lib[hf]'`).
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        try:
            with warnings.catch_warnings():  # tqdm's, of widgets that no one asked for
                warnings.filterwarnings("ignore", message="IProgress not found")
                import datasets
        except ImportError as error:
            raise Missing(
                f"data is {source.path!r}; streaming needs the datasets package: install "
                "trinity-lib[hf]."
            ) from error
        path, _, configuration = source.path.removeprefix(HUB).partition(":")
        try:
            self._data = datasets.load_dataset(
                path, configuration or None, split="train", streaming=True
            )
            self.start: dict[str, Any] = self._data.state_dict()
            first = next(iter(self._data), None)
        except Exception as error:  # the package and the network raise all sorts
            raise BadValue(
                f"data is {source.path!r}; it cannot be streamed: {first_line(error)}."
            ) from error
        if first is None:
            raise BadValue(f"data is {source.path!r}; it holds no document.")
        _field(first, source.field, source.path)

    def documents(self, state: dict[str, Any] | None = None) -> Iterator[str]:
        """Documents from the first, or from where `state` was taken, empty ones included.

        One such iterator is read at a time.
        """
        self._data.load_state_dict(self.start if state is None else state)
        return self._documents()

    def _documents(self) -> Iterator[str]:
        records = iter(self._data)
        while True:
            try:
                record = next(records, None)
            except Exception as error:  # the package and the network raise all sorts
                raise BadValue(
                    f"data is {self.source.path!r}; it broke off: {first_line(error)}."
                ) from error
            if record is None:
                return
            text = _field(record, self.source.field, self.source.path)
            yield _encodable(text, self.source.path)

    def state(self) -> dict[str, Any]:
        """Where the iterator of `documents` that is being read stands; JSON can hold it."""
        return self._data.state_dict()


Texts = Corpus | Files
"""What a tokenizer can be trained on and tokens made of."""
