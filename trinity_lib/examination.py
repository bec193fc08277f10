"""Held-out questions put to a model before and after every stage, and what it says."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity_lib.chat import Example, Packed, Template, pack
from trinity_lib.config import BadValue
from trinity_lib.dialogues import Pair, Question
from trinity_lib.generate import generate
from trinity_lib.losses import log_probabilities
from trinity_lib.model import Trinity
from trinity_lib.rewards import formed, right

AT_ONCE = 64
"""Questions that are answered together."""
LONGEST = 64
"""Tokens of an answer, at most."""
PREFERENCES = "preferences"
"""Name under which the pairs are marked: right is to find the chosen answer likelier."""


class Exam(NamedTuple):
    """What is asked, always the same."""

    questions: list[Question]
    pairs: list[Pair]

    @property
    def tasks(self) -> list[str]:
        """Names of what is marked."""
        names = list(dict.fromkeys(question.task for question in self.questions))
        return names + ([PREFERENCES] if self.pairs else [])

    def count(self, task: str) -> int:
        """How many questions, or pairs, a task has."""
        if task == PREFERENCES:
            return len(self.pairs)
        return sum(question.task == task for question in self.questions)


class Marks(NamedTuple):
    """What came of an exam, one entry a task or a question."""

    accuracy: list[float]
    """Share of right answers."""
    formed: list[float | None]
    """Share of answers of the form that was asked for; None for pairs."""
    said: list[str]
    """Every answer."""


def choose(
    held_out: dict[str, list[Question]], pairs: list[Pair], most: int, seed: int
) -> Exam:
    """At most `most` questions of each task, and as many pairs."""
    rng = np.random.default_rng([seed, 7])
    questions = [q for each in held_out.values() for q in _some(each, most, rng)]
    return Exam(questions, _some(pairs, most, rng))


def sit(model: Trinity, template: Template, exam: Exam, length: int) -> Marks:
    """Have a model answer, greedily, and mark it."""
    said = answers(model, template, exam.questions)
    accuracy: list[float] = []
    form: list[float | None] = []
    for task in exam.tasks:
        own = [pair for pair in zip(exam.questions, said, strict=True) if pair[0].task == task]
        if task != PREFERENCES:
            accuracy.append(float(np.mean([right(q, text) for q, text in own])))
            form.append(float(np.mean([formed(q, text) for q, text in own])))
    if exam.pairs:
        logp_P2 = likelihoods(model, template, exam.pairs, length)
        accuracy.append(float((logp_P2[:, 0] > logp_P2[:, 1]).double().mean()))
        form.append(None)
    return Marks(accuracy, form, said)


def answers(model: Trinity, template: Template, questions: Sequence[Question]) -> list[str]:
    """What a model says to each question, greedily."""
    longest = max((len(_answer(template, q)) for q in questions), default=0)
    said = []
    for begin in range(0, len(questions), AT_ONCE):
        some = questions[begin : begin + AT_ONCE]
        prompts = [template.prompt(q.asked) for q in some]
        new_BN = sample(model, template, prompts, min(longest + 4, LONGEST))
        said += [template.said(row) for row in new_BN.tolist()]
    return said


@torch.no_grad()
def sample(
    model: Trinity,
    template: Template,
    prompts: Sequence[np.ndarray],
    most: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """At most `most` new tokens after each prompt, int64 [B, new]; greedy at temperature 0."""
    device = model.embedding.weight.device
    longest = max(map(len, prompts))
    tokens_BS = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask_BS = torch.zeros_like(tokens_BS)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_BS[row, longest - len(prompt) :] = 1
    with autocast(device.type):
        every_BS = generate(
            model,
            tokens_BS.to(device),
            mask_BS=mask_BS.to(device),
            max_new_tokens=most,
            stop=(template.stop,),
            temperature=temperature,
            generator=generator,
        )
    return every_BS[:, longest:].cpu()


@torch.no_grad()
def likelihoods(
    model: Trinity, template: Template, pairs: Sequence[Pair], length: int
) -> Tensor:
    """Log-probabilities of the chosen and the rejected answers, [P, 2] on the CPU."""
    found = []
    for begin in range(0, len(pairs), AT_ONCE // 2):
        examples = [e for p in pairs[begin : begin + AT_ONCE // 2] for e in both(template, p)]
        part = pack(examples, length)
        tokens_BS, targets_BS, documents_BS = tensors(part, model)
        with autocast(tokens_BS.device.type):
            logits = model(tokens_BS, documents_BS).logits
        logp_BS = log_probabilities(logits, targets_BS)
        found.append(by_example(logp_BS, part, len(examples)).view(-1, 2).cpu())
    return torch.cat(found)


def both(template: Template, pair: Pair) -> tuple[Example, Example]:
    """A pair's two conversations: the answers differ, and they alone count."""
    answered = (
        Question(pair.task, pair.asked, text).conversation
        for text in (pair.chosen, pair.rejected)
    )
    chosen, rejected = (template.encode(conversation) for conversation in answered)
    return chosen, rejected


def by_example(values_BS: Tensor, part: Packed, count: int) -> Tensor:
    """Sums over each example's positions [N]."""
    owner_T = torch.from_numpy(part.owner_BS.reshape(-1)).to(values_BS.device)
    sums_N = values_BS.new_zeros(count + 1)  # the last is the padding's
    owner_T = torch.where(owner_T < 0, count, owner_T)
    return sums_N.index_add(0, owner_T, values_BS.flatten())[:count]


def tensors(part: Packed, model: Trinity) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and documents of packed rows, where the model is."""
    device = model.embedding.weight.device
    tokens_BS, targets_BS, documents_BS = (torch.from_numpy(x).to(device) for x in part.batch)
    return tokens_BS, targets_BS, documents_BS


def autocast(kind: str) -> torch.autocast:
    """bf16 products on CUDA, as in pre-training; nothing on a CPU."""
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


def require_fits(
    examples: Sequence[Example], length: int, what: str, vocabulary: int
) -> list[str]:
    """A warning where examples are cut; BadValue where no answer is left of any."""
    cut = sum(len(e.tokens) > length for e in examples)
    left = sum(bool(e.answer[:length].any()) for e in examples)
    if examples and not left:
        raise BadValue(
            f"sequence_length is {length}; it must be longer: no answer of {what} fits in."
        )
    highest = max((int(e.tokens.max()) for e in examples), default=0)
    if highest >= vocabulary:
        raise BadValue(
            f"the tokenizer gives token {highest:,}; the model has {vocabulary:,} entries."
        )
    if not cut:
        return []
    return [f"{cut} of {len(examples)} examples of {what} are cut at {length} tokens"]


def _answer(template: Template, question: Question) -> np.ndarray:
    example = template.encode(question.conversation)
    return example.tokens[len(template.prompt(question.asked)) :]


def _some(items: Sequence, most: int, rng: np.random.Generator) -> list:
    if len(items) <= most:
        return list(items)
    return [items[i] for i in sorted(rng.permutation(len(items))[:most])]
