"""How stages of one model route the same tokens: loads, what experts are for, what moved."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr

from trinity_lib import loads, specialisation, stage_schema
from trinity_lib.config import BadValue, require
from trinity_lib.data import Batch
from trinity_lib.model import Trinity

ROWS_AT_ONCE = 8
NULLS = 20
"""Permutations behind the null of an information."""


class Look(NamedTuple):
    """How a model routes P tokens of given rows; padding is left out."""

    layers: tuple[int, ...]
    """The model's layers that have experts."""
    scores_LPE: np.ndarray
    """Scores before the bias, fp32."""
    experts_LPK: np.ndarray
    """The experts of each token."""


@torch.no_grad()
def look(model: Trinity, rows: Batch) -> Look:
    """Route rows by the biases stored in a model.

    Raises BadValue where the model has no experts, the rows no tokens, or a token is none
    of the model's.
    """
    layers = tuple(model.config.moe_layers)
    require(
        len(layers) > 0, "num_dense_layers", model.config.num_dense_layers, "fewer: experts"
    )
    valid_BS = rows.documents_BS >= 0
    require(bool(valid_BS.any()), "rows", rows.tokens_BS.shape, "of tokens, not all padding")
    highest, size = int(rows.tokens_BS[valid_BS].max()), model.config.vocab_size
    require(highest < size, "a token of the rows", highest, f"below vocab_size ({size})")
    device = model.embedding.weight.device
    scores, experts = [], []
    for start in range(0, len(valid_BS), ROWS_AT_ONCE):
        parts = (part[start : start + ROWS_AT_ONCE] for part in rows)
        tokens_BS, _, documents_BS = (torch.from_numpy(part).to(device) for part in parts)
        valid_T = documents_BS.flatten() >= 0
        routing = model(tokens_BS, documents_BS).routing
        scores.append(
            torch.stack([r.scores_TE[valid_T].float() for r in routing]).cpu().numpy()
        )
        experts.append(torch.stack([r.experts_TK[valid_T] for r in routing]).cpu().numpy())
    return Look(layers, np.concatenate(scores, 1), np.concatenate(experts, 1))


def routing(
    models: Mapping[str, Trinity],
    rows: Batch,
    changes: Sequence[tuple[str, str]],
    *,
    labels: Sequence[int] | np.ndarray | None = None,
    nulls: int = NULLS,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[xr.Dataset, xr.Dataset]:
    """The groups stage_routing and routing_change of models, by stage, on the same rows.

    `labels` is a number a row, such as its domain. See `described`, which takes models that
    were looked at one after another.
    """
    looks = {}
    for stage, model in models.items():
        if progress is not None:
            progress(f"routing: {stage}")
        looks[stage] = look(model, rows)
    return described(looks, rows, changes, labels=labels, nulls=nulls, seed=seed)


def described(
    looks: Mapping[str, Look],
    rows: Batch,
    changes: Sequence[tuple[str, str]],
    *,
    labels: Sequence[int] | np.ndarray | None = None,
    nulls: int = NULLS,
    seed: int = 0,
) -> tuple[xr.Dataset, xr.Dataset]:
    """The groups stage_routing and routing_change of looks at the same rows, by stage.

    Informations are those of `specialisation`, less their means over `nulls` permutations:
    of token ids over tokens, and of labels over rows, because tokens of one row go together.
    With few rows some permutations are the labels themselves, and the difference is too
    small. Raises BadValue where layers, tokens or experts of the stages differ.
    """
    names = stage_schema.change_names(changes, list(looks))
    first = _require_alike(looks)
    experts = first.scores_LPE.shape[-1]
    layer = list(first.layers)
    held = {"stage": list(looks), "layer": layer, "expert": np.arange(experts)}
    counts = {stage: _counts(each) for stage, each in looks.items()}
    count_GLE = np.stack(list(counts.values()))
    token_P, row_P = _tokens(rows, first)
    values = {
        "load": count_GLE / count_GLE.mean(-1, keepdims=True),
        "effective": loads.effective_experts(count_GLE),
        "token_information": _informations(
            looks, token_P, np.arange(len(token_P)), nulls, seed
        ),
        "label_information": np.full(count_GLE.shape[:2], np.nan),
    }
    if labels is not None:
        given = np.asarray(labels)
        right = f"one a row ({len(rows.tokens_BS)})"
        require(given.shape == (len(rows.tokens_BS),), "labels' shape", given.shape, right)
        values["label_information"] = _informations(looks, given, row_P, nulls, seed)
    pairs = [(before, after) for before, after in changes]
    moved = {
        "saturation": [_saturation(looks[a], looks[b]) for a, b in pairs],
        "chance": [[looks[a].experts_LPK.shape[-1] / experts] * len(layer) for a, _ in pairs],
        "divergence": [_score_divergence(looks[a], looks[b]) for a, b in pairs],
        "load_divergence": [load_divergence(counts[a], counts[b]) for a, b in pairs],
    }
    return (
        stage_schema.dataset("stage_routing", values, held),
        stage_schema.dataset("routing_change", moved, {"change": names, "layer": layer}),
    )


def divergence(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """KL(before || after) in nats over the last axis, of scores over their sums.

    Scores are zero or more; those that underflow count as the smallest normal fp32.
    """
    tiny = float(np.finfo(np.float32).tiny)
    p, q = (np.maximum(np.asarray(each, dtype=float), tiny) for each in (before, after))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


def load_divergence(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """KL(before || after) in nats of loads, counts over the last axis.

    Half a choice is added to each count (Krichevsky and Trofimov 1981): an expert that is
    never chosen after, and was before, would make it infinite.
    """
    return divergence(np.asarray(before) + 0.5, np.asarray(after) + 0.5)


def _require_alike(looks: Mapping[str, Look]) -> Look:
    stages = list(looks)
    first = looks[stages[0]]
    for stage in stages[1:]:
        one, two = ((each.layers, each.scores_LPE.shape) for each in (first, looks[stage]))
        if one != two:
            raise BadValue(
                f"{stages[0]} has layers, tokens and experts {one} and {stage} {two}; stages "
                "that are compared must have the same."
            )
    return first


def _tokens(rows: Batch, seen: Look) -> tuple[np.ndarray, np.ndarray]:
    """Id and row of every token that is no padding."""
    valid_BS = rows.documents_BS >= 0
    tokens, looked = int(valid_BS.sum()), seen.scores_LPE.shape[1]
    require(tokens == looked, "tokens of the rows", tokens, f"those looked at ({looked})")
    return rows.tokens_BS[valid_BS], np.nonzero(valid_BS)[0]


def _counts(seen: Look) -> np.ndarray:
    """Tokens per expert, [L, E]."""
    experts = seen.scores_LPE.shape[-1]
    return np.stack([np.bincount(each.ravel(), minlength=experts) for each in seen.experts_LPK])


def _informations(
    looks: Mapping[str, Look], labels: np.ndarray, owner_P: np.ndarray, nulls: int, seed: int
) -> np.ndarray:
    """Bits above the null, [stage, layer]; token p has the label of its owner.

    Every stage and layer is held against the same permutations, so that they compare.
    """

    def bits(experts_PK: np.ndarray, given: np.ndarray) -> float:
        return specialisation.information(experts_PK, given[owner_P]).bits

    def beyond(experts_PK: np.ndarray) -> float:
        generator = np.random.default_rng(seed)
        null = specialisation.null(bits, experts_PK, labels, nulls, generator)
        return null.value - null.mean

    return np.array([[beyond(each) for each in seen.experts_LPK] for seen in looks.values()])


def _saturation(before: Look, after: Look) -> list[float]:
    """Router saturation of OLMoE (arXiv 2409.02060, section 5.1), of every layer."""
    pairs = zip(before.experts_LPK, after.experts_LPK, strict=True)
    return [specialisation.saturation(a, b) for a, b in pairs]


def _score_divergence(before: Look, after: Look) -> list[float]:
    pairs = zip(before.scores_LPE, after.scores_LPE, strict=True)
    return [float(divergence(a, b).mean()) for a, b in pairs]
