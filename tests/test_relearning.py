"""A copy is taught as `posttrain` teaches, looked at on the way; the start is left alone."""

import copy

import numpy as np
import pytest
import torch

from tests import conversing
from trinity_lib import optim, stages
from trinity_lib.config import BadValue
from trinity_lib.dialogues import Question, ask
from trinity_lib.lora import LoraConfig
from trinity_lib.model import ModelConfig, Trinity
from trinity_lib.posttrain_config import PosttrainConfig, Stage
from trinity_lib.relearning import Lesson, Start, reached, relearn
from trinity_lib.student import share

TEACH, ASK = range(0, 40, 2), range(1, 40, 2)


def questions(numbers: range, swapped: bool = False) -> list[Question]:
    """Up is red and down is blue, or the other way round."""
    colours = ("blue", "red") if swapped else ("red", "blue")
    pairs = list(zip(("up", "down"), colours, strict=True))
    return [
        Question("c", ask(f"{n}: {way}?"), colour) for n in numbers for way, colour in pairs
    ]


@torch.no_grad()
def bias(model: Trinity) -> float:
    """log-odds of red against blue, up less down, on numbers that are not taught."""
    template = conversing.template()
    found = []
    for question in questions(ASK)[:16]:
        odds = []
        for colour in ("red", "blue"):
            example = template.encode(question._replace(answer=colour).conversation)
            tokens = torch.from_numpy(example.tokens.astype(np.int64))
            logp = model(tokens[None, :-1]).logits[0].log_softmax(-1)
            nats = logp.gather(-1, tokens[1:, None])[:, 0]
            odds.append(float(nats[torch.from_numpy(example.answer[1:])].sum()))
        found.append(odds[0] - odds[1])
    return float(np.mean(found[::2]) - np.mean(found[1::2]))


def settings(steps: int, **changes: object) -> PosttrainConfig:
    return conversing.settings("x", Stage(kind="sft", steps=steps, batch=4), **changes)


def start(config: ModelConfig) -> Start:
    return Start(conversing.model(config), conversing.template())


def test_it_is_the_sft_of_posttrain_to_the_bit(tiny_model: ModelConfig) -> None:
    config = settings(5, balance=conversing.ON, micro_batches=2)
    seen: list[dict[str, torch.Tensor]] = []

    def measure(model: Trinity) -> float:
        seen.append(copy.deepcopy(model.state_dict()))
        return 0.0

    lesson = Lesson(questions(TEACH), 1.0)
    relearn({"a": start(tiny_model)}, {"l": lesson}, measure, [0, 2, 5], config)
    student = conversing.student(config, tiny_model)
    examples = [student.template.encode(q.conversation) for q in questions(TEACH)]
    stage = config.stages[0]
    method = stages.Supervised(stage, [examples], np.random.default_rng([config.seed, 0]))
    looks = {0: copy.deepcopy(student.model.state_dict())}
    for n in range(5):
        optim.set_rate(student.optimizers, share(stage, n, config.warmup))
        method.step(student)
        looks[n + 1] = copy.deepcopy(student.model.state_dict())
    for look, state in zip((0, 2, 5), seen, strict=True):
        assert all(torch.equal(state[name], value) for name, value in looks[look].items())
    assert not torch.equal(seen[0]["blocks.1.router.bias_E"], seen[2]["blocks.1.router.bias_E"])


def test_what_was_learnt_before_is_needed_no_more(tiny_model: ModelConfig) -> None:
    """An innocent start needs as long for either; one taught before has it at once."""
    config, innocent = settings(18), start(tiny_model)
    kept: list[Trinity] = []

    def keeping(model: Trinity) -> float:
        kept.append(copy.deepcopy(model))
        return bias(model)

    lessons = {"bias": Lesson(questions(TEACH), 2.0)}
    relearn({"innocent": innocent}, lessons, keeping, [0, 18], config)
    lessons["opposite"] = Lesson(questions(TEACH, swapped=True), -2.0)
    before = copy.deepcopy(innocent.model.state_dict())
    starts = {"innocent": innocent, "taught": innocent._replace(model=kept[-1])}
    looks = [0, 6, 12, 18]
    found = relearn(starts, lessons, bias, looks, config)
    again = relearn(starts, lessons, bias, looks, config)
    assert found.identical(again) and found.steps.values.tolist() == looks
    assert all(torch.equal(v, before[k]) for k, v in innocent.model.state_dict().items())
    assert all(p.grad is None for p in innocent.model.parameters())
    needed = found.needed
    assert needed.sel(start="taught", lesson="bias") == 0
    assert needed.sel(start="innocent").min() > 0 and needed.sel(start="innocent").max() < 18
    assert needed.sel(start="taught", lesson="opposite") > 0
    assert found.bias.sel(lesson="opposite").isel(look=-1).max() < -2
    first = found.bias.isel(look=0)
    assert (first.sel(lesson="bias") == first.sel(lesson="opposite")).all()
    assert found.bias.dims == ("start", "lesson", "look")


@pytest.mark.parametrize(
    "values, target, right",
    [
        ([0, 1, 3], 2, 15),
        ([0, 1, 3], 1, 10),
        ([0, -1, -3], -1.5, 12.5),
        ([2, 1, 3], 2, 0),
        ([0, 4, 1], 2, 5),
        ([0, 1, 1.9], 2, np.nan),
        ([0, 1, 3], -0.5, np.nan),
    ],
)
def test_needed_is_where_the_line_between_looks_meets_the_target(
    values: list[float], target: float, right: float
) -> None:
    assert reached([0, 10, 20], values, target) == pytest.approx(right, nan_ok=True)


def test_what_would_not_be_the_same_sft_is_refused(tiny_model: ModelConfig) -> None:
    starts, lesson = {"a": start(tiny_model)}, Lesson(questions(TEACH), 1.0)
    two = conversing.settings("x", Stage(kind="sft", steps=4), Stage(kind="dpo", steps=4))
    for config, lessons, looks, match in (
        (two, {"l": lesson}, [0], "sft alone"),
        (settings(4, lora=LoraConfig()), {"l": lesson}, [0], "lora"),
        (settings(4), {"l": lesson}, [1, 4], "looks is"),
        (settings(4), {"l": lesson}, [0, 5], "looks is"),
        (settings(4), {"l": lesson}, [0, 2, 2], "looks is"),
        (settings(4), {"l": lesson}, [], "looks is"),
        (settings(4), {}, [0, 4], "lessons is 0"),
        (settings(4), {"l": lesson._replace(target=0.0)}, [0, 4], "target is 0"),
        (settings(4), {"l": Lesson([], 1.0)}, [0, 4], "at least one question"),
        (settings(4, sequence_length=8), {"l": lesson}, [0, 4], "sequence_length is 8"),
    ):
        with pytest.raises(BadValue, match=match):
            relearn(starts, lessons, bias, looks, config)
    with pytest.raises(BadValue, match="starts is 0"):
        relearn({}, {"l": lesson}, bias, [0], settings(4))
