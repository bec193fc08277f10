"""The same held-out tokens looked at again and again: how routing moves, and what moves it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from trinity_lib import dynamics
from trinity_lib.data import Batch
from trinity_lib.evaluate import Domain, Fixed
from trinity_lib.model import Trinity


class Probe(NamedTuple):
    """Held-out rows, and what is known of each of their tokens (padding left out)."""

    batch: Batch
    """The rows."""
    valid_T: np.ndarray
    """Which of their positions are tokens."""
    domain_P: np.ndarray
    """Number of each token's domain."""

    @property
    def table(self) -> dict[str, np.ndarray]:
        """The values of /probe_tokens."""
        tokens, targets, _ = (part.ravel()[self.valid_T] for part in self.batch)
        return {"token": tokens, "next": targets, "domain_number": self.domain_P}


class Look(NamedTuple):
    """How a model routes the probe."""

    scores_LPE: np.ndarray
    """Scores before the bias, fp32."""
    bias_LE: np.ndarray
    """Selection biases."""
    experts_LPK: np.ndarray
    """The experts of each token."""


def choose(held_out: Mapping[str, Domain], tokens: int) -> Probe:
    """About `tokens` tokens, an equal share of every domain's first rows, one row at least."""
    share = tokens // len(held_out)
    parts = []
    for each in held_out.values():
        rows = max(1, share // each.batch.tokens_BS.shape[1])
        parts.append(Batch(*(part[:rows] for part in each.batch)))
    batch = Batch(*(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))
    valid_T = batch.documents_BS.ravel() >= 0
    domain_P = np.repeat(np.arange(len(parts)), [part.tokens_BS.size for part in parts])
    return Probe(batch, valid_T, domain_P[valid_T])


@torch.no_grad()
def look(model: Trinity, probe: Probe, fixed: Fixed) -> Look:
    """Route the probe by the biases stored in the model, or to `fixed` choices."""
    device = model.embedding.weight.device
    tokens_BS, _, documents_BS = (torch.from_numpy(part).to(device) for part in probe.batch)
    held_LTK = fixed(tokens_BS)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        replay = None if held_LTK is None else held_LTK.unbind()
        output = model(tokens_BS, documents_BS, replay=replay)
    valid_T = torch.from_numpy(probe.valid_T).to(device)
    scores = torch.stack([r.scores_TE[valid_T].float() for r in output.routing])
    experts = torch.stack([r.experts_TK[valid_T] for r in output.routing])
    bias = torch.stack([router.bias_E.float() for router in model.routers()])
    return Look(scores.cpu().numpy(), bias.cpu().numpy(), experts.cpu().numpy())


def values(now: Look, before: Look | None) -> dict[str, Any]:
    """The values of one step of /probe; churn is NaN where there was no look before."""
    top_k = now.experts_LPK.shape[-1]
    nothing = np.full(len(now.bias_LE), np.nan)
    churn = (nothing, nothing, nothing)
    if before is not None:
        churn = dynamics.churn(
            before.scores_LPE, before.bias_LE, now.scores_LPE, now.bias_LE, top_k
        )[:3]
    return {
        "router_entropy": dynamics.router_entropy(now.scores_LPE),
        "mutual_information": dynamics.mutual_information(now.scores_LPE),
        "override": dynamics.override_fraction(now.scores_LPE, now.bias_LE, top_k),
        "score_price": dynamics.score_price(now.scores_LPE, now.bias_LE, top_k),
        "churn": churn[0],
        "churn_by_weights": churn[1],
        "churn_by_bias": churn[2],
        "expert": now.experts_LPK,
    }
