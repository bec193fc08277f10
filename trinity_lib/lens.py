"""The logit lens over stages: what each block's hidden state would answer, were it the last.

The final norm and the head read the residual stream after every block (nostalgebraist 2020,
"interpreting GPT: the logit lens"). Early blocks need not speak the head's language: a late
answer may have been there in another basis, which a probe can tell and the lens cannot.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from trinity_lib import hidden, intervals, onednn, stage_schema
from trinity_lib.config import require
from trinity_lib.data import IGNORE, Batch
from trinity_lib.hidden import Place
from trinity_lib.model import Trinity
from trinity_lib.tokenizer import Vocabulary

LOGITS = 2**23
"""Logits of a block that are held at once."""
ROWS_AT_ONCE = 8


class Target(NamedTuple):
    """A token that is known to come, and the place it follows."""

    place: Place
    token: int
    cluster: str
    """What an interval counts as one: the person, the row."""


class Lens(NamedTuple):
    """What every block says of every target."""

    divergence: np.ndarray
    """KL of the final distribution from the block's, nat, [block, target]."""
    rank: np.ndarray
    """Place of the target among all tokens, 1 the first, [block, target]; ties share."""
    clusters: tuple[str, ...]
    """Of each target."""

    @property
    def first(self) -> np.ndarray:
        """Whether the target is first, before every other token, [block, target]."""
        return self.rank == 1

    @property
    def depth(self) -> np.ndarray:
        """Block from which on the target is first, [target]; NaN where it does not end so."""
        others = ~self.first[::-1]
        since = np.where(others.any(0), others.argmax(0), len(others))
        return np.where(since > 0, len(others) - since, np.nan)


def targets(
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    answers: Sequence[str],
    clusters: Sequence[str],
) -> list[Target]:
    """Known answers, each with its leading blank; BadValue where one is not a single token."""
    found = []
    wholes = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    places = zip(hidden.last(vocabulary, prompts), hidden.last(vocabulary, wholes), strict=True)
    for (read, whole), answer, cluster in zip(places, answers, clusters, strict=True):
        single = np.array_equal(read.tokens, whole.tokens[:-1])
        require(single, "answer", answer, "a single token after its prompt")
        found.append(Target(read, int(whole.tokens[-1]), cluster))
    return found


@torch.no_grad()
def of_targets(model: Trinity, wanted: Sequence[Target]) -> Lens:
    """The lens at the last token of prompts whose answers are known."""
    states_LND = hidden.read(model, [each.place for each in wanted])
    tokens_N = torch.tensor([each.token for each in wanted])
    divergence, rank = _look(model, states_LND, tokens_N)
    return Lens(divergence.numpy(), rank.numpy(), tuple(each.cluster for each in wanted))


@torch.no_grad()
def of_rows(model: Trinity, batch: Batch) -> Lens:
    """The lens at every position of packed rows that has a target; a row is a cluster."""
    device = model.embedding.weight.device
    divergence, rank, clusters = [], [], []
    for start in range(0, len(batch.tokens_BS), ROWS_AT_ONCE):
        parts = (torch.from_numpy(a[start : start + ROWS_AT_ONCE]) for a in batch)
        tokens_BS, targets_BS, documents_BS = (part.to(device) for part in parts)
        after = model(tokens_BS, documents_BS, hidden=True, last=True).hidden
        known_BS = targets_BS != IGNORE
        states_LND = torch.stack([state_BSD[known_BS] for state_BSD in after])
        found = _look(model, states_LND, targets_BS[known_BS])
        divergence.append(found[0])
        rank.append(found[1])
        clusters += [f"row {start + int(row)}" for row in known_BS.nonzero()[:, 0]]
    require(len(clusters) > 0, "batch", "rows without a target", "rows with targets")
    joined = [torch.cat(each, 1).numpy() for each in (divergence, rank)]
    return Lens(joined[0], joined[1], tuple(clusters))


@torch.no_grad()
def shares(model: Trinity, places: Sequence[Place], tokens: Sequence[int]) -> np.ndarray:
    """What every block would say of some tokens at places: nats, [block, place, token].

    Normalised over those tokens.
    """
    states_LND = hidden.read(model, places)
    wanted = torch.tensor(tokens)
    nats_LNW = torch.stack([_said(model, state).cpu()[:, wanted] for state in states_LND])
    return nats_LNW.log_softmax(-1).numpy()


def _look(model: Trinity, states_LND: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """Divergence and rank, both [block, N] float64; few logits at a time."""
    weight = model.embedding.weight
    at_once = max(1, LOGITS // len(weight))
    divergence, rank = [], []
    pieces = zip(states_LND.split(at_once, 1), tokens_N.split(at_once), strict=True)
    for piece_LND, some_N in pieces:
        final_NV = _said(model, piece_LND[-1])
        rows = [
            _compared(final_NV, _said(model, state_ND), some_N.to(weight.device))
            for state_ND in piece_LND
        ]
        divergence.append(torch.stack([row[0] for row in rows]))
        rank.append(torch.stack([row[1] for row in rows]))
    return torch.cat(divergence, 1), torch.cat(rank, 1)


def _said(model: Trinity, state_ND: Tensor) -> Tensor:
    """Log-probabilities [N, V] of a hidden state, float64."""
    weight = model.embedding.weight
    normed_ND = model.norm(state_ND.to(weight))
    head = onednn.linear(normed_ND, weight) if model.head is None else model.head(normed_ND)
    return head.double().log_softmax(-1)


def _compared(final_NV: Tensor, lens_NV: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the final distribution from the lens's, and the target's place in the lens's."""
    divergence_N = (final_NV.exp() * (final_NV - lens_NV)).sum(-1).clamp(min=0)
    own_N1 = lens_NV.gather(-1, tokens_N.unsqueeze(-1))
    before_N, same_N = (lens_NV > own_N1).sum(-1), (lens_NV == own_N1).sum(-1)
    rank_N = before_N + (same_N + 1) / 2  # of those that say the same, the middle place
    return divergence_N.cpu(), rank_N.double().cpu()


def dataset(stages: Mapping[str, Lens]) -> xr.Dataset:
    """The group `lens`: stages that looked at the same targets, side by side.

    A stage's `depth` is over its own right answers, so stages differ in what they average;
    `shared_depth` is over targets that all of them end with, and can be compared.
    """
    require(len(stages) > 0, "stages", 0, "at least one")
    kinds = {(lens.rank.shape, lens.clusters) for lens in stages.values()}
    require(len(kinds) == 1, "stages", list(stages), "of the same blocks and targets")
    every = list(stages.values())
    everywhere = np.all([lens.first[-1] for lens in every], axis=0)
    own = [_mean_depth(lens, lens.first[-1]) for lens in every]
    shared = [_mean_depth(lens, everywhere) for lens in every]
    values = {
        "divergence": [lens.divergence.mean(1) for lens in every],
        "right": [lens.first.mean(1) for lens in every],
        "rank": [np.median(lens.rank, axis=1) for lens in every],
        "depth": [found.estimate for found in own],
        "low": [found.low for found in own],
        "high": [found.high for found in own],
        "shared_depth": [found.estimate for found in shared],
        "units": [found.units for found in own],
        "shared_units": [found.units for found in shared],
    }
    blocks = np.arange(len(every[0].rank))
    return stage_schema.dataset("lens", values, {"stage": list(stages), "block": blocks})


def _mean_depth(lens: Lens, known: np.ndarray) -> intervals.Interval:
    """Of some targets that end as the first; without a value where there are none."""
    if not known.any():
        return intervals.Interval(np.nan, -np.inf, np.inf, 0)
    clusters = [name for name, here in zip(lens.clusters, known, strict=True) if here]
    return intervals.mean(lens.depth[known], clusters)
