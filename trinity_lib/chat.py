"""Conversations as tokens: turns marked in the checkpoint's own tokenizer, answers told apart.

A tokenizer with ChatML's marks gets ChatML, any other plain text (`Q:`, `A:`)
and its own end mark; no token is added. The same turns are written as a jinja template, so
that transformers' `apply_chat_template` makes the same tokens.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trinity_lib.config import BadValue
from trinity_lib.data import IGNORE, Batch
from trinity_lib.rows import place
from trinity_lib.tokenizer import SETTINGS, Vocabulary

GENERATION = "generation_config.json"
ROLES = ("system", "user", "assistant")
CHATML = ("<|im_start|>", "<|im_end|>")


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    """What is said; blanks around it are left out."""


Conversation = tuple[Message, ...]


class Example(NamedTuple):
    """A conversation's tokens."""

    tokens: np.ndarray
    """All of them, int32."""
    answer: np.ndarray
    """Which of them are the assistant's, end marks included; bool."""


class Packed(NamedTuple):
    """Examples in rows; targets are the answers' tokens alone."""

    batch: Batch
    """The rows; every example is a document of its own."""
    owner_BS: np.ndarray
    """Number of the example at each position, int64; IGNORE for padding."""


class Piece(NamedTuple):
    """A piece of a conversation as it is written."""

    text: str
    said: bool = False
    """Whether the assistant says it."""
    mark: bool = False
    """Whether it is a mark, one token."""


class Turn(NamedTuple):
    """What stands around what one role says."""

    before: str
    gap: str
    """Between `before` and the content: not part of the prompt of an answer."""
    after: str


class Template(NamedTuple):
    """How a tokenizer's conversations are written."""

    vocabulary: Vocabulary
    """The checkpoint's tokenizer."""
    begin: str
    """Mark before a conversation, "" where there is none."""
    end: str
    """Mark that ends an answer, and so generation."""
    turns: dict[str, Turn]
    """By role."""

    @property
    def stop(self) -> int:
        """The token of `end`."""
        return self._id(self.end)

    @property
    def marks(self) -> tuple[str, ...]:
        """Pieces of text that are one token each; no content may spell one."""
        return tuple(dict.fromkeys(m for m in (self.begin, self.end, *self._chatml) if m))

    @property
    def _chatml(self) -> tuple[str, ...]:
        return CHATML if self.end == CHATML[1] else ()

    def spelled(self, conversation: Conversation) -> str:
        """A mark that a content spells, or "": other readers would take it for the mark."""
        every = "\n".join(message.content for message in conversation)
        return next((mark for mark in self.marks if mark in every), "")

    def encode(self, conversation: Conversation) -> Example:
        """All tokens of a conversation, and which of them the assistant said."""
        pieces = self._written(self.begin)
        for role, content in conversation:
            turn, said = self.turns[role], role == "assistant"
            pieces += self._written(turn.before)
            pieces.append(Piece(turn.gap + content.strip(), said))
            if said:
                pieces.append(Piece(self.end, True, mark=True))
            pieces += self._written(turn.after.removeprefix(self.end if said else ""))
        return self._encode(pieces)

    def prompt(self, conversation: Conversation) -> np.ndarray:
        """Tokens of a conversation whose next turn is the assistant's, int32."""
        pieces = self._written(self.begin)
        for role, content in conversation:
            turn = self.turns[role]
            pieces += self._written(turn.before)
            pieces.append(Piece(turn.gap + content.strip(), role == "assistant"))
            pieces += self._written(turn.after)
        pieces += self._written(self.turns["assistant"].before)
        return self._encode(pieces).tokens

    def text(self, conversation: Conversation) -> str:
        """The same as text, without the mark it begins with: that is a tokenizer's to add."""
        turns = [self.turns[role] for role, _ in conversation]
        contents = [content.strip() for _, content in conversation]
        said = [f"{t.before}{t.gap}{c}{t.after}" for t, c in zip(turns, contents, strict=True)]
        return "".join([*said, self.turns["assistant"].before])

    def said(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, up to the end of the answer."""
        kept = list(tokens)
        if self.stop in kept:
            kept = kept[: kept.index(self.stop)]
        return self.vocabulary.decode([kept])[0].strip()

    @property
    def jinja(self) -> str:
        """The template as transformers, vLLM and llama.cpp read it."""
        branches = []
        for number, (role, turn) in enumerate(self.turns.items()):
            word = "elif" if number else "if"
            before, after = (json.dumps(t) for t in (turn.before + turn.gap, turn.after))
            content = "message['content'] | trim"
            branches.append(
                f"{{% {word} message['role'] == '{role}' %}}"
                f"{{{{ {before} }}}}{{{{ {content} }}}}{{{{ {after} }}}}"
            )
        prompt = json.dumps(self.turns["assistant"].before)
        return (
            f"{{{{ {json.dumps(self.begin)} }}}}{{% for message in messages %}}"
            + "".join(branches)
            + "{% endif %}{% endfor %}"
            + f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
        )

    def write(self, folder: Path) -> None:
        """Add the template and the end of an answer to a checkpoint's files."""
        settings = json.loads((folder / SETTINGS).read_text())
        settings["chat_template"] = self.jinja
        (folder / SETTINGS).write_text(json.dumps(settings))
        ends = {self.stop: None, self.vocabulary.ids["eos_token_id"]: None}
        ids = {
            "bos_token_id": self.vocabulary.ids["bos_token_id"],
            "eos_token_id": [token for token in ends if token is not None],
        }
        (folder / GENERATION).write_text(json.dumps(ids) + "\n")

    def _written(self, text: str) -> list[Piece]:
        """A piece of the template itself, which may hold marks."""
        parts = re.split("(" + "|".join(map(re.escape, self.marks)) + ")", text)
        return [Piece(part, mark=part in self.marks) for part in parts if part]

    def _encode(self, pieces: Sequence[Piece]) -> Example:
        """Marks are one token each; what stands between two is tokenised as one text."""
        tokens: list[int] = []
        answer: list[bool] = []
        text, asked = "", 0  # since the last mark, and how many characters are no answer
        for piece in [*pieces, Piece("", mark=True)]:
            if not piece.mark:
                text += piece.text
                asked += 0 if piece.said else len(piece.text)
                continue
            ids = self._ids(text)
            known = len(ids)
            if asked < len(text):  # as many tokens as the prompt alone has had
                known = _in_common(ids, self._ids(text[:asked]))
            tokens += ids
            answer += [number >= known for number in range(len(ids))]
            text, asked = "", 0
            if piece.text:
                tokens.append(self._id(piece.text))
                answer.append(piece.said)
        return Example(np.array(tokens, dtype=np.int32), np.array(answer, dtype=bool))

    def _id(self, mark: str) -> int:
        token = self.vocabulary.tokenizer.token_to_id(mark)
        assert token is not None
        return token

    def _ids(self, text: str) -> list[int]:
        return self.vocabulary.tokenizer.encode(text, add_special_tokens=False).ids


def template(vocabulary: Vocabulary) -> Template:
    """ChatML where the tokenizer has its marks, else plain text; BadValue without an end."""
    begin = vocabulary.begin or ""
    if all(vocabulary.tokenizer.token_to_id(mark) is not None for mark in CHATML):
        start, end = CHATML
        turns = {role: Turn(f"{start}{role}\n", "", f"{end}\n") for role in ROLES}
        return Template(vocabulary, begin, end, turns)
    if vocabulary.end is None:
        raise BadValue(
            "the checkpoint's tokenizer has no end mark that is known by its name, so an "
            "answer could not end; name one as eos_token in its tokenizer_config.json."
        )
    turns = {
        "system": Turn("", "", "\n"),
        "user": Turn("Q:", " ", "\n"),
        "assistant": Turn("A:", " ", vocabulary.end),
    }
    return Template(vocabulary, begin, vocabulary.end, turns)


def pack(examples: Sequence[Example], length: int) -> Packed:
    """Rows of `length` tokens, filled in order; an example that does not fit begins the next.

    Longer ones are cut, and rows are padded at their end (technical report, section 4).
    """
    rows: list[list[int]] = [[]]
    room = length
    for number, example in enumerate(examples):
        size = min(len(example.tokens), length)
        if size > room:
            rows.append([])
            room = length
        rows[-1].append(number)
        room -= size
    shape = (len(rows), length)
    batch = Batch(*(np.full(shape, IGNORE, dtype=np.int64) for _ in Batch._fields))
    owner_BS = np.full(shape, IGNORE, dtype=np.int64)
    for row, numbers in enumerate(rows):
        at = 0
        for piece, number in enumerate(numbers):
            tokens, answer = examples[number]
            stop = min(len(tokens), length)
            place(batch, row, at, piece, tokens, 0, stop)
            here = slice(at, at + stop)
            wanted = np.append(answer[1:], False)[:stop]
            batch.targets_BS[row, here] = np.where(wanted, batch.targets_BS[row, here], IGNORE)
            owner_BS[row, here] = number
            at += stop
    batch.tokens_BS[batch.tokens_BS == IGNORE] = 0
    return Packed(batch, owner_BS)


def _in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first tokens are the same."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(a), len(b)))
