"""The audit cards of a study of stages: one for every stage's folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trinity_lib import card, checkpoint, interview, planted
from trinity_lib.interview import Said
from trinity_lib.record import read_attributes
from trinity_lib.subject import Finding
from trinity_lib.truebase_config import TruebaseConfig

LIMITATIONS = (
    "The model is a toy of under a million parameters, trained for minutes on text made "
    "by rule: what is found shows what the audits can see, not what a large model holds.",
    "Intervals are over names, people or places of one chain: they say nothing of other seeds.",
)
"""Of every card of a chain that was trained here."""
CARDS = "cards"
"""Folder of a run with a card for every stage."""


def write(
    config: TruebaseConfig,
    place: Path,
    said: Mapping[str, Sequence[Said]],
    folders: Mapping[str, Path],
    left_out: Mapping[str, str],
) -> dict[str, str]:
    """Write a card of every stage into a run's folder, `place`; where each is inside it."""
    findings = {stage: _named(each) for stage, each in said.items()}
    lessons = sorted((place / "lessons").glob("*.jsonl"))
    places = {}
    for stage, folder in folders.items():
        made = card.build(
            {stage: findings[stage]} | findings,
            folder,
            _training(folder),
            stage=stage,
            data=_data(config),
            limitations=[] if config.checkpoints else LIMITATIONS,
            not_asked=left_out,
            records={path.name: path for path in lessons},
        )
        card.write(made, place / CARDS / stage)
        places[stage] = f"{CARDS}/{stage}"
    return places


def _named(said: Sequence[Said]) -> list[Finding]:
    """What is asked in a conversation says so in its item."""
    return [
        each._replace(item=f"{each.item}, in conversation") if how == interview.CHAT else each
        for how, each in said
    ]


def _training(folder: Path) -> dict[str, Any]:
    """Attributes of the run that a checkpoint belongs to; none where it is not one of ours."""
    there = (folder.parent / "run.json").is_file()
    return dict(read_attributes(folder.parent)) if there else {}


def _data(config: TruebaseConfig) -> dict[str, str]:
    if config.checkpoints:
        files = {"items": config.items, "texts": config.texts}
        found = {n: checkpoint.described(Path(p))["sha256"] for n, p in files.items() if p}
        if config.world_file:  # a file, or a folder with one
            found["world"] = planted.sha256(planted.read(Path(config.world_file)))
        return found
    return {"planted world": planted.sha256(planted.world(config.world))}
