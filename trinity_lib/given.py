"""Checkpoints that a user brings: what of a study of stages can be had of any AFMoE folders.

What needs a planted truth gives way to what can be asked of any model, and what cannot be
had is named with its reason.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
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
    paths,
    planted,
    preflight,
    stage_routing,
    stored,
    tokenizer,
)
from trinity_lib.chat import Example
from trinity_lib.config import BadValue, differences, first_line, require
from trinity_lib.data import Batch
from trinity_lib.interview import Said
from trinity_lib.model import ModelConfig, Trinity, count_parameters
from trinity_lib.planted import World
from trinity_lib.truebase_config import TruebaseConfig

ROWS, LENGTH = 16, 256
"""Rows of a domain, and their tokens, that routing and predictions are compared on."""
EMBEDDED = ("code", "prose")
"""Domains of the embedded corpus that stand in where no texts are given."""
COPIES = 3
"""Models held at one time, at most: two and what lies between them."""
COMPARED = ("weights", "routing", "predictions", "paths")
"""What checkpoints are compared by."""
NOTHING = ("load_balance_coeff", "max_positions")
"""Settings on which no output depends."""


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
            left_out |= {f"conversations with {stage}": why} if why else {}
        said[stage] += interview.of_any(model.subject, asked)
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
    """All comparisons that can be made, or of the weights alone; adds to what is left out."""
    barred = _barred(folders)
    if len(barred) == len(COMPARED) and len(set(barred.values())) == 1:
        left_out["comparisons"] = barred["weights"]
        return {}
    left_out |= barred
    rows = None
    if not weights_alone and not set(barred) >= set(COMPARED[1:]):
        rows = _rows(folders, texts, config.seed, left_out)
    if rows is None:
        return {} if "weights" in barred else _weights(folders, None, tell)
    if barred:
        return _partly(folders, rows, config, barred, tell)
    return compare.compare(folders, rows, device=config.device, seed=config.seed, progress=tell)


def _barred(folders: Mapping[str, Path]) -> dict[str, str]:
    """Why which of `COMPARED` cannot be had."""
    if len(folders) < 2:
        return dict.fromkeys(COMPARED, "one checkpoint was given")
    (first, config), *others = ((stage, hub.read_config(f)) for stage, f in folders.items())
    found: dict[str, str] = {}
    for stage, other in others:
        changed = differences(config, other, NOTHING)
        if changed:
            why = f"{stage} is another model than {first}: {'; '.join(changed)}"
            what = _bars(config, other, _shapes_differ(folders[first], folders[stage]))
            found |= {each: why for each in what if each not in found}
    if not len(config.moe_layers):
        found.setdefault("routing", "the models have no experts")
    return found


def _bars(config: ModelConfig, other: ModelConfig, reshaped: bool) -> tuple[str, ...]:
    """What settings that differ make senseless; no line leads between unlike settings."""
    if reshaped:
        resized = dataclasses.replace(other, vocab_size=config.vocab_size)
        words_alone = not differences(config, resized, NOTHING)
        return ("weights", "predictions", "paths") if words_alone else COMPARED
    unlike = config.router.top_k != other.router.top_k
    return ("routing", "paths") if unlike else ("paths",)


def _shapes_differ(first: Path, other: Path) -> bool:
    try:
        stored.require_alike({"first": stored.inspect(first), "other": stored.inspect(other)})
    except BadValue:
        return True
    return False


def _weights(
    folders: Mapping[str, Path], load: xr.DataArray | None, tell: Callable[[str], None]
) -> dict[str, xr.Dataset]:
    pairs = compare.chain(list(folders))
    weights, experts = drift.weights(folders, pairs, load=load, progress=tell)
    dense = experts.sizes["layer"] == 0
    return {"weight_drift": weights} | ({} if dense else {"expert_drift": experts})


def _partly(
    folders: Mapping[str, Path],
    rows: Mapping[str, Batch],
    config: TruebaseConfig,
    barred: Mapping[str, str],
    tell: Callable[[str], None],
) -> dict[str, xr.Dataset]:
    """The groups of `compare.compare` but for those that cannot be had."""
    pairs = compare.chain(list(folders))
    batch, labels = compare.joined(rows)

    def load(stage: str) -> Trinity:
        return hub.load(folders[stage], device=config.device, dtype=torch.float32)

    found: dict[str, xr.Dataset] = {}
    if "routing" not in barred:
        looks = {}
        for stage in folders:
            tell(f"routing: {stage}")
            looks[stage] = stage_routing.look(load(stage), batch)
        found["stage_routing"], found["routing_change"] = stage_routing.described(
            looks, batch, pairs, labels=labels, seed=config.seed
        )
    if "weights" not in barred:
        loads = found["stage_routing"]["load"] if "stage_routing" in found else None
        found |= _weights(folders, loads, tell)
    moved, lines = [], []
    for pair in [] if "predictions" in barred else pairs:
        tell(f"predictions: {pair[0]} -> {pair[1]}")
        models = {stage: load(stage) for stage in pair}
        moved.append(compare.functional(models, [pair], rows))
        if "paths" not in barred:
            lines.append(paths.along(models, [pair], batch, progress=tell))
    found |= {"functional": xr.concat(moved, "change")} if moved else {}
    return found | ({"path": xr.concat(lines, "change")} if lines else {})


def _rows(
    folders: Mapping[str, Path],
    texts: Mapping[str, list[str]],
    seed: int,
    left_out: dict[str, str],
) -> dict[str, Batch] | None:
    """Rows by domain, or None where tokenizers read the texts differently.

    A folder without a tokenizer is read with another's; where no folder has one, or texts
    have tokens that a model lacks, rows are of random tokens. That is said in `left_out`.
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
            "no checkpoint has a tokenizer that fits it: rows are of random tokens, which say "
            "less than text"
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
    if any(max(tokens, default=0) >= _smallest(folders) for tokens in first):
        left_out["texts"] = (
            "they have tokens that one of the models lacks: rows are of random tokens, which "
            "say less than text"
        )
        return {"random tokens": _random(folders, seed)}
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
    """Rows of tokens drawn alike from those that all models have."""
    drawn = np.random.default_rng(seed).integers(
        _smallest(folders), size=(ROWS, LENGTH), dtype=np.int32
    )
    return chat.pack([Example(t, np.ones(LENGTH, dtype=bool)) for t in drawn], LENGTH).batch


def _smallest(folders: Mapping[str, Path]) -> int:
    """Entries of the smallest vocabulary."""
    return min(hub.read_config(folder).vocab_size for folder in folders.values())


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
