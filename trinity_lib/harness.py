"""A checkpoint as a model of EleutherAI's lm_eval, with the scores its `hf` model gives."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from torch import Tensor
from tqdm import tqdm

from trinity_lib import hub, tokenizer
from trinity_lib.config import BadValue, require
from trinity_lib.data import IGNORE
from trinity_lib.generate import stream

Request = tuple[Any, list[int], list[int]]
"""(what it is remembered by, context tokens, continuation tokens)."""


class TrinityLM(TemplateLM):
    """`--model trinity --model_args path=FOLDER`: any AFMoE checkpoint with a tokenizer."""

    def __init__(
        self,
        path: str,
        batch_size: int | str | None = 8,
        device: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        size = str(batch_size or 8)
        right = "a whole number (auto is not offered)"
        require(size.isdigit() and int(size) >= 1, "batch_size", batch_size, right)
        kind = None if dtype is None else getattr(torch, dtype, None)
        known = dtype is None or isinstance(kind, torch.dtype)
        require(known, "dtype", dtype, "a torch dtype, such as float32 or bfloat16")
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            if device is not None:  # lm_eval's own default is cuda:0
                logging.getLogger(__name__).warning("there is no %s here: cpu", device)
            device = "cpu"
        self.batch = int(size)
        folder = hub.local(path)
        self.model = hub.load(folder, device=device, dtype=kind)
        self.vocabulary = tokenizer.load(folder)
        self.vocabulary.tokenizer.encode_special_tokens = False  # as the hf model reads prompts
        marks = self.vocabulary.ids
        self.eot, self.bos = marks["eos_token_id"], marks["bos_token_id"]
        if self.eot is None:
            raise BadValue(
                f"{path}: the tokenizer has no end mark; name one as eos_token in "
                f"{tokenizer.SETTINGS}."
            )
        self.max_length = int(max_length or self.model.config.max_positions)

    @property
    def eot_token_id(self) -> int:
        """The end mark."""
        assert self.eot is not None
        return self.eot

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the begin mark, or the end mark."""
        return self.eot_token_id if self.bos is None else self.bos

    @property
    def tokenizer_name(self) -> str:
        """A name for lm_eval's request cache."""
        return self.vocabulary.sha256

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens, with the tokenizer's own marks unless they are there or not wanted."""
        if add_special_tokens is None:
            begin = self.tok_decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not has_bos_prefix(string, begin)
        encoded = self.vocabulary.tokenizer.encode(
            string, add_special_tokens=add_special_tokens
        )
        return encoded.ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        return self.vocabulary.tokenizer.decode(
            list(tokens), skip_special_tokens=skip_special_tokens
        )

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of every continuation; the longest go first."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(
            range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2])
        )
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Scoring")
        for start in range(0, len(order), self.batch):
            numbers = order[start : start + self.batch]
            rows = [self._row(requests[i]) for i in numbers]
            logits_BSV = self._logits(rows)
            for i, row, logits_SV in zip(numbers, rows, logits_BSV, strict=True):
                request, _, continuation = requests[i]
                share_NV = logits_SV[len(row) - len(continuation) : len(row)].log_softmax(-1)
                wanted_N = torch.tensor(continuation, device=share_NV.device)
                chosen_N = share_NV.gather(1, wanted_N.unsqueeze(1))
                greedy = bool((share_NV.argmax(-1) == wanted_N).all())
                found[i] = (float(chosen_N.sum()), greedy)
                if request is not None:
                    self.cache_hook.add_partial("loglikelihood", request, found[i])
                bar.update(1)
        bar.close()
        return [found[i] for i in range(len(requests))]

    def _row(self, request: Request) -> list[int]:
        """Input tokens: all but the last, cut from the left to the longest that fits."""
        _, context, continuation = request
        longest = len(continuation) <= self.max_length
        require(longest, "max_length", self.max_length, f"at least {len(continuation)}")
        return (context + continuation)[-(self.max_length + 1) :][:-1]

    def _logits(self, rows: list[list[int]]) -> Tensor:
        """Logits of rows padded on the right, [B, S, V], fp32 or better."""
        longest = max(map(len, rows))
        device = self.model.embedding.weight.device
        tokens_BS = torch.zeros(len(rows), longest, dtype=torch.int64, device=device)
        documents_BS = torch.full_like(tokens_BS, IGNORE)
        for i, row in enumerate(rows):
            tokens_BS[i, : len(row)] = torch.tensor(row, device=device)
            documents_BS[i, : len(row)] = 0
        logits_BSV = self.model(tokens_BS, documents_BS).logits
        return logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of whole texts, in windows of the longest context."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pieces = [(None, *utils.make_disjoint_window(window)) for window in windows]
            scored = self._loglikelihood_tokens(pieces, disable_tqdm=True)
            totals.append(sum(value for value, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop sequence, the end mark or max_gen_toks tokens."""
        texts = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Generating"):
            context, options = request.args
            text = self._generate(context, normalize_gen_kwargs(options, 256))
            texts.append(text)
            self.cache_hook.add_partial("generate_until", (context, options), text)
        return texts

    def _generate(self, context: str, options: Any) -> str:
        end = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(options.get("until"), eos=end)
        room = self.max_length - options["max_gen_toks"]
        require(room > 0, "max_gen_toks", options["max_gen_toks"], f"below {self.max_length}")
        prompt = torch.tensor([self.tok_encode(context)[-room:]])
        sampled = bool(options.get("do_sample"))
        drawn: list[int] = []
        for token_B in stream(
            self.model,
            prompt.to(self.model.embedding.weight.device),
            max_new_tokens=options["max_gen_toks"],
            temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(options.get("top_k", 0)) if sampled else 0,
            top_p=float(options.get("top_p", 1.0)) if sampled else 1.0,
            stop=[self.eot_token_id],
            generator=torch.Generator(self.model.embedding.weight.device).manual_seed(0),
        ):
            drawn.append(int(token_B))
            if any(stop in self.tok_decode(drawn) for stop in until if stop):
                break
        return postprocess_generated_text(self.tok_decode(drawn), until, None)
