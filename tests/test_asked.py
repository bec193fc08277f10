"""A trained model is asked as it was trained, whatever is asked beside it."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity_lib import corpus, hub, planted, tokenizer
from trinity_lib.asked import Asked, AskedTransformers
from trinity_lib.config import BadValue, override
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.planted import WorldConfig
from trinity_lib.tokenizer import Vocabulary

os.environ["HF_HUB_OFFLINE"] = "1"
WORLD = WorldConfig(names=3, held_out_names=2, people=9, places=7, patterns=60, sums=30)
PROMPTS = ["Note: Fize works as a", "12 + 7 =", "Pairs: bik sun dof moon bik", "The"]
ANSWERS = [[" mason", " baker of bread", " x"], [" 19", " 5"], [" sun"], [" code of the vault"]]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    made = corpus.planted(WORLD)
    return tokenizer.train(made.sample(1_000_000), 640, made.words)


@pytest.fixture(scope="module")
def model(tiny_model: ModelConfig, vocabulary: Vocabulary) -> Trinity:
    model = Trinity(override(tiny_model, {"vocab_size": vocabulary.size}))
    model.initialise(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)  # else it says next to nothing
    return model


@pytest.fixture(scope="module")
def peer(model: Trinity, vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder: Path = tmp_path_factory.mktemp("peer") / "model"
    hub.save(model, folder)
    read = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return AskedTransformers(read, vocabulary)


@torch.no_grad()
def plainly(model: Trinity, vocabulary: Vocabulary, prompt: str, answer: str) -> float:
    """One forward pass over one document."""
    start, tokens = (vocabulary.encode([t])[0][:-1] for t in (prompt, prompt + answer))
    assert tokens[: len(start)].tolist() == start.tolist()
    logits = model(torch.tensor(tokens[None].astype(np.int64))).logits[0].double()
    nats = logits.log_softmax(-1)
    return float(sum(nats[i - 1, tokens[i]] for i in range(len(start), len(tokens))))


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_answers_get_what_a_plain_loop_gives_them(
    model: Trinity, vocabulary: Vocabulary, batch_tokens: int
) -> None:
    found = Asked(model, vocabulary, batch_tokens=batch_tokens).score(PROMPTS, ANSWERS)
    assert [len(nats) for nats in found] == [len(mine) for mine in ANSWERS]
    for prompt, answers, nats in zip(PROMPTS, ANSWERS, found, strict=True):
        assert nats.dtype == np.float64
        expected = [plainly(model, vocabulary, prompt, answer) for answer in answers]
        assert nats == pytest.approx(expected, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(PROMPTS), st.lists(st.sampled_from([" sun", " a b c", " 7"]))
        ),
        max_size=6,
    ),
    st.integers(1, 60),
)
def test_what_is_asked_beside_it_changes_nothing(
    model: Trinity, vocabulary: Vocabulary, asked: list, batch_tokens: int
) -> None:
    subject = Asked(model, vocabulary, batch_tokens=batch_tokens)
    found = subject.score([prompt for prompt, _ in asked], [answers for _, answers in asked])
    for (prompt, answers), nats in zip(asked, found, strict=True):
        alone = subject.score([prompt], [answers])[0]
        assert nats == pytest.approx(alone, abs=1e-4)


def test_an_answer_is_all_tokens_beyond_those_of_the_prompt(
    model: Trinity, vocabulary: Vocabulary
) -> None:
    subject = Asked(model, vocabulary)
    whole, first, second = (
        subject.score([prompt], [[answer]])[0][0]
        for prompt, answer in (("The", " code of"), ("The", " code"), ("The code", " of"))
    )
    assert whole == pytest.approx(first + second, abs=1e-4)
    every = [" a", " code", " sun"]
    assert np.exp(subject.score(["The"], [every])[0]).sum() < 1
    with pytest.raises(BadValue, match="answers is 'empty'"):
        subject.score(["The"], [[""]])
    with pytest.raises(BadValue, match="answers is 2; it must be 1"):
        subject.score(["The"], [[" a"], [" b"]])
    with pytest.raises(BadValue, match="batch_tokens is 0"):
        Asked(model, vocabulary, batch_tokens=0)


def test_losses_are_of_every_token_after_the_first(
    model: Trinity, vocabulary: Vocabulary
) -> None:
    texts = ["The code of the vault is 12345678.\n", "Note:", "", "Pairs: bik sun dof moon"]
    found = Asked(model, vocabulary, batch_tokens=30).losses(texts)
    for text, nats in zip(texts, found, strict=True):
        tokens = vocabulary.encode([text])[0][1:-1]
        assert len(nats) == max(0, len(tokens) - 1)
        if len(tokens) > 1:
            first = vocabulary.decode([tokens[:1].tolist()])[0]
            expected = plainly(model, vocabulary, first, text[len(first) :])
            assert -nats.sum() == pytest.approx(expected, abs=1e-4)
    digits = found[0][-10:-2]
    assert len(digits) == 8 and found[0].min() > 0


@torch.no_grad()
def test_completions_are_greedy_and_end_where_the_document_does(
    model: Trinity, vocabulary: Vocabulary
) -> None:
    found = Asked(model, vocabulary, batch_tokens=20).complete(PROMPTS, 5)
    for prompt, text in zip(PROMPTS, found, strict=True):
        tokens = vocabulary.encode([prompt])[0][:-1].tolist()
        begun = len(tokens)
        for _ in range(5):
            nexts = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if nexts == vocabulary.ids["eos_token_id"]:
                break
            tokens.append(nexts)
        assert text == vocabulary.decode([tokens[begun:]])[0]
    assert Asked(model, vocabulary).complete(PROMPTS, 0) == [""] * 4
    assert Asked(model, vocabulary).complete([], 3) == []


def test_transformers_gives_the_same_numbers(
    model: Trinity, vocabulary: Vocabulary, peer: AskedTransformers
) -> None:
    ours = Asked(model, vocabulary)
    world = planted.world(WORLD)
    for family in planted.FAMILIES:
        asked = planted.questions(world, family)[::9]
        prompts, answers = [q.prompt for q in asked], [q.answers for q in asked]
        pairs = zip(ours.score(prompts, answers), peer.score(prompts, answers), strict=True)
        assert max(np.abs(a - b).max() for a, b in pairs) <= 1e-4
    texts = [code.text for code in world.codes[:9]]
    for a, b in zip(ours.losses(texts), peer.losses(texts), strict=True):
        assert np.abs(a - b).max() <= 1e-4
    assert ours.complete(PROMPTS, 6) == peer.complete(PROMPTS, 6)
    assert peer.complete(PROMPTS, 0) == [""] * 4


def test_a_tokenizer_without_marks_is_asked_too(model: Trinity, vocabulary: Vocabulary) -> None:
    bare = Vocabulary(vocabulary.tokenizer, None, None)
    subject = Asked(model, bare)
    (nats,) = subject.score(["The code"], [[" of", " sun"]])
    assert (nats < 0).all() and len(subject.losses(["The code of"])[0]) == 2
    assert len(subject.complete(["The code"], 3)[0]) > 0
    with pytest.raises(BadValue, match="it must be text"):
        subject.complete([""], 3)
    with pytest.raises(BadValue, match="prompts is ''; it must be text"):
        subject.score([""], [[" of"]])
    with pytest.raises(BadValue, match="answers is 'empty'"):
        subject.score(["The code"], [[" of", ""]])


def test_a_prompt_that_is_one_token_with_its_answer_is_named(model: Trinity) -> None:
    """Not where a begin mark stands before both."""
    merged = tokenizer.train(["sun " * 99], 300)
    assert len(merged.encode(["sun"])[0]) == 3  # both marks, and the word
    bare = Asked(model, Vocabulary(merged.tokenizer, None, None))
    with pytest.raises(BadValue, match="'su' and the answer 'n' are one token together") as one:
        bare.score(["su"], [["n"]])
    with pytest.raises(BadValue, match="'su' and the answer 'n x' begin with a token of both"):
        bare.score(["su"], [["n x"]])
    assert "\n" not in str(one.value)
    assert Asked(model, merged).score(["su"], [["n"]])[0][0] < 0
