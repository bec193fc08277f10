"""Checkpoints that a user brings: what of a study of stages can be had of any AFMoE folders.

What needs a planted truth gives way to what can be asked of any model, and what cannot be
had is named with its reason.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr

from trinity_lib import (
    audit,
    chat,
    compare,
    corpus,
    drift,
    hub,
    interview,
    items,
    lm_tasks,
    planted,
    preflight,
    tokenizer,
)
from trinity_lib.chat import Example
from trinity_lib.config import BadValue, differences, first_line, require
from trinity_lib.data import Batch
from trinity_lib.interview import Said
from trinity_lib.model import count_parameters
from trinity_lib.planted import World
from trinity_lib.truebase_config import TruebaseConfig

ROWS, LENGTH = 16, 256
"""Rows of a domain, and their tokens, that routing and predictions are compared on."""
EMBEDDED = ("code", "prose")
"""Domains of the embedded corpus that stand in where no texts are given."""
COPIES = 3
"""Models held at one time, at most: two and what lies between them."""


class Given(NamedTuple):
    """What was found of checkpoints that were given."""

    said: dict[str, list[Said]]
    """Findings by stage."""
    groups: dict[str, xr.Dataset]
    left_out: dict[str, str]
    """What was not done, and why."""


class Brought(NamedTuple):
    """What a user brings, read, but for the models themselves."""

    folders: dict[str, Path]
    """By stage."""
    asked: list[items.Item]
    world: World | None
    texts: dict[str, list[str]]
    """By domain."""


def read(config: TruebaseConfig, cache: Path) -> Brought:
    """All that `config` names; Missing or BadValue for what cannot be used."""
    folders = {stage: Path(folder) for stage, folder in config.checkpoints}
    for folder in folders.values():
        hub.inspect(folder)
    asked = items.read(Path(config.items)) if config.items else []
    world = planted.read(Path(config.world_file)) if config.world_file else None
    return Brought(folders, asked, world, _texts(config, cache))


def look(config: TruebaseConfig, cache: Path, tell: Callable[[str], None]) -> Given:
    """Ask and compare the checkpoints that `config` names.

    Raises as `read` does, before anything is computed, and BadValue for a task that cannot
    be run, before questions are asked.
    """
    folders, asked, world, texts = read(config, cache)
    left_out: dict[str, str] = {}
    said: dict[str, list[Said]] = {stage: [] for stage in folders}
    too_large = _too_large(folders, config.device)
    if too_large:
        left_out["questions, routing, predictions"] = too_large
    for stage, folder in {} if too_large else folders.items():
        tell(f"asking {stage}")
        why = _unreadable(folder)
        if why:
            left_out[f"questions to {stage}"] = why
            continue
        if config.tasks:
            tell(f"lm_eval: {stage}")
            found = lm_tasks.evaluate(folder, config.tasks, config.limit, config.device)
            said[stage] += [Said(interview.TEXT, each) for each in found]
        model = interview.read(folder, config.reader, config.device)
        if world is not None:
            said[stage] += interview.of_world(model, world, config.seed)
            why = interview.not_conversed(model)
            left_out |= {f"association in conversations with {stage}": why} if why else {}
        said[stage] += interview.of_any(model.subject, asked, seed=config.seed)
    if world is None:
        why = "planted truth: no world was given, and the text of released models has none"
        left_out |= dict.fromkeys(audit.FAMILIES, why)
    left_out |= {} if asked else {items.FAMILY: "no items were given"}
    left_out |= {} if config.tasks else {lm_tasks.FAMILY: "no tasks were given"}
    left_out["lens, probes, relearning, experts taken out"] = (
        "need questions with one planted answer: made for a chain that is trained here"
    )
    groups = _compared(folders, texts, config, left_out, tell, bool(too_large))
    return Given(said, groups, left_out)


def _compared(
    folders: dict[str, Path],
    texts: Mapping[str, list[str]],
    config: TruebaseConfig,
    left_out: dict[str, str],
    tell: Callable[[str], None],
    weights_alone: bool,
) -> dict[str, xr.Dataset]:
    """All comparisons, or of the weights alone; adds to what is left out."""
    why = _unlike(folders)
    if why:
        left_out["comparisons"] = why
        return {}
    rows = None
    if not weights_alone:
        rows = _rows(folders, texts, config.seed, left_out)
    if rows is None:
        tell("weights")
        pairs = compare.chain(list(folders))
        weights, experts = drift.weights(folders, pairs, progress=tell)
        return {"weight_drift": weights, "expert_drift": experts}
    return compare.compare(folders, rows, device=config.device, seed=config.seed, progress=tell)


def _unlike(folders: Mapping[str, Path]) -> str:
    """Why checkpoints cannot be compared, or ""."""
    if len(folders) < 2:
        return "one checkpoint was given"
    (first, config), *others = ((stage, hub.read_config(f)) for stage, f in folders.items())
    for stage, other in others:
        changed = differences(config, other, ("load_balance_coeff", "max_positions"))
        if changed:
            return f"{stage} is another model than {first}: {'; '.join(changed)}"
    return "" if len(config.moe_layers) else "the models have no experts"


def _rows(
    folders: Mapping[str, Path],
    texts: Mapping[str, list[str]],
    seed: int,
    left_out: dict[str, str],
) -> dict[str, Batch] | None:
    """Rows by domain, or None where tokenizers read the texts differently.

    A folder without a tokenizer is read with another's; where no folder has one, rows are
    of random tokens. Either is said in `left_out`.
    """
    unread = {stage: why for stage, folder in folders.items() if (why := _unreadable(folder))}
    some = [text for each in texts.values() for text in each]
    found = [
        [tokens.tolist() for tokens in tokenizer.load(folder).encode(some)]
        for stage, folder in folders.items()
        if stage not in unread
    ]
    if not found:
        left_out["texts"] = (
            "no checkpoint has a tokenizer that fits it: routing and predictions are compared "
            "on random tokens, which say less than text"
        )
        return {"random tokens": _random(folders, seed)}
    for stage, why in unread.items():
        left_out[f"tokenizer of {stage}"] = f"{why}: rows are read with another stage's"
    first, *others = found
    if any(other != first for other in others):
        left_out["routing, predictions, paths"] = (
            "the checkpoints' tokenizers read the texts differently"
        )
        return None
    rows, at = {}, 0
    for domain, own in texts.items():
        tokens = [np.array(t, dtype=np.int32) for t in first[at : at + len(own)]]
        at += len(own)
        pieces = [t[i : i + LENGTH] for t in tokens for i in range(0, len(t), LENGTH)]
        examples = [Example(t, np.ones(len(t), dtype=bool)) for t in pieces if len(t) > 1]
        require(bool(examples), f"texts of {domain}", "empty", "text of two tokens or more")
        batch = chat.pack(examples, LENGTH).batch
        rows[domain] = Batch(*(part[:ROWS] for part in batch))
    return rows


def _random(folders: Mapping[str, Path], seed: int) -> Batch:
    """Rows of tokens drawn alike from the vocabulary."""
    size = hub.read_config(next(iter(folders.values()))).vocab_size
    drawn = np.random.default_rng(seed).integers(size, size=(ROWS, LENGTH), dtype=np.int32)
    return chat.pack([Example(t, np.ones(LENGTH, dtype=bool)) for t in drawn], LENGTH).batch


def _texts(config: TruebaseConfig, cache: Path) -> dict[str, list[str]]:
    """Texts by domain: the user's, or some of the embedded corpus's validation to compare."""
    if not config.texts:
        if len(config.checkpoints) < 2:
            return {}
        held_out = corpus.embedded(cache).documents["validation"]
        return {name: held_out[name][:ROWS] for name in EMBEDDED}
    path = Path(config.texts)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"{path} cannot be read as UTF-8 text: {first_line(error)}.") from error
    found: dict[str, list[str]] = {}
    if path.suffix != ".jsonl":
        found["text"] = [content] if content.strip() else []
    for number, line in enumerate(content.split("\n") if path.suffix == ".jsonl" else [], 1):
        if line.strip():
            domain, text = _record(line, f"{path}, line {number}")
            found.setdefault(domain, []).append(text)
    if not any(found.values()):
        raise BadValue(f"{path} has no text.")
    return found


def _record(line: str, where: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
        domain, text = record.get("domain", "text"), record["text"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadValue(
            f'{where}: a record is {{"text": text}}, with "domain" or not.'
        ) from error
    if not isinstance(text, str) or not text.strip() or not isinstance(domain, str):
        raise BadValue(f"{where}: text and domain must be text, and text not empty.")
    return domain, text


def _unreadable(folder: Path) -> str:
    """Why a folder's model cannot be asked in words, or ""."""
    if not (folder / tokenizer.FILE).is_file():
        return f"the folder has no {tokenizer.FILE}"
    words, entries = tokenizer.load(folder).size, hub.read_config(folder).vocab_size
    if words > entries:
        return f"its tokenizer has {words:,} entries and the model {entries:,}"
    return ""


def _too_large(folders: Mapping[str, Path], device: str) -> str:
    """Why models are not loaded, or "": their weights in fp32, as many as are held."""
    most = max(count_parameters(hub.read_config(folder)).total for folder in folders.values())
    need = 4 * most * min(COPIES, len(folders) + 1)
    there, what = preflight.memory(device)
    if need <= there:
        return ""
    return (
        f"they need {need / 1e9:,.0f} GB and this machine has {there / 1e9:,.0f} GB of {what}; "
        "weights are compared as files"
    )
