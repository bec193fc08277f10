"""Loss per domain on held-out rows, beside what the same text costs without a model."""

import gzip
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity_lib.balance import load
from trinity_lib.config import BadValue
from trinity_lib.data import IGNORE, Batch, target_text
from trinity_lib.loads import load_entropy
from trinity_lib.losses import token_loss
from trinity_lib.model import Trinity
from trinity_lib.tokenizer import Vocabulary

ROWS_AT_ONCE = 8


class Domain(NamedTuple):
    """Held-out rows of one domain and their model-free costs."""

    batch: Batch
    """The rows."""
    bytes: int
    """UTF-8 bytes of the text that the targets spell."""
    gzip_bits_per_byte: float
    """gzip -9 on those bytes."""
    unigram_entropy: float
    """Entropy of the targets' own frequencies, nats: no unigram model does better."""


def domain(name: str, batch: Batch, vocabulary: Vocabulary) -> Domain:
    """Measure a domain's rows once; BadValue where the tokenizer makes nothing of them."""
    text = target_text(batch, vocabulary)
    if not text:
        raise BadValue(
            f"the tokenizer spells nothing of the validation text of {name!r}; it must be one "
            "that covers this text."
        )
    counts = np.bincount(batch.targets_BS[batch.targets_BS != IGNORE])
    packed = 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)
    return Domain(batch, len(text), packed, float(load_entropy(counts)))


Fixed = Callable[[Tensor], Tensor | None]
"""tokens_BS -> experts_LTK where token ids alone decide them, else None: a balancer's."""


@torch.no_grad()
def domains(
    model: Trinity, held_out: Mapping[str, Domain], fixed: Fixed = lambda _: None
) -> dict[str, Any]:
    """The values of one step of /evaluation: arrays [split=1, domain] and expert counts.

    Experts are chosen by the biases stored in the model, or they are `fixed`.
    """
    results = [_domain(model, each, fixed) for each in held_out.values()]
    return {name: np.stack([r[name] for r in results])[None] for name in results[0]}


def _domain(model: Trinity, held_out: Domain, fixed: Fixed) -> dict[str, Any]:
    device = model.embedding.weight.device
    nats, tokens, counts = 0.0, 0, np.zeros((), dtype=np.int64)
    for start in range(0, len(held_out.batch.tokens_BS), ROWS_AT_ONCE):
        parts = (a[start : start + ROWS_AT_ONCE] for a in held_out.batch)
        tokens_BS, targets_BS, documents_BS = (torch.from_numpy(a).to(device) for a in parts)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            held_LTK = fixed(tokens_BS)
            replay = None if held_LTK is None else held_LTK.unbind()
            output = model(tokens_BS, documents_BS, replay=replay)
        loss = token_loss(output.logits, targets_BS)
        nats += float(loss.cross_entropy)
        tokens += int(loss.tokens)
        counts = counts + load(output.routing, documents_BS.flatten() >= 0).cpu().numpy()
    return {
        "loss": nats / tokens,
        "bits_per_byte": nats / np.log(2) / held_out.bytes,
        "gzip_bits_per_byte": held_out.gzip_bits_per_byte,
        "unigram_entropy": held_out.unigram_entropy,
        "tokens": tokens,
        "bytes": held_out.bytes,
        "count": counts,
    }
