"""Settings of post-training out of range."""

import pytest

from tests import conversing
from trinity_lib.balance import BalanceConfig
from trinity_lib.config import BadValue
from trinity_lib.posttrain_config import PolicyConfig, PreferenceConfig, Stage

SFT, DPO = Stage(kind="sft", steps=1), Stage(kind="dpo", steps=1)
BAD = [
    ({"init": ""}, "init is None; it must be a checkpoint folder"),
    ({"stages": ()}, "stages is .*; it must be at least one of sft, dpo, grpo"),
    ({"stages": (SFT, SFT)}, "stages is 'sft, sft'; it must be stages named once each"),
    ({"stages": (DPO,), "preferences": ()}, "preferences is .*; .* there is a stage dpo"),
    ({"data": ()}, "data is .*; it must be at least one: there is a stage sft"),
    ({"data": ("facts", "facts")}, "data is 'facts, facts'; .* named once each"),
    ({"sequence_length": 4}, "sequence_length is 4; it must be 8 or more"),
    ({"rate": 0}, "rate is 0.0; it must be above zero"),
    ({"warmup": 2}, "warmup is 2.0; it must be from 0 to 1"),
    ({"balance": BalanceConfig(method="hash")}, "balance is 'hash'; .* loss_free, sign"),
    ({"z_loss": -1}, "z_loss is -1.0; it must be zero or more"),
    ({"micro_batches": 0}, "micro_batches is 0; it must be at least 1"),
    ({"questions": 0}, "questions is 0; it must be at least 1"),
    ({"name": "a/b"}, "name is 'a/b'; it must be a file name"),
    ({"device": "tpu"}, "device is 'tpu'; it must be one of cpu, cuda"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD, ids=range(len(BAD)))
def test_a_run_out_of_range_is_refused(changes: dict, sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        conversing.settings(**{"init": "x"} | changes)


@pytest.mark.parametrize(
    ("cls", "changes", "sentence"),
    [
        (Stage, {"kind": "ppo", "steps": 1}, "kind is 'ppo'; it must be one of sft, dpo, grpo"),
        (Stage, {"kind": "sft", "steps": 0}, "sft.steps is 0; it must be from 1"),
        (Stage, {"kind": "dpo", "steps": 1, "batch": 0}, "dpo.batch is 0; it must be from 1"),
        (Stage, {"kind": "sft", "steps": 1, "rate": 0}, "sft.rate is 0.0; it must be above"),
        (PreferenceConfig, {"beta": 0}, "dpo.beta is 0.0; it must be above zero"),
        (PolicyConfig, {"group": 1}, "grpo.group is 1; it must be at least 2"),
        (PolicyConfig, {"updates": 0}, "grpo.updates is 0; it must be at least 1"),
        (PolicyConfig, {"clip": 1}, "grpo.clip is 1.0; it must be between 0 and 1"),
        (PolicyConfig, {"beta": -1}, "grpo.beta is -1.0; it must be zero or more"),
        (PolicyConfig, {"temperature": 0}, "grpo.temperature is 0.0; it must be above zero"),
        (PolicyConfig, {"max_new_tokens": 0}, "grpo.max_new_tokens is 0; it must be at least"),
    ],
)
def test_a_part_out_of_range_is_refused(cls: type, changes: dict, sentence: str) -> None:
    with pytest.raises(BadValue, match=sentence):
        cls(**changes)
