"""Hidden states of a model at chosen places of texts: what lenses and probes read."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity_lib.config import require
from trinity_lib.model import Trinity
from trinity_lib.tokenizer import Vocabulary

BATCH_TOKENS = 8192
"""Tokens of a forward pass, padding included, about at most."""


class Place(NamedTuple):
    """A place in a text."""

    tokens: np.ndarray
    """The text's tokens behind the begin mark, without an end mark; int64."""
    position: int
    """Which of them."""


def last(vocabulary: Vocabulary, texts: Sequence[str]) -> list[Place]:
    """The last token of each text."""
    found = []
    for text in texts:
        tokens, _ = _encode(vocabulary, text)
        require(len(tokens) > 0, "text", text, "of at least one token")
        found.append(Place(tokens, len(tokens) - 1))
    return found


def ending(vocabulary: Vocabulary, texts: Sequence[str], begun: Sequence[str]) -> list[Place]:
    """The token in which a beginning of each text ends; BadValue where it is none."""
    found = []
    for text, begin in zip(texts, begun, strict=True):
        right = f"the beginning of {text!r}"
        require(bool(begin) and text.startswith(begin), "begun", begin, right)
        tokens, owners = _encode(vocabulary, text)
        found.append(Place(tokens, owners[len(begin) - 1]))
    return found


@torch.no_grad()
def read(
    model: Trinity, places: Sequence[Place], *, batch_tokens: int = BATCH_TOKENS
) -> Tensor:
    """Residual stream at each place, [block, N, D], fp32 or better on the CPU.

    Block 0 is the embedding, block i what layer i (from 1) leaves. Rows are padded on the
    right, which nothing before it sees.
    """
    require(len(places) > 0, "places", 0, "at least one")
    device = model.embedding.weight.device
    order = sorted(range(len(places)), key=lambda n: len(places[n].tokens))
    found: dict[int, Tensor] = {}
    while order:
        rows = max(1, batch_tokens // len(places[order[-1]].tokens))
        here, order = order[-rows:], order[:-rows]
        longest = len(places[here[-1]].tokens)
        tokens_BS = torch.zeros(len(here), longest, dtype=torch.int64)
        for row, n in enumerate(here):
            tokens = places[n].tokens
            tokens_BS[row, : len(tokens)] = torch.from_numpy(tokens)
        at_B = torch.tensor([places[n].position for n in here], device=device)
        row_B = torch.arange(len(here), device=device)
        states = model(tokens_BS.to(device), hidden=True, last=True).hidden
        chosen = torch.stack([state_BSD[row_B, at_B] for state_BSD in states], 1)
        precise = torch.promote_types(chosen.dtype, torch.float32)
        found |= zip(here, chosen.to("cpu", precise), strict=True)
    return torch.stack([found[n] for n in range(len(places))], 1)


def _encode(vocabulary: Vocabulary, text: str) -> tuple[np.ndarray, dict[int, int]]:
    """Tokens as in training, and the position of the token that each character ends up in."""
    encoding = vocabulary.tokenizer.encode(text, add_special_tokens=False)
    begin = vocabulary.ids["bos_token_id"]
    marks = [] if begin is None else [begin]
    owners: dict[int, int] = {}
    for number, (start, stop) in enumerate(encoding.offsets):
        owners |= dict.fromkeys(range(start, stop), number + len(marks))
    return np.array([*marks, *encoding.ids], dtype=np.int64), owners
