"""What post-training is given: questions with answers, and pairs of a better and a worse one.

The user's own come as JSONL, one record a line, of three kinds: `{"messages": [...]}`,
`{"prompt": ..., "answer": ...}` and `{"prompt": ..., "chosen": ..., "rejected": ...}`.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trinity_lib.chat import ROLES, Conversation, Message, Template
from trinity_lib.config import BadValue, Missing, first_line

KINDS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("prompt", "answer"),
    ("prompt", "chosen", "rejected"),
)
"""Fields of a record, by its kind."""
SHOWN = " or ".join("{" + ", ".join(fields) + "}" for fields in KINDS)


class Question(NamedTuple):
    """What is asked, and what should be answered."""

    task: str
    """Name of what it belongs to."""
    asked: Conversation
    """All turns before the answer."""
    answer: str
    """What should be said."""
    form: str = "any"
    """What an answer of the form that is asked for looks like, a name of `rewards.FORMS`."""

    @property
    def conversation(self) -> Conversation:
        """With the answer."""
        return (*self.asked, Message("assistant", self.answer))

    @property
    def key(self) -> str:
        """What is asked, as one text."""
        return "\n".join(message.content for message in self.asked)


class Pair(NamedTuple):
    """Two answers to one question, of which one is preferred."""

    task: str
    """Name of what it belongs to."""
    asked: Conversation
    """All turns before the answers."""
    chosen: str
    """The better answer."""
    rejected: str
    """The worse."""

    @property
    def key(self) -> str:
        """What is asked, as one text."""
        return "\n".join(message.content for message in self.asked)


def ask(text: str) -> Conversation:
    """A conversation of one question."""
    return (Message("user", text),)


def questions(path: Path, template: Template) -> list[Question]:
    """Records of a JSONL file that have an answer; BadValue names the line of a bad one."""
    found = []
    for where, record in _records(path, "answer"):
        if "messages" in record:
            *asked, last = _messages(record["messages"], where)
            if last.role != "assistant":
                raise BadValue(f"{where}: messages must end with one of the assistant.")
            question = Question(path.stem, tuple(asked), last.content)
        else:
            question = Question(
                path.stem,
                ask(_text(record, "prompt", where)),
                _text(record, "answer", where),
            )
        _no_marks(question.conversation, template, where)
        found.append(question)
    return _some(found, path, "messages, or prompt and answer")


def pairs(path: Path, template: Template) -> list[Pair]:
    """Records of a JSONL file with a preference; BadValue names the line of a bad one."""
    found = []
    for where, record in _records(path, "chosen"):
        prompt, chosen, rejected = (_text(record, name, where) for name in KINDS[2])
        if chosen.strip() == rejected.strip():
            raise BadValue(f"{where}: chosen and rejected are the same.")
        every = (*ask(prompt), Message("assistant", f"{chosen}\n{rejected}"))
        _no_marks(every, template, where)
        found.append(Pair(path.stem, ask(prompt), chosen, rejected))
    return _some(found, path, "prompt, chosen and rejected")


def _records(path: Path, wanted: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) for the records of a kind: with an answer or a choice."""
    for where, record in _lines(path):
        kind = next((k for k in KINDS if set(k) <= set(record)), None)
        if kind is None:
            raise BadValue(f"{where}: a record has the fields {SHOWN}.")
        if ("chosen" in kind) == (wanted == "chosen"):
            yield where, record


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Missing(f"{path}: there is no such file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"{path} cannot be read as UTF-8 text: {first_line(error)}.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadValue(f"{where}, is not JSON: {first_line(error)}.") from error
        if not isinstance(record, dict):
            raise BadValue(f"{where}: a record is a JSON object with the fields {SHOWN}.")
        yield where, record


def _messages(given: Any, where: str) -> list[Message]:
    """A conversation: perhaps a system's turn, then the user and the assistant in turn."""
    if not isinstance(given, list) or not given:
        raise BadValue(f"{where}: messages must be a list of at least two.")
    found = []
    for number, each in enumerate(given, 1):
        if not isinstance(each, dict) or each.get("role") not in ROLES:
            raise BadValue(
                f"{where}: message {number} must have a role ({', '.join(ROLES)}) and content."
            )
        found.append(Message(each["role"], _text(each, "content", where)))
    roles = [message.role for message in found if message.role != "system"]
    turns = [("user", "assistant")[i % 2] for i in range(len(roles))]
    first = [message.role for message in found[1:]]
    if roles != turns or "system" in first or not roles:
        raise BadValue(
            f"{where}: messages must be of the user and the assistant in turn, the user "
            "first, with at most one of the system before."
        )
    return found


def _text(record: dict[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadValue(f"{where}: {name} must be text, and not empty.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadValue(f"{where}: {name} holds half a surrogate pair, which is no text.")
    return value


def _no_marks(conversation: Conversation, template: Template, where: str) -> None:
    if mark := template.spelled(conversation):
        raise BadValue(f"{where}: spells {mark}, which would be taken for the mark.")


def _some(found: Sequence[Any], path: Path, fields: str) -> list[Any]:
    if not found:
        raise BadValue(f"{path} has no record with {fields}.")
    return list(found)
