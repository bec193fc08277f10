"""The audit card: what was found about which folder, and where to look for it.

A card indexes evidence under the headings of three frameworks, and claims compliance with
none. It holds hashes of every file of the audited folder, so that anyone can say whether a
folder is that one, and a digest of itself, so that an edited card is refused. No torch.

    python -m trinity_lib.card verify CARD FOLDER
    python -m trinity_lib.card show CARD
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trinity_lib import audited, card_html, disk, record
from trinity_lib.config import BadValue, Missing, first_line, one_sentence, require
from trinity_lib.headings import FRAMEWORKS, SECTIONS, Framework
from trinity_lib.subject import Finding

FORMAT, SCHEMA = "trinity audit card", 1
JSON, HTML = audited.CARDS
NOTICE = (
    "This card indexes evidence about one checkpoint folder under headings of the NIST AI RMF, "
    "SR 11-7 and Annex IV of the EU AI Act. It does not claim, and cannot show, compliance "
    "with any of them: a heading with evidence is a place to look, not a requirement met."
)
STANDING = (
    "The digest shows that a card was edited, not who wrote it: it is no signature. Publish it "
    "where the card is not, and have `verify --digest` compare.",
    "Intervals are 95% each on its own; among many some are wrong by chance.",
    "Figures are of this folder alone: another quantisation, tokenizer or chat template is "
    "another model.",
)
"""Limitations of every card."""
NOT_ASKED = "not asked"
"""The item of a finding that stands for a family which was not asked; its measure is why."""
TRAINING = ("name", "scale", "status", "created_at", "device", "git_commit", "git_dirty",
            "python", "platform", "versions")  # fmt: skip
"""Attributes of a run that are kept of it."""


def build(
    findings: Mapping[str, Sequence[Finding]],
    folder: str | Path,
    attributes: Mapping[str, Any],
    *,
    stage: str,
    data: Mapping[str, str] | None = None,
    seeds: Mapping[str, int] | None = None,
    limitations: Sequence[str] = (),
    not_asked: Mapping[str, str] | None = None,
    records: Mapping[str, str | Path] | None = None,
    created_at: str | None = None,
) -> dict[str, Any]:
    """The card of one checkpoint folder, ready for JSON.

    `findings` are lists by stage, of which `stage` is the folder's own and others stand beside
    it; `attributes` are the training run's, empty where they are not known. `data` is the
    SHA-256 of texts and worlds by name, `records` are files kept elsewhere, hashed here, and
    `not_asked` says why of what. The same arguments give the same card, with a `created_at`.
    """
    require(
        stage in findings, "stage", stage, f"one of {', '.join(findings) or 'the findings'}"
    )
    files = audited.describe(Path(folder))
    known = {key[: -len("_sha256")]: attributes[key] for key in attributes
             if key.endswith("_sha256") and key != "config_sha256"}  # fmt: skip
    made = record.provenance()
    card: dict[str, Any] = {
        "NOTICE": NOTICE,
        "format": FORMAT,
        "schema": SCHEMA,
        "created_at": created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        "stage": stage,
        "checkpoint": {
            "name": Path(folder).resolve().name, "files": files, **audited.overall(files),
        },
        "configuration": audited.configuration(Path(folder)),
        "data": {**known, **(data or {})},
        "code": {"git_commit": made["git_commit"], "git_dirty": bool(made["git_dirty"])},
        "environment": {key: made[key] for key in ("python", "platform", "versions")},
        "run": _training(attributes),
        "seeds": {**({"training": int(attributes["seed"])} if "seed" in attributes else {}),
                  **(seeds or {})},
        "records": {name: audited.hashed(Path(path)) for name, path in (records or {}).items()},
        "findings": [
            _row(s, f) for s, found in findings.items() for f in found if f.item != NOT_ASKED
        ],
        "limitations": [*STANDING, *limitations],
        "not-asked": {**_left_out(findings), **(not_asked or {})},
    }  # fmt: skip
    held = evidence(card)
    card["evidence"] = held
    card["frameworks"] = [_index(framework, held) for framework in FRAMEWORKS]
    card["digest"] = digest(card)
    return card


def evidence(card: Mapping[str, Any]) -> dict[str, str]:
    """What of a card can support a heading: parts that are not empty, families of findings."""
    rows = card["findings"]
    held = {name: text for name, text in SECTIONS.items() if card.get(name)}
    held |= {n: SECTIONS[n] for n in ("weights", "tokenizer") if card["checkpoint"].get(n)}
    if card["code"]["git_commit"] == "unknown":
        del held["code"]
    if any(row["truth"] is not None for row in rows):
        held["truth"] = SECTIONS["truth"]
    if len({row["stage"] for row in rows}) > 1:
        held["stages"] = SECTIONS["stages"]
    for family in sorted({row["family"] for row in rows}):
        count = sum(row["family"] == family for row in rows)
        held[family] = f"figures of the family {family}: {count}"
    return held


def _index(framework: Framework, held: Mapping[str, str]) -> dict[str, Any]:
    """A framework's headings, each with the evidence that this card has for it."""
    headings = []
    for each in framework.headings:
        found = [name for name in each.evidence if name in held]
        part = each.part if found else ""
        headings.append(
            {"id": each.id, "wording": each.wording, "evidence": found, "part": part}
        )
    about = {"name": framework.name, "source": framework.source, "note": framework.note}
    return {**about, "headings": headings}


def _row(stage: str, finding: Finding) -> dict[str, Any]:
    row = {name: _number(value) for name, value in finding._asdict().items()}
    row["at_chance"] = None if row["chance"] is None else finding.at_chance
    row["recovered"] = None if row["truth"] is None else finding.recovered
    return {"stage": stage, **row}


def _left_out(findings: Mapping[str, Sequence[Finding]]) -> dict[str, str]:
    """What audits say that they did not ask: a finding whose measure is the reason."""
    return {
        f"{f.family}, {stage}": f.measure
        for stage, found in findings.items()
        for f in found
        if f.item == NOT_ASKED
    }


def _number(value: Any) -> Any:
    """A value for JSON, which has no NaN (none: null) and no infinity (in words)."""
    if isinstance(value, str):
        return value
    number = float(value)
    if math.isnan(number):
        return None
    if math.isinf(number):
        return "infinity" if number > 0 else "-infinity"
    return int(number) if number.is_integer() and not isinstance(value, float) else number


def _training(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run's attributes, which hold mappings as JSON and bools as 0 or 1."""
    kept = {key: attributes[key] for key in TRAINING if key in attributes}
    if isinstance(kept.get("versions"), str):
        kept["versions"] = json.loads(kept["versions"])
    if "git_dirty" in kept:
        kept["git_dirty"] = bool(kept["git_dirty"])
    return kept


def digest(card: Mapping[str, Any]) -> str:
    """SHA-256 of a card's content, whatever its layout; the digest itself is left out."""
    content = {key: value for key, value in card.items() if key != "digest"}
    plain = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def write(card: Mapping[str, Any], folder: str | Path) -> Path:
    """Write the card as JSON, and as HTML beside it; the JSON's path is returned."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(card, indent=1, sort_keys=True, allow_nan=False) + "\n"
    page = card_html.page(card)
    disk.replace(folder / JSON, lambda path: path.write_text(text, encoding="utf-8"))
    disk.replace(folder / HTML, lambda path: path.write_text(page, encoding="utf-8"))
    return folder / JSON


def read(path: str | Path) -> dict[str, Any]:
    """A card as it was written; Missing or BadValue, in a sentence, where it is not."""
    path = Path(path)
    try:
        card = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError as error:
        raise Missing(f"There is no card {path}: {first_line(error)}.") from error
    except ValueError as error:
        raise BadValue(f"{path} is not JSON: {first_line(error)}.") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise BadValue(f"{path} is not an audit card: its format is not {FORMAT!r}.")
    if card.get("schema") != SCHEMA:
        raise BadValue(
            f"{path} has schema {card.get('schema')!r}; this version reads {SCHEMA}: use the "
            "version that wrote it, or audit again."
        )
    try:
        same = card["digest"] == digest(card)
    except (KeyError, ValueError) as error:
        raise BadValue(f"{path} is damaged: {first_line(error)}.") from error
    if not same:
        raise BadValue(
            f"{path} has been edited since it was written: its content has another digest than "
            "it states."
        )
    return card


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose keys may come twice: readers would differ on which holds."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found


def verify(card: Mapping[str, Any], folder: str | Path) -> list[str]:
    """What of a folder is not as it was audited, a sentence a file; empty where it is the one.

    Every file counts but documentation and hidden ones. Missing where there is no folder.
    """
    return audited.differences(card["checkpoint"]["files"], Path(folder))


def summary(card: Mapping[str, Any]) -> str:
    """A card in a screen of text."""
    checkpoint, rows = card["checkpoint"], card["findings"]
    lines = [
        card["NOTICE"],
        "",
        f"checkpoint  {checkpoint['name']} ({card['stage']}), {len(checkpoint['files'])} files",
        f"weights     {checkpoint['weights']}",
        f"digest      {card['digest']}",
        f"audited     {card['created_at']}, code {card['code']['git_commit']}"
        + (" (edited)" if card["code"]["git_dirty"] else ""),
        "",
    ]
    for row in rows:
        chance = "  at chance" if row["at_chance"] else ""
        lines.append(
            f"{row['stage']}  {row['family']}, {row['item']}: "
            f"{card_html.number(row['estimate'])} [{card_html.number(row['low'])}, "
            f"{card_html.number(row['high'])}] {row['measure']}; truth "
            f"{card_html.number(row['truth'])}{chance}"
        )
    lines += ["", *(f"not asked: {what}: {why}" for what, why in card["not-asked"].items())]
    lines += [f"limitation: {text}" for text in card["limitations"]]
    for each in card["frameworks"]:
        some = sum(bool(heading["evidence"]) for heading in each["headings"])
        count = len(each["headings"])
        lines.append(f"{each['name']}: evidence under {some} of {count} headings")
    return "\n".join(lines)


def main() -> None:
    """Say whether a folder is the one that a card is of, or print a card."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("verify", help="exit 1, naming files, where it is not")
    checking.add_argument("card")
    checking.add_argument("folder")
    checking.add_argument("--digest", help="what the card's digest was published as")
    commands.add_parser("show", help="print a summary").add_argument("card")
    given = parser.parse_args()
    with one_sentence():
        card = read(given.card)
        try:
            problems = _answer(card, given)
        except (KeyError, TypeError, AttributeError) as error:
            raise BadValue(f"{given.card} is damaged: it lacks {first_line(error)}.") from error
        for problem in problems:
            print(problem, file=sys.stderr)
        raise SystemExit(1 if problems else 0)


def _answer(card: Mapping[str, Any], given: argparse.Namespace) -> list[str]:
    """Do what the command asks; what is wrong, if anything, is returned."""
    if given.command == "show":
        print(summary(card))
        return []
    if given.digest is not None and given.digest != card["digest"]:
        return [f"{given.card} has the digest {card['digest']}, not {given.digest}."]
    problems = verify(card, given.folder)
    if problems:
        return [*problems, f"{given.folder} is not the folder that was audited."]
    checkpoint = card["checkpoint"]
    print(
        f"{given.folder} is the folder that was audited: {len(checkpoint['files'])} files, "
        f"weights {checkpoint['weights']}, card {card['digest']}"
    )
    return []


if __name__ == "__main__":
    main()
