"""What a run learns, and what it keeps for examinations."""

from pathlib import Path

import pytest

from tests import conversing
from trinity_lib import curriculum, lessons
from trinity_lib.config import BadValue
from trinity_lib.posttrain_config import Stage

ALL = tuple(Stage(kind=kind, steps=1) for kind in ("sft", "dpo", "grpo"))


def test_only_what_the_stages_need_is_read() -> None:
    for stage, questions, pairs in (
        (ALL[0], {"facts"}, set()),
        (ALL[1], set(), {"formats"}),
        (ALL[2], {"digits"}, set()),
    ):
        config = conversing.settings("x", stage, data=("facts",), preferences=("formats",))
        found = curriculum.read(config, conversing.template())
        assert (set(found.questions), set(found.pairs)) == (questions, pairs)
        assert set(found.held_out) == questions and bool(found.held_out_pairs) == bool(pairs)


def test_the_same_prompts_are_held_out_of_every_stage(tmp_path: Path) -> None:
    prompts = [f"question {i}" for i in range(200)]
    asked = conversing.jsonl(
        tmp_path / "a.jsonl", [{"prompt": p, "answer": "x"} for p in prompts]
    )
    preferred = conversing.jsonl(
        tmp_path / "b.jsonl", [{"prompt": p, "chosen": "x", "rejected": "y"} for p in prompts]
    )
    config = conversing.settings("x", *ALL, data=(asked,), preferences=(preferred,))
    found = curriculum.read(config, conversing.template())
    held_out = {question.key for question in found.held_out[asked]}
    assert held_out == {pair.key for pair in found.held_out_pairs}
    assert held_out | {question.key for question in found.questions[asked]} == set(prompts)
    assert 8 <= len(held_out) <= 35


def test_a_task_s_own_held_out_questions_are_kept() -> None:
    config = conversing.settings("x", ALL[0], data=("facts", "arithmetic"), seed=3)
    found = curriculum.read(config, conversing.template())
    assert found.held_out["facts"] == lessons.task("facts", 3).held_out


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    template = conversing.template()
    key = next(f"{i}" for i in range(200) if curriculum.sources.held_out(f"{i}", 10))
    path = conversing.jsonl(tmp_path / "one.jsonl", [{"prompt": key, "answer": "x"}])
    with pytest.raises(BadValue, match="one.jsonl has 1 records, all of them held out"):
        curriculum.read(conversing.settings("x", ALL[0], data=(path,)), template)
    config = conversing.settings("x", ALL[0], data=("formats",), sequence_length=16)
    found = curriculum.read(config, template)
    with pytest.raises(BadValue, match="no answer of formats fits in"):
        curriculum.warnings(found, config, template, 384)
    with pytest.raises(BadValue, match="the tokenizer gives token"):
        curriculum.warnings(found, conversing.settings(), template, 100)
