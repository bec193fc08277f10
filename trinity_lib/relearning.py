"""Is what post-training removed from the output only hidden? Then it is soon learnt again.

A copy of each start is taught, by the SFT of `posttrain`, answers about some names, and a
measure follows what that does to others. A hidden association comes back in fewer steps than
its opposite, or than it takes a start that never had it: savings in relearning (Ebbinghaus
1885). Both controls are needed; a step count alone says nothing.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr

from trinity_lib import examination, optim, stage_schema, stages
from trinity_lib.chat import Example, Template
from trinity_lib.config import require
from trinity_lib.dialogues import Question
from trinity_lib.experts import use_backend
from trinity_lib.model import Trinity
from trinity_lib.posttrain_config import PosttrainConfig, Stage
from trinity_lib.posttrain_session import products_dtype
from trinity_lib.student import Student, balancer_of, optimizers, share
from trinity_lib.train import reproducible


class Start(NamedTuple):
    """A checkpoint to begin with."""

    model: Trinity
    template: Template


class Lesson(NamedTuple):
    """What is taught, and how far the measure should move."""

    questions: Sequence[Question]
    """With the answers that are taught."""
    target: float
    """Reached at or beyond it, seen from 0: the measure of no association is 0."""


def relearn(
    starts: Mapping[str, Start],
    lessons: Mapping[str, Lesson],
    measure: Callable[[Trinity], float],
    looks: Sequence[int],
    config: PosttrainConfig,
) -> xr.Dataset:
    """The group `relearning`: every start's copy taught every lesson, looked at on the way.

    `config` has one stage, `sft`, whose steps, learning rates and seed are as in a run of
    `posttrain` (rates fall to 0 with the last step, so step counts are of this schedule);
    its data and `init` are not used. `looks` are the numbers of steps after which `measure`
    is taken, 0 among them. `needed` is interpolated between looks. Starts stay as they are;
    the same arguments give the same numbers. BadValue for another kind of configuration.
    """
    stage = _stage(config, looks)
    for name, many in (("starts", starts), ("lessons", lessons)):
        require(len(many) > 0, name, len(many), "at least one")
    for name, lesson in lessons.items():
        target = lesson.target
        usable = bool(np.isfinite(target)) and target != 0
        require(usable, f"lessons.{name}.target", target, "a number other than 0")
        require(len(lesson.questions) > 0, f"lessons.{name}", 0, "at least one question")
    shape = (len(starts), len(lessons), len(looks))
    bias, needed = np.empty(shape), np.empty(shape[:2])
    with reproducible(config.threads, config.device):
        for s, start in enumerate(starts.values()):
            for n, lesson in enumerate(lessons.values()):
                bias[s, n] = list(_taught(start, lesson, measure, looks, config, stage))
                needed[s, n] = reached(looks, bias[s, n], lesson.target)
    targets = np.array([lesson.target for lesson in lessons.values()])
    values = {"bias": bias, "needed": needed, "steps": np.asarray(looks), "target": targets}
    at = {"start": list(starts), "lesson": list(lessons), "look": np.arange(len(looks))}
    return stage_schema.dataset("relearning", values, at)


def reached(
    steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray, target: float
) -> float:
    """Steps until the target, linear between looks; NaN where it is not reached.

    A target above 0 is reached from below, one below 0 from above; 0 steps where the first
    look is there already.
    """
    at, seen = np.asarray(steps, dtype=float), np.asarray(values) * np.sign(target)
    there = np.flatnonzero(seen >= abs(target))
    if not len(there):
        return float("nan")
    first = int(there[0])
    if first == 0:
        return float(at[0])
    before, after = seen[first - 1 : first + 1]
    part = (abs(target) - before) / (after - before)
    return float(at[first - 1] + part * (at[first] - at[first - 1]))


def _stage(config: PosttrainConfig, looks: Sequence[int]) -> Stage:
    """The one stage; refuses what could not be measured."""
    kinds = [stage.kind for stage in config.stages]
    require(kinds == ["sft"], "stages", ", ".join(kinds), "sft alone")
    require(config.lora is None, "lora", config.lora, "none: whole weights are taught")
    steps = config.stages[0].steps
    rising = all(a < b for a, b in zip(looks, looks[1:], strict=False))
    fits = len(looks) > 0 and rising and looks[0] == 0 and looks[-1] <= steps
    require(fits, "looks", list(looks), f"rising from 0, to at most the stage's {steps} steps")
    return config.stages[0]


def _taught(
    start: Start,
    lesson: Lesson,
    measure: Callable[[Trinity], float],
    looks: Sequence[int],
    config: PosttrainConfig,
    stage: Stage,
) -> Iterator[float]:
    """The measure at every look."""
    rng = np.random.default_rng([config.seed, 0])
    student = _student(start, config)
    examples = [start.template.encode(q.conversation) for q in lesson.questions]
    _require_whole(examples, config, student.model)
    method = stages.Supervised(stage, [examples], rng)
    for step in range(looks[-1] + 1):
        if step in looks:
            with torch.no_grad():
                yield float(measure(student.model))
        if step < looks[-1]:
            optim.set_rate(student.optimizers, stage.rate * share(stage, step, config.warmup))
            method.step(student)


def _require_whole(
    examples: Sequence[Example], config: PosttrainConfig, model: Trinity
) -> None:
    """A lesson that is cut would not be the lesson."""
    size = model.config.vocab_size
    cut = examination.require_fits(examples, config.sequence_length, "a lesson", size)
    right = "long enough for every question of a lesson"
    require(not cut, "sequence_length", config.sequence_length, right)


def _student(start: Start, config: PosttrainConfig) -> Student:
    """A copy that may be trained, with its balancer and optimisers, as `posttrain` has it."""
    model = copy.deepcopy(start.model).to(config.device, torch.float32).requires_grad_(True)
    model.zero_grad()
    use_backend(model, config.experts, products_dtype(config))
    balancer = balancer_of(config, model)
    weights = list(model.parameters())
    moved = optimizers(model, config, weights)
    return Student(config, model, start.template, balancer, moved, weights)
