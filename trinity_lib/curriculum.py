"""What a run of post-training learns, and what it keeps for examinations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trinity_lib import dialogues, examination, lessons, sources
from trinity_lib.chat import Template
from trinity_lib.config import BadValue
from trinity_lib.dialogues import Pair, Question
from trinity_lib.posttrain_config import PosttrainConfig

HELD_OUT = 10
"""One prompt in this many of the user's is asked about and not learnt from."""


@dataclass
class Curriculum:
    """Questions and pairs by task or file; the same prompts are held out of all stages."""

    questions: dict[str, list[Question]] = field(default_factory=dict)
    held_out: dict[str, list[Question]] = field(default_factory=dict)
    pairs: dict[str, list[Pair]] = field(default_factory=dict)
    held_out_pairs: list[Pair] = field(default_factory=list)


def read(config: PosttrainConfig, template: Template) -> Curriculum:
    """All that the run's stages need; BadValue for a record that cannot be used."""
    kinds = {stage.kind for stage in config.stages}
    names = [*(config.data if "sft" in kinds else ())]
    names += [*(config.problems if "grpo" in kinds else ())]
    found = Curriculum()
    for name in dict.fromkeys(names):
        if name in lessons.TASKS:
            parts: Sequence[list[Any]] = lessons.task(name, config.seed)
        else:
            parts = _parted(dialogues.questions(Path(name), template), name)
        found.questions[name], found.held_out[name] = parts
    for name in config.preferences if "dpo" in kinds else ():
        if name in lessons.TASKS:
            parts = lessons.preferences(name, config.seed)
        else:
            parts = _parted(dialogues.pairs(Path(name), template), name)
        found.pairs[name] = parts[0]
        found.held_out_pairs += parts[1]
    return found


def warnings(
    found: Curriculum, config: PosttrainConfig, template: Template, vocabulary: int
) -> list[str]:
    """What is cut; BadValue where nothing is left, or a token is beyond the model's."""
    length, said = config.sequence_length, []
    for name, questions in found.questions.items():
        examples = [template.encode(q.conversation) for q in questions]
        said += examination.require_fits(examples, length, name, vocabulary)
    for name, pairs in found.pairs.items():
        examples = [e for pair in pairs for e in examination.both(template, pair)]
        said += examination.require_fits(examples, length, name, vocabulary)
    return said


def _parted(records: Sequence[Any], name: str) -> tuple[list[Any], list[Any]]:
    """(what is learnt, what is held out), by a hash of what is asked."""
    held = [sources.held_out(record.key, HELD_OUT) for record in records]
    learnt = [record for record, out in zip(records, held, strict=True) if not out]
    if not learnt:
        raise BadValue(f"{name} has {len(records)} records, all of them held out: give more.")
    return learnt, [record for record, out in zip(records, held, strict=True) if out]
