"""All that is asked of one checkpoint: audits as its text goes on, and in conversations."""

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from trinity_lib import (
    association,
    audit,
    behaviour,
    chat,
    checkpoint,
    examination,
    hub,
    items,
    polish,
    rewards,
)
from trinity_lib.answers import finding
from trinity_lib.asked import Asked, AskedTransformers
from trinity_lib.chat import Template
from trinity_lib.config import BadValue
from trinity_lib.dialogues import Question
from trinity_lib.model import Trinity
from trinity_lib.planted import World
from trinity_lib.subject import Finding, Remembered, Subject
from trinity_lib.tokenizer import Vocabulary

Reader = Literal["trinity", "transformers"]
TEXT, CHAT = "text", "chat"
"""How a question is put: as the text goes on, or as a conversation's."""


class Said(NamedTuple):
    """One finding, and how it was asked."""

    asked_as: str
    finding: Finding


class Checkpoint(NamedTuple):
    """A folder's model, read once."""

    model: Trinity
    vocabulary: Vocabulary
    subject: Subject
    """The model that answers: ours, or the one that transformers reads."""
    template: Template | None
    """None where its tokenizer has no end mark, so that no answer could end."""


def read(folder: Path, reader: Reader, device: str) -> Checkpoint:
    """A checkpoint folder, ours or a released one, checked first."""
    checkpoint.check(folder)
    model = hub.load(folder, device=device, dtype=torch.float32 if device == "cpu" else None)
    vocabulary = checkpoint.load_vocabulary(folder)
    subject: Subject = Asked(model, vocabulary)
    if reader == "transformers":
        subject = AskedTransformers(_by_transformers(folder, device), vocabulary)
    try:
        template = chat.template(vocabulary)
    except BadValue:
        template = None
    return Checkpoint(model, vocabulary, subject, template)


def _by_transformers(folder: Path, device: str) -> torch.nn.Module:
    try:
        with warnings.catch_warnings():  # of a progress bar of its own
            warnings.filterwarnings("ignore", "IProgress not found")
            import transformers
    except ImportError as error:
        raise BadValue("reader transformers needs: pip install 'trinity-lib[eval]'.") from error
    transformers.utils.logging.disable_progress_bar()
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return read.eval().to(device)


def of_world(given: Checkpoint, world: World, seed: int) -> list[Said]:
    """Every audit with a planted truth, and the association and the exam in conversations.

    The same subject answers to all; conversations are left out where `not_conversed` says why.
    """
    found = [Said(TEXT, f) for f in audit.run(Remembered(given.subject), world, seed=seed)]
    if given.template is None or not_conversed(given):
        return found
    found += [Said(CHAT, f) for f in conversed(given.subject, given.template, world)]
    return found + [Said(CHAT, f) for f in _examined(given.subject, given.template, world)]


def not_conversed(given: Checkpoint) -> str:
    """Why nothing can be asked in conversations, or ""."""
    if given.template is None:
        return "the tokenizer has no end mark that is known by its name"
    if set(given.template.marks) & set(chat.CHATML):
        return "turns begin with marks of the tokenizer, which a text cannot spell"
    return ""


def conversed(subject: Subject, template: Template, world: World) -> Iterator[Finding]:
    """The association in answers to a question; what they ought to be, lessons decide."""
    nan = float("nan")
    held_out = {name.word for name in world.names if name.held_out}
    for label, names in (("told names", False), ("held-out names", True)):
        asked = [
            q for q in polish.association(world, template) if (q.cluster in held_out) == names
        ]
        found = association.slope(subject, world, asked)
        yield finding(association.NAME, f"slope, {label}", association.SLOPE, found, nan, 0.0)


def _examined(subject: Subject, template: Template, world: World) -> Iterator[Finding]:
    """What it says to questions that no lesson asked; who or what is asked about is a unit.

    Refusals are compared over people whom the text knows: what it tells of them, and what not.
    """
    asked = polish.exam(world)
    pairs = list(zip(asked, _answers(subject, template, asked), strict=True))
    for task in dict.fromkeys(q.task for q in asked):
        own = [pair for pair in pairs if pair[0].task == task]
        right = [rewards.right(q, text) for q, text in own]
        formed = [rewards.formed(q, text) for q, text in own]
        yield from behaviour.instructed(task, right, formed, [_whom(world, q) for q, _ in own])
    both = [(q, text) for q, text in pairs if q.task in ("facts", "never told")]
    known = [q.task == "facts" for q, _ in both]
    if any(known) and not all(known):  # a small world's exam may lack one of them
        refused = [text == rewards.REFUSAL for _, text in both]
        yield from behaviour.refusals(refused, known, [_whom(world, q) for q, _ in both])


def _answers(subject: Subject, template: Template, asked: Sequence[Question]) -> list[str]:
    """What a subject says to each question, as `examination.answers` has it of a model."""
    longest = max(
        len(template.encode(q.conversation).tokens) - len(template.prompt(q.asked))
        for q in asked
    )
    prompts = [template.text(q.asked) for q in asked]
    said = subject.complete(prompts, min(longest + 4, examination.LONGEST))
    return [text.strip() for text in said]


def _whom(world: World, question: Question) -> str:
    """The person that a question is about, or the question where it is of nobody's own."""
    people = {fact.person for fact in world.facts}
    words = re.findall(r"\w+", question.key)
    return next((word for word in words if word in people), question.key)


def of_any(subject: Subject, asked: Sequence[items.Item]) -> list[Said]:
    """What can be asked of any model: the user's items."""
    if not asked:
        return []
    return [Said(TEXT, each) for each in items.audit(subject, asked)]
