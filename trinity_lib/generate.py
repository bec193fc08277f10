"""Cached decoding: prefill once, then one token at a time, greedy or sampled."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trinity_lib.config import require
from trinity_lib.model import Cache, Trinity

UNCHECKED: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}
"""Of inductor: hundreds of checks of shapes, which cannot change, took a twelfth of a step."""
ROOM = 256
"""Compiled decoding rounds a cache's positions up to a multiple, to be compiled less often."""


def generate(
    model: Trinity,
    tokens_BS: Tensor,
    *,
    max_new_tokens: int,
    stop: Sequence[int] = (),
    pad: int | None = None,
    **options: Any,
) -> Tensor:
    """The prompts and `max_new_tokens` more tokens each, int64 [B, S + new].

    Greedy unless told otherwise; `options` are those of `stream`. A row that has drawn a
    `stop` token goes on with `pad` (the first stop token where there is no pad).
    """
    drawn = stream(
        model, tokens_BS, max_new_tokens=max_new_tokens, stop=stop, pad=pad, **options
    )
    new = list(drawn)
    if not new:
        return tokens_BS
    new_BN = torch.stack(new, dim=1)
    missing = max_new_tokens - new_BN.shape[1]
    new_BN = torch.nn.functional.pad(new_BN, (0, missing), value=_filler(stop, pad))
    return torch.cat([tokens_BS, new_BN], dim=1)


def stream(
    model: Trinity,
    tokens_BS: Tensor,
    *,
    max_new_tokens: int,
    mask_BS: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[int] = (),
    pad: int | None = None,
    generator: torch.Generator | None = None,
    compiled: bool = False,
) -> Iterator[Tensor]:
    """New tokens of every row, int64 [B], one after another, until every row has stopped.

    Greedy at temperature 0. Otherwise logits are divided by it, then kept are the `top_k`
    largest (0: all), then the fewest whose probability reaches `top_p`, then those of at
    least `min_p` times the largest probability; tokens are drawn with `generator`.
    Prompts of unlike length are padded on the left, and `mask_BS` is 0 there. `compiled`
    compiles the whole step, in half a minute or more the first time a model meets a number
    of rows and a length (in steps of 256), and pays where many tokens follow. BadValue for
    an option out of its range.
    """
    _check(tokens_BS, max_new_tokens, mask_BS, temperature, top_k, top_p, min_p)
    return _stream(
        model, tokens_BS, max_new_tokens, mask_BS,
        (temperature, top_k, top_p, min_p), stop, pad, generator, compiled,
    )  # fmt: skip


@torch.no_grad()
def _stream(
    model: Trinity,
    tokens_BS: Tensor,
    max_new_tokens: int,
    mask_BS: Tensor | None,
    sampling: tuple[float, int, float, float],
    stop: Sequence[int],
    pad: int | None,
    generator: torch.Generator | None,
    compiled: bool,
) -> Iterator[Tensor]:
    room = max_new_tokens
    if compiled:
        room += -(tokens_BS.shape[1] + room) % ROOM
    logits_BV, cache = prefill(model, tokens_BS, mask_BS, room)
    step = compiled_decode() if compiled else decode
    stops = torch.tensor(list(stop), dtype=torch.int64, device=tokens_BS.device)
    ended_B = torch.zeros(len(tokens_BS), dtype=torch.bool, device=tokens_BS.device)
    for number in range(max_new_tokens):
        token_B = pick(logits_BV, *sampling, generator=generator)
        token_B = torch.where(ended_B, _filler(stop, pad), token_B)
        ended_B = ended_B | torch.isin(token_B, stops)
        yield token_B
        if number == max_new_tokens - 1 or bool(ended_B.all()):
            return
        logits_BV = step(model, token_B, cache)


def prefill(
    model: Trinity, tokens_BS: Tensor, mask_BS: Tensor | None, room: int
) -> tuple[Tensor, Cache]:
    """Logits after the prompts [B, V], and a cache with room for `room` more tokens."""
    B, S = tokens_BS.shape
    if mask_BS is None:
        mask_BS = torch.ones_like(tokens_BS)
    documents_BS = mask_BS.long() - 1  # 0 for tokens, -1 for padding
    cache = model.cache((mask_BS == 0).sum(1), S + room)
    output = model(tokens_BS, documents_BS, cache=cache, last=True)
    return output.logits[:, -1], cache


def decode(model: Trinity, token_B: Tensor, cache: Cache) -> Tensor:
    """Logits [B, V] after one more token, which joins the cache."""
    return model(token_B.unsqueeze(1), cache=cache, last=True).logits[:, -1]


def compiled_decode() -> Callable[[Trinity, Tensor, Cache], Tensor]:
    """`decode`, compiled; for one model and one cache from its first call to its last.

    Their properties are checked by the first call alone: for a small model the checks take
    a fifth of a step.
    """
    whole = torch.compile(decode, fullgraph=True, dynamic=False, options=UNCHECKED)
    checked = False

    def step(model: Trinity, token_B: Tensor, cache: Cache) -> Tensor:
        nonlocal checked
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=checked):
            checked = True
            return whole(model, token_B, cache)

    return step


def pick(
    logits_BV: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row, int64 [B]: the most likely, or drawn as `generate` describes."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    precise = torch.promote_types(logits_BV.dtype, torch.float32)
    logits_BV = logits_BV.to(precise) / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        share_BV = sorted_BV.softmax(-1)
        beyond_BV = share_BV.cumsum(-1) - share_BV >= top_p
        beyond_BV = torch.zeros_like(beyond_BV).scatter(-1, order_BV, beyond_BV)
        logits_BV = logits_BV.masked_fill(beyond_BV, -torch.inf)
    share_BV = logits_BV.softmax(-1)
    if min_p > 0:
        rare_BV = share_BV < min_p * share_BV.amax(-1, keepdim=True)
        share_BV = share_BV.masked_fill(rare_BV, 0.0)
    return torch.multinomial(share_BV, 1, generator=generator).squeeze(1)


def _filler(stop: Sequence[int], pad: int | None) -> int:
    if pad is not None:
        return pad
    return stop[0] if stop else 0


def _check(
    tokens_BS: Tensor,
    max_new_tokens: int,
    mask_BS: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    shape = list(tokens_BS.shape)
    require(
        len(shape) == 2 and 0 not in shape, "tokens_BS", shape, "of shape [B, S], not empty"
    )
    require(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "zero or more")
    require(temperature >= 0, "temperature", temperature, "zero (greedy) or more")
    require(top_k >= 0, "top_k", top_k, "zero (all) or more")
    require(0 < top_p <= 1, "top_p", top_p, "above 0, at most 1")
    require(0 <= min_p <= 1, "min_p", min_p, "from 0 to 1")
    if mask_BS is None:
        return
    require(
        mask_BS.shape == tokens_BS.shape, "mask_BS", list(mask_BS.shape), f"of shape {shape}"
    )
    left = bool((mask_BS.diff(dim=1) >= 0).all()) and bool((mask_BS[:, -1] == 1).all())
    require(left, "mask_BS", "padded elsewhere", "0 for padding on the left, then 1")
