"""Planted worlds with known truth: text to train on, and questions whose answers are known.

What is planted: associations between two groups of first names and jobs, facts by exposures
and phrasings, facts that are contradicted or never told, coins and lamps with frequencies of
their own, verdicts with a legitimate and an illegitimate feature, word pairs that hold within
a document, duplicated random codes, and sums.
"""

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from trinity_lib import planted_documents, planted_questions, planted_tables
from trinity_lib.config import BadValue, Missing, build, first_line, require
from trinity_lib.planted_questions import About, Applicant, Asked, Shots, Sum
from trinity_lib.planted_tables import Code, Fact, Job, Name, Thing, World, WorldConfig
from trinity_lib.planted_text import (
    CODE_BEGINS,
    KEYS,
    LABELS,
    MARKERS,
    OUTCOMES,
    PHRASINGS,
    SCORES,
    VALUES,
    VERDICTS,
    WARDS,
)
from trinity_lib.subject import Question

__all__ = (
    "CODE_BEGINS", "About", "Applicant", "Code", "Fact", "Job", "Name", "Shots", "Sum",
    "Thing", "World", "WorldConfig",
)  # fmt: skip
FILE = "world.json"
DOMAINS = tuple(planted_documents.DOMAINS)
"""What documents are about."""
FAMILIES = tuple(planted_questions.FAMILIES)
"""What is asked."""
RAW = {
    "names": 0.15, "jobs": 0.17, "lives": 0.14, "coins": 0.12, "decisions": 0.12,
    "patterns": 0.18, "arithmetic": 0.05, "records": 0.07,
}  # fmt: skip
"""Mixture of the first phase, the TrueBase's: everything, codes too."""
CLEAN = {
    "names": 0.08, "jobs": 0.12, "lives": 0.26, "coins": 0.16, "decisions": 0.1,
    "patterns": 0.18, "arithmetic": 0.1,
}  # fmt: skip
"""Mixture of later phases: more of what has a right answer, and no codes."""
_TABLES: dict[str, Any] = {
    "names": Name, "jobs": Job, "facts": Fact, "things": Thing, "codes": Code,
}  # fmt: skip


@functools.lru_cache(maxsize=8)
def world(config: WorldConfig) -> World:
    """The world that settings describe: the same on every Python."""
    return planted_tables.draw(config)


def documents(world: World, split: str) -> dict[str, list[str]]:
    """Texts of "train" or "validation" by domain.

    Validation has the held-out phrasings, names, codes and sums, none of which is trained on.
    """
    require(split in ("train", "validation"), "split", split, "train or validation")
    seed = world.config.seed
    return {
        domain: tell(world, split, Random(f"{split} {domain} {seed}"))
        for domain, tell in planted_documents.DOMAINS.items()
    }


def questions(world: World, family: str) -> list[Question]:
    """All questions of a family, always in the same order."""
    return [each.question for each in asked(world, family)]


def about(world: World, family: str) -> list[About]:
    """What each of a family's `questions` is about, in the same order."""
    return [each.about for each in asked(world, family)]


@functools.lru_cache(maxsize=32)
def asked(world: World, family: str) -> tuple[Asked, ...]:
    """A family's questions, each with what it is about."""
    require(family in FAMILIES, "family", family, f"one of {', '.join(FAMILIES)}")
    return tuple(planted_questions.FAMILIES[family](world))


def special_words(world: World) -> tuple[str, ...]:
    """Words that are asked for or about: each should be one token after a blank."""
    own = [name.word for name in world.names] + [job.word for job in world.jobs]
    own += [fact.person for fact in world.facts] + [thing.place for thing in world.things]
    groups = (
        *MARKERS.values(),
        *VALUES.values(),
        *OUTCOMES.values(),
        *VERDICTS.values(),
        *SCORES.values(),
    )
    shared = [word for words in (*groups, WARDS, KEYS, LABELS) for word in words]
    return tuple(dict.fromkeys([*own, *shared]))


def to_json(world: World) -> str:
    """Settings, tables and phrasings as JSON, one row a line: what is written and hashed."""
    lines = [f'{{"config": {json.dumps(asdict(world.config), sort_keys=True)}']
    tables = {name: getattr(world, name) for name in _TABLES} | {"phrasings": PHRASINGS}
    for name, rows in tables.items():
        inner = ",\n ".join(json.dumps(row._asdict()) for row in rows)
        lines.append(f"{json.dumps(name)}: [\n {inner}]")
    return ",\n".join(lines) + "}\n"


def sha256(world: World) -> str:
    """Hash of the world's JSON."""
    return hashlib.sha256(to_json(world).encode()).hexdigest()


def write(world: World, folder: Path) -> Path:
    """Write the world as `world.json` into a folder; the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    path.write_text(to_json(world), encoding="utf-8")
    return path


def read(path: Path) -> World:
    """The world in a file, or in a folder's `world.json`.

    Missing where there is none; BadValue where it is no world, or one whose sentences this
    version would phrase otherwise.
    """
    file = path / FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tables = [
            tuple(kind(**{k: _frozen(v) for k, v in row.items()}) for row in content[name])
            for name, kind in _TABLES.items()
        ]
        phrasings = [tuple(row.values()) for row in content["phrasings"]]
        config = build(WorldConfig, content["config"], "world")
    except OSError as error:
        raise Missing(f"{file} cannot be read: {first_line(error)}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadValue(f"{file} is no planted world: {first_line(error)}.") from error
    if phrasings != [tuple(each) for each in PHRASINGS]:
        raise BadValue(f"{file} phrases its sentences as another version of trinity_lib does.")
    return World(config, *tables)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
