"""One step of each stage of post-training: answers, preferences, verified rewards."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trinity_lib import examination, rewards
from trinity_lib.chat import Example, Packed, pack
from trinity_lib.data import IGNORE
from trinity_lib.dialogues import Pair, Question
from trinity_lib.losses import log_probabilities, policy_loss, preference_loss, token_loss
from trinity_lib.model import Trinity
from trinity_lib.posttrain_config import PosttrainConfig, Stage
from trinity_lib.rewards import Reward
from trinity_lib.student import Measures, Objective, Student, Update, update


class Method(ABC):
    """What is optimised in a stage."""

    @abstractmethod
    def step(self, student: Student) -> Measures:
        """One step on the stage's next examples."""


class Supervised(Method):
    """Cross entropy of the answers alone; prompts have no loss."""

    def __init__(
        self, stage: Stage, tasks: Sequence[Sequence[Example]], rng: np.random.Generator
    ) -> None:
        self.rows, self.stream = stage.batch, turns(tasks, rng)
        self.held: Example | None = None

    def step(self, student: Student) -> Measures:
        """One update on packed rows."""
        config = student.config
        parts = [
            pack(some, config.sequence_length) for some in _split(self._next(config), config)
        ]
        count = max(1, sum(int((part.batch.targets_BS != IGNORE).sum()) for part in parts))

        def objective(
            logits_BSV: Tensor, targets_BS: Tensor, _: int
        ) -> tuple[Tensor, dict[str, float]]:
            loss = token_loss(logits_BSV, targets_BS)
            hits = (logits_BSV.argmax(-1) == targets_BS).sum()
            sums = {"loss": loss.cross_entropy.item() / count, "accuracy": hits.item() / count}
            return (loss.cross_entropy + config.z_loss * loss.z) / count, sums

        return _measured(update(student, parts, objective))

    def _next(self, config: PosttrainConfig) -> list[Example]:
        """As many of the next examples as fill the step's rows."""
        taken: list[Example] = []
        rows, room = 1, config.sequence_length
        while True:
            example = next(self.stream) if self.held is None else self.held
            size = min(len(example.tokens), config.sequence_length)
            if size > room:
                if rows == self.rows:
                    self.held = example
                    return taken
                rows, room = rows + 1, config.sequence_length
            self.held = None
            taken.append(example)
            room -= size


class Preferences(Method):
    """DPO: the chosen answer likelier than the rejected, measured from a frozen reference."""

    def __init__(
        self,
        stage: Stage,
        student: Student,
        tasks: Sequence[Sequence[Pair]],
        rng: np.random.Generator,
    ) -> None:
        stream = turns(tasks, rng)
        batches = [[next(stream) for _ in range(stage.batch)] for _ in range(stage.steps)]
        used = list(dict.fromkeys(pair for batch in batches for pair in batch))
        length = student.config.sequence_length
        known = examination.likelihoods(student.model, student.template, used, length)
        self.batches, self.reference = iter(batches), dict(zip(used, known, strict=True))

    def step(self, student: Student) -> Measures:
        """One update on the next pairs."""
        config, pairs = student.config, next(self.batches)
        chunks = _split(pairs, config)
        parts = [
            pack(
                [e for pair in some for e in examination.both(student.template, pair)],
                config.sequence_length,
            )
            for some in chunks
        ]

        def objective(
            logits_BSV: Tensor, targets_BS: Tensor, number: int
        ) -> tuple[Tensor, dict[str, float]]:
            some = chunks[number]
            logp_BS = log_probabilities(logits_BSV, targets_BS)
            new_P2 = examination.by_example(logp_BS, parts[number], 2 * len(some)).view(-1, 2)
            old_P2 = torch.stack([self.reference[pair] for pair in some]).to(new_P2)
            (new_c, new_r), (old_c, old_r) = new_P2.unbind(1), old_P2.unbind(1)
            loss = preference_loss(new_c, new_r, old_c, old_r, config.dpo.beta)
            sums = {
                "loss": loss.loss_P.sum().item() / len(pairs),
                "accuracy": (loss.margin_P > 0).sum().item() / len(pairs),
                "margin": loss.margin_P.sum().item() / len(pairs),
            }
            return loss.loss_P.sum() / len(pairs), sums

        return _measured(update(student, parts, objective))


class Sampled(NamedTuple):
    """Answers that a step learns from."""

    examples: list[Example]
    reward_N: Tensor
    advantage_N: Tensor
    right: float


class Rewards(Method):
    """GRPO: answers sampled in groups, each moved by its reward beside its group's."""

    def __init__(
        self,
        stage: Stage,
        student: Student,
        tasks: Sequence[Sequence[Question]],
        rng: np.random.Generator,
        reward: Reward = rewards.verified,
    ) -> None:
        self.prompts, self.stream, self.reward = stage.batch, turns(tasks, rng), reward
        self.reference: Trinity | None = None
        if student.config.grpo.beta:
            self.reference = copy.deepcopy(student.model).requires_grad_(False)
        device = student.config.device
        self.generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))

    def step(self, student: Student) -> Measures:
        """Sample, then a few updates on the samples."""
        config = student.config
        sampled = self._sample(student)
        longest = max(len(example.tokens) for example in sampled.examples)
        length = max(config.sequence_length, longest)
        numbers = _split(range(len(sampled.examples)), config)
        parts = [pack([sampled.examples[i] for i in some], length) for some in numbers]
        old = [self._known(student.model, part) for part in parts]
        reference = old
        if self.reference is not None:
            reference = [self._known(self.reference, part) for part in parts]
        objective = self._objective(config, sampled, numbers, parts, old, reference)
        done = [update(student, parts, objective) for _ in range(config.grpo.updates)]
        mean = {k: float(np.mean([each.sums[k] for each in done])) for k in done[0].sums}
        return Measures(
            reward=float(sampled.reward_N.mean()),
            accuracy=sampled.right,
            grad_norm=float(np.mean([each.grad_norm for each in done])),
            tokens=sum(each.tokens for each in done),
            load_LE=torch.stack([each.load_LE for each in done]).sum(0),
            **mean,
        )

    def _sample(self, student: Student) -> Sampled:
        config, template = student.config, student.template
        group = config.grpo.group
        questions = [next(self.stream) for _ in range(self.prompts)]
        each = [question for question in questions for _ in range(group)]
        prompts = [template.prompt(question.asked) for question in each]
        new_BN = examination.sample(
            student.model, template, prompts, config.grpo.max_new_tokens,
            temperature=config.grpo.temperature, generator=self.generator,
        )  # fmt: skip
        rows, said = new_BN.tolist(), [template.said(row) for row in new_BN.tolist()]
        examples = []
        for prompt, row in zip(prompts, rows, strict=True):
            kept = row[: row.index(template.stop) + 1] if template.stop in row else row
            tokens = np.concatenate([prompt, np.array(kept, dtype=np.int32)])
            examples.append(Example(tokens, np.arange(len(tokens)) >= len(prompt)))
        earned = [self.reward(q, text) for q, text in zip(each, said, strict=True)]
        reward_PG = rewards.as_tensor(earned, group, config.device)
        hits = [rewards.right(q, text) for q, text in zip(each, said, strict=True)]
        advantage_N = rewards.advantages(reward_PG).flatten()
        return Sampled(examples, reward_PG.flatten(), advantage_N, float(np.mean(hits)))

    @torch.no_grad()
    def _known(self, model: Trinity, part: Packed) -> Tensor:
        """Log-probabilities of a part's targets, [B, S], without a gradient."""
        tokens_BS, targets_BS, documents_BS = examination.tensors(part, model)
        with examination.autocast(tokens_BS.device.type):
            logits_BSV = model(tokens_BS, documents_BS).logits
        return log_probabilities(logits_BSV, targets_BS)

    def _objective(
        self,
        config: PosttrainConfig,
        sampled: Sampled,
        numbers: Sequence[Sequence[int]],
        parts: Sequence[Packed],
        old: Sequence[Tensor],
        reference: Sequence[Tensor],
    ) -> Objective:
        count = len(sampled.examples)

        def objective(
            logits_BSV: Tensor, targets_BS: Tensor, number: int
        ) -> tuple[Tensor, dict[str, float]]:
            device, some = logits_BSV.device, torch.tensor(numbers[number])
            owner_BS = torch.from_numpy(parts[number].owner_BS).clamp(min=0).to(device)
            advantage_BS = sampled.advantage_N[some.to(device)][owner_BS]
            valid_BS = (targets_BS != IGNORE).to(advantage_BS.dtype)
            length_N = examination.by_example(valid_BS, parts[number], len(some)).clamp(min=1)
            weight_BS = valid_BS / length_N[owner_BS] / count  # equation 3: tokens, answers
            new_BS = log_probabilities(logits_BSV, targets_BS)
            loss = policy_loss(
                new_BS, old[number], reference[number], advantage_BS,
                clip=config.grpo.clip, beta=config.grpo.beta,
            )  # fmt: skip
            whole = (weight_BS * loss.loss_BS).sum()
            sums = {
                "loss": whole.item(),
                "kl": (weight_BS * loss.divergence_BS).sum().item(),
                "clipped": (weight_BS * loss.clipped_BS).sum().item(),
            }
            return whole, sums

        return objective


def turns(tasks: Sequence[Sequence[Any]], rng: np.random.Generator) -> Iterator[Any]:
    """Without end, an item of each task in turn; a task's own are shuffled every epoch."""
    feeds = [_shuffled(task, np.random.default_rng(rng.integers(2**62))) for task in tasks]
    while True:
        for feed in feeds:
            yield next(feed)


def _shuffled(items: Sequence[Any], rng: np.random.Generator) -> Iterator[Any]:
    while True:
        for index in rng.permutation(len(items)):
            yield items[index]


def _split(items: Sequence[Any], config: PosttrainConfig) -> list[Sequence[Any]]:
    """As many pieces as micro-batches, none of them empty."""
    size = math.ceil(len(items) / config.micro_batches)
    return [items[i : i + size] for i in range(0, len(items), size)]


def _measured(done: Update) -> Measures:
    return Measures(
        grad_norm=done.grad_norm, tokens=done.tokens, load_LE=done.load_LE, **done.sums
    )
