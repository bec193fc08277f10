"""The corpus: split by file, domains that do not overlap, hashes that are watched."""

import ast
import io
import json
import sysconfig
import tokenize
from pathlib import Path
from typing import Any

import pytest

from trinity_lib import corpus

HOLDERS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

SOURCE = '''#!/usr/bin/env python
# A comment
# on two lines
"""Module doc."""
import os  # trailing note

class A:
    """Only a docstring."""

def f(x):
    """Doc of f.

    More é.
    """
    text = "# not a comment"
    return x  # result

def g(): "inline doc"; return 1  # kept

def h(): "alone";

def k():
    "first"  # why
    "second"
    return """

  blank lines and # hashes stay  

"""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library: sixty files, one of them unreadable, one twin."""
    monkeypatch.setattr(corpus, "PEOPLE", 60)
    folder = tmp_path / "lib"
    (folder / "test").mkdir(parents=True)
    for i in range(60):
        names = "\n".join(f"variable_number_{i}_{j} = {j} + {i}" for j in range(8))
        doc = f'"""Docstring of file {i}, long enough to count as a line."""\n'
        (folder / f"m{i}.py").write_text(doc + names + "\n")
    (folder / "broken.py").write_text("def (:\n")
    (folder / "test" / "test_x.py").write_text("assert True\n")
    return folder


def test_code_and_prose_are_separated() -> None:
    code, prose = corpus.separate(SOURCE)
    ast.parse(code)
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    assert not [t for t in tokens if t.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            assert ast.get_docstring(node) is None
    assert "pass;" not in code and "\n\n  blank lines and # hashes stay  \n\n" in code
    assert '"# not a comment"' in code and "import os" in code and "return 1" in code
    for text in (
        "A comment\non two lines",
        "Module doc.",
        "More é.",
        "trailing note",
        "inline",
    ):
        assert text in prose
    assert "import" not in prose and "return" not in prose


def bare(source: str) -> str:
    """The syntax tree without docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, HOLDERS):
            while node.body and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
            node.body = node.body or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.dump(tree)


def test_real_code_loses_comments_and_docstrings_alone() -> None:
    sample = corpus._files(Path(sysconfig.get_path("stdlib")))[::15]
    sources = [path.read_text(encoding="utf-8") for name, path in sample]
    for source in [SOURCE, *sources, "x = 1\n\f\n# c\ny = '\u2028'  # d\n"]:
        code, _ = corpus.separate(source)
        tokens = tokenize.generate_tokens(io.StringIO(code).readline)
        assert all(token.type != tokenize.COMMENT for token in tokens)
        nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, HOLDERS)]
        assert not any(ast.get_docstring(n, clean=False) is not None for n in nodes)
        assert ast.dump(ast.parse(code)) == bare(source)


def test_the_manifest_counts_what_was_left_out(library: Path, tmp_path: Path) -> None:
    made = corpus.embedded(tmp_path / "cache", library)
    manifest = json.loads((corpus.folder_in(tmp_path / "cache") / "manifest.json").read_text())
    assert (manifest["files"], manifest["skipped"]) == (61, 1)
    assert set(manifest["sources"]) == {"broken.py", *(f"m{i}.py" for i in range(60))}
    assert manifest["sha256"] == made.sha256
    for split in corpus.SPLITS:
        for domain in corpus.DOMAINS:
            size = manifest["sizes"][split][domain]
            assert size["documents"] == len(made.documents[split][domain])


def test_of_two_builders_the_later_uses_what_the_first_made(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = corpus._build
    first = []

    def overtaken(files: Any) -> Any:
        monkeypatch.setattr(corpus, "_build", build)
        first.append(corpus.embedded(tmp_path, library))
        documents, counts = build(files)
        documents["train"]["code"].append("late = 1\n")
        return documents, counts

    monkeypatch.setattr(corpus, "_build", overtaken)
    late = corpus.embedded(tmp_path, library)
    assert late == first[0]
    assert [p.name for p in tmp_path.iterdir() if p != library] == [
        corpus.folder_in(tmp_path).name
    ]


def test_files_are_split_and_domains_do_not_overlap(library: Path, tmp_path: Path) -> None:
    made = corpus.embedded(tmp_path / "cache", library)
    documents = made.documents
    assert not made.warnings
    assert len(documents["train"]["code"]) + len(documents["validation"]["code"]) == 60
    assert documents["validation"]["code"]
    for domain in corpus.DOMAINS:
        assert not set(documents["train"][domain]) & set(documents["validation"][domain])
    everything = [t for split in documents.values() for t in split["code"]]
    assert not any("Docstring" in text or "assert True" in text for text in everything)
    assert all("variable" not in t for split in documents.values() for t in split["prose"])


def test_the_same_files_give_the_same_corpus(library: Path, tmp_path: Path) -> None:
    first = corpus.embedded(tmp_path / "a", library)
    again = corpus.embedded(tmp_path / "b", library)
    cached = corpus.embedded(tmp_path / "a", library)
    assert first.sha256 == again.sha256 == cached.sha256
    assert first.documents == cached.documents


def test_changed_sources_are_reported_with_both_hashes(library: Path, tmp_path: Path) -> None:
    first = corpus.embedded(tmp_path / "cache", library)
    (library / "m1.py").write_text("x = 1\n")
    changed = corpus.embedded(tmp_path / "cache", library)
    (warning,) = changed.warnings
    assert changed.sha256 == first.sha256
    now = corpus.embedded(tmp_path / "new", library).sources_sha256
    assert now != first.sources_sha256
    assert first.sources_sha256[:12] in warning and now[:12] in warning
    assert "delete" in warning and str(corpus.folder_in(tmp_path / "cache")) in warning


@pytest.mark.parametrize("damage", ["corpus.jsonl", "manifest.json"])
def test_a_damaged_cache_is_built_again_and_reported(
    library: Path, tmp_path: Path, damage: str
) -> None:
    first = corpus.embedded(tmp_path / "cache", library)
    file = corpus.folder_in(tmp_path / "cache") / damage
    file.write_text(file.read_text()[:-40])
    mended = corpus.embedded(tmp_path / "cache", library)
    assert mended.sha256 == first.sha256
    assert "did not match its manifest" in mended.warnings[0]
    assert not corpus.embedded(tmp_path / "cache", library).warnings
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [corpus.folder_in(tmp_path).name]


def test_twins_of_validation_are_dropped_from_training() -> None:
    lines = [f"a line that is long enough, number {i}" for i in range(4)]
    twin, half = (
        "\n".join([*lines[:3], "x"]),
        "\n".join([*lines[:2], *map(str.upper, lines[2:])]),
    )
    assert corpus.without_twins([twin, half, "short\n"], ["\n".join(lines)]) == [
        half,
        "short\n",
    ]


def test_procedural_text_is_pinned() -> None:
    """The golden run hangs on this hash; it must not depend on the Python version."""
    made = corpus.procedural(0)
    assert made.sha256 == corpus.procedural(0).sha256
    assert made.sha256[:12] == PROCEDURAL
    assert list(made.documents["train"]) == ["arithmetic", "facts"]


PROCEDURAL = "435787a7fe3d"


def test_changed_code_never_meets_an_old_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = corpus.folder_in(tmp_path)
    other = tmp_path / "world.py"
    other.write_bytes(Path(corpus.world.__file__).read_bytes() + b"\n")
    monkeypatch.setattr(corpus.world, "__file__", str(other))
    assert corpus.folder_in(tmp_path) != before
