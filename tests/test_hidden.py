"""Hidden states are read where they are asked for, whatever stands beside them."""

import pytest
import torch

from tests import conversing
from trinity_lib import hidden
from trinity_lib.config import BadValue
from trinity_lib.model import ModelConfig

TEXTS = ["Tom lives in Paris", "a", "Anna Bell works as a baker, and sings", "12 plus 30 is"]


@pytest.mark.parametrize("batch_tokens", [1, 20, 8192])
def test_every_state_is_the_models_own(tiny_model: ModelConfig, batch_tokens: int) -> None:
    model, vocabulary = conversing.model(tiny_model), conversing.vocabulary()
    places = hidden.last(vocabulary, TEXTS)
    places += hidden.ending(vocabulary, TEXTS, ["Tom", "a", "Anna Bell", "12"])
    found = hidden.read(model, places, batch_tokens=batch_tokens)
    assert found.shape == (tiny_model.num_layers + 1, 8, tiny_model.width)
    for n, (tokens, position) in enumerate(places):
        states = model(torch.from_numpy(tokens)[None], hidden=True).hidden
        alone = torch.stack([state[0, position] for state in states])
        torch.testing.assert_close(found[:, n], alone)


def test_places_are_the_tokens_they_are_named_after() -> None:
    vocabulary = conversing.vocabulary()
    begin = vocabulary.ids["bos_token_id"]
    for text, (tokens, position) in zip(TEXTS, hidden.last(vocabulary, TEXTS), strict=True):
        assert tokens[0] == begin and position == len(tokens) - 1
        assert vocabulary.decode([tokens.tolist()]) == [text]
    (place,) = hidden.ending(vocabulary, TEXTS[2:3], ["Anna Bell"])
    assert vocabulary.decode([place.tokens[: place.position + 1].tolist()]) == ["Anna Bell"]


@pytest.mark.parametrize("begun", ["Anna", "", "Tom lives in Paris!"])
def test_no_beginning_is_refused(begun: str) -> None:
    with pytest.raises(BadValue, match="must be the beginning of 'Tom lives in Paris'"):
        hidden.ending(conversing.vocabulary(), TEXTS[:1], [begun])


def test_nothing_to_read_is_refused(tiny_model: ModelConfig) -> None:
    with pytest.raises(BadValue, match="places is 0"):
        hidden.read(conversing.model(tiny_model), [])
