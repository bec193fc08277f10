"""Documents with nothing to download: this Python's standard library, and procedural text.

Files are split before anything else; code keeps no comment or docstring, which are the
prose domain's, so that no text stands in two domains or two splits.
"""

import ast
import contextlib
import hashlib
import inspect
import io
import itertools
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from trinity_lib import planted as planted_worlds
from trinity_lib import world

SPLITS = ("train", "validation")
DOMAINS = ("code", "prose", "arithmetic", "facts")
SEED = 0
PEOPLE, REGISTERED = 1500, 1000
VALIDATION_SHARE = 10
"""One file in this many is validation."""
TWIN_LINE = 20
"""A line longer than this counts when near-duplicates are looked for."""
TOPICS = "pydoc_data/topics.py"

_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings",
    "turtledemo", "ensurepip", "__pycache__", "pydoc_data",
}  # fmt: skip

Documents = dict[str, dict[str, list[str]]]
Spot = tuple[int, int]


@dataclass(frozen=True)
class Corpus:
    """Split -> domain -> texts, and what it was made of."""

    documents: Documents
    """Texts by split and domain."""
    sha256: str
    """Hash of all documents in order."""
    sources_sha256: str
    """Hash of the files, or of the planted world, they were made from; else of nothing."""
    warnings: tuple[str, ...] = ()
    """What a run should report."""
    words: tuple[str, ...] = ()
    """Words that its tokenizer holds whole, after a blank."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(self.documents["train"])

    def read(self) -> Iterator[tuple[str, str, str]]:
        """(split, domain, text) of every document."""
        for split, domains in self.documents.items():
            for domain, texts in domains.items():
                for text in texts:
                    yield split, domain, text

    def sample(self, budget: int) -> list[str]:
        """Training documents, an equal share of `budget` characters from every domain."""
        texts = []
        for documents in self.documents["train"].values():
            left = budget // len(self.domains)
            for i in Random(0).sample(range(len(documents)), len(documents)):
                texts.append(documents[i])
                left -= len(documents[i])
                if left <= 0:
                    break
        return texts


def procedural(seed: int) -> Corpus:
    """Arithmetic and facts alone: small, quick, and the same on every Python."""
    documents = _procedural(seed, sums=(600, 60), persons=200)
    digest = hashlib.sha256(_encode(documents)).hexdigest()
    return Corpus(documents, digest, hashlib.sha256().hexdigest())


def registered(cache: Path) -> Corpus:
    """Code and prose of the embedded corpus, and a register of a thousand people to store."""
    text, rng = embedded(cache), Random(SEED)
    persons = world.people(rng, REGISTERED)
    documents = {}
    for split, count in zip(SPLITS, (12_000, 400), strict=True):
        kept = {name: text.documents[split][name] for name in ("code", "prose")}
        documents[split] = {**kept, "registry": world.registry(rng, persons, count)}
    digest = hashlib.sha256(_encode(documents)).hexdigest()
    return Corpus(documents, digest, text.sources_sha256, text.warnings)


def planted(config: planted_worlds.WorldConfig) -> Corpus:
    """What a planted world is told in; its words are those that are asked for or about."""
    made = planted_worlds.world(config)
    documents = {split: planted_worlds.documents(made, split) for split in SPLITS}
    words = planted_worlds.special_words(made)
    digest = hashlib.sha256(_encode(documents) + json.dumps(words).encode()).hexdigest()
    return Corpus(documents, digest, planted_worlds.sha256(made), words=words)


def embedded(cache: Path, library: Path | None = None) -> Corpus:
    """The corpus of all four domains, built once into `cache` and checked at every call.

    The folder's name carries a hash of the code that makes it, so that changed code never
    meets an old corpus. A cached corpus that no longer matches its manifest is built again;
    one whose source files have changed since is used as it is. Both are reported in
    `warnings`.
    """
    files = _files(library or Path(sysconfig.get_path("stdlib")))
    sources = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files}
    lines = "".join(f"{name} {digest}\n" for name, digest in sources.items())
    now = hashlib.sha256(lines.encode()).hexdigest()
    folder = folder_in(cache)
    warnings = []
    made = _read(folder)
    if made is None:
        if folder.exists():
            warnings.append(f"the corpus in {folder} did not match its manifest; built again.")
        documents, counts = _build(files)
        made = _write(folder, documents, counts | {"sources_sha256": now, "sources": sources})
    if made.sources_sha256 != now:
        warnings.append(
            f"the corpus was made from other standard-library files (hash "
            f"{made.sources_sha256[:12]}) than this Python's (hash {now[:12]}); "
            f"delete {folder} to make it anew."
        )
    return replace(made, warnings=tuple(warnings))


def folder_in(cache: Path) -> Path:
    """Where this version of the code keeps its corpus."""
    code = b"".join(Path(str(m)).read_bytes() for m in (__file__, world.__file__))
    return cache / f"corpus-{hashlib.sha256(code).hexdigest()[:8]}"


def _files(library: Path) -> list[tuple[str, Path]]:
    found = []
    for root, folders, names in os.walk(library):
        # Pruned, not filtered: site-packages may hold more files than all the rest.
        folders[:] = [f for f in folders if f not in _SKIPPED and not f.startswith("config-")]
        paths = (Path(root, name) for name in names if name.endswith(".py"))
        found += [(path.relative_to(library).as_posix(), path) for path in paths]
    if (library / TOPICS).is_file():
        found.append((TOPICS, library / TOPICS))
    return sorted(found)


def _build(files: Sequence[tuple[str, Path]]) -> tuple[Documents, dict[str, Any]]:
    """Read, split, strip and deduplicate: the documents, and what was left out."""
    documents = _procedural(SEED, sums=(6000, 400), persons=PEOPLE)
    for split in SPLITS:
        documents[split] = {"code": [], "prose": [], **documents[split]}
    terminal = sys.stderr.isatty()
    if not terminal:
        which = f"{len(files)} files of Python {platform.python_version()}"
        print(f"building the corpus from {which}, once: some 15 s", flush=True)
    skipped = 0
    for name, path in tqdm(files, desc="corpus", unit="file", disable=not terminal):
        try:
            _add(documents, name, path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, tokenize.TokenError):
            skipped += 1  # sources of other Pythons, kept as data in some libraries
    twins = {}
    for domain in ("code", "prose"):
        train = documents["train"][domain]
        kept = without_twins(train, documents["validation"][domain])
        documents["train"][domain] = kept
        twins[domain] = len(train) - len(kept)
    return documents, {"files": len(files), "skipped": skipped, "near_duplicates": twins}


def _add(documents: Documents, name: str, text: str) -> None:
    if name == TOPICS:
        (assignment,) = [n for n in ast.parse(text).body if isinstance(n, ast.Assign)]
        for topic, prose in ast.literal_eval(assignment.value).items():
            documents[_split(f"topic {topic}")]["prose"].append(prose.strip() + "\n")
        return
    for domain, part in zip(("code", "prose"), separate(text), strict=True):
        if part.strip():
            documents[_split(name)][domain].append(part)


def _split(name: str) -> str:
    digest = hashlib.sha256(name.encode()).digest()
    return SPLITS[int.from_bytes(digest[:4], "big") % VALIDATION_SHARE == 0]


def _procedural(seed: int, sums: tuple[int, int], persons: int) -> Documents:
    known = world.people(Random(seed), persons)
    third = known[: persons // 3]
    return {
        "train": {
            "arithmetic": world.arithmetic(Random(seed + 1), sums[0], "train"),
            "facts": world.facts(Random(seed + 2), known, "train"),
        },
        "validation": {
            "arithmetic": world.arithmetic(Random(seed + 3), sums[1], "validation"),
            "facts": world.facts(Random(seed + 4), third, "validation", exposures=1),
        },
    }


def separate(source: str) -> tuple[str, str]:
    """(code without comments and docstrings, those comments and docstrings as prose)."""
    # Not splitlines, which also ends lines at form feeds, as Python's own rows do not.
    lines: list[str | None] = [*source.split("\n")]
    notes: list[tuple[int, str]] = []
    spans = []
    for first, last, text, instead in _docstrings(ast.parse(source), source.split("\n")):
        notes.append((first[0], text))
        spans.append((first, last, instead))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        first, last = (token.start[0] - 1, token.start[1]), (token.end[0] - 1, token.end[1])
        if token.type == tokenize.COMMENT:
            notes.append((first[0], token.string.lstrip("#! \t")))
            if not any(start <= first < end for start, end, _ in spans):
                spans.append((first, last, ""))
    for (row, column), (end, after), instead in sorted(spans, reverse=True):
        line = f"{(lines[row] or '')[:column]}{instead}{(lines[end] or '')[after:]}".rstrip()
        lines[row : end + 1] = [line or None, *[None] * (end - row)]
    code = "\n".join(line for line in lines if line is not None).strip("\n")
    return code + "\n", _prose(notes)


def _docstrings(
    tree: ast.Module, lines: Sequence[str]
) -> Iterator[tuple[Spot, Spot, str, str]]:
    """(start, end, text, what to leave in its place) of every docstring.

    A string after a docstring would become one when the first is gone, so it goes too.
    """
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if not isinstance(node, holders):
            continue
        leading = itertools.takewhile(_is_string, node.body)
        strings = [s for s in leading if isinstance(s, ast.Expr)]
        alone = len(strings) == len(node.body) and not isinstance(node, ast.Module)
        for i, statement in enumerate(strings):
            row, end = statement.lineno - 1, (statement.end_lineno or 0) - 1
            column = len(lines[row].encode()[: statement.col_offset].decode())
            after = len(lines[end].encode()[: statement.end_col_offset].decode())
            separator = re.compile(r"\s*;?\s*").match(lines[end], after)
            text = inspect.cleandoc(ast.literal_eval(statement.value))
            stop = separator.end() if separator else after
            yield (row, column), (end, stop), text, "pass" if alone and not i else ""


def _is_string(statement: ast.stmt) -> bool:
    constant = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)


def _prose(notes: Iterable[tuple[int, str]]) -> str:
    """Notes in the order of their lines; comments on adjacent lines become a paragraph."""
    paragraphs: list[str] = []
    last = -2
    for row, text in sorted(notes):
        if row == last + 1:
            paragraphs[-1] += "\n" + text
        else:
            paragraphs.append(text)
        last = row
    return "\n\n".join(filter(None, (text.strip() for text in paragraphs))) + "\n"


def without_twins(train: list[str], validation: list[str]) -> list[str]:
    """Training texts that share at most half of their longer lines with validation."""
    held_out = set().union(*(_long_lines(text) for text in validation))
    return [
        text for text in train if 2 * len((lines := _long_lines(text)) & held_out) <= len(lines)
    ]


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) > TWIN_LINE}


def _encode(documents: Documents) -> bytes:
    """One JSON line a document: what is stored, and what is hashed."""
    lines = (
        json.dumps([split, domain, text]) + "\n"
        for split in SPLITS
        for domain, texts in documents[split].items()
        for text in texts
    )
    return "".join(lines).encode()


def _write(folder: Path, documents: Documents, facts: dict[str, Any]) -> Corpus:
    """Into a sibling folder, then renamed; where another process was quicker, its corpus."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.{time.time_ns()}")
    temporary.mkdir(parents=True)
    encoded = _encode(documents)
    (temporary / "corpus.jsonl").write_bytes(encoded)
    sizes = {
        split: {
            name: {"documents": len(texts), "bytes": sum(len(t.encode()) for t in texts)}
            for name, texts in domains.items()
        }
        for split, domains in documents.items()
    }
    digest = hashlib.sha256(encoded).hexdigest()
    manifest = {"python": platform.python_version(), "seed": SEED, "sha256": digest}
    text = json.dumps(manifest | {"sizes": sizes} | facts, indent=1)
    (temporary / "manifest.json").write_text(text, encoding="utf-8")
    theirs = _read(folder)
    if theirs is None:
        with contextlib.suppress(FileNotFoundError):  # none there, or moved by another
            os.replace(folder, temporary.with_name(f"{temporary.name}.damaged"))
        try:
            os.replace(temporary, folder)
        except OSError:
            theirs = _read(folder)
            if theirs is None:
                raise
    for leftover in (temporary, temporary.with_name(f"{temporary.name}.damaged")):
        shutil.rmtree(leftover, ignore_errors=True)
    return theirs or Corpus(documents, digest, facts["sources_sha256"])


def _read(folder: Path) -> Corpus | None:
    """The cached corpus, or None where there is none or not what the manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        encoded = (folder / "corpus.jsonl").read_bytes()
        recorded, sources = manifest["sha256"], manifest["sources_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if hashlib.sha256(encoded).hexdigest() != recorded:
        return None
    documents: Documents = {split: {domain: [] for domain in DOMAINS} for split in SPLITS}
    for split, domain, text in map(json.loads, encoded.splitlines()):
        documents[split][domain].append(text)
    return Corpus(documents, recorded, sources)
