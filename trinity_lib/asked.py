"""A trained model as the subject of an audit: ours, or one that transformers has read.

Texts are asked about as they were trained on: behind the tokenizer's begin mark, an answer as
the tokens that prompt and answer together have beyond the prompt's.
"""

import abc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from trinity_lib import onednn
from trinity_lib.config import BadValue, require
from trinity_lib.generate import generate
from trinity_lib.model import Trinity
from trinity_lib.tokenizer import Vocabulary

BATCH_TOKENS = 8192
"""Tokens of a forward pass, padding included, about at most."""
LOGITS = 2**24
"""Logits that are held in float64 at once."""


class Wanted(NamedTuple):
    """Tokens to be predicted after tokens that are read."""

    read: tuple[int, ...]
    """What the model is given."""
    next: tuple[int, ...]
    """The last of these follows all that is read, the others stand in it one place on."""


class _Asked(abc.ABC):
    """Prompts to tokens, tokens to batches; a subclass runs the model.

    Rows are padded on the right, which nothing before it sees.
    """

    def __init__(self, vocabulary: Vocabulary, batch_tokens: int, device: torch.device) -> None:
        require(batch_tokens >= 1, "batch_tokens", batch_tokens, "at least 1")
        self.vocabulary, self.batch_tokens, self.device = vocabulary, batch_tokens, device

    @abc.abstractmethod
    def _states(self, tokens_BS: Tensor) -> Tensor:
        """What the head is given, [B, S, D]."""

    @abc.abstractmethod
    def _head(self, states_ND: Tensor) -> Tensor:
        """Logits [N, V]."""

    @abc.abstractmethod
    def _greedy(self, tokens_BS: Tensor, count: int, stop: list[int]) -> Tensor:
        """The prompts and at most `count` more tokens each."""

    def score(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        """Log-probability, in nats, of each answer as the continuation of its prompt.

        An answer's tokens are those after what it shares with the prompt alone. A prompt is
        read once for all answers of one token.
        """
        right = f"{len(prompts)}, as prompts"
        require(len(answers) == len(prompts), "answers", len(answers), right)
        begun = self._encode(prompts)
        pairs = [
            (p, answer) for p, mine in zip(prompts, answers, strict=True) for answer in mine
        ]
        wanted = []
        for start, tokens, pair in zip(
            self._owners(begun, answers), self._joined(prompts, answers), pairs, strict=True
        ):
            shared = _shared(start, tokens)
            require(shared < len(tokens), "answers", "empty", "text beyond the prompt's")
            if shared == 0:
                raise BadValue(_merged(*pair, len(tokens)))
            wanted.append(Wanted(tuple(tokens[:-1]), tuple(tokens[shared:])))
        totals = iter([float(each.sum()) for each in self._predict(wanted)])
        return [np.array([next(totals) for _ in mine]) for mine in answers]

    def losses(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Nats of every token of each text after its first, given those before it.

        The begin mark is given and not counted, and no end mark follows.
        """
        begin = len(self._marks)
        wanted = [Wanted(tuple(t[:-1]), tuple(t[begin + 1 :])) for t in self._encode(texts)]
        return [-each for each in self._predict(wanted)]

    @torch.no_grad()
    def complete(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """The greedy continuation of each prompt, at most `tokens` tokens, to its end mark."""
        encoded = self._encode(prompts)
        by_length = defaultdict(list)
        for number, each in enumerate(encoded):
            require(len(each) > 0, "prompts", prompts[number], "text")
            by_length[len(each)].append(number)
        end = self.vocabulary.ids["eos_token_id"]
        found: dict[int, list[int]] = {}
        for length, numbers in by_length.items():
            rows = max(1, self.batch_tokens // (length + tokens))
            for i in range(0, len(numbers), rows):
                here = numbers[i : i + rows]
                tokens_BS = torch.tensor([encoded[n] for n in here], device=self.device)
                drawn = self._greedy(tokens_BS, tokens, [] if end is None else [end])
                for number, row in zip(here, drawn[:, length:].tolist(), strict=True):
                    found[number] = row[: row.index(end)] if end in row else row
        return self.vocabulary.decode([found[n] for n in range(len(encoded))])

    @property
    def _marks(self) -> list[int]:
        begin = self.vocabulary.ids["bos_token_id"]
        return [] if begin is None else [begin]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens as in training, without the end mark that encoding sets."""
        end = len(self.vocabulary.encode([""])[0]) - len(self._marks)
        return [each[: len(each) - end].tolist() for each in self.vocabulary.encode(texts)]

    def _joined(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        pairs = zip(prompts, answers, strict=True)
        return self._encode([prompt + answer for prompt, mine in pairs for answer in mine])

    @staticmethod
    def _owners(
        begun: Sequence[list[int]], answers: Sequence[Sequence[str]]
    ) -> Iterator[list[int]]:
        for start, mine in zip(begun, answers, strict=True):
            yield from [start] * len(mine)

    @torch.no_grad()
    def _predict(self, wanted: Sequence[Wanted]) -> list[np.ndarray]:
        """Log-probabilities of the wanted tokens, each text read once."""
        readers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, each in enumerate(wanted):
            if each.next:
                readers[each.read].append(number)
        found: list[np.ndarray] = [np.zeros(0)] * len(wanted)
        for reads in self._batches(sorted(readers, key=len)):
            numbers = [n for read in reads for n in readers[read]]
            rows = [row for row, read in enumerate(reads) for _ in readers[read]]
            nats = self._nats(reads, rows, [wanted[n] for n in numbers])
            for number, answer in zip(numbers, nats, strict=True):
                found[number] = answer
        return found

    def _batches(self, reads: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Texts in the order of their lengths, few enough at a time."""
        batch: list[tuple[int, ...]] = []
        for read in reads:
            if batch and (len(batch) + 1) * len(read) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(read)
        if batch:
            yield batch

    def _nats(
        self, reads: list[tuple[int, ...]], rows: list[int], wanted: list[Wanted]
    ) -> list[np.ndarray]:
        longest = len(reads[-1])
        padded = [[*read, *[0] * (longest - len(read))] for read in reads]
        states_BSD = self._states(torch.tensor(padded, device=self.device))
        places = [
            (row, len(each.read) - len(each.next) + i)
            for row, each in zip(rows, wanted, strict=True)
            for i in range(len(each.next))
        ]
        once = {place: n for n, place in enumerate(dict.fromkeys(places))}
        at_row, at_place = torch.tensor(list(once), device=self.device).T
        targets = torch.tensor([t for each in wanted for t in each.next], device=self.device)
        which = torch.tensor([once[place] for place in places], device=self.device)
        nats = self._log_probabilities(states_BSD[at_row, at_place], which, targets)
        return np.split(nats, np.cumsum([len(each.next) for each in wanted])[:-1])

    def _log_probabilities(
        self, states_ND: Tensor, which: Tensor, targets: Tensor
    ) -> np.ndarray:
        """Of target i after state `which[i]`, float64; few logits at a time."""
        found = torch.empty(len(targets), dtype=torch.float64)
        at_once = max(1, LOGITS // max(1, self.vocabulary.size))
        for start in range(0, len(states_ND), at_once):
            logits_NV = self._head(states_ND[start : start + at_once]).double()
            here = (which >= start) & (which < start + at_once)
            row = which[here] - start
            nats = logits_NV[row, targets[here]] - logits_NV.logsumexp(-1)[row]
            found[here.cpu()] = nats.cpu()
        return found.numpy()


@final
class Asked(_Asked):
    """Our own model, on the device where its weights are."""

    def __init__(
        self, model: Trinity, vocabulary: Vocabulary, *, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        super().__init__(vocabulary, batch_tokens, model.embedding.weight.device)
        self.model = model

    def _states(self, tokens_BS: Tensor) -> Tensor:
        output = self.model(tokens_BS, hidden=True, last=True)
        return self.model.norm(output.hidden[-1])

    def _head(self, states_ND: Tensor) -> Tensor:
        if self.model.head is None:
            return onednn.linear(states_ND, self.model.embedding.weight)
        return self.model.head(states_ND)

    def _greedy(self, tokens_BS: Tensor, count: int, stop: list[int]) -> Tensor:
        return generate(self.model, tokens_BS, max_new_tokens=count, stop=stop)


@final
class AskedTransformers(_Asked):
    """A causal model of transformers, such as AfmoeForCausalLM."""

    def __init__(
        self, model: Any, vocabulary: Vocabulary, *, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        super().__init__(vocabulary, batch_tokens, model.device)
        self.model = model

    def _states(self, tokens_BS: Tensor) -> Tensor:
        return self.model.base_model(tokens_BS, use_cache=False).last_hidden_state

    def _head(self, states_ND: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(states_ND)

    def _greedy(self, tokens_BS: Tensor, count: int, stop: list[int]) -> Tensor:
        if count == 0:
            return tokens_BS
        return self.model.generate(
            tokens_BS,
            attention_mask=torch.ones_like(tokens_BS),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=stop or None,
            pad_token_id=stop[0] if stop else 0,
        )


def _merged(prompt: str, answer: str, tokens: int) -> str:
    """Why an answer has nothing to be predicted from."""
    if not prompt:
        return "prompts is ''; it must be text where the tokenizer has no begin mark."
    how = "are one token together" if tokens == 1 else "begin with a token of both"
    return (
        f"The prompt {prompt!r} and the answer {answer!r} {how}, and the tokenizer has no "
        "begin mark; the answer must begin with a token of its own, as after a blank."
    )


def _shared(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens two texts begin with together."""
    pairs = enumerate(zip(prompt, whole, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(whole)))
