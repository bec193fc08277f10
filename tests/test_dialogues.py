"""The user's records, good ones and every kind of bad one."""

from pathlib import Path

import pytest

from tests import conversing
from trinity_lib import dialogues
from trinity_lib.chat import Message
from trinity_lib.config import Refusal

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GOOD = [
    {"prompt": "one", "answer": "1"},
    {"messages": [{"role": "system", "content": "s"}, *TURNS, *TURNS]},
    {"prompt": "two", "chosen": "2", "rejected": "3", "note": "ignored"},
]


def test_records_are_read_by_their_kind(tmp_path: Path) -> None:
    path = Path(conversing.jsonl(tmp_path / "mine.jsonl", GOOD))
    path.write_text(path.read_text() + "\n")
    first, second = dialogues.questions(path, conversing.template())
    assert (first.task, first.asked, first.answer) == ("mine", (Message("user", "one"),), "1")
    assert [m.role for m in second.conversation] == ["system", *["user", "assistant"] * 2]
    (pair,) = dialogues.pairs(path, conversing.template())
    assert (pair.chosen, pair.rejected, pair.key) == ("2", "3", "two")


def turns(*roles: str) -> str:
    import json

    return json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]})


BAD = [
    ("{", "line 1, is not JSON"),
    ("[1]", "line 1: a record is a JSON object with the fields {messages} or {prompt, answer}"),
    ('{"prompt": "a"}', "line 1: a record has the fields {messages} or"),
    ('\n{"text": "a"}', "line 2: a record has the fields"),
    ('{"prompt": "a", "answer": ""}', "line 1: answer must be text, and not empty"),
    (r'{"prompt": "a", "answer": "\ud800"}', "line 1: answer holds half a surrogate pair"),
    ('{"prompt": "a", "answer": 7}', "line 1: answer must be text"),
    ('{"prompt": ["a"], "answer": "b"}', "line 1: prompt must be text"),
    ('{"messages": "a"}', "line 1: messages must be a list of at least two"),
    ('{"messages": ["a"]}', "line 1: message 1 must have a role .system, user, assistant."),
    (turns("human", "assistant"), "line 1: message 1 must have a role"),
    ('{"messages": [{"role": "user"}]}', "line 1: content must be text"),
    (turns("user"), "line 1: messages must end with one of the assistant"),
    (turns("assistant", "user"), "line 1: messages must be of the user and the assistant in"),
    (turns("user", "user", "assistant"), "line 1: messages must be of the user and"),
    (turns("user", "system", "assistant"), "line 1: messages must be of the user and"),
    ('{"prompt": "say <|end|>", "answer": "b"}', r"line 1: spells <\|end\|>, which would be"),
    ('{"prompt": "a", "answer": "<|begin|>"}', r"line 1: spells <\|begin\|>"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "has no record with messages, or"),
    ("", "has no record with messages, or prompt and answer"),
]


@pytest.mark.parametrize(("text", "sentence"), BAD, ids=range(len(BAD)))
def test_a_bad_question_is_refused_by_its_line(
    tmp_path: Path, text: str, sentence: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(Refusal, match=sentence) as caught:
        dialogues.questions(path, conversing.template())
    assert str(caught.value).startswith(str(path)) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"prompt": "a", "chosen": "b", "rejected": " b"}',
            "chosen and rejected are the same",
        ),
        ('{"prompt": "a", "chosen": "b", "rejected": null}', "rejected must be text"),
        ('{"prompt": "a", "chosen": "b", "rejected": "<|end|>"}', "spells"),
        ('{"prompt": "a", "answer": "b"}', "has no record with prompt, chosen and rejected"),
    ],
)
def test_a_bad_pair_is_refused_by_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(Refusal, match=sentence):
        dialogues.pairs(path, conversing.template())


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="there is no such file"):
        dialogues.questions(tmp_path / "none.jsonl", conversing.template())
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(Refusal, match="cannot be read as UTF-8 text"):
        dialogues.questions(tmp_path / "latin.jsonl", conversing.template())
