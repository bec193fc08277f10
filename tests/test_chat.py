"""Conversations as tokens, against transformers' own templates; packing."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import conversing
from trinity_lib import chat, hub
from trinity_lib.chat import Example, Message, pack
from trinity_lib.config import BadValue
from trinity_lib.data import IGNORE
from trinity_lib.losses import log_probabilities
from trinity_lib.model import ModelConfig
from trinity_lib.tokenizer import Vocabulary

os.environ["HF_HUB_OFFLINE"] = "1"
KINDS = pytest.mark.parametrize("chatml", [False, True], ids=["plain", "chatml"])
CONTENTS = (
    "Where was Ada born?",
    "  37 + 45 = \n",
    "two\n\nlines",
    "Grüße, 東京 \U0001f600",
    "?!",
)
ANSWERS = ("Rome", " 82 ", "- 7", "in\ntwo lines", "…", "A: B")


def conversations() -> list[chat.Conversation]:
    """One and two exchanges, with and without a system's turn."""
    found: list[chat.Conversation] = []
    for i, (asked, said) in enumerate(zip(CONTENTS * 2, ANSWERS * 2, strict=False)):
        turns = (Message("user", asked), Message("assistant", said))
        turns += turns if i % 2 else ()
        found.append((Message("system", "Be brief."), *turns) if i % 3 else turns)
    return found


@KINDS
def test_transformers_makes_the_same_tokens(
    chatml: bool, tmp_path: Path, tiny_model: ModelConfig
) -> None:
    transformers = pytest.importorskip("transformers")
    template = conversing.template(chatml)
    hub.save(conversing.model(tiny_model), tmp_path / "m", tokenizer=template.vocabulary)
    template.write(tmp_path / "m")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for conversation in conversations():
        messages = [message._asdict() for message in conversation]
        encoded = theirs.apply_chat_template(messages)["input_ids"]
        assert encoded == template.encode(conversation).tokens.tolist()
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True)
        assert asked["input_ids"] == template.prompt(conversation[:-1]).tolist()
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id
    assert template.stop in ends


@KINDS
def test_answers_and_their_ends_are_told_apart(chatml: bool) -> None:
    template = conversing.template(chatml)
    for conversation in conversations():
        tokens, answer = template.encode(conversation)
        prompt = template.prompt(conversation[:-1])
        assert (tokens[: len(prompt)] == prompt).all()
        last = len(prompt) + int((tokens[len(prompt) :] == template.stop).argmax())
        assert answer[len(prompt) : last + 1].all() and not answer[last + 1 :].any()
        assert template.said(tokens[len(prompt) :].tolist()) == conversation[-1].content.strip()
        said = [m for m in conversation if m.role == "assistant"]
        assert (tokens[answer] == template.stop).sum() == len(said)
        text = template.vocabulary.decode([tokens[answer].tolist()])[0]
        gap = template.turns["assistant"].gap
        assert text == "".join(gap + message.content.strip() for message in said)


def test_a_mark_that_is_spelled_out_is_found() -> None:
    template = conversing.template()
    assert template.spelled((Message("user", "say <|end|> twice"),)) == "<|end|>"
    assert template.spelled((Message("user", "say <end> twice"),)) == ""


def test_a_tokenizer_without_an_end_is_refused() -> None:
    plain = conversing.vocabulary()
    with pytest.raises(BadValue, match="has no end mark .* an answer could not end"):
        chat.template(Vocabulary(plain.tokenizer, plain.begin, None))


def examples(lengths: list[int]) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(rng.integers(2, 300, n).astype(np.int32), np.arange(n) >= n // 2)
        for n in lengths
    ]


def test_packing_is_greedy_and_cuts_what_is_too_long() -> None:
    packed = pack(examples([5, 6, 4, 30, 3]), 16)
    rows = [list(dict.fromkeys(row[row >= 0].tolist())) for row in packed.owner_BS]
    assert rows == [[0, 1, 2], [3], [4]]
    assert (packed.owner_BS[1] == 3).all()
    assert packed.batch.documents_BS[0].tolist() == [0] * 5 + [1] * 6 + [2] * 4 + [IGNORE]


def test_targets_are_answers_alone() -> None:
    given = examples([5, 6, 4, 9])
    packed = pack(given, 16)
    for number, (tokens, answer) in enumerate(given):
        at = np.flatnonzero(packed.owner_BS.reshape(-1) == number)
        targets = packed.batch.targets_BS.reshape(-1)[at]
        expected = [t if a else IGNORE for t, a in zip(tokens[1:], answer[1:], strict=True)]
        assert targets.tolist() == [*expected, IGNORE]


def test_a_packed_example_is_computed_as_it_would_be_alone(tiny_model: ModelConfig) -> None:
    made, given = conversing.model(tiny_model).double(), examples([9, 7, 12, 5])
    packed = pack(given, 30)
    tokens, targets, documents = (torch.from_numpy(x) for x in packed.batch)
    logp = log_probabilities(made(tokens, documents).logits, targets).detach()
    for number, (own, answer) in enumerate(given):
        row = torch.from_numpy(own.astype(np.int64))
        logits = made(row[None]).logits[0].log_softmax(-1).detach()
        alone = sum(float(logits[i, own[i + 1]]) for i in range(len(own) - 1) if answer[i + 1])
        mine = float(logp[torch.from_numpy(packed.owner_BS == number)].sum())
        assert mine == pytest.approx(alone, abs=1e-9)
