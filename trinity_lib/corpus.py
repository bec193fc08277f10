"""Documents with nothing to download: this Python's standard library, and procedural text.

Files are split before anything else; code keeps no comment or docstring, which are the
prose domain's, so that no text stands in two domains or two splits.
"""

import ast
import hashlib
import inspect
import io
import json
import os
import platform
import shutil
import sys
import sysconfig
import time
import tokenize
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tqdm import tqdm

from trinity_lib import world

SPLITS = ("train", "validation")
DOMAINS = ("code", "prose", "arithmetic", "facts")
SEED = 0
PEOPLE = 1500
VALIDATION_SHARE = 10
"""One file in this many is validation."""
TWIN_LINE = 20
"""Characters from which a line counts when near-duplicates are looked for."""

_SKIPPED = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings",
    "turtledemo", "ensurepip", "__pycache__", "pydoc_data",
}  # fmt: skip

Documents = dict[str, dict[str, list[str]]]


@dataclass(frozen=True)
class Corpus:
    """Split -> domain -> texts, and what it was made of."""

    documents: Documents
    """Texts by split and domain."""
    sha256: str
    """Hash of all documents in order."""
    sources_sha256: str
    """Hash of the files they were taken from; of nothing where procedural."""
    warnings: tuple[str, ...] = ()
    """What a run should report."""


def procedural(seed: int) -> Corpus:
    """Arithmetic and facts alone: small, quick, and the same on every Python."""
    documents = _procedural(seed, sums=600, persons=200)
    return Corpus(documents, _hash_documents(documents), hashlib.sha256().hexdigest())


def embedded(cache: Path, library: Path | None = None) -> Corpus:
    """The corpus of all four domains, built once into `cache` and checked at every call.

    A cached corpus that no longer matches its manifest is built again; one whose source
    files have changed since is used as it is. Both are reported in `warnings`.
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    folder = cache / "corpus"
    files = _files(library)
    sources = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files}
    now = _hash_lines(f"{name} {digest}" for name, digest in sources.items())
    warnings = []
    documents = _read(folder) if folder.exists() else None
    if folder.exists() and documents is None:
        warnings.append(f"the cached corpus in {folder} did not match its manifest; built again.")
        shutil.rmtree(folder)
    if documents is None:
        documents = _build(files)
        _write(folder, documents, sources, now)
    then = json.loads((folder / "manifest.json").read_text())["sources_sha256"]
    if then != now:
        warnings.append(
            f"the corpus was made from other standard-library files (hash {then[:12]}) than "
            f"this Python's (hash {now[:12]}); delete {folder} to make it anew."
        )
    return Corpus(documents, _hash_documents(documents), then, tuple(warnings))


def _files(library: Path) -> list[tuple[str, Path]]:
    found = []
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not _SKIPPED & set(name.parts) and not name.parts[0].startswith("config-"):
            found.append((name.as_posix(), path))
    topics = library / "pydoc_data" / "topics.py"
    if topics.is_file():
        found.append(("pydoc_data/topics.py", topics))
    return sorted(found)


def _build(files: Sequence[tuple[str, Path]]) -> Documents:
    """Read, split, strip and deduplicate; a quarter of a minute."""
    documents = _procedural(SEED, sums=6000, persons=PEOPLE)
    for split in SPLITS:
        documents[split] = {"code": [], "prose": [], **documents[split]}
    terminal = sys.stderr.isatty()
    if not terminal:
        print(f"building the corpus from {len(files)} files, once", file=sys.stderr)
    for name, path in tqdm(files, desc="corpus", unit="file", disable=not terminal):
        try:
            text = path.read_text(encoding="utf-8")
            if name == "pydoc_data/topics.py":
                _add_topics(documents, text)
                continue
            code, prose = separate(text)
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue  # sources of other Pythons, kept as data in some libraries
        if code.strip():
            documents[_split(name)]["code"].append(code)
        if prose.strip():
            documents[_split(name)]["prose"].append(prose)
    for domain in ("code", "prose"):
        kept = without_twins(documents["train"][domain], documents["validation"][domain])
        documents["train"][domain] = kept
    return documents


def _add_topics(documents: Documents, text: str) -> None:
    (assignment,) = [n for n in ast.parse(text).body if isinstance(n, ast.Assign)]
    for topic, prose in ast.literal_eval(assignment.value).items():
        documents[_split(f"topic {topic}")]["prose"].append(prose.strip() + "\n")


def _split(name: str) -> str:
    digest = hashlib.sha256(name.encode()).digest()
    return SPLITS[int.from_bytes(digest[:4], "big") % VALIDATION_SHARE == 0]


def _procedural(seed: int, sums: int, persons: int) -> Documents:
    known = world.people(Random(seed), persons)
    third = known[: persons // 3]
    return {
        "train": {
            "arithmetic": world.arithmetic(Random(seed + 1), sums, "train"),
            "facts": world.facts(Random(seed + 2), known, "train"),
        },
        "validation": {
            "arithmetic": world.arithmetic(Random(seed + 3), sums // 10, "validation"),
            "facts": world.facts(Random(seed + 4), third, "validation", exposures=1),
        },
    }


def separate(source: str) -> tuple[str, str]:
    """(code without comments and docstrings, those comments and docstrings as prose)."""
    lines = source.splitlines()
    replaced: dict[int, str] = {}
    notes: list[tuple[int, str]] = []
    for expression, alone in _docstrings(ast.parse(source)):
        notes.append((expression.lineno, inspect.cleandoc(expression.value.value)))
        first, last = expression.lineno - 1, expression.end_lineno - 1
        before = lines[first].encode()[: expression.col_offset].decode()
        after = lines[last].encode()[expression.end_col_offset :].decode()
        after = after.lstrip().removeprefix(";").lstrip() if "#" not in after else ""
        replaced |= dict.fromkeys(range(first, last + 1), "")
        replaced[first] = before + ("pass" if alone and not after else after)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start[0] - 1, token.start[1]
        if token.type == tokenize.COMMENT:
            notes.append((row + 1, token.string.lstrip("#! \t")))
            if row not in replaced:
                replaced[row] = lines[row][:column]
    kept = (replaced.get(i, line).rstrip() for i, line in enumerate(lines))
    code = "\n".join(line for line in kept if line)
    return code + "\n", _prose(notes)


def _docstrings(tree: ast.Module) -> Iterable[tuple[ast.Expr, bool]]:
    """Each docstring's expression, and whether it is all there is in its block."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, holders) and ast.get_docstring(node, clean=False) is not None:
            expression = node.body[0]
            assert isinstance(expression, ast.Expr)
            yield expression, len(node.body) == 1 and not isinstance(node, ast.Module)


def _prose(notes: Iterable[tuple[int, str]]) -> str:
    """Notes in the order of their lines; comments on adjacent lines become a paragraph."""
    paragraphs: list[str] = []
    last = -2
    for row, text in sorted(notes):
        if row == last + 1 and paragraphs:
            paragraphs[-1] += "\n" + text
        elif text.strip():
            paragraphs.append(text)
        last = row
    return "\n\n".join(paragraphs) + "\n"


def without_twins(train: list[str], validation: list[str]) -> list[str]:
    """Training texts that share at most half of their longer lines with validation."""
    held_out = set().union(*(_long_lines(text) for text in validation))
    return [
        text
        for text in train
        if 2 * len((lines := _long_lines(text)) & held_out) <= len(lines)
    ]


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= TWIN_LINE}


def _hash_lines(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def _hash_documents(documents: Documents) -> str:
    return _hash_lines(
        json.dumps([split, domain, text])
        for split in SPLITS
        for domain, texts in documents[split].items()
        for text in texts
    )


def _write(folder: Path, documents: Documents, sources: dict[str, str], now: str) -> None:
    """Into a temporary folder, then renamed; another process may have been quicker."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.{time.time_ns()}")
    temporary.mkdir(parents=True)
    (temporary / "corpus.json").write_text(json.dumps(documents))
    sizes = {
        split: {name: [len(t), sum(map(len, t))] for name, t in domains.items()}
        for split, domains in documents.items()
    }
    manifest = {
        "python": platform.python_version(),
        "sha256": _hash_documents(documents),
        "sources_sha256": now,
        "seed": SEED,
        "documents_and_characters": sizes,
        "sources": sources,
    }
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    try:
        temporary.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)


def _read(folder: Path) -> Documents | None:
    """The cached documents, or None where they are not what the manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        documents = json.loads((folder / "corpus.json").read_text())
        return documents if _hash_documents(documents) == manifest["sha256"] else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
